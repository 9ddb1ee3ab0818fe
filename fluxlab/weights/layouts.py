"""The two layouts of FLUX's weights, official and diffusers', and the way between them. Opened in chapter 15.

diffusers splits what the official layout fuses (qkv; a single block's linear1), swaps the two halves of the last
layer's modulation, and keeps the VAE's attention as Linears where the official one has 1x1 convolutions.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fluxlab.config import AutoEncoderConfig, FluxConfig
from fluxlab.files import Tensors, WeightsError
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.transformer import Flux

Config = FluxConfig | AutoEncoderConfig
Layout = Literal["official", "diffusers"]
Shapes = Mapping[str, tuple[int, ...]]

_TRANSFORMER = (  # official, diffusers; regular expressions, from top to bottom; in braces, what one is split into
    ("img_in.", "x_embedder."),
    ("txt_in.", "context_embedder."),
    ("time_in.", "time_text_embed.timestep_embedder."),
    ("guidance_in.", "time_text_embed.guidance_embedder."),
    ("vector_in.", "time_text_embed.text_embedder."),
    (".in_layer.", ".linear_1."),
    (".out_layer.", ".linear_2."),
    ("double_blocks.", "transformer_blocks."),
    (".img_mod.lin.", ".norm1.linear."),
    (".txt_mod.lin.", ".norm1_context.linear."),
    (".img_attn.qkv.", ".attn.{to_q,to_k,to_v}."),
    (".txt_attn.qkv.", ".attn.{add_q_proj,add_k_proj,add_v_proj}."),
    (r".img_attn.norm.(q|k)\w+.scale", r".attn.norm_\1.weight"),
    (r".txt_attn.norm.(q|k)\w+.scale", r".attn.norm_added_\1.weight"),
    (".img_attn.proj.", ".attn.to_out.0."),
    (".txt_attn.proj.", ".attn.to_add_out."),
    (".img_mlp.", ".ff.net."),
    (".txt_mlp.", ".ff_context.net."),
    (".net.0.", ".net.0.proj."),
    ("single_blocks.", "single_transformer_blocks."),
    (".modulation.lin.", ".norm.linear."),
    (".linear1.", ".{attn.to_q,attn.to_k,attn.to_v,proj_mlp}."),
    (r".norm.(q|k)\w+_norm.scale", r".attn.norm_\1.weight"),
    (".linear2.", ".proj_out."),
    ("final_layer.linear.", "proj_out."),
    ("final_layer.adaLN_modulation.1.", "norm_out.linear."),
)
_AUTOENCODER = (
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
    (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
    (".mid.attn_1.", ".mid_block.attentions.0.to_"),
    (".down.", ".down_blocks."),
    (".up.", ".up_blocks."),
    (".block.", ".resnets."),
    (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".norm_out.", ".conv_norm_out."),
)


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
        if self.squeezed:
            tensor = tensor.flatten(1)
        parts = tensor.split(self.rows) if self.rows else (tensor,)
        return dict(zip(self.diffusers, parts, strict=True))

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Diffusers to official."""
        tensor = torch.cat([tensors[name] for name in self.diffusers]) if self.rows else tensors[self.diffusers[0]]
        if self.swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if self.squeezed:
            tensor = tensor[:, :, None, None]
        return tensor


@cache
def rules(config: Config) -> tuple[Rule, ...]:
    """One rule for each tensor of the official checkpoint."""
    return tuple(_rule(name, shape, config) for name, shape in shapes(config).items())


def _rule(official: str, shape: tuple[int, ...], config: Config) -> Rule:
    name = official
    for ours, theirs in _TRANSFORMER if isinstance(config, FluxConfig) else _AUTOENCODER:
        name = re.sub(ours.replace(".", r"\."), theirs, name)
    if isinstance(config, AutoEncoderConfig):
        top = len(config.ch_mult) - 1  # the official way up is counted from full resolution, diffusers' from below
        name = re.sub(r"(?<=up_blocks\.)\d+", lambda level: str(top - int(level[0])), name)
        return Rule(official, (name,), squeezed=".attentions." in name and len(shape) == 4)
    before, *inside, after = re.split("[{}]", name) if "{" in name else (name, "", "")
    names = tuple(f"{before}{part}{after}" for part in inside[0].split(","))
    rows = (*(config.hidden_size,) * 3, config.mlp_hidden_dim)[: len(names)] if len(names) > 1 else ()
    return Rule(official, names, rows, swapped="adaLN" in official)


def to_diffusers(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Official tensors under diffusers' names; the values are the same, bit by bit."""
    return {name: part for rule in rules(config) for name, part in rule.split(tensors[rule.official]).items()}


def from_diffusers(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The way back."""
    return {rule.official: rule.join(tensors) for rule in rules(config)}


def translated(tensors: Tensors, config: Config, to: Layout) -> Tensors:
    """All tensors of the other layout, each made when it is read, with the memory of one.

    Raises:
        WeightsError: tensors that become one are of several dtypes.
    """
    if to == "diffusers":
        split = {name: rule for rule in rules(config) for name in rule.diffusers}
        entries = to_diffusers(tensors.entries, config)
        return Tensors(tensors.path, entries, lambda n: split[n].split(tensors[split[n].official])[n], tensors.metadata)
    joined = {rule.official: rule for rule in rules(config)}
    for name, rule in joined.items():
        if len({tensors.entries[part].dtype for part in rule.diffusers}) > 1:
            said = ", ".join(f"{part} ({tensors.entries[part].dtype})" for part in rule.diffusers)
            raise WeightsError(f"{tensors.path}: {said} become one tensor, {name}; give a dtype for all")
    entries = from_diffusers(tensors.entries, config)
    return Tensors(tensors.path, entries, lambda name: joined[name].join(tensors), tensors.metadata)


@cache
def shapes(config: Config, layout: Layout = "official") -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint."""
    with torch.device("meta"):
        tensors = (Flux(config) if isinstance(config, FluxConfig) else AutoEncoder(config)).state_dict()
    tensors = tensors if layout == "official" else to_diffusers(tensors, config)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
