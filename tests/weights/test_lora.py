"""LoRA files of every dialect, beside diffusers' loading of the same file and formulas: apart, merged, taken off."""

import copy
import json
import pickle
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_bfl_flux_control_lora_to_diffusers as bfl_to_diffusers,
)
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import fluxlab as fl
from fluxlab.cli import app
from fluxlab.files import write_tensors
from fluxlab.weights.convert import diffusers_config
from fluxlab.weights.dialects import read_lora
from fluxlab.weights.find import data_folder
from fluxlab.weights.layouts import rules, to_diffusers
from fluxlab.weights.lora import Lora
from tests.helpers import SMALL, randomise, small_inputs

WIDE = fl.FluxConfig(depth=1, depth_single_blocks=1)
CANNY = data_folder() / "flux-tiny/flux-tiny-canny-dev-lora.safetensors"
LAYERS = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.1.txt_mlp.0",
    "single_blocks.2.linear1",
    "single_blocks.0.linear2",
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / shape[-1] ** 0.5


def factors(model, layer, rank=4, seed=0):
    linear = model.get_submodule(layer)
    return draw(rank, linear.in_features, seed=seed), draw(linear.out_features, rank, seed=seed + 1)


def official(model, layers=LAYERS, prefix="", down="lora_A", up="lora_B", rank=4, seed=0, **more):
    """A file's tensors, and what they add to each weight."""
    tensors, added = {}, {}
    for layer in layers:
        a, b = factors(model, layer, rank, seed)
        tensors |= {f"{prefix}{layer}.{down}.weight": a, f"{prefix}{layer}.{up}.weight": b}
        tensors |= {f"{prefix}{layer}.{name}": torch.tensor(value) for name, value in more.items()}
        added[layer] = b @ a * (more.get("alpha", rank) / rank)
    return tensors, added


def merged_by_hand(model, added, strength=1.0):
    other = type(model)(model.config)
    changed = {f"{layer}.weight": strength * delta for layer, delta in added.items()}
    other.load_state_dict({name: tensor + changed.get(name, 0) for name, tensor in model.state_dict().items()})
    return other.eval()


def out(model, inputs=None):
    with torch.no_grad():
        return model(**(inputs or small_inputs()))


@pytest.fixture
def model():
    return randomise(fl.Flux(SMALL))


def underscored(tensors, start):
    """As kohya names a layer."""
    layers = {name: re.split(r"\.(?=lora_|alpha)", name)[0] for name in tensors}
    return {start + name.replace(".", "_", layers[name].count(".")): tensor for name, tensor in tensors.items()}


