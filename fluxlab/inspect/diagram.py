"""The model's map and the two kinds of block, drawn as SVG with the sizes of any variant.

A drawing is a table. A line of cells is a box: its key; its place (left and right in pixels, row, rows it is tall); its
look (T text, I image, S steering, s steered, M where tokens meet, - none of these), its part, chapters; its title; its
note, where a slash ends a line. Other lines are chains of arrows from key to key; a number after two keys is an upright
to take, and the words after it are the label.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fluxlab.config import variant
from fluxlab.files import write_text
from fluxlab.glossary import Entry
from fluxlab.pipeline.latents import PATCH, PIXELS, grid

_WIDTH, _SHOWN, _MARGIN, _GAP = 620, 540, 14, 26  # of the page, and as it is shown; around it; between rows of boxes
_INK, _QUIET, _LINE, _GREEN, _LIT = "#1f2933", "#47525d", "#7b8794", "#009e73", "#ffe08a"
_LOOKS = {"T": ("#fdeee2", "#d55e00"), "I": ("#e8f1f8", "#0072b2"), "M": (_LIT, _INK), "-": ("#f5f6f8", _LINE)}
_LOOKS |= dict.fromkeys("Ss", ("#e6f5ef", _GREEN))

_MAP = """
prompt   | 30 410 0    | T                  | prompt      |
noise    | 432 590 0   | I latents 02       | noise       | {latent}
clip     | 30 218 1    | T text_encoders 01 | CLIP        | one vector of {V}
t5       | 244 410 1   | T text_encoders 01 | T5          | {T} × {X}
pack     | 432 590 1   | I latents 02       | pack        | {I} × {O}
t        | 30 94 2     | S embeddings       | t           | 1 → 0
guidance | 102 218 2   | S embeddings       | guidance    | {guidance}
txt_in   | 244 410 2   | T inputs 01        | txt_in      | {T} × {C}
img_in   | 432 590 2   | I inputs 02        | img_in      | {I} × {C}
vec      | 30 218 3    | S embeddings 04    | vec         | their sum, {C}
double   | 244 590 3 2 | - double_blocks 07 | {depth} × double-stream block   | two sets of weights,/one attention
mod      | 30 218 4 4  | S modulation 06    | modulation  | shift, scale, gate,/each layer its own
places   | 286 412 5   | - latents 02       | places      | {L} × 3
rope     | 440 552 5   | - rope 05          | RoPE        | pe
single   | 244 590 6   | - single_blocks 08 | {singles} × single-stream block | {T} text + {I} image
last     | 330 590 7   | I last_layer 09    | last layer  | velocity, {I} × {O}
step     | 290 510 8   | I sampling 03 11   | Euler step  | {steps} times
picture  | 30 218 9    | I                  | picture     | {picture}
vae      | 244 410 9   | I vae 10           | VAE decoder | 8 × larger
unpack   | 432 590 9   | I latents 02       | unpack      | {latent}
prompt clip; prompt t5 txt_in double; noise pack img_in double; t vec; guidance vec; clip vec 231; vec mod double
mod single; mod last; places rope double; rope single; double single 265; double single 571; single last step unpack
step t 14 next t; step img_in 606 tokens; unpack vae picture
"""
_MEETING = """
vec      | 206 414 0 | S | vec              | {C}
join     | 76 544 5  | M | join, text first | q, k, v: {H} × {L} × {D}
pe       | 76 262 6  | - | pe               | {L} × {D/2} × 2 × 2
rotate   | 288 544 6 | - | rotate q and k   | v stays as it is
attend   | 76 544 7  | M | attention        | {H} heads, {L} × {L}
join rotate attend; pe rotate
"""
_STREAM = """
{s}      | {across} 1  | {look} | {s}    | {n} × {C}
{s}1     | {across} 2  | s      | LayerNorm         | (1 + scale1) x + shift1
{s}2     | {across} 3  | {look} | qkv               | {n} × {3C}
{s}3     | {across} 4  | {look} | QK-norm           | v stays as it is
{s}4     | {across} 8  | {look} | proj              | {n} × {C}
{s}5     | {across} 9  | s      | × gate1, then add | {n} × {C}
{s}6     | {across} 10 | s      | LayerNorm         | (1 + scale2) x + shift2
{s}7     | {across} 11 | {look} | MLP               | GELU, {n} × {M}
{s}8     | {across} 12 | s      | × gate2, then add | {n} × {C}
mod_{s}  | {mod} 0     | S      | {s}_mod           | 6 × {C}
{s} {s}1 {s}2 {s}3 join; attend {s}4 {s}5 {s}6 {s}7 {s}8; {s} {s}5 {past}; {s}5 {s}8 {past}; vec mod_{s}
mod_{s} {s}1 {bus}; mod_{s} {s}5 {bus}; mod_{s} {s}6 {bus}; mod_{s} {s}8 {bus}
"""
_SINGLE = """
vec      | 240 450 0   | S | vec              | {C}
mod      | 10 196 0    | S | modulation       | 3 × {C}
x        | 76 606 1    | - | x, text first    | {L} × {C}
norm     | 76 606 2    | s | LayerNorm        | (1 + scale) x + shift
linear1  | 76 606 3    | - | linear1          | {L} × {3C+M}
qkv      | 76 414 4    | - | q, k, v          | 3 × {H} × {L} × {D}
qk_norm  | 76 414 5    | - | QK-norm          | v stays as it is
pe       | 76 250 6    | - | pe               | {L} × {D/2} × 2 × 2
rotate   | 276 414 6   | - | rotate q, k      |
attend   | 76 414 7    | M | attention        | {H} heads, {L} × {L}
gelu     | 440 606 4 4 | - | GELU             | {L} × {M}
joint    | 76 606 8    | - | side by side     | {L} × {C+M}
linear2  | 76 606 9    | - | linear2          | {L} × {C}
added    | 76 606 10   | s | × gate, then add | {L} × {C}
x norm linear1 qkv qk_norm rotate attend joint linear2 added; linear1 gelu joint; pe rotate; x added 52; vec mod
mod norm 24; mod added 24
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
    """The whole model on one page, each part with its chapter and its sizes: orange text, blue image, green steering.

    What Fill, Kontext and their like are shown beside the noise is left out.

    Args:
        name: of the variant whose sizes are written in.
        lit: a part, or several, to light: text_encoders, latents, inputs, embeddings, modulation, rope, double_blocks,
            single_blocks, last_layer, sampling, vae.
        height: of the picture, in pixels; by default the variant's usual one. A partial token counts whole.
        width: likewise.

    Raises:
        ConfigError: no such variant.
        ValueError: no such part; the message gives the nearest names. A side is not a whole number of at least 1.
    """
    bright = [lit] if isinstance(lit, str) else list(lit or ())
    parts = list(dict.fromkeys(re.findall(r"(?m)^[^|]+\|[^|]+\| \S (\w+)", _MAP)))
    for part in bright:
        if part not in parts:
            near = difflib.get_close_matches(part, parts, n=2, cutoff=0.3) or parts
            raise ValueError(f"lit is {part!r}, which is not a part; did you mean {' or '.join(near)}?")
    sizes = _sizes(name, height, width)
    table = re.sub("(?m)^guidance .*$|guidance vec; ", "", _MAP) if sizes["guidance"] == "None" else _MAP
    return _draw(f"Map of {name}", table.format_map(sizes), 76, bright)


