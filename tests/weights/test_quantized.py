"""Quantized files: GGUF beside the gguf package, scaled fp8 beside its formula; kept small, and what is refused."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model

import fluxlab as fl
from fluxlab.files import Checkpoint, write_tensors
from fluxlab.weights.find import data_folder
from fluxlab.weights.quantized import read_gguf
from fluxlab.weights.which import which
from tests.helpers import SMALL, linux, peak_anonymous_memory, randomise, small_inputs

Q = gguf.GGMLQuantizationType
K_QUANTS = [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K]


def write_gguf(path, tensors, kind=Q.Q8_0, architecture="flux", raw=()):
    """As converters do: matrices quantized where their rows are whole blocks, all else in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        data = tensor.detach().float().numpy()
        whole = data.ndim == 2 and data.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        used = kind if whole else Q.F32
        data = gguf.quants.quantize(data, used) if used != Q.F32 else data
        writer.add_tensor(name, data, raw_dtype=used)
    for name, data, used in raw:
        writer.add_tensor(name, data, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1], ids=lambda kind: kind.name)
def test_what_is_read_is_the_packages_own(tmp_path, kind):
    large = torch.randn(1031, 1024)  # which is read in pieces
    tensors = {"a.weight": torch.randn(6, 64), "a.bias": torch.randn(6), "b.weight": large}
    write_gguf(tmp_path / "x.gguf", tensors, kind)
    found = read_gguf(tmp_path / "x.gguf")
    for name in ("a.weight", "b.weight"):
        theirs = gguf.quants.dequantize(gguf.quants.quantize(tensors[name].numpy(), kind), kind)
        assert np.array_equal(found[name].float().numpy(), theirs)
    assert torch.equal(found["a.bias"], tensors["a.bias"])
    assert found["a.weight"].dtype == found.entries["a.weight"].dtype
    assert found.mapped == (kind in {Q.F16, Q.BF16})


