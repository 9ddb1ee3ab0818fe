"""Linears in 8 bits, by torchao; for 4 bits, GGUF files are loaded as they are (chapter 15)."""

import warnings

import torch
from torch import nn

from fluxlab.extras import importing, quiet
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.speed.handle import Handle, check_in_memory

_CONFIGS = {  # of torchao
    "int8": "Int8WeightOnlyConfig",
    "int8 dynamic": "Int8DynamicActivationInt8WeightConfig",
    "fp8": "Float8WeightOnlyConfig",
}


def quantize(pipe: Pipeline, kind: str = "int8") -> Handle:
    """Hold the transformer's Linears in 8 bits, with one scale for each row; ``img_in`` and the last are left alone.

    The weights they had stay referred to, for ``undo``: where they are mapped to their file they take no memory.

    Args:
        pipe: whose transformer.
        kind: ``"int8"``: weights alone, widened for each product; ``"int8 dynamic"``: tokens too, and products of
            integers; ``"fp8"``: weights alone, where the device has it.

    Raises:
        ValueError: no such kind, or the device has no fp8; weights in float64; or as ``compile`` says.
        ImportError: torchao is not installed.
    """
    if kind not in [*_CONFIGS]:
        kinds = ", ".join(map(repr, _CONFIGS))
        raise ValueError(f"kind is {kind!r}; there are {kinds}; 4 bits are loaded from GGUF files")
    handle = Handle(pipe, "quantize", f"quantize {kind}")
    ends = (pipe.model.img_in, pipe.model.final_layer.linear)
    linears = [each for each in pipe.model.modules() if isinstance(each, nn.Linear) and each not in ends]
    check_in_memory(pipe.model)
    if ends[0].weight.dtype == torch.float64:
        raise ValueError("the weights are float64, which torchao does not take; pipe.to(torch.float32) first")
    capable = linears[0].weight.is_cuda and torch.cuda.get_device_capability(linears[0].weight.device) >= (8, 9)
    if kind == "fp8" and not capable:
        raise ValueError("fp8 needs a GPU that has it (compute capability 8.9); take int8 here")
    with importing(), warnings.catch_warnings(action="ignore"):
        from torchao import quantization as torchao  # type: ignore[import-not-found,unused-ignore]

    before = [each.weight for each in linears]
    was = (ends[0].weight.device, ends[0].weight.dtype)

    def restore() -> None:
        now = (ends[0].weight.device, ends[0].weight.dtype)
        for linear, weight in zip(linears, before, strict=True):
            vars(linear).pop("extra_repr", None)  # torchao's
            if type(linear.weight) is nn.Parameter:  # others were loaded since
                continue
            if now != was:  # moved or cast since
                weight.data = weight.data.to(*now)
            linear.weight = weight

    try:
        with quiet(), warnings.catch_warnings(action="ignore"):
            torchao.quantize_(pipe.model, getattr(torchao, _CONFIGS[kind])(), lambda module, name: module in linears)
    except BaseException:
        restore()
        raise
    handle.later(restore)
    return handle.on()
