"""A prompt becomes a picture: encode the text, draw the noise, denoise, decode. Opened in chapters 00 and 11."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fluxlab.config import Variant, variant
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.transformer import Flux
from fluxlab.pipeline.inputs import FluxInputs
from fluxlab.pipeline.latents import PIXELS, grid, image_ids, noise, pack, text_ids, unpack
from fluxlab.pipeline.sampling import Step, denoise
from fluxlab.pipeline.schedule import schedule
from fluxlab.pipeline.text import TextEncoders
from fluxlab.weights.find import find_files
from fluxlab.weights.load import autoencoder_config, load_weights

Pictures = Image.Image | list[Image.Image]


@dataclass
class Pipeline:
    """A whole model: ``pipe("a red circle on a white background", seed=0)`` is a picture."""

    variant: Variant
    model: Flux
    autoencoder: AutoEncoder
    text: TextEncoders

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        num_steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | None = None,
        true_cfg: float = 1.0,
        image: Image.Image | None = None,
        strength: float | None = None,
        callback: Callable[[Step], None] | None = None,
        return_steps: bool = False,
        progress: bool = True,
    ) -> Pictures | tuple[Pictures, list[Step]]:
        """Paint a prompt.

        Args:
            prompt: one, or several for a batch.
            seed: of the noise; one for all, or one for each picture. One prompt with several seeds is a batch too.
            num_steps: forwards of the model; by default the variant's usual number.
            guidance: how strongly the prompt is followed, for models with guidance distilled in: one forward a step.
            height: in pixels, a multiple of 16; by default ``image``'s, or the variant's usual size.
            width: likewise.
            negative_prompt: what ``true_cfg`` leads away from; by default the empty prompt.
            true_cfg: above 1, classifier-free guidance with a second forward a step, beside the distilled guidance.
            image: a picture to start from instead of noise alone; it is resized to height and width.
            strength: in (0, 1], how much of ``image`` becomes noise, 0.7 by default; 1 leaves nothing of it. It is
                counted in whole steps, ``int(num_steps * (1 - strength))`` of which are left out.
            callback: called with every ``Step``.
            return_steps: whether to return ``(pictures, steps)``.
            progress: whether to draw a bar.

        Returns:
            A picture for a prompt and a seed, a list for a list of either.

        Raises:
            ValueError: an argument is out of its range, or has no meaning for this model.
        """
        prompts, seeds = _batch(prompt, seed)
        num_steps = self.variant.num_steps if num_steps is None else num_steps
        height, width = self._size(height, width, image)
        rows, columns = grid(height, width)
        times = schedule(num_steps, rows * columns, shift=self.variant.time_shift)
        start = _check_options(num_steps, guidance, image, strength, true_cfg, negative_prompt)

        inputs = self.prepare(prompts, seeds, height, width, guidance)
        negative = None
        if true_cfg != 1:
            txt, y = self.text([negative_prompt or ""])
            negative = replace(
                inputs, txt=txt.to(inputs.txt).expand_as(inputs.txt), y=y.to(inputs.y).expand_as(inputs.y)
            )

        if image is not None:
            times = times[start:]
            latent = pack(self.autoencoder.encode(self._pixels(image, height, width)))
            inputs.img = torch.lerp(latent.to(inputs.img), inputs.img, times[0])

        steps: list[Step] = []
        watchers = [watcher for watcher in (callback, steps.append if return_steps else None) if watcher]

        def watch(step: Step) -> None:
            for watcher in watchers:
                watcher(step)

        tokens = denoise(self.model, inputs, times, negative, true_cfg, watch if watchers else None, progress)
        pictures = self.decode(tokens, height, width)
        result = pictures[0] if isinstance(prompt, str) and isinstance(seed, Integral) else pictures
        return (result, steps) if return_steps else result

    @torch.no_grad()
    def prepare(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        height: int,
        width: int,
        guidance: float | None = None,
    ) -> FluxInputs:
        """The first forward's inputs: encoded prompts, noise, and where each token is.

        Raises:
            ValueError: guidance for a model without its embedder, or a model that takes more than noise and text.
        """
        config, batch = self.model.config, len(prompts)
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"{self.variant.name} is shown a second picture beside the noise (in_channels {config.in_channels}, "
                f"out_channels {config.out_channels}), which a prompt alone does not give; call its model directly"
            )
        if guidance is not None and not config.guidance_embed:
            raise ValueError(
                f"guidance is {guidance}, but {self.variant.name} has no guidance embedder and would ignore it; leave "
                f"it out, or use true_cfg"
            )
        if config.guidance_embed and guidance is None:
            guidance = self.variant.guidance
        device, dtype = self.model.img_in.weight.device, self.model.img_in.weight.dtype
        different = list(dict.fromkeys(prompts))  # each is encoded once
        txt, y = (encoded[[different.index(prompt) for prompt in prompts]] for encoded in self.text(different))
        return FluxInputs(
            img=pack(noise(seeds, height, width, self.autoencoder.config.z_channels)).to(device, dtype),
            img_ids=image_ids(batch, height, width, device=device),
            txt=txt.to(device, dtype),
            txt_ids=text_ids(batch, txt.shape[1], device=device),
            timesteps=torch.ones(batch, device=device),
            y=y.to(device, dtype),
            guidance=None if guidance is None else torch.full((batch,), float(guidance), device=device),
        )

    @torch.no_grad()
    def decode(self, tokens: Float[Tensor, "batch image_tokens patch"], height: int, width: int) -> list[Image.Image]:
        """Clean tokens to pictures, one after the other: their feature maps at once take more memory, and more time."""
        weight = self.autoencoder.decoder.conv_in.weight
        latents = unpack(tokens, height, width).to(weight.device, weight.dtype)
        pixels = torch.cat([self.autoencoder.decode(latent) for latent in latents.split(1)])
        scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
        return [Image.fromarray(picture) for picture in scaled.permute(0, 2, 3, 1).cpu().numpy()]

    def _pixels(self, image: Image.Image, height: int, width: int) -> Float[Tensor, "1 rgb height width"]:
        weight = self.autoencoder.encoder.conv_in.weight
        resized = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)[None]
        return (pixels.float() / 127.5 - 1).to(weight.device, weight.dtype)

    def _size(self, height: int | None, width: int | None, image: Image.Image | None) -> tuple[int, int]:
        usual = (self.variant.size, self.variant.size)
        if image is not None and not isinstance(image, Image.Image):
            raise ValueError(f"image is a {type(image).__name__}; give a PIL image: Image.open(path), or fromarray")
        if image is not None and image.mode.startswith(("I", "F")):
            raise ValueError(f"image has mode {image.mode!r}, more than 8 bits a channel; bring it to 8 bits first")
        if image is not None:
            usual = (max(PIXELS, image.height // PIXELS * PIXELS), max(PIXELS, image.width // PIXELS * PIXELS))
        size = (usual[0] if height is None else height, usual[1] if width is None else width)
        grid(*size)
        for name, side in zip(("height", "width"), size, strict=True):
            if side % PIXELS:
                raise ValueError(
                    f"{name} is {side}; it must be a multiple of {PIXELS}, one token is {PIXELS}x{PIXELS} pixels: "
                    f"try {max(PIXELS, round(side / PIXELS) * PIXELS)}"
                )
        return size


def _batch(prompt: str | Sequence[str], seed: int | Sequence[int]) -> tuple[list[str], list[int]]:
    """As many prompts as seeds."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    given = np.asarray(seed, dtype=object).reshape(-1).tolist()  # of a tensor or an array too
    for each in given:
        if not (isinstance(each, Integral) and -(2**63) <= int(each) < 2**64):
            raise ValueError(f"seed is {each!r}; give a whole number of 64 bits, or one for each picture")
    seeds = [int(each) for each in given]
    for name, those in (("prompt", prompts), ("seed", seeds)):
        if not those:
            raise ValueError(f"{name} is an empty list; give at least one")
    if len(prompts) == 1:
        prompts *= len(seeds)
    if len(seeds) == 1:
        seeds *= len(prompts)
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds; give one seed, or one for each prompt")
    return prompts, seeds


