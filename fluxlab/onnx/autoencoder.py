"""The VAE's encoder and decoder as ONNX graphs: one node a residual block. Opened in chapter 13.

Axes: batch, channels, height and width in pixels, rows and columns in latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from onnx import FunctionProto, ModelProto, helper

from fluxlab.config import AutoEncoderConfig
from fluxlab.glossary import autoencoder_entry
from fluxlab.model.autoencoder import AutoEncoder, DownLevel, UpLevel
from fluxlab.onnx.body import DOMAIN, NEW, Body, silu, value, without_numbers

_RESIDUAL = [f"{part}.{leaf}" for part in ("norm1", "conv1", "norm2", "conv2") for leaf in ("weight", "bias")]
_SHORTCUT = ["nin_shortcut.weight", "nin_shortcut.bias"]
_ATTENTION = [f"{part}.{leaf}" for part in ("norm", "q", "k", "v", "proj_out") for leaf in ("weight", "bias")]


def functions(c: AutoEncoderConfig, half: Literal["encoder", "decoder"], opset: int) -> list[FunctionProto]:
    """Every kind of part of one half, the smallest first."""
    scale, unscale = _scaling(c, opset)
    return [
        silu(opset),
        _group_norm(c, opset),
        _conv(opset),
        _residual(opset, "ResnetBlock", []),
        _residual(opset, "ResnetBlockWithShortcut", _SHORTCUT),
        _attention(c, opset),
        *((_downsample(opset), scale) if half == "encoder" else (_upsample(opset), unscale)),
    ]


def _group_norm(c: AutoEncoderConfig, opset: int) -> FunctionProto:
    b = Body(
        "GroupNorm",
        ("x", "weight", "bias"),
        f"Each of {c.norm_groups} groups of channels to mean 0, deviation 1",
        opset,
    )
    if opset >= NEW:
        return b.function(
            b.op("GroupNormalization", "x", "weight", "bias", out="y", num_groups=c.norm_groups, epsilon=1e-6)
        )
    groups = b.op("Reshape", "x", b.whole("groups.shape", 0, c.norm_groups, -1), out="groups")
    one, zero = (
        b.op("CastLike", b.op("Constant", out=f"{name}.float", value_floats=[number] * c.norm_groups), "x", out=name)
        for name, number in (("ones", 1.0), ("zeros", 0.0))
    )
    normed = b.op("InstanceNormalization", groups, one, zero, out="normed", epsilon=1e-6)
    back = b.op("Reshape", normed, b.op("Shape", "x", out="x.shape"), out="back")
    axes = b.whole("axes", 1, 2)
    scale, shift = (b.op("Unsqueeze", w, axes, out=f"{w}_map") for w in ("weight", "bias"))
    return b.function(b.op("Add", b.op("Mul", back, scale, out="scaled"), shift, out="y"))


def _conv(opset: int) -> FunctionProto:
    b = Body("Conv3x3", ("x", "weight", "bias"), "A 3x3 convolution that keeps the size", opset)
    return b.function(b.op("Conv", "x", "weight", "bias", out="y", kernel_shape=[3, 3], pads=[1, 1, 1, 1]))


def _residual(opset: int, name: str, shortcut: Sequence[str]) -> FunctionProto:
    b = Body(
        name, ("x", *_RESIDUAL, *shortcut), "Two convolutions around a shortcut, each after GroupNorm and SiLU", opset
    )
    h = "x"
    for i in ("1", "2"):
        norm, conv = ([f"{part}{i}.{leaf}" for leaf in ("weight", "bias")] for part in ("norm", "conv"))
        h = b.call("SiLU", b.call("GroupNorm", h, *norm, out=f"norm{i}"), out=f"active{i}")
        h = b.call("Conv3x3", h, *conv, out=f"conv{i}")
    past = b.op("Conv", "x", *shortcut, out="nin_shortcut", kernel_shape=[1, 1]) if shortcut else "x"
    return b.function(b.op("Add", past, h, out="y"))


def _scaling(c: AutoEncoderConfig, opset: int) -> list[FunctionProto]:
    """Between the latent that the VAE knows and the one that the transformer works on."""
    there = Body("Scale", ("x",), "(x - shift_factor) * scale_factor: what the transformer works on", opset)
    centred = there.op("Sub", "x", there.number("shift_factor", c.shift_factor, "x"), out="centred")
    there.op("Mul", centred, there.number("scale_factor", c.scale_factor, "x"), out="y")
    back = Body("Unscale", ("x",), "x / scale_factor + shift_factor: what the VAE knows", opset)
    wider = back.op("Div", "x", back.number("scale_factor", c.scale_factor, "x"), out="wider")
    back.op("Add", wider, back.number("shift_factor", c.shift_factor, "x"), out="y")
    return [there.function("y"), back.function("y")]


def _attention(c: AutoEncoderConfig, opset: int) -> FunctionProto:
    b = Body("AttnBlock", ("x", *_ATTENTION), "Every latent cell looks at every other, with one head", opset)
    channels = c.ch * c.ch_mult[-1]
    normed = b.call("GroupNorm", "x", "norm.weight", "norm.bias", out="norm")
    flat, one = b.whole("flat", 0, 1, channels, -1), {}
    for part in ("q", "k", "v"):
        made = b.op("Conv", normed, f"{part}.weight", f"{part}.bias", out=f"{part}_map", kernel_shape=[1, 1])
        cells = b.op("Reshape", made, flat, out=f"{part}_flat")
        one[part] = b.op("Transpose", cells, out=part, perm=[0, 1, 3, 2])  # B 1 L C
    if opset >= NEW:
        heads = b.op("Attention", one["q"], one["k"], one["v"], out="attended")
    else:
        raw = b.op("MatMul", "q", b.op("Transpose", "k", out="k_transposed", perm=[0, 1, 3, 2]), out="scores_raw")
        scores = b.op("Mul", raw, b.number("scale", channels**-0.5, "x"), out="scores")
        heads = b.op("MatMul", b.op("Softmax", scores, out="attention", axis=-1), "v", out="attended")
    turned = b.op("Transpose", heads, out="channels_first", perm=[0, 1, 3, 2])
    back = b.op("Reshape", turned, b.op("Shape", "x", out="x.shape"), out="back")
    share = b.op("Conv", back, "proj_out.weight", "proj_out.bias", out="proj_out", kernel_shape=[1, 1])
    return b.function(b.op("Add", "x", share, out="y"))


def _downsample(opset: int) -> FunctionProto:
    b = Body(
        "Downsample", ("x", "conv.weight", "conv.bias"), "Half the side; padded at the right and bottom only", opset
    )
    attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}
    return b.function(b.op("Conv", "x", "conv.weight", "conv.bias", out="y", **attributes))


def _upsample(opset: int) -> FunctionProto:
    b = Body(
        "Upsample", ("x", "conv.weight", "conv.bias"), "Twice the side: each value repeated, then a convolution", opset
    )
    scales = b.op("Constant", out="scales", value_floats=[1.0, 1.0, 2.0, 2.0])
    attributes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    larger = b.op("Resize", "x", "", scales, out="larger", **attributes)
    return b.function(b.call("Conv3x3", larger, "conv.weight", "conv.bias", out="y"))


def autoencoder_graph(
    c: AutoEncoderConfig, half: Literal["encoder", "decoder"], opset: int, dtype: int, name: str
) -> ModelProto:
    """One half of the VAE without its weights, the scale and the shift inside, as ``AutoEncoder`` has them.

    Args:
        c: its sizes.
        half: which.
        opset: 23 or later, or 17 for older tools.
        dtype: of weights and features, as ONNX numbers it.
        name: of the graph.
    """
    with torch.device("meta"):
        module = getattr(AutoEncoder(c), half)
    b = Body(name, [], "", opset)
    pixels: list[str | int] = ["batch", c.in_channels, "height", "width"]
    cells: list[str | int] = ["batch", c.z_channels, "rows", "columns"]

    def call(kind: str, x: str, path: str, weights: Sequence[str]) -> str:
        return b.call(kind, x, *(f"{half}.{path}.{w}" for w in weights), out=f"{half}.{path}")

    def residual(x: str, path: str) -> str:
        past = isinstance(module.get_submodule(path).nin_shortcut, torch.nn.Conv2d)
        kind, extra = ("ResnetBlockWithShortcut", _SHORTCUT) if past else ("ResnetBlock", [])
        return call(kind, x, path, [*_RESIDUAL, *extra])

    def middle(x: str) -> str:
        x = call("AttnBlock", residual(x, "mid.block_1"), "mid.attn_1", _ATTENTION)
        return residual(x, "mid.block_2")

    def level(x: str, path: str, part: DownLevel | UpLevel, end: str, kind: str) -> str:
        for j in range(len(part.block)):
            x = residual(x, f"{path}.block.{j}")
        last = isinstance(getattr(part, end), torch.nn.Identity)
        return x if last else call(kind, x, f"{path}.{end}", ("conv.weight", "conv.bias"))

    if half == "encoder":
        x = call("Conv3x3", "pixels", "conv_in", ("weight", "bias"))
        for i, part in enumerate(module.down):
            x = level(x, f"down.{i}", part, "downsample", "Downsample")
        x = middle(x)
    else:
        raw = b.call("Unscale", "latent", out="raw_latent")
        x = middle(call("Conv3x3", raw, "conv_in", ("weight", "bias")))
        for i in reversed(range(len(module.up))):
            x = level(x, f"up.{i}", module.up[i], "upsample", "Upsample")
    x = b.call("SiLU", call("GroupNorm", x, "norm_out", ("weight", "bias")), out=f"{half}.active")
    if half == "encoder":
        moments = call("Conv3x3", x, "conv_out", ("weight", "bias"))
        mean, _ = b.split(moments, (c.z_channels, c.z_channels), ("mean", "log_variance"), axis=1)
        b.call("Scale", mean, out="latent")
        inputs, outputs = [value("pixels", dtype, pixels)], [value("latent", dtype, cells)]
    else:
        b.call("Conv3x3", x, f"{half}.conv_out.weight", f"{half}.conv_out.bias", out="pixels")
        inputs, outputs = [value("latent", dtype, cells)], [value("pixels", dtype, pixels)]

    weights = {f"{half}.{key}": weight for key, weight in module.state_dict().items()}
    graph = helper.make_graph(
        b.nodes,
        name,
        inputs,
        outputs,
        [without_numbers(key, w.shape, dtype) for key, w in weights.items()],
        f"The VAE's {half} of {name}: 8 times smaller or larger on a side, {c.z_channels} channels",
    )
    for tensor in graph.initializer:
        entry = autoencoder_entry(tensor.name)
        tensor.doc_string = entry.meaning if entry else ""
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(
        graph, functions=functions(c, half, opset), opset_imports=imports, ir_version=10, producer_name=DOMAIN
    )
