"""Drawings of the two kinds of block, as SVG, each step with the shape of what it gives, for any variant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fluxlab.config import variant
from fluxlab.inspect.diagram import EDGE, FILL, INK, LINE, LIT_EDGE, LIT_FILL, QUIET, Diagram, canvas, words
from fluxlab.pipeline.latents import grid

_STEP, _TALL, _WIDE = 88, 54, 250  # from one row of boxes to the next; a box's height and usual width
_STEER, _STEER_EDGE = "#dbeafe", "#2563eb"  # what the vector steers


@dataclass(frozen=True)
class _Step:
    """A box: what is done, and the shape of what comes out."""

    x: float  # middle
    row: float
    title: str
    shape: str
    kind: Literal["plain", "steered", "meeting"] = "plain"
    width: float = _WIDE

    @property
    def top(self) -> float:
        return 24 + self.row * _STEP

    @property
    def bottom(self) -> float:
        return self.top + _TALL


def block_diagram(
    kind: Literal["double", "single"], name: str = "flux-dev", height: int | None = None, width: int | None = None
) -> Diagram:
    """One block, top to bottom, with the sizes of a variant: blue is steered by ``vec``, orange is where tokens meet.

    Args:
        kind: of block.
        name: of the variant.
        height: of the picture, in pixels; by default the variant's usual one.
        width: likewise.

    Raises:
        ValueError: there is no such kind of block.
    """
    if kind not in ("double", "single"):
        raise ValueError(f"kind is {kind!r}; it is 'double' or 'single'")
    chosen = variant(name)
    rows, columns = grid(*(chosen.size if side is None else side for side in (height, width)))
    sizes = {"T": chosen.t5_length, "I": rows * columns, "C": chosen.transformer.hidden_size}
    sizes |= {"H": chosen.transformer.num_heads, "D": chosen.transformer.head_dim}
    sizes |= {"M": chosen.transformer.mlp_hidden_dim, "L": sizes["T"] + sizes["I"]}
    draw = _double if kind == "double" else _single
    steps, lines = draw(sizes)
    body = [*lines, *(part for step in steps for part in _draw(step))]
    bottom = int(max(step.bottom for step in steps)) + 24
    return canvas(1030, bottom, f"A {kind}-stream block of {name}", body)


def _double(n: dict[str, int]) -> tuple[list[_Step], list[str]]:
    middle, columns = 515.0, {"txt": (200.0, "T"), "img": (830.0, "I")}
    steps, lines = [], []
    for stream, (x, letter) in columns.items():
        tokens = n[letter]
        column = [
            _Step(x, 0, stream, f"{tokens} × {n['C']}"),
            _Step(x, 1, "LayerNorm", f"{tokens} × {n['C']}"),
            _Step(x, 2, "× (1 + scale1) + shift1", f"{tokens} × {n['C']}", "steered"),
            _Step(x, 3, "qkv", f"{tokens} × {3 * n['C']}"),
            _Step(x, 4, "QK-norm; v as it is", f"3 × {n['H']} × {tokens} × {n['D']}"),
            _Step(x, 6, "proj", f"{tokens} × {n['C']}"),
            _Step(x, 7, "× gate1, then add", f"{tokens} × {n['C']}", "steered"),
            _Step(x, 8, "LayerNorm", f"{tokens} × {n['C']}"),
            _Step(x, 9, "× (1 + scale2) + shift2", f"{tokens} × {n['C']}", "steered"),
            _Step(x, 10, "MLP: Linear, GELU", f"{tokens} × {n['M']}"),
            _Step(x, 11, "Linear", f"{tokens} × {n['C']}"),
            _Step(x, 12, "× gate2, then add", f"{tokens} × {n['C']}", "steered"),
        ]
        steps += column
        for above, below in pairwise(column):
            if below.row - above.row == 2:  # into the attention between them, and out of it
                lines.append(_arrow((x, above.bottom), (x, above.top + _STEP - 3)))
            lines.append(_arrow((x, below.top - _STEP + _TALL), (x, below.top - 3)))
        lines.append(_arrow((x, column[-1].bottom), (x, column[-1].bottom + 24)))
        side = x + (-1 if stream == "txt" else 1) * (_WIDE / 2 + 34)
        for start, end in ((column[0], column[6]), (column[6], column[11])):  # the residual stream goes past
            first, last = (start.bottom + 12, end.top + _TALL / 2)
            edge = x + (-1 if stream == "txt" else 1) * (_WIDE / 2 + 3)
            lines.append(_arrow((x, first), (side, first), (side, last), (edge, last)))
    joint = f"{n['H']} heads, {n['L']} × {n['L']}, then {n['L']} × {n['C']}"
    steps.append(_Step(middle, 5, "rotate q and k; text before image; attend", joint, "meeting", 880))
    steps.append(_Step(middle, 0, "vec", f"{n['C']}", "steered", 150))
    steps.append(_Step(middle, 1, "txt_mod, img_mod", f"2 × 6 × {n['C']}", "steered", 210))
    lines.append(_arrow((middle, steps[-2].bottom), (middle, steps[-1].top - 3)))
    lines += _steering(middle, steps[-1].bottom, steps, 75.0, 705.0)
    return steps, lines


def _steering(x: float, top: float, steps: list[_Step], left: float, right: float) -> Iterator[str]:
    """Thin blue lines from the modulation to what it steers."""
    for step in steps:
        if step.kind == "steered" and step.row > 1 and step.row < 5:
            y = step.top + _TALL / 2
            near = step.x + (_WIDE / 2 if step.x < x else -_WIDE / 2)
            yield _arrow((x, top), (x, y), (near + (3 if step.x < x else -3), y), colour=_STEER_EDGE)


def _single(n: dict[str, int]) -> tuple[list[_Step], list[str]]:
    x, left, right = 515.0, 290.0, 740.0
    tokens, wide, hidden = n["L"], n["C"], n["M"]
    trunk = [
        _Step(x, 0, "x: text, then image", f"{tokens} × {wide}"),
        _Step(x, 1, "LayerNorm", f"{tokens} × {wide}"),
        _Step(x, 2, "× (1 + scale) + shift", f"{tokens} × {wide}", "steered"),
        _Step(x, 3, "linear1", f"{tokens} × {3 * wide + hidden}"),
    ]
    attention = [
        _Step(left, 4, "q, k, v; QK-norm", f"3 × {n['H']} × {tokens} × {n['D']}", width=360),
        _Step(left, 5, "rotate q and k; attend", f"{tokens} × {wide}", "meeting", 360),
    ]
    mlp = [_Step(right, 4.5, "GELU", f"{tokens} × {hidden}")]
    after = [
        _Step(x, 6, "side by side", f"{tokens} × {wide + hidden}"),
        _Step(x, 7, "linear2", f"{tokens} × {wide}"),
        _Step(x, 8, "× gate, then add", f"{tokens} × {wide}", "steered"),
    ]
    lines = [_arrow((x, a.bottom), (x, b.top - 3)) for part in (trunk, after) for a, b in pairwise(part)]
    lines.append(_arrow((left, attention[0].bottom), (left, attention[1].top - 3)))
    for branch in (attention, mlp):
        side = branch[0].x
        turn = trunk[-1].bottom + 14
        lines.append(_arrow((x, trunk[-1].bottom), (x, turn), (side, turn), (side, branch[0].top - 3)))
        y = after[0].top + _TALL / 2
        edge = x + (-1 if side < x else 1) * (_WIDE / 2 + 3)
        lines.append(_arrow((side, branch[-1].bottom), (side, y), (edge, y)))
    first, last, past = trunk[0].bottom + 12, after[-1].top + _TALL / 2, 930.0
    lines.append(_arrow((x, first), (past, first), (past, last), (x + _WIDE / 2 + 3, last)))
    lines.append(_arrow((x, after[-1].bottom), (x, after[-1].bottom + 24)))
    vec = _Step(145, 0, "vec", f"{wide}", "steered", 190)
    modulation = _Step(145, 1, "modulation", f"3 × {wide}", "steered", 190)
    lines.append(_arrow((145, vec.bottom), (145, modulation.top - 3)))
    for step, start in ((trunk[2], 145.0), (after[2], 60.0)):
        y = step.top + _TALL / 2
        lines.append(_arrow((start, modulation.bottom), (start, y), (x - _WIDE / 2 - 3, y), colour=_STEER_EDGE))
    return [*trunk, *attention, *mlp, *after, vec, modulation], lines


def _draw(step: _Step) -> Iterator[str]:
    fill, edge = {"plain": (FILL, EDGE), "steered": (_STEER, _STEER_EDGE), "meeting": (LIT_FILL, LIT_EDGE)}[step.kind]
    yield (
        f'<rect x="{step.x - step.width / 2:g}" y="{step.top:g}" width="{step.width:g}" height="{_TALL}" rx="8" '
        f'fill="{fill}" stroke="{edge}" stroke-width="1.5"/>'
    )
    yield words(step.x, step.top + 23, step.title, 18, "bold", INK)
    yield words(step.x, step.top + 44, step.shape, 16, colour=QUIET)


def _arrow(*points: tuple[float, float], colour: str = LINE) -> str:
    d = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="2" marker-end="url(#tip)"/>'
