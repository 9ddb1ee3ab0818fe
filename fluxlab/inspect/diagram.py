"""The model's map and the two kinds of block, drawn as SVG with the sizes of any variant.

A drawing is a table. A line of cells is a box: its key, its place (middle in pixels, row, width, rows it is tall), the
part it belongs to with its chapter, its title and a note. Other lines are chains of arrows from key to key; a number
after two keys is the upright that an arrow takes, and the words after it are its label.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from math import copysign
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fluxlab.config import variant
from fluxlab.files import write_text
from fluxlab.glossary import Entry
from fluxlab.pipeline.latents import PATCH, PIXELS, grid

_WIDTH, _MARGIN, _ROW, _TALL = 1060, 16, 92, 62  # of the page; from one row of boxes to the next; of a box
_INK, _QUIET, _LINE, _BLUE = "#1f2933", "#5f6b7a", "#8795a1", "#2563eb"
_LOOKS = {"lit": ("#ffe3b3", "#d97706", 3), "steered": ("#dbeafe", _BLUE, 1.5)}  # told apart by lightness too

_MAP = """
prompt   | 430 0 184   |                  | prompt          |
noise    | 730 0 184   | latents 02       | noise           | {latent}
t        | 60 1 64     | embeddings       | t               | 1 → 0
guidance | 160 1 124   | embeddings       | guidance        | {guidance}
clip     | 330 1 184   | text_encoders 01 | CLIP text       | one vector of {V}
t5       | 530 1 184   | text_encoders 01 | T5 encoder      | {T} × {X}
pack     | 730 1 184   | latents 02       | pack            | {I} × {P}
vec      | 225 2 394   | embeddings 04    | vec             | their sum, {C}
txt_in   | 530 2 184   | inputs 01        | txt_in          | {T} × {C}
img_in   | 730 2 184   | inputs 02        | img_in          | {I} × {C}
places   | 930 2 184   | latents 02       | places          | index, row, column
mod      | 330 3 184 3 | modulation 06    | modulation      | each layer its own
double   | 630 3 384   | double_blocks 07 | {depth} × double-stream block   | two sets of weights, one attention
rope     | 930 3 184 2 | rope 05          | RoPE            | axes {axes}
single   | 630 4 384   | single_blocks 08 | {singles} × single-stream block | {T} text + {I} image tokens
last     | 730 5 184   | last_layer 09    | last layer      | velocity, {I} × {O}
step     | 730 6 184   | sampling 03, 11  | Euler step      | t → t next, {steps} times
unpack   | 730 7 184   | latents 02       | unpack          | {latent}
vae      | 530 7 184   | vae 10           | VAE decoder     | 8 × larger
picture  | 330 7 184   |                  | picture         | {picture}
prompt t5 txt_in double; prompt clip vec mod double; noise pack img_in double; places rope double; rope single
t vec; guidance vec; mod single; mod last; double single 530; double single 730; single last step unpack vae picture
step t 16 the next t; step img_in 1044 the moved tokens
"""
_MEETING = """
vec      | 530 0 184   | steered | vec | {C}
pe       | 530 5 170   |         | pe  | {L} × {D/2} × 2 × 2
attend   | 530 6 714   | lit     | join text before image, rotate q and k, attend | {H} heads, {L} × {L}, then {L} × {C}
pe attend
"""
_STREAM = """
{s}      | {x} 1 256   |         | {s}                        | {n} × {C}
{s}1     | {x} 2 256   |         | LayerNorm                  | {n} × {C}
{s}2     | {x} 3 256   | steered | × (1 + scale1) + shift1    | {n} × {C}
{s}3     | {x} 4 256   |         | qkv                        | {n} × {3C}
{s}4     | {x} 5 256   |         | QK-norm; v as it is        | 3 × {H} × {n} × {D}
{s}5     | {x} 7 256   |         | proj                       | {n} × {C}
{s}6     | {x} 8 256   | steered | × gate1, then add          | {n} × {C}
{s}7     | {x} 9 256   |         | LayerNorm                  | {n} × {C}
{s}8     | {x} 10 256  | steered | × (1 + scale2) + shift2    | {n} × {C}
{s}9     | {x} 11 256  |         | MLP: Linear, GELU          | {n} × {M}
{s}10    | {x} 12 256  |         | MLP: Linear                | {n} × {C}
{s}11    | {x} 13 256  | steered | × gate2, then add          | {n} × {C}
mod_{s}  | {y} 1 114 13 | steered | {s}_mod                   | 6 × {C}
{s} {s}1 {s}2 {s}3 {s}4 attend {s}5 {s}6 {s}7 {s}8 {s}9 {s}10 {s}11; {s} {s}6 {past}; {s}6 {s}11 {past}
vec mod_{s} {s}2; mod_{s} {s}6; mod_{s} {s}8; mod_{s} {s}11
"""
_SINGLE = """
vec      | 86 0 140    | steered | vec                        | {C}
mod      | 86 1 140 8  | steered | modulation                 | 3 × {C}
x        | 640 0 256   |         | x: text, then image        | {L} × {C}
norm     | 640 1 256   |         | LayerNorm                  | {L} × {C}
scaled   | 640 2 256   | steered | × (1 + scale) + shift      | {L} × {C}
linear1  | 640 3 256   |         | linear1                    | {L} × {3C+M}
qkv      | 490 4 256   |         | q, k, v; QK-norm           | 3 × {H} × {L} × {D}
pe       | 259 5 170   |         | pe                         | {L} × {D/2} × 2 × 2
attend   | 490 5 256   | lit     | rotate q and k; attend     | {H} heads, {L} × {L}
gelu     | 790 4 256 2 |         | GELU                       | {L} × {M}
joint    | 640 6 256   |         | side by side               | {L} × {C+M}
linear2  | 640 7 256   |         | linear2                    | {L} × {C}
added    | 640 8 256   | steered | × gate, then add           | {L} × {C}
x norm scaled linear1 qkv attend joint linear2 added; linear1 gelu joint; pe attend; x added 990
vec mod scaled; mod added
"""


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
    name: str = "flux-dev", lit: str | Sequence[str] | None = None, height: int | None = None, width: int | None = None
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
    bright = [lit] if isinstance(lit, str) else list(lit or ())
    parts = list(dict.fromkeys(re.findall(r"(?m)^[^|]+\|[^|]+\| (\w+)", _MAP)))
    for part in bright:
        if part not in parts:
            near = difflib.get_close_matches(part, parts, n=2, cutoff=0.3) or parts
            raise ValueError(f"lit is {part!r}, which is not a part; did you mean {' or '.join(near)}?")
    sizes = _sizes(name, height, width)
    table = re.sub("(?m)^guidance .*$|guidance vec; ", "", _MAP) if sizes["guidance"] == "None" else _MAP
    return _draw(f"Map of {name}", table.format_map(sizes), bright)


def block_diagram(
    kind: Literal["double", "single"], name: str = "flux-dev", height: int | None = None, width: int | None = None
) -> Diagram:
    """One block, top to bottom, with the sizes of a variant: blue is steered by ``vec``, orange is where tokens meet.

    Args:
        kind: of block.
        name: of the variant.
        height: of the picture, in pixels; by default the variant's usual one. A partial token counts whole.
        width: likewise.

    Raises:
        ValueError: there is no such kind of block.
    """
    if kind not in ("double", "single"):
        raise ValueError(f"kind is {kind!r}; it is 'double' or 'single'")
    sizes = _sizes(name, height, width)
    txt = {"s": "txt", "n": sizes["T"], "x": 301, "y": 73, "past": 151}
    img = {"s": "img", "n": sizes["I"], "x": 759, "y": 987, "past": 909}
    double = (_MEETING, sizes), (_STREAM, sizes | txt), (_STREAM, sizes | img)
    tables = double if kind == "double" else [(_SINGLE, sizes)]
    return _draw(f"A {kind}-stream block of {name}", "".join(table.format_map(given) for table, given in tables))


def _sizes(name: str, height: int | None, width: int | None) -> dict[str, Any]:
    """What the tables have in braces."""
    chosen = variant(name)
    c, axes = chosen.transformer, "T I L C 3C M C+M 3C+M H D D/2 V X P O"
    rows, columns = grid(*(chosen.size if side is None else side for side in (height, width)))
    shape = Entry("", "tensor", axes, "", "").shape(c, text=chosen.t5_length, image=rows * columns)
    sizes: dict[str, Any] = dict(zip(axes.split(), shape, strict=True))
    sizes |= {"depth": c.depth, "singles": c.depth_single_blocks, "axes": " + ".join(map(str, c.axes_dim))}
    sizes |= {"steps": chosen.num_steps, "guidance": f"{chosen.guidance}".removesuffix(".0")}
    sizes |= {"latent": f"{chosen.autoencoder.z_channels} × {PATCH * rows} × {PATCH * columns}"}
    return sizes | {"picture": f"3 × {PIXELS * rows} × {PIXELS * columns}"}


class _Box(NamedTuple):
    x: float  # middle
    y: float
    width: float
    height: float
    part: str


def _draw(title: str, table: str, lit: Sequence[str] = ("lit",)) -> Diagram:
    """The page that a filled table describes."""
    boxes: dict[str, _Box] = {}
    drawn: list[str] = []
    for line in filter(None, table.splitlines()):
        if "|" in line:
            key, place, belongs, name, note = (cell.strip() for cell in line.split("|"))
            (x, row, width, *tall), (part, _, chapter) = map(int, place.split()), belongs.partition(" ")
            extent = _TALL + _ROW * (sum(tall, -1) if tall else 0)
            box = boxes[key] = _Box(x, _MARGIN + _ROW * row + extent / 2, width, extent, part)
            fill, edge, thick = _LOOKS.get("lit" if part in lit else part, ("#f3f5f7", "#c3cbd3", 1.5))
            drawn += [
                f'<rect x="{x - width / 2:g}" y="{box.y - extent / 2:g}" width="{width}" height="{extent}" rx="8" '
                f'fill="{fill}" stroke="{edge}" stroke-width="{thick}"/>',
                _words(x, box.y + (-2 if note else 7), name, 18, _INK, weight="bold"),
                _words(x, box.y + 20, note),
                _words(x + width / 2 - 7, box.y - extent / 2 + 13, chapter, 12, anchor="end"),
            ]
        else:
            for chain in line.split("; "):
                keys, at, label = re.fullmatch(r"(.+?)(?: (\d+) ?(.*))?", chain).groups("")  # type: ignore[union-attr]
                drawn += [_arrow(boxes[a], boxes[b], int(at or 0), label) for a, b in pairwise(keys.split())]
    height = max(box.y + box.height / 2 for box in boxes.values()) + _MARGIN
    tips = "".join(
        f'<marker id="tip{colour[1:]}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
        for colour in (_LINE, _BLUE)
    )
    return Diagram(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" width="{_WIDTH * 0.75:g}" '
        f'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="{escape(title)}"><defs>{tips}</defs>'
        f'<rect width="{_WIDTH}" height="{height:g}" fill="#ffffff"/>' + "".join(drawn) + "</svg>"
    )


def _words(
    x: float, y: float, text: str, size: int = 16, fill: str = _QUIET, anchor: str = "middle", weight: str = "normal"
) -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(text)}</text>' if text else ""


def _arrow(a: _Box, b: _Box, at: int, label: str) -> str:
    """Straight where one box stands beside or below the other, round by ``at``, or through the gap between rows."""
    narrow, low = min(a, b, key=lambda box: box.width), min(a, b, key=lambda box: box.height)
    side = copysign(1, (at or b.x) - a.x)
    edge, top = a.x + side * a.width / 2, b.y - b.height / 2
    if at and abs(at - a.x) > a.width / 2:  # back up it ends above b, and is dashed
        end = [(at, b.y - 17), (b.x + side * b.width / 2, b.y - 17)]
        back = [(at, top - 15), (b.x, top - 15), (b.x, top)]
        points = [(edge, a.y + 17), (at, a.y + 17), *(end if b.y > a.y else back)]
    elif abs(b.y - a.y) < max(a.height, b.height) / 2:
        points = [(edge, low.y), (b.x - side * b.width / 2, low.y)]
    elif abs(b.x - a.x) < max(a.width, b.width) / 2:
        points = [(at or narrow.x, a.y + a.height / 2), (at or narrow.x, top)]
    else:
        points = [(a.x, a.y + a.height / 2), (a.x, top - 15), (b.x, top - 15), (b.x, top)]
    colour = _BLUE if not at and a.part == b.part == "steered" else _LINE
    dashed = ' stroke-dasharray="6 5"' if b.y < a.y and at else ""
    d = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    line = f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="2"{dashed} marker-end="url(#tip{colour[1:]})"/>'
    return line + _words(edge + 8 * side, a.y + 9, label, anchor="start" if side > 0 else "end")
