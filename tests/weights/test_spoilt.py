"""Spoilt files: each is refused in a sentence, before anything is loaded, with no more memory than the file."""

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import fluxlab as fl
from fluxlab.files import Checkpoint, write_tensors
from fluxlab.weights.load import autoencoder_config
from fluxlab.weights.which import which
from tests.helpers import SMALL, linux, peak_anonymous_memory

NAME = "img_in.bias"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "x.safetensors"
    write_tensors(fl.Flux(SMALL).state_dict(), path)
    return path.read_bytes()


def refused(path, message=""):
    """By the loader and by what tells what a file is; and nothing of it is in the model."""
    with torch.device("meta"):
        model = fl.Flux(SMALL)
    with pytest.raises(fl.WeightsError, match=message or None) as caught:
        fl.load_weights(model, path)
    assert all(p.is_meta for p in model.parameters())
    text = str(caught.value)
    assert str(path) in text
    assert text.isprintable()
    return text


def parts(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, values):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


@pytest.mark.parametrize("share", [0, 0.00001, 0.0005, 0.002, 0.005, 0.01, 0.1, 0.5, 0.9, 0.99999])
def test_cut(tmp_path, whole, share):
    (tmp_path / "x.safetensors").write_bytes(whole[: int(len(whole) * share)])
    refused(tmp_path / "x.safetensors", "not a whole safetensors file")


def entry(**changes):
    def spoil(header):
        header[NAME] |= changes
        return header

    return spoil


def shift(by):
    return lambda header: (
        header | {NAME: header[NAME] | {"data_offsets": [o + by for o in header[NAME]["data_offsets"]]}}
    )


HEADERS = {
    "offsets that go on after the end": shift(10**9),
    "offsets before the beginning": shift(-(10**9)),
    "offsets that overlap": shift(-4),
    "offsets that leave a hole": shift(4),
    "offsets that are turned round": lambda h: h | {NAME: h[NAME] | {"data_offsets": h[NAME]["data_offsets"][::-1]}},
    "offsets that are words": entry(data_offsets=["a", "b"]),
    "one offset": entry(data_offsets=[0]),
    "no offsets": lambda h: h | {NAME: {"dtype": "F32", "shape": [64]}},
    "a shape that is too large": entry(shape=[64, 10**9]),
    "a shape that is huge": entry(shape=[2**40, 2**40]),
    "a shape that overflows": entry(shape=[2**63]),
    "a shape that is negative": entry(shape=[-64]),
    "a shape that is a word": entry(shape="64"),
    "a shape of fractions": entry(shape=[64.5]),
    "another shape of as many numbers": entry(shape=[8, 8]),
    "a dtype that there is not": entry(dtype="F33"),
    "a wider dtype": entry(dtype="F64"),
    "whole numbers": entry(dtype="I32"),
    "bits": entry(dtype="BOOL"),
    "a dtype that is a number": entry(dtype=32),
    "an entry that is a list": lambda h: h | {NAME: []},
    "metadata that is a list": lambda h: h | {"__metadata__": [1]},
    "metadata of numbers": lambda h: h | {"__metadata__": {"a": 1}},
    "a name more, of nothing": lambda h: h | {"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
    "a list": lambda _: [],
    "nothing": lambda _: {},
    "a word": lambda _: "x",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_lies(tmp_path, whole, kind):
    header, values = parts(whole)
    (tmp_path / "x.safetensors").write_bytes(joined(HEADERS[kind](header), values))
    refused(tmp_path / "x.safetensors")


@pytest.mark.parametrize("length", [0, 1, 7, 10**6, 2**31, 2**62, 2**64 - 1])
def test_a_length_that_lies(tmp_path, whole, length):
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + whole[8:])
    refused(tmp_path / "x.safetensors", "not a whole safetensors file")


@pytest.mark.parametrize(
    "text",
    [b"\xff\xfe" * 20, b'{"a":' * 5000, b'{"a": {"dtype": "F32"', b'{"\\ud800": {}}', b"{" + b" " * 200 + b"}"],
    ids=["no text", "deep", "torn", "half a character", "spaces"],
)
def test_a_header_that_is_no_json_of_tensors(tmp_path, text):
    (tmp_path / "x.safetensors").write_bytes(joined(text, b"\0" * 64))
    refused(tmp_path / "x.safetensors")


def test_a_name_that_is_there_twice(tmp_path, whole):
    header, values = parts(whole)
    text = json.dumps(header)[:-1] + f', "{NAME}": {json.dumps(header[NAME])}' + "}"
    other = json.dumps(header)[:-1] + f', "{NAME}": {json.dumps(header["txt_in.bias"])}' + "}"
    (tmp_path / "x.safetensors").write_bytes(joined(other.encode(), values))
    refused(tmp_path / "x.safetensors", "not a whole safetensors file")
    (tmp_path / "x.safetensors").write_bytes(joined(text.encode(), values))  # the same said twice is no contradiction
    assert len(Checkpoint(tmp_path / "x.safetensors")) == len(header) - 1


def test_links_folders_and_pipes(tmp_path, whole):
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    refused(tmp_path / "nowhere", "no such file")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    refused(tmp_path / "round")
    (tmp_path / "x.safetensors").mkdir()
    refused(tmp_path / "x.safetensors", "0 checkpoints")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no such file")  # it is not waited for
    (tmp_path / "real").write_bytes(whole)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert which(tmp_path / "link")[0].kind == "transformer"


@linux
def test_a_file_that_promises_much_takes_no_memory(tmp_path):
    """A terabyte in the header, a few bytes on the disk."""
    header = {"a": {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [0, 2**40]}}
    (tmp_path / "x.safetensors").write_bytes(joined(header, b"\0" * 64))
    code = f"""
try:
    fl.load_weights(model, {str(tmp_path / "x.safetensors")!r})
except fl.WeightsError:
    pass
"""
    assert peak_anonymous_memory("model = fl.build('flux-dev', device='meta')", code) < 50e6


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "F8_E4M3", "F4", "F8_E8M0", "I8", "U64", "C64", "BOOL", "x"]),
        "shape": st.lists(st.integers(-1, 2**64), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | JSON,
    }
)
NAMES = st.sampled_from(
    ["img_in.weight", "double_blocks.0.img_mod.lin.bias", "a.lora_A.weight", "x.scale_weight", "x.SCB"]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(header={"img_in.weight": [{"\n": None}]}, size=4)
@example(header={"a\n\x1b[31m": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, size=4)
@given(header=st.dictionaries(NAMES | st.text(max_size=6), TENSOR | JSON, max_size=5) | JSON, size=st.integers(0, 64))
def test_whatever_a_header_says_the_answer_is_a_sentence(tmp_path, header, size):
    (tmp_path / "x.safetensors").write_bytes(joined(header, b"\0" * size))
    refused(tmp_path / "x.safetensors")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 9000), value=st.binary(min_size=1, max_size=8))
