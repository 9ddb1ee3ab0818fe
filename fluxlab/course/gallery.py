"""Grids of what flux-tiny and its relatives paint: the same grid for the same seed."""

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fluxlab.arguments import whole
from fluxlab.pipeline.checks import as_list
from fluxlab.pipeline.control import edges
from fluxlab.pipeline.load import load
from fluxlab.tiny.family import paint_hole
from fluxlab.tiny.holes import hole_on
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
    Scene((Thing("circle", "red", "large"), Thing("star", "yellow", "large")), "left of", "gray"),
)


def gallery(name: str, prompts: Sequence[str] = PROMPTS, seed: int = 0, columns: int = 4) -> Image.Image:
    """Paint the prompts with a variant, one seed apart, and lay the pictures out with their prompts below."""
    prompts, columns = as_list("prompts", prompts), whole("columns", columns)
    pictures: Any = load(name)(prompts, seed=range(seed, seed + len(prompts)), progress=False)
    return _sheet([*zip(pictures, prompts, strict=True)], columns)


def relatives(seed: int = 0) -> Image.Image:
    """What three relatives of flux-tiny are shown, and below what each makes of it: Fill, Canny as a LoRA, Kontext."""
    drawn = [draw_scene(scene, np.random.default_rng(seed)) for scene in _SHOWN]
    cut, follow, change = (Image.fromarray(picture.pixels) for picture in drawn)
    hole = replace(hole_on(drawn[0], 1), prompt="a large yellow star on a white background")
    top, bottom, left, right = hole.box
    cut.paste("gray", (left, top, right, bottom))
    canny = load("flux-tiny-dev", lora={data_folder() / "flux-tiny/flux-tiny-canny-dev-lora.safetensors": 1.0})
    kontext: Any = load("flux-tiny-kontext-dev")
    lines, told = edges(follow), "a large green triangle above a large pink star on a navy background"
    blue = "make the circle blue"
    painted: Any = canny(told, control=lines, seed=seed, progress=False)
    pictures = [
        (cut, "Fill is shown a picture and a hole"),
        (lines, "Canny is shown edges"),
        (change, "Kontext is shown a picture"),
        (paint_hole(load("flux-tiny-fill-dev"), drawn[0], hole, seed), hole.prompt),
        (painted, told),
        (kontext(blue, image=change, seed=seed, progress=False), blue),
    ]
    return _sheet(pictures, columns=3)


def _sheet(pictures: Sequence[tuple[Image.Image, str]], columns: int) -> Image.Image:
    side, caption, gap = 256, 62, 16
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + caption + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for i, (picture, words) in enumerate(pictures):
        x = gap + i % columns * (side + gap)
        y = gap + i // columns * (side + caption + gap)
        sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline="#c3cbd3")
        draw.multiline_text((x, y + side + 6), "\n".join(textwrap.wrap(words, 34)), "#1f2933", font, spacing=3)
    return sheet
