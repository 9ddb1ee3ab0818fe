"""Each picture is drawn, with named axes, from what it says it is drawn from."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

import fluxlab as fl
from fluxlab.inspect.explore import explore, view
from tests.helpers import randomise

NAMES = ["*.output", "*mod*.shift*", "*mod*.scale*", "*mod*.gate*", "*.attention", "double_blocks.0.q"]


@pytest.fixture(scope="module")
def tape():
    model = randomise(fl.build("flux-tiny-dev"))
    with torch.no_grad(), fl.capture(model, NAMES) as tape:
        model(**fl.example_inputs("flux-tiny-dev").kwargs())
    return tape


def pictures(tape):
    yield fl.plots.rotation()
    yield fl.plots.tensor_map(tape["double_blocks.0.q"], "q")


def test_every_picture_is_drawn_and_none_is_left_open(tape):
    for figure in pictures(tape):
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        assert len(Image.open(drawn).convert("RGB").getcolors(1 << 24)) > 10  # not an empty page
        for axes in figure.axes:
            assert not axes.axison or axes.get_xlabel() or axes.get_ylabel()
    assert plt.get_fignums() == []


def test_signed_values_are_centred_on_zero():
    figure = fl.plots.tensor_map(torch.tensor([[-1.0, 3.0], [0.5, 0.0]]))
    low, high = figure.axes[0].images[0].get_clim()
    assert low == -high < 0


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_colours_are_scaled_by_what_is_finite(bad):
    values = torch.linspace(-2, 2, 64).reshape(8, 8)
    values[3, 3] = bad
    low, high = fl.plots.tensor_map(values).axes[0].images[0].get_clim()
    assert low == -high
    assert 1.9 < high <= 2
    fl.plots.tensor_map(torch.full((2, 2), bad))


@pytest.mark.parametrize("tensor", [torch.tensor([[True, False]]), torch.arange(6).reshape(2, 3), torch.tensor(3)])
def test_a_tensor_of_any_kind_is_drawn(tensor):
    assert fl.plots.tensor_map(tensor).axes[0].images[0].get_array().size == tensor.numel()


def test_nothing_to_draw_is_said():
    with pytest.raises(ValueError, match=r"tensor has shape \(0, 3\)"):
        fl.plots.tensor_map(torch.zeros(0, 3))


def test_the_menus_choose_what_is_shown(tape):
    pytest.importorskip("ipywidgets")
    shown = explore(tape, words=["a", "red"])
    box = shown.box
    controls = {control.description: control for row in box.children[:2] for control in row.children}
    assert list(controls) == ["tensor", "block", "step", "head", "word"]
    bundle = shown._repr_mimebundle_()  # a page without widgets takes the picture
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(bundle)
    controls["tensor"].value = "double_blocks.*.attention"
    assert list(controls["block"].options) == ["0", "1"]
    controls["block"].value = "1"
    assert controls["head"].options == ("0", "1", "2", "3")
    controls["head"].value = "2"
    controls["tensor"].value = "single_blocks.*.attention"
    assert controls["head"].value == "2"
    controls["tensor"].value = "double_blocks.*.img.output"
    assert controls["head"].options == ("0",)
    with pytest.raises(ValueError, match="tape is empty"):
        explore(fl.Tape())


@pytest.mark.parametrize(
    ("kept", "names", "title"),
    [
        ({"heads": [1, 3]}, ("1", "3"), "double_blocks.0.attention, head 1"),
        ({"heads": [1, 3], "mean_heads": True}, ("mean",), "double_blocks.0.attention, mean of heads"),
    ],
)
def test_heads_are_called_what_they_are_in_the_model(tmp_path, kept, names, title):
    model = fl.build("flux-tiny-dev")
    with torch.no_grad(), fl.capture(model, ["double_blocks.0.attention", "double_blocks.0.q"], **kept) as tape:
        model(**fl.example_inputs("flux-tiny-dev").kwargs())
    tape.save(tmp_path / "tape")
    for each in (tape, fl.Tape.load(tmp_path / "tape")):
        shown = explore(each)
        controls = {control.description: control for row in shown.box.children[:2] for control in row.children}
        controls["tensor"].value = "double_blocks.*.attention"
        assert controls["head"].options == names
        controls["tensor"].value = "double_blocks.*.q"
        assert len(controls["head"].options) == 4  # of which all are kept
    with torch.no_grad(), fl.capture(model, "double_blocks.0.attention", **kept) as alone:
        model(**fl.example_inputs("flux-tiny-dev").kwargs())
    assert explore(alone)._picture.axes[0].get_title().startswith(title)


def test_only_steps_in_which_a_tensor_was_made_are_offered():
    tape = fl.Tape()
    tape.put("vec", 0, torch.rand(1, 4))
    for i in (0, 2):
        tape.put("velocity", i, torch.rand(1, 4, 4))
    controls = {c.description: c for row in explore(tape).box.children[:2] for c in row.children}
    controls["tensor"].value = "velocity"
    controls["step"].value = 2
    controls["tensor"].value = "vec"
    assert controls["step"].options == (0,)


def test_a_word_narrows_attention_to_its_column(tape):
    weights = tape["double_blocks.0.attention"]
    one = view(weights, "double_blocks.0.attention", head=2, word=5).axes[0].images[0].get_array()
    assert one.shape == (1, weights.shape[2])
    np.testing.assert_allclose(one[0], weights[0, 2, :, 5], rtol=1e-6)


def test_words_need_the_columns_of_the_text(tiny, tmp_path):
    with fl.capture(tiny.model, "*.attention", keys="image", forwards=[0]) as tape:
        tiny("a red ring", num_steps=1, progress=False)
    tape.save(tmp_path / "x.safetensors")
    for each in (tape, fl.Tape.load(tmp_path / "x.safetensors")):
        with pytest.raises(ValueError, match="words name the text's tokens"):
            explore(each, ["a", "red"])


def test_more_words_than_columns_are_refused(tiny):
    with fl.capture(tiny.model, "*attention", keys=slice(0, 4)) as tape:
        tiny("a", num_steps=1, height=64, width=64, progress=False)
    with pytest.raises(ValueError, match="there are 8 words, and capture's keys left 4 columns"):
        fl.explore(tape, list("abcdefgh"))
