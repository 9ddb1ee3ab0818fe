"""Every stage of the training, for two steps each."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import fluxlab as fl
from fluxlab.cli import app
from fluxlab.files import Checkpoint
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.tiny import train_autoencoder as first_stage
from fluxlab.tiny.distil import without_guidance
from fluxlab.tiny.loop import fit
from fluxlab.tiny.pictures import encode_pictures
from fluxlab.tiny.recipe import SCHNELL, SMOKE
from fluxlab.tiny.train import TEACHER, go_on_from, publish, train
from fluxlab.tiny.train_autoencoder import train_autoencoder
from fluxlab.tiny.train_flow import initialise, sample_grid, train_flow
from fluxlab.tiny.truth import OPTIONS, SLOTS, answer_loss, of_slots, of_tokens
from fluxlab.tiny.world import Scene, Thing, draw_scene
from fluxlab.weights.find import data_folder
from fluxlab.weights.load import load_weights
from tests.helpers import randomise


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
    with Image.open(output / "training/autoencoder-00001.png") as truth, Image.open(run / "flow-00001.png") as samples:
        assert truth.size == (8 * 128, 2 * 128)
        assert samples.size == (2 * 128, 128)
    with Image.open(output / "training/flow-00001.png") as published:
        assert published.size == samples.size  # the first row, whole
    fl.load_weights(fl.build("flux-tiny-schnell", device="meta"), output / "training/teacher.safetensors")
    measures = json.loads((output / "training/measures.json").read_text())
    assert {row["variant"] for row in measures} == {"flux-tiny-dev", "flux-tiny-schnell"}

    train(run, SMOKE, output)  # every stage is finished: nothing changes
    assert (output / "flux-tiny-dev.safetensors").read_bytes() == written


def test_a_run_goes_on_from_an_earlier_flux_tiny(tmp_path):
    folder = data_folder() / "flux-tiny"
    autoencoder, text = go_on_from(folder)
    encode_pictures(tmp_path, SMOKE, autoencoder, text)
    begun = load_weights(fl.build("flux-tiny-schnell", device="meta"), folder / TEACHER, dtype=torch.float32)
    before = [p.clone() for part in (begun, text.t5, text.clip) for p in part.parameters()]
    learned = train_flow(tmp_path, SMOKE, autoencoder, text, folder / TEACHER)
    after = [p for part in (learned, text.t5, text.clip) for p in part.parameters()]
    far = [(a - b).abs().max().item() for a, b in zip(after, before, strict=True)]
    assert max(far) < 0.1  # two steps from there, where new weights are zero or random
    assert sum(each > 0 for each in far) > 0.9 * len(far)  # and all of it learns
    assert not any(block._forward_hooks for block in learned.single_blocks)
    publish_to = tmp_path / "data/flux-tiny"
    (tmp_path / "recipe.json").write_text("{}\n")
    publish(tmp_path, publish_to, [Pipeline(SCHNELL, learned, autoencoder, text)], learned)
    assert {file.name for file in (publish_to / "t5").iterdir()} == {file.name for file in (folder / "t5").iterdir()}
    assert {file.name for file in (publish_to / "clip").iterdir()} == {
        file.name for file in (folder / "clip").iterdir()
    }
    kept, given = Checkpoint(publish_to / "ae.safetensors"), Checkpoint(folder / "ae.safetensors")
    assert kept.metadata.items() >= given.metadata.items()
    assert all(torch.equal(kept[name], given[name]) for name in given.entries)


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
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(SMOKE) | {"earlier": False}))
    with pytest.raises(ValueError, match=r"another recipe \(then, now\): {'earlier': \(False, '[0-9a-f]{8}'\)}"):
        train(tmp_path, SMOKE, earlier=data_folder() / "flux-tiny")


def test_what_a_training_cannot_begin_with_is_said_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    arguments = {
        "no training/teacher.safetensors; give": ["--earlier", tmp_path, "--run", tmp_path / "r"],
        "file": ["--run", tmp_path / "r", "--output", tmp_path / "file"],
        "file/training": ["--run", tmp_path / "r", "--output", tmp_path / "file", "--member", "fill"],
        "'--seed'": ["--run", tmp_path / "r", "--seed", -1],
    }
    for said, given in arguments.items():
        result = CliRunner().invoke(app, ["train-tiny", "--smoke", *map(str, given)])
        assert result.exit_code == 2
        assert said in result.output
    assert not (tmp_path / "r/recipe.json").exists()


def small(seed=0):
    """A weight for each of the optimizers."""
    torch.manual_seed(seed)
    block = nn.ModuleDict({"img_mlp": nn.Sequential(nn.Linear(3, 3))})  # the glossary knows what this one is for
    return nn.ModuleDict({"double_blocks": nn.ModuleList([block]), "out": nn.Linear(3, 1)})


def loss_of(module, seen=None, most=4):
    def loss(generator):
        if seen is not None:
            seen.append([p.detach().clone() for p in module.parameters()])
            if len(seen) > most:
                raise KeyboardInterrupt
        hidden = module["double_blocks"][0]["img_mlp"](torch.randn(5, 3, generator=generator))
        return module["out"](hidden).square().mean()

    return loss


def test_what_is_left_and_what_a_preview_sees_are_the_averaged_weights(tmp_path):
    module, seen, previewed = small(), [], []
    recipe = replace(SMOKE, save_every=3)

    def preview(path):
        previewed.append((path.name, [p.detach().clone() for p in module.parameters()]))

    fit("x", module, loss_of(module, seen, 10), 4, 0.1, tmp_path, recipe, preview)
    saved = Checkpoint(tmp_path / "x.state.safetensors")
    seen.append([saved[f"{i}.value"] for i in range(4)])
    average = [p.double() for p in seen[0]]
    for step, values in enumerate(seen[1:]):
        decay = (1 + step) / (10 + step)
        average = [decay * mean + (1 - decay) * value for mean, value in zip(average, values, strict=True)]
        if step == 2:
            halfway = average
    assert [name for name, _ in previewed] == ["x-00003.png", "x-00004.png"]
    for expected, found in ((halfway, previewed[0][1]), (average, previewed[1][1]), (average, module.parameters())):
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b.detach().double(), a, atol=1e-6, rtol=1e-6)
    assert not any(p.requires_grad for p in module.parameters())


def test_both_optimizers_go_on_where_they_were_stopped(tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    recipe = replace(SMOKE, save_every=2)
    at_once, stopped, resumed = small(), small(), small(seed=1)
    fit("x", at_once, loss_of(at_once), 6, 0.1, whole, recipe)
    with pytest.raises(KeyboardInterrupt):
        fit("x", stopped, loss_of(stopped, [], most=4), 6, 0.1, halves, recipe)
    fit("x", resumed, loss_of(resumed), 6, 0.1, halves, recipe)
    assert all(torch.equal(a, b) for a, b in zip(at_once.parameters(), resumed.parameters(), strict=True))
    a, b = (Checkpoint(run / "x.state.safetensors") for run in (whole, halves))
    assert {name.rpartition(".")[2] for name in a.entries} > {"value", "average", "exp_avg", "momentum_buffer"}
    assert all(torch.equal(a[name], b[name]) for name in a.entries)


@pytest.mark.parametrize(("number", "shape"), [(9, (1, 9)), (24, (8, 3)), (2, (2, 1))])
def test_any_number_of_samples_makes_a_grid(tmp_path, number, shape):
    class Painter(Pipeline):
        def __init__(self):
            pass

        def __call__(self, prompts, **_):
            return [Image.new("RGB", (16, 16), (i, 0, 0)) for i in range(len(prompts))]

    sample_grid(Painter(), number, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (16 * shape[0], 16 * shape[1])
        assert np.asarray(grid)[::16, ::16, 0].ravel().tolist() == list(range(number))


def test_a_record_has_each_step_once(tmp_path):
    """What was noted after the last save is done again."""
    (tmp_path / "x.jsonl").write_text('{"step": 1}\n')
    module = nn.Linear(1, 1)
    fit("x", module, lambda _: module.weight.sum(), 2, 1e-3, tmp_path, SMOKE)
    assert [json.loads(line)["step"] for line in (tmp_path / "x.jsonl").read_text().splitlines()] == [1, 2]


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
        for rows in of_slots([two, one]).tolist()
    ]
    nothing = ("nothing",) * 3
    assert held[0]["top"] == ("red", "circle", "small")
    assert held[0]["bottom"] == ("pink", "star", "large")
    assert held[0]["left"] == held[0]["center"] == nothing
    assert held[0]["background"] == ("navy",)
    assert held[1]["center"] == ("cyan", "ring", "large")
    assert held[1]["top"] == nothing


def test_the_truth_of_image_tokens_names_what_covers_each():
    scene = Scene((Thing("circle", "red", "small"), Thing("star", "pink", "large")), "above", "navy")
    right = of_tokens(draw_scene(scene, np.random.default_rng(0), 128, 192)).reshape(8, 12, 4)
    words = [options[i] for options, i in zip(OPTIONS, right[0, 0].tolist(), strict=True)]
    assert words == ["nothing", "nothing", "nothing", "navy"]
    columns = [{(OPTIONS[0][c], OPTIONS[1][s]) for c, s in zip(*row[:, :2].T.tolist(), strict=True)} for row in right]
    nothing = ("nothing", "nothing")
    assert columns[2] == {nothing, ("red", "circle")}
    assert columns[5] == {nothing, ("pink", "star")}
    assert columns[0] == {nothing}


def test_answers_that_are_right_cost_nothing_and_unasked_questions_do_not_count():
    scene = Scene((Thing("ring", "cyan", "large"),), "center", "white")
    right = of_slots([scene])
    told = torch.cat([F.one_hot(right[..., i].clamp(0), len(words)) for i, words in enumerate(OPTIONS)], dim=-1).float()
    assert answer_loss(50 * told, right) < 1e-6
    assert answer_loss(-50 * told, right) > 10
    unasked = told.clone()
    unasked[0, 0, -4:] = torch.randn(4)  # the background of a place
    assert answer_loss(50 * unasked, right) < 1e-6