DIALECTS = {
    "official names": (official, {}, ""),
    "ai-toolkit": (official, {"prefix": "diffusion_model."}, ""),
    "PEFT's prefix": (official, {"prefix": "base_model.model.", "alpha": 2.0}, ""),
    "kohya": (official, {"down": "lora_down", "up": "lora_up", "alpha": 2.0}, "lora_unet_"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dialect_adds_what_merging_by_hand_adds(tmp_path, model, dialect):
    write, options, start = DIALECTS[dialect]
    tensors, added = write(model, **options)
    write_tensors(underscored(tensors, start) if start else tensors, tmp_path / "x.safetensors")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = out(model)
    expected, weaker = (out(merged_by_hand(model, added, strength)) for strength in (0.7, 0.2))
    lora = Lora({"transformer": model}, {tmp_path / "x.safetensors": 0.7})
    assert (out(model) - base).norm() > 0.01 * base.norm()
    torch.testing.assert_close(out(model), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    lora.merge()
    torch.testing.assert_close(out(model), expected, rtol=1e-4, atol=1e-5)
    lora.set_strength(tmp_path / "x.safetensors", 0.2)
    torch.testing.assert_close(out(model), weaker, rtol=1e-4, atol=1e-5)
    lora.undo()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(out(model), base)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.fixture(scope="module")
def peft_file(tmp_path_factory):
    """Written by diffusers, of a LoRA on every Linear of its transformer, with an alpha that is not its rank."""
    folder = tmp_path_factory.mktemp("peft")
    model = randomise(fl.Flux(SMALL))
    theirs = FluxTransformer2DModel.from_config(diffusers_config(SMALL))
    theirs.load_state_dict(to_diffusers(model.state_dict(), SMALL))
    linears = [name for name, module in theirs.named_modules() if isinstance(module, nn.Linear)]
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=linears, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(draw(*parameter.shape))
    FluxPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(theirs),
        transformer_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
    )
    inputs = small_inputs()
    given = [inputs[name] for name in ("img", "txt", "y", "timesteps")]
    with torch.no_grad():
        expected = theirs(*given, inputs["img_ids"][0], inputs["txt_ids"][0], inputs["guidance"]).sample
    return folder / "pytorch_lora_weights.safetensors", expected


@pytest.mark.parametrize("merged", [False, True])
def test_a_file_that_diffusers_wrote_gives_its_output(peft_file, model, merged):
    file, expected = peft_file
    lora = Lora({"transformer": model}, {file: 1})
    if merged:
        lora.merge()
    assert ((out(model) - expected).norm() / expected.norm()) < 1e-5
    lora.undo()


def test_diffusers_names_after_every_prefix(peft_file, tmp_path, model):
    """Underscored too, as OneTrainer writes them; the alpha is in the file there."""
    file, expected = peft_file
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in fl.files.read_tensors(file).items()}
    alphas = {name.replace("lora_A.weight", "alpha"): torch.tensor(8.0) for name in tensors if "lora_A" in name}
    words = {"lora_A": "lora_down", "lora_B": "lora_up"}
    renamed = underscored(tensors | alphas, "lora_transformer_")
    for theirs, kohya in words.items():
        renamed = {name.replace(theirs, kohya): tensor for name, tensor in renamed.items()}
    for each in (tensors | alphas, renamed):
        write_tensors(each, tmp_path / "x.safetensors")
        with Lora({"transformer": model}, {tmp_path / "x.safetensors": 1}):
            assert ((out(model) - expected).norm() / expected.norm()) < 1e-5


def wide_pair():
    """Ours and theirs, of full width and a block of each kind: what diffusers' converters ask for."""
    torch.manual_seed(0)
    ours = fl.Flux(WIDE).eval().requires_grad_(False)
    with torch.device("meta"):
        theirs = FluxTransformer2DModel.from_config(diffusers_config(WIDE))
    theirs.load_state_dict(to_diffusers(ours.state_dict(), WIDE), assign=True)
    return ours, theirs.eval()


def xlabs(model, rank=2):
    """Beside a list of what it adds: rows of linear1 are qkv."""
    tensors, added, hidden = {}, {}, model.config.hidden_size
    words = {
        "double_blocks.0.": {"qkv_lora1": "img_attn.qkv", "qkv_lora2": "txt_attn.qkv"}
        | {"proj_lora1": "img_attn.proj", "proj_lora2": "txt_attn.proj"},
        "single_blocks.0.": {"qkv_lora": "linear1", "proj_lora": "linear2"},
    }
    for block, names in words.items():
        for theirs, own in names.items():
            a, b = factors(model, block + own, rank)
            b = b[: 3 * hidden] if own == "linear1" else b
            tensors |= {f"{block}processor.{theirs}.down.weight": a, f"{block}processor.{theirs}.up.weight": b}
            added[block + own] = nn.functional.pad(
                b @ a, (0, 0, 0, model.get_submodule(block + own).out_features - len(b))
            )
    return tensors, added


def test_kohya_and_xlabs_at_full_width_give_diffusers_output(tmp_path):
    ours, theirs = wide_pair()
    inputs = fl.example_inputs("flux-dev", 32, 32)
    inputs.txt, inputs.txt_ids = inputs.txt[:, :3], inputs.txt_ids[:, :3]
    k = inputs.kwargs()
    given = (k["img"], k["txt"], k["y"], k["timesteps"], k["img_ids"][0], k["txt_ids"][0], k["guidance"])
    doubles, singles = (
        ("img_attn.qkv", "txt_attn.proj", "img_mlp.0", "txt_mod.lin"),
        ("linear1", "linear2", "modulation.lin"),
    )
    layers = [f"double_blocks.0.{name}" for name in doubles] + [f"single_blocks.0.{name}" for name in singles]
    kohya, _ = official(ours, layers, down="lora_down", up="lora_up", rank=2, alpha=1.0)
    base = out(ours, k)
    for tensors in (underscored(kohya, "lora_unet_"), xlabs(ours)[0]):
        write_tensors(tensors, tmp_path / "x.safetensors")
        with warnings.catch_warnings(action="ignore"):
            converted = FluxPipeline.lora_state_dict(str(tmp_path), weight_name="x.safetensors")
            theirs.load_lora_adapter(converted, prefix="transformer")
        with torch.no_grad():
            expected = theirs(*given).sample
        theirs.delete_adapters("default_0")
        with Lora({"transformer": ours}, {tmp_path / "x.safetensors": 1}):
            found = out(ours, k)
        assert (found - base).norm() / base.norm() > 1e-3
        assert (found - expected).norm() / expected.norm() < 1e-5


def test_xlabs_is_what_its_names_say(tmp_path, model):
    tensors, added = xlabs(model)
    write_tensors(tensors, tmp_path / "x.safetensors")
    with Lora({"transformer": model}, {tmp_path / "x.safetensors": 1.5}):
        torch.testing.assert_close(out(model), out(merged_by_hand(model, added, 1.5)), rtol=1e-4, atol=1e-5)


def bfl(model, rank=3, columns=128):
    """On every Linear, with biases; norms replaced; img_in wider."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            inside = columns if name == "img_in" else module.in_features
            tensors |= {
                f"{name}.lora_A.weight": draw(rank, inside),
                f"{name}.lora_B.weight": draw(module.out_features, rank),
            }
            tensors[f"{name}.lora_B.bias"] = draw(module.out_features)
        if name.endswith("_norm") and hasattr(module, "scale"):
            tensors[f"{name}.scale"] = 1 + draw(*module.scale.shape)
    return tensors


def published(model, tensors, strength):
    """In a model of its own: base(x) + (up(down(x)) + bias) * strength; scales loaded as they are."""
    wide = fl.Flux(replace(model.config, in_channels=128)).eval()
    state = model.state_dict()
    state["img_in.weight"] = torch.cat((state["img_in.weight"], torch.zeros(len(state["img_in.weight"]), 64)), dim=1)
    wide.load_state_dict(state | {name: tensor for name, tensor in tensors.items() if name.endswith("scale")})
    for name, module in wide.named_modules():
        if isinstance(module, nn.Linear):
            a, b, bias = (tensors[f"{name}.lora_{end}"] for end in ("A.weight", "B.weight", "B.bias"))
            module.register_forward_hook(
                lambda _, args, base, a=a, b=b, bias=bias: base + (args[0] @ a.T @ b.T + bias) * strength
            )
    return wide


def test_norms_are_replaced_by_one_file_alone(tmp_path, model):
    for name in ("a", "b"):
        write_tensors(bfl(model), tmp_path / name)
    with pytest.raises(fl.WeightsError, match="b: replaces the scales of norms, as another of the files does; give"):
        Lora({"transformer": model}, {tmp_path / "a": 1, tmp_path / "b": 1})
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("merged", [False, True])
def test_bfls_own_is_its_published_formula(tmp_path, model, merged):
    tensors = bfl(model)
    write_tensors(tensors, tmp_path / "x.safetensors")
    inputs = small_inputs(img=draw(1, 12, 128))
    base = out(model)
    expected = out(published(model, tensors, 0.85), inputs)
    with Lora({"transformer": model}, {tmp_path / "x.safetensors": 0.85}) as lora:
        if merged:
            lora.merge()
        torch.testing.assert_close(out(model, inputs), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=r"img has shape \(1, 12, 64\); .* takes \(1, 12, 128\)"):
            out(model)  # it is shown more now
    assert torch.equal(out(model), base)
    assert model.config == SMALL


def test_bfls_names_at_full_depth_are_diffusers(tmp_path):
    """Rank 4, of all 19 + 38 blocks: each matrix is what diffusers' converter makes of the same names.

    But one: it swaps the halves of the last layer's down matrix as well, which are no shift and scale but ranks.
    """
    canny = fl.build("flux-canny-dev", device="meta")
    tensors = bfl(canny, rank=4)
    write_tensors(tensors, tmp_path / "x.safetensors")
    changes, scales = read_lora(tmp_path / "x.safetensors", {"transformer": canny})
    theirs = bfl_to_diffusers(dict(tensors))
    by_layer = {change.layer: change for change in changes}
    assert len(scales) == 2 * (2 * 19 + 38)
    compared = set()
    for rule in rules(canny.config):
        layer, _, kind = rule.official.rpartition(".")
        module = canny.get_submodule(layer)
        if kind == "scale":
            (name,) = rule.diffusers
            assert torch.equal(scales[module], theirs["transformer." + name])
            compared.add("transformer." + name)
        elif kind == "weight":
            change = by_layer[module]
            for role, ours in (("lora_B.weight", change.up), ("lora_B.bias", change.bias)):
                for name, part in rule.split(ours).items():
                    full = f"transformer.{name.removesuffix('weight')}{role}"
                    assert torch.equal(part, theirs[full]), full
                    down = torch.cat(change.down.chunk(2)[::-1]) if rule.swapped else change.down
                    assert torch.equal(down, theirs[full.replace(role, "lora_A.weight")])
                    compared |= {full, full.replace(role, "lora_A.weight")}
    assert compared == set(theirs)


def test_text_encoders_are_changed_too(tmp_path, tiny):
    modules = {"transformer": tiny.model, "clip": tiny.text.clip, "t5": tiny.text.t5}
    layers = {
        "clip": ("encoder.layers.0.self_attn.q_proj", "text_encoder.text_model.", "lora_te1_text_model_"),
        "t5": ("encoder.block.1.layer.1.DenseReluDense.wo", "text_encoder_2.", "lora_te3_"),
    }
    for dotted in (True, False):
        tensors, expected = {}, {}
        for part, (layer, long, short) in layers.items():
            a, b = factors(modules[part], layer)
            start = f"{long}{layer}" if dotted else short + layer.replace(".", "_")
            words = ("lora_A", "lora_B") if dotted else ("lora_down", "lora_up")
            tensors |= {f"{start}.{words[0]}.weight": a, f"{start}.{words[1]}.weight": b}
            expected[part] = modules[part].get_submodule(layer).weight.detach() + b @ a
        write_tensors(tensors, tmp_path / "x.safetensors")
        usual = tiny.text(["a red ring"])
        with tiny.add_lora({tmp_path / "x.safetensors": 1}) as lora:
            apart = tiny.text(["a red ring"])
            lora.merge()
            for part, (layer, *_) in layers.items():
                torch.testing.assert_close(modules[part].get_submodule(layer).weight, expected[part])
            for before, one, other in zip(usual, apart, tiny.text(["a red ring"]), strict=True):
                assert not torch.allclose(before, one, rtol=1e-3)
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        assert all(map(torch.equal, tiny.text(["a red ring"]), usual))


def test_several_at_once(tmp_path, model):
    total = {}
    for number, strength in ((1, 0.5), (2, -1.0)):
        tensors, added = official(model, LAYERS[: number + 1], seed=number)
        write_tensors(tensors, tmp_path / f"{number}.safetensors")
        total = {layer: total.get(layer, 0) + strength * delta for layer, delta in added.items()} | {
            layer: delta for layer, delta in total.items() if layer not in added
        }
    files = {tmp_path / "1.safetensors": 0.5, tmp_path / "2.safetensors": -1}
    expected = out(merged_by_hand(model, total))
    with Lora({"transformer": model}, files) as lora:
        torch.testing.assert_close(out(model), expected, rtol=1e-4, atol=1e-5)
        lora.merge()
        torch.testing.assert_close(out(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("as_users_run_it")
def test_it_is_seen_compiled_and_kept_small(tmp_path, model):
    """A capture sees the sum; a compiled model computes it; and so does one whose layers come and go."""
    tensors, added = official(model)
    write_tensors(tensors, tmp_path / "x.safetensors")
    write_tensors(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        small = fl.Flux(SMALL)
    fl.load_weights(small, tmp_path / "model.safetensors", low_memory=True)
    expected = merged_by_hand(model, added)
    for each in (model, small):
        with Lora({"transformer": each}, {tmp_path / "x.safetensors": 1}) as lora:
            with fl.capture(each, LAYERS[0]) as tape:
                found = out(each)
            torch.testing.assert_close(found, out(expected), rtol=1e-4, atol=1e-5)
            with fl.capture(expected, LAYERS[0]) as other:
                out(expected)
            torch.testing.assert_close(tape[LAYERS[0]], other[LAYERS[0]], rtol=1e-4, atol=1e-5)
            if each is small:
                with pytest.raises(
                    fl.WeightsError, match=r"a weight is a Parameter, torch.float32 on meta, .*; keep the LoRA apart"
                ):
                    lora.merge()
                torch.testing.assert_close(out(each), out(expected), rtol=1e-4, atol=1e-5)
    with Lora({"transformer": model}, {tmp_path / "x.safetensors": 1}):
        torch.testing.assert_close(out(torch.compile(model, backend="eager")), out(expected), rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_what_was_merged_comes_off_in_the_dtype_that_the_model_has_now(tmp_path, model):
    write_tensors(official(model)[0], tmp_path / "x.safetensors")
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    lora = Lora({"transformer": model}, {tmp_path / "x.safetensors": 1})
    lora.merge()
    model.to(torch.bfloat16)
    lora.undo()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in narrow.state_dict().items())


def test_two_are_taken_off_in_any_order_apart_and_in_their_own_merged(tmp_path, model):
    for number in (1, 2):
        write_tensors(official(model, seed=number)[0], tmp_path / f"{number}.safetensors")
    base = out(model)
    alone = []
    for number in (1, 2):
        with Lora({"transformer": model}, {tmp_path / f"{number}.safetensors": 1}):
            alone.append(out(model))
    first, second = (Lora({"transformer": model}, {tmp_path / f"{number}.safetensors": 1}) for number in (1, 2))
    first.undo()
    torch.testing.assert_close(out(model), alone[1], rtol=1e-4, atol=1e-5)
    second.undo()
    assert torch.equal(out(model), base)
    first, second = (Lora({"transformer": model}, {tmp_path / f"{number}.safetensors": 1}) for number in (1, 2))
    first.merge()
    second.merge()
    with pytest.raises(
        ValueError, match="weights were changed after this LoRA was merged; take off first what was put"
    ):
        first.undo()
    second.undo()
    torch.testing.assert_close(out(model), alone[0], rtol=1e-4, atol=1e-5)
    first.undo()
    assert torch.equal(out(model), base)


def test_a_copy_of_the_model_is_another_model(tmp_path, model):
    """It has the LoRA as it was, and weights of its own."""
    write_tensors(official(model)[0], tmp_path / "x.safetensors")
    base = out(model)
    lora = Lora({"transformer": model}, {tmp_path / "x.safetensors": 1})
    copied, changed = copy.deepcopy(model), out(model)
    assert torch.equal(out(copied), changed)
    with torch.no_grad():
        copied.get_submodule(LAYERS[0]).weight.zero_()
    assert not torch.equal(out(copied), changed)
    assert torch.equal(out(model), changed)
    lora.undo()
    assert torch.equal(out(model), base)


def test_only_an_img_in_of_noise_alone_grows(tmp_path):
    """Fill's is wider already; of diffusers' names too."""
    for name in ("img_in", "transformer.x_embedder"):
        for columns, refused in ((64, False), (128, False), (384, True)):
            config = replace(SMALL, in_channels=columns)
            model = randomise(fl.Flux(config))
            write_tensors({f"{name}.lora_A.weight": draw(4, 128), f"{name}.lora_B.weight": draw(64, 4)}, tmp_path / "x")
            if refused:
                with pytest.raises(fl.WeightsError, match=r"down \[4, 128\].* where down \[rank, 384\]"):
                    Lora({"transformer": model}, {tmp_path / "x": 1})
                continue
            with Lora({"transformer": model}, {tmp_path / "x": 1}) as lora:
                apart = out(model, small_inputs(img=draw(1, 12, 128)))
                lora.merge()
                torch.testing.assert_close(out(model, small_inputs(img=draw(1, 12, 128))), apart, rtol=1e-4, atol=1e-5)
            assert model.config == config


def test_what_is_said_twice_is_refused(tmp_path, model):
    tensors, _ = official(model, ["img_in"])
    for other in ("img_in.lora_down.weight", "diffusion_model.img_in.lora_A.weight"):
        more = {other: tensors["img_in.lora_A.weight"]}
        if other.startswith("diff"):
            more["diffusion_model.img_in.lora_B.weight"] = tensors["img_in.lora_B.weight"]
        write_tensors(tensors | more, tmp_path / "x")
        with pytest.raises(fl.WeightsError, match=r"are both the down of one layer|are the same layer"):
            Lora({"transformer": model}, {tmp_path / "x": 1})
    write_tensors(tensors, tmp_path / "x")
    with pytest.raises(ValueError, match="give each file once, with its strength"):
        Lora({"transformer": model}, {str(tmp_path / "x"): 1, tmp_path / "x": 0.25})


def test_one_at_a_time_widens(tmp_path, model):
    for name in ("a", "b"):
        tensors = {each: tensor for each, tensor in bfl(model).items() if not each.endswith("scale")}
        write_tensors(tensors, tmp_path / name)
    with (
        Lora({"transformer": model}, {tmp_path / "a": 1}),
        pytest.raises(fl.WeightsError, match="b: another LoRA that is on widens img_in, as these do; take that off"),
    ):
        Lora({"transformer": model}, {tmp_path / "b": 1})
    with Lora({"transformer": model}, {tmp_path / "a": 1, tmp_path / "b": 1}) as both:
        assert model.config.in_channels == 128
        assert len(both.strengths) == 2
    assert model.config.in_channels == 64


def test_what_is_quantized_keeps_its_lora_apart(tiny, tmp_path):
    pipe = fl.load("flux-tiny-dev")
    tensors, _ = official(pipe.model, ["double_blocks.0.img_attn.qkv"])
    write_tensors(tensors, tmp_path / "x")
    lora = pipe.add_lora({tmp_path / "x": 1.0})
    with fl.speed.quantize(pipe):
        with pytest.raises(fl.WeightsError, match="keep the LoRA apart"):
            lora.merge()
        assert "forward" in vars(pipe.model.double_blocks[0].img_attn.qkv)


def test_a_lora_of_eight_bits_is_read(tmp_path, model):
    tensors, _ = official(model, ["img_in"])
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    write_tensors(eight, tmp_path / "x")
    write_tensors({name: tensor.float() for name, tensor in eight.items()}, tmp_path / "y")
    found = []
    for name in ("x", "y"):
        with Lora({"transformer": model}, {tmp_path / name: 1}):
            found.append(out(model))
    assert torch.equal(*found)


@pytest.mark.usefixtures("as_users_run_it")
def test_files_without_strengths_are_refused(model):
    for files in ("style.safetensors", ["style.safetensors"]):
        with pytest.raises(ValueError, match=r"files is .*style.*; give each file once, with its strength"):
            Lora({"transformer": model}, files)


def test_shapes_are_checked_before_any_value_is_read(tmp_path, model, monkeypatch):
    tensors, _ = official(model)
    last = list(tensors)[-1]
    write_tensors(tensors | {last: torch.ones(3, 3)}, tmp_path / "x")
    monkeypatch.setattr("fluxlab.weights.dialects.finite_weights", lambda *_: pytest.fail("a value was read"))
    with pytest.raises(fl.WeightsError, match="is it of another model"):
        Lora({"transformer": model}, {tmp_path / "x": 1})


def test_a_strength_that_cannot_be_set_is_not_kept(tmp_path, model):
    write_tensors(official(model)[0], tmp_path / "x")
    lora = Lora({"transformer": model}, {tmp_path / "x": 1})
    lora.merge()
    with torch.no_grad():
        layer = model.get_submodule(LAYERS[0])
        layer.weight = nn.Parameter(layer.weight.clone())
    with pytest.raises(ValueError, match="weights were changed after"):
        lora.set_strength(tmp_path / "x", 0.1)
    assert lora.strengths == {str(tmp_path / "x"): 1}
    other = Lora({"transformer": model}, {tmp_path / "x": 1})
    other.undo()
    with pytest.raises(ValueError, match=r"these LoRAs were taken off; merge\(\) puts them on again"):
        other.set_strength(tmp_path / "x", 0.1)


def test_a_pipeline_is_loaded_with_it(tmp_path, tiny):
    layer = "double_blocks.0.img_attn.qkv"
    tensors, _ = official(tiny.model, [layer, "single_blocks.3.linear2"])
    write_tensors(tensors, tmp_path / "x.safetensors")
    few = {"num_steps": 2, "progress": False}
    usual = np.asarray(tiny("a red ring", **few)).astype(int)
    pipe = fl.load("flux-tiny-dev", lora={tmp_path / "x.safetensors": 0.5})
    assert repr(pipe.lora) == f"Lora({tmp_path}/x.safetensors at 0.5: 2 layers, apart)"
    assert abs(np.asarray(pipe("a red ring", **few)).astype(int) - usual).max() > 3
    pipe.lora.undo()
    assert abs(np.asarray(pipe("a red ring", **few)).astype(int) - usual).max() <= 1
    result = CliRunner().invoke(app, ["which", str(tmp_path / "x.safetensors")])
    assert "x.safetensors: the LoRA in the BFL layout; float32 (4); " in result.output


A, B = "img_in.lora_A.weight", "img_in.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_in.dora_scale": torch.ones(64)}, r"holds DoRA \(img_in.dora_scale\); only plain LoRA is read"),
        ({"img_in.lora_magnitude_vector": torch.ones(64)}, "holds DoRA"),
        ({"img_in.diff": torch.ones(64, 64)}, "holds whole differences"),
        ({"img_in.diff_b": torch.ones(64)}, "holds whole differences"),
        ({"img_in.lokr_w1": torch.ones(4, 4)}, "holds LoKr"),
        ({"img_in.hada_w1_a": torch.ones(4, 4)}, "holds LoHa"),
        ({"img_in.lora_mid.weight": torch.ones(4, 4)}, "holds a middle matrix"),
        ({B: None}, "img_in has no up matrix"),
        ({A: None}, "img_in has no down matrix"),
        (
            {A: torch.ones(0, 64), B: torch.ones(64, 0)},
            r"img_in is down \[0, 64\], up \[64, 0\], where down \[rank, 64\]",
        ),
        ({A: torch.ones(3, 64)}, r"img_in is down \[3, 64\], up \[64, 4\], where"),
        ({A: torch.ones(4, 63)}, r"down \[4, 63\].*is it of another model"),
        ({B: torch.ones(65, 4)}, r"up \[65, 4\]"),
        ({A: torch.ones(4, 64, 1, 1)}, r"down \[4, 64, 1, 1\]"),
        ({A: torch.tensor(1.0)}, r"img_in is down \[\]"),
        ({"img_in.lora_B.bias": torch.ones(3)}, r"bias \[3\]"),
        ({A: torch.full((4, 64), float("nan"))}, "img_in.lora_A.weight has values that are not finite"),
        ({B: torch.full((64, 4), float("inf"))}, "img_in.lora_B.weight has values that are not finite"),
        ({"img_in.alpha": torch.tensor(0.0)}, "alpha of img_in is 0.0; it must be finite, and not 0"),
        ({"img_in.alpha": torch.tensor(float("nan"))}, "img_in.alpha has values that are not finite"),
        ({"img_in.alpha": torch.ones(2)}, "alpha of img_in is of shape"),
        (
            {"double_blocks.7.img_attn.qkv.lora_A.weight": torch.ones(4, 64)},
            "1 tensors fit nothing in transformer: d",
        ),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 64)}, "1 tensors fit nothing"),
        ({"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(3)}, "1 tensors fit nothing"),
        ({A: torch.ones(4, 64, dtype=torch.int64)}, "img_in.lora_A.weight is torch.int64, where floating"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(tmp_path, model, change, message):
    tensors, _ = official(model, ["img_in"])
    tensors = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    write_tensors(tensors, tmp_path / "x.safetensors")
    good, _ = official(model)
    write_tensors(good, tmp_path / "good.safetensors")
    base = out(model)
    with pytest.raises(fl.WeightsError, match=message):
        Lora({"transformer": model}, {tmp_path / "good.safetensors": 1, tmp_path / "x.safetensors": 1})
    assert torch.equal(out(model), base)


def test_a_model_or_a_pickle_is_no_lora(tmp_path, model):
    write_tensors(model.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(fl.WeightsError, match="this is no LoRA: "):
        Lora({"transformer": model}, {tmp_path / "x.safetensors": 1})
    torch.save(official(model)[0], tmp_path / "x.pt")
    with pytest.raises(fl.WeightsError, match="pickle, which can run code"):
        Lora({"transformer": model}, {tmp_path / "x.pt": 1})
    write_tensors(official(model)[0], tmp_path / "lora.safetensors")
    with pytest.raises(fl.WeightsError, match=r"this is the LoRA in the BFL layout.* where the transformer"):
        fl.load_weights(model, tmp_path / "lora.safetensors")
    for name in ("flux-tiny-dev", "flux-dev"):
        with pytest.raises(fl.WeightsError, match=r"this is the LoRA .*, which changes a model and is none; give"):
            fl.load(name, tmp_path / "lora.safetensors")


@pytest.mark.usefixtures("as_users_run_it")
def test_a_strength_is_a_number_of_one_of_the_files(tmp_path, model):
    file = tmp_path / "x.safetensors"
    write_tensors(official(model)[0], file)
    base = out(model)
    for strength in (float("nan"), float("inf"), np.float16("inf"), 10**400, "much", None):
        with pytest.raises(ValueError, match=r"strength of .*x.safetensors is .*; give a finite number"):
            Lora({"transformer": model}, {file: strength})
    with Lora({"transformer": model}, {file: 1}) as lora:
        with pytest.raises(ValueError, match="'other' is none of these LoRAs: "):
            lora.set_strength("other", 1)
        assert not torch.equal(out(model), base)
        lora.set_strength(file, 0)
        assert torch.equal(out(model), base)


def test_pefts_own_config_tells_the_alpha(tmp_path, model):
    tensors, added = official(model, ["img_in"])
    named = {f"transformer.x_embedder.{name.split('.', 1)[1]}": tensor for name, tensor in tensors.items()}
    for told, factor in (
        ({"transformer.lora_alpha": 2}, 0.5),
        ({"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"x_embedder": 12}}, 3),
        ({"transformer.lora_alpha": 2, "transformer.use_rslora": True}, 1),
    ):
        write_tensors(named, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(told)})
        with Lora({"transformer": model}, {tmp_path / "x.safetensors": 1}):
            torch.testing.assert_close(out(model), out(merged_by_hand(model, added, factor)), rtol=1e-4, atol=1e-5)
    write_tensors(named, tmp_path / "x.safetensors", {"lora_adapter_metadata": "[1"})
    with pytest.raises(fl.WeightsError, match="its PEFT config cannot be read"):
        Lora({"transformer": model}, {tmp_path / "x.safetensors": 1})


def test_pefts_pattern_names_layers_by_their_end(tmp_path, model):
    """As PEFT matches them: a key is the end of a layer's name, or an expression for it."""
    key = "transformer.single_transformer_blocks.2.proj_mlp"
    a, b = factors(model, "single_blocks.2.linear1")
    tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b[192:]}
    for pattern, alpha in (({"proj_mlp": 16}, 16), ({r"\d\.proj_mlp": 12}, 12), ({"mlp": 12}, 4)):
        told = {"transformer.lora_alpha": 4, "transformer.alpha_pattern": pattern}
        write_tensors(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(told)})
        (change,), _ = read_lora(tmp_path / "x.safetensors", {"transformer": model})
        assert change.scale == alpha / 4
        config = LoraConfig(r=4, lora_alpha=4, alpha_pattern=pattern, target_modules=["proj_mlp"])
        diffusers = FluxTransformer2DModel(**{k: v for k, v in diffusers_config(SMALL).items() if k[0] != "_"})
        diffusers.add_adapter(config)
        assert diffusers.single_transformer_blocks[2].proj_mlp.scaling["default"] == alpha / 4
    told = {"transformer.alpha_pattern": {"(": 1}}
    write_tensors(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    with pytest.raises(fl.WeightsError, match="its PEFT config cannot be read"):
        read_lora(tmp_path / "x.safetensors", {"transformer": model})


@pytest.mark.parametrize("whole", [False, True])
def test_pefts_folder_tells_the_alpha(tmp_path, model, whole):
    """PEFT writes its config beside the file, which has another name in every other layout."""
    tensors, _ = official(model, prefix="base_model.model.")
    write_tensors(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "r": 4, "alpha_pattern": {}}))
    changes, _ = read_lora(tmp_path if whole else tmp_path / "adapter_model.safetensors", {"transformer": model})
    assert {change.scale for change in changes} == {4.0}
    write_tensors(tensors, tmp_path / "other.safetensors")
    if not whole:
        changes, _ = read_lora(tmp_path / "other.safetensors", {"transformer": model})
        assert {change.scale for change in changes} == {1.0}


