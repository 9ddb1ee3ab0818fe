"""Every stage of the training, for two steps each."""

import json

import pytest
import torch

import fluxlab as fl
from fluxlab.tiny import train_autoencoder as first_stage
from fluxlab.tiny.distil import without_guidance
from fluxlab.tiny.pictures import encode_pictures
from fluxlab.tiny.recipe import SMOKE
from fluxlab.tiny.text import train_tokenizers
from fluxlab.tiny.train import train
from fluxlab.tiny.train_autoencoder import train_autoencoder
from fluxlab.tiny.train_flow import initialise, train_flow
from fluxlab.tiny.train_text import OPTIONS, SLOTS, train_text, truth
from fluxlab.tiny.world import Scene, Thing
from fluxlab.weights.files import Checkpoint
from fluxlab.weights.find import data_folder
from fluxlab.weights.load import load_weights
from tests.conftest import randomise


def test_all_stages_run_resume_and_write_what_the_library_loads(tmp_path, monkeypatch):
    run, output = tmp_path / "run", tmp_path / "data/flux-tiny"
    train(run, SMOKE, output)
    written = (output / "flux-tiny-dev.safetensors").read_bytes()

    monkeypatch.setenv("FLUXLAB_DATA", str(output.parent))
    assert fl.load("flux-tiny-schnell")("a ring", num_steps=1, progress=False).size == (128, 128)
    loaded = fl.load("flux-tiny-dev")
    assert loaded("a ring", num_steps=1, progress=False).size == (128, 128)
    factors = Checkpoint(output / "ae.safetensors").metadata  # a training's own, not those of the one in data/
    assert loaded.autoencoder.config.scale_factor == float(factors["scale_factor"])
    assert loaded.autoencoder.config.shift_factor == float(factors["shift_factor"])
    record = {path.name for path in (output / "training").iterdir()}
    assert record >= {
        "recipe.json",
        "text.jsonl",
        "flow.jsonl",
        "guidance.jsonl",
        "steps.jsonl",
        "flow-00001.png",
        "steps-00002.png",
    }
    fl.load_weights(fl.build("flux-tiny-schnell", device="meta"), output / "training/teacher.safetensors")
    measures = json.loads((output / "training/measures.json").read_text())
    assert {row["variant"] for row in measures} == {"flux-tiny-dev", "flux-tiny-schnell"}

    train(run, SMOKE, output)  # every stage is finished: nothing changes
    assert (output / "flux-tiny-dev.safetensors").read_bytes() == written


def test_the_flow_goes_on_from_an_earlier_teacher(tmp_path, tiny):
    train_tokenizers(tmp_path, 0)
    autoencoder = tiny.autoencoder
    encode_pictures(tmp_path, SMOKE, autoencoder)
    earlier = data_folder() / "flux-tiny/training/teacher.safetensors"
    text = train_text(tmp_path, SMOKE)
    begun = load_weights(fl.build("flux-tiny-schnell", device="meta"), earlier, dtype=torch.float32).state_dict()
    learned = train_flow(tmp_path, SMOKE, autoencoder, text, teacher=earlier).state_dict()
    far = {name: (learned[name] - begun[name]).abs().max().item() for name in begun}
    assert max(far.values()) < 0.1  # two steps from there, where a new one is zero or random
    assert max(far.values()) > 0


def test_a_stage_that_was_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for run in (whole, halves):
        run.mkdir()
    at_once = train_autoencoder(whole, SMOKE)

    class StoppedError(Exception):
        pass

    def stop(*_):
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(first_stage, "save_grid", stop)
        with pytest.raises(StoppedError):
            train_autoencoder(halves, SMOKE)
    assert int(Checkpoint(halves / "autoencoder.state.safetensors")["step"]) == 1
    in_halves = train_autoencoder(halves, SMOKE)
    assert all(torch.equal(a, b) for a, b in zip(at_once.parameters(), in_halves.parameters(), strict=True))


def test_a_run_is_not_mixed_with_another_recipe(tmp_path):
    (tmp_path / "recipe.json").write_text('{"seed": 1}')
    with pytest.raises(ValueError, match=r"was begun with another recipe .* name another folder"):
        train(tmp_path, SMOKE)


def test_a_new_model_predicts_zero_and_each_block_is_the_identity():
    model = initialise(fl.build("flux-tiny-schnell"))
    inputs = fl.example_inputs("flux-tiny-schnell")
    with torch.no_grad():
        assert not model(**inputs.kwargs()).any()
        x, vec = torch.randn(1, 96, 128), torch.randn(1, 128)
        pe = model.pe_embedder(torch.cat((inputs.txt_ids, inputs.img_ids), dim=1))
        assert torch.equal(model.single_blocks[0](x, vec, pe), x)


def test_without_its_embedder_the_model_is_the_same_at_that_guidance():
    dev = randomise(fl.build("flux-tiny-dev"))
    inputs = fl.example_inputs("flux-tiny-dev").kwargs() | {"guidance": torch.tensor([3.0])}
    with torch.no_grad():
        guided = dev(**inputs)
        inputs.pop("guidance")
        torch.testing.assert_close(without_guidance(dev, 3.0)(**inputs), guided, atol=1e-5, rtol=1e-5)


def test_the_truth_of_a_caption_names_what_each_place_holds():
    two = Scene((Thing("circle", "red", "small"), Thing("star", "pink", "large")), "above", "navy")
    one = Scene((Thing("ring", "cyan", "large"),), "center", "white")
    held = [
        {
            slot: tuple(words[i] for words, i in zip(OPTIONS, row, strict=True) if i >= 0)
            for slot, row in zip(SLOTS, rows, strict=True)
        }
        for rows in truth([two, one]).tolist()
    ]
    nothing = ("nothing",) * 3
    assert held[0]["top"] == ("red", "circle", "small")
    assert held[0]["bottom"] == ("pink", "star", "large")
    assert held[0]["left"] == held[0]["center"] == nothing
    assert held[0]["background"] == ("navy",)
    assert held[1]["center"] == ("cyan", "ring", "large")
    assert held[1]["top"] == nothing
