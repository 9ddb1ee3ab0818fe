"""The functions' text: what it stands for, and the norms that are written in it, at every opset."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

import fluxlab as fl
from fluxlab.onnx import autoencoder, parts
from fluxlab.onnx.text import Writer


def graph(writer, line, out, **inputs):
    """A model of one line, in float32, with free shapes."""
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in inputs.items()]
    made = [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)]
    return writer.model(helper.make_graph(writer.nodes(line), "x", given, made))


def run(writer, line, **inputs):
    model = graph(writer, line, "result", **inputs)
    given = {name: x.numpy() for name, x in inputs.items()}
    return torch.from_numpy(onnxruntime.InferenceSession(model.SerializeToString()).run(None, given)[0])


def test_formulas_calls_and_numbers_become_nodes():
    writer = Writer(17, TensorProto.BFLOAT16)
    writer.define("""
def Twice(x, a.weight) -> y:
    "2 x"
    y = (
        x * 2.0  # a product
        + Reshape(a.weight, [0, -1]))

def Both(x, 0.weight) -> (img.0, rest):
    "Two of them"
    table = (0.1, 0.2)
    # the left, the right
    img.0, rest = Split(Twice(x, 0.weight), [1, 1], axis=-1)
""")
    twice, both = writer.functions.values()
    assert (twice.doc_string, both.doc_string) == ("2 x", "Two of them")
    assert (list(both.input), list(both.output)) == (["x", "0.weight"], ["img.0", "rest"])
    assert [node.op_type for node in twice.node] == ["Constant", "Mul", "Constant", "Reshape", "Add"]
    assert [node.name for node in twice.node] == ["constant_2.0", "y.Mul", "constant_[0,-1]", "y.Reshape", "y"]
    table, call, sizes, split = both.node
    assert (call.domain, call.op_type, list(call.input)) == ("fluxlab", "Twice", ["x", "0.weight"])
    assert (list(split.input), list(split.output)) == (["img.0.Twice", "constant_[1,1]"], ["img.0", "rest"])
    assert helper.get_node_attr_value(split, "axis") == -1
    assert [node.doc_string for node in (*twice.node, split)] == ["", "a product", "", "", "", "the left, the right"]
    numbers = {node.name: helper.get_node_attr_value(node, "value") for node in (twice.node[0], table, sizes)}
    kinds = [tensor.data_type for tensor in numbers.values()]
    assert kinds == [TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.INT64]
    assert numpy_helper.to_array(numbers["table"]).tolist() == [0.1, 0.2]


def test_a_model_has_the_functions_that_it_takes_and_no_others():
    writer = Writer(23, TensorProto.FLOAT)
    parts.define_parts(writer, fl.FluxConfig())
    model = graph(writer, "y = QKNorm(x, x, x, x)", "y", x=torch.ones(1))
    assert [function.name for function in model.functions] == ["RMSNorm", "QKNorm"]


def test_only_what_is_in_the_glossary_is_described_by_it():
    writer = Writer(23, TensorProto.FLOAT)
    parts.define_parts(writer, fl.FluxConfig())
    described = {name: {node.name for node in f.node if node.doc_string} for name, f in writer.functions.items()}
    assert described["Modulate"] == set()  # its y is not CLIP's
    assert "img.middle" in described["DoubleStreamBlock"]


@pytest.fixture(params=range(17, 25))
def writer(request):
    return Writer(request.param, TensorProto.FLOAT)


# Numbers of about 1e-3 have squares of about 1e-6, as large as the epsilon that is added to their mean: with 1e-5 in
# its place the result is less than half.
def small(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 1e-3


def close(mine, theirs):
    return torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_rms_norm_has_pytorchs_epsilon(writer):
    parts.define_parts(writer, fl.FluxConfig())
    x, scale = small(2, 3, 5, 128), torch.linspace(0.5, 2, 128)
    assert np.isclose(F.rms_norm(x, (128,), eps=1e-6).square().mean(), 0.5, atol=0.02)
    close(run(writer, "result = RMSNorm(x, scale)", x=x, scale=scale), F.rms_norm(x, (128,), scale, 1e-6))


def test_layer_norm_has_pytorchs_epsilon(writer):
    parts.define_parts(writer, fl.FluxConfig(hidden_size=96, num_heads=2, axes_dim=(16, 16, 16)))
    x = small(2, 5, 96) + 1e-3
    close(run(writer, "result = LayerNorm(x)", x=x), F.layer_norm(x, (96,), eps=1e-6))


def test_group_norm_has_pytorchs_epsilon(writer):
    config = fl.AutoEncoderConfig()
    writer.define(autoencoder.parts(config, writer.opset))
    x, weight, bias = small(2, 64, 4, 6) + 1e-3, torch.linspace(0.5, 2, 64), torch.linspace(-1, 1, 64)
    theirs = F.group_norm(x, config.norm_groups, weight, bias, 1e-6)
    close(run(writer, "result = GroupNorm(x, weight, bias)", x=x, weight=weight, bias=bias), theirs)
