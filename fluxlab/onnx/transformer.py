"""FLUX's transformer as an ONNX graph that a person can read: one node a block. Opened in chapter 13."""

from onnx import ModelProto, helper

from fluxlab.config import FluxConfig
from fluxlab.glossary import entries, named
from fluxlab.onnx.parts import define_parts, value
from fluxlab.onnx.text import Writer, without_numbers

_BLOCKS = {
    "DoubleStreamBlock": ("double", "text and image, each with weights of its own, meet in one attention"),
    "SingleStreamBlock": ("single", "text and image as one sequence, attention and MLP side by side"),
}


def transformer_graph(writer: Writer, c: FluxConfig, name: str, reference: bool = False) -> ModelProto:
    """The whole transformer without its weights: initializers have their shapes and no numbers yet.

    ``reference``: whether the tokens of another picture go with the image's, as Kontext takes them.
    """
    define_parts(writer, c)
    call = writer.call

    # 1. what the picture is to be, as one vector
    lines: list[str] = []
    numbers = {"time_in": "timesteps", "guidance_in": "guidance"} if c.guidance_embed else {"time_in": "timesteps"}
    for path, x in numbers.items():
        lines += [f"{x}_embedded = TimestepEmbedding({x})", call("MLPEmbedder", path, f"{x}_embedded")]
    lines += [call("MLPEmbedder", "vector_in", "y"), f"vec = Sum({', '.join(numbers)}, vector_in)"]
    # 2. tokens, and where each of them is
    img, img_ids = "img", "img_ids"
    if reference:
        img, img_ids = "img_and_reference", "img_and_reference_ids"
        lines += [f"{img} = Concat(img, reference, axis=1)", f"{img_ids} = Concat(img_ids, reference_ids, axis=1)"]
    lines += [call("Linear", "img_in", img), call("Linear", "txt_in", "txt")]
    lines += [f"ids = Concat(txt_ids, {img_ids}, axis=1)", "pe = EmbedND(ids)"]
    # 3. two streams that meet in attention
    img, txt, vec, pe = "img_in", "txt_in", "vec", "pe"
    for i in range(c.depth):
        path, given = f"double_blocks.{i}", (img, txt, vec, pe)
        img, txt, vec, pe = (f"{path}.{out}" for out in ("img.output", "txt.output", "next.vec", "next.pe"))
        lines += [call("DoubleStreamBlock", path, *given, out=f"{img}, {txt}, {vec}, {pe}")]
    # 4. one stream
    lines += [f"tokens = Concat({txt}, {img}, axis=1)"]
    x = "tokens"
    for i in range(c.depth_single_blocks):
        path, taken = f"single_blocks.{i}", (x, vec, pe)
        x, vec, pe = (f"{path}.{out}" for out in ("output", "next.vec", "next.pe"))
        lines += [call("SingleStreamBlock", path, *taken, out=f"{x}, {vec}, {pe}")]
    # 5. the text has done its work
    lines += [f"text_tokens, image_tokens = SplitStreams({x}, {txt})"]
    if reference:
        lines += ["noise_tokens, reference_tokens = SplitReference(image_tokens, img)"]
    lines += [call("LastLayer", "final_layer", "noise_tokens" if reference else "image_tokens", vec, out="velocity")]

    nodes = writer.nodes("\n".join(lines))
    for node in nodes:  # a block is called by its own name, not by what it makes
        node.name = node.name.removesuffix(".img.output").removesuffix(".output")
        if node.op_type in _BLOCKS:
            kind, said = _BLOCKS[node.op_type]
            depth = c.depth if kind == "double" else c.depth_single_blocks
            node.doc_string = f"{kind.capitalize()} block {node.name.rpartition('.')[2]} of 0 to {depth - 1}: {said}"
    nodes[-1].name = "final_layer"
    known, inputs = named(c, "tensor"), named(c, "input")
    others = {"reference": inputs["img"], "reference_ids": inputs["img_ids"]} if reference else {}
    more = [value(entry, c, writer.dtype, each) for each, entry in others.items()]
    for info in more:
        info.type.tensor_type.shape.dim[1].dim_param = "R"
        info.doc_string = f"Of the picture that is shown: {info.doc_string[0].lower()}{info.doc_string[1:]}"
    made = {out for node in nodes for out in node.output} - {"velocity"}
    graph = helper.make_graph(
        nodes,
        name,
        [*(value(entry, c, writer.dtype) for entry in inputs.values()), *more],
        [value(known["velocity"], c, writer.dtype)],
        [without_numbers(key, entry.shape(c), writer.dtype) for key, entry in named(c, "weight").items()],
        f"The transformer of {name}: tokens, time and text in, a velocity out",
        [value(entry, c, writer.dtype) for key, entry in known.items() if key in made],
    )
    return writer.model(graph, name)


def block_graph(writer: Writer, c: FluxConfig, kind: str, name: str) -> ModelProto:
    """One double_block or single_block, its weights named below the block; otherwise as ``transformer_graph``."""
    define_parts(writer, c)
    block = writer.functions["DoubleStreamBlock" if kind == "double_block" else "SingleStreamBlock"]
    del block.output[-2:], block.node[-2:]  # what is handed on to the next block
    nodes = writer.nodes(f"{', '.join(block.output)} = {block.name}({', '.join(block.input)})")
    nodes[0].name = kind
    streams = ["img", "txt"] if kind == "double_block" else ["x"]
    known, head = {entry.name: entry for entry in entries()}, f"{kind}s.{{i}}."
    inputs = [value(known[f"{head}{s}.input".replace("x.", "")], c, writer.dtype, s) for s in streams]
    graph = helper.make_graph(
        nodes,
        kind,
        [*inputs, value(known["vec"], c, writer.dtype), value(known["pe"], c, writer.dtype)],
        [value(known[head + out], c, writer.dtype, out) for out in block.output],
        [without_numbers(w, known[head + w].shape(c), writer.dtype) for w in block.input[len(streams) + 2 :]],
        f"One {kind.replace('_', ' ')} of {name}",
    )
    return writer.model(graph, name)
