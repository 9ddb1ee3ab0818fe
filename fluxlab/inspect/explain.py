"""What a name means, here and now: ``fl.explain("double_blocks.7.img_attn.norm.query_norm.scale")``."""

import inspect
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fluxlab.config import Variant, Variant2, described
from fluxlab.config import variant as find_variant
from fluxlab.glossary import Entry, autoencoder_entry, expand, named, table_of
from fluxlab.inspect.looker import Looker
from fluxlab.inspect.names import nearest
from fluxlab.model.attention import attention
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.transformer import build
from fluxlab.pipeline.latents import grid


def explain(name: str, variant: str = "flux-dev") -> None:
    """Print what a name, or each name that a pattern matches, stands for, with its shape and its line of source.

    What a pattern matches in every block is told once, with ``{i}`` for the block's number.

    Args:
        name: of a weight, a tensor, an input or a symbol, or a pattern such as ``"single_blocks.*"``.
        variant: whose sizes to give.

    Raises:
        ValueError: nothing has that name; the message gives the nearest ones.
        ConfigError: no such variant.
    """
    print(explanation(name, variant))


def explanation(name: str, variant: str = "flux-dev") -> str:
    """What ``explain`` prints."""
    if not isinstance(name, str):
        raise ValueError(f"name is {name!r}; give a name such as 'vec', or a pattern such as 'single_blocks.*'")
    chosen = described(variant)
    known = named(chosen.transformer, "input", "tensor", "weight", "symbol")
    found = [
        entry
        for entry in table_of(chosen.transformer)
        if any(entry.name == name or fnmatchcase(each.name, name) for each in expand(entry, chosen.transformer))
    ]
    if name in known:  # one block's own
        found = [known[name]]
    if not found and name.startswith(("encoder.", "decoder.")):
        return _of_autoencoder(name, find_variant(variant))
    if not found:
        raise ValueError(f"{name!r} is no name of {variant}; {nearest(name, list(known))}")
    model = build(variant, device="meta")
    return "\n\n".join(_told(entry, chosen, model) for entry in found)


def _told(entry: Entry, chosen: Variant | Variant2, model: nn.Module) -> str:
    lines = [f"{entry.name}  ({entry.kind}, chapter {entry.chapter})", f"  {entry.meaning}"]
    if entry.axes:
        rows, columns = grid(chosen.size, chosen.size)
        shape = list(entry.shape(chosen.transformer, text=chosen.t5_length, image=rows * columns))
        counts_pixels = entry.kind != "weight" if entry.kind != "symbol" else entry.name in "IL"
        where = f" at {chosen.size} x {chosen.size}" if counts_pixels else ""
        told = shape[0] if entry.kind == "symbol" else shape
        lines.append(f"  {entry.axes} = {told} in {chosen.name}{where}")
    if entry.kind != "symbol":
        lines.append(f"  {source_line(entry.name.replace('{i}', '0'), model)}")
    return "\n".join(lines)


def _of_autoencoder(name: str, chosen: Variant) -> str:
    with torch.device("meta"):
        model = AutoEncoder(chosen.autoencoder)
    shapes = {key: list(weight.shape) for key, weight in model.state_dict().items()}
    told = [
        f"{key}  (weight, chapter {entry.chapter})\n  {entry.meaning}\n  {shapes[key]} in the VAE of {chosen.name}\n"
        f"  {source_line(key, model)}"
        for key in shapes
        if fnmatchcase(key, name) and (entry := autoencoder_entry(key))
    ]
    if not told:
        raise ValueError(f"{name!r} is no weight of the VAE of {chosen.name}; {nearest(name, list(shapes))}")
    return "\n\n".join(told)


def source_line(name: str, model: nn.Module) -> str:
    """File, line and text of where the tensor or weight of that name is made, in the library."""
    ours = {path: part for path, part in model.named_modules() if type(part).__module__.startswith("fluxlab")}
    ours = {path: part for path, part in ours.items() if not isinstance(part, nn.Linear | nn.Sequential)}
    owner = max((path for path in ours if not path or name.startswith(f"{path}.")), key=len)
    rest = name[len(owner) :].lstrip(".")
    classes = (base for base in type(ours[owner]).__mro__ if base.__module__.startswith("fluxlab"))
    places = (*classes, attention, Looker)
    point, attribute = re.escape(rest), re.escape(rest.split(".")[0])
    signature, seen = rf"^ +{point}: ", rf'see\("{point}"'
    for pattern in (seen, rf"self\.{attribute}\b[^=]* = ", signature, rf'"{point}"', r"see\(name"):
        for place in places:
            if line := _line(place, pattern):
                return line
    raise LookupError(f"{name} is made nowhere in {owner or 'Flux'}")


def _line(thing: Any, pattern: str) -> str:
    """The first line of a class or function that the pattern is found in."""
    lines, first = inspect.getsourcelines(thing)
    place = Path(inspect.getsourcefile(inspect.unwrap(thing)) or "").relative_to(Path(__file__).parents[2])
    found = (n for n, line in enumerate(lines) if re.search(pattern, line))
    return next((f"{place.as_posix()}:{first + n}  {lines[n].strip()}" for n in found), "")
