"""Where two runs part: the first tensor that differs, and by how much, in float32 and in float64. Chapter 07.

When two implementations differ, a wider dtype tells why: rounding shrinks, a mistake does not.
"""

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fluxlab.inspect.capture import capture
from fluxlab.inspect.names import available, unwrapped
from fluxlab.inspect.table import Table
from fluxlab.inspect.tape import Tape
from fluxlab.model.transformer import Flux
from fluxlab.pipeline.inputs import FluxInputs
from fluxlab.weights.layouts import rules

Run = Mapping[str, Any] | nn.Module  # of tensors
_THEIRS = {"img": "hidden_states", "txt": "encoder_hidden_states", "y": "pooled_projections", "timesteps": "timestep"}


class Comparison:
    """Every tensor that two runs have in common, in the order in which the first made them."""

    def __init__(self, table: Table, tolerance: float, measured: str) -> None:
        self.table = table
        self._tolerance, self._measured = tolerance, measured

    @property
    def first(self) -> str | None:
        """The first tensor that differs by more than the tolerance; None where none does."""
        return next((row["name"] for row in self.table if not row[self._measured] <= self._tolerance), None)

    def __repr__(self) -> str:
        said = f"the same within {self._tolerance:g}" if self.first is None else f"they part at {self.first}"
        return f"{self.table!r}\n{len(self.table)} tensors: {said} ({self._measured})"


def compare(
    a: Run, b: Run, inputs: FluxInputs | Mapping[str, Tensor] | None = None, tolerance: float = 1e-5, limit: float = 4.0
) -> Comparison:
    """Compare the tensors of two runs, one by one.

    Each of the two is a tape, a dict of named tensors, or a module. Two modules are run here on ``inputs``, as copies,
    in float32 and, where the device has it, again in float64; one beside a tape or a dict runs as it is. A
    ``FluxTransformer2DModel`` of diffusers is called with its own names, and what its layers give is put under the
    official ones. Where a tape has several forwards, the tensor ``vec`` of forward 3 is called ``3/vec``, and they are
    compared in the order of the run.

    Args:
        a: the first run.
        b: the second.
        inputs: what the modules are called with, by name.
        tolerance: largest difference over the largest value that counts as the same, in the widest dtype that was run.
        limit: GiB that the tensors of one run may take.

    Raises:
        MemoryError: they take more.
        ValueError: a module without inputs, or no name in common; shapes that differ; ``tolerance`` below 0.
    """
    if not (isinstance(tolerance, Real) and tolerance >= 0):
        raise ValueError(f"tolerance is {tolerance!r}; give a number from 0, such as 1e-5")
    a, b = (run if isinstance(run, Mapping) else unwrapped(run)[""] for run in (a, b))
    modules = [run for run in (a, b) if isinstance(run, nn.Module)]
    widths: list[torch.dtype | None] = [torch.float32, torch.float64] if len(modules) == 2 else [None]
    if len(modules) == 2 and any(p.device.type == "mps" for module in modules for p in module.parameters()):
        widths = [torch.float32]  # all that this device has
    rows: dict[str, dict[str, Any]] = {}
    for dtype in widths:
        ours, theirs = (_tensors(run, inputs, dtype, limit) for run in (a, b))
        if isinstance(a, Flux) and hasattr(b, "single_transformer_blocks"):
            theirs = _official(theirs, a)
        elif isinstance(b, Flux) and hasattr(a, "single_transformer_blocks"):
            ours = _official(ours, b)
        common = [name for name in ours if name in theirs]
        if not common:
            raise ValueError(f"a and b have no name in common: a has {list(ours)[:4]}, b has {list(theirs)[:4]}")
        for name in common:
            if other := [each for each in (ours[name], theirs[name]) if not isinstance(each, Tensor)]:
                raise ValueError(f"{name} is a {type(other[0]).__name__}, where a tensor was expected")
            largest, relative = _difference(name, ours[name], theirs[name])
            row = rows.setdefault(name, {"name": name, "shape": tuple(ours[name].shape)})
            run = "" if dtype is None else f"{dtype}, ".removeprefix("torch.")
            row |= {f"{run}largest": largest, f"{run}relative": relative}
    table = Table(rows.values())
    return Comparison(table, tolerance, list(table[0])[-1])


def _difference(name: str, a: Tensor, b: Tensor) -> tuple[float, float]:
    """The largest difference, and the same over the largest value of ``a``; not-a-number where there is one."""
    if a.shape != b.shape:
        raise ValueError(f"{name} has shape {tuple(a.shape)} in a and {tuple(b.shape)} in b")
    if a.is_meta or b.is_meta:
        raise ValueError(f"{name} is on the meta device, which has shapes and no numbers to compare")
    if not a.numel():
        return 0.0, 0.0
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = (each.detach().cpu().to(wide) for each in (a, b))
    largest, size = (a - b).abs().max().item(), a.abs().max().item()
    return largest, largest / size if size else largest


def _tensors(
    run: Run, inputs: FluxInputs | Mapping[str, Tensor] | None, dtype: torch.dtype | None, limit: float
) -> dict[str, Tensor]:
    if isinstance(run, Tape) and len(run.captured) > 1:
        return {f"{i}/{name}": tensor for i in run.captured for name, tensor in run.forward(i).items()}
    if not isinstance(run, nn.Module):
        return dict(run)
    if inputs is None:
        raise ValueError("inputs is None; a module is run to be compared: give what it is called with, by name")
    if isinstance(inputs, Tensor):
        raise ValueError('inputs is a tensor; a module is called with several, by name, so give {"x": tensor}')
    module = run if dtype is None else copy.deepcopy(run).eval()
    named = inputs.kwargs() if isinstance(inputs, FluxInputs) else inputs
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    if dtype is not None:
        module = module.to(dtype)
        given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in given.items()}
    names = available(module)
    if hasattr(module, "single_transformer_blocks"):  # of diffusers, whose ids have no batch axis
        given = {_THEIRS.get(name, name): t[0] if name.endswith("_ids") else t for name, t in given.items()}
    elif isinstance(module, Flux):  # with the layers whose outputs have no entry of their own
        names += [name for name, part in module.named_modules() if isinstance(part, nn.Linear) and name not in names]
    looking: Any = capture(module, set(names).__contains__, limit=limit) if names else nullcontext({})
    with torch.no_grad(), looking as tape:
        out = module(**given)
    found: dict[str, Tensor] = dict(tape)
    if isinstance(out, Tensor) and not isinstance(module, Flux):  # whose output is its velocity
        found.setdefault("output", out)
    return found


def _official(tensors: Mapping[str, Tensor], model: Flux) -> dict[str, Tensor]:
    """What diffusers' layers gave, under the official names: the rules of the weights hold for the outputs too."""
    found: dict[str, Tensor] = {}
    for rule in rules(model.config):
        parts = [tensors.get(name.rpartition(".")[0]) for name in rule.diffusers]
        if rule.official.endswith("bias") or any(part is None for part in parts):
            continue
        joined = torch.cat([part for part in parts if part is not None], dim=-1)
        if rule.swapped:
            joined = torch.cat(joined.chunk(2, dim=-1)[::-1], dim=-1)
        if rule.official.endswith("scale"):  # there, heads come after tokens
            joined = joined.transpose(1, 2)
        found[rule.official.rpartition(".")[0]] = joined
    return found | {"velocity": found["final_layer.linear"]}