def test_bytes_changed_anywhere_in_a_header(tmp_path, whole, place, value):
    (tmp_path / "x.safetensors").write_bytes(whole[:place] + value + whole[place + len(value) :])
    with torch.device("meta"):
        model = fl.Flux(SMALL)
    try:
        fl.load_weights(model, tmp_path / "x.safetensors")
    except fl.WeightsError:
        assert all(p.is_meta for p in model.parameters())


DEEP, HUGE = "[" * 200_000, "1" + "0" * 400


@pytest.mark.parametrize("said", [DEEP, '{"transformer.lora_alpha": ' + HUGE + "}"], ids=["deep", "huge"])
def test_a_lora_whose_config_is_odd_is_refused(tmp_path, said):
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 128), f"{name}.lora_B.weight": torch.randn(128, 2)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": said})
    with pytest.raises(fl.WeightsError, match="its PEFT config cannot be read"):
        fl.load("flux-tiny-dev").add_lora({tmp_path / "x.safetensors": 1.0})


def test_jsons_that_are_odd_are_refused(tmp_path, whole):
    (tmp_path / "x.safetensors").write_bytes(whole)
    for said, file in ((DEEP, "no.safetensors.index.json"), ('{"weight_map": {"a": "' + "a" * 5000 + '"}}', "long")):
        (folder := tmp_path / file).mkdir()
        (folder / "x.safetensors.index.json").write_text(said)
        refused(folder)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL", "scaling_factor": ' + HUGE + "}")
    with pytest.raises(fl.WeightsError, match="its VAE's"):
        autoencoder_config(fl.variant("flux-dev"), tmp_path / "x.safetensors")


@pytest.mark.parametrize("mark", [DEEP[:4000], DEEP], ids=["deep", "long"])
def test_marks_of_a_quantization_that_are_odd_are_refused(tmp_path, mark):
    letters = torch.tensor(list(mark.encode()), dtype=torch.uint8)
    save_file({"img_in.comfy_quant": letters}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "what it says of its quantization cannot be read")
    save_file({"a": letters}, tmp_path / "x.safetensors", metadata={"_quantization_metadata": mark})
    refused(tmp_path / "x.safetensors", "what it says of its quantization cannot be read")
