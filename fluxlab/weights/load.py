"""Official single-file checkpoints into a model: every name and shape checked first, memory spent once."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from fluxlab.weights.files import WeightsError, describe_difference, open_tensors

Module = TypeVar("Module", bound=nn.Module)


def load_weights(
    module: Module,
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Module:
    """Give a module, best made on the meta device, the weights of a safetensors file.

    Names and shapes are compared before anything is read. Each tensor is then read, moved and cast by itself and put
    in place of the module's own, so that the peak memory is the weights once. The module is left in eval mode, and
    its weights without gradients.

    Args:
        module: its ``state_dict`` says which names and shapes the file must have.
        path: of the file.
        device: where the weights go.
        dtype: what they are cast to; by default, what the file holds.

    Raises:
        WeightsError: the file is not whole safetensors, or its names or shapes differ; nothing is loaded then.
    """
    wanted = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    with open_tensors(path) as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (a handle, not a dict)
        problems = [describe_difference(wanted, found)]
        misshaped = [name for name in wanted if name in found and found[name] != wanted[name]]
        if misshaped:
            shown = ", ".join(f"{name} is {found[name]}, not {wanted[name]}" for name in misshaped[:8])
            problems.append(f"{len(misshaped)} misshaped: {shown}{' and more' if len(misshaped) > 8 else ''}")
        if any(problems):
            raise WeightsError(f"{path}: not a checkpoint of this model: {'; '.join(filter(None, problems))}")
        for name in wanted:
            owner, _, leaf = name.rpartition(".")
            tensor = file.get_tensor(name).to(device=device, dtype=dtype)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    return module.eval()
