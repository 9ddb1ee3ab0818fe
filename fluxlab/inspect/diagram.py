"""Drawings of the model, as SVG, with the sizes of any variant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from fluxlab.config import Variant, variant
from fluxlab.files import write_text
from fluxlab.pipeline.latents import COMPRESSION, PATCH, PIXELS, grid

_WIDTH, _HEIGHT = 1030, 1106
INK, QUIET, LINE = "#1f2933", "#5f6b7a", "#8795a1"
FILL, EDGE = "#f3f5f7", "#c3cbd3"
LIT_FILL, LIT_EDGE = "#ffe3b3", "#d97706"  # told from the rest by lightness too, not by hue alone
_TEXT, _VEC, _IMAGE, _PLACE = 125, 375, 625, 875  # the middle of each column


@dataclass(frozen=True)
class _Box:
    """A part of the model on the map."""

    part: str
    chapter: str
    title: str
    note: str
    x: float  # middle
    y: float  # top
    width: float = 220
    height: float = 74


@dataclass(frozen=True)
class Diagram:
    """An SVG drawing; Jupyter shows it as a picture."""

    svg: str = field(repr=False)

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> None:
        """Write the drawing as an SVG file."""
        write_text(self.svg, path)


def model_map(
    name: str = "flux-dev", lit: str | list[str] | None = None, height: int | None = None, width: int | None = None
) -> Diagram:
    """The whole model on one page, each part with its chapter and its sizes.

    Args:
        name: of the variant whose sizes are written in.
        lit: a part, or several, to draw in colour: text_encoders, latents, inputs, embeddings, modulation, rope,
            double_blocks, single_blocks, last_layer, sampling, vae.
        height: of the picture, in pixels; by default the variant's usual one. A partial token counts whole.
        width: likewise.

    Raises:
        ValueError: no such part; the message gives the nearest names.
    """
    chosen = variant(name)
    boxes = _boxes(chosen, *(chosen.size if side is None else side for side in (height, width)))
    parts = list(dict.fromkeys(box.part for box in boxes if box.part))
    bright = [lit] if isinstance(lit, str) else list(lit or [])
    for part in bright:
        if part not in parts:
            near = difflib.get_close_matches(part, parts, n=2, cutoff=0.3) or parts
            raise ValueError(f"lit is {part!r}, which is not a part; did you mean {' or '.join(near)}?")
    body = [*_arrows(boxes), *(line for box in boxes for line in _draw(box, box.part in bright))]
    return canvas(_WIDTH, _HEIGHT, f"Map of {name}", body)


def canvas(width: int, height: int, title: str, body: Iterable[str]) -> Diagram:
    """A white page of SVG with ``body`` on it; arrows end in ``url(#tip)``."""
    return Diagram(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width * 0.75:.0f}" '
        f'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="{escape(title)}">'
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>' + "".join(body) + "</svg>"
    )


def _boxes(chosen: Variant, height: int, width: int) -> list[_Box]:
    c, a = chosen.transformer, chosen.autoencoder
    rows, columns = grid(height, width)
    tokens = rows * columns
    guided = "time + guidance + CLIP" if c.guidance_embed else "time + CLIP"
    latent = f"{a.z_channels} × {PATCH * rows} × {PATCH * columns}"
    joint = f"{chosen.t5_length} text + {tokens} image tokens"
    return [
        _Box("", "", "prompt", "", (_TEXT + _VEC) / 2, 20, 220, 46),
        _Box("latents", "02", "noise", latent, _IMAGE, 20, height=64),
        _Box("latents", "02", "places", "index, row, column", _PLACE, 20, height=64),
        _Box("text_encoders", "01", "T5 encoder", f"{chosen.t5_length} × {c.context_in_dim}", _TEXT, 116),
        _Box("text_encoders", "01", "CLIP text", f"one vector of {c.vec_in_dim}", _VEC, 116),
        _Box("latents", "02", "pack", f"{tokens} × {c.in_channels}", _IMAGE, 116),
        _Box("inputs", "01", "txt_in", f"{chosen.t5_length} × {c.hidden_size}", _TEXT, 244),
        _Box("embeddings", "04", "vec", guided, _VEC, 244),
        _Box("inputs", "02", "img_in", f"{tokens} × {c.hidden_size}", _IMAGE, 244),
        _Box("rope", "05", "RoPE", f"axes {' + '.join(map(str, c.axes_dim))}", _PLACE, 244),
        _Box("modulation", "06", "modulation", "each layer its own", _VEC, 348),
        _Box(
            "double_blocks",
            "07",
            f"{c.depth} × double-stream block",
            "two sets of weights, one attention",
            375,
            468,
            720,
        ),
        _Box("single_blocks", "08", f"{c.depth_single_blocks} × single-stream block", joint, 375, 596, 720),
        _Box("last_layer", "09", "last layer", f"velocity, {tokens} × {c.out_channels}", _IMAGE, 724),
        _Box("sampling", "03, 11", "Euler step", f"t → t next, {chosen.num_steps} times", _IMAGE, 852),
        _Box("latents", "02", "unpack", latent, _IMAGE, 980),
        _Box("vae", "10", "VAE decoder", f"{COMPRESSION} × larger", _VEC, 980),
        _Box("", "", "picture", f"3 × {PIXELS * rows} × {PIXELS * columns}", _TEXT, 980),
    ]


