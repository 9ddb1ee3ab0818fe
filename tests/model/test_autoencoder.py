"""The VAE's attention: which kernel it takes, and how much memory."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch.profiler import ProfilerActivity, profile

from fluxlab.model.autoencoder import AttnBlock


def profiled(module, x):
    """Names of the operators that ran, and bytes allocated at the worst moment."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        module(x)
    now = peak = 0
    for event in run.profiler.kineto_results.events():
        now += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, now)
    return {event.key for event in run.key_averages()}, peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_takes_the_fast_kernel_and_little_more_memory_than_diffusers(dtype):
    """The slow kernel's memory grows with the square of the cells: 2,304 of them have 5 million pairs."""
    c, x = 64, torch.randn(1, 64, 48, 48, dtype=dtype)
    options = {"norm_num_groups": 32, "residual_connection": True, "bias": True, "_from_deprecated_attn_block": True}
    theirs = Attention(c, heads=1, dim_head=c, eps=1e-6, **options).to(dtype)
    names, ours = profiled(AttnBlock(c, 32).to(dtype), x)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_attention_math" not in names
    assert 6 * x.nbytes < ours <= 1.2 * profiled(theirs, x)[1]
