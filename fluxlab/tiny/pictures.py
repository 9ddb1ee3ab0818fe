"""The pictures that flux-tiny learns from, as pixels and as latents with their captions. Opened in chapter 16.

Axes: number N, height H and width W in pixels.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm.auto import trange

from fluxlab.files import read_tensors, write_tensors
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.pipeline.latents import PIXELS, image_ids, pack
from fluxlab.pipeline.shown import Shown
from fluxlab.pipeline.text import TextEncoders
from fluxlab.tiny.recipe import DEV, Recipe
from fluxlab.tiny.truth import of_tokens
from fluxlab.tiny.world import PICTURE_SIZES, Picture, random_picture

USUAL = (DEV.size, DEV.size)  # what most pictures measure; the others are fewer, the larger they are


def draw(number: int, height: int, width: int, seed: int | Sequence[int], held_out: bool = False) -> Iterator[Picture]:
    """Pictures of random scenes."""
    rng = np.random.default_rng(seed)
    return (random_picture(rng, height, width, held_out) for _ in range(number))


def pixels_of(pictures: Iterable[Picture]) -> Tensor:
    """Their pixels, as uint8 of ``N 3 H W``."""
    return torch.stack([torch.from_numpy(picture.pixels).permute(2, 0, 1) for picture in pictures])


def to_float(pixels: Tensor) -> Tensor:
    """0..255 to -1..1."""
    return pixels.float() / 127.5 - 1


def save_grid(path: Path, pictures: Sequence[Any], columns: int) -> None:
    """Pictures or their pixels, ``H W 3``, side by side, as a PNG."""
    Image.fromarray(rearrange(np.stack(pictures), "(r c) h w rgb -> (r h) (c w) rgb", c=columns)).save(path)


def file_of(run: Path, kind: str, size: tuple[int, int] = USUAL) -> Path:
    """Where what a training learns from is kept, for pictures of a size."""
    return run / "{}-{}x{}.safetensors".format(kind, *size)


Examples = tuple[dict[str, Tensor], dict[str, Tensor], list[str]]  # pixels in -1..1, other columns, and the prompts


def encode(
    path: Path, number: int, some: Callable[[int], Examples], autoencoder: AutoEncoder, text: TextEncoders
) -> None:
    """Write so many examples that ``some`` draws, a row each, with the latents of their pixels, unless it is done."""
    if path.exists():
        return
    columns: dict[str, list[Tensor]] = defaultdict(list)
    told: list[str] = []
    for first in trange(0, number, 16, desc=path.stem, unit="batch", mininterval=10):
        pictures, others, prompts = some(min(16, number - first))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for name, pixels in pictures.items():  # four at a time: their feature maps fit the processor's cache
                columns[name] += [autoencoder.encode(few).half() for few in pixels.split(4)]
        for name, column in others.items():
            columns[name].append(column)
        told += prompts
    t5_ids, clip_ids = (ids.short() for ids in text.tokenize(told))
    tensors = {name: torch.cat(column) for name, column in columns.items()}
    write_tensors(tensors | {"t5_ids": t5_ids, "clip_ids": clip_ids}, path)


def encode_pictures(run: Path, recipe: Recipe, autoencoder: AutoEncoder, text: TextEncoders) -> None:
    """The training pictures of each size: their latents, their captions, and what each token shows."""

    def some(drawn: Iterator[Picture], number: int) -> Examples:
        batch = list(islice(drawn, number))
        truth = torch.stack([of_tokens(picture).byte() for picture in batch])
        return {"latents": to_float(pixels_of(batch))}, {"truth": truth}, [picture.caption for picture in batch]

    for path, height, width, number in missing(run, "latents", recipe.pictures):
        drawn = draw(number, height, width, (recipe.seed + 3, height, width))
        encode(path, number, partial(some, drawn), autoencoder, text)


def missing(run: Path, kind: str, usual: int) -> Iterator[tuple[Path, int, int, int]]:
    """The files of a kind still to be made: path, height, width and number of pictures, ``usual`` of the usual size."""
    for height, width in PICTURE_SIZES:
        if not (path := file_of(run, kind, (height, width))).exists():
            fewer = max(1, 3 * usual * USUAL[0] * USUAL[1] // (32 * height * width))
            yield path, height, width, usual if (height, width) == USUAL else fewer


Stages = tuple[tuple[str, Callable[[Recipe], int]], ...]  # the flow's and that of guidance, with their steps


class Pictures:
    """Batches of latents with their captions' tokens, every batch of one size, from all files of a kind in ``run``.

    The class says what learns from them and how: here flux-tiny, its relatives in subclasses.
    """

    kind = "latents"
    sizes: tuple[tuple[int, int], ...] = PICTURE_SIZES
    variant = DEV
    stages: Stages = (("flow", lambda recipe: recipe.flow_steps), ("guidance", lambda recipe: recipe.guidance_steps))
    true_cfg = 3.0  # at which the teacher's previews are painted
    learns_words = True  # whether the flow trains the text encoders too
    gently = False  # how guidance is distilled with them
    keeping = 1.0  # the weight of an error where the prompt does not decide: there, it is small and has to be smaller

    def __init__(self, run: Path, recipe: Recipe) -> None:
        self.run, self.recipe = run, recipe
        self.sets = [read_tensors(file_of(run, self.kind, size)) for size in self.sizes]
        share = (1 - recipe.usual_share) / max(1, len(self.sizes) - 1)
        self.shares = torch.tensor([recipe.usual_share if size == USUAL else share for size in self.sizes])

    def batch(self, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Rows drawn from one of the sets, latents and noise packed; and the ids of their image tokens."""
        which = int(torch.multinomial(self.shares, 1, generator=generator))
        (height, width), tensors = self.sizes[which], self.sets[which]
        number = self.recipe.image_tokens // (height * width // PIXELS**2)
        rows = torch.randint(len(tensors["latents"]), (number,), generator=generator)
        chosen = {name: tensor[rows] for name, tensor in tensors.items()}
        packed = {name: pack(t.float()) if t.ndim == 4 else t.int() for name, t in chosen.items()}
        return packed, image_ids(number, height, width)

    def shown(self, chosen: dict[str, Tensor]) -> Shown:
        """What a model is shown beside the noise of a batch: here nothing."""
        return Shown()

    def changed(self, chosen: dict[str, Tensor]) -> Tensor:
        """The tokens in which the prompt decides, so that guidance acts: here all."""
        return torch.ones((), dtype=torch.bool)

    def mean(self, squares: Tensor, chosen: dict[str, Tensor]) -> Tensor:
        """Of an error's squares, with ``keeping``."""
        return torch.where(self.changed(chosen), squares, self.keeping * squares).mean()
