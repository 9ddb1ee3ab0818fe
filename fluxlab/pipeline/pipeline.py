"""A prompt becomes a picture: encode the text, draw the noise, denoise, decode. Opened in chapters 00 and 11."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fluxlab.arguments import check_place, whole
from fluxlab.config import Variant
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.transformer import Flux
from fluxlab.pipeline import checks
from fluxlab.pipeline.control import depth, edges
from fluxlab.pipeline.inputs import FluxInputs, first_inputs
from fluxlab.pipeline.latents import COMPRESSION, PIXELS, as_side, grid, noise, pack, unpack
from fluxlab.pipeline.pictures import Picture, as_pictures, as_pixels, as_seen, made_by, stretched
from fluxlab.pipeline.redux import Redux
from fluxlab.pipeline.sampling import Step, denoise
from fluxlab.pipeline.schedule import schedule
from fluxlab.pipeline.shown import Shown, as_mask, preferred_size
from fluxlab.pipeline.text import TextEncoders
from fluxlab.pipeline.tiles import decode, encode
from fluxlab.weights.find import Files
from fluxlab.weights.lora import Lora

Pictures = Picture | list[Picture]


@dataclass(eq=False, repr=False)
class Pipeline:
    """A whole model: ``pipe("a red circle on a white background", seed=0)`` is a picture."""

    variant: Variant
    model: Flux
    autoencoder: AutoEncoder
    text: TextEncoders
    device: torch.device | str = "cpu"  # of what the parts are given: their weights may be offloaded or quantized
    dtype: torch.dtype = torch.float32  # likewise
    lora: Lora | None = None  # that it was loaded with
    redux: Redux | None = None  # tells it pictures as text
    files: Files | None = None  # that it was loaded from
    loras: list[Lora] = field(default_factory=list)  # that add_lora put on and that are on
    speedups: list[Any] = field(default_factory=list)  # what fluxlab.speed put on, in that order

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
        image: Image.Image | Sequence[Image.Image] | None = None,
        mask: Image.Image | None = None,
        control: Image.Image | None = None,
        strength: float | Sequence[float] | None = None,
        tiled: bool = False,
        callback: Callable[[Step], None] | None = None,
        return_steps: bool = False,
        progress: bool = True,
    ) -> Pictures | tuple[Pictures, list[Step]]:
        """Paint a prompt.

        Args:
            prompt: one, or several for a batch.
            seed: of the noise; one for all, or one for each picture. One prompt with several seeds is a batch too.
            num_steps: forwards of the model; by default the variant's usual number.
            guidance: how strongly the prompt is followed, for models with guidance distilled in: one forward a step; by
                default the variant's usual strength.
            height: in pixels, a multiple of 16; by default that of ``control`` or else ``image``; for Kontext, the
                nearest size it knows; without either, and with Redux, the variant's usual size.
            width: likewise.
            negative_prompt: what ``true_cfg`` leads away from; by default the empty prompt.
            true_cfg: above 1, classifier-free guidance with a second forward a step, beside the distilled guidance.
            image: a picture to start from instead of noise alone; for Fill the one with the hole, for Kontext the one
                to change, for Redux one or several to vary; for Canny and Depth without ``control``, the one whose
                edges or depth are followed. It is turned as its EXIF data say, laid on white where it is transparent,
                and stretched to height and width, with a warning above 5 %; for Kontext, to the nearest size it knows.
            mask: white where there is to be painted, for Fill; for others, with ``image``, all else is put back from it
                at each step.
            control: for Canny and Depth, the picture of edges or of depth, stretched as ``image`` is.
            strength: in (0, 1], how much of ``image`` becomes noise, 0.7 by default; 1 leaves nothing of it. It is
                counted in whole steps: the first ``int(num_steps - num_steps * strength)`` are left out. For Redux,
                the weight of each picture, by default 1; their sum weighs the prompt.
            tiled: whether pictures larger than a tile go through the VAE in tiles: less memory, other colours.
            callback: called with every ``Step``.
            return_steps: whether to return ``(pictures, steps)``.
            progress: whether to draw a bar.

        Returns:
            A picture for a prompt and a seed, a list for a list of either. Its ``info`` says how it was made, and so
            does a PNG file of it: prompt, negative_prompt, seed, steps, sampler, guidance, true_cfg, strength, size,
            variant, ``lora``, ``speed`` for what is on of ``fl.speed``, tiled, version, and ``parameters`` for all.

        Raises:
            ValueError: an argument is out of its range, or has no meaning for this model; or what a part of the
                model gives is not finite, as where float16 overflows.
        """
        prompts, seeds = checks.as_batch(prompt, seed)
        if torch.device(self.device).type == "meta":
            raise ValueError("this pipeline is on meta, which has shapes and no numbers to paint with; load it on cpu")
        given = {"image": image, "mask": mask, "control": control}
        checks.check_shown(self.variant.name, self._kind, given)
        images = [] if image is None else [as_seen(each) for each in checks.as_list("image", image)]
        control = None if control is None else as_seen(control, "control")
        begun = images[0] if checks.starts_from(self._kind, given) else None  # else it is shown
        height, width = self._size(height, width, control or (None if self.redux else next(iter(images), None)))
        num_steps = self.variant.num_steps if num_steps is None else whole("num_steps", num_steps)
        weights = checks.as_weights(strength, len(images)) if self.redux else None
        start, strength = checks.first_step(num_steps, begun, None if weights else strength, shown=bool(images))
        checks.check_guidance(guidance, true_cfg, negative_prompt)
        checks.check_callback(callback)
        guidance = self._guidance(guidance)
        times = schedule(num_steps, math.prod(grid(height, width)), shift=self.variant.time_shift)
        pixels = None if begun is None else as_pixels(begun, height, width)
        hole = None if mask is None else as_mask(mask, height, width)
        if begun is not None and hole is not None and not hole[..., ::COMPRESSION, ::COMPRESSION].any():
            said = "mask is white between the latent's cells alone, which are 8 x 8 pixels, so nothing would be painted"
            raise ValueError(f"{said}; make its white larger")
        shown = self._shown(images, hole, control, weights, height, width, tiled)
        inputs = self.prepare(prompts, seeds, height, width, guidance)
        away = [negative_prompt or ""] * len(prompts)
        negative = None if true_cfg == 1 else self.prepare(away, seeds, height, width, guidance)
        if pixels is not None:
            times, latent = times[start:], self._latent(pixels, tiled)
            if hole is not None:
                shown = shown.around(latent, hole, inputs.img)
            inputs.img = torch.lerp(pack(latent).to(inputs.img), inputs.img, times[0])

        steps: list[Step] = []

        def watch(step: Step) -> None:
            if callback is not None:
                callback(step)
            if return_steps:
                steps.append(step)

        tokens = denoise(self.model, inputs, times, negative, true_cfg, watch, progress, shown)
        pictures = self.decode(tokens, height, width, tiled)
        used: dict[str, Any] = {"steps": num_steps, "guidance": guidance, "true_cfg": true_cfg, "tiled": tiled or None}
        used |= {"speed": "; ".join(map(str, self.speedups)) or None, "negative_prompt": negative_prompt}
        used |= {"strength": weights or strength, "size": f"{width}x{height}", "variant": self.variant.name}
        on = [each for lora in self.loras for each in lora.strengths.items()]
        used["lora"] = "; ".join(f"{Path(file).name} at {by:g}" for file, by in on) or None
        for picture, text, number in zip(pictures, prompts, seeds, strict=True):
            picture.info.update(made_by({"prompt": text, "seed": number} | used))
        single = isinstance(prompt, str) and np.ndim(seed) == 0 and len(pictures) == 1
        result = pictures[0] if single else pictures
        return (result, steps) if return_steps else result

    def _shown(
        self,
        images: list[Image.Image],
        hole: Tensor | None,
        control: Image.Image | None,
        weights: list[float] | None,
        height: int,
        width: int,
        tiled: bool,
    ) -> Shown:
        """What is shown beside the noise; edges and depth are made of the picture, where they are not given."""
        if self.redux is not None and weights is not None:
            return Shown.pictures(self.redux(images, self.device, self.dtype), weights)
        if control is None and self._kind in ("edges", "depth"):
            seen = stretched(images[0], height, width)
            control = edges(seen) if self._kind == "edges" else depth(seen)
        if control is not None:
            return Shown.control(self._latent(as_pixels(control, height, width, "control"), tiled))
        if self._kind == "reference":
            nearest = preferred_size(images[0], self.variant.size)
            return Shown.reference(self._latent(as_pixels(images[0], *nearest), tiled))
        if self._kind == "hole" and hole is not None:
            return Shown.hole(self._latent(as_pixels(images[0], height, width) * (1 - hole), tiled), hole)
        return Shown()

    @property
    def _kind(self) -> str:
        """What the model is shown; a LoRA may make it one that is shown edges or depth, Redux one of pictures."""
        kind = self.variant.shown if self.redux is None else "pictures"
        if self.model.config.in_channels <= self.variant.transformer.in_channels:
            return kind
        if kind != "nothing":
            said = "a LoRA has the model shown edges or depth, and by itself or by Redux it is shown something else"
            raise ValueError(f"{said}; take one of them off")
        return "control"

    def _latent(self, pixels: Tensor, tiled: bool) -> Tensor:
        return encode(self.autoencoder, pixels.to(self.device, self.dtype), tiled)

    @torch.no_grad()
    def prepare(
        self, prompts: Sequence[str], seeds: Sequence[int], height: int, width: int, guidance: float | None = None
    ) -> FluxInputs:
        """The first forward's inputs: encoded prompts, noise, and where each token is.

        Raises:
            ValueError: not as many prompts as seeds; guidance for a model without its embedder; a text encoder's
                output is not finite.
        """
        prompts, seeds = checks.as_batch(prompts, seeds)
        different = [each for i, each in enumerate(prompts) if each not in prompts[:i]]  # each is encoded once
        guidance = self._guidance(guidance)
        txt, y = (encoded[[different.index(prompt) for prompt in prompts]] for encoded in self.text(different))
        img = pack(noise(seeds, height, width, self.autoencoder.config.z_channels)).to(self.device, self.dtype)
        return first_inputs(img, txt.to(img), y.to(img), height, width, guidance)

    @torch.no_grad()
    def decode(
        self, tokens: Float[Tensor, "batch image_tokens patch"], height: int, width: int, tiled: bool = False
    ) -> list[Picture]:
        """Clean tokens to pictures, one after the other: their feature maps at once take more memory, and more time.

        Raises:
            ValueError: the pixels are not finite, or the number of tokens is not that of the size.
        """
        latents = unpack(tokens, height, width).to(self.device, self.dtype)
        return as_pictures(torch.cat([decode(self.autoencoder, latent, tiled) for latent in latents.split(1)]))

    def add_lora(self, files: Mapping[Any, float]) -> Lora:
        """Put LoRA files on the model, each with its strength, in every dialect: ``{"style.safetensors": 0.8}``.

        They are kept apart from the weights until ``merge`` of what is returned, and taken off by its ``undo``.

        Raises:
            WeightsError: a file cannot be read, or does not fit the model; nothing is changed then.
            ValueError: a strength is no finite number.
        """
        return Lora({"transformer": self.model, "clip": self.text.clip, "t5": self.text.t5}, files, self.loras)

    def to(self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None) -> Pipeline:
        """Move and cast every part, in place, with the arguments of a module's ``to``.

        Raises:
            ValueError: no such device here, or no floating dtype; weights stay in their file, as with ``low_memory`` or
                a released modulation, or are divided among processes; or they have no numbers to move.
        """
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise ValueError(f"device is {device} and dtype {dtype}; give one dtype")
            device, dtype = None, device
        check_place(self.device if device is None else device, dtype)
        if any(each.kind == "shard" for each in self.speedups):
            raise ValueError("the weights are divided among processes; undo shard first")
        parts: list[torch.nn.Module] = [self.model, self.autoencoder, self.text.t5, self.text.clip]
        parts += [] if self.redux is None else [self.redux]
        moved = str(self.device) != "meta" or device not in (None, "meta", torch.device("meta"))
        if moved and any(p.is_meta for part in parts for p in part.parameters()):
            raise ValueError(
                "weights are not in memory, as with low_memory or on meta; load with that device and dtype"
            )
        for part in parts:
            part.to(device=device, dtype=dtype)
        self.device = self.text.device = self.device if device is None else device
        self.dtype = dtype or self.dtype
        return self

    def __repr__(self) -> str:
        parameters = f"{sum(p.numel() for p in self.model.parameters()):,} parameters in the transformer"
        return f"Pipeline({self.variant.name}: {parameters}, {self.dtype}, {self.device})"

    def _guidance(self, guidance: float | None) -> float | None:
        """What the model is given: the usual strength by default, nothing where it has no embedder."""
        if self.model.config.guidance_embed:
            return self.variant.guidance if guidance is None else float(guidance)
        if guidance is not None:
            said = f"guidance is {guidance}, but {self.variant.name} has no guidance embedder and would ignore it"
            raise ValueError(f"{said}; leave it out, or use true_cfg")
        return None

    def _size(self, height: int | None, width: int | None, image: Image.Image | None) -> tuple[int, int]:
        """Height and width as given, or by default those of the picture that is shown or started from."""
        usual = (self.variant.size, self.variant.size)
        if image is not None and self._kind == "reference":
            usual = preferred_size(image, self.variant.size)
        elif image is not None:
            usual = max(PIXELS, image.height // PIXELS * PIXELS), max(PIXELS, image.width // PIXELS * PIXELS)
        return (
            as_side("height", usual[0] if height is None else height),
            as_side("width", usual[1] if width is None else width),
        )
