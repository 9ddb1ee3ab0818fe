"""A tape behind menus, in JupyterLab: choose a tensor, a forward and a head, and see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxlab.inspect import plots
from fluxlab.inspect.capture import Tape

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def explore(tape: Tape, words: list[str] | None = None) -> Any:
    """Menus over a tape; what is shown without widgets, on a page, is the static picture of the first tensor.

    Args:
        tape: what was captured.
        words: of the text tokens, in their order, to name the columns of attention weights by.

    Raises:
        ValueError: the tape is empty.
    """
    if not tape:
        raise ValueError("tape is empty; run the model inside the with block of capture first")
    import ipywidgets
    from IPython.display import display

    name = ipywidgets.Dropdown(options=list(tape), description="tensor")
    forward = ipywidgets.IntSlider(min=0, max=max(tape.forwards - 1, 0), description="forward")
    head = ipywidgets.IntSlider(min=0, max=0, description="head")
    word = ipywidgets.Dropdown(
        options=[("all", None), *((w, i) for i, w in enumerate(words or []))], description="word"
    )
    out = ipywidgets.Output()

    def show(_: Any = None) -> None:
        tensor = tape.forward(forward.value)[name.value]
        head.max = tensor.shape[1] - 1 if tensor.ndim == 4 else 0
        out.clear_output(wait=True)
        with out:
            display(view(tensor, name.value, head.value, word.value))  # type: ignore[no-untyped-call]

    for control in (name, forward, head, word):
        control.observe(show, names="value")
    show()
    return ipywidgets.VBox([ipywidgets.HBox([name, forward, head, word]), out])


def view(tensor: Tensor, name: str, head: int = 0, word: int | None = None) -> Figure:
    """One tensor as a picture: of ``B H L D`` and attention weights one head, of these one word's column if asked."""
    title = name
    if tensor.ndim == 4:
        tensor, title = tensor[:, head], f"{name}, head {head}"
        if word is not None and name.endswith("attention"):
            tensor = tensor[..., word : word + 1].transpose(-1, -2)
    return plots.tensor_map(tensor, title)
