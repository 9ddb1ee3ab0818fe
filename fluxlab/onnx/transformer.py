"""FLUX's transformer as an ONNX graph that a person can read: one node a block, one function a kind of part.

Every kind of part is an ONNX local function, written once and called with its weights as named inputs. Norms, rotation
and attention are single operators of ONNX's standard set (RMSNormalization, RotaryEmbedding and Attention, since opset
23, which onnxruntime runs); for older tools the same functions are written with the operators of opset 17.
Opened in chapter 13.

Axes: batch B, text tokens T, image tokens I, tokens L = T + I, heads H, head width D, channels C, hidden width M.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from onnx import FunctionProto, GraphProto, ModelProto, TensorProto, ValueInfoProto, helper

from fluxlab.config import EMBEDDING_DIM, FluxConfig
from fluxlab.glossary import Entry, entries, named
from fluxlab.onnx.body import DOMAIN, NEW, Body, linear, silu, value, without_numbers

_AXES = {"B": "batch", "T": "text_tokens", "I": "image_tokens", "L": "tokens"}
_EMBEDDER = ("in_layer.weight", "in_layer.bias", "out_layer.weight", "out_layer.bias")
_LINEAR = ("weight", "bias")
_QK = ("norm.query_norm.scale", "norm.key_norm.scale")


def functions(c: FluxConfig, opset: int, dtype: int) -> list[FunctionProto]:
    """Every kind of part that a model of this config has, the smallest first."""

    def body(name: str, inputs: Sequence[str], doc: str, glossary: str = "") -> Body:
        return Body(name, inputs, doc, opset, glossary)

    def gelu() -> FunctionProto:
        b = body("GELU", ("x",), "GELU in its tanh form: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))")
        if opset >= 20:
            return b.function(b.op("Gelu", "x", out="y", approximate="tanh"))
        cube = b.op("Mul", b.op("Mul", "x", "x", out="square"), "x", out="cube")
        inner = b.op("Add", "x", b.op("Mul", cube, b.number("a", 0.044715, "x"), out="a_cube"), out="inner")
        tanh = b.op("Tanh", b.op("Mul", inner, b.number("root", math.sqrt(2 / math.pi), "x"), out="scaled"), out="tanh")
        half = b.op("Mul", "x", b.number("half", 0.5, "x"), out="half_x")
        return b.function(b.op("Mul", half, b.op("Add", tanh, b.number("one", 1.0, "x"), out="one_more"), out="y"))

    def layer_norm() -> FunctionProto:
        b = body("LayerNorm", ("x",), "LayerNorm without weights of its own; the modulation that follows has them")
        one = helper.make_tensor("one", dtype, [1], [1.0])
        ones = b.op("ConstantOfShape", b.whole("channels", c.hidden_size), out="ones", value=one)
        return b.function(b.op("LayerNormalization", "x", ones, out="y", axis=-1, epsilon=1e-6))

    def rms_norm() -> FunctionProto:
        b = body("RMSNorm", ("x", "scale"), "x / sqrt(mean(x^2) + 1e-6) * scale, in float32")
        if opset >= NEW:
            return b.function(b.op("RMSNormalization", "x", "scale", out="y", axis=-1, epsilon=1e-6))
        wide = b.op("Cast", "x", out="x_wide", to=TensorProto.FLOAT)
        squares = b.op("Mul", wide, wide, out="squares")
        if opset >= 18:  # the axes became an input
            mean = b.op("ReduceMean", squares, b.whole("axes", -1), out="mean", keepdims=1)
        else:
            mean = b.op("ReduceMean", squares, out="mean", axes=[-1], keepdims=1)
        length = b.op("Sqrt", b.op("Add", mean, b.op("Constant", out="eps", value_float=1e-6), out="sum"), out="length")
        normed = b.op("CastLike", b.op("Div", wide, length, out="normed_wide"), "x", out="normed")
        return b.function(b.op("Mul", normed, "scale", out="y"))

    def timestep_embedding() -> FunctionProto:
        b = body("TimestepEmbedding", ("t",), "cos and sin of 1000 t at 128 frequencies, in float32")
        half = EMBEDDING_DIM // 2
        values = [math.exp(-math.log(10_000) * i / half) for i in range(half)]
        frequencies = helper.make_tensor("frequencies", TensorProto.FLOAT, [1, half], values)
        scaled = b.op("Mul", "t", b.op("Constant", out="thousand", value_float=1000.0), out="scaled")
        column = b.op("Unsqueeze", scaled, b.whole("last", 1), out="column")
        angles = b.op("Mul", column, b.op("Constant", out="frequencies", value=frequencies), out="angles")
        waves = b.op("Cos", angles, out="cos"), b.op("Sin", angles, out="sin")
        return b.function(b.op("Cast", b.op("Concat", *waves, out="both", axis=-1), out="y", to=dtype))

    def embedder() -> FunctionProto:
        b = body("MLPEmbedder", ("x", *_EMBEDDER), "Linear, SiLU, Linear")
        hidden = b.call("SiLU", b.call("Linear", "x", *_EMBEDDER[:2], out="hidden"), out="active")
        return b.function(b.call("Linear", hidden, *_EMBEDDER[2:], out="y"))

    def embed_nd() -> FunctionProto:
        b = body(
            "EmbedND", ("ids",), "One rotation matrix for each token and pair of features: position times frequency"
        )
        axis = [i for i, dim in enumerate(c.axes_dim) for _ in range(dim // 2)]
        values = [c.theta ** (-2 * i / dim) for dim in c.axes_dim for i in range(dim // 2)]
        frequencies = helper.make_tensor("frequencies", TensorProto.DOUBLE, [len(values)], values)
        of_pair = b.op("Gather", "ids", b.whole("axis_of_pair", *axis), out="positions", axis=2)  # B L D/2
        wide = b.op("Cast", of_pair, out="positions_wide", to=TensorProto.DOUBLE)
        angles = b.op("Mul", wide, b.op("Constant", out="frequencies", value=frequencies), out="angles")
        cos, sin = (b.op("Cast", b.op(f, angles, out=f"{f}_wide"), out=f.lower(), to=1) for f in ("Cos", "Sin"))
        last = b.whole("last", -1)
        parts = {"cos": cos, "minus_sin": b.op("Neg", sin, out="minus_sin"), "sin": sin}
        column = {name: b.op("Unsqueeze", x, last, out=f"{name}_column") for name, x in parts.items()}
        four = b.op("Concat", *(column[x] for x in ("cos", "minus_sin", "sin", "cos")), out="four", axis=-1)
        matrices = b.op("Reshape", four, b.whole("matrices.shape", 0, 0, 0, 2, 2), out="matrices")
        return b.function(b.op("Unsqueeze", matrices, b.whole("heads", 1), out="pe"))

    def rotate() -> FunctionProto:
        b = body("RoPE", ("x", "pe"), "Turn each pair of neighbouring features by its token's angle")
        wide = b.op("Cast", "x", out="x_wide", to=TensorProto.FLOAT)
        one = b.op("Squeeze", "pe", b.whole("heads", 1), out="one_table")
        column = b.op("Gather", one, b.op("Constant", out="first_column", value_int=0), out="column", axis=4)
        cos, sin = (
            b.op("Gather", column, b.op("Constant", out=f"{name}.row", value_int=row), out=name, axis=3)
            for row, name in enumerate(("cos", "sin"))
        )  # B L D/2
        if opset >= NEW:
            turned = b.op("RotaryEmbedding", wide, cos, sin, out="turned", interleaved=1)
        else:
            pairs = b.op("Reshape", wide, b.whole("pairs.shape", 0, 0, 0, -1, 2), out="pairs")
            first, second = b.split(pairs, (1, 1), ("first", "second"))
            cos, sin = (
                b.op("Unsqueeze", x, b.whole(f"{x}.axes", 1, 4), out=f"{x}_heads") for x in (cos, sin)
            )  # B 1 L D/2 1
            real = b.op("Sub", b.op("Mul", first, cos, out="xc"), b.op("Mul", second, sin, out="ys"), out="real")
            other = b.op("Add", b.op("Mul", first, sin, out="xs"), b.op("Mul", second, cos, out="yc"), out="imaginary")
            both = b.op("Concat", real, other, out="both", axis=-1)
            turned = b.op("Reshape", both, b.whole("turned.shape", 0, 0, 0, c.head_dim), out="turned")
        return b.function(b.op("CastLike", turned, "x", out="y"))

    def attention() -> FunctionProto:
        b = body("Attention", ("q", "k", "v", "pe"), "Rotate q and k; softmax(q k^T / sqrt(D)) v")
        q, k = (b.call("RoPE", x, "pe", out=f"{x}_rotated") for x in ("q", "k"))
        if opset >= NEW:
            heads = b.op("Attention", q, k, "v", out="heads")
        else:
            towards = b.op("Transpose", k, out="k_transposed", perm=[0, 1, 3, 2])
            scores = b.op("MatMul", q, towards, out="scores_raw")
            scores = b.op("Mul", scores, b.number("scale", c.head_dim**-0.5, "q"), out="scores")
            heads = b.op("MatMul", b.op("Softmax", scores, out="attention", axis=-1), "v", out="heads")
        beside = b.op("Transpose", heads, out="tokens_first", perm=[0, 2, 1, 3])
        return b.function(b.op("Reshape", beside, b.whole("shape", 0, 0, c.hidden_size), out="attended"))

    def qkv() -> FunctionProto:
        """Unpacked as (K H D)."""
        b = body("SplitHeads", ("qkv",), "B L 3C to q, k and v, each B H L D; packed as (K H D)")
        apart = b.op("Reshape", "qkv", b.whole("shape", 0, 0, 3, c.num_heads, c.head_dim), out="apart")
        turned = b.op("Transpose", apart, out="turned", perm=[2, 0, 3, 1, 4])
        parts = b.split(turned, (1, 1, 1), ("q_one", "k_one", "v_one"), axis=0)
        first = b.whole("first", 0)
        return b.function(*(b.op("Squeeze", part, first, out=part[0]) for part in parts))

    def qk_norm() -> FunctionProto:
        b = body("QKNorm", ("q_raw", "k_raw", *_QK), "RMSNorm of queries and keys, each with a scale of its own")
        return b.function(*(b.call("RMSNorm", f"{x}_raw", scale, out=x) for x, scale in zip("qk", _QK, strict=True)))

    def mlp() -> FunctionProto:
        b = body("MLP", ("x", "0.weight", "0.bias", "2.weight", "2.bias"), "Linear, GELU, Linear")
        hidden = b.call("GELU", b.call("Linear", "x", "0.weight", "0.bias", out="0"), out="1")
        return b.function(b.call("Linear", hidden, "2.weight", "2.bias", out="2"))

    def modulate() -> FunctionProto:
        b = body("Modulate", ("x", "shift", "scale"), "x * (1 + scale) + shift")
        more = b.op("Add", "scale", b.number("one", 1.0, "scale"), out="one_plus_scale")
        return b.function(b.op("Add", b.op("Mul", "x", more, out="scaled"), "shift", out="y"))

    def add_gated() -> FunctionProto:
        b = body("AddGated", ("x", "gate", "update"), "x + gate * update: the residual stream takes in a share")
        return b.function(b.op("Add", "x", b.op("Mul", "gate", "update", out="gated"), out="y"))

    def modulation(number: int, name: str) -> FunctionProto:
        b = body(name, ("vec", "lin.weight", "lin.bias"), "Linear(SiLU(vec)), cut into shift, scale and gate")
        row = b.call("Linear", b.call("SiLU", "vec", out="active"), "lin.weight", "lin.bias", out="lin")
        every = b.op("Unsqueeze", row, b.whole("one", 1), out="for_every_token")  # B 1 6C
        names = [part + i for i in ("1", "2") for part in ("shift", "scale", "gate")] if number == 6 else list(_STEERS)
        return b.function(*b.split(every, [c.hidden_size] * number, names))

    def split_streams() -> FunctionProto:
        b = body("SplitStreams", ("tokens", "txt"), "As many tokens as there are of text, and the rest, the image")
        length = b.op("Gather", b.op("Shape", "txt", out="txt.shape"), b.whole("one", 1), out="text_tokens")
        zero, end, axis = b.whole("zero", 0), b.whole("end", 2**62), b.whole("axis", 1)
        text = b.op("Slice", "tokens", zero, length, axis, out="text")
        return b.function(text, b.op("Slice", "tokens", length, end, axis, out="image"))

    def project() -> FunctionProto:
        weights = ("qkv.weight", "qkv.bias", *_QK)
        b = body("Project", ("x", *weights), "Queries and keys, normed, and values", "double_blocks.{i}.img_attn.")
        q, k, v = b.calls("SplitHeads", b.call("Linear", "x", *weights[:2], out="qkv"), outs=("q_raw", "k_raw", "v"))
        return b.function(*b.calls("QKNorm", q, k, *_QK, outs=("q", "k")), v)

    small = (gelu, layer_norm, rms_norm, timestep_embedding, embedder, embed_nd, rotate, attention, qkv, qk_norm)
    found = [
        linear(opset),
        silu(opset),
        *(make() for make in (*small, mlp, modulate, add_gated, split_streams, project)),
    ]
    found += [modulation(6, "DoubleModulation"), modulation(3, "SingleModulation")]
    large = {
        "double_blocks.{i}.": _double_block(c, opset),
        "single_blocks.{i}.": _single_block(c, opset),
        "final_layer.": _last_layer(c, opset),
    }
    for head, function in large.items():  # the small ones serve streams of several shapes
        made = {f"{head}{out}": out for node in function.node for out in node.output}
        known = [replace(entry, name=made[entry.name]) for entry in entries() if entry.name in made]
        function.value_info.extend(_value(entry, c, dtype) for entry in known if entry.kind == "tensor")
    return [*found, *large.values()]


_STEERS = ("shift", "scale", "gate")


def _double_block(c: FluxConfig, opset: int) -> FunctionProto:
    weights = _weights_of("double_blocks.", c)
    doc = "Text and image, each with weights of its own, meet in one attention"
    b = Body("DoubleStreamBlock", ("img", "txt", "vec", "pe", *weights), doc, opset, "double_blocks.{i}.")
    steer: dict[str, Sequence[str]] = {}
    heads: dict[str, Sequence[str]] = {}
    for s in ("txt", "img"):
        names = [f"{s}_mod.{part}{i}" for i in ("1", "2") for part in _STEERS]
        steer[s] = b.calls("DoubleModulation", "vec", f"{s}_mod.lin.weight", f"{s}_mod.lin.bias", outs=names)
        ready = b.call("Modulate", b.call("LayerNorm", s, out=f"{s}_norm1"), *steer[s][:2], out=f"{s}_modulated1")
        own = [f"{s}_attn.{w}" for w in ("qkv.weight", "qkv.bias", *_QK)]
        heads[s] = b.calls("Project", ready, *own, outs=[f"{s}_attn.{x}" for x in "qkv"])
    q, k, v = (b.op("Concat", heads["txt"][i], heads["img"][i], out=x, axis=2) for i, x in enumerate("qkv"))
    b.call("Attention", q, k, v, "pe", out="attended")
    shares = b.calls("SplitStreams", "attended", "txt", outs=("txt_attended", "img_attended"))
    out = {}
    for s, share in zip(("txt", "img"), shares, strict=True):
        share = b.call("Linear", share, f"{s}_attn.proj.weight", f"{s}_attn.proj.bias", out=f"{s}_attn.proj")
        x = b.call("AddGated", s, steer[s][2], share, out=f"{s}.middle")
        ready = b.call("Modulate", b.call("LayerNorm", x, out=f"{s}_norm2"), *steer[s][3:5], out=f"{s}_modulated2")
        made = b.call(
            "MLP", ready, *(f"{s}_mlp.{w}" for w in ("0.weight", "0.bias", "2.weight", "2.bias")), out=f"{s}_mlp.2"
        )
        out[s] = b.call("AddGated", x, steer[s][5], made, out=f"{s}.output")
    return b.function(out["img"], out["txt"])


def _single_block(c: FluxConfig, opset: int) -> FunctionProto:
    weights = _weights_of("single_blocks.", c)
    doc = "Text and image as one sequence; attention and MLP side by side, from one Linear and into one Linear"
    b = Body("SingleStreamBlock", ("x", "vec", "pe", *weights), doc, opset, "single_blocks.{i}.")
    names = [f"modulation.{part}" for part in _STEERS]
    shift, scale, gate = b.calls("SingleModulation", "vec", "modulation.lin.weight", "modulation.lin.bias", outs=names)
    ready = b.call("Modulate", b.call("LayerNorm", "x", out="pre_norm"), shift, scale, out="modulated")
    both = b.call("Linear", ready, "linear1.weight", "linear1.bias", out="linear1")
    qkv, hidden = b.split(both, (3 * c.hidden_size, c.mlp_hidden_dim), ("qkv", "mlp_hidden"))
    q, k, v = b.calls("SplitHeads", qkv, outs=("q_raw", "k_raw", "v"))
    q, k = b.calls("QKNorm", q, k, *_QK, outs=("q", "k"))
    attended = b.call("Attention", q, k, v, "pe", out="attended")
    beside = b.op("Concat", attended, b.call("GELU", hidden, out="mlp_act"), out="side_by_side", axis=-1)
    made = b.call("Linear", beside, "linear2.weight", "linear2.bias", out="linear2")
    return b.function(b.call("AddGated", "x", gate, made, out="output"))


def _last_layer(c: FluxConfig, opset: int) -> FunctionProto:
    weights = ("adaLN_modulation.1.weight", "adaLN_modulation.1.bias", "linear.weight", "linear.bias")
    doc = "Modulated a last time, features become the velocity of a token's patch; shift comes before scale"
    b = Body("LastLayer", ("x", "vec", *weights), doc, opset, "final_layer.")
    row = b.call("Linear", b.call("SiLU", "vec", out="active"), *weights[:2], out="adaLN_modulation.1")
    every = b.op("Unsqueeze", row, b.whole("one", 1), out="for_every_token")
    shift, scale = b.split(every, [c.hidden_size] * 2, ("shift", "scale"))
    ready = b.call("Modulate", b.call("LayerNorm", "x", out="norm_final"), shift, scale, out="modulated")
    return b.function(b.call("Linear", ready, *weights[2:], out="velocity"))


def _weights_of(kind: str, c: FluxConfig) -> list[str]:
    """The names of one block's weights, below the block."""
    return [e.name.removeprefix(f"{kind}{{i}}.") for e in entries() if e.kind == "weight" and e.name.startswith(kind)]


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------


