"""Counts of the models that FLUX is set beside, from their published configs, on the meta device."""

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def redux():
    return nn.Sequential(nn.Linear(1152, 12288), nn.SiLU(), nn.Linear(12288, 4096))


def llama_7b():
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32000, **sizes))


def sd15():
    return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)


def sd21():
    heads = [5, 10, 20, 20]
    return UNet2DConditionModel(cross_attention_dim=1024, attention_head_dim=heads, use_linear_projection=True)


def sdxl():
    return UNet2DConditionModel(
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
    )


def sd3(layers, caption, positions, **options):
    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=layers,
        num_attention_heads=layers,
        attention_head_dim=64,
        caption_projection_dim=caption,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=positions,
        **options,
    )


COUNTS = {
    "Redux": (redux, 64_503_808),
    "Llama 7B": (llama_7b, 6_738_415_616),
    "SD 1.5": (sd15, 859_520_964),
    "SD 2.1": (sd21, 865_910_724),
    "SDXL": (sdxl, 2_567_463_684),
    "SD3-medium": (lambda: sd3(24, 1536, 192), 2_028_328_000),
    "SD3.5-medium": (
        lambda: sd3(24, 1536, 384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
        2_243_171_520,
    ),
    "SD3.5-large": (lambda: sd3(38, 2432, 192, qk_norm="rms_norm"), 8_056_627_520),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_model_has_the_published_number_of_parameters(name):
    make, count = COUNTS[name]
    with torch.device("meta"):
        model = make()
    assert sum(p.numel() for p in model.parameters()) == count
