"""Comparing finds where two runs part, and tells rounding from a mistake."""

import copy
from dataclasses import replace

import pytest
import torch

import fluxlab as fl
from fluxlab.model.modulation import Modulation, ModulationOut
from fluxlab.weights.layouts import to_diffusers
from tests.helpers import SMALL, randomise, small_inputs
from tests.model.test_against_diffusers import diffusers_transformer


class WithOpenGate(Modulation):
    def forward(self, vec):
        first, second = super().forward(vec)
        return ModulationOut(first.shift, first.scale, 1 + first.gate), second


@pytest.fixture(scope="module")
def model():
    return randomise(fl.Flux(SMALL))


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(1)
    return fl.FluxInputs(
        img=torch.randn(2, 12, 64, generator=g),
        img_ids=fl.image_ids(2, 48, 64),
        txt=torch.randn(2, 5, 40, generator=g),
        txt_ids=fl.text_ids(2, 5),
        timesteps=torch.tensor([0.9, 0.2]),
        y=torch.randn(2, 24, generator=g),
        guidance=torch.tensor([3.5, 1.0]),
    )


def test_a_model_is_the_same_as_itself(model, inputs):
    found = fl.compare(model, model, inputs)
    assert found.first is None
    assert len(found.table) > 100
    assert {row["float32, largest"] for row in found.table} == {0.0}


@pytest.mark.parametrize("there_and_back", [False, True])
def test_diffusers_gives_the_same_under_our_names(model, inputs, there_and_back):
    theirs = diffusers_transformer(SMALL, torch.float32)
    theirs.load_state_dict(to_diffusers(model.state_dict(), SMALL))
    found = fl.compare(theirs, model, inputs) if there_and_back else fl.compare(model, theirs, inputs)
    assert found.first is None
    assert {"img_in", "double_blocks.1.txt_attn.qkv", "single_blocks.2.norm.key_norm", "velocity"} <= set(
        found.table.column("name")
    )
    wide, narrow = (max(found.table.column(f"{kind}, relative")) for kind in ("float64", "float32"))
    assert wide < 1e-6  # diffusers keeps RoPE and RMSNorm in float32 there, ours does not
    assert narrow < 1e-5


def test_the_layer_whose_weights_differ_is_found(model, inputs):
    theirs = diffusers_transformer(SMALL, torch.float32)
    weights = to_diffusers(model.state_dict(), SMALL)
    weights["single_transformer_blocks.1.proj_mlp.bias"] = weights["single_transformer_blocks.1.proj_mlp.bias"] + 0.1
    theirs.load_state_dict(weights)
    found = fl.compare(model, theirs, inputs)
    assert found.first == "single_blocks.1.linear1"
    assert "they part at single_blocks.1.linear1" in repr(found)


def test_a_mistake_of_ones_own_is_found(model, inputs):
    """The gate of the second block with 1 added, as the scale has it."""
    mine = copy.deepcopy(model)
    mine.double_blocks[1].img_mod.__class__ = WithOpenGate
    assert fl.compare(model, mine, inputs).first == "double_blocks.1.img.middle"


def test_tapes_and_dicts_are_compared_by_name(model, inputs):
    with torch.no_grad(), fl.capture(model, "double_blocks.0.img.*") as tape:
        model(**inputs.kwargs())
    by_hand = {"double_blocks.0.img.middle": tape["double_blocks.0.img.middle"] + 1e-3}
    found = fl.compare(tape, by_hand)
    assert found.first == "double_blocks.0.img.middle"
    assert found.table[0]["largest"] == pytest.approx(1e-3, rel=1e-2)


def test_what_is_not_a_number_is_a_difference():
    a = {"x": torch.ones(3)}
    assert fl.compare(a, {"x": torch.tensor([1, float("nan"), 1])}).first == "x"


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ({"x": torch.ones(1)}, {"y": torch.ones(1)}, "no name in common"),
        ({"x": torch.ones(1)}, {"x": torch.ones(2)}, r"\(1,\) in a and \(2,\) in b"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(a, b, said):
    with pytest.raises(ValueError, match=said):
        fl.compare(a, b)


def test_a_wrapped_model_is_not_taken_for_diffusers(model, inputs):
    with pytest.raises(ValueError, match="no name in common"):
        fl.compare(model, torch.optim.swa_utils.AveragedModel(model), inputs)


def test_a_module_without_inputs_is_refused(model):
    with pytest.raises(ValueError, match="inputs is None"):
        fl.compare(model, model)


def test_sampling_runs_are_compared_forward_by_forward(model, inputs):
    def run(model, change=0.0):
        with torch.no_grad(), fl.capture(model, ["velocity", "vec"]) as tape:
            for i in range(12):
                model(**inputs.kwargs() | {"guidance": inputs.guidance + change * (i == 10)})
        return tape

    one, same, other = run(model), run(model), run(model, 0.5)
    assert fl.compare(one, one).first is None
    assert fl.compare(one, same).first is None
    found = fl.compare(one, other)
    assert found.first == "10/vec"
    assert found.table.column("name") == [f"{i}/{name}" for i in range(12) for name in ("vec", "velocity")]


@pytest.mark.usefixtures("as_users_run_it")
def test_a_compiled_model_is_compared_as_the_plain_one(model, inputs):
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    assert fl.compare(model, compiled, inputs).first is None
    assert fl.compare(compiled, model, inputs).first is None


class Scaled(torch.nn.Module):
    def __init__(self, by):
        super().__init__()
        self.lin, self.by = torch.nn.Linear(4, 4), by

    def forward(self, x):
        return self.lin(x) * self.by


def test_a_module_s_own_output_is_compared_too():
    once, twice = Scaled(1), Scaled(2)
    twice.load_state_dict(once.state_dict())
    found = fl.compare(once, twice, {"x": torch.randn(2, 4)})
    assert ([row["name"] for row in found.table], found.first) == (["lin", "output"], "output")
    linear = torch.nn.Linear(4, 4)
    assert fl.compare(linear, linear, {"input": torch.randn(2, 4)}).first is None
    assert (
        fl.compare(torch.nn.Sequential(linear), torch.nn.Sequential(linear), {"input": torch.randn(2, 4)}).first is None
    )


@pytest.mark.usefixtures("as_users_run_it")
def test_what_has_no_numbers_is_said(model, inputs):
    with pytest.raises(ValueError, match="inputs is a tensor"):
        fl.compare(model, model, inputs.img)
    with pytest.raises(ValueError, match="x is on the meta device"):
        fl.compare({"x": torch.empty(2, device="meta")}, {"x": torch.ones(2)})
    assert fl.compare({"x": torch.ones(0)}, {"x": torch.ones(0)}).first is None


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_compared_is_said():
    with pytest.raises(ValueError, match="tolerance is 'a'; give a number from 0"):
        fl.compare({"a": torch.ones(1)}, {"a": torch.ones(1)}, tolerance="a")
    with pytest.raises(ValueError, match="a is a int, where a tensor was expected"):
        fl.compare({"a": 3}, {"a": 3})


def test_imaginary_parts_count():
    with_i, other = torch.tensor([1 + 1j]), torch.tensor([1 - 1j])
    found = fl.compare({"a": with_i}, {"a": other})
    assert found.first == "a"
    assert found.table[0]["largest"] == 2
    assert fl.compare({"a": with_i}, {"a": with_i}).first is None


def test_an_input_that_is_none_is_left_out():
    config = replace(SMALL, guidance_embed=False)
    model = randomise(fl.Flux(config))
    inputs = small_inputs(config=config)
    assert inputs["guidance"] is None
    assert fl.compare(model, copy.deepcopy(model), inputs).first is None