def transformer_graph(c: FluxConfig, opset: int, dtype: int, name: str) -> ModelProto:
    """The whole transformer without its weights: initializers have their shapes and no numbers yet.

    Args:
        c: its sizes.
        opset: 23 or later, or 17 for older tools.
        dtype: of weights and streams, as ONNX numbers it.
        name: of the graph.
    """
    names = named(c, "input", "weight")
    given = {key: entry for key, entry in names.items() if entry.kind == "input"}
    weights = {key: entry for key, entry in names.items() if entry.kind == "weight"}
    b = Body(name, [], "", opset)

    def embedded(part: str, x: str) -> str:
        return b.call("MLPEmbedder", x, *(f"{part}.{w}" for w in _EMBEDDER), out=part)

    # 1. what the picture is to be, as one vector
    parts = [embedded("time_in", b.call("TimestepEmbedding", "timesteps", out="timesteps_embedded"))]
    if c.guidance_embed:
        parts.append(embedded("guidance_in", b.call("TimestepEmbedding", "guidance", out="guidance_embedded")))
    parts.append(embedded("vector_in", "y"))
    vec = b.op("Sum", *parts, out="vec")
    # 2. tokens, and where each of them is
    img, txt = (b.call("Linear", s, *(f"{s}_in.{w}" for w in _LINEAR), out=f"{s}_in") for s in ("img", "txt"))
    ids = b.op("Concat", "txt_ids", "img_ids", out="ids", axis=1)
    pe = b.call("EmbedND", ids, out="pe")
    # 3. two streams that meet in attention
    double, single = _weights_of("double_blocks.", c), _weights_of("single_blocks.", c)
    for i in range(c.depth):
        path = f"double_blocks.{i}"
        outs = [f"{path}.img.output", f"{path}.txt.output"]
        img, txt = b.calls("DoubleStreamBlock", img, txt, vec, pe, *(f"{path}.{w}" for w in double), outs=outs)
        b.nodes[-1].name = path
    # 4. one stream
    x = b.op("Concat", txt, img, out="tokens", axis=1)
    for i in range(c.depth_single_blocks):
        path = f"single_blocks.{i}"
        x = b.call("SingleStreamBlock", x, vec, pe, *(f"{path}.{w}" for w in single), out=f"{path}.output")
        b.nodes[-1].name = path
    # 5. the text has done its work
    _, image = b.calls("SplitStreams", x, txt, outs=("text_tokens", "image_tokens"))
    last = ("adaLN_modulation.1.weight", "adaLN_modulation.1.bias", "linear.weight", "linear.bias")
    b.call("LastLayer", image, vec, *(f"final_layer.{w}" for w in last), out="velocity")
    b.nodes[-1].name = "final_layer"

    known = named(c, "tensor")
    made = {out for node in b.nodes for out in node.output}
    graph = helper.make_graph(
        b.nodes,
        name,
        [_value(entry, c, _input_dtype(key, dtype)) for key, entry in given.items()],
        [_value(known["velocity"], c, dtype)],
        [without_numbers(key, entry.shape(c), dtype) for key, entry in weights.items()],
        f"The transformer of {name}: tokens, time and text in, a velocity out",
        [
            _value(entry, c, TensorProto.FLOAT if key == "pe" else dtype)
            for key, entry in known.items()
            if key in made and key != "velocity"
        ],
    )
    return _model(graph, c, opset, dtype)


