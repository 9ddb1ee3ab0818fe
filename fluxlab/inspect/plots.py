"""Pictures of what is inside, in one look: colours that colour-blind readers tell apart, signed data centred on zero.

Each function gives a matplotlib ``Figure``, which Jupyter shows and ``figure.savefig`` writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fluxlab.arguments import whole
from fluxlab.config import variant
from fluxlab.extras import importing
from fluxlab.model.rope import rope

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


def _heat(axes: Axes, values: Tensor, title: str, x: str, y: str) -> Any:
    """A matrix as colours; what is signed gets a map centred on zero. What is no number stays white."""
    data = values.detach().cpu().double().numpy()
    options: Any = {"cmap": POSITIVE}
    if (data < 0).any():
        options = {"cmap": SIGNED, "vmin": -_reach(data), "vmax": _reach(data)}
    shown = axes.imshow(data, aspect="auto", interpolation="nearest", **options)
    axes.set(title=title, xlabel=x, ylabel=y)
    return shown


def rotation(name: str = "flux-dev", positions: int = 64) -> Figure:
    """The cosine of the angle by which RoPE turns each pair of features at each position, a picture for each axis.

    Raises:
        ConfigError: no such variant.
        ValueError: ``positions`` is not a whole number of at least 1.
    """
    config = variant(name).transformer
    made, panels = figure(1, len(config.axes_dim), (9.5, 3.4))
    for axes, dim, axis in zip(panels, config.axes_dim, ("index", "row", "column"), strict=True):
        turn = rope(torch.arange(whole("positions", positions))[None], dim, config.theta)[0]  # L D/2 2 2
        _heat(axes, turn[..., 0, 0], f"{axis}: cos of {dim // 2} pairs", "pair of features", "position")
    made.suptitle(f"RoPE of {name}")
    return made


def tensor_map(tensor: Tensor, title: str = "") -> Figure:
    """Any tensor as a picture: the last two axes, the first of each axis before them.

    Raises:
        ValueError: it has no values.
    """
    if not tensor.numel() or tensor.is_meta:
        raise ValueError(f"tensor has shape {tuple(tensor.shape)} on {tensor.device}: there are no values to draw")
    matrix = torch.atleast_2d(tensor)
    while matrix.ndim > 2:
        matrix = matrix[0]
    made, (axes,) = figure(size=(7.5, 3.8))
    shown = _heat(axes, matrix, f"{title} {list(tensor.shape)}", "last axis", "axis before it")
    made.colorbar(shown, ax=axes, label="value")
    return made
