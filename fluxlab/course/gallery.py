"""Grids of what flux-tiny and its relatives paint: the same grid for the same seed."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fluxlab.pipeline.control import edges
from fluxlab.pipeline.load import load
from fluxlab.tiny.holes import hole_on, masks_of
from fluxlab.tiny.pictures import USUAL
from fluxlab.tiny.world import Scene, Thing, draw_scene
from fluxlab.weights.find import data_folder

PROMPTS = (
    "a small red circle left of a large blue square on a white background",
    "a large yellow star on a navy background",
    "a large green ring above a small purple triangle on a gray background",
    "a small orange cross at the top, on a black background",
    "a large cyan square to the right of a small pink star on a navy background",
    "a navy background with a small pink ring in the center",
    "a large purple cross below a large yellow circle, white background",
    "a picture of a large red triangle on the right on a black background",
)
_SHOWN = (  # what each relative is shown
    Scene((Thing("ring", "pink", "small"), Thing("square", "blue", "large")), "left of", "white"),
    Scene((Thing("triangle", "orange", "large"), Thing("star", "cyan", "large")), "above", "navy"),
    Scene((Thing("circle", "red", "large"),), "left", "gray"),
)


def gallery(name: str, prompts: Sequence[str] = PROMPTS, seed: int = 0, columns: int = 4) -> Image.Image:
    """Paint the prompts with a variant, one seed apart, and lay the pictures out with their prompts below."""
    pictures: Any = load(name)(list(prompts), seed=range(seed, seed + len(prompts)), progress=False)
    return _sheet(zip(pictures, prompts, strict=True), columns)


def relatives(seed: int = 0) -> Image.Image:
    """What three relatives of flux-tiny are shown, and below what each makes of it: Fill, Canny as a LoRA, Kontext."""
    drawn = [draw_scene(scene, np.random.default_rng(seed)) for scene in _SHOWN]
    whole, follow, change = (Image.fromarray(picture.pixels) for picture in drawn)
    mask = masks_of(torch.tensor([hole_on(drawn[0], 1).box]), *USUAL)[0, 0]
    hole = Image.fromarray(255 * mask.byte().numpy())
    said = (
        "a large yellow star on a white background",
        "a large green triangle above a large pink star",
        "make the circle blue",
    )
    canny = load("flux-tiny-dev", lora={data_folder() / "flux-tiny/flux-tiny-canny-dev-lora.safetensors": 1.0})
    painted: Any = (
        load("flux-tiny-fill-dev")(said[0], image=whole, mask=hole, seed=seed, progress=False),
        canny(f"{said[1]} on a navy background", control=edges(follow), seed=seed, progress=False),
        load("flux-tiny-kontext-dev")(said[2], image=change, seed=seed, progress=False),
    )
    shown = (Image.composite(Image.new("RGB", whole.size, "gray"), whole, hole), edges(follow), change)
    told = ("Fill is shown a picture and a hole", "Canny is shown edges", "Kontext is shown a picture")
    return _sheet([*zip(shown, told, strict=True), *zip(painted, said, strict=True)], 3)


def _sheet(pictures: Iterable[tuple[Image.Image, str]], columns: int) -> Image.Image:
    pairs = list(pictures)
    side, caption, gap = 256, 62, 16
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + caption + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for i, (picture, words) in enumerate(pairs):
        x = gap + i % columns * (side + gap)
        y = gap + i // columns * (side + caption + gap)
        sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline="#c3cbd3")
        draw.multiline_text((x, y + side + 6), "\n".join(textwrap.wrap(words, 34)), "#1f2933", font, spacing=3)
    return sheet
