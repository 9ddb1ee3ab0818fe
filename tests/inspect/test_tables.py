"""The tables against the published counts and against PyTorch's own flop counter."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fluxlab as fl
from fluxlab.glossary import named
from fluxlab.inspect.table import Table


def value(table, key, column):
    (row,) = (row for row in table if next(iter(row.values())) == key)
    return row[column]


PUBLISHED = {  # part: parameters of flux-dev, from the reference implementation's checkpoint
    "img_in": 199_680,
    "txt_in": 12_585_984,
    "time_in": 10_229_760,
    "guidance_in": 10_229_760,
    "vector_in": 11_802_624,
    "19 × double block": 19 * 339_831_296,
    "38 × single block": 38 * 141_591_808,
    "final_layer": 19_077_184,
    "all": 11_901_408_320,
}


def test_the_parts_have_the_published_numbers():
    table = fl.parameter_table("flux-dev")
    assert {row["part"]: row["parameters"] for row in table} == PUBLISHED


def test_modulation_is_more_than_a_quarter():
    table = fl.parameter_table("flux-dev", by="kind")
    assert value(table, "modulation", "parameters") == 3_247_448_064
    assert value(table, "modulation", "share") == "27.29%"
    assert sum(table.column("parameters")[:-1]) == value(table, "all", "parameters") == 11_901_408_320


@pytest.mark.parametrize("name", ["flux-schnell", "flux-fill-dev", "flux-tiny-dev"])
@pytest.mark.parametrize("by", ["part", "kind"])
def test_every_table_sums_to_what_the_model_has(name, by):
    table = fl.parameter_table(name, by)
    assert table[-1]["parameters"] == sum(p.numel() for p in fl.build(name, device="meta").parameters())


def test_another_way_to_cut_is_refused(as_users_run_it):
    with pytest.raises(ValueError, match="'part' or 'kind'"):
        fl.parameter_table("flux-dev", by="layer")


@pytest.mark.parametrize(
    ("name", "height", "width", "text", "batch"),
    [
        ("flux-dev", 1024, 1024, 512, 1),
        ("flux-dev", 512, 512, 512, 2),
        ("flux-schnell", 768, 1360, 256, 1),
        ("flux-tiny-dev", 128, 192, None, 3),
    ],
)
def test_operations_equal_the_flop_counter(name, height, width, text, batch):
    model = fl.build(name, device="meta")
    inputs = fl.example_inputs(name, height=height, width=width, batch=batch, device="meta").kwargs()
    if text is not None:
        inputs |= {key: inputs[key][:, :1].expand(-1, text, -1) for key in ("txt", "txt_ids")}
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert fl.flops(name, height, width, text, batch)[-1]["GFLOP"] * 1e9 == pytest.approx(
        counter.get_total_flops(), rel=1e-3
    )


def test_the_published_cost_at_1024():
    table = fl.flops("flux-dev", 1024, 1024)
    attention = sum(row["GFLOP"] for row in table if "attention" in row["part"])
    assert (table[-1]["GFLOP"] - attention) / 1e3 == pytest.approx(59.5, abs=0.05)
    assert attention / 1e3 == pytest.approx(14.9, abs=0.05)


@pytest.mark.parametrize("count", [fl.flops, fl.memory])
def test_a_partial_token_counts_whole(count):
    assert repr(count("flux-tiny-dev", 100, 100)) == repr(count("flux-tiny-dev", 112, 112))


WRONG = [("batch", -1), ("text_tokens", -5), ("text_tokens", 0), ("text_tokens", 2.5)]
WRONG += [("height", 0), ("width", 100.5), ("width", "128")]


@pytest.mark.parametrize("count", [fl.flops, fl.memory])
@pytest.mark.parametrize(("size", "given"), WRONG)
def test_a_size_that_is_none_is_refused(count, size, given, as_users_run_it):
    with pytest.raises(ValueError, match=f"{size} is {given!r}; it must be a whole number of at least 1"):
        count("flux-tiny-dev", **{size: given})


@pytest.mark.usefixtures("as_users_run_it")
def test_a_batch_of_names_that_is_none_is_refused():
    for given in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"batch is {given!r}; it must be a whole number of at least 1"):
            fl.tensor_names("flux-tiny-dev", batch=given)


@pytest.mark.parametrize("name", ["flux-dev", "flux-tiny-schnell"])
def test_memory_counts_what_is_there(name):
    table = fl.memory(name)
    assert value(table, "weights: transformer", "numbers") == fl.parameter_table(name)[-1]["parameters"]
    shapes = {row["name"]: row["shape"] for row in fl.tensor_names(name)}
    for what, tensor in (
        ("residual stream", "single_blocks.0.input"),
        ("a double block's MLP hidden", "double_blocks.0.img_mlp.1"),
        ("a single block's linear1", "single_blocks.0.linear1"),
        ("attention weights, if ever whole", "single_blocks.0.attention"),
    ):
        assert value(table, f"tensor: {what}", "numbers") == torch.Size(shapes[tensor]).numel()


def test_memory_of_the_published_parts():
    table = fl.memory("flux-dev", 1024, 1024)
    assert value(table, "weights: T5 encoder", "numbers") == 4_762_310_656
    assert value(table, "weights: CLIP text", "numbers") == 123_060_480
    assert value(table, "weights: VAE", "numbers") == 83_819_683
    assert value(table, "weights: transformer", "bfloat16") == pytest.approx(23.8, abs=0.01)
    assert value(table, "tensor: attention weights, if ever whole", "float32") * 1e9 == 24 * 4608**2 * 4


def test_the_summary_is_right_on_the_meta_device_and_shows_no_multiply_adds():
    table = fl.summary("flux-dev", depth=1)
    assert table.title == "11,901,408,320 parameters"
    assert value(table, "img_in", "output") == (1, 4096, 3072)
    assert "mult" not in repr(table).lower()
    assert len(fl.summary("flux-tiny-dev", depth=4)) > len(fl.summary("flux-tiny-dev", depth=2))


def test_a_summary_does_not_follow_the_defaults_of_torch():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert value(fl.summary("flux-dev", depth=1), "img_in", "output") == (1, 4096, 3072)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("depth", [-1, 2.5, "3"])
def test_a_depth_that_is_none_is_refused(depth):
    with pytest.raises(ValueError, match=r"^depth is .*; it must be a whole number of at least 0"):
        fl.summary("flux-tiny-dev", depth=depth)


def test_a_summary_of_any_module():
    config = fl.variant("flux-tiny-dev").autoencoder
    table = fl.summary(fl.AutoEncoder(config).decoder, torch.zeros(1, 16, 4, 4), depth=1)
    assert value(table, "conv_in", "output") == (1, 64, 4, 4)
    with pytest.raises(ValueError, match="inputs is None"):
        fl.summary(torch.nn.Linear(2, 2))


def test_a_variants_summary_takes_other_inputs_than_the_usual():
    inputs = fl.example_inputs("flux-tiny-dev", height=64, width=64, device="meta")
    assert value(fl.summary("flux-tiny-dev", inputs.kwargs(), depth=1), "img_in", "output") == (1, 16, 128)


def test_a_summary_leaves_the_modes_as_they_were_and_needs_no_parameters():
    net = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU())
    net[0].eval()
    assert len(fl.summary(net, torch.zeros(1, 2, device="meta"))) == 3
    assert [module.training for module in net.modules()] == [True, False, True]


def test_a_table_is_rows_for_pandas_and_text_for_readers():
    table = Table([{"name": "a", "n": 1234567, "x": 0.123456}, {"name": "b<", "n": None, "x": 12345.678}], "Title")
    assert table.column("n") == [1234567, None]
    assert repr(table).splitlines()[0] == "Title"
    assert repr(table).splitlines()[3].split() == ["a", "1,234,567", "0.1235"]
    assert "b&lt;" in table._repr_html_()
    assert 'style="white-space:pre-wrap;' in table._repr_html_()  # the indentation of a tree is kept
    assert repr(Table([])) == "empty"


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell", "flux-fill-dev", "flux-tiny-schnell"])
def test_the_glossary_has_every_weight_with_its_shape_and_no_other(name):
    model = fl.build(name, device="meta")
    listed = {each: entry.shape(model.config) for each, entry in named(model.config, "weight").items()}
    assert listed == {each: tuple(weight.shape) for each, weight in model.state_dict().items()}


def test_the_modulations_that_flux_2_shares_are_modulation():
    table = fl.flops("flux2-dev")
    modulation = sum(row["GFLOP"] for row in table if "modulation" in row["part"])
    c = fl.build("flux2-dev", device="meta").config
    assert modulation == pytest.approx(2 * (6 + 6 + 3) * c.hidden_size**2 / 1e9)


def test_a_model_whose_weights_stay_in_their_file_has_no_summary():
    pipe = fl.load("flux-tiny-dev", low_memory=True)
    with pytest.raises(ValueError, match="model keeps its weights in their file"):
        fl.summary(pipe.model, fl.example_inputs("flux-tiny-dev"))


@pytest.mark.usefixtures("as_users_run_it")
def test_a_pipeline_is_no_module(tiny):
    inputs = fl.example_inputs("flux-tiny-dev")
    ways = [lambda: fl.summary(tiny, inputs), lambda: fl.graph(tiny, inputs), lambda: fl.compare(tiny, tiny, inputs)]
    ways += [lambda: fl.capture(tiny, "vec").__enter__(), lambda: fl.patch(tiny, "vec", torch.abs).__enter__()]
    for way in ways:
        with pytest.raises(
            ValueError, match=r"is a Pipeline, where a module was expected; give its model, pipe\.model"
        ):
            way()
    with pytest.raises(KeyError, match="'FLOP' is none of the columns: part, GFLOP, share"):
        fl.flops("flux-tiny-dev").column("FLOP")


@pytest.mark.usefixtures("as_users_run_it")
def test_a_compiled_model_is_summed_up_as_it_is():
    pipe = fl.load("flux-tiny-dev")
    inputs = pipe.prepare(["a"], [0], 64, 64)
    with torch.no_grad():
        plain, memory = str(fl.summary(pipe.model, inputs)), fl.working_memory(pipe.model, **inputs.kwargs())
        for compiled in (fl.speed.compile(pipe, backend="eager"), torch.compile(pipe.model, backend="eager")):
            model = compiled if isinstance(compiled, torch.nn.Module) else pipe.model
            model(**inputs.kwargs())
            assert str(fl.summary(model, inputs)) == plain
            assert fl.working_memory(model, **inputs.kwargs()) == memory
    with pytest.raises(ValueError, match="a Pipeline, where a module was expected; give its model"):
        fl.working_memory(pipe)


def test_layers_whose_weights_stay_in_their_file_are_not_summed_up():
    inputs = fl.example_inputs("flux-tiny-dev", height=64, width=64)
    handle = fl.speed.modulation_ahead(pipe := fl.load("flux-tiny-dev"), release=True)
    with pytest.raises(ValueError, match="model keeps its weights in their file"):
        fl.summary(pipe.model, inputs)
    handle.undo()
    assert "parameters" in str(fl.summary(pipe.model, inputs))
    low = fl.load("flux-tiny-dev", low_memory=True)
    with pytest.raises(ValueError, match="model keeps its weights in their file"):
        fl.summary(low.model.double_blocks[0], inputs)


def test_what_the_model_says_of_its_inputs_is_passed_on():
    inputs = fl.example_inputs("flux-tiny-dev", height=64, width=64)
    with pytest.raises(ValueError, match="txt"):
        fl.summary(fl.build("flux-tiny-dev"), replace(inputs, txt=inputs.txt[..., :5]))
