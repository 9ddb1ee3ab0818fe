"""LoRA files read: every dialect that people write becomes matrices for a model's own layers. Opened in chapter 15."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxlab.files import MISREAD, Checkpoint, Tensors, WeightsError, listed, read_json
from fluxlab.model.transformer import Flux
from fluxlab.weights.layouts import rules
from fluxlab.weights.quantized import finite_weights

_DIALECTS = {  # how a file's names look; the first that fits
    "XLabs": r".*\.processor\..*",
    "kohya": r"lora_.*|.*\.lora_(down|up)\..*",
    "BFL": r"(double|single)_blocks.*\.lora_[AB]\..*",
    "PEFT": r".*(\.lora_[AB]\.|\.lora\.(up|down)\.).*",
}
_ROLE = re.compile(  # what a tensor is to its layer
    r"(.+?)\.(?:(?P<down>lora_A(?:\.default)?|lora_down|lora\.down|down)\.weight|(?P<alpha>alpha)"
    r"|(?P<up>lora_B(?:\.default)?|lora_up|lora\.up|up)\.weight|(?P<bias>lora_B(?:\.default)?\.bias))"
)
_PREFIXES = {  # of a layer's name, by the part it belongs to
    "clip": r"(text_encoder\.|lora_te1?_|(text_encoders\.)?clip_l\.(transformer\.)?)(text_model[._])?",
    "t5": r"(text_encoder_2\.|lora_te[23]_|(text_encoders\.)?t5xxl\.(transformer\.)?)",
    "transformer": r"((base_model|transformer|(diffusion_)?model|module|_orig_mod)\.)*(lora_(unet|transformer)_)?",
}
_XLABS = {  # what a block's processor changes; in a single block, qkv are the first rows of linear1
    "processor_qkv_lora1": "img_attn_qkv",
    "processor_proj_lora1": "img_attn_proj",
    "processor_qkv_lora2": "txt_attn_qkv",
    "processor_proj_lora2": "txt_attn_proj",
    "processor_qkv_lora": "linear1",
    "processor_proj_lora": "linear2",
}
_OTHERS = {  # other ways to change weights
    "DoRA": r".*(dora_scale|lora_magnitude_vector).*",
    "whole differences": r".*\.diff(_b)?",
    "LoKr": r".*lokr_.*",
    "LoHa": r".*hada_.*",
    "a middle matrix": r".*lora_mid.*",
    "an IP-Adapter": r".*\bip_adapter_.*",
}
_METADATA = "lora_adapter_metadata"  # where diffusers writes PEFT's config
_SHOWN = 128  # channels of a model that is shown edges or depth beside the noise


@dataclass(frozen=True)
class Change:
    """What a file adds to one Linear: ``scale * (up(down(x)) + bias)``."""

    layer: Any  # the Linear
    down: Tensor  # rank, in_features
    up: Tensor  # out_features, rank; zero in the rows that are not changed
    bias: Tensor | None
    scale: float  # alpha / rank


@dataclass(frozen=True)
class _Place:
    """What a name stands for: a Linear, or some of its rows, of which the two halves may change places."""

    layer: Any
    rows: tuple[int, int]
    swapped: bool = False

    def spread(self, tensor: Tensor) -> Tensor:
        """A tensor with these rows, in all rows of the layer."""
        tensor = torch.cat(tensor.chunk(2)[::-1]) if self.swapped else tensor
        around = (self.rows[0], self.layer.out_features - self.rows[1])
        return F.pad(tensor, (0, 0) * (tensor.ndim - 1) + around)


def dialect(tensors: Tensors) -> str | None:
    """Which dialect of LoRA a file's names are; None of a file that is no LoRA.

    Raises:
        WeightsError: it changes weights in a way that is not read here.
    """
    for what, pattern in _OTHERS.items():
        if found := [name for name in tensors if re.fullmatch(pattern, name)]:
            raise WeightsError(f"{tensors.path}: holds {what} ({listed(found, 2)}); only plain LoRA is read")
    return next((who for who, words in _DIALECTS.items() if any(re.fullmatch(words, name) for name in tensors)), None)


def read_lora(path: str | Path, modules: Mapping[str, nn.Module]) -> tuple[list[Change], dict[Any, Tensor]]:
    """A file's changes to Linears of modules "transformer", "clip" and "t5"; and scales that replace those of norms.

    Raises:
        WeightsError: the file cannot be read, is no LoRA, or does not fit the modules.
    """
    tensors = Checkpoint(path)
    if dialect(tensors) is None:
        raise WeightsError(f"{path}: this is no LoRA: {listed(list(tensors), 4)}")
    transformer: Any = modules["transformer"]
    places, norms = dict(_places(modules)), dict(transformer.named_modules())
    found: dict[_Place, tuple[str, dict[str, str]]] = {}  # what the file calls each, and its tensors by their roles
    scales, unknown = {}, []
    for name, entry in tensors.entries.items():
        match, norm = _ROLE.fullmatch(name), norms.get(name.removesuffix(".scale"))
        if match and (place := places.get(_own(match[1]))):
            role = str(match.lastgroup)
            if (other := found.setdefault(place, (match[1], {}))[1].setdefault(role, name)) != name:
                raise WeightsError(f"{path}: {name} and {other} are both the {role} of one layer")
        elif "text_projection" in name:  # which CLIP has, and FLUX does not ask
            continue
        elif name.endswith("_norm.scale") and norm is not None and entry.shape == norm.scale.shape:
            scales[norm] = name
        else:
            unknown.append(name)
    if unknown:
        said = f"{len(unknown)} tensors fit nothing in {' or '.join(modules)}: {listed(unknown, 4)}"
        raise WeightsError(f"{path}: {said}; is it of another model?")
    for first, second in pairwise(sorted(found, key=lambda place: (id(place.layer), place.rows))):
        if first.layer is second.layer and second.rows[0] < first.rows[1]:  # such as qkv, and in another dialect q
            said = f"{found[first][0]} and {found[second][0]} change the same rows of one layer"
            raise WeightsError(f"{path}: {said}, which would be added twice; remove one of the two from the file")
    for place, (layer, roles) in found.items():  # before any value is read
        columns = {place.layer.in_features}
        if place.layer is transformer.img_in:  # it may become wider, to be shown more than the noise
            columns |= {max(place.layer.in_features, _SHOWN), transformer.config.out_channels}  # or those of the noise
        _check_shapes(layer, roles, place, tensors, columns)
    changes = [_change(layer, roles, place, tensors) for place, (layer, roles) in found.items()]
    return changes, {norm: finite_weights(tensors[name], name, tensors.path) for norm, name in scales.items()}


def _check_shapes(layer: str, roles: dict[str, str], place: _Place, tensors: Tensors, columns: set[int]) -> None:
    path, shapes = tensors.path, {role: tensors.entries[name].shape for role, name in roles.items()}
    if missing := {"down", "up"} - shapes.keys():
        raise WeightsError(f"{path}: {layer} has no {' and no '.join(sorted(missing))} matrix")
    down, up, rows = shapes["down"], shapes["up"], place.rows[1] - place.rows[0]
    fits = len(down) == 2 and down[0] and down[1] in columns and up == (rows, down[0])
    if not (fits and shapes.get("bias", (rows,)) == (rows,)):
        said = ", ".join(f"{role} {list(shape)}" for role, shape in shapes.items())
        want = f"down [rank, {place.layer.in_features}], up [{rows}, rank]"
        raise WeightsError(f"{path}: {layer} is {said}, where {want} was expected; is it of another model?")
    if (alpha := shapes.get("alpha", torch.Size())).numel() != 1:
        raise WeightsError(f"{path}: alpha of {layer} is of shape {list(alpha)}; it must be one number")


def _change(layer: str, roles: dict[str, str], place: _Place, tensors: Tensors) -> Change:
    values = {role: tensors[name].float() if role == "alpha" else tensors[name] for role, name in roles.items()}
    given = {role: finite_weights(value, roles[role], tensors.path) for role, value in values.items()}
    down, up, bias = given["down"], given["up"], given.get("bias")
    alpha = given["alpha"].item() if "alpha" in given else _told(tensors, layer, len(down))
    if not (isfinite(alpha) and alpha):
        raise WeightsError(f"{tensors.path}: alpha of {layer} is {alpha}; it must be finite, and not 0")
    return Change(place.layer, down, place.spread(up), None if bias is None else place.spread(bias), alpha / len(down))


def _told(tensors: Tensors, layer: str, rank: int) -> float:
    """A layer's alpha in PEFT's config; the rank where there is none.

    diffusers writes it into the file, once for each part; PEFT itself beside the file.

    Raises:
        WeightsError: it cannot be read.
    """
    part, _, own = layer.partition(".")
    folder = tensors.path if tensors.path.is_dir() else tensors.path.parent
    beside = folder / "adapter_config.json"
    try:
        told, head = json.loads(tensors.metadata.get(_METADATA, "{}")), f"{part}."
        if not told and beside.is_file() and tensors.path.name in (folder.name, "adapter_model.safetensors"):
            told, head = read_json(beside), ""
        patterns = told.get(f"{head}alpha_pattern") or {}
        named = (alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", own))
        alpha = next(named, told.get(f"{head}lora_alpha", rank))
        return float(alpha) * (rank**0.5 if told.get(f"{head}use_rslora") else 1)
    except (*MISREAD, re.error) as error:
        raise WeightsError(f"{tensors.path}: its PEFT config cannot be read ({error})") from error


def _own(layer: str) -> tuple[str, str]:
    """The part that a file's name for a layer belongs to, and the name without that part's prefix."""
    for part, prefix in _PREFIXES.items():
        match = re.match(prefix, layer)
        if match and (match[0] or part == "transformer"):
            return part, layer[match.end() :].replace(".", "_")
    return "", layer


def _places(modules: Mapping[str, nn.Module]) -> Iterator[tuple[tuple[str, str], _Place]]:
    """What every name of every dialect stands for; kohya has underscores for dots, and so have all here."""
    for part, module in modules.items():
        linears = {name: each for name, each in module.named_modules() if isinstance(each, nn.Linear)}
        for name, linear in linears.items():
            whole = _Place(linear, (0, linear.out_features))
            own = name.removeprefix("text_model.").replace(".", "_")
            yield (part, own), whole
            for theirs, ours in _XLABS.items():
                if isinstance(module, Flux) and own.endswith(ours):
                    rows = (0, 3 * module.config.hidden_size) if ours == "linear1" else whole.rows
                    yield (part, own.removesuffix(ours) + theirs), _Place(linear, rows)
        for rule in rules(module.config) if isinstance(module, Flux) else ():
            if (layer := linears.get(rule.official.removesuffix(".weight"))) is not None:
                ends = pairwise(accumulate(rule.rows or (layer.out_features,), initial=0))
                for theirs, rows in zip(rule.diffusers, ends, strict=True):
                    yield (part, theirs.removesuffix(".weight").replace(".", "_")), _Place(layer, rows, rule.swapped)
