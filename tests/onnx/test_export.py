"""The ONNX files: what they show, what they compute, and what is refused."""

import functools
import itertools
import weakref
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

import fluxlab as fl
from fluxlab.config import VARIANTS
from fluxlab.files import read_tensors
from fluxlab.glossary import named
from fluxlab.model.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxlab.onnx.export import GRAPHS
from fluxlab.pipeline.shown import Shown
from fluxlab.weights.convert import convert
from fluxlab.weights.find import data_folder
from fluxlab.weights.load import empty_encoder
from tests.helpers import randomise

EXPORTED = data_folder().parent / "exported"


def session(path, options=None):
    return onnxruntime.InferenceSession(str(path), options)


def run(path, options=None, **inputs):
    return session(path, options).run(None, {name: np.asarray(tensor) for name, tensor in inputs.items()})


def relative(mine, theirs):
    theirs = theirs.detach().numpy()
    assert mine.shape == theirs.shape
    return np.abs(mine - theirs).max() / np.abs(theirs).max()


def structure(path):
    return onnx.load(path, load_external_data=False)


@pytest.fixture
def with_weights_beside():
    """A sparse file where a structure says its numbers are, since the checker wants to see one."""
    made = []

    def make(path):
        for tensor in structure(path).graph.initializer:
            told = {entry.key: entry.value for entry in tensor.external_data}
        beside = path.with_name(told["location"])
        with beside.open("wb") as file:
            file.truncate(int(told["offset"]) + int(told["length"]))
        made.append(beside)

    yield make
    for beside in made:
        beside.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# To look at
# ---------------------------------------------------------------------------------------------------------------------


def test_the_full_transformer_is_small_and_one_node_a_block(tmp_path, with_weights_beside):
    path = tmp_path / "flux-dev.onnx"
    fl.export_onnx("flux-dev", path)
    assert path.stat().st_size <= 400_000
    graph = structure(path).graph
    assert len(graph.node) <= 120
    kinds = [node.op_type for node in graph.node]
    assert (kinds.count("DoubleStreamBlock"), kinds.count("SingleStreamBlock")) == (19, 38)
    assert [path.name for path in tmp_path.iterdir()] == ["flux-dev.onnx"]
    with_weights_beside(path)
    onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell", "flux-fill-dev"])
def test_every_weight_and_tensor_has_its_name_shape_and_meaning(tmp_path, name):
    path = tmp_path / "x.onnx"
    fl.export_onnx(name, path, dtype="bfloat16")
    graph = structure(path).graph
    model = fl.build(name, device="meta")
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    assert weights == {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    assert {tensor.data_type for tensor in graph.initializer} == {TensorProto.BFLOAT16}
    used = {each for node in graph.node for each in node.input}
    assert set(weights) <= used
    known = named(model.config, "input", "tensor")
    for value in [*graph.input, *graph.output, *(info for info in graph.value_info if info.name in known)]:
        sizes = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        free = {"B": 1, "I": 4096, "T": 512, "T+I": 4608}
        assert tuple(free.get(size, size) for size in sizes) == known[value.name].shape(model.config)
        assert value.doc_string == known[value.name].meaning
    shown = {value.name for value in graph.value_info}
    assert {f"double_blocks.{i}.img.output" for i in range(model.config.depth)} <= shown


@pytest.mark.parametrize("part", ["transformer", "encoder", "decoder"])
def test_every_function_says_what_it_is_and_is_used(tmp_path, part):
    fl.export_onnx("flux-dev", tmp_path / "x.onnx", part)
    model = structure(tmp_path / "x.onnx")
    functions = {f.name: f for f in model.functions}
    called = {
        node.op_type for body in (model.graph, *model.functions) for node in body.node if node.domain == "fluxlab"
    }
    assert called == set(functions)
    assert all(function.doc_string for function in model.functions)


def test_a_block_says_what_its_tensors_are_and_has_attention_as_one_node(tmp_path):
    fl.export_onnx("flux-dev", tmp_path / "x.onnx")
    model = structure(tmp_path / "x.onnx")
    functions = {f.name: f for f in model.functions}
    inside = {node.name: node.doc_string for node in functions["DoubleStreamBlock"].node}
    assert inside["img.middle"] == named(fl.FluxConfig(), "tensor")["double_blocks.0.img.middle"].meaning
    shapes = {value.name: value for value in functions["DoubleStreamBlock"].value_info}
    hidden = shapes["img_attn.proj"].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in hidden] == ["B", "I", 3072]
    assert {"img.middle", "txt_mod.gate2", "q", "attended", "txt.output"} <= set(shapes)
    kinds = [node.op_type for function in model.functions for node in function.node]
    assert [kinds.count(each) for each in ("Attention", "RotaryEmbedding", "RMSNormalization")] == [3, 1, 1]