def test_an_alpha_may_be_a_whole_number(tmp_path, model):
    tensors, _ = official(model, alpha=8)
    assert tensors[f"{LAYERS[0]}.alpha"].dtype == torch.int64
    write_tensors(tensors, tmp_path / "x.safetensors")
    changes, _ = read_lora(tmp_path / "x.safetensors", {"transformer": model})
    assert {change.scale for change in changes} == {2.0}


def test_t5_has_two_prefixes(tmp_path, tiny):
    parts = {"transformer": tiny.model, "t5": tiny.text.t5, "clip": tiny.text.clip}
    q = tiny.text.t5.encoder.block[0].layer[0].SelfAttention.q
    for prefix in ("lora_te2_", "lora_te3_"):
        key = f"{prefix}encoder_block_0_layer_0_SelfAttention_q"
        down, up = draw(2, q.in_features), draw(q.out_features, 2)
        write_tensors({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, tmp_path / "x.safetensors")
        (change,), _ = read_lora(tmp_path / "x.safetensors", parts)
        assert change.layer is q


def test_a_wide_and_a_narrow_one_add_up(tmp_path):
    """One widens img_in, for edges; another changes it for the noise alone."""
    config = replace(SMALL, in_channels=64)
    noise, shown = (small_inputs(config=replace(config, in_channels=c)) for c in (64, 128))
    shown["img"][..., :64] = noise["img"]
    wide, narrow = tmp_path / "wide.safetensors", tmp_path / "narrow.safetensors"
    for path, columns in ((wide, 128), (narrow, 64)):
        write_tensors({"img_in.lora_A.weight": draw(4, columns), "img_in.lora_B.weight": draw(64, 4)}, path)
    right = randomise(fl.Flux(replace(config, in_channels=128)))
    model = randomise(fl.Flux(config))
    right.load_state_dict(model.state_dict() | {"img_in.weight": right.img_in.weight})
    weight = torch.nn.functional.pad(model.img_in.weight, (0, 64)) + draw(64, 4) @ draw(4, 128)
    weight[:, :64] += draw(64, 4) @ draw(4, 64)
    right.img_in.weight.data = weight.detach()
    ways = [[{wide: 1, narrow: 1}], [{narrow: 1, wide: 1}], [{wide: 1}, {narrow: 1}], [{narrow: 1}, {wide: 1}]]
    plain = model(**noise)
    for ways_on, merged in product(ways, (False, True)):
        loras = []
        for files in ways_on:
            loras.append(Lora({"transformer": model}, files))
            if merged:
                loras[-1].merge()
        assert (model(**shown) - right(**shown)).abs().max() < 1e-4, (ways_on, merged)
        for lora in reversed(loras):
            lora.undo()
        assert torch.equal(model(**noise), plain)


def test_a_merge_that_fails_leaves_nothing(tmp_path, model, monkeypatch):
    tensors, _ = official(model)
    write_tensors(tensors, tmp_path / "x.safetensors")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    lora = Lora({"transformer": model}, {tmp_path / "x.safetensors": 1.0})
    once = []

    def fails(tensor):
        once.append(1)
        if len(once) > 4:
            raise torch.OutOfMemoryError("no more")
        return torch.nn.Parameter(tensor, requires_grad=False)

    monkeypatch.setattr("fluxlab.weights.lora._parameter", fails)
    with pytest.raises(torch.OutOfMemoryError):
        lora.merge()
    assert not lora.on
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("clip", "t5"),
    [
        ("text_encoders.clip_l.transformer.text_model.", "text_encoders.t5xxl.transformer."),
        ("clip_l.transformer.text_model.", "t5xxl.transformer."),
        ("lora_te1_text_model_", "lora_te3_"),
    ],
)
def test_loras_of_text_encoders_are_read_after_comfyuis_prefixes(tmp_path, clip, t5):
    pipe = fl.load("flux-tiny-dev")
    layers = {clip: "encoder.layers.0.self_attn.q_proj", t5: "encoder.block.0.layer.0.SelfAttention.q"}
    tensors = {"lora_te1_text_projection.lora_down.weight": torch.randn(2, 3)}  # which FLUX does not ask
    for head, layer in layers.items():
        name = head + (layer if head.endswith(".") else layer.replace(".", "_"))
        module = (pipe.text.clip if head == clip else pipe.text.t5).get_submodule(layer)
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, module.in_features)
        tensors[f"{name}.lora_up.weight"] = torch.randn(module.out_features, 2)
    write_tensors(tensors, tmp_path / "x.safetensors")
    before = pipe.text(["a red circle"])
    with pipe.add_lora({tmp_path / "x.safetensors": 1.0}):
        assert not any(torch.equal(*pair) for pair in zip(before, pipe.text(["a red circle"]), strict=True))
    assert all(torch.equal(*pair) for pair in zip(before, pipe.text(["a red circle"]), strict=True))


