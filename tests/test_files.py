"""Loading, finding and writing files, and what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

import fluxlab as fl
from fluxlab.files import Checkpoint, stream_tensors, write_tensors
from fluxlab.weights.convert import convert
from fluxlab.weights.find import data_folder, find_files
from fluxlab.weights.layouts import to_diffusers
from tests.helpers import SMALL, linux, peak_anonymous_memory, randomise, small_inputs


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
    message = r"1 missing: img_in.bias; 1 unexpected: extra.weight; 1 different: txt_in.bias is torch.float32 \[3\]"
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
    config = replace(SMALL, hidden_size=1024, num_heads=8, axes_dim=(16, 56, 56), depth=1, depth_single_blocks=1)
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
    with pytest.raises(
        fl.WeightsError, match=r"not a whole safetensors file: [\d,]+ bytes .*; fetch or write it again"
    ):
        fl.load_weights(on_meta(), path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(
        fl.WeightsError, match=r"not a whole safetensors file: [\d,]+ bytes .*; fetch or write it again"
    ):
        fl.load_weights(on_meta(), tmp_path / "empty.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_pickle_is_never_read(tmp_path, name, zipped):
    torch.save({"img_in.weight": torch.zeros(1)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(fl.WeightsError, match="pickle, which can run code and is never read; give safetensors"):
        fl.load_weights(on_meta(), tmp_path / name)


def test_what_is_streamed_must_be_what_was_announced(tmp_path):
    said = r"a of torch.float32 \[3\] came, where a of torch.float32 \[2\] was expected"
    with pytest.raises(fl.WeightsError, match=said):
        stream_tensors({"a": torch.ones(2)}, [("a", torch.ones(3))], tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="shorter"):
        stream_tensors({"a": torch.ones(2)}, [], tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(checkpoint, monkeypatch):
    _, path = checkpoint
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(torch.Tensor, "numpy", full)  # the header is written by then
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
    with pytest.raises(fl.WeightsError, match=r"weights of flux-dev are not carried in data/; give source=, or set"):
        fl.load("flux-dev")


def test_a_source_that_is_neither_folder_nor_hub_name_is_refused():
    with pytest.raises(fl.WeightsError, match="neither a file or folder that exists nor a hub name"):
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
    assert all(map(torch.equal, loaded.model.parameters(), tiny.model.parameters()))
    pictures = [np.asarray(pipe("a red ring", **options)).astype(int) for pipe in (loaded, tiny)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # weights at other addresses may round otherwise

    asked = []

    def snapshot_download(repo, allow_patterns, dry_run):
        asked.append((repo, allow_patterns))
        return [] if dry_run else str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_files(small, "owner/name").transformer == tmp_path / "flux1-dev.safetensors"
    assert asked[0][0] == "owner/name"
    assert "flux1-dev.safetensors" in asked[0][1]


def test_what_is_written_is_plain_safetensors(checkpoint):
    """Eight bytes of length, then JSON, padded to eight bytes as the format asks; others read it."""
    model, path = checkpoint
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0
    assert json.loads(path.read_bytes()[8 : 8 + length])["img_in.weight"]["shape"] == [64, 64]
    theirs = load_file(path)
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in model.state_dict().items())


def test_a_header_of_any_length_is_read(tmp_path):
    """A file begins with its header's length, which may look like the first bytes of a pickle."""
    for extra in range(256):
        write_tensors({"a": torch.ones(2)}, tmp_path / "x.safetensors", {"said": extra * "x"})
        assert Checkpoint(tmp_path / "x.safetensors").metadata["said"] == extra * "x"