def test_a_flat_graph_has_no_functions_and_the_same_weights(tmp_path):
    fl.export_onnx("flux-dev", tmp_path / "flat.onnx", flat=True)
    flat = structure(tmp_path / "flat.onnx")
    assert not flat.functions
    assert len(flat.graph.initializer) == 780
    assert len(flat.graph.node) > 4_000


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("file", GRAPHS)
def test_every_edge_has_a_shape_that_netron_draws(tmp_path, file, opset):
    """At most 16 characters; in functions too, with ? where calls differ."""
    fl.export_onnx(GRAPHS[file][0], tmp_path / file, GRAPHS[file][1], opset=opset)
    model = structure(tmp_path / file)
    for body in (model.graph, *model.functions):
        shapes = {info.name: axes(info) for info in body.value_info}
        made = {out for node in body.node for out in node.output}
        if body is model.graph:
            shapes |= {info.name: axes(info) for info in (*body.input, *body.output)}
            assert made <= set(shapes)
            assert all(len("×".join(map(str, shape))) <= 16 for shape in shapes.values())
        else:
            assert len(made - set(shapes)) <= 2, body.name  # Linear takes tokens and vectors


def axes(info):
    return [dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim]


@pytest.mark.parametrize("part", ["transformer", "encoder", "decoder"])
def test_the_shapes_are_those_of_a_run(tmp_path, part):
    """Each value of the graph that onnxruntime makes, at sizes that are all different."""
    fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", part, weights=True)
    model = onnx.load(tmp_path / "x.onnx")
    told = {info.name: axes(info) for info in (*model.graph.value_info, *model.graph.output)}
    outputs = [info.name for info in model.graph.output]
    model.graph.output.extend(info for info in model.graph.value_info)
    sizes = {"B": 2, "T": 9, "I": 24, "T+I": 33} | {
        f"{n}{side}".lstrip("1"): n * c for n in (1, 2, 4, 8) for side, c in (("h", 4), ("w", 6))
    }
    if part == "transformer":
        given = fl.example_inputs("flux-tiny-dev", 64, 96, batch=2).kwargs()
        given |= {name: given[name][:, :9].contiguous() for name in ("txt", "txt_ids")}
        given = {name: tensor.numpy() for name, tensor in given.items()}
    else:
        name, shape = ("pixels", (2, 3, 32, 48)) if part == "encoder" else ("latent", (2, 16, 4, 6))
        given = {name: np.zeros(shape, np.float32)}
    session = onnxruntime.InferenceSession(model.SerializeToString())
    made = session.run(None, given)
    for output, value in zip(session.get_outputs(), made, strict=True):
        assert [sizes.get(axis, axis) for axis in told[output.name]] == list(value.shape), output.name
    assert len(made) == len(told) > len(outputs)


def test_a_model_says_what_it_is_and_how_it_is_opened(tmp_path):
    fl.export_onnx("flux-dev", tmp_path / "x.onnx")
    model = structure(tmp_path / "x.onnx")
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert (told["name"], told["variant"], told["version"]) == ("flux-dev", "flux-dev", fl.__version__)
    assert "load_external_data=False" in told["numbers"]
    assert "does not run" in told["not included"]
    assert "Ctrl+U" in told["to look"]
    assert "B pictures, T text tokens, I image tokens" in model.doc_string
    blocks = {node.name: node.doc_string for node in model.graph.node if node.op_type.endswith("Block")}
    assert len(blocks) == 57
    assert blocks["single_blocks.37"].startswith("Single block 37 of 0 to 37: text and image as one sequence")
    functions = {function.name: function for function in model.functions}
    for name in ("DoubleStreamBlock", "SingleStreamBlock", "Attention", "SplitHeads", "DoubleModulation", "LastLayer"):
        bare = [node.name for node in functions[name].node if not node.doc_string and node.op_type != "Constant"]
        assert not bare, (name, bare)
    assert not any(node.op_type == "Constant" and not node.name for f in model.functions for node in f.node)