@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_k_quants_are_dequantized_as_the_package_does(tmp_path, kind):
    """It cannot make them: blocks are drawn at random, those that hold NaN or infinity left out."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    drawn = np.random.default_rng(0).integers(0, 256, (64, size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(drawn, kind)
    drawn, values = (each[np.isfinite(values).all(axis=1)] for each in (drawn, values))
    assert len(drawn) > 20
    write_gguf(tmp_path / "x.gguf", {}, raw=[("a.weight", drawn, kind)])
    found = read_gguf(tmp_path / "x.gguf")
    assert found.entries["a.weight"].shape == (len(drawn), block)
    assert np.array_equal(found["a.weight"].numpy(), values)


def quantized(path, model, kind):
    write_gguf(path, model.state_dict(), kind)
    return path


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0], ids=lambda kind: kind.name)
def test_a_quantized_transformer_is_loaded_or_kept_small(tmp_path, kind):
    model = randomise(fl.Flux(SMALL))
    path = quantized(tmp_path / "x.gguf", model, kind)
    inputs = small_inputs()
    with torch.device("meta"):
        full, small = fl.Flux(SMALL), fl.Flux(SMALL)
    fl.load_weights(full, path, dtype=torch.float32)
    fl.load_weights(small, path, dtype=torch.float32, low_memory=True)
    assert {p.device.type for p in small.parameters()} == {"meta"}
    with torch.no_grad():
        expected, found, exact = full(**inputs), small(**inputs), model(**inputs)
    assert torch.equal(found, expected)
    error = ((expected - exact).norm() / exact.norm()).item()
    assert 1e-4 < error < {Q.Q8_0: 0.03, Q.Q4_0: 0.3}[kind]
    assert {p.device.type for p in small.parameters()} == {"meta"}  # each layer was left again


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0], ids=lambda kind: kind.name)
def test_flux_tiny_paints_with_quantized_weights(tmp_path, tiny, kind):
    path = quantized(tmp_path / "x.gguf", tiny.model, kind)
    (part,) = which(path)
    assert part.variants == ["flux-tiny-dev", "flux-tiny-kontext-dev"]
    assert kind.name in str(part)
    prompt, options = "a large red circle on a white background", {"num_steps": 8, "progress": False}
    pixels = [
        np.asarray(pipe(prompt, **options)).astype(float)
        for pipe in (tiny, fl.load("flux-tiny-dev", path), fl.load("flux-tiny-dev", path, low_memory=True))
    ]
    assert np.array_equal(pixels[1], pixels[2])
    assert abs(pixels[0] - pixels[1]).mean() < {Q.Q8_0: 4, Q.Q4_0: 25}[kind]


def test_a_t5_of_llama_cpps_names_is_read(tmp_path, tiny):
    encoder = tiny.text.t5
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, encoder.config.num_layers)
    named = {table.get_name(name, (".weight",)): tensor for name, tensor in encoder.state_dict().items()}
    named.pop(None)  # the second name of the one table of words
    write_gguf(tmp_path / "t5.gguf", named, Q.F16, "t5encoder")
    assert str(which(tmp_path / "t5.gguf")[0]).startswith("the T5 encoder of width 128 in the llama.cpp layout; F16 (")
    loaded = fl.load("flux-tiny-dev", t5=tmp_path / "t5.gguf").text.t5.state_dict()
    assert loaded.keys() == encoder.state_dict().keys()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded[name], tensor.half().float() if tensor.ndim == 2 else tensor.float())
    write_gguf(tmp_path / "t5.gguf", named | {"enc.blk.0.other.weight": torch.ones(2)}, Q.F16, "t5encoder")
    with pytest.raises(fl.WeightsError, match=r"1 unexpected: enc.blk.0.other.weight"):
        fl.load("flux-tiny-dev", t5=tmp_path / "t5.gguf")


def scaled(model, scale="scale_weight", **more):
    """As ComfyUI's files: the largest value of a weight becomes 448."""
    tensors = dict(model.state_dict())
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2]:
        factor = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / factor).to(torch.float8_e4m3fn)
        tensors[name.removesuffix("weight") + scale] = factor
        tensors |= {name.removesuffix("weight") + suffix: value for suffix, value in more.items()}
    return tensors


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rows", [False, True])
def test_scaled_fp8_is_its_weight_times_its_scale(tmp_path, scale, rows):
    model = randomise(fl.Flux(SMALL))
    tensors = scaled(model, scale, scale_input=torch.ones(()), input_scale=torch.ones(())) | {
        "scaled_fp8": torch.empty(0)
    }
    if rows:
        for name in [name for name in tensors if name.endswith(scale)]:
            tensors[name] = tensors[name] * torch.linspace(0.5, 2, len(tensors[name.replace(scale, "weight")]))[:, None]
    write_tensors(tensors, tmp_path / "x.safetensors")
    with torch.device("meta"):
        loaded, small = fl.Flux(SMALL), fl.Flux(SMALL)
    fl.load_weights(loaded, tmp_path / "x.safetensors", dtype=torch.float32)
    for name, tensor in loaded.state_dict().items():
        factor = tensors.get(name.removesuffix("weight") + scale) if name.endswith("weight") else None
        assert torch.equal(tensor, tensors[name].float() * (1 if factor is None else factor))
    assert ((loaded.img_in.weight - model.img_in.weight).norm() / model.img_in.weight.norm()) < (
        0.04 if not rows else 9
    )
    fl.load_weights(small, tmp_path / "x.safetensors", dtype=torch.float32, low_memory=True)
    with torch.no_grad():
        assert torch.equal(small(**small_inputs()), loaded(**small_inputs()))
    assert "with a scale" in str(which(tmp_path / "x.safetensors")[0])


