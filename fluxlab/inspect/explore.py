"""A tape behind menus, in JupyterLab: choose a tensor, a block, a step, a head and a word, and see it."""

from __future__ import annotations

import base64
import io
import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxlab.extras import importing
from fluxlab.inspect import plots
from fluxlab.inspect.tape import Tape

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Explorer:
    """Menus where there are widgets; elsewhere, as on a page, the picture that they open with."""

    def __init__(self, box: Any, picture: Figure) -> None:
        self.box = box
        self._picture = picture

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        drawn = io.BytesIO()
        self._picture.savefig(drawn, format="png")
        png = base64.b64encode(drawn.getvalue()).decode()
        return {**self.box._repr_mimebundle_(**options), "image/png": png}


def explore(tape: Tape, words: list[str] | None = None) -> Explorer:
    """Menus over a tape; where there are no widgets, the picture of its first tensor.

    Args:
        tape: what was captured.
        words: of the text tokens, in their order, to name the columns of attention weights by.

    Raises:
        ValueError: the tape is empty, or the text's columns of attention weights were not kept, and words name them.
    """
    if not tape:
        raise ValueError("tape is empty; run the model inside the with block of capture first")
    if words and not tape.from_text:
        raise ValueError("words name the text's tokens, and capture's keys left those out; leave words out")
    found = [each for i in tape.captured for each in tape.forward(i).items()]
    widths = [tensor.shape[-1] for name, tensor in found if name.endswith("attention")]
    if words and len(words) > min(widths, default=len(words)):
        raise ValueError(f"there are {len(words)} words, and capture's keys left {min(widths)} columns; give as many")
    with importing():
        import ipywidgets
        from IPython.display import display

    blocks: dict[str, dict[str, str]] = {}  # names without their block's number; of each, the numbers there are
    for name in tape:
        parts = re.split(r"(?<=_blocks\.)(\d+)", name)
        blocks.setdefault("*".join(parts[::2]), {})[parts[1] if len(parts) > 1 else "-"] = name
    tensor = ipywidgets.Dropdown(options=list(blocks), description="tensor")
    block = ipywidgets.Dropdown(options=list(blocks[tensor.value]), description="block")
    step = ipywidgets.SelectionSlider(options=tape.captured, description="step")
    head = ipywidgets.SelectionSlider(options=["0"], description="head")
    choices = [("all", None), *((word, i) for i, word in enumerate(words or []))]
    word = ipywidgets.Dropdown(options=choices, description="word")
    out = ipywidgets.Output()

    def offer(control: Any, options: list[Any]) -> None:
        """Other choices; where they are the same, what was chosen stays."""
        if list(control.options) != options:
            control.options = options

    def shown() -> Figure:
        offer(block, list(blocks[tensor.value]))
        name = blocks[tensor.value][block.value]
        offer(step, [i for i in tape.captured if name in tape.forward(i)])
        found = tape.forward(step.value)[name]
        own = tape.heads if name.endswith("attention") else None
        offer(head, own or [str(i) for i in range(found.shape[1] if found.ndim == 4 else 1)])
        return view(found, name, head.index, word.value, head.value)

    def show(change: Any = None) -> None:
        picture = shown()  # first: a menu that it changes shows too
        out.clear_output(wait=True)
        with out:
            display(picture)  # type: ignore[no-untyped-call]

    for control in (tensor, block, step, head, word):
        control.observe(show, names="value")
    show()
    box = ipywidgets.VBox([ipywidgets.HBox([tensor, block]), ipywidgets.HBox([step, head, word]), out])
    return Explorer(box, shown())


def view(tensor: Tensor, name: str, head: int = 0, word: int | None = None, called: str | None = None) -> Figure:
    """One tensor as a picture: of ``B H L D`` and attention weights one head, of these one word's column if asked.

    ``called``: the head in the model, where not all were kept.
    """
    title = name
    if tensor.ndim == 4:
        which = "mean of heads" if called == "mean" else f"head {called or head}"
        tensor, title = tensor[:, head], f"{name}, {which}"
        if word is not None and name.endswith("attention"):
            tensor = tensor[..., word : word + 1].transpose(-1, -2)
    return plots.tensor_map(tensor, title)