@pytest.mark.parametrize("flat", [False, True])
def test_kontext_takes_a_reference_and_gives_the_noises_velocity(tmp_path, monkeypatch, flat):
    chosen = replace(fl.VARIANTS["flux-tiny-dev"], name="flux-kontext-dev", shown="reference")
    monkeypatch.setitem(fl.VARIANTS, "flux-kontext-dev", chosen)
    model = randomise(fl.build("flux-kontext-dev"))
    fl.export_onnx("flux-kontext-dev", tmp_path / "x.onnx", weights=model.state_dict(), flat=flat)
    inputs = fl.example_inputs("flux-kontext-dev", 64, 96, batch=2)
    other = fl.example_inputs("flux-kontext-dev", 64, 64, batch=2, seed=1)
    other.img_ids[..., 0] = 1
    shown = Shown(tokens=other.img, ids=other.img_ids)
    with torch.no_grad():
        theirs = model(**shown.beside(inputs).kwargs())[:, :24]
    given = inputs.kwargs() | {"reference": other.img, "reference_ids": other.img_ids}
    assert relative(run(tmp_path / "x.onnx", **given)[0], theirs) < 1e-4


@pytest.mark.parametrize("part", ["transformer", "double_block", "decoder"])
def test_flat_weights_lie_as_tools_expect(tmp_path, part):
    fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", part, flat=True, opset=17)
    model = structure(tmp_path / "x.onnx")
    weights = {tensor.name for tensor in model.graph.initializer}
    assert not [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in weights]
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    assert len(products) == {"transformer": 42, "double_block": 10, "decoder": 0}[part]


@pytest.mark.parametrize("file", GRAPHS)
def test_what_is_in_exported_is_what_the_library_writes(tmp_path, file):
    fl.export_onnx(GRAPHS[file][0], tmp_path / file, GRAPHS[file][1])
    committed, again = (structure(folder / file) for folder in (EXPORTED, tmp_path))
    assert (EXPORTED / file).stat().st_size < 1_000_000
    for mine, theirs in zip(again.graph.node, committed.graph.node, strict=True):
        assert mine == theirs
    assert {f.name: f for f in again.functions} == {f.name: f for f in committed.functions}
    assert again == committed


# ---------------------------------------------------------------------------------------------------------------------
# To run
# ---------------------------------------------------------------------------------------------------------------------

SIZES = [{"height": 128, "width": 128, "batch": 1}, {"height": 64, "width": 96, "batch": 3}]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def export(part):
        fl.export_onnx("flux-tiny-dev", folder / f"{part}.onnx", part, weights=True)
        onnx.checker.check_model(str(folder / f"{part}.onnx"), full_check=True)
        return folder / f"{part}.onnx"

    return export


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text", [32, 9])
def test_the_transformer_computes_what_pytorch_does_at_any_size(exported, tiny, size, text):
    inputs = fl.example_inputs("flux-tiny-dev", **size).kwargs()
    inputs |= {name: inputs[name][:, :text].contiguous() for name in ("txt", "txt_ids")}
    with torch.no_grad():
        theirs = tiny.model(**inputs)
    assert relative(run(exported("transformer"), **inputs)[0], theirs) < 1e-4


@pytest.mark.parametrize(("opset", "flat"), [(17, False), (17, True), (18, False), (22, True), (23, True), (24, False)])
@pytest.mark.parametrize("name", ["flux-tiny-dev", "flux-tiny-schnell"])
def test_every_way_to_write_it_computes_the_same(tmp_path, name, opset, flat):
    model = randomise(fl.build(name))
    fl.export_onnx(name, tmp_path / "x.onnx", weights=model.state_dict(), opset=opset, flat=flat)
    onnx.checker.check_model(str(tmp_path / "x.onnx"), full_check=True)
    inputs = fl.example_inputs(name, **SIZES[1]).kwargs()
    with torch.no_grad():
        assert relative(run(tmp_path / "x.onnx", **inputs)[0], model(**inputs)) < 1e-4