def test_what_newer_files_say_of_themselves_is_read(tmp_path):
    tensors = scaled(randomise(fl.Flux(SMALL)), "weight_scale")
    for form, readable in (("float8_e4m3fn", True), ("nvfp4", False), ("int8_tensorwise", False)):
        said = json.dumps({"format": form}).encode()
        in_metadata = {"_quantization_metadata": json.dumps({"layers": {"img_in": {"format": form}}})}
        mark = {"img_in.comfy_quant": torch.tensor(list(said), dtype=torch.uint8)}
        for more, metadata in ((mark, {}), ({}, in_metadata)):
            write_tensors(tensors | more, tmp_path / "x.safetensors", metadata)
            if readable:
                assert which(tmp_path / "x.safetensors")[0].kind == "transformer"
                continue
            with pytest.raises(fl.WeightsError, match=f"quantized as {form}, which is not read; take fp8 or GGUF"):
                which(tmp_path / "x.safetensors")
    write_tensors(tensors, tmp_path / "x.safetensors", {"_quantization_metadata": "{"})
    with pytest.raises(fl.WeightsError, match="what it says of its quantization cannot be read"):
        which(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "more",
    [
        {"img_in.SCB": torch.ones(64)},
        {"img_in.weight.quant_state.bitsandbytes__nf4": torch.ones(4, dtype=torch.uint8)},
        {"img_in.weight.absmax": torch.ones(4)},
    ],
)
def test_files_of_bitsandbytes_are_named_and_refused(tmp_path, more):
    write_tensors(fl.Flux(SMALL).state_dict() | more, tmp_path / "x.safetensors")
    with pytest.raises(fl.WeightsError, match=r"quantized by bitsandbytes .*; take the bfloat16, fp8 or GGUF file"):
        which(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_in.scale_weight": torch.tensor(float("nan"))}, "img_in.scale_weight has values that are not finite"),
        ({"img_in.scale_weight": torch.ones(3)}, r"img_in.scale_weight \[3\] scales img_in.weight, which is"),
        (
            {"img_in.weight": torch.ones(64, 64)},
            r"img_in.scale_weight \[\] scales img_in.weight, which is torch.float32",
        ),
        ({"nothing.scale_weight": torch.ones(())}, "scales nothing.weight, which is nothing"),
    ],
)
def test_spoilt_scales_are_refused(tmp_path, change, message):
    write_tensors(scaled(fl.Flux(SMALL)) | change, tmp_path / "x.safetensors")
    with pytest.raises(fl.WeightsError, match=message):
        which(tmp_path / "x.safetensors")


class TestSpoiltGGUF:
    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory):
        path = tmp_path_factory.mktemp("gguf") / "x.gguf"
        return quantized(path, fl.Flux(SMALL), Q.Q8_0).read_bytes()

    @pytest.mark.parametrize("part", [0.00001, 0.0001, 0.001, 0.005, 0.01, 0.05, 0.2, 0.5, 0.9, 0.999])
    def test_cut(self, tmp_path, whole, part):
        (tmp_path / "x.gguf").write_bytes(whole[: max(4, int(len(whole) * part))])
        with pytest.raises(fl.WeightsError):
            which(tmp_path / "x.gguf")

    def test_of_another_architecture(self, tmp_path):
        write_gguf(tmp_path / "x.gguf", {"a.weight": torch.ones(2, 32)}, architecture="llama")
        with pytest.raises(fl.WeightsError, match="a GGUF file of 'llama', where 'flux' or 't5encoder' was expected"):
            which(tmp_path / "x.gguf")

    def test_with_values_that_are_not_finite(self, tmp_path):
        block = np.full((1, 34), 255, dtype=np.uint8)  # a scale of NaN
        write_gguf(tmp_path / "x.gguf", {}, raw=[("a.weight", block, Q.Q8_0)])
        with pytest.raises(fl.WeightsError, match=r"a.weight has values that are not finite; fetch"):
            read_gguf(tmp_path / "x.gguf")["a.weight"]

    def test_of_a_type_that_cannot_be_dequantized(self, tmp_path):
        write_gguf(tmp_path / "x.gguf", {}, raw=[("a.weight", np.zeros((1, 34), np.uint8), Q.Q8_0)])
        text = (tmp_path / "x.gguf").read_bytes()
        place = text.index(b"a.weight") + 8 + 4 + 16  # after the name: how many axes, two axes, the type
        (tmp_path / "x.gguf").write_bytes(text[:place] + (24).to_bytes(4, "little") + text[place + 4 :])  # I8
        with pytest.raises(fl.WeightsError, match="has tensors of type I8, which the gguf package cannot dequantize"):
            which(tmp_path / "x.gguf")

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(place=st.integers(0, 3000), value=st.binary(min_size=1, max_size=8))
    def test_bytes_changed_anywhere(self, tmp_path, whole, place, value):
        (tmp_path / "x.gguf").write_bytes(whole[:place] + value + whole[place + len(value) :])
        with torch.device("meta"):
            model = fl.Flux(SMALL)
        try:
            fl.load_weights(model, tmp_path / "x.gguf", dtype=torch.float32)
        except fl.WeightsError:
            assert all(p.is_meta for p in model.parameters())


