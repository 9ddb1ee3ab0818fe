"""Pictures of what is inside, in one look: colours that colour-blind readers tell apart, signed data centred on zero.

Each function gives a matplotlib ``Figure``, which Jupyter shows and ``figure.savefig`` writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fluxlab.config import variant
from fluxlab.extras import importing
from fluxlab.inspect.table import Table
from fluxlab.inspect.tape import Tape
from fluxlab.model.rope import rope
from fluxlab.pipeline.latents import grid
from fluxlab.pipeline.schedule import schedule as make_schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")  # Okabe and Ito, 2008
SIGNED, POSITIVE = "RdBu_r", "viridis"
_LOOK: dict[Any, Any] = {"font.size": 10, "axes.titlesize": 11, "axes.grid": False, "legend.frameon": False}
_LOOK |= {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 100, "savefig.bbox": "tight"}


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.5, 4.0)) -> tuple[Figure, list[Axes]]:
    """An empty figure in the house's look, and its axes row by row; it is shown once, by whoever asked for it."""
    with importing():
        from cycler import cycler
        from matplotlib import pyplot, rc_context

    with rc_context(_LOOK | {"axes.prop_cycle": cycler(color=COLOURS)}):
        made = pyplot.figure(figsize=size, layout="constrained")
        axes = made.subplots(rows, columns, squeeze=False)
    pyplot.close(made)  # else a notebook would show it twice
    return made, list(axes.flat)


def _reach(values: np.ndarray) -> float:
    """How far the values go from zero, the outermost 0.5 % and what is not finite left out."""
    sizes = np.abs(values[np.isfinite(values)])
    return (float(np.quantile(sizes, 0.995)) if sizes.size else 0.0) or 1.0


def _heat(axes: Axes, values: Tensor, title: str, x: str, y: str, signed: bool | None = None, **options: Any) -> Any:
    """A matrix as colours; what is signed gets a map centred on zero. What is no number stays white."""
    data = values.detach().cpu().double().numpy()
    if signed or (signed is None and (data < 0).any()):
        options = {"cmap": SIGNED, "vmin": -_reach(data), "vmax": _reach(data)} | options
    shown = axes.imshow(data, **({"aspect": "auto", "interpolation": "nearest", "cmap": POSITIVE} | options))
    axes.set(title=title, xlabel=x, ylabel=y)
    return shown


def bars(table: Table, value: str, label: str | None = None, title: str | None = None) -> Figure:
    """One column of a table as horizontal bars, its total left out."""
    rows = [row for row in table if next(iter(row.values())) != "all"]
    if not rows:
        raise ValueError("table has no rows to draw")
    label = label or next(iter(table[0]))
    made, (axes,) = figure(size=(7.5, 0.9 + 0.32 * len(rows)))
    numbers = [float(row[value]) for row in rows]
    axes.barh(range(len(rows)), numbers, color=COLOURS[0])
    axes.set_yticks(range(len(rows)), [str(row[label]) for row in rows])
    axes.invert_yaxis()
    axes.bar_label(axes.containers[0], [f"{n:,.3g}" if n < 1e3 else f"{n:,.0f}" for n in numbers], padding=3)  # type: ignore[arg-type]
    axes.margins(x=0.18)
    axes.set(xlabel=value, title=table.title if title is None else title)
    return made


def schedule(steps: Sequence[int] = (4, 20, 50), image_tokens: Sequence[int] = (256, 1024, 4096)) -> Figure:
    """Times of the sampling loop: for several numbers of steps, and bent for several numbers of image tokens."""
    made, (left, right) = figure(1, 2, (9.5, 3.6))
    for number in steps:
        times = make_schedule(number, max(image_tokens))
        left.plot(np.linspace(0, 1, number + 1), times, marker="o", markersize=3, label=f"{number} steps")
    for tokens in image_tokens:
        right.plot(np.linspace(0, 1, 51), make_schedule(50, tokens), label=f"{tokens} image tokens")
    right.plot([0, 1], [1, 0], color="#8795a1", linestyle="--", label="unshifted (schnell)")
    for axes, title in ((left, f"{max(image_tokens)} image tokens"), (right, "50 steps")):
        axes.set(title=title, xlabel="share of the steps done", ylabel="t (1 is noise)")
        axes.legend()
    return made


def rotation(name: str = "flux-dev", positions: int = 64) -> Figure:
    """The angle by which RoPE turns each pair of features at each position, one picture for each axis."""
    config = variant(name).transformer
    made, panels = figure(1, len(config.axes_dim), (9.5, 3.4))
    for axes, dim, axis in zip(panels, config.axes_dim, ("index", "row", "column"), strict=True):
        turn = rope(torch.arange(positions)[None], dim, config.theta)[0]  # L D/2 2 2
        _heat(axes, turn[..., 0, 0], f"{axis}: cos of {dim // 2} pairs", "pair of features", "position", signed=True)
    made.suptitle(f"RoPE of {name}")
    return made