def test_a_name_in_two_shards_is_refused(tmp_path):
    for shard in ("one", "two"):
        write_tensors({"a": torch.ones(1), shard: torch.ones(1)}, tmp_path / f"{shard}.safetensors")
    weight_map = {"a": "one.safetensors", "one": "one.safetensors", "two": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(fl.WeightsError, match="a is in two files; remove the one of another checkpoint"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "prefix",
    ["model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "_orig_mod.", "_orig_mod.module."],
)
def test_names_with_a_prefix_are_found(checkpoint, tmp_path, prefix):
    """In either layout, beside another part, as in a file of a whole model."""
    model, _ = checkpoint
    for tensors in (model.state_dict(), to_diffusers(model.state_dict(), SMALL)):
        others = {"vae.encoder.mid.block_1.conv1.bias": torch.zeros(1)}
        write_tensors({prefix + name: tensor for name, tensor in tensors.items()} | others, tmp_path / "x.safetensors")
        loaded = fl.load_weights(on_meta(), tmp_path / "x.safetensors").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"GGUF\x03\0\0\0", "this is no part of FLUX: it is empty|not a whole GGUF file that can be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs has left this pointer .*git lfs pull"),
        (b"<!DOCTYPE html><html>", "this is a web page, perhaps one that asks to log in"),
        (b"\n<html>", "this is a web page"),
        (b"PK\x03\x04", "this is a zip archive, as PyTorch saves a pickle"),
        (b"\x80\x02}q\x00", "this is a pickle"),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path, start, message):
    (tmp_path / "x.safetensors").write_bytes(start + bytes(100))
    with pytest.raises(fl.WeightsError, match=message):
        fl.load_weights(on_meta(), tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "read", [fl.Tape.load, fl.FluxInputs.load, lambda path: fl.load("flux-tiny-dev", lora={path: 1})]
)
def test_gguf_where_only_safetensors_is_read_is_named(tmp_path, read):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
    with pytest.raises(fl.WeightsError, match="this is a GGUF file, where safetensors was expected"):
        read(tmp_path / "x.gguf")


def test_several_dtypes_become_the_narrowest_that_holds_all(checkpoint):
    """A forward takes one dtype; by default none of the file's values is changed."""
    model, path = checkpoint
    dtypes = {"img_in.weight": torch.bfloat16, "img_in.bias": torch.float16, "txt_in.bias": torch.float8_e4m3fn}
    given = {name: tensor.to(dtypes.get(name, torch.bfloat16)) for name, tensor in model.state_dict().items()}
    write_tensors(given, path)
    loaded = fl.load_weights(on_meta(), path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(tensor, given[name].float()) for name, tensor in loaded.state_dict().items())
    assert loaded(**small_inputs()).isfinite().all()
    write_tensors(given | {"img_in.bias": given["img_in.bias"].bfloat16()}, path)
    assert {p.dtype for p in fl.load_weights(on_meta(), path).parameters()} == {torch.bfloat16}


def test_values_that_the_dtype_cannot_hold_are_refused(checkpoint):
    model, path = checkpoint
    write_tensors(model.state_dict() | {"img_in.bias": torch.full((64,), 7e4)}, path)
    with pytest.raises(fl.WeightsError, match=r"img_in.bias has values that torch.float16 cannot hold; take torch.bf"):
        fl.load_weights(on_meta(), path, dtype=torch.float16)
    with pytest.raises(fl.WeightsError, match=r"dtype is torch.int8; give a floating dtype"):
        fl.load_weights(on_meta(), path, dtype=torch.int8)


def test_a_tilde_is_the_home_folder_wherever_a_path_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, inputs = fl.Flux(SMALL), fl.FluxInputs(**small_inputs())
    with fl.capture(model, "img_in") as tape:
        model(**inputs.kwargs())
    tape.save("~/tape.safetensors")
    inputs.save("~/inputs.safetensors")
    fl.model_map().save("~/map.svg")
    fl.export_onnx("flux-dev", "~/block.onnx", "single_block")
    write_tensors(model.state_dict(), "~/model.safetensors")
    assert len(list(tmp_path.iterdir())) == 5
    assert fl.Tape.load("~/tape.safetensors").keys() == tape.keys()
    assert torch.equal(fl.FluxInputs.load("~/inputs.safetensors").img, inputs.img)
    assert fl.load_weights(on_meta(), "~/model.safetensors") is not None
    (tmp_path / "data").symlink_to(data_folder())
    monkeypatch.setenv("FLUXLAB_DATA", "~/data")
    assert data_folder() == tmp_path / "data"
    assert find_files(fl.variant("flux-tiny-dev")).transformer.is_file()


