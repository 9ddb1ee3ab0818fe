"""Shapes on the edges of a graph and of its functions, by ONNX's own inference. Opened in chapter 13.

Free sizes stand as large primes while shapes are inferred, and have their names again after it. Netron draws a shape
of at most 16 characters beside an edge, so the names are short: B pictures, T text and I image tokens, R of a
reference; of the VAE, h rows and w columns of the latent, which are 8h and 8w pixels.
"""

from collections import defaultdict

from onnx import FunctionProto, GraphProto, ModelProto, TypeProto, helper, inliner, shape_inference

SIZES = {"B": 10_007, "T": 20_011, "I": 30_011, "T+I": 50_022, "R": 60_013, "I+R": 90_024, "T+I+R": 110_035}
SIZES |= {"h": 40_009, "w": 50_021, "hw": 40_009 * 50_021}
SIZES |= {f"{times}{side}": times * SIZES[side] for times in (2, 4, 8) for side in "hw"}
_NAMED = {size: name for name, size in SIZES.items()}


def annotate(model: ModelProto) -> ModelProto:
    """The model, whose free sizes have the names above, with a shape for each value; what has a description keeps it.

    They are inferred of a copy with its functions inlined, where each value of a function goes by their two names too.
    A size that is not the same in all calls of a function is left open; Netron shows it as ``?``.
    """
    ends = [*model.graph.input, *model.graph.output]
    free = [dim for info in ends for dim in info.type.tensor_type.shape.dim if dim.dim_param]
    for dim in free:
        dim.dim_value = SIZES[dim.dim_param]
    copy = ModelProto.FromString(model.SerializeToString())
    for body in (copy.graph, *copy.functions):
        for node in body.node:
            if node.op_type == "GroupNormalization":  # inference knows nothing of it; this one keeps the shape as well
                node.op_type = "InstanceNormalization"
                del node.attribute[:]
    for function in copy.functions:
        names = _values(function).items()
        function.node.extend(helper.make_node("Identity", [name], [f"{full}|"]) for name, full in names)
    found: dict[str, list[TypeProto.Tensor]] = defaultdict(list)  # of a value, its type in each call
    for info in _inferred(inliner.inline_local_functions(copy)).value_info:
        found[info.name.rpartition("|")[0] or info.name].append(info.type.tensor_type)  # what follows is the call's
    for body in (model.graph, *model.functions):
        told = {info.name: info.doc_string for info in body.value_info}
        del body.value_info[:]
        for name, full in _values(body).items():
            dims = [[dim.dim_value for dim in kind.shape.dim] for kind in found[full]]
            if len({len(each) for each in dims}) == 1:
                sizes = [set(each) for each in zip(*dims, strict=True)]  # one of each axis, or several
                shape = [_size(min(each)) if len(each) == 1 else None for each in sizes]
                kind = found[full][0].elem_type
                body.value_info.append(helper.make_tensor_value_info(name, kind, shape, told.get(name, "")))
    for dim in free:
        dim.dim_param = _NAMED[dim.dim_value]
    return model


def _size(size: int) -> int | str:
    """A size's name, or the size; of what GroupNorm sees as a row, it is a number times hw."""
    times, rest = divmod(size, SIZES["hw"])
    return _NAMED.get(size) or (size if rest else f"{times}hw")


def _values(body: GraphProto | FunctionProto) -> dict[str, str]:
    """What the nodes make, and what a function takes, each with its name in the whole model."""
    made = [name for node in body.node for name in node.output]
    if isinstance(body, FunctionProto):
        return {name: f"{body.name}|{name}" for name in (*body.input, *body.output, *made)}
    return {name: name for name in made}


def _inferred(model: ModelProto) -> GraphProto:
    """The graph with its shapes: once inferred, sizes that nodes ask for are numbers, and tell more the second time."""
    for _ in range(2):
        model = shape_inference.infer_shapes(model, data_prop=True)
        known = {info.name: info.type.tensor_type.shape.dim for info in (*model.graph.input, *model.graph.value_info)}
        for node in model.graph.node:
            if node.op_type == "Shape":
                cut = {each.name: each.i for each in node.attribute}
                sizes = [dim.dim_value for dim in known[node.input[0]]][cut.get("start") : cut.get("end")]
                node.CopyFrom(helper.make_node("Constant", [], node.output, value_ints=sizes))
    return model.graph
