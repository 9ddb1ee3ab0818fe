"""The models that FLUX is set beside, from their published configs, and what their weights are for.

Opened in chapter 12. Everything is built on the meta device: modules and shapes, no weights.
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from fluxlab.config import variant
from fluxlab.extras import importing
from fluxlab.inspect.tables import parameters_by
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.flux2 import Flux2
from fluxlab.model.transformer import Flux, build
from fluxlab.pipeline.text import text_encoders

KINDS = ("convolution", "attention", "MLP", "modulation", "the rest")


def other(name: str) -> nn.Module:
    """One of ``OTHERS``, else a ``ValueError``, on the meta device; UNets and SD3's are diffusers' classes."""
    if name not in OTHERS:
        raise ValueError(f"name is {name!r}; it is one of {', '.join(OTHERS)}")
    with torch.device("meta"):
        return OTHERS[name]()


def kinds(module: nn.Module) -> dict[str, int]:
    """Parameters of a model by what they are for, told by the names and types of the modules that own them.

    Modulation is what brings the time into a layer: AdaLN's linears, and in a UNet the linears that give each
    residual block its share of the time embedding. QK-norm counts as attention. The rest are embeddings, the ways in
    and out, and norms.
    """
    if isinstance(module, Flux | Flux2):
        counts = parameters_by(module.config, "kind")
        counts += Counter({"attention": counts["QK-norm"], "the rest": counts["input and output"]})
    else:
        counts = Counter[str]()
        for name, weight in module.named_parameters():
            counts[_kind(f".{name}", module.get_submodule(name.rpartition(".")[0]))] += weight.numel()
    return {kind: counts[kind] for kind in KINDS}


def _kind(name: str, owner: nn.Module) -> str:
    if re.search(r"\.(time_emb_proj|norm\w*\.linear)\.", name):
        return "modulation"
    if re.search(r"\.(ff|ff_context|mlp|DenseReluDense)\.", name):
        return "MLP"
    if re.search(r"\.(attn|attn1|attn2|attn_1|self_attn|SelfAttention)\.", name):
        return "attention"
    way_in_or_out = re.search(r"\.(proj_in|proj_out|pos_embed)\.", name)  # a Conv2d in some, a Linear in others
    return "convolution" if isinstance(owner, nn.Conv2d) and not way_in_or_out else "the rest"


def _of(library: str, kind: str, **options: Any) -> Any:
    with importing():
        made = getattr(import_module(library), kind)
    return made(**options)


def _sd3(layers: int, caption: int, positions: int, **options: Any) -> Any:
    options |= {"num_layers": layers, "num_attention_heads": layers}  # one head of 64 for each layer
    options |= {"caption_projection_dim": caption, "pos_embed_max_size": positions}
    return _of("diffusers", "SD3Transformer2DModel", **options)


_unet = partial(_of, "diffusers", "UNet2DConditionModel")

OTHERS: dict[str, Callable[[], nn.Module]] = {
    "Llama 7B": lambda: _of("transformers", "LlamaForCausalLM", config=_of("transformers", "LlamaConfig")),
    "SD 1.5": lambda: _unet(cross_attention_dim=768, attention_head_dim=8),
    "SD 2.1": lambda: _unet(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True),
    "SDXL": lambda: _unet(
        cross_attention_dim=2048,
        attention_head_dim=[5, 10, 20],
        block_out_channels=[320, 640, 1280],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 2, 10],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "SD3-medium": lambda: _sd3(24, 1536, 192),
    "SD3.5-medium": lambda: _sd3(24, 1536, 384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
    "SD3.5-large": lambda: _sd3(38, 2432, 192, qk_norm="rms_norm"),
    "FLUX.1 dev": lambda: build("flux-dev", device="meta"),
    "FLUX.1 schnell": lambda: build("flux-schnell", device="meta"),
    "T5-XXL encoder": lambda: text_encoders(variant("flux-dev"))[0],
    "CLIP-L text": lambda: text_encoders(variant("flux-dev"))[1],
    "FLUX.1 VAE": lambda: AutoEncoder(variant("flux-dev").autoencoder),
}