@linux
def test_what_stays_small_takes_the_memory_of_one_layer(tmp_path):
    """float32 on disk, bfloat16 in the forward: nothing of it stays."""
    tensors = {f"{i}.weight": torch.zeros(2048, 2048) for i in range(40)}
    write_tensors(tensors, tmp_path / "x.safetensors")
    before = f"""
net = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False, device="meta") for _ in range(40)))
x = torch.zeros(1, 2048, dtype=torch.bfloat16)
path = {str(tmp_path / "x.safetensors")!r}
"""
    grown = [
        peak_anonymous_memory(before, f"fl.load_weights(net, path, dtype=torch.bfloat16{low})\nnet(x)")
        for low in ("", ", low_memory=True")
    ]
    layer = 2048 * 2048 * 2
    assert grown[0] > 40 * layer
    assert grown[1] < 40 * layer / 3  # some processors' products take work space of several layers


def test_a_forward_that_fails_leaves_no_layer_behind(tmp_path):
    model = randomise(fl.Flux(SMALL))
    write_tensors(model.state_dict(), tmp_path / "x.safetensors")
    with torch.device("meta"):
        small = fl.Flux(SMALL)
    fl.load_weights(small, tmp_path / "x.safetensors", low_memory=True)
    inputs = small_inputs()
    with pytest.raises(RuntimeError), torch.no_grad():
        small.double_blocks[0].img_attn.qkv(torch.ones(1, 3))
    assert all(p.is_meta for p in small.parameters())
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs), model(**inputs))  # at other addresses, rounded otherwise


