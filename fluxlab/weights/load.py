"""Official checkpoints into a model: every name and shape checked first, memory spent once. Opened in chapter 15."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

from fluxlab.config import AutoEncoderConfig, Variant
from fluxlab.files import Checkpoint, WeightsError, describe_difference, listed, read_json
from fluxlab.weights.layouts import Shapes, looks_like

Module = TypeVar("Module", bound=nn.Module)
_PREFIX = re.compile(r"((model|diffusion_model|transformer|module|_orig_mod|first_stage_model|vae)\.)+")
_LARGER = re.compile(r"(decoder|lm_head|vision_model|visual_projection|text_projection|logit_scale)\b|.*position_ids$")


def load_weights(
    module: Module, path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Module:
    """Give a module, best made on the meta device, the weights of a safetensors file or of a folder of shards.

    Names and shapes are compared before anything is read. Each tensor is then read, moved and cast by itself and put
    in place of the module's own, so that the peak memory is the weights once. The module is left in eval mode, and
    its weights without gradients. Without ``dtype`` they keep that of the file; where it holds several, since a
    forward takes one, they get the narrowest that holds the values of all: float32 for bfloat16 and float32.

    Raises:
        WeightsError: the file is not whole safetensors, or its names, shapes or dtypes differ; nothing is loaded then.
            Or a value is too large for ``dtype``.
    """
    checkpoint = Checkpoint(path, dtype)
    check_shapes(checkpoint, {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()})
    held = {entry.dtype for entry in checkpoint.entries.values()}
    if len(held) > 1:
        eight_bits = {torch.float8_e4m3fn: torch.bfloat16, torch.float8_e5m2: torch.bfloat16}  # promoted to nothing
        checkpoint = Checkpoint(path, reduce(torch.promote_types, (eight_bits.get(each, each) for each in held)))
    module.load_state_dict({name: checkpoint[name].to(device) for name in module.state_dict()}, assign=True)
    return module.eval().requires_grad_(False)


def autoencoder_config(variant: Variant, path: str | Path) -> AutoEncoderConfig:
    """A variant's VAE config, with the scale and shift that are written beside the weights, if any are.

    They stand in the metadata of the files that fluxlab writes, and in the ``config.json`` of diffusers' folders.

    Raises:
        WeightsError: the file cannot be read, or they are no such numbers.
    """
    checkpoint = Checkpoint(path)
    told: dict[str, Any] = dict(checkpoint.metadata)
    beside = (checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent) / "config.json"
    if beside.is_file() and (config := read_json(beside)).get("_class_name") == "AutoencoderKL":
        told = {"shift_factor": config.get("shift_factor") or 0}  # null there is no shift
        told |= {"scale_factor": config["scaling_factor"]} if "scaling_factor" in config else {}
    factors = {name: told[name] for name in ("scale_factor", "shift_factor") if name in told}
    try:
        return replace(variant.autoencoder, **{name: float(factor) for name, factor in factors.items()})  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{checkpoint.path}: its VAE's {factors} cannot be used ({error})") from error


def check_shapes(checkpoint: Checkpoint, wanted: Shapes) -> None:
    """
    Raises:
        WeightsError: a name, a shape or a dtype is not as wanted; the message lists what differs, and says what the
            checkpoint looks like.
    """
    found = {name: entry.shape for name, entry in checkpoint.entries.items()}
    wrong = [
        f"{name} is {entry.dtype} {list(entry.shape)}, where floating {list(wanted[name])} was expected"
        for name, entry in checkpoint.entries.items()
        if name in wanted and (entry.shape != wanted[name] or not entry.is_floating_point())
    ]
    problems = [describe_difference(wanted, found), f"{len(wrong)} different: {listed(wrong)}" if wrong else ""]
    if not any(problems):
        return
    prefixes = sorted({match[0] for name in found if (match := _PREFIX.match(name))})
    prefix = max(prefixes, key=lambda each: sum(each + name in found for name in wanted), default="")
    looks = looks_like({name.removeprefix(prefix): shape for name, shape in found.items() if name.startswith(prefix)})
    hint = f". It looks like {looks}" if looks else ""
    if prefix:
        hint += f". Names begin with {prefix!r}: save this part's tensors alone, without that prefix"
    raise WeightsError(f"{checkpoint.path}: not what was expected: {'; '.join(filter(None, problems))}{hint}")


def load_encoder(kind: Any, source: str | Path, dtype: torch.dtype | Literal["auto"] = "auto") -> Any:
    """A text encoder as transformers' class loads it, if the files have all of its weights and none that it leaves.

    They are a folder in the Hugging Face format, or a hub name; the encoder may be a part of a larger model there.

    Raises:
        OSError: neither a folder nor a hub name that can be reached.
        WeightsError: weights are missing or unexpected, as in quantized files, or cannot be read.
    """
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    try:
        model, found = kind.from_pretrained(os.path.expanduser(source), **options)
    except (SafetensorError, RuntimeError) as error:
        raise WeightsError(f"{source}: no {kind.__name__} can be read from it ({error})") from error
    unexpected = [name for name in found["unexpected_keys"] if not _LARGER.match(name)]
    if problem := describe_difference(found["missing_keys"], unexpected):
        kept = "whole" if found["missing_keys"] else "plain"
        hint = "; weights with scales beside them are quantized, and not read here" if unexpected else ""
        raise WeightsError(f"{source}: not a {kept} {kind.__name__}: {problem}{hint}")
    return model
