"""A grid of prompts and the pictures they become: the same grid for the same seed."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from fluxlab.pipeline.load import load

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


def gallery(name: str, prompts: Sequence[str] = PROMPTS, seed: int = 0, columns: int = 4) -> Image.Image:
    """Paint the prompts with a variant, one seed apart, and lay the pictures out with their prompts below."""
    pictures = load(name)(list(prompts), seed=range(seed, seed + len(prompts)), progress=False)
    assert isinstance(pictures, list)
    side, caption, gap = 256, 62, 16
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + caption + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        x = gap + i % columns * (side + gap)
        y = gap + i // columns * (side + caption + gap)
        sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline="#c3cbd3")
        draw.multiline_text((x, y + side + 6), "\n".join(textwrap.wrap(prompt, 34)), "#1f2933", font, spacing=3)
    return sheet
