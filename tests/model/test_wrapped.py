"""A model may be offloaded, quantized, wrapped or cast by the tools that people use: it asks nothing of its weights.

Each tool is put on ours and on diffusers' model of the same weights, which it was written for.
"""

import copy
import warnings

import pytest
import torch
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting

import fluxlab as fl
from fluxlab.weights.layouts import to_diffusers
from tests.helpers import SMALL, randomise, small_inputs
from tests.model.test_against_diffusers import diffusers_transformer


def linears(module):
    """Every Linear with its parent and its name there; those around the blocks are left as they are, as is usual."""
    for path, part in list(module.named_modules()):
        if isinstance(part, torch.nn.Linear) and "blocks" in path:
            yield module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], part


def with_bitsandbytes(module, make):
    for parent, name, linear in linears(module):
        new = make(linear)
        new.load_state_dict(linear.state_dict())
        setattr(parent, name, new.to("cpu"))
    return module


def offloaded(module, _):
    import accelerate

    accelerate.cpu_offload(module, execution_device="cpu")


def on_disk(module, folder):
    import accelerate

    accelerate.disk_offload(module, str(folder / type(module).__name__), execution_device="cpu")


def cast(module, _):
    apply_layerwise_casting(module, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def by_group(module, _):
    cpu = torch.device("cpu")
    apply_group_offloading(module, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def int8(module, _):
    import bitsandbytes

    def make(linear):
        has_bias = linear.bias is not None
        return bitsandbytes.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=has_bias, has_fp16_weights=False
        )

    with_bitsandbytes(module, make)


def nf4(module, _):
    import bitsandbytes

    def make(linear):
        return bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.float32,
            quant_type="nf4",
        )

    with_bitsandbytes(module, make)


def torchao_int8(module, _):
    torchao = pytest.importorskip("torchao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao.quantize_(module, torchao.Int8WeightOnlyConfig())


def lora(module, _):
    from peft import LoraConfig, inject_adapter_in_model

    targets = [path for path, part in module.named_modules() if isinstance(part, torch.nn.Linear) and "blocks" in path]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), module)


TOOLS = {  # and how far the result may be from the plain one, of its size
    "accelerate, offloaded to the CPU": (offloaded, 1e-6),
    "accelerate, offloaded to the disk": (on_disk, 1e-6),
    "diffusers, cast layer by layer": (cast, 0.15),
    "diffusers, offloaded by group": (by_group, 1e-6),
    "bitsandbytes, int8": (int8, 0.1),
    "bitsandbytes, nf4": (nf4, 0.4),
    "torchao, int8 weights": (torchao_int8, 0.05),
    "PEFT, a LoRA that starts at zero": (lora, 1e-6),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_model_works_with_the_tools_that_people_use(tool, tmp_path):
    use, within = TOOLS[tool]
    ours = randomise(fl.Flux(SMALL))
    theirs = diffusers_transformer(SMALL, torch.float32)
    theirs.load_state_dict(to_diffusers(ours.state_dict(), SMALL))
    inputs = small_inputs(2)
    img, ids, txt, txt_ids, t, y, guidance = inputs.values()

    def far(module, call):
        """How far what the module gives is moved by the tool."""
        plain = call(module)
        changed = copy.deepcopy(module)
        use(changed, tmp_path)
        return ((call(changed) - plain).norm() / plain.norm()).item()

    with torch.no_grad():
        of_ours = far(ours, lambda model: model(**inputs))
        of_theirs = far(theirs, lambda model: model(img, txt, y, t, ids[0], txt_ids[0], guidance).sample)
    assert of_ours <= within
    assert of_ours <= 2 * of_theirs + 1e-6  # no worse for it than the model that the tool was written for
    if within > 1e-3:
        assert of_ours > 1e-5  # it did change the weights


@pytest.mark.parametrize("tool", ["accelerate, offloaded to the CPU", "PEFT, a LoRA that starts at zero"])
def test_looking_works_through_the_tools(tool, tmp_path):
    names = ["double_blocks.1.img_attn.proj", "single_blocks.2.attention", "vec"]
    plain = randomise(fl.Flux(SMALL))
    wrapped = copy.deepcopy(plain)
    TOOLS[tool][0](wrapped, tmp_path)
    with torch.no_grad():
        with fl.capture(plain, names) as expected:
            plain(**small_inputs())
        with fl.capture(wrapped, names) as tape:
            wrapped(**small_inputs())
    for name in names:
        torch.testing.assert_close(tape[name], expected[name])
