"""The VAE's encoder and decoder as ONNX graphs: one node a residual block. Opened in chapter 13.

Axes: batch, channels, height and width in pixels, rows and columns in latent cells.
"""

import torch
from onnx import ModelProto, helper
from torch import nn

from fluxlab.config import AutoEncoderConfig
from fluxlab.glossary import autoencoder_entry
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.onnx.text import NEW, SILU, Writer, without_numbers


def parts(c: AutoEncoderConfig, opset: int) -> str:
    """Every kind of part, the smallest first."""
    channels = c.ch * c.ch_mult[-1]
    group_norm = f"GroupNormalization(x, weight, bias, num_groups={c.norm_groups}, epsilon=1e-6)"
    attended = "Attention(q, k, v)"
    if opset < NEW:
        ones, zeros = (f"Expand({number}, [{c.norm_groups}])" for number in (1.0, 0.0))
        normed = f"InstanceNormalization(Reshape(x, [0, {c.norm_groups}, -1]), {ones}, {zeros}, epsilon=1e-6)"
        group_norm = f"Reshape({normed}, Shape(x)) * Unsqueeze(weight, [1, 2]) + Unsqueeze(bias, [1, 2])"
        attended = f"Softmax(q @ Transpose(k, perm=[0, 1, 3, 2]) * {channels**-0.5}, axis=-1) @ v"

    weights = "norm1.weight, norm1.bias, conv1.weight, conv1.bias, norm2.weight, norm2.bias, conv2.weight, conv2.bias"
    residual = """"Two convolutions around a shortcut, each after GroupNorm and SiLU"
    norm1 = GroupNorm(x, norm1.weight, norm1.bias)
    conv1 = Conv3x3(SiLU(norm1), conv1.weight, conv1.bias)
    norm2 = GroupNorm(conv1, norm2.weight, norm2.bias)
    conv2 = Conv3x3(SiLU(norm2), conv2.weight, conv2.bias)"""
    nearest = 'mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"'
    return f"""{SILU}
def GroupNorm(x, weight, bias) -> y:
    "Each of {c.norm_groups} groups of channels to mean 0, deviation 1"
    y = {group_norm}

def Conv3x3(x, weight, bias) -> y:
    "A 3x3 convolution that keeps the size"
    y = Conv(x, weight, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1])

def ResnetBlock(x, {weights}) -> y:
    {residual}
    y = x + conv2

def ResnetBlockWithShortcut(x, {weights}, nin_shortcut.weight, nin_shortcut.bias) -> y:
    {residual}
    nin_shortcut = Conv(x, nin_shortcut.weight, nin_shortcut.bias, kernel_shape=[1, 1])
    y = nin_shortcut + conv2

def Cells(x, weight, bias) -> y:
    "A 1x1 convolution, and the cells of its map in a row: B 1 L C"
    y = Transpose(Reshape(Conv(x, weight, bias, kernel_shape=[1, 1]), [0, 1, {channels}, -1]), perm=[0, 1, 3, 2])

def AttnBlock(x, norm.weight, norm.bias, q.weight, q.bias, k.weight, k.bias, v.weight, v.bias,
              proj_out.weight, proj_out.bias) -> y:
    "Every latent cell looks at every other, with one head"
    normed = GroupNorm(x, norm.weight, norm.bias)
    q = Cells(normed, q.weight, q.bias)
    k = Cells(normed, k.weight, k.bias)
    v = Cells(normed, v.weight, v.bias)
    attended = {attended}
    back = Reshape(Transpose(attended, perm=[0, 1, 3, 2]), Shape(x))
    y = x + Conv(back, proj_out.weight, proj_out.bias, kernel_shape=[1, 1])

def Downsample(x, conv.weight, conv.bias) -> y:
    "Half the side; padded at the right and bottom only"
    y = Conv(x, conv.weight, conv.bias, kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])

def Scale(x) -> y:
    "(x - shift_factor) * scale_factor: what the transformer works on"
    y = (x - {float(c.shift_factor)}) * {float(c.scale_factor)}

def Upsample(x, conv.weight, conv.bias) -> y:
    "Twice the side: each value repeated, then a convolution"
    larger = Resize(x, None, [1.0, 1.0, 2.0, 2.0], {nearest})
    y = Conv3x3(larger, conv.weight, conv.bias)

def Unscale(x) -> y:
    "x / scale_factor + shift_factor: what the VAE knows"
    y = x / {float(c.scale_factor)} + {float(c.shift_factor)}
"""


def autoencoder_graph(writer: Writer, c: AutoEncoderConfig, half: str, name: str) -> ModelProto:
    """One half of the VAE, encoder or decoder, without its weights, the scale and the shift inside as in ours."""
    with torch.device("meta"):
        module = getattr(AutoEncoder(c), half)
    writer.define(parts(c, writer.opset))
    lines: list[str] = []

    def through(part: nn.Module, path: str, x: str) -> str:
        """Call what a part consists of, in the order of work, and give the name of what comes out."""
        kind = type(part).__name__.replace("Conv2d", "Conv3x3")
        if kind == "ResnetBlock" and isinstance(part.nin_shortcut, nn.Conv2d):
            kind = "ResnetBlockWithShortcut"
        if kind not in writer.functions:
            children = list(part.named_children())
            for own, child in reversed(children) if path == "decoder.up" else children:
                x = through(child, f"{path}.{own}", x)
            return x
        out = "pixels" if path == "decoder.conv_out" else path
        lines.append(writer.call(kind, path, x, out=out))
        if path == f"{half}.norm_out":
            out = f"{half}.active"
            lines.append(f"{out} = SiLU({path})")
        return out

    pixels = helper.make_tensor_value_info("pixels", writer.dtype, ["B", c.in_channels, "8h", "8w"])
    latent = helper.make_tensor_value_info("latent", writer.dtype, ["B", c.z_channels, "h", "w"])
    inputs, outputs = ([pixels], [latent]) if half == "encoder" else ([latent], [pixels])
    if half == "encoder":
        moments = through(module, half, "pixels")
        lines += [f"mean, log_variance = Split({moments}, {[c.z_channels] * 2}, axis=1)", "latent = Scale(mean)"]
    else:
        lines += ["raw_latent = Unscale(latent)"]
        through(module, half, "raw_latent")

    initializers = []
    for key, weight in module.state_dict(prefix=f"{half}.").items():
        entry = autoencoder_entry(key)
        initializers.append(without_numbers(key, tuple(weight.shape), writer.dtype, entry.meaning if entry else ""))
    doc = f"The VAE's {half} of {name}: 8 times smaller or larger on a side, {c.z_channels} channels"
    graph = helper.make_graph(writer.nodes("\n".join(lines)), half, inputs, outputs, initializers, doc)
    return writer.model(graph, name)