@pytest.fixture
def official(tmp_path):
    """flux-tiny, laid out as an official repository is, to be spoilt."""
    tiny, folder = data_folder() / "flux-tiny", tmp_path / "official"
    for part, names in {"t5": ("text_encoder_2", "tokenizer_2"), "clip": ("text_encoder", "tokenizer")}.items():
        for name in names:
            shutil.copytree(tiny / part, folder / name)
    for name in ("flux-tiny-dev.safetensors", "ae.safetensors"):
        shutil.copyfile(tiny / name, folder / name)
    return folder


def test_a_text_encoder_without_all_its_weights_is_refused(official):
    part = Checkpoint(official / "text_encoder_2")
    kept = {name: part[name] for name in part.entries if "block.1" not in name}
    write_tensors(kept, official / "text_encoder_2/model.safetensors", {"format": "pt"})
    with pytest.raises(fl.WeightsError, match=r"not what was expected: \d+ missing: encoder.block.1"):
        fl.load("flux-tiny-dev", official)


def test_text_encoders_in_each_others_place_are_refused(official):
    (official / "text_encoder").rename(official / "kept")
    (official / "text_encoder_2").rename(official / "text_encoder")
    (official / "kept").rename(official / "text_encoder_2")
    message = r"text_encoder_2: d_model is None in its config.json, and flux-tiny-dev takes 128; is it another"
    for use in (fl.load, lambda name, source: convert(fl.variant(name), source.parent / "out", "diffusers", source)):
        with pytest.raises(fl.WeightsError, match=message):
            use("flux-tiny-dev", official)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_without_its_files_is_refused(official, name):
    for file in (official / name).iterdir():
        file.unlink()
    with pytest.raises(fl.WeightsError, match=rf"{name}: has neither tokenizer.json nor .*; fetch the tokenizer's"):
        fl.load("flux-tiny-dev", official)


def test_a_text_encoder_cut_short_is_refused(official):
    file = official / "text_encoder/model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(fl.WeightsError, match=r"text_encoder/model.safetensors: not a whole safetensors file"):
        fl.load("flux-tiny-dev", official)


def test_a_spoilt_tokenizer_is_refused(official):
    (official / "tokenizer/tokenizer.json").unlink()
    (official / "tokenizer/vocab.json").write_text("{}")
    (official / "tokenizer/merges.txt").write_text("a b\n")
    with pytest.raises(fl.WeightsError, match="tokenizer: no CLIP tokenizer can be read from it"):
        fl.load("flux-tiny-dev", official)


def test_a_clip_with_both_towers_is_read(official, tiny):
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    whole = CLIPModel(CLIPConfig(text_config=tiny.text.clip.config.to_dict(), vision_config=vision, projection_dim=8))
    whole.save_pretrained(official / "text_encoder")
    loaded = fl.load("flux-tiny-dev", official).text.clip.state_dict()
    assert all(
        torch.equal(whole.state_dict()[f"text_model.{n.removeprefix('text_model.')}"], loaded[n]) for n in loaded
    )


