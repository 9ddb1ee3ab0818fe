"""Which inner tensors a module has, and what a name, a pattern, a list or a function picks from them."""

import difflib
import re
from collections.abc import Callable, Iterable
from fnmatch import filter as matching

from torch import nn

from fluxlab.arguments import whole
from fluxlab.config import described
from fluxlab.glossary import entries, named
from fluxlab.inspect.table import Table
from fluxlab.model.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxlab.model.flux2 import Flux2
from fluxlab.model.transformer import Flux
from fluxlab.pipeline.latents import grid

Names = str | Iterable[str] | Callable[[str], bool]


def tensor_names(name: str, height: int | None = None, width: int | None = None, batch: int = 1) -> Table:
    """What ``capture`` can reach in a variant: names, shapes, meanings, with nothing run.

    Args:
        name: of the variant.
        height: of the picture, in pixels; by default the variant's usual one. A partial token counts whole.
        width: likewise.
        batch: pictures at once.

    Raises:
        ConfigError: no such variant.
        ValueError: a side or the batch is not a whole number of at least 1.
    """
    chosen = described(name)
    rows, columns = grid(*(chosen.size if side is None else side for side in (height, width)))
    found = named(chosen.transformer, "tensor")
    sizes = {"batch": whole("batch", batch), "text": chosen.t5_length, "image": rows * columns}
    return Table(
        {"name": each, "shape": entry.shape(chosen.transformer, **sizes), "axes": entry.axes, "what": entry.meaning}
        for each, entry in found.items()
    )


def unwrapped(module: nn.Module) -> dict[str, nn.Module]:
    """Every module below this one by its name, itself as ``""``, without what ``torch.compile`` wraps around them.

    Raises:
        ValueError: it is no module.
    """
    if not isinstance(module, nn.Module):
        hint = "; give its model, pipe.model" if hasattr(module, "model") else ""
        raise ValueError(f"what is to be looked at is a {type(module).__name__}, where a module was expected{hint}")
    return {re.sub(r"(^|\.)_orig_mod\b", "", name).lstrip("."): part for name, part in module.named_modules()}


def available(module: nn.Module) -> list[str]:
    """The names that a pattern is matched with: the glossary's for a ``Flux`` or its blocks, else each layer's."""
    if isinstance(module, Flux | Flux2):
        return ["img", "timesteps", *named(module.config, "tensor")]
    if isinstance(module, DoubleStreamBlock | SingleStreamBlock):
        head = "double_blocks.{i}." if isinstance(module, DoubleStreamBlock) else "single_blocks.{i}."
        return [e.name.removeprefix(head) for e in entries() if e.kind == "tensor" and e.name.startswith(head)]
    return [name for name, part in unwrapped(module).items() if name and not list(part.children())]


def choose(module: nn.Module, names: Names) -> tuple[list[str], dict[str, list[str]]]:
    """The names asked for, in the order of the forward; and which of them each pattern picked.

    Attention weights are chosen by a pattern that has the word, or by a function: no other takes them along.

    Raises:
        ValueError: a name or pattern picks nothing; the message gives the nearest names.
    """
    known = available(module)
    if callable(names):
        chosen = [name for name in known if names(name)]
        if not chosen:
            raise ValueError(f"names is a function that chose none of the {len(known)} tensors here: {known[:3]}")
        return chosen, {"names": chosen}
    patterns = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]
    if not patterns or not all(isinstance(each, str) for each in patterns):
        said = f"names is {names!r}" if patterns else "names is empty"
        raise ValueError(f"{said}; give a name, a pattern such as 'double_blocks.*.img.output', or a list")
    modules = [name for name in unwrapped(module) if name]
    picked: dict[str, list[str]] = {}
    for pattern in patterns:
        matched = [pattern] if pattern in known else matching(known, pattern)
        if "attention" not in pattern:
            matched = [name for name in matched if name.rpartition(".")[2] != "attention" or name in modules]
        if not matched and pattern in modules:
            matched = [pattern]
        if not matched:
            raise ValueError(f"{pattern!r} is none of the tensors here; {nearest(pattern, [*known, *modules])}")
        picked[pattern] = matched
    found = list(dict.fromkeys(name for matched in picked.values() for name in matched))
    return sorted(found, key=lambda name: known.index(name) if name in known else len(known)), picked


def nearest(pattern: str, known: list[str]) -> str:
    """The names most like it, compared without block numbers, so that another block's name is as near as it looks."""

    def plain(name: str) -> str:
        return re.sub(r"\d+|\*", "0", name)

    by_plain = {plain(name): name for name in reversed(known)}
    near = difflib.get_close_matches(plain(pattern), by_plain, n=3, cutoff=0.3)
    return "did you mean " + " or ".join(repr(by_plain[each]) for each in near) if near else f"they are {known[:5]} ..."