def test_a_pipeline_in_little_memory_paints_the_same(tiny):
    little = fl.load("flux-tiny-dev", low_memory=True)
    options = {"num_steps": 2, "progress": False}
    pictures = [np.asarray(pipe("a red ring", **options)).astype(int) for pipe in (little, tiny)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # weights at other addresses may round otherwise
    with pytest.raises(
        ValueError, match="a model whose weights stay in their file cannot be copied or pickled: load it again"
    ):
        copy.deepcopy(little.model)
    with pytest.raises(
        ValueError, match="weights are not in memory, as with low_memory or on meta; load with that device"
    ):
        little.to(torch.bfloat16)


@pytest.mark.parametrize(("free", "low"), [(10**3, True), (10**12, False)])
def test_little_memory_is_taken_where_the_weights_would_not_fit(monkeypatch, free, low):
    monkeypatch.setattr("fluxlab.weights.load.free_memory", lambda _: free)
    assert {p.is_meta for p in fl.load("flux-tiny-dev", dtype=torch.float32).model.parameters()} == {low}
    held = {entry.dtype for entry in Checkpoint(data_folder() / "flux-tiny/flux-tiny-dev.safetensors").entries.values()}
    assert held == {torch.bfloat16}  # so that no part needs a change, and all stay mapped:
    assert not any(p.is_meta for p in fl.load("flux-tiny-dev", dtype=torch.bfloat16).model.parameters())


def test_other_weights_take_the_place_of_those_that_stay_in_their_file(tmp_path):
    """A model that was loaded with low memory is loaded again, either way."""
    models = [randomise(fl.Flux(SMALL), seed) for seed in (0, 1)]
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for model, path in zip(models, paths, strict=True):
        write_tensors(model.state_dict(), path)
    inputs = small_inputs()
    right = models[1](**inputs)
    for low in (True, False):
        model = fl.load_weights(fl.Flux(SMALL), paths[0], low_memory=True)
        fl.load_weights(model, paths[1], low_memory=low)
        assert (model(**inputs) - right).abs().max() < 1e-5
        assert all(p.is_meta == low for p in model.parameters())
    copy.deepcopy(model)


class WithBuffers(torch.nn.Module):
    def __init__(self, held):
        super().__init__()
        self.lin = torch.nn.Linear(2, 2)
        self.register_buffer("mean", torch.full((2,), 7.0), persistent=held)

    def forward(self, x):
        return self.lin(x) + self.mean


def test_buffers_are_those_of_the_file_or_refused(tmp_path):
    module = WithBuffers(held=True)
    write_tensors(module.state_dict(), tmp_path / "x.safetensors")
    for low in (False, True):
        with torch.device("meta"):
            loaded = WithBuffers(held=True)
        fl.load_weights(loaded, tmp_path / "x.safetensors", low_memory=low)
        assert torch.equal(loaded.mean, module.mean)
        assert torch.equal(loaded(torch.ones(1, 2)), module(torch.ones(1, 2)))
    write_tensors(WithBuffers(held=False).state_dict(), tmp_path / "y.safetensors")
    with torch.device("meta"):
        loaded = WithBuffers(held=False)
    with pytest.raises(fl.WeightsError, match="no file holds mean"):
        fl.load_weights(loaded, tmp_path / "y.safetensors")


def test_gguf_is_widened_to_float32_whatever_the_default(tmp_path):
    model = randomise(fl.Flux(SMALL))
    write_gguf(tmp_path / "x.gguf", model.state_dict())
    torch.set_default_dtype(torch.bfloat16)
    try:
        entries = read_gguf(tmp_path / "x.gguf").entries
    finally:
        torch.set_default_dtype(torch.float32)
    assert {entry.dtype for entry in entries.values()} == {torch.float32}


def test_a_gguf_of_a_whole_t5_is_its_encoder(tmp_path):
    raw = [("enc.blk.0.attn_q.weight", np.zeros((2, 32), np.float32), Q.F32)]
    raw += [("dec.blk.0.attn_q.weight", np.zeros((2, 32), np.float32), Q.F32)]
    write_gguf(tmp_path / "x.gguf", {}, architecture="t5", raw=raw)
    (part,) = which(tmp_path / "x.gguf")
    assert (part.kind, part.layout) == ("t5", "llama.cpp")


def test_two_scales_of_one_weight_are_refused(tmp_path):
    weight = torch.ones(2, 2).to(torch.float8_e4m3fn)
    tensors = {"x.weight": weight, "x.scale_weight": torch.tensor(1.0), "x.weight_scale": torch.tensor(2.0)}
    write_tensors(tensors, tmp_path / "x.safetensors")
    with pytest.raises(fl.WeightsError, match="a weight has two scales"):
        which(tmp_path / "x.safetensors")


def test_a_header_that_lies_of_a_length_is_refused_at_once(tmp_path):
    """An array of 10^12 strings, in a file of 60 bytes."""
    key = b"a" * 8
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    array = (9).to_bytes(4, "little") + (8).to_bytes(4, "little") + (10**12).to_bytes(8, "little")
    (tmp_path / "x.gguf").write_bytes(head + len(key).to_bytes(8, "little") + key + array)
    with pytest.raises(fl.WeightsError, match=r"not a whole GGUF file that can be read \(it ends too early\)"):
        which(tmp_path / "x.gguf")


def test_each_part_of_a_bundle_is_told_its_own_dtypes(tmp_path):
    transformer = {f"model.diffusion_model.{n}": t for n, t in scaled(fl.Flux(SMALL), "scale_weight").items()}
    state = fl.AutoEncoder(fl.variant("flux-tiny-dev").autoencoder).state_dict()
    vae = {f"vae.{name}": tensor.half() for name, tensor in state.items()}
    write_tensors(transformer | vae, tmp_path / "x.safetensors")
    first, second = map(str, which(tmp_path / "x.safetensors"))
    assert "float8_e4m3fn with a scale" in first
    assert "float16" not in first
    assert f"float16 ({len(vae)}); " in second
    assert "float8" not in second


def test_what_is_all_of_eight_bits_is_loaded_as_bfloat16(tmp_path):
    """No forward computes in float8; and transformers reads no config that says so."""
    model = randomise(fl.Flux(SMALL))
    write_tensors({n: t.to(torch.float8_e4m3fn) for n, t in model.state_dict().items()}, tmp_path / "x.safetensors")
    with torch.device("meta"):
        loaded = fl.Flux(SMALL)
    assert {p.dtype for p in fl.load_weights(loaded, tmp_path / "x.safetensors").parameters()} == {torch.bfloat16}


def streamed(tmp_path):
    model = randomise(fl.Flux(SMALL))
    write_tensors(model.state_dict(), tmp_path / "x.safetensors")
    with torch.device("meta"):
        low = fl.Flux(SMALL)
    return model, fl.load_weights(low, tmp_path / "x.safetensors", low_memory=True)


def test_threads_share_a_model_whose_weights_stay_in_their_file(tmp_path):
    model, low = streamed(tmp_path)
    given = [small_inputs(seed=seed) for seed in (0, 1)] * 12
    with torch.no_grad():
        right = [model(**inputs) for inputs in given]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda inputs: low(**inputs), given))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(found, right, strict=True))


