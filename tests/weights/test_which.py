"""What a file is, and what it is opened as: every layout that people have."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fluxlab as fl
from fluxlab.cli import app
from fluxlab.files import Checkpoint, Tensors, write_tensors
from fluxlab.weights.convert import convert
from fluxlab.weights.find import data_folder
from fluxlab.weights.layouts import to_diffusers
from fluxlab.weights.load import PUBLISHED
from fluxlab.weights.which import Part, which

TINY = fl.VARIANTS["flux-tiny-dev"]
DATA = data_folder() / "flux-tiny"
FEW = {"num_steps": 1, "height": 32, "width": 32, "progress": False}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder of tokenizers, as official folders have them."""
    folder = tmp_path_factory.mktemp("words")
    for name, own in (("tokenizer_2", "t5"), ("tokenizer", "clip")):
        (folder / name).symlink_to(DATA / own)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "all-in-one.safetensors"
    convert(TINY, path, "comfyui")
    return path


@pytest.fixture
def stranger(monkeypatch):
    """A variant of flux-tiny's sizes that is not carried in data/."""
    monkeypatch.setitem(fl.VARIANTS, "flux-dev", replace(TINY, name="flux-dev", repo="owner/name"))
    for part in ("t5", "clip"):
        monkeypatch.setitem(PUBLISHED, part, json.loads((DATA / part / "config.json").read_text()))


def same(pipe, tiny):
    pairs = ((pipe.model, tiny.model), (pipe.autoencoder, tiny.autoencoder))
    pairs += ((pipe.text.t5, tiny.text.t5), (pipe.text.clip, tiny.text.clip))
    return all(all(map(torch.equal, ours.parameters(), theirs.parameters())) for ours, theirs in pairs)


def test_a_bundle_is_told_part_by_part(bundle):
    result = CliRunner().invoke(app, ["which", str(bundle)])
    lines = [line.removeprefix(f"{bundle}: ") for line in result.output.splitlines()]
    numbers = f"{sum(p.numel() for p in fl.build('flux-tiny-dev', device='meta').parameters()):,} numbers"
    assert lines[0].startswith(
        "the transformer of flux-tiny-dev or flux-tiny-kontext-dev in the official layout; names"
    )
    assert lines[0].endswith(numbers)
    assert lines[1].startswith(
        "the autoencoder of flux-tiny-dev or flux-tiny-schnell or flux-tiny-fill-dev or flux-tiny-kontext-dev in the "
    )
    assert lines[2].startswith(
        "the T5 encoder of width 128 in the transformers layout; names after 'text_encoders.t5xx"
    )
    assert lines[3].startswith(
        "the CLIP text model in the transformers layout; names after 'text_encoders.clip_l.trans"
    )
    assert len(lines) == 4


def test_a_bundle_paints(bundle, tiny, words, stranger):
    pipe = fl.load("flux-dev", bundle, tokenizers=words, dtype=torch.float32)
    assert same(pipe, tiny)
    assert pipe.autoencoder.config == tiny.autoencoder.config
    assert fl.load("flux-tiny-dev", bundle).text.t5_length == TINY.t5_length  # with the tokenizers of data/


@pytest.mark.parametrize("within", ["", "name"])
def test_the_files_of_a_model_are_found_where_the_variable_points(tmp_path, tiny, words, stranger, monkeypatch, within):
    folder = tmp_path / "all"
    folder.parent.joinpath(within and "all").mkdir(exist_ok=True)
    convert(TINY, folder / within, "diffusers")
    monkeypatch.setenv("FLUXLAB_WEIGHTS", str(folder))
    assert same(fl.load("flux-dev", dtype=torch.float32), tiny)
    assert same(fl.load("flux-tiny-dev"), tiny)  # its own stay
    changed = {name: tensor + 1 for name, tensor in tiny.model.state_dict().items()}
    write_tensors(changed, tmp_path / "x.safetensors")  # one loose file: the rest comes from there
    pipe = fl.load("flux-dev", transformer=tmp_path / "x.safetensors", dtype=torch.float32)
    assert torch.equal(pipe.model.img_in.weight, tiny.model.img_in.weight + 1)
    monkeypatch.setenv("FLUXLAB_WEIGHTS", str(tmp_path / "away"))
    with pytest.raises(fl.WeightsError, match="away"):
        fl.load("flux-dev")


