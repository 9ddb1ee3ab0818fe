"""The pictures that flux-tiny learns from, as pixels and as latents with their captions. Opened in chapter 16.

Axes: number N, height H and width W in pixels, image tokens I.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm.auto import trange

from fluxlab.config import VARIANTS
from fluxlab.files import read_tensors, write_tensors
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.pipeline.latents import image_ids, pack
from fluxlab.pipeline.text import TextEncoders
from fluxlab.tiny.recipe import Recipe
from fluxlab.tiny.truth import of_tokens
from fluxlab.tiny.world import PICTURE_SIZES, Picture, random_picture

SIZE = VARIANTS["flux-tiny-dev"].size


def encode_pictures(run: Path, recipe: Recipe, autoencoder: AutoEncoder, text: TextEncoders) -> None:
    """Draw the training pictures of each size; keep their latents, their captions, and what each token shows."""
    for height, width in PICTURE_SIZES:
        number = number_of(recipe.pictures, height, width)

        def make(height: int = height, width: int = width, number: int = number) -> dict[str, Tensor]:
            latents, captions, shown = [], [], []
            drawn = draw(number, height, width, (recipe.seed + 3, height, width))
            for _ in trange(0, number, 32, desc=f"latents {height}x{width}", unit="batch", mininterval=10):
                batch = list(islice(drawn, 32))
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    pixels = to_float(torch.stack([pixels_of(picture) for picture in batch]))
                    latents += [autoencoder.encode(few).half() for few in pixels.split(4)]  # as fits a cache
                captions += [picture.caption for picture in batch]
                shown += [of_tokens(picture).byte() for picture in batch]
            tokens = text.tokenize(captions)
            ids = {"t5_ids": tokens[0].short(), "clip_ids": tokens[1].short()}
            return {"latents": torch.cat(latents), "shown": torch.stack(shown), **ids}

        cached(run / f"latents-{height}x{width}.safetensors", make)


def draw(
    number: int, height: int, width: int, seed: int | tuple[int, ...], held_out: bool = False
) -> Iterator[Picture]:
    """Pictures of random scenes."""
    rng = np.random.default_rng(seed)
    return (random_picture(rng, height, width, held_out) for _ in range(number))


def pixels_of(picture: Picture) -> Tensor:
    """Its pixels, as uint8 of ``3 H W``."""
    return torch.from_numpy(picture.pixels).permute(2, 0, 1)


def to_float(pixels: Tensor) -> Tensor:
    """0..255 to -1..1."""
    return pixels.float() / 127.5 - 1


def cached(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the file holds; made and kept if it is not there."""
    if not path.exists():
        write_tensors(make(), path)
    return read_tensors(path)


def save_grid(path: Path, pixels: Tensor, columns: int) -> None:
    """Pictures in -1..1, side by side, as a PNG."""
    grid = rearrange(pixels.clamp(-1, 1), "(r c) rgb h w -> (r h) (c w) rgb", c=columns)
    Image.fromarray(((grid + 1) * 127.5).round().byte().numpy()).save(path)


class Pictures:
    """Batches of latents with their captions' tokens, every batch of one size."""

    def __init__(self, run: Path, recipe: Recipe, kind: str = "latents") -> None:
        """Read the files ``{kind}-{height}x{width}`` in ``run``."""
        self.recipe = recipe
        self.sets = [read_tensors(run / f"{kind}-{height}x{width}.safetensors") for height, width in PICTURE_SIZES]
        share = (1 - recipe.usual_share) / (len(PICTURE_SIZES) - 1)
        self.shares = torch.tensor([recipe.usual_share if usual(size) else share for size in PICTURE_SIZES])

    def batch(self, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Rows drawn from one of the sets, latents and noise packed; and the ids of their image tokens."""
        which = int(torch.multinomial(self.shares, 1, generator=generator))
        (height, width), tensors = PICTURE_SIZES[which], self.sets[which]
        number = self.recipe.image_tokens // (tensors["latents"][0, 0].numel() // 4)
        rows = torch.randint(len(tensors["latents"]), (number,), generator=generator)
        chosen = {name: tensor[rows] for name, tensor in tensors.items()}
        packed = {name: pack(t.float()) if t.ndim == 4 else t.int() for name, t in chosen.items()}
        return packed, image_ids(number, height, width)


def number_of(number: int, height: int, width: int) -> int:
    """How many pictures of a size there are for ``number`` of the usual size: the larger, the fewer."""
    return number if usual((height, width)) else max(1, 3 * number * SIZE**2 // (32 * height * width))


def usual(size: tuple[int, int]) -> bool:
    """Whether pictures are mostly of this size."""
    return size == (SIZE, SIZE)
