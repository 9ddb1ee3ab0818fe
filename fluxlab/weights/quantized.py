"""Quantized files: GGUF, and eight-bit floats with scales; widened tensor by tensor, as they are read. Chapter 15."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxlab.arguments import is_finite
from fluxlab.extras import importing
from fluxlab.files import MISREAD, Tensors, WeightsError, listed

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of GGUF's types
_ARCHITECTURES = ("flux", "t5", "t5encoder", None)  # None is what stable-diffusion.cpp writes
_EIGHT_BITS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_SCALE = re.compile(r"(.*)\.(?:scale_weight|weight_scale)")
_BESIDE = re.compile(r"(?:.*\.)?(?:scaled_fp8|scale_input|input_scale|comfy_quant)")  # marks; scales of activations
_BITSANDBYTES = re.compile(r".*\.(?:SCB|weight_format|absmax|quant_map|quant_state\.bitsandbytes__\w+)")


def read_gguf(path: Path) -> Tensors:
    """A GGUF file: floats stay mapped, quantized tensors become float32, as the gguf package dequantizes them.

    Raises:
        WeightsError: the file is not whole, is of another architecture, or has a type that cannot be dequantized.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    with importing():
        from gguf import GGML_QUANT_SIZES, GGUFEndian, GGUFReader
        from gguf.quants import dequantize

    class Reader(GGUFReader):  # type: ignore[misc,unused-ignore]
        """One that reads nothing beyond the end of the file: its own takes what a header says for true."""

        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = Reader(path, "c")
        if reader.endianess == GGUFEndian.BIG:
            raise WeightsError(f"{path}: its numbers are big-endian, for another machine; take the usual file")
        told = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
        given = {tensor.name: tensor for tensor in reader.tensors}
        for kind in {tensor.tensor_type for tensor in given.values()}:
            try:
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError as error:
                said = f"{path}: has tensors of type {kind.name}, which the gguf package cannot dequantize"
                raise WeightsError(f"{said}; take another file, such as Q8_0 or Q4_K") from error
        entries = {}
        for name, tensor in given.items():
            shape = told.get(f"comfy.gguf.orig_shape.{name}") or tensor.shape[::-1].tolist()
            entries[name] = torch.empty(shape, dtype=_FLOATS.get(tensor.tensor_type.name, torch.float32), device="meta")
            if entries[name].numel() != (numbers := tensor.n_elements):
                raise WeightsError(f"{path}: {name} has {numbers} numbers, where its shape {shape} says another")
        places = sorted((tensor.data_offset, tensor.data_offset + int(tensor.n_bytes)) for tensor in given.values())
        if any(end > start for (_, end), (start, _) in pairwise(places)):
            raise WeightsError(f"{path}: its tensors overlap")
    except WeightsError:
        raise
    except Exception as error:  # the package stumbles in many ways over a spoilt file
        advice = "fetch it again, or, if it is whole, update the gguf package"
        raise WeightsError(f"{path}: not a whole GGUF file that can be read ({error}); {advice}") from error
    if (architecture := told.get("general.architecture")) not in _ARCHITECTURES:
        raise WeightsError(f"{path}: a GGUF file of {architecture!r}, where 'flux' or 't5encoder' was expected")

    def read(name: str) -> Tensor:
        tensor, entry = given[name], entries[name]
        if tensor.tensor_type.name in _FLOATS:
            return torch.from_numpy(tensor.data).view(entry.dtype).reshape(entry.shape)
        rows = np.asarray(tensor.data).reshape(-1, tensor.data.shape[-1])
        wide = np.empty((len(rows), tensor.n_elements // len(rows)), np.float32)
        some = 2**19 // wide.shape[1] + 1  # rows at a time, so that what is made on the way stays in the cache
        for start in range(0, len(rows), some):
            wide[start : start + some] = dequantize(rows[start : start + some], tensor.tensor_type)
        return finite_weights(torch.from_numpy(wide).reshape(entry.shape), name, path)

    kinds = {name: tensor.tensor_type.name for name, tensor in given.items()}
    return Tensors(path, entries, read, mapped={*kinds.values()} <= _FLOATS.keys(), kinds=kinds)


def unscaled(tensors: Tensors) -> Tensors:
    """A safetensors file's own tensors; of eight-bit floats with a scale beside them, the float32 product.

    Raises:
        WeightsError: it is quantized in a way that is not read here; or a scale is without its weight, of a shape that
            fits nothing, or not finite.
    """
    path, names = tensors.path, list(tensors)
    if found := list(filter(_BITSANDBYTES.fullmatch, names)):
        said = f"quantized by bitsandbytes ({listed(found, 2)}), which only bitsandbytes reads"
        raise WeightsError(f"{path}: {said}; take the bfloat16, fp8 or GGUF file of the same model")
    if others := _formats(tensors) - _EIGHT_BITS.keys():
        raise WeightsError(f"{path}: quantized as {listed(sorted(others))}, which is not read; take fp8 or GGUF")
    pairs = [(f"{match[1]}.weight", name) for name in names if (match := _SCALE.fullmatch(name))]
    if len(scales := dict(pairs)) < len(pairs):
        raise WeightsError(f"{path}: a weight has two scales, among {listed([name for _, name in pairs], 4)}")
    entries = {n: e for n, e in tensors.entries.items() if not (_SCALE.fullmatch(n) or _BESIDE.fullmatch(n))}
    for weight, scale in scales.items():
        entry, factor = entries.get(weight), tensors.entries[scale]
        if entry is None or entry.dtype not in _EIGHT_BITS.values() or factor.numel() not in (1, *entry.shape[:1]):
            what = "nothing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
            raise WeightsError(f"{path}: {scale} {list(factor.shape)} scales {weight}, which is {what}")
        finite_weights(tensors[scale].float(), scale, path)
        entries[weight] = entry.to(torch.float32)

    def read(name: str) -> Tensor:
        if name not in scales:
            return tensors[name]
        weight, factor = tensors[name].float(), tensors[scales[name]].float()
        return weight * factor.reshape(-1, *[1] * (weight.ndim - 1))  # one for all, or one for each row

    kinds = {name: tensors.kinds[name] + " with a scale" * (name in scales) for name in entries}
    return Tensors(path, entries, read, tensors.metadata, tensors.mapped and not scales, kinds)


def _formats(tensors: Tensors) -> set[str]:
    """What ComfyUI's newer files say of their layers, in the metadata or in a tensor of JSON beside each."""
    try:
        said = [*json.loads(tensors.metadata.get("_quantization_metadata", "{}")).get("layers", {}).values()]
        marks = [name for name in tensors if name.endswith(".comfy_quant")]
        if long := [name for name in marks if tensors.entries[name].numel() > 2**12]:
            raise ValueError(f"{long[0]} has {tensors.entries[long[0]].numel()} letters")
        said += [json.loads(bytes(tensors[name].flatten().tolist())) for name in marks]
        return {str(layer["format"]) for layer in said}
    except MISREAD as error:
        raise WeightsError(f"{tensors.path}: what it says of its quantization cannot be read ({error!r})") from error


def finite_weights(tensor: Tensor, name: str, path: Path) -> Tensor:
    """The tensor; a ``WeightsError`` where it is not floating, or has NaN or infinity in it."""
    if not tensor.is_floating_point():
        raise WeightsError(f"{path}: {name} is {tensor.dtype}, where floating was expected")
    if not is_finite(tensor):
        raise WeightsError(f"{path}: {name} has values that are not finite; fetch the file again")
    return tensor