def block_diagram(
    kind: Literal["double", "single"], name: str = "flux-dev", height: int | None = None, width: int | None = None
) -> Diagram:
    """One block, top to bottom, with the sizes of a variant: green is steered by ``vec``, yellow is where tokens meet.

    The tokens are those of noise and text; Kontext's reference, which adds as many as it has, is left out.

    Args:
        kind: of block.
        name: of the variant.
        height: of the picture, in pixels; by default the variant's usual one. A partial token counts whole.
        width: likewise.

    Raises:
        ConfigError: no such variant.
        ValueError: there is no such kind of block. A side is not a whole number of at least 1.
    """
    if kind not in ("double", "single"):
        raise ValueError(f"kind is {kind!r}; it is 'double' or 'single'")
    sizes = _sizes(name, height, width)
    txt = {"s": "txt", "look": "T", "n": sizes["T"], "across": "76 302", "mod": "10 172", "bus": 24, "past": 52}
    img = {"s": "img", "look": "I", "n": sizes["I"], "across": "318 544", "mod": "448 610", "bus": 596, "past": 568}
    double = (_MEETING, sizes), (_STREAM, sizes | txt), (_STREAM, sizes | img)
    tables = double if kind == "double" else [(_SINGLE, sizes)]
    return _draw(f"A {kind}-stream block of {name}", "".join(table.format_map(given) for table, given in tables))


def _sizes(name: str, height: int | None, width: int | None) -> dict[str, Any]:
    """What the tables have in braces."""
    chosen = variant(name)
    c, axes = chosen.transformer, "T I L C 3C M C+M 3C+M H D D/2 V X O"
    rows, columns = grid(*(chosen.size if side is None else side for side in (height, width)))
    shape = Entry("", "tensor", axes, "", "").shape(c, text=chosen.t5_length, image=rows * columns)
    sizes: dict[str, Any] = dict(zip(axes.split(), shape, strict=True))
    sizes |= {"depth": c.depth, "singles": c.depth_single_blocks, "steps": chosen.num_steps}
    sizes |= {"latent": f"{chosen.autoencoder.z_channels} × {PATCH * rows} × {PATCH * columns}"}
    sizes |= {"picture": f"3 × {PIXELS * rows} × {PIXELS * columns}"}
    return sizes | {"guidance": f"{chosen.guidance}".removesuffix(".0")}


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float
    look: str
    title: str


