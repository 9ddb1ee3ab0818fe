"""What other tools make of the files: optimizers of graphs leave them as they were, and quantizers quantize."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon
import onnxruntime
import onnxslim
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from typer.testing import CliRunner

import fluxlab as fl
from fluxlab.cli import app
from fluxlab.onnx import export
from fluxlab.tiny.measure import measure as judge
from tests.helpers import randomise


def run(model, inputs):
    content = model if isinstance(model, str) else model.SerializeToString()
    [output] = onnxruntime.InferenceSession(content).run(None, inputs)
    return output


def distance(mine, theirs):
    return np.abs(mine - theirs).max() / np.abs(theirs).max()


@pytest.fixture
def inputs():
    return {name: tensor.numpy() for name, tensor in fl.example_inputs("flux-tiny-dev").kwargs().items()}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """flux-tiny-dev with one block of each kind: all are alike, and an optimizer takes its time over each."""
    one = {"depth": 1, "depth_single_blocks": 1}
    whole = fl.variant("flux-tiny-dev")
    monkeypatch.setattr(export, "variant", lambda name: replace(whole, transformer=replace(whole.transformer, **one)))

    def write(**how):
        weights = randomise(fl.build("flux-tiny-dev", **one)).state_dict()
        fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", weights=weights, **how)
        return str(tmp_path / "x.onnx")

    return write


def slim(path):
    return onnxslim.slim(path)


def fold(path):
    return onnx_graphsurgeon.export_onnx(onnx_graphsurgeon.import_onnx(onnx.load(path)).fold_constants().cleanup())


@pytest.mark.parametrize("tool", [slim, fold])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("opset", [17, 23])
def test_what_an_optimizer_writes_runs_and_computes_the_same(written, inputs, tool, opset, flat):
    path = written(opset=opset, flat=flat)
    assert distance(run(tool(path), inputs), run(path, inputs)) < 1e-5


@pytest.mark.parametrize("opset", [17, 23])
def test_openvino_computes_the_same_from_a_flat_file_and_refuses_functions(written, inputs, opset):
    import openvino

    core, path = openvino.Core(), written(opset=opset, flat=True)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    assert distance(core.compile_model(path, "CPU", exact)(inputs)[0], run(path, inputs)) < 1e-4
    with pytest.raises(RuntimeError, match="Model wasn't fully converted"):
        core.compile_model(written(opset=opset, flat=False), "CPU", exact)


@pytest.mark.parametrize(("part", "opset"), [("encoder", 23), ("decoder", 17)])
def test_an_optimizer_leaves_the_vae_as_it_was(tmp_path, part, opset):
    path = str(tmp_path / "x.onnx")
    fl.export_onnx("flux-tiny-dev", path, part, weights=True, opset=opset)
    rng = np.random.default_rng(0)
    shape, name = ((1, 3, 32, 48), "pixels") if part == "encoder" else ((1, 16, 4, 6), "latent")
    given = {name: rng.standard_normal(shape).astype(np.float32)}
    for tool in (slim, fold):
        assert distance(run(tool(path), given), run(path, given)) < 1e-5


def test_a_flat_file_is_quantized(written, inputs, tmp_path):
    path, ready, small = written(opset=17, flat=True), str(tmp_path / "ready.onnx"), tmp_path / "small.onnx"
    quant_pre_process(path, ready)
    quantize_dynamic(ready, small)
    kinds = [node.op_type for node in onnx.load(small).graph.node]
    assert kinds.count("MatMulInteger") == 23
    assert small.stat().st_size < 0.35 * (tmp_path / "x.onnx").stat().st_size
    assert distance(run(str(small), inputs), run(path, inputs)) < 0.1


class Runs(torch.nn.Module):
    """flux-tiny-dev, run by onnxruntime."""

    def __init__(self, path):
        super().__init__()
        self.config = fl.variant("flux-tiny-dev").transformer
        self.session = onnxruntime.InferenceSession(str(path))

    def forward(self, **inputs):
        return torch.from_numpy(self.session.run(None, {name: each.numpy() for name, each in inputs.items()})[0])


def test_quantized_by_one_command_it_is_small_and_paints(tmp_path, inputs):
    plain, small = tmp_path / "x.onnx", tmp_path / "small.onnx"
    fl.export_onnx("flux-tiny-dev", plain, weights=True)
    arguments = ["export", "flux-tiny-dev", "--output", str(small), "--weights", "--quantize", "int8"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert small.stat().st_size <= 0.3 * plain.stat().st_size
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert distance(run(str(small), inputs), run(str(plain), inputs)) < 0.15
    pipe = fl.load("flux-tiny-dev")
    pipe.model = Runs(small)
    assert judge(pipe, 16)["all"] >= 0.8


@pytest.mark.parametrize("how", [{}, {"weights": True, "dtype": "float16"}, {"weights": True, "quantize": "int4"}])
def test_what_cannot_be_quantized_is_said(tmp_path, how):
    with pytest.raises(ValueError, match="quantize='int8' goes with weights"):
        fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", **{"quantize": "int8"} | how)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", range(17, 25))
@pytest.mark.parametrize("part", ["transformer", "encoder", "decoder"])
@pytest.mark.parametrize("flat", [False, True])
def test_every_constant_is_a_tensor(tmp_path, part, opset, flat):
    fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", part, opset=opset, flat=flat)
    model = onnx.load(tmp_path / "x.onnx", load_external_data=False)
    nodes = [node for body in (model.graph, *model.functions) for node in body.node if node.op_type == "Constant"]
    assert nodes
    assert {attribute.name for node in nodes for attribute in node.attribute} == {"value"}