def test_loose_files_without_tokenizers_are_refused(bundle, stranger):
    loose = {"transformer": bundle, "autoencoder": bundle, "t5": bundle, "clip": bundle}
    message = (
        r"not found: t5_tokenizer \(tokenizer_2\), clip_tokenizer \(tokenizer\); give tokenizers=.*serve flux-tiny"
    )
    with pytest.raises(fl.WeightsError, match=message):
        fl.load("flux-dev", **loose)
    with pytest.raises(fl.WeightsError, match=r"not found: .*, clip \(text_encoder\), .*; give tokenizers="):
        fl.load("flux-dev", transformer=bundle, autoencoder=bundle, t5=bundle)


def test_loose_files_are_taken_in_place_of_the_sources(tmp_path, tiny, words, stranger):
    loose = {
        "transformer": ("model.diffusion_model.", tiny.model),
        "autoencoder": ("first_stage_model.", tiny.autoencoder),
        "t5": ("", tiny.text.t5),
        "clip": ("text_model.", tiny.text.clip),
    }
    for name, (prefix, module) in loose.items():
        tensors = {prefix + each: tensor for each, tensor in module.state_dict().items()}
        write_tensors(tensors, tmp_path / f"{name}.safetensors")
    files = {name: tmp_path / f"{name}.safetensors" for name in loose}
    assert same(fl.load("flux-dev", tokenizers=words, dtype=torch.float32, **files), tiny)
    changed = {name: tensor + 1 for name, tensor in tiny.model.state_dict().items()}
    write_tensors(changed, tmp_path / "x.safetensors")
    pipe = fl.load("flux-tiny-dev", transformer=tmp_path / "x.safetensors")
    assert torch.equal(pipe.model.img_in.weight, tiny.model.img_in.weight + 1)
    assert torch.equal(pipe.text.t5.shared.weight, tiny.text.t5.shared.weight)


@pytest.mark.parametrize("prefix", ["", "transformer.", "module.", "_orig_mod.", "model.diffusion_model."])
def test_prefixes_are_taken_off_and_said(tmp_path, tiny, prefix):
    for layout, tensors in (
        ("official", tiny.model.state_dict()),
        ("diffusers", to_diffusers(tiny.model.state_dict(), tiny.model.config)),
    ):
        write_tensors({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
        (part,) = which(tmp_path / "x.safetensors")
        assert (part.kind, part.layout, part.prefix, part.variants) == (
            "transformer",
            layout,
            prefix,
            ["flux-tiny-dev", "flux-tiny-kontext-dev"],
        )
        assert ("names after" in str(part)) == bool(prefix)


def test_parts_are_told_apart_without_being_read():
    file = data_folder() / "flux-tiny/ae.safetensors"
    part, again = which(file)[0], which(file)[0]
    assert part == part
    assert part != again
    assert len({part, again}) == 2


def test_variants_of_the_same_sizes_are_all_told(tmp_path):
    """Published: [dev], Krea and Kontext have the same tensors, 11,901,408,320 numbers; [schnell] has four fewer."""
    entries = fl.build("flux-dev", device="meta").state_dict()
    tensors = Tensors(tmp_path, entries, entries.get, kinds=dict.fromkeys(entries, "bfloat16"))
    told = Part("transformer", "official", "", tensors)
    assert str(told) == (
        "the transformer of flux-dev or flux-krea-dev or flux-kontext-dev in the official layout; bfloat16 (780); "
        "11,901,408,320 numbers"
    )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight": torch.ones(1)}, "this is no part of FLUX: a.weight"),
        ({}, "this is no part of FLUX: it is empty"),
        ({"vae.decoder.mid.attn_1.q.bias": torch.ones(1), "other.x": torch.ones(1)}, "1 tensors belong to no part"),
        (
            {
                "double_blocks.0.img_mod.lin.bias": torch.ones(1),
                "transformer.double_blocks.0.img_mod.lin.bias": torch.ones(1),
            },
            r"holds more than one transformer after \['', 'transformer.'\]; save the one that is meant alone",
        ),
    ],
)
def test_what_is_no_model_is_said(tmp_path, tensors, message):
    write_tensors(tensors, tmp_path / "x.safetensors")
    with pytest.raises(fl.WeightsError, match=message):
        which(tmp_path / "x.safetensors")
    result = CliRunner().invoke(app, ["which", str(tmp_path / "x.safetensors")])
    assert result.exit_code == 2


