"""Models whose weights are elsewhere or of another kind: device and dtype are the pipeline's, asked of no weight."""

import copy
from dataclasses import replace
from functools import partial

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


def replace_linears(model, made):
    """Each Linear by what ``made`` gives, with the Linear's weights quantized."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                other = made(child.in_features, child.out_features, bias=child.bias is not None)
                other.load_state_dict(child.state_dict())
                setattr(module, name, other.to("cpu"))


def bitsandbytes_int8(model):
    from bitsandbytes.nn import Linear8bitLt

    replace_linears(model, partial(Linear8bitLt, has_fp16_weights=False))
    assert model.img_in.weight.dtype is torch.int8


def bitsandbytes_nf4(model):
    from bitsandbytes.nn import Linear4bit

    replace_linears(model, partial(Linear4bit, quant_type="nf4", compute_dtype=torch.float32))
    assert model.img_in.weight.dtype is torch.uint8


def torchao_int8(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def diffusers_layerwise_casting(model):
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.img_in.weight.dtype is torch.float8_e4m3fn


def diffusers_group_offloading(model):
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(
        model, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )


def peft_lora(model):
    """A new adapter changes nothing: its second matrix is zero."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["qkv", "linear1"]), model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("put_on", "least", "most"),
    [
        (bitsandbytes_int8, 0.01, 8),
        (bitsandbytes_nf4, 1, 40),
        (torchao_int8, 0.01, 8),
        (diffusers_layerwise_casting, 0.01, 16),
        (diffusers_group_offloading, 0, 0.1),
        (peft_lora, 0, 0.1),
    ],
)
def test_what_people_put_on_a_model(pipe, usual, put_on, least, most):
    """Mean difference of the pictures, of 255: 1.4 with int8, 21 with nf4, whose 4 bits are coarse for this model."""
    put_on(pipe.model)
    off = np.asarray(pipe("a red ring", **OPTIONS)).astype(int) - np.asarray(usual)
    assert least <= abs(off).mean() <= most


def test_a_pipeline_made_by_hand_has_its_place(pipe):
    made = fl.Pipeline(pipe.variant, pipe.model, pipe.autoencoder, pipe.text)
    assert (made.device, made.dtype) == ("cpu", torch.float32)
