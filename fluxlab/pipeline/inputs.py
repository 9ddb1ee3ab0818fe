"""Everything one forward takes, in one place, to look at and to save. Opened in chapter 00."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float, Num
from torch import Tensor

from fluxlab.arguments import whole
from fluxlab.config import variant
from fluxlab.files import WeightsError, describe_difference, read_tensors, write_tensors
from fluxlab.pipeline.latents import generator, grid, ids_device, image_ids, text_ids


@dataclass(eq=False)
class FluxInputs:
    """The arguments of ``Flux.forward``, by name: ``model(**inputs.kwargs())``."""

    img: Float[Tensor, "batch image_tokens in_channels"]
    img_ids: Num[Tensor, "batch image_tokens 3"]
    txt: Float[Tensor, "batch text_tokens context_dim"]
    txt_ids: Num[Tensor, "batch text_tokens 3"]
    timesteps: Float[Tensor, " batch"]
    y: Float[Tensor, "batch vec_dim"]
    guidance: Float[Tensor, " batch"] | None = None

    def kwargs(self) -> dict[str, Tensor]:
        """What is given, by name; guidance is left out where there is none."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with one tensor for each input.

        Raises:
            WeightsError: they have no numbers, as on the meta device.
        """
        write_tensors(self.kwargs(), path)

    @classmethod
    def load(cls, path: str | Path) -> FluxInputs:
        """Read what ``save`` wrote.

        Raises:
            WeightsError: the file is not readable as safetensors, or its names are not a forward's inputs.
        """
        tensors = read_tensors(path)
        wanted = {field.name for field in fields(cls)} - ({"guidance"} - set(tensors))
        if problems := describe_difference(wanted, tensors):
            raise WeightsError(f"{path}: not a forward's inputs: {problems}")
        return cls(**tensors)

    def __repr__(self) -> str:
        rows = [f"  {name:<9} {list(t.shape)!s:<18} {t.dtype}, {t.device}" for name, t in self.kwargs().items()]
        return "\n".join(["FluxInputs", *rows])


def first_inputs(
    img: Tensor, txt: Tensor, y: Tensor, height: int, width: int, guidance: float | None = None
) -> FluxInputs:
    """Noise and text with what goes along in the first forward: each token's place, time 1, and guidance if any."""
    batch, ids = len(img), ids_device(img.device)
    ones = torch.ones(batch, dtype=torch.float32, device=img.device)
    img_ids, txt_ids = image_ids(batch, height, width, device=ids), text_ids(batch, txt.shape[1], device=ids)
    strength = None if guidance is None else torch.full_like(ones, guidance)
    return FluxInputs(img, img_ids, txt, txt_ids, ones, y, strength)


def example_inputs(
    name: str,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> FluxInputs:
    """Random inputs of the shapes that a variant takes, at its usual size or another; on "meta", shapes alone.

    Image, text and ``y`` are unit noise; the time is 1 and the guidance the variant's usual one.

    Args:
        name: of the variant.
        height: of the picture, in pixels; by default the variant's usual one. A partial token counts whole.
        width: likewise.
        batch: pictures at once.
        device: where the tensors are.
        dtype: of ``img``, ``txt`` and ``y``; the others are float32.
        seed: of the noise.

    Raises:
        ConfigError: no such variant.
        ValueError: a size, batch or seed that is no such number.
    """
    chosen = variant(name)
    config, batch = chosen.transformer, whole("batch", batch)
    height, width = (chosen.size if side is None else side for side in (height, width))
    rows, columns = grid(height, width)
    drawn = "meta" if torch.device(device).type == "meta" else "cpu"
    seeded = None if drawn == "meta" else generator(seed)
    shapes = (rows * columns, config.in_channels), (chosen.t5_length, config.context_in_dim), (config.vec_in_dim,)
    img, txt, y = (
        torch.randn(batch, *shape, generator=seeded, dtype=torch.float32, device=drawn).to(device, dtype)
        for shape in shapes
    )
    return first_inputs(img, txt, y, height, width, chosen.guidance)
