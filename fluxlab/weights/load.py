"""Checkpoints into a model: every name and shape checked first, memory spent once, or never. Opened in chapter 15."""

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fluxlab.arguments import check_place
from fluxlab.config import AutoEncoderConfig, FluxConfig, Variant
from fluxlab.extras import importing
from fluxlab.files import MISREAD, Tensors, WeightsError, at, describe_difference, listed, read_json
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.transformer import Flux
from fluxlab.weights.find import data_folder, encoder_config
from fluxlab.weights.layouts import Config, Layout, Shapes, shapes, translated
from fluxlab.weights.stream import stream
from fluxlab.weights.which import UNUSED, Part, open_part, open_tensors

Module = TypeVar("Module", bound=nn.Module)
PUBLISHED: dict[str, dict[str, Any]] = {  # T5-XXL v1.1 and CLIP-L, where they differ from transformers' defaults
    "t5": {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"},
    "clip": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
_ENCODERS = {"t5": "T5EncoderModel", "clip": "CLIPTextModel"}  # transformers' classes
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def load_weights(
    module: Module,
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    low_memory: bool = False,
) -> Module:
    """Give a module, best made on the meta device, the weights of a file or of a folder of shards.

    A transformer, an autoencoder or a text encoder is found in a file of several parts, in either layout, and in
    quantized files. Names and shapes are compared before anything is read. Each tensor is then read, cast and moved by
    itself and put in place of the module's own, so that the peak memory is the weights once, and nothing on a CPU where
    they need no change: they stay mapped. The module is left in eval mode, and its weights without gradients. Without
    ``dtype`` they keep that of the file; where it holds several, since a forward takes one, they get the narrowest that
    holds the values of all: float32 for bfloat16 and float32; and bfloat16 for float8, with which no forward computes.

    With ``low_memory`` nothing is kept: each layer's weights are read, widened, cast and moved when it runs, and left
    when it has run.

    Raises:
        WeightsError: the file is not whole, or its names, shapes or dtypes differ; nothing is loaded then. Or a value
            is too large for ``dtype``.
        ValueError: no such device here; or a LoRA is merged into the weights.
    """
    check_place(device, None)
    own: Any = getattr(module, "_orig_mod", module)  # of a compiled one
    fill(own, weights_of(own, path, dtype), device, low_memory)
    return module


def fill(module: Module, tensors: Tensors, device: torch.device | str, low_memory: bool) -> Module:
    """What ``load_weights`` does once the file is opened and its names are the module's."""
    module.load_state_dict({}, strict=False)  # where a LoRA is merged into them, other weights are refused
    for layer in module.modules():
        vars(layer).pop("stop_streaming", lambda: None)()  # other weights, which it had before
    if low_memory:
        stream(module, tensors, device)
    else:
        module.load_state_dict({name: tensors[name].to(device) for name in module.state_dict()}, assign=True)
        if callable(tie := getattr(module, "tie_weights", None)):
            tie()  # T5's one table of words has two names
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner, _, own = name.rpartition(".")
            held = tensors[name].to(device) if name in tensors else None
            if held is None and own != "position_ids":  # CLIP's places, which no file holds
                raise WeightsError(f"{tensors.path}: no file holds {name}; make the module on a device that has memory")
            places = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape) if held is None else held
            module.get_submodule(owner).register_buffer(own, places, persistent=held is not None)
    getattr(module, "weights_change", lambda: None)()  # what computes ahead from them
    return module.eval().requires_grad_(False)


def fit(tensors: Iterable[Tensors], device: torch.device | str) -> bool:
    """Whether there is memory for all: on a CPU, none is needed for those that stay mapped to their file."""
    on_cpu = torch.device(device).type == "cpu"
    sizes = [sum(e.nbytes for e in each.entries.values()) for each in tensors if not (on_cpu and each.mapped)]
    return sum(sizes) < 0.9 * free_memory(device)


def free_memory(device: torch.device | str) -> int:
    """Bytes that can be had on a device; where the system does not say, more than any model takes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return sys.maxsize


def weights_of(module: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> Tensors:
    """A file's tensors under the module's names, checked, and cast when they are read; errors as ``load_weights``'s."""
    if isinstance(module, (Flux, AutoEncoder)):
        config: Any = module.config
        if isinstance(module, Flux):  # which a LoRA that is kept apart may have widened
            config = replace(config, in_channels=module.img_in.in_features)
        return opened(path, config, "official", dtype, True)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    called = type(module).__name__
    kind = next((kind for kind, name in _ENCODERS.items() if name == called), None)  # of none, as of Redux's
    tensors = open_tensors(path) if kind is None else _encoder(open_part(path, kind), wanted)
    if kind is None:  # transformers wrote SigLIP's names after a prefix, and does so no more
        tensors = tensors.renamed({n if n in wanted else n.removeprefix("vision_model."): n for n in tensors})
    check_shapes(tensors, wanted)
    return tensors.cast(dtype or _narrowest(tensors))


def opened(
    path: str | Path, config: Config, to: Layout, dtype: torch.dtype | None = None, narrow: bool = False
) -> Tensors:
    """A transformer's or an autoencoder's tensors in a layout, checked; each cast and translated when it is read.

    ``narrow``: without a dtype, all get the narrowest that holds the values of all.

    Raises:
        WeightsError: as ``load_weights`` says; or tensors of several dtypes become one.
    """
    part = open_part(path, "transformer" if isinstance(config, FluxConfig) else "autoencoder")
    check_shapes(part.tensors, shapes(config, part.layout), part)
    cast = part.tensors.cast(dtype or (_narrowest(part.tensors) if narrow else None))
    return cast if part.layout == to else translated(cast, config, to)


def _narrowest(tensors: Tensors) -> torch.dtype | None:
    """The narrowest dtype that holds the values of all and computes, as eight bits do not; None of no tensor."""
    wide = {torch.bfloat16 if each.itemsize == 1 else each.dtype for each in tensors.entries.values()}
    return reduce(torch.promote_types, wide) if wide else None


def _encoder(part: Part, wanted: Shapes) -> Tensors:
    """A text encoder's tensors under transformers' names, and its one table of words under both of its names."""
    names = {name: name for name in part.tensors if not UNUSED.fullmatch(name)}
    if part.layout == "llama.cpp":
        with importing():
            from gguf import MODEL_ARCH, get_tensor_name_map

        table = get_tensor_name_map(MODEL_ARCH.T5ENCODER, len(wanted))
        known = {table.get_name(name, (".weight",)): name for name in wanted}
        names = {known.get(theirs, theirs): theirs for theirs in names}
    one, other = "shared.weight", "encoder.embed_tokens.weight"
    for name, same in ((one, other), (other, one)):
        if name in wanted and same in names:
            names.setdefault(name, names[same])
    return part.tensors.renamed(names)


def autoencoder_config(variant: Variant, path: str | Path) -> AutoEncoderConfig:
    """A variant's VAE config, with the scale and shift that are written beside the weights, if any are.

    They stand in the metadata of the files that fluxlab writes, and in the ``config.json`` of diffusers' folders.

    Raises:
        WeightsError: the file cannot be read, or they are no such numbers.
    """
    path = at(path)
    told: dict[str, Any] = open_tensors(path).metadata  # of the files that fluxlab writes
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if beside.is_file() and (config := read_json(beside)).get("_class_name") == "AutoencoderKL":  # diffusers' folder
        told = {"shift_factor": config.get("shift_factor") or 0}  # null there is no shift
        told |= {"scale_factor": config["scaling_factor"]} if "scaling_factor" in config else {}
    factors = {name: told[name] for name in ("scale_factor", "shift_factor") if name in told}
    try:
        return replace(variant.autoencoder, **{name: float(factor) for name, factor in factors.items()})  # type: ignore[arg-type]
    except MISREAD as error:
        raise WeightsError(f"{path}: its VAE's {factors} cannot be used ({error})") from error


def check_shapes(tensors: Tensors, wanted: Shapes, part: Part | None = None) -> None:
    """A ``WeightsError`` that lists the names, shapes and dtypes that differ, and says what the file looks like."""
    wrong = [
        f"{name} is {entry.dtype} {list(entry.shape)}, where floating {list(wanted[name])} was expected"
        for name, entry in tensors.entries.items()
        if name in wanted and (tuple(entry.shape) != wanted[name] or entry.dtype not in _DTYPES)
    ]
    problems = [describe_difference(wanted, tensors), f"{len(wrong)} different: {listed(wrong)}" if wrong else ""]
    if any(problems):
        hint = f". It looks like {part}" if part and part.variants else ""
        raise WeightsError(f"{tensors.path}: not what was expected: {'; '.join(filter(None, problems))}{hint}")


def empty_encoder(kind: str, source: str | Path, chosen: Variant | None = None) -> Any:
    """transformers' T5 encoder ("t5") or CLIP text model ("clip") on the meta device, for the weights of ``source``.

    A folder's config is its own; a file has none, and those of the variant serve it: in data/, or the published.

    Raises:
        WeightsError: the folder's config cannot be read, or there is none.
    """
    with importing():
        import transformers

        encoder: Any = getattr(transformers, _ENCODERS[kind])
    folder = at(source)  # a file has no config: the variant's serves it, in data/ or as it was published
    if not folder.is_dir() and chosen is not None and chosen.embedded:
        folder = data_folder() / {"t5": chosen.t5, "clip": chosen.clip}[kind]
    told = encoder_config(folder) if folder.is_dir() else PUBLISHED[kind]
    try:
        with torch.device("meta"):
            return encoder(encoder.config_class.from_dict(told))
    except Exception as error:  # a config that is odd raises of every kind
        raise WeightsError(f"{folder}: no {kind.upper()} can be made from its config.json ({error!r})") from error