def _check_options(
    num_steps: int,
    guidance: float | None,
    image: Image.Image | None,
    strength: float | None,
    true_cfg: float,
    negative_prompt: str | None,
) -> int:
    """Refuses what is out of range, or would have no effect; the first step that is taken."""
    if guidance is not None and not (isinstance(guidance, Real) and isfinite(guidance)):
        raise ValueError(f"guidance is {guidance!r}; it must be a finite number, such as 3.5")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it must be above 0 and at most 1, where nothing of image is left")
    if strength is not None and image is None:
        raise ValueError(f"strength is {strength}, but there is no image to start from; give image, or leave it out")
    if not true_cfg >= 1:
        raise ValueError(f"true_cfg is {true_cfg}; it must be at least 1, where it is off")
    if negative_prompt is not None and true_cfg == 1:
        raise ValueError("negative_prompt has no effect while true_cfg is 1; give a true_cfg above 1, such as 3")
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        raise ValueError(f"negative_prompt is {negative_prompt!r}; give one string, which serves every picture")
    if image is None:
        return 0
    strength = 0.7 if strength is None else strength
    start = min(num_steps - 1, int(num_steps - num_steps * strength))
    if start == 0 and strength < 1:
        raise ValueError(
            f"strength is {strength}, and {num_steps} steps take all of that from noise: nothing of image would be "
            f"left; give more steps, a smaller strength, or 1 if that is meant"
        )
    return start


def load(
    name: str,
    source: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Pipeline:
    """A model with its weights, ready to paint. The flux-tiny variants are carried in the repository.

    Args:
        name: of the variant.
        source: for the others, a folder laid out as the official repository is, or that repository's hub name.
        device: where the weights go.
        dtype: of the weights: float32 for flux-tiny and bfloat16 for the others by default.

    Raises:
        ConfigError: no such variant.
        ValueError: no such device here, or no floating dtype.
        WeightsError: files are missing, or hold another model.
    """
    chosen = variant(name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {str(device)!r}, which cannot be used here ({error})") from error
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; give a floating dtype of torch, such as torch.bfloat16")
    files = find_files(chosen, source)
    dtype = dtype or (torch.float32 if chosen.embedded else torch.bfloat16)
    with torch.device("meta"):
        model = Flux(chosen.transformer)
        autoencoder = AutoEncoder(autoencoder_config(chosen, files.autoencoder))
    return Pipeline(
        variant=chosen,
        model=load_weights(model, files.transformer, device, dtype),
        autoencoder=load_weights(autoencoder, files.autoencoder, device, dtype),
        text=TextEncoders.load(
            files.t5,
            files.clip,
            chosen.t5_length,
            chosen.clip_length,
            t5_tokenizer=files.t5_tokenizer,
            clip_tokenizer=files.clip_tokenizer,
            device=device,
            dtype=dtype,
        ),
    )