def _draw(box: _Box, lit: bool) -> Iterator[str]:
    left, fill, edge = box.x - box.width / 2, LIT_FILL if lit else FILL, LIT_EDGE if lit else EDGE
    yield (
        f'<rect x="{left:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" rx="8" fill="{fill}" '
        f'stroke="{edge}" stroke-width="{3 if lit else 1.5}"/>'
    )
    middle = box.y + box.height / 2
    yield words(box.x, middle + (-4 if box.note else 7), box.title, 21, "bold")
    if box.note:
        yield words(box.x, middle + 21, box.note, 18, colour=QUIET)
    if box.chapter:
        yield words(left + box.width - 8, box.y + 18, box.chapter, 14, colour=QUIET, anchor="end")


def words(
    x: float, y: float, text: str, size: int, weight: str = "normal", colour: str = INK, anchor: str = "middle"
) -> str:
    """A line of text, its baseline at ``y``."""
    style = f'font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(text)}</text>'


def _arrows(boxes: list[_Box]) -> Iterator[str]:
    """From what gives to what takes."""
    by_title = {box.title.split(" × ")[-1]: box for box in boxes}

    def path(*points: tuple[float, float], dashed: bool = False) -> str:
        d = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        dash = ' stroke-dasharray="6 5"' if dashed else ""
        return f'<path d="{d}" fill="none" stroke="{LINE}" stroke-width="2.5"{dash} marker-end="url(#tip)"/>'

    def down(first: str, then: str, x: float) -> str:
        a, b = by_title[first], by_title[then]
        return path((x, a.y + a.height), (x, b.y - 3))

    prompt, clip, double, single = (
        by_title[n] for n in ("prompt", "CLIP text", "double-stream block", "single-stream block")
    )
    for x in (_TEXT, _VEC):
        turn = prompt.y + prompt.height + 24
        yield path((prompt.x, prompt.y + prompt.height), (prompt.x, turn), (x, turn), (x, clip.y - 3))
    for first, then, x in (
        ("noise", "pack", _IMAGE),
        ("places", "RoPE", _PLACE),
        ("T5 encoder", "txt_in", _TEXT),
        ("CLIP text", "vec", _VEC),
        ("pack", "img_in", _IMAGE),
        ("txt_in", "double-stream block", _TEXT),
        ("vec", "modulation", _VEC),
        ("modulation", "double-stream block", _VEC),
        ("img_in", "double-stream block", _IMAGE),
        ("double-stream block", "single-stream block", _TEXT),
        ("double-stream block", "single-stream block", _IMAGE),
        ("single-stream block", "last layer", _IMAGE),
        ("last layer", "Euler step", _IMAGE),
        ("Euler step", "unpack", _IMAGE),
    ):
        yield down(first, then, x)
    rope, last, step = by_title["RoPE"], by_title["last layer"], by_title["Euler step"]
    for block in (double, single):  # every block turns q and k by the same table
        y = block.y + block.height / 2
        yield path((rope.x, rope.y + rope.height), (rope.x, y), (block.x + block.width / 2 + 3, y))
    y = last.y + last.height / 2  # modulation also steers the single blocks and the last layer
    yield path((_VEC, single.y + single.height), (_VEC, y), (last.x - last.width / 2 - 3, y))
    yield words(_VEC + 12, y - 12, "modulation", 18, colour=QUIET, anchor="start")
    pack, y = by_title["pack"], step.y + step.height / 2  # and again, from the next time on
    right = _PLACE + 132
    yield path((step.x + step.width / 2, y), (right, y), (right, 217), (pack.x, 217), dashed=True)
    yield words(right - 12, y - 12, "again, from the next t", 18, colour=QUIET, anchor="end")
    unpack_, vae, picture = by_title["unpack"], by_title["VAE decoder"], by_title["picture"]
    for a, b in ((unpack_, vae), (vae, picture)):
        yield path((a.x - a.width / 2, a.y + a.height / 2), (b.x + b.width / 2 + 3, b.y + b.height / 2))