def test_what_would_have_no_numbers_beside_them_is_refused(tmp_path):
    """Other weights, and layers that others put in, such as PEFT's; and a part is copied no more than the whole."""
    model, low = streamed(tmp_path)
    with pytest.raises(
        ValueError, match=r"weights that stay in their file take no others in their place; use fl\.load"
    ):
        low.load_state_dict({name: torch.zeros_like(t) for name, t in model.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="a model whose weights stay in their file cannot be copied"):
        copy.deepcopy(low.double_blocks[0])
    assert (low(**small_inputs()) - model(**small_inputs())).abs().max() < 1e-5
    inject_adapter_in_model(LoraConfig(target_modules=["qkv"], r=2), low)
    with pytest.raises(ValueError, match="was put into a model whose weights stay in their file"):
        low(**small_inputs())
    fresh = streamed(tmp_path)[1]
    fl.load_weights(fresh, tmp_path / "x.safetensors")
    assert not any("__reduce_ex__" in vars(layer) for layer in fresh.modules())


def test_big_endian_files_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "flux", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(fl.WeightsError, match="its numbers are big-endian, for another machine"):
        read_gguf(tmp_path / "x.gguf")


def test_an_interrupt_in_a_layer_stops_no_other_thread(tmp_path):
    model, low = streamed(tmp_path)
    right = model(**small_inputs())

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = low.single_blocks[0].linear1.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        low(**small_inputs())
    hook.remove()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: low(**small_inputs())).result(timeout=30)
    assert (found - right).abs().max() < 1e-5


def test_layers_without_weights_may_be_put_in(tmp_path):
    low = streamed(tmp_path)[1]
    shorter, low.single_blocks = randomise(fl.Flux(SMALL)), low.single_blocks[:1]
    shorter.single_blocks = shorter.single_blocks[:1]
    assert (low(**small_inputs()) - shorter(**small_inputs())).abs().max() < 1e-5
