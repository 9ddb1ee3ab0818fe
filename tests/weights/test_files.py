"""Loading, finding and writing files, and what is refused."""

import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import fluxlab as fl
from fluxlab.weights.files import write_tensors
from fluxlab.weights.find import data_folder, find_files
from tests.conftest import SMALL, linux, peak_anonymous_memory, randomise


@pytest.fixture
def checkpoint(tmp_path):
    model = randomise(fl.Flux(SMALL))
    write_tensors(model.state_dict(), tmp_path / "model.safetensors")
    return model, tmp_path / "model.safetensors"


def on_meta(config=SMALL):
    with torch.device("meta"):
        return fl.Flux(config)


def test_a_checkpoint_loads_with_no_renaming(checkpoint):
    model, path = checkpoint
    loaded = fl.load_weights(on_meta(), path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training


def test_weights_are_cast_on_the_way(checkpoint):
    _, path = checkpoint
    assert {p.dtype for p in fl.load_weights(on_meta(), path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_checkpoint_that_differs_is_refused_with_what_differs_and_nothing_is_loaded(checkpoint, tmp_path):
    model, _ = checkpoint
    tensors = {name: t for name, t in model.state_dict().items() if name != "img_in.bias"}
    tensors |= {"extra.weight": torch.zeros(1), "txt_in.bias": torch.zeros(3)}
    write_tensors(tensors, tmp_path / "other.safetensors")
    target = on_meta()
    message = r"1 missing: img_in.bias; 1 unexpected: extra.weight; 1 misshaped: txt_in.bias is \[3\], not \[64\]"
    with pytest.raises(fl.WeightsError, match=message):
        fl.load_weights(target, tmp_path / "other.safetensors")
    assert all(p.is_meta for p in target.parameters())


def test_a_file_of_another_variant_is_refused(checkpoint):
    _, path = checkpoint
    with pytest.raises(fl.WeightsError, match=r"4 unexpected: guidance_in.in_layer.bias"):
        fl.load_weights(on_meta(replace(SMALL, guidance_embed=False)), path)


@linux
def test_loading_takes_the_weights_memory_once(tmp_path):
    """float32 on disk, bfloat16 in memory: what is read must go as soon as it is cast."""
    config = replace(SMALL, hidden_size=1024, num_heads=8, axes_dim=(16, 56, 56), depth=2, depth_single_blocks=2)
    with torch.device("meta"):
        count = sum(p.numel() for p in fl.Flux(config).parameters())
    path = tmp_path / "large.safetensors"
    write_tensors({n: torch.zeros(p.shape) for n, p in on_meta(config).state_dict().items()}, path)
    grown = peak_anonymous_memory(
        f"config = fl.{config!r}\nwith torch.device('meta'): model = fl.Flux(config)",
        f"fl.load_weights(model, {str(path)!r}, dtype=torch.bfloat16)",
    )
    largest = 4 * 1024 * 7 * 1024 * 4  # one float32 tensor on the way, with room for another
    assert 1.9 * count < grown < 2 * count + 2 * largest


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(fl.WeightsError, match=r"none.safetensors: no such file"):
        fl.load_weights(on_meta(), tmp_path / "none.safetensors")


def test_a_file_cut_short_is_refused(checkpoint):
    _, path = checkpoint
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(fl.WeightsError, match="not a whole safetensors file"):
        fl.load_weights(on_meta(), path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(fl.WeightsError, match="not a whole safetensors file"):
        fl.load_weights(on_meta(), tmp_path / "empty.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_pickle_is_never_read(tmp_path, name, zipped):
    torch.save({"img_in.weight": torch.zeros(1)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(fl.WeightsError, match="this is a pickle, which can run code and is never read"):
        fl.load_weights(on_meta(), tmp_path / name)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(checkpoint, monkeypatch):
    _, path = checkpoint
    before = path.read_bytes()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("fluxlab.weights.files.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        write_tensors({"a": torch.zeros(1)}, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_missing_data_folder_is_explained(monkeypatch, tmp_path):
    monkeypatch.setenv("FLUXLAB_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(fl.WeightsError, match=r"no data/ folder at .*nowhere; .* set FLUXLAB_DATA"):
        fl.load("flux-tiny-dev")


def test_data_is_found_where_the_variable_points(monkeypatch, tmp_path):
    monkeypatch.setenv("FLUXLAB_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    with pytest.raises(fl.WeightsError, match=r"not found: transformer .*flux-tiny-dev.safetensors"):
        fl.load("flux-tiny-dev")


def test_the_full_model_without_a_source_is_explained():
    with pytest.raises(fl.WeightsError, match=r"weights of flux-dev are not carried in data/; give source="):
        fl.load("flux-dev")


def test_a_source_that_is_neither_folder_nor_hub_name_is_refused():
    with pytest.raises(fl.WeightsError, match="neither a folder that exists nor a hub name"):
        fl.load("flux-dev", "./not/there")


def test_a_full_size_variant_loads_from_a_folder_laid_out_as_the_official_one(tmp_path, monkeypatch, tiny):
    """Small weights stand in for the large ones: the code is the same."""
    small = replace(tiny.variant, name="flux-dev", repo="owner/name", transformer_file="flux1-dev.safetensors")
    small = replace(small, autoencoder_file="ae.safetensors")
    monkeypatch.setitem(fl.VARIANTS, "flux-dev", small)
    write_tensors(tiny.model.state_dict(), tmp_path / "flux1-dev.safetensors")
    write_tensors(tiny.autoencoder.state_dict(), tmp_path / "ae.safetensors")
    tiny.text.t5.save_pretrained(tmp_path / "text_encoder_2")
    tiny.text.clip.save_pretrained(tmp_path / "text_encoder")
    for name, tokenizer in (("t5", "tokenizer_2"), ("clip", "tokenizer")):
        (tmp_path / tokenizer).symlink_to(data_folder() / "flux-tiny" / name)

    loaded = fl.load("flux-dev", tmp_path, dtype=torch.float32)
    options = {"num_steps": 2, "progress": False}
    assert loaded("a red ring", **options).tobytes() == tiny("a red ring", **options).tobytes()

    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_files(small, "owner/name").transformer == tmp_path / "flux1-dev.safetensors"
    assert asked[0][0] == "owner/name"
    assert "flux1-dev.safetensors" in asked[0][1]


def test_the_header_of_a_checkpoint_is_read_as_published(checkpoint):
    """Eight bytes of length, then JSON: what other tools expect of the file that is written."""
    _, path = checkpoint
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert header["img_in.weight"]["shape"] == [64, 64]


def test_saving_beside_other_code_is_plain_safetensors(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "theirs.safetensors")
    write_tensors({"a": torch.ones(2)}, tmp_path / "ours.safetensors")
    assert (tmp_path / "theirs.safetensors").read_bytes() == (tmp_path / "ours.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_weights_that_are_not_floating_are_refused(checkpoint, dtype):
    model, path = checkpoint
    write_tensors(model.state_dict() | {"img_in.weight": torch.zeros(64, 64, dtype=dtype)}, path)
    with pytest.raises(fl.WeightsError, match=f"1 not of a floating dtype: img_in.weight holds {dtype}"):
        fl.load_weights(on_meta(), path)


def test_eight_bit_floats_are_read(checkpoint):
    model, path = checkpoint
    write_tensors({name: t.to(torch.float8_e4m3fn) for name, t in model.state_dict().items()}, path)
    loaded = fl.load_weights(on_meta(), path, dtype=torch.bfloat16)
    expected = model.img_in.weight.to(torch.float8_e4m3fn).bfloat16()
    assert torch.equal(loaded.img_in.weight, expected)


def test_a_path_that_cannot_be_read_is_refused(tmp_path):
    folder = tmp_path / "model.safetensors"
    folder.mkdir()
    with pytest.raises(fl.WeightsError, match="this folder has 0 safetensors files and 0 indices; name one file"):
        fl.load_weights(on_meta(), folder)


def test_a_file_without_permission_is_refused(checkpoint, monkeypatch):
    _, path = checkpoint

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fluxlab.weights.files.safe_open", forbidden)
    with pytest.raises(fl.WeightsError, match=r"cannot be read .*Permission denied.*; look at its permissions"):
        fl.load_weights(on_meta(), path)


@pytest.mark.parametrize("text", ['{"weights": 3}', '{"weight_map": {"a": 3}}', "[", "[]"])
def test_an_index_of_shards_that_is_broken_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(fl.WeightsError, match="not an index of shards"):
        fl.load_weights(on_meta(), tmp_path)


def test_writing_into_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(fl.WeightsError, match=r"there is no folder .*nowhere; make it first"):
        write_tensors({"a": torch.zeros(1)}, tmp_path / "nowhere/file.safetensors")
