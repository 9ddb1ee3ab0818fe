"""The two layouts of FLUX's weights, official and diffusers', and the way between them. Opened in chapter 15.

diffusers splits what the official layout fuses (qkv; a single block's linear1), swaps the two halves of the last
layer's modulation, and keeps the VAE's attention as Linears where the official one has 1x1 convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxlab.config import AutoEncoderConfig, FluxConfig

Config = FluxConfig | AutoEncoderConfig


@dataclass(frozen=True)
class Rule:
    """One official tensor and what diffusers makes of it."""

    official: str
    diffusers: tuple[str, ...]
    rows: tuple[int, ...] = ()  # how many rows each diffusers tensor takes; empty where there is one
    swapped: bool = False  # whether the two halves change places
    squeezed: bool = False  # whether a 1x1 convolution becomes a Linear

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Official to diffusers."""
        if self.swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if self.squeezed and tensor.ndim == 4:
            tensor = tensor.flatten(1)
        parts = tensor.split(self.rows) if self.rows else (tensor,)
        return dict(zip(self.diffusers, parts, strict=True))

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Diffusers to official."""
        tensor = torch.cat([tensors[name] for name in self.diffusers]) if self.rows else tensors[self.diffusers[0]]
        if self.swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if self.squeezed and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        return tensor


def rules(config: Config) -> Iterator[Rule]:
    """One rule for each tensor of the official checkpoint."""
    return _flux_rules(config) if isinstance(config, FluxConfig) else _autoencoder_rules(config)


def to_diffusers(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Official tensors under diffusers' names; the values are the same, bit by bit."""
    return {name: part for rule in rules(config) for name, part in rule.split(tensors[rule.official]).items()}


def from_diffusers(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The way back."""
    return {rule.official: rule.join(tensors) for rule in rules(config)}


def _linear(official: str, *names: str, rows: tuple[int, ...] = (), bias: bool = True, **kind: bool) -> Iterator[Rule]:
    for leaf in ("weight", "bias") if bias else ("weight",):
        yield Rule(f"{official}.{leaf}", tuple(f"{name}.{leaf}" for name in names), rows, **kind)


def _flux_rules(c: FluxConfig) -> Iterator[Rule]:
    yield from _linear("img_in", "x_embedder")
    yield from _linear("txt_in", "context_embedder")
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    if c.guidance_embed:
        embedders["guidance_in"] = "guidance_embedder"
    for ours, theirs in embedders.items():
        yield from _linear(f"{ours}.in_layer", f"time_text_embed.{theirs}.linear_1")
        yield from _linear(f"{ours}.out_layer", f"time_text_embed.{theirs}.linear_2")

    qkv = (c.hidden_size,) * 3
    streams = (  # stream; qkv; projection; norms; modulation; MLP
        ("img", ("to_q", "to_k", "to_v"), "to_out.0", "norm", "norm1", "ff"),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added", "norm1_context", "ff_context"),
    )
    for n in range(c.depth):
        a, b = f"double_blocks.{n}", f"transformer_blocks.{n}"
        for stream, projections, out, norm, modulation, mlp in streams:
            yield from _linear(f"{a}.{stream}_mod.lin", f"{b}.{modulation}.linear")
            names = (f"{b}.attn.{name}" for name in projections)
            yield from _linear(f"{a}.{stream}_attn.qkv", *names, rows=qkv, bias=c.qkv_bias)
            yield Rule(f"{a}.{stream}_attn.norm.query_norm.scale", (f"{b}.attn.{norm}_q.weight",))
            yield Rule(f"{a}.{stream}_attn.norm.key_norm.scale", (f"{b}.attn.{norm}_k.weight",))
            yield from _linear(f"{a}.{stream}_attn.proj", f"{b}.attn.{out}")
            yield from _linear(f"{a}.{stream}_mlp.0", f"{b}.{mlp}.net.0.proj")
            yield from _linear(f"{a}.{stream}_mlp.2", f"{b}.{mlp}.net.2")
    for n in range(c.depth_single_blocks):
        a, b = f"single_blocks.{n}", f"single_transformer_blocks.{n}"
        yield from _linear(f"{a}.modulation.lin", f"{b}.norm.linear")
        names = (f"{b}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
        yield from _linear(f"{a}.linear1", *names, rows=(*qkv, c.mlp_hidden_dim))
        yield Rule(f"{a}.norm.query_norm.scale", (f"{b}.attn.norm_q.weight",))
        yield Rule(f"{a}.norm.key_norm.scale", (f"{b}.attn.norm_k.weight",))
        yield from _linear(f"{a}.linear2", f"{b}.proj_out")

    yield from _linear("final_layer.linear", "proj_out")
    yield from _linear("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True)


def _autoencoder_rules(c: AutoEncoderConfig) -> Iterator[Rule]:
    levels = len(c.ch_mult)
    widths = [c.ch * mult for mult in c.ch_mult]

    def resnet(ours: str, theirs: str, changes_width: bool) -> Iterator[Rule]:
        for name in ("norm1", "conv1", "norm2", "conv2"):
            yield from _linear(f"{ours}.{name}", f"{theirs}.{name}")
        if changes_width:
            yield from _linear(f"{ours}.nin_shortcut", f"{theirs}.conv_shortcut")

    for half in ("encoder", "decoder"):
        for ours, theirs in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            yield from _linear(f"{half}.{ours}", f"{half}.{theirs}")
        yield from resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", False)
        yield from resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", False)
        attention = f"{half}.mid_block.attentions.0"
        yield from _linear(f"{half}.mid.attn_1.norm", f"{attention}.group_norm")
        for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            yield from _linear(f"{half}.mid.attn_1.{ours}", f"{attention}.{theirs}", squeezed=True)
    for i in range(levels):
        before = c.ch if i == 0 else widths[i - 1]
        for j in range(c.num_res_blocks):
            changes = j == 0 and before != widths[i]
            yield from resnet(f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}", changes)
        if i < levels - 1:
            yield from _linear(f"encoder.down.{i}.downsample.conv", f"encoder.down_blocks.{i}.downsamplers.0.conv")
        above, there = widths[min(i + 1, levels - 1)], f"decoder.up_blocks.{levels - 1 - i}"  # counted from below
        for j in range(c.num_res_blocks + 1):
            changes = j == 0 and above != widths[i]
            yield from resnet(f"decoder.up.{i}.block.{j}", f"{there}.resnets.{j}", changes)
        if i > 0:
            yield from _linear(f"decoder.up.{i}.upsample.conv", f"{there}.upsamplers.0.conv")