def test_a_file_of_another_part_says_which(tmp_path, tiny):
    write_tensors(tiny.autoencoder.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(
        fl.WeightsError, match=r"this is the autoencoder of flux-tiny-dev .* where the transformer was exp"
    ):
        fl.load("flux-tiny-dev", transformer=tmp_path / "x.safetensors")


def test_a_bundle_goes_back_to_folders(bundle, words, tmp_path, tiny):
    for to in ("official", "diffusers"):
        convert(TINY, tmp_path / to, to, bundle, tokenizers=words)
        assert same(fl.load("flux-tiny-dev", tmp_path / to), tiny)
    again = tmp_path / "again.safetensors"
    convert(TINY, again, "comfyui", tmp_path / "diffusers")
    first, second = Checkpoint(bundle), Checkpoint(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class TestTheHub:
    """What a download would cost is told first; nothing is asked of a network here."""

    def ask(self, monkeypatch, tmp_path, answer):
        asked = []

        def snapshot_download(repo, allow_patterns, dry_run):
            asked.append((allow_patterns, dry_run))
            if isinstance(answer, Exception):
                raise answer
            return answer if dry_run else str(tmp_path)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return asked

    def file(self, name, size, cached=False):
        from huggingface_hub import DryRunFileInfo

        return DryRunFileInfo("0", size, name, "", cached, not cached)

    def test_its_size_is_told(self, monkeypatch, tmp_path, capsys):
        files = [
            self.file("flux1-dev.safetensors", 23_800_000_000),
            self.file("transformer/diffusion_pytorch_model.safetensors", 23_800_000_000),
            self.file("ae.safetensors", 335_000_000, cached=True),
            self.file("text_encoder_2/model.safetensors", 9_500_000_000),
        ]
        asked = self.ask(monkeypatch, tmp_path, files)
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**12}))
        with pytest.raises(fl.WeightsError, match="not found in owner/name"):
            fl.load("flux-dev", "owner/name")
        assert "owner/name: 2 files to download, 33.3 GB, to " in capsys.readouterr().err
        assert "transformer" not in asked[-1][0]  # the official file is there: not the same again

    def test_without_a_network_the_cache_serves(self, monkeypatch, tmp_path):
        def snapshot_download(repo, allow_patterns, dry_run):
            if dry_run:
                raise OSError("offline")
            return str(tmp_path)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        with pytest.raises(fl.WeightsError, match="not found in owner/name: transformer"):
            fl.load("flux-dev", "owner/name")

    def test_a_full_disk_is_seen_before(self, monkeypatch, tmp_path):
        asked = self.ask(monkeypatch, tmp_path, [self.file("flux1-dev.safetensors", 23_800_000_000)])
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**10}))
        with pytest.raises(fl.WeightsError, match=r"23.8 GB, to .* \(10.0 GB free\); make room"):
            fl.load("flux-dev", "owner/name")
        assert [dry for _, dry in asked] == [True]

    def test_a_gated_repository_is_its_own_sentence(self, monkeypatch, tmp_path):
        import httpx
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        request = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co"))
        for kind, message in (
            (GatedRepoError, "this repository is gated; accept its licence at https://huggingface.co/owner/name, then"),
            (RepositoryNotFoundError, "neither a folder here nor a repository on the hub"),
        ):
            self.ask(monkeypatch, tmp_path, kind("said", response=request))
            with pytest.raises(fl.WeightsError, match=message):
                fl.load("flux-dev", "owner/name")


def test_shards_of_which_one_is_not_there_are_said(tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tensors({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(
        fl.WeightsError, match=r"model.safetensors.index.json: names 1 .* not there: model-00002-of-00002"
    ):
        which(tmp_path)
    write_tensors({"x": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(fl.WeightsError, match=r"1 missing: b; 1 unexpected: x"):
        which(tmp_path)


@pytest.mark.parametrize("part", ["t5", "clip"])
def test_an_encoders_folder_with_a_tokenizer_of_its_own_is_taken_with_it(tmp_path, part):
    """As of a flux-tiny that was trained anew, whose words are not those in data/."""
    shutil.copytree(data_folder() / "flux-tiny" / part, own := tmp_path / part)
    text = fl.load("flux-tiny-dev", **{part: own}).text
    assert Path({"t5": text.t5_tokenizer, "clip": text.clip_tokenizer}[part].name_or_path) == own
    for file in ("spiece.model", "tokenizer.json"):
        (own / file).unlink(missing_ok=True)
    text = fl.load("flux-tiny-dev", **{part: own}).text
    assert (
        Path({"t5": text.t5_tokenizer, "clip": text.clip_tokenizer}[part].name_or_path)
        == data_folder() / "flux-tiny" / part
    )