def test_a_config_that_is_no_json_is_refused(official):
    (official / "text_encoder/config.json").write_text("")
    with pytest.raises(fl.WeightsError, match=r"text_encoder/config.json: cannot be read as JSON"):
        fl.load("flux-tiny-dev", official)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "models/FLUX.1-dev",
            r"neither a file or folder that exists nor a hub name \(owner/name, where no folder owner is\); give the",
        ),
        ("models/x.safetensors", "not a whole safetensors file: 0 bytes"),
        ("other/x.safetensors", "which is neither a file or folder .*; give the folder"),
        ("owner/FLUX.1-dev", r"no such folder, and from the hub it cannot be fetched \(offline\)"),
    ],
)
def test_only_what_can_be_a_hub_name_is_asked_for_there(tmp_path, monkeypatch, source, message):
    def snapshot_download(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/x.safetensors").touch()
    with pytest.raises(fl.WeightsError, match=message):
        fl.load("flux-dev", source)


@pytest.mark.usefixtures("as_users_run_it")
def test_a_dtype_that_is_no_floating_dtype_of_torch_is_refused():
    for dtype in ("bfloat16", torch.int8, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=r"dtype is .*; give a floating dtype of 16 bits or more"):
            fl.load("flux-tiny-dev", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_weights_that_are_not_floating_are_refused(checkpoint, dtype):
    model, path = checkpoint
    write_tensors(model.state_dict() | {"img_in.weight": torch.zeros(64, 64, dtype=dtype)}, path)
    with pytest.raises(fl.WeightsError, match=f"1 different: img_in.weight is {dtype} .*, where floating"):
        fl.load_weights(on_meta(), path)


def test_eight_bit_floats_are_read(checkpoint):
    model, path = checkpoint
    write_tensors({name: t.to(torch.float8_e4m3fn) for name, t in model.state_dict().items()}, path)
    loaded = fl.load_weights(on_meta(), path, dtype=torch.bfloat16)
    expected = model.img_in.weight.to(torch.float8_e4m3fn).bfloat16()
    assert torch.equal(loaded.img_in.weight, expected)


def test_an_empty_folder_is_refused(tmp_path):
    folder = tmp_path / "model.safetensors"
    folder.mkdir()
    with pytest.raises(fl.WeightsError, match=r"this folder has 0 checkpoints .it holds nothing.; give the path"):
        fl.load_weights(on_meta(), folder)


def test_a_file_without_permission_is_refused(checkpoint, monkeypatch):
    _, path = checkpoint

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fluxlab.files.safe_open", forbidden)
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


def test_writing_over_a_folder_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(fl.WeightsError, match=r"is a folder; give the path of a file in it"):
        write_tensors({"a": torch.zeros(1)}, tmp_path)
    assert not list(tmp_path.iterdir())
    assert not [each for each in tmp_path.parent.iterdir() if each.name.startswith(f".{tmp_path.name}")]


@pytest.mark.usefixtures("as_users_run_it")
def test_what_a_file_says_of_itself_is_text(tmp_path):
    write_tensors({"x": torch.ones(1)}, tmp_path / "x.safetensors", {"steps": 20})
    assert Checkpoint(tmp_path / "x.safetensors").metadata["steps"] == "20"


def test_a_user_who_is_not_here_is_a_name_like_others():
    with pytest.raises(fl.WeightsError, match="~nobody-here/x: no such file"):
        Checkpoint("~nobody-here/x")


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_path_is_refused():
    with pytest.raises(fl.WeightsError, match="3 is no path"):
        find_files(fl.VARIANTS["flux-tiny-dev"], t5=3)


def test_a_pointer_of_git_lfs_in_place_of_a_config_is_named(tmp_path):
    t5 = shutil.copytree(data_folder() / "flux-tiny/t5", tmp_path / "t5")
    (t5 / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n")
    with pytest.raises(fl.WeightsError, match="git lfs pull"):
        find_files(fl.VARIANTS["flux-tiny-dev"], t5=t5)


def test_the_variable_names_a_folder_and_never_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLUXLAB_WEIGHTS", "models/flux")
    with pytest.raises(fl.WeightsError, match="neither a file or folder that exists"):
        find_files(fl.VARIANTS["flux-dev"])


def test_a_torn_file_whose_length_looks_like_a_pickle_is_called_torn(tmp_path):
    for extra in range(128):
        write_tensors({"w" * (8 + extra): torch.zeros(40)}, tmp_path / "x.safetensors")
        whole = (tmp_path / "x.safetensors").read_bytes()
        (tmp_path / "x.safetensors").write_bytes(whole[:-20])
        with pytest.raises(fl.WeightsError, match="not a whole safetensors file"):
            Checkpoint(tmp_path / "x.safetensors")


def test_shards_of_a_variant_are_found_by_their_index(tmp_path):
    """diffusers and transformers write ``variant="fp16"`` between the two endings."""
    names = [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        write_tensors({f"w{i}": torch.ones(2)}, tmp_path / name)
    index = {"weight_map": {f"w{i}": name for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "model.safetensors.index.fp16.json"):
        assert sorted(Checkpoint(path)) == ["w0", "w1"]
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w0": "pytorch_model.bin"}}))
    assert sorted(Checkpoint(tmp_path)) == ["w0", "w1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_float64_holds_and_the_dtype_does_not_is_refused(tmp_path, dtype):
    write_tensors({"a": torch.tensor([1e300, 1.0], dtype=torch.float64)}, tmp_path / "x.safetensors")
    with pytest.raises(fl.WeightsError, match=f"a has values that {dtype} cannot hold"):
        Checkpoint(tmp_path / "x.safetensors").cast(dtype)["a"]


@pytest.mark.usefixtures("as_users_run_it")
def test_what_has_no_plain_values_is_not_written(tmp_path):
    for odd in (torch.eye(2).to_sparse(), np.eye(2), torch.eye(2, device="meta")):
        with pytest.raises(fl.WeightsError, match=r"a is (a ndarray|torch.sparse_coo|on the meta device)"):
            write_tensors({"a": odd}, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("as_users_run_it")
def test_paths_that_the_system_refuses(tmp_path, checkpoint):
    _, path = checkpoint
    long = tmp_path / ("x" * 5000)
    for use in (lambda: fl.load("flux-dev", long), lambda: fl.load_weights(on_meta(), long)):
        with pytest.raises(fl.WeightsError, match=r"is no path of a file or a folder .*name too long"):
            use()
    for name in ("x" * 240 + ".safetensors", "ü" * 120 + ".safetensors"):  # as long as a name may be
        write_tensors({"a": torch.ones(2)}, tmp_path / name)
        assert torch.equal(Checkpoint(tmp_path / name)["a"], torch.ones(2))
    for device in ("gpu", "hpu", "CPU", "cuda:99"):
        with pytest.raises(ValueError, match=r"device is '.*', which cannot be used here") as said:
            fl.load_weights(on_meta(), path, device=device)
        assert len(str(said.value)) < 400


def test_a_folder_says_what_it_holds(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(fl.WeightsError, match=r"this folder has 0 checkpoints .it holds model\.gguf.; give the path"):
        Checkpoint(tmp_path)
    write_tensors({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "._x.safetensors").write_bytes(b"left by another system")
    assert list(Checkpoint(tmp_path)) == ["a"]


def test_numbers_as_they_are_seen_are_written(tmp_path):
    """A view that conjugates or negates; and what safetensors has no name for is refused."""
    z = torch.tensor([1 + 2j, 3 - 4j])
    write_tensors({"conj": z.conj(), "neg": z.conj().imag}, tmp_path / "x.safetensors")
    found = Checkpoint(tmp_path / "x.safetensors")
    assert torch.equal(found["conj"], torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(found["neg"], torch.tensor([-2.0, 4.0]))
    with pytest.raises(fl.WeightsError, match="a is complex128, which safetensors cannot hold"):
        write_tensors({"a": z.to(torch.complex128)}, tmp_path / "y.safetensors")


def test_what_would_end_at_the_largest_of_eight_bits_is_refused(checkpoint, tmp_path):
    """There a value too large becomes the largest, in silence."""
    _, path = checkpoint
    with pytest.raises(
        fl.WeightsError, match=r"dtype is torch\.float8_e4m3fn; give a floating dtype of 16 bits or more"
    ):
        fl.load_weights(on_meta(), path, dtype=torch.float8_e4m3fn)