def _draw(title: str, table: str, tall: int = 60, lit: Sequence[str] = ()) -> Diagram:
    """The page that a filled table describes, with boxes so tall."""
    boxes: dict[str, _Box] = {}
    drawn, said = [], []
    for line in filter(None, table.splitlines()):
        if "|" in line:
            key, place, belongs, name, note = (cell.strip() for cell in line.split("|"))
            left, right, row, rows, *_ = *map(int, place.split()), 1
            look, _, rest = belongs.partition(" ")
            part, *chapters = rest.split(" ")
            top = _MARGIN + (tall + _GAP) * row
            box = boxes[key] = _Box(left, top, right, top + (tall + _GAP) * rows - _GAP, look, name)
            fill, edge, thick = (_LIT, _INK, 3.5) if part in lit else (*_LOOKS[look], 1.5)
            drawn += [f'<rect x="{left}" y="{top}" width="{right - left}" height="{box.bottom - top}" rx="8"']
            drawn += [f' fill="{fill}" stroke="{edge}" stroke-width="{thick}"/>']
            lines = f"{name}/{note}".strip("/").split("/")
            first = (top + box.bottom) / 2 + (14 if chapters else 6) - 11 * len(lines)
            for i, each in enumerate(lines):
                drawn += [words((left + right) / 2, first + 11 + 22 * i, each, 16 if i else 18, not i, "middle")]
            for i, each in enumerate(reversed(chapters)):
                drawn += [words(right - 8 - 26 * i, top + 19, each, anchor="end")]
        else:
            for chain in line.split("; "):
                keys, at, label = re.fullmatch(r"(.+?)(?: (\d+) ?(.*))?", chain).groups("")  # type: ignore[union-attr]
                for a, b in pairwise(boxes[key] for key in keys.split()):
                    drawn += [_arrow(a, b, int(at or 0), label)]
                    said += [f"{a.title} to {b.title}"]
    height = max(box.bottom for box in boxes.values()) + _MARGIN
    tips = "".join(
        f'<marker id="tip{colour[1:]}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7"'
        f' orient="auto"><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
        for colour in (_LINE, _GREEN)
    )
    return Diagram(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_SHOWN}" '
        f'style="max-width: 100%; height: auto" font-family="Helvetica, Arial, sans-serif" role="img"'
        f' aria-label="{escape(title)}. Arrows: {escape("; ".join(said))}."><defs>{tips}</defs>'
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>' + "".join(drawn) + "</svg>"
    )


def words(x: float, y: float, text: str, size: int = 16, bold: bool = False, anchor: str = "") -> str:
    """A line of text; ``anchor`` is the end or the middle of it that stands at ``x``, by default its start."""
    look = f'font-weight="bold" fill="{_INK}"' if bold else f'fill="{_QUIET}"'
    look += f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" {look}>{escape(text)}</text>' if text else ""


def _arrow(a: _Box, b: _Box, at: int, label: str) -> str:
    """Level between boxes side by side, else by an upright, which meets a box at its side where it stands apart."""
    low, high = max(a.top, b.top), min(a.bottom, b.bottom)
    if low < high:
        middle, right = (low + high) / 2, a.right < b.left
        points = [(a.right if right else a.left, middle), (b.left if right else b.right, middle)]
    else:
        x, up = at or (max(a.left, b.left) + min(a.right, b.right)) / 2, b.top < a.top
        leaves, enters = (a.top + a.bottom) / 2 + 16, (b.top + b.bottom) / 2 - (a.look != "S") * 16
        out, into = [(min(max(x, a.left), a.right), leaves), (x, leaves)], (min(max(x, b.left), b.right), enters)
        points = [(x, a.top if up else a.bottom)] if a.left < x < a.right else out
        points += [(x, b.bottom if up else b.top)] if b.left < x < b.right else [(x, enters), into]
    colour, dashed = _GREEN if a.look == "S" else _LINE, ' stroke-dasharray="6 5"' if at and b.top < a.top else ""
    d, (x, y) = "M" + " L".join(f"{x:g} {y:g}" for x, y in points), points[0]
    line = f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="2"{dashed} marker-end="url(#tip{colour[1:]})"/>'
    return line + words(x + (8 if at > x else -8), y - 7, label, anchor="start" if at > x else "end")