def test_diffusers_old_names_of_up_and_down_are_read(tmp_path):
    pipe, name = fl.load("flux-tiny-dev"), "transformer.transformer_blocks.0.attn.to_q.lora"
    down, up = torch.randn(4, 128), torch.randn(128, 4)
    write_tensors({f"{name}.down.weight": down, f"{name}.up.weight": up}, tmp_path / "x.safetensors")
    before = pipe.model.double_blocks[0].img_attn.qkv.weight.clone()
    lora = pipe.add_lora({tmp_path / "x.safetensors": 1.0})
    lora.merge()
    torch.testing.assert_close(pipe.model.double_blocks[0].img_attn.qkv.weight[:128], before[:128] + up @ down)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_does_not_fit_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("fluxlab.pipeline.load.fill", lambda *_: pytest.fail("weights were read"))
    for options in ({"lora": {tmp_path / "nope.safetensors": 1.0}}, {"lora": {CANNY: "much"}}, {"redux": tmp_path}):
        with pytest.raises(
            ValueError, match=r"no such file|is 'much'; give a finite number|not found: .*image_embedder"
        ):
            fl.load("flux-tiny-dev", **options)


def with_scales(model, seed):
    """A file of BFL's that replaces the scales of norms."""
    names = [name for name, module in model.named_modules() if hasattr(module, "scale")]
    scales = {f"{name}.scale": 1 + draw(model.get_submodule(name).scale.numel(), seed=seed) for name in names}
    return official(model, LAYERS[:1], up="lora_B", seed=seed)[0] | scales