def block_graph(
    c: FluxConfig, kind: Literal["double_block", "single_block"], opset: int, dtype: int, name: str
) -> ModelProto:
    """One block by itself, its weights named below the block; otherwise as ``transformer_graph``."""
    b = Body(kind, [], "", opset)
    head = f"{kind}s."
    weights = _weights_of(head, c)
    streams = {"img": "I", "txt": "T"} if kind == "double_block" else {"x": "L"}
    function, outs = "DoubleStreamBlock", ["img.output", "txt.output"]
    if kind == "single_block":
        function, outs = "SingleStreamBlock", ["output"]
    b.calls(function, *streams, "vec", "pe", *weights, outs=outs)
    b.nodes[0].name = kind
    inputs = [value(stream, dtype, ["batch", _AXES[letter], c.hidden_size]) for stream, letter in streams.items()]
    inputs += [value("vec", dtype, ["batch", c.hidden_size])]
    inputs += [value("pe", TensorProto.FLOAT, ["batch", 1, "tokens", c.head_dim // 2, 2, 2])]
    made = [
        value(out, dtype, ["batch", _AXES[letter], c.hidden_size])
        for out, letter in zip(outs, streams.values(), strict=True)
    ]
    named = {entry.name: entry for entry in entries()}
    kept = [without_numbers(w, named[f"{head}{{i}}.{w}"].shape(c), dtype) for w in weights]
    graph = helper.make_graph(b.nodes, kind, inputs, made, kept, f"One {kind.replace('_', ' ')} of {name}")
    return _model(graph, c, opset, dtype)


def _model(graph: GraphProto, c: FluxConfig, opset: int, dtype: int) -> ModelProto:
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    parts = functions(c, opset, dtype)
    return helper.make_model(graph, functions=parts, opset_imports=imports, ir_version=10, producer_name=DOMAIN)


def _input_dtype(name: str, dtype: int) -> int:
    return TensorProto.FLOAT if name in ("img_ids", "txt_ids", "timesteps", "guidance") else dtype


def _value(entry: Entry, c: FluxConfig, dtype: int) -> ValueInfoProto:
    sizes = zip(entry.axes.split(), entry.shape(c), strict=True)
    return value(entry.name, dtype, [_AXES.get(axis, size) for axis, size in sizes], entry.meaning)