def modulation(tape: Tape) -> Figure:
    """How strong each captured shift, scale and gate is: the spread over its features, block by block."""
    found: dict[str, list[tuple[str, float]]] = {}
    for name, tensor in tape.items():
        if match := re.fullmatch(
            r"(.*?)[._]?(?:(?=img_mod|txt_mod)|modulation_?)(img|txt)?(?:_mod)?\.(shift|scale|gate)(\d?)", name
        ):
            short = match[1].replace("_blocks.", " ") + (f" {match[2]} {match[4]}" if match[2] else "")
            found.setdefault(match[3], []).append((short, tensor.float().square().mean().sqrt().item()))
    if not found:
        raise ValueError("tape holds no modulation; capture '*mod*.shift*', '*mod*.scale*' and '*mod*.gate*'")
    made, panels = figure(1, len(found), (3.2 * len(found) + 0.6, 0.8 + 0.2 * max(map(len, found.values()))))
    for axes, (kind, values) in zip(panels, found.items(), strict=True):
        axes.barh(range(len(values)), [value for _, value in values], color=COLOURS[0])
        axes.set_yticks(range(len(values)), [label for label, _ in values], fontsize=8)
        axes.invert_yaxis()
        axes.set(title=kind, xlabel="root mean square")
    return made


def latents(latent: Float[Tensor, "channels h w"]) -> Figure:
    """Every channel of one latent, all on one scale."""
    columns = min(8, count := latent.shape[0])
    rows = math.ceil(count / columns)
    made, panels = figure(rows, columns, (1.15 * columns + 0.8, 1.3 * rows + 0.3))
    most = _reach(latent.detach().cpu().double().numpy())
    for i, axes in enumerate(panels):
        axes.axis("off")
        if i < count:
            shown = _heat(axes, latent[i], f"channel {i}", "", "", True, vmin=-most, vmax=most, aspect="equal")
    made.colorbar(shown, ax=panels, label="value", shrink=0.8)
    return made


def word_attention(
    weights: Float[Tensor, "image_tokens words"], labels: Sequence[str], height: int, width: int, picture: Image.Image
) -> Figure:
    """Where in the picture each word is looked at from: the attention of image tokens to it, laid over the picture.

    A row of ``weights`` is what one image token gives each word, in the order of the tokens; sizes are in pixels.
    """
    columns = min(6, len(labels) + 1)
    rows = math.ceil((len(labels) + 1) / columns)
    made, panels = figure(rows, columns, (1.6 * columns, 1.8 * rows * height / width + 0.3))
    maps = weights.detach().float().cpu().reshape(*grid(height, width), len(labels))
    for i, axes in enumerate(panels):
        axes.axis("off")
        if i == 0:
            axes.imshow(np.asarray(picture))
            axes.set_title("picture")
        elif i <= len(labels):
            axes.imshow(np.asarray(picture.convert("L")), cmap="gray", vmin=-255, vmax=400)
            part, box = maps[..., i - 1].numpy(), (0, picture.width, picture.height, 0)
            axes.imshow(part, cmap="inferno", alpha=0.65, extent=box, interpolation="bilinear", vmin=0)
            axes.set_title(f"{labels[i - 1]}\n{part.max():.3f}", fontsize=9)
    return made


def head_grid(tape: Mapping[str, Tensor], value: Callable[[Tensor], Tensor], title: str, label: str) -> Figure:
    """One number for each head of each block whose attention was captured.

    ``value`` takes one block's weights ``B H Q K`` and gives ``H`` numbers, which ``label`` names.

    Raises:
        ValueError: the tape holds no attention weights.
    """
    found = [(name.removesuffix(".attention"), value(t)) for name, t in tape.items() if name.endswith("attention")]
    if not found:
        raise ValueError("tape holds no attention weights; capture '*.attention'")
    made, (axes,) = figure(size=(1.5 + 0.45 * len(found[0][1]), 0.9 + 0.34 * len(found)))
    shown = _heat(axes, torch.stack([numbers for _, numbers in found]), title, "head", "")
    axes.set_yticks(range(len(found)), [name.replace("_blocks.", " ") for name, _ in found])
    axes.set_xticks(range(len(found[0][1])), getattr(tape, "heads", None))
    made.colorbar(shown, ax=axes, label=label)
    return made


def tensor_map(tensor: Tensor, title: str = "") -> Figure:
    """Any tensor as a picture: the last two axes, the first of each axis before them."""
    if not tensor.numel():
        raise ValueError(f"tensor has shape {tuple(tensor.shape)}: there are no values to draw")
    matrix = torch.atleast_2d(tensor)
    while matrix.ndim > 2:
        matrix = matrix[0]
    made, (axes,) = figure(size=(7.5, 3.8))
    shown = _heat(axes, matrix, f"{title} {list(tensor.shape)}", "last axis", "axis before it")
    made.colorbar(shown, ax=axes, label="value")
    return made