def test_of_two_that_replace_scales_the_last_counts(tmp_path, model):
    for seed in (1, 2):
        write_tensors(with_scales(model, seed), tmp_path / f"{seed}.safetensors")
    base = out(model)
    only = {}
    for seed in (1, 2):
        tensors = with_scales(model, seed)
        scales = {name: tensor for name, tensor in tensors.items() if name.endswith("scale")}
        expected = randomise(fl.Flux(SMALL))
        expected.load_state_dict(model.state_dict() | scales)
        only[seed] = {name: tensor for name, tensor in expected.state_dict().items() if name.endswith("scale")}
    first, second = (Lora({"transformer": model}, {tmp_path / f"{seed}.safetensors": 0}) for seed in (1, 2))
    both = out(model)
    second.undo()
    alone = out(model)
    first.undo()
    assert torch.equal(out(model), base)
    for found, seed in ((both, 2), (alone, 1)):
        right = randomise(fl.Flux(SMALL))
        right.load_state_dict(model.state_dict() | only[seed])
        torch.testing.assert_close(found, out(right), rtol=1e-4, atol=1e-5)


def test_scales_are_replaced_where_weights_are_offloaded_and_in_threads(tmp_path, model):
    write_tensors(with_scales(model, 1), tmp_path / "x.safetensors")
    base, where = out(model), {"transformer": model}
    with Lora(where, {tmp_path / "x.safetensors": 1}) as lora:
        expected = out(model)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: out(model), range(16)))
        assert all(torch.equal(each, expected) for each in found)
        lora.undo()
        assert torch.equal(out(model), base)
    offloaded = copy.deepcopy(model)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    Lora({"transformer": offloaded}, {tmp_path / "x.safetensors": 1})
    torch.testing.assert_close(out(offloaded), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low", [False, True])
def test_other_weights_are_refused_while_one_is_merged(tmp_path, model, low):
    write_tensors(official(model)[0], tmp_path / "x.safetensors")
    write_tensors(randomise(fl.Flux(SMALL), 5).state_dict(), tmp_path / "other.safetensors")
    base, lora = out(model), Lora({"transformer": model}, {tmp_path / "x.safetensors": 1})
    lora.merge()
    merged = out(model)
    with pytest.raises(ValueError, match=r"a LoRA is merged into this Flux; undo\(\) it before other weights"):
        fl.load_weights(model, tmp_path / "other.safetensors", low_memory=low)
    with pytest.raises(ValueError, match=r"a LoRA is merged into this Flux; undo\(\) it before other weights"):
        model.load_state_dict(randomise(fl.Flux(SMALL), 5).state_dict())
    assert torch.equal(out(model), merged)
    lora.undo()
    assert torch.equal(out(model), base)
    fl.load_weights(model, tmp_path / "other.safetensors", low_memory=low)
    assert not torch.equal(out(model), base)


@pytest.mark.parametrize("merged", [False, True])
def test_a_copied_pipeline_has_a_lora_of_its_own(merged):
    pipe = fl.load("flux-tiny-dev", lora={CANNY: 1.0})
    if merged:
        pipe.lora.merge()
    copied = copy.deepcopy(pipe)
    copied.loras[-1].undo()
    assert (pipe.model.config.in_channels, copied.model.config.in_channels) == (128, 64)
    assert (len(pipe.loras), len(copied.loras)) == (1, 0)
    plain = fl.load("flux-tiny-dev").model.state_dict()
    assert all(torch.equal(plain[name], weight) for name, weight in copied.model.state_dict().items())
    copied.model.load_state_dict(plain)
    pipe.lora.undo()
    assert all(torch.equal(plain[name], weight) for name, weight in pipe.model.state_dict().items())


def test_the_list_is_of_those_that_are_on(tmp_path):
    pipe = fl.load("flux-tiny-dev")
    write_tensors(official(pipe.model, LAYERS[:1])[0], tmp_path / "x.safetensors")
    first = pipe.add_lora({tmp_path / "x.safetensors": 1})
    second = pipe.add_lora({tmp_path / "x.safetensors": 0.5})
    assert pipe.loras == [first, second]
    first.undo()
    assert pipe.loras == [second]
    first.merge()
    assert pipe.loras == [second, first]


def test_a_model_that_was_wrapped_takes_it(tmp_path, model):
    """By torch.compile, which puts another module around it; and files that were saved of such."""
    tensors = official(model)[0]
    write_tensors(tensors, tmp_path / "x.safetensors")
    base = out(model)
    with Lora({"transformer": model}, {tmp_path / "x.safetensors": 1}):
        expected = out(model)
    compiled = torch.compile(model, backend="eager")
    with Lora({"transformer": compiled}, {tmp_path / "x.safetensors": 1}):
        assert torch.equal(out(model), expected)
    assert torch.equal(out(model), base)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        write_tensors({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "y.safetensors")
        with Lora({"transformer": model}, {tmp_path / "y.safetensors": 1}):
            assert torch.equal(out(model), expected)
    write_tensors(model.state_dict(), tmp_path / "model.safetensors")
    assert fl.load_weights(compiled, tmp_path / "model.safetensors") is compiled


def test_a_wider_model_that_is_shown_pictures_is_refused():
    """A LoRA for edges on Kontext, which is shown a picture."""
    pipe = fl.load("flux-tiny-kontext-dev", lora={CANNY: 1.0})
    with pytest.raises(ValueError, match="a LoRA has the model shown edges or depth, and by itself or by Redux"):
        pipe("make the circle blue", image=Image.new("RGB", (128, 128)))
    pipe.lora.undo()
    assert pipe("make the circle blue", image=Image.new("RGB", (128, 128)), num_steps=1, progress=False)


def test_other_weights_are_loaded_under_one_that_widens():
    """Kept apart it changes no weight, so the file of the narrow model is the one."""
    pipe = fl.load("flux-tiny-dev", lora={CANNY: 1.0})
    inputs = fl.example_inputs("flux-tiny-dev", 64, 64)
    inputs.img = torch.cat((inputs.img, inputs.img), dim=2)
    before = out(pipe.model, inputs.kwargs())
    fl.load_weights(pipe.model, data_folder() / "flux-tiny/flux-tiny-dev.safetensors", dtype=torch.float32)
    assert torch.equal(out(pipe.model, inputs.kwargs()), before)


def test_a_copied_model_takes_other_weights_and_the_original_does_not(tmp_path, model):
    """Of a copy there is no LoRA to undo."""
    write_tensors(official(model)[0], tmp_path / "x.safetensors")
    other = randomise(fl.Flux(SMALL), 5).state_dict()
    Lora({"transformer": model}, {tmp_path / "x.safetensors": 1}).merge()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.load_state_dict(other)
        assert all(torch.equal(tensor, other[name]) for name, tensor in copied.state_dict().items())
    with pytest.raises(ValueError, match="a LoRA is merged into this Flux"):
        model.load_state_dict(other)


def test_it_moves_to_other_modules_without_its_file(tmp_path, model):
    write_tensors(with_scales(model, 1), tmp_path / "x.safetensors")
    base, lora = out(model), Lora({"transformer": model}, {tmp_path / "x.safetensors": 1})
    changed, other = out(model), randomise(fl.Flux(SMALL))
    (tmp_path / "x.safetensors").unlink()
    lora.move({"transformer": other})
    assert torch.equal(out(model), base)
    assert torch.equal(out(other), changed)
    lora.merge()
    torch.testing.assert_close(out(other), changed, rtol=1e-4, atol=1e-5)
    lora.undo()
    assert torch.equal(out(other), base)


@pytest.mark.parametrize("strangers", ["transformer.transformer_blocks.0.attn.to_k", "double_blocks.0.img_attn.qkv"])
def test_rows_that_a_file_changes_in_two_dialects_are_refused(tmp_path, strangers):
    """As of files that were written by two programs: it would be added twice."""
    pipe = fl.load("flux-tiny-dev")
    width = pipe.model.config.hidden_size
    rows = width if "to_k" in strangers else 3 * width
    down, up = torch.randn(4, width), torch.randn(3 * width, 4)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    tensors |= {f"{strangers}.lora_A.weight": down.clone(), f"{strangers}.lora_B.weight": up[:rows].clone()}
    write_tensors(tensors, tmp_path / "x.safetensors")
    with pytest.raises(fl.WeightsError, match=r"change the same rows of one layer|are both the down of one layer"):
        pipe.add_lora({tmp_path / "x.safetensors": 1.0})
    assert pipe.loras == []
