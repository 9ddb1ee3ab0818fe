"""Models whose weights are elsewhere or of another kind: device and dtype are the pipeline's, asked of no weight."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fluxlab as fl

OPTIONS = {"num_steps": 2, "height": 64, "width": 64, "progress": False}


@pytest.fixture
def pipe(tiny):
    return replace(tiny, **{name: copy.deepcopy(getattr(tiny, name)) for name in ("model", "autoencoder", "text")})


@pytest.fixture(scope="module")
def usual(tiny):
    return tiny("a red ring", **OPTIONS)


def parts(pipe):
    return pipe.model, pipe.autoencoder, pipe.text.t5, pipe.text.clip


def test_offloaded_by_accelerate(pipe, usual):
    from accelerate import cpu_offload

    for part in parts(pipe):
        cpu_offload(part, execution_device="cpu")
    assert pipe.model.img_in.weight.is_meta
    assert pipe("a red ring", **OPTIONS).tobytes() == usual.tobytes()


def test_offloaded_to_disk_by_accelerate(pipe, usual, tmp_path):
    from accelerate import disk_offload

    for i, part in enumerate(parts(pipe)):
        disk_offload(part, str(tmp_path / str(i)), execution_device="cpu")
    assert pipe("a red ring", **OPTIONS).tobytes() == usual.tobytes()


class Eight(nn.Module):
    """A Linear whose weight is int8, as bitsandbytes and others keep it."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x) * self.scale.to(x), self.bias)


def test_weights_in_int8(pipe, usual):
    for module in list(pipe.model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Eight(child))
    assert pipe.model.img_in.weight.dtype is torch.int8
    off = np.asarray(pipe("a red ring", **OPTIONS)).astype(int) - np.asarray(usual)
    assert 0 < abs(off).mean() < 8


def test_diffusers_layerwise_casting(pipe, usual):
    from diffusers.hooks import apply_layerwise_casting

    for part in (pipe.model, pipe.autoencoder):
        apply_layerwise_casting(part, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipe.model.img_in.weight.dtype is torch.float8_e4m3fn
    off = np.asarray(pipe("a red ring", **OPTIONS)).astype(int) - np.asarray(usual)
    assert 0 < abs(off).mean() < 16


def test_a_pipeline_made_by_hand_has_its_place(pipe):
    made = fl.Pipeline(pipe.variant, pipe.model, pipe.autoencoder, pipe.text)
    assert (made.device, made.dtype) == ("cpu", torch.float32)
