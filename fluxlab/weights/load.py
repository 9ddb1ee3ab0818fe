"""Official checkpoints into a model: every name and shape checked first, memory spent once. Opened in chapter 15."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fluxlab.config import VARIANTS, AutoEncoderConfig, FluxConfig, Variant
from fluxlab.files import Checkpoint, WeightsError, describe_difference, listed, read_json
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.transformer import Flux
from fluxlab.weights.layouts import Config, to_diffusers

Module = TypeVar("Module", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]
_WHOLE = "model.diffusion_model."  # what other programs put before a transformer's names


def load_weights(
    module: Module, path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Module:
    """Give a module, best made on the meta device, the weights of a safetensors file or of a folder of shards.

    Names and shapes are compared before anything is read. Each tensor is then read, moved and cast by itself and put
    in place of the module's own, so that the peak memory is the weights once. The module is left in eval mode, and
    its weights without gradients.

    Args:
        module: its ``state_dict`` says which names and shapes the file must have.
        path: of the file or folder.
        device: where the weights go.
        dtype: what they are cast to; by default, what the file holds.

    Raises:
        WeightsError: the file is not whole safetensors, or its names, shapes or dtypes differ; nothing is loaded then.
    """
    checkpoint = Checkpoint(path)
    check_shapes(checkpoint, {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()})
    tensors = {name: checkpoint[name].to(device=device, dtype=dtype) for name in module.state_dict()}
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def autoencoder_config(variant: Variant, path: str | Path) -> AutoEncoderConfig:
    """A variant's VAE config, with the scale and shift that are written beside the weights, if any are.

    They stand in the metadata of the files that fluxlab writes, and in the ``config.json`` of diffusers' folders.
    """
    checkpoint = Checkpoint(path)
    told: dict[str, Any] = dict(checkpoint.metadata)
    beside = (checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent) / "config.json"
    if beside.is_file() and (config := read_json(beside)).get("_class_name") == "AutoencoderKL":
        told = {"shift_factor": config.get("shift_factor") or 0}  # null there is no shift
        told |= {"scale_factor": config["scaling_factor"]} if "scaling_factor" in config else {}
    factors = {name: float(told[name]) for name in ("scale_factor", "shift_factor") if name in told}
    return replace(variant.autoencoder, **factors)  # type: ignore[arg-type]


def check_shapes(checkpoint: Checkpoint, wanted: Shapes) -> None:
    """
    Raises:
        WeightsError: a name, a shape or a dtype is not as wanted; the message lists what differs, and says what the
            checkpoint looks like.
    """
    entries = checkpoint.entries
    problems = [describe_difference(wanted, entries)]
    if wrong := [name for name in wanted if name in entries and entries[name].shape != wanted[name]]:
        said = [f"{name} is {list(entries[name].shape)}, not {list(wanted[name])}" for name in wrong]
        problems.append(f"{len(wrong)} misshaped: {listed(said)}")
    if whole := [name for name, entry in entries.items() if name in wanted and not entry.dtype.is_floating_point]:
        said = [f"{name} holds {entries[name].dtype}" for name in whole]
        problems.append(f"{len(whole)} not of a floating dtype: {listed(said)}")
    if problems := [problem for problem in problems if problem]:
        looks = looks_like({name: entry.shape for name, entry in entries.items()})
        hint = f". It looks like {looks}" if looks else ""
        if any(name.startswith(_WHOLE) for name in entries):
            hint = f". Names begin with {_WHOLE!r}: save this part's tensors alone, without that prefix"
        raise WeightsError(f"{checkpoint.path}: not what was expected: {'; '.join(problems)}{hint}")


@cache
def official_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the official checkpoint."""
    return {name: tuple(tensor.shape) for name, tensor in _on_meta(config).items()}


@cache
def diffusers_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in diffusers' layout."""
    return {name: tuple(tensor.shape) for name, tensor in to_diffusers(_on_meta(config), config).items()}


def _on_meta(config: Config) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return (Flux(config) if isinstance(config, FluxConfig) else AutoEncoder(config)).state_dict()


def looks_like(found: Shapes) -> str:
    """Which part of which variants, in which layout, has exactly these tensors; empty where none has."""
    for layout, shapes in (("official", official_shapes), ("diffusers", diffusers_shapes)):
        for part in ("transformer", "autoencoder"):
            names = [name for name, variant in VARIANTS.items() if shapes(getattr(variant, part)) == dict(found)]
            if names:
                way = "; `fluxlab convert` brings it to the other" if layout == "diffusers" else ""
                return f"the {part} of {' or '.join(names)} in the {layout} layout{way}"
    return ""