def test_it_runs_in_float16(tmp_path, tiny):
    fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", weights=True, dtype="float16")
    inputs = fl.example_inputs("flux-tiny-dev").kwargs()
    with torch.no_grad():
        theirs = tiny.model(**inputs)
    half = inputs | {name: inputs[name].half() for name in ("img", "txt", "y")}
    assert relative(run(tmp_path / "x.onnx", **half)[0], theirs) < 2e-2


@pytest.mark.parametrize("kind", ["double_block", "single_block"])
def test_a_full_width_block_computes_what_pytorch_does(tmp_path, kind):
    torch.manual_seed(0)
    with torch.device("meta"):
        block = (DoubleStreamBlock if kind == "double_block" else SingleStreamBlock)(3072, 24, 12288).eval()
    block.to_empty(device="cpu")
    values = torch.randn(1_000_003) / 3072**0.5  # again and again, which is faster than as many random numbers
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(values.repeat(p.numel() // len(values) + 1)[: p.numel()].view_as(p))
    fl.export_onnx("flux-dev", tmp_path / "x.onnx", kind, weights=block.state_dict())
    ids = torch.cat((fl.text_ids(1, 5), fl.image_ids(1, 32, 64)), dim=1)
    pe = fl.build("flux-dev", depth=0, depth_single_blocks=0).pe_embedder(ids)
    vec = torch.randn(1, 3072)
    streams = {"x": torch.randn(1, 13, 3072)}
    if kind == "double_block":
        streams = {"img": torch.randn(1, 8, 3072), "txt": torch.randn(1, 5, 3072)}
    with torch.no_grad():
        theirs = block(**streams, vec=vec, pe=pe)
    plain = onnxruntime.SessionOptions()  # as it is written; to rearrange as many weights takes longer than to use them
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    mine = run(tmp_path / "x.onnx", plain, **streams, vec=vec, pe=pe)
    for a, b in zip(mine, theirs if kind == "double_block" else [theirs], strict=True):
        assert relative(a, b) < 1e-4


@pytest.mark.parametrize("opset", [23, 17])
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_the_vae_computes_what_pytorch_does(tmp_path, tiny, half, opset):
    fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", half, weights=True, opset=opset)
    onnx.checker.check_model(str(tmp_path / "x.onnx"), full_check=True)
    x = torch.randn(2, 16, 6, 10) if half == "decoder" else torch.rand(3, 3, 48, 80) * 2 - 1
    with torch.no_grad():
        theirs = tiny.autoencoder.decode(x) if half == "decoder" else tiny.autoencoder.encode(x)
    assert relative(run(tmp_path / "x.onnx", **{"latent" if half == "decoder" else "pixels": x})[0], theirs) < 1e-4


def test_the_text_encoders_compute_what_pytorch_does(exported, tiny):
    t5_ids, clip_ids = tiny.text.tokenize(["a red circle", "a large blue ring on the left", "a star"])
    txt, y = tiny.text.encode(t5_ids, clip_ids)
    assert relative(run(exported("t5"), ids=t5_ids)[0], txt) < 1e-4
    assert relative(run(exported("clip"), ids=clip_ids)[0], y) < 1e-4
    for part in ("t5", "clip"):
        told = {entry.key: entry.value for entry in structure(exported(part)).metadata_props}
        assert (told["name"], told["variant"], told["version"]) == (part, "flux-tiny-dev", fl.__version__)
    shorter, _ = tiny.text.encode(t5_ids[:, :12], clip_ids)
    assert relative(run(exported("t5"), ids=t5_ids[:, :12])[0], shorter) < 1e-4


def test_a_text_encoder_is_read_alone_and_from_a_file_of_several_parts(tmp_path, tiny, monkeypatch):
    convert(tiny.variant, tmp_path / "all.safetensors", "comfyui")
    monkeypatch.setattr("fluxlab.onnx.export.empty_encoder", only := Mock(wraps=empty_encoder))
    fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", "clip", weights=True, source=tmp_path / "all.safetensors")
    assert [call.args[0] for call in only.call_args_list] == ["clip"]
    t5_ids, clip_ids = tiny.text.tokenize(["a red circle"])
    assert relative(run(tmp_path / "x.onnx", ids=clip_ids)[0], tiny.text.encode(t5_ids, clip_ids)[1]) < 1e-4


def test_a_large_text_encoder_keeps_its_weights_beside_it(tmp_path, tiny, monkeypatch):
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 0)
    fl.export_onnx("flux-tiny-dev", tmp_path / "clip.onnx", "clip", weights=True)
    assert {path.name for path in tmp_path.iterdir()} == {"clip.onnx", "clip.onnx.data"}
    t5_ids, clip_ids = tiny.text.tokenize(["a red circle"])
    assert relative(run(tmp_path / "clip.onnx", ids=clip_ids)[0], tiny.text.encode(t5_ids, clip_ids)[1]) < 1e-4


def test_from_prompt_to_picture_on_onnxruntime_and_numpy(exported, tiny):
    """Tokenizers, four files, numpy; the noise is the library's, so that the pictures can be compared."""
    prompt, steps = "a small red circle left of a large blue square on a white background", 8
    t5_ids, clip_ids = (
        tokenizer([prompt], padding="max_length", max_length=32, return_tensors="np").input_ids
        for tokenizer in (tiny.text.t5_tokenizer, tiny.text.clip_tokenizer)
    )
    [txt], [y] = run(exported("t5"), ids=t5_ids), run(exported("clip"), ids=clip_ids)
    noise = fl.noise([3], 128, 128).numpy()
    img = noise.reshape(1, 16, 8, 2, 8, 2).transpose(0, 2, 4, 1, 3, 5).reshape(1, 64, 64)
    ids = np.zeros((8, 8, 3), np.float32)
    ids[..., 1], ids[..., 2] = np.mgrid[:8, :8]
    fixed = {"txt": txt, "txt_ids": np.zeros((1, 32, 3), np.float32), "img_ids": ids.reshape(1, 64, 3), "y": y}
    fixed["guidance"] = np.array([4.0], np.float32)
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (64 - 256)
    times = np.linspace(1, 0, steps + 1)
    times[:-1] = np.exp(mu) / (np.exp(mu) + (1 / times[:-1] - 1))
    model = session(exported("transformer"))
    for t, t_next in itertools.pairwise(times):
        [velocity] = model.run(None, fixed | {"img": img, "timesteps": np.array([t], np.float32)})
        img = img + np.float32(t_next - t) * velocity
    latent = img.reshape(1, 8, 8, 16, 2, 2).transpose(0, 3, 1, 4, 2, 5).reshape(1, 16, 16, 16)
    [pixels] = run(exported("decoder"), latent=latent)
    mine = np.rint((pixels[0].clip(-1, 1) + 1) * 127.5).transpose(1, 2, 0)
    theirs = np.asarray(tiny(prompt, seed=3, num_steps=steps, guidance=4.0, progress=False)).astype(int)
    assert np.abs(mine - theirs).max() <= 1


def test_large_weights_go_to_a_file_beside_it(tmp_path, monkeypatch):
    from fluxlab.onnx import export

    monkeypatch.setattr(export, "_EMBED", 1e6)
    model = randomise(fl.build("flux-tiny-dev"))
    fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", weights=model.state_dict())
    assert {path.name for path in tmp_path.iterdir()} == {"x.onnx", "x.onnx.weights"}
    assert (tmp_path / "x.onnx").stat().st_size < 200_000
    onnx.checker.check_model(str(tmp_path / "x.onnx"), full_check=True)
    inputs = fl.example_inputs("flux-tiny-dev").kwargs()
    with torch.no_grad():
        assert relative(run(tmp_path / "x.onnx", **inputs)[0], model(**inputs)) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("name", "options", "error", "said"),
    [
        ("flux-dv", {}, ValueError, "did you mean"),
        ("flux-dev", {"part": "block"}, ValueError, "part is 'block'; it is one of transformer"),
        ("flux-dev", {"dtype": "int8"}, ValueError, "dtype is 'int8'"),
        ("flux-dev", {"opset": 9}, ValueError, "opset is 9; it must be a whole number of at least 17"),
        ("flux-dev", {"opset": 25}, ValueError, "opset is 25; it must be a whole number of at most 24"),
        ("flux-dev", {"opset": 23.0}, ValueError, "opset is 23.0; it must be a whole number"),
        ("flux-dev", {"part": "t5"}, ValueError, "weights=True"),
        ("flux-tiny-dev", {"part": "t5", "weights": True, "opset": 17}, ValueError, "18 and later"),
        ("flux-tiny-dev", {"part": "t5", "weights": True, "quantize": "int8"}, ValueError, "are not quantized"),
        ("flux-dev", {"weights": True}, ValueError, "give source="),
        ("flux-dev", {"source": "folder"}, ValueError, "ask for weights=True"),
        ("flux-dev", {"weights": None}, ValueError, "weights is a NoneType; give True, False, or tensors"),
        ("flux-dev", {"part": "decoder", "dtype": "bfloat16", "opset": 17}, ValueError, "take it from 22 on"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path, name, options, error, said):
    with pytest.raises(error, match=said):
        fl.export_onnx(name, tmp_path / "x.onnx", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("embed", [0, 1e9])
def test_weights_that_a_dtype_cannot_hold_are_not_written(tmp_path, monkeypatch, embed):
    monkeypatch.setattr("fluxlab.onnx.export._EMBED", embed)
    tensors = read_tensors(data_folder() / "flux-tiny/flux-tiny-dev.safetensors")
    tensors["img_in.bias"] = torch.full((128,), 1e5)
    with pytest.raises(ValueError, match=r"img_in.bias has values that torch.float16 cannot hold"):
        fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", weights=tensors, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(OSError, match="there is no folder"):
        fl.export_onnx("flux-dev", tmp_path / "nowhere/x.onnx")
    with pytest.raises(IsADirectoryError, match="is a folder; give the path of a file in it"):
        fl.export_onnx("flux-tiny-dev", tmp_path, weights=True)
    assert list(tmp_path.parent.glob("*.weights")) == []


def test_an_export_that_is_stopped_leaves_nothing_half_written(tmp_path, monkeypatch):
    from fluxlab.onnx import export

    def stop(name, tensor, dtype):
        if tensor.shape == (64,):  # the last weight
            raise RuntimeError("stop")
        return bytes(tensor.numel() * dtype.itemsize)

    monkeypatch.setattr(export, "_EMBED", 1e6)
    monkeypatch.setattr(export, "_bytes", stop)
    with pytest.raises(RuntimeError, match="stop"):
        fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", weights=fl.build("flux-tiny-dev").state_dict())
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_the_one_before_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("fluxlab.onnx.export._EMBED", 0)
    before, after = (randomise(fl.build("flux-tiny-dev"), seed).state_dict() for seed in (0, 1))
    fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", weights=before)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="has the numbers of another export"):
        fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx")
    monkeypatch.setattr("pathlib.Path.write_bytes", Mock(side_effect=OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", weights=after)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_int8_of_weights_that_would_go_to_a_file_beside(tmp_path, monkeypatch, tiny):
    monkeypatch.setattr("fluxlab.onnx.export._EMBED", 0)
    fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", weights=tiny.model.state_dict(), quantize="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]
    inputs = fl.example_inputs("flux-tiny-dev").kwargs()
    with torch.no_grad():
        assert relative(run(tmp_path / "x.onnx", **inputs)[0], tiny.model(**inputs)) < 0.2


def test_half_of_a_vae_is_given_by_its_own_state(tmp_path, tiny):
    fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", "decoder", weights=tiny.autoencoder.decoder.state_dict())
    latent = torch.randn(1, 16, 4, 6)
    with torch.no_grad():
        assert relative(run(tmp_path / "x.onnx", latent=latent)[0], tiny.autoencoder.decode(latent)) < 1e-4


@pytest.mark.usefixtures("as_users_run_it")
def test_what_has_no_numbers_is_not_written(tmp_path, monkeypatch):
    names = fl.build("flux-tiny-dev").state_dict()
    for weights in (fl.build("flux-tiny-dev", "meta").state_dict(), dict.fromkeys(names)):
        with pytest.raises(ValueError, match=r"is on the meta device: it has no|is a NoneType, where a plain"):
            fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", weights=weights)
    dev = fl.VARIANTS["flux-dev"]
    monkeypatch.setitem(fl.VARIANTS, "flux-dev", replace(dev, transformer=replace(dev.transformer, qkv_bias=False)))
    with pytest.raises(ValueError, match="qkv_bias is False"):
        fl.export_onnx("flux-dev", tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("part", ["transformer", "double_block", "encoder", "decoder"])
def test_a_flat_file_has_a_shape_on_every_edge_and_none_of_what_went(tmp_path, part, opset):
    fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", part, flat=True, opset=opset)
    graph = structure(tmp_path / "x.onnx").graph
    made = {name for node in graph.node for name in node.output}
    told = {info.name for info in graph.value_info} | {output.name for output in graph.output}
    assert made <= told <= made | {output.name for output in graph.output}
    dims = [dim for info in graph.value_info for dim in info.type.tensor_type.shape.dim]
    assert all(dim.dim_value or dim.dim_param for dim in dims)
    assert all(dim.dim_value < 10_000 and len(dim.dim_param) <= 8 for dim in dims)  # no free size stands as a number


def test_weights_that_do_not_fit_are_refused(tmp_path):
    weights = fl.build("flux-tiny-dev").state_dict()
    with pytest.raises(
        ValueError,
        match=r"has shape \(1, 64\), and the part takes floating of \(128, 64\)",
    ):
        fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", weights=weights | {"img_in.weight": torch.zeros(1, 64)})
    del weights["final_layer.linear.bias"]
    with pytest.raises(ValueError, match=r"do not fit the part: .*final_layer.linear.bias"):
        fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", weights=weights)
    assert list(tmp_path.iterdir()) == []


def test_quantized_weights_are_not_exported_as_others(tmp_path, tiny):
    pipe = fl.load("flux-tiny-dev")
    with fl.speed.quantize(pipe), pytest.raises(ValueError, match=r"is a .*Tensor, where a plain tensor was expected"):
        fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", weights=pipe.model.state_dict())
    whole = {name: tensor.int() for name, tensor in tiny.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"is torch.int32 and has shape .*, and the part takes floating of"):
        fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", weights=whole)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("as_users_run_it")
def test_int8_of_more_than_the_quantizer_takes_is_refused_before_any_is_read(tmp_path):
    entries = fl.build("flux-dev", device="meta").state_dict()
    with pytest.raises(ValueError, match=r"transformer of flux-dev has 48 GB of numbers, where .* takes 2; leave it"):
        fl.export_onnx("flux-dev", tmp_path / "x.onnx", weights=_Unread(entries), quantize="int8")


class _Unread(dict):
    def __getitem__(self, name):
        pytest.fail(f"{name} was read")


def test_a_flat_graph_reads_one_weight_at_a_time(tmp_path, tiny, monkeypatch):
    """As files in other layouts, which make each tensor anew, would else be in memory whole."""
    alive, most = weakref.WeakSet(), []

    class Made(dict):
        def __getitem__(self, name):
            made = super().__getitem__(name).clone()
            alive.add(made.untyped_storage())
            most.append(len(alive))
            return made

    monkeypatch.setattr("fluxlab.onnx.export._check", lambda *_: None)
    fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", weights=Made(tiny.model.state_dict()), flat=True)
    assert max(most) <= 3


def test_one_file_is_all_that_a_part_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "mine", replace(fl.variant("flux-tiny-dev"), name="mine", repo="me/mine"))
    vae = data_folder() / fl.variant("flux-tiny-dev").autoencoder_file
    fl.export_onnx("mine", tmp_path / "x.onnx", "decoder", source=vae, weights=True)
    fl.export_onnx("flux-tiny-dev", tmp_path / "y.onnx", "decoder", weights=True)
    latent = torch.randn(1, 16, 4, 6)
    assert np.array_equal(run(tmp_path / "x.onnx", latent=latent), run(tmp_path / "y.onnx", latent=latent))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, tiny, bad):
    weights = {name: tensor.clone() for name, tensor in tiny.autoencoder.decoder.state_dict().items()}
    weights["conv_in.bias"][0] = bad
    with pytest.raises(ValueError, match=r"conv_in\.bias has values that are not finite"):
        fl.export_onnx("flux-tiny-dev", tmp_path / "x.onnx", "decoder", weights=weights)
    assert not [*tmp_path.iterdir()]
