"""Shapes on the edges of a graph and of its functions, by ONNX's own inference. Opened in chapter 13.

Free sizes stand as large primes while shapes are inferred, and have their names again after it. Netron draws a shape
of at most 16 characters beside an edge, so the names are short: B pictures, T text and I image tokens, R of a
reference; of the VAE, h rows and w columns of the latent, which are 8h and 8w pixels.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TypeProto, ValueInfoProto, helper, shape_inference

SIZES = {"B": 10_007, "T": 20_011, "I": 30_011, "T+I": 50_022, "R": 60_013, "I+R": 90_024, "T+I+R": 110_035}
SIZES |= {"h": 40_009, "w": 50_021}
_NAMED = {size: name for name, size in SIZES.items()} | {SIZES["h"] * SIZES["w"]: "hw"}
_NAMED |= {times * SIZES[side]: f"{times}{side}" for times in (2, 4, 8) for side in "hw"}
_NUMBERS = {name: size for size, name in _NAMED.items()}
Types = dict[str, TypeProto]


def annotate(model: ModelProto, hints: Mapping[str, Sequence[Sequence[int | str]]]) -> ModelProto:
    """The model with a shape for each value of its graph and of its functions; what has a description keeps it.

    A size that is not the same in all calls of a function is left open; Netron shows it as ``?``.

    Args:
        model: its free sizes have the names above.
        hints: by a function's name, the shapes of what it gives where inference cannot know them.
    """
    functions = {}
    for function in model.functions:
        functions[function.name] = copy = FunctionProto.FromString(function.SerializeToString())
        for node in copy.node:
            if node.op_type == "GroupNormalization":  # inference knows nothing of it; this one keeps the shape as well
                node.op_type = "InstanceNormalization"
                del node.attribute[:]
    found: dict[str, dict[str, list[TypeProto]]] = {name: defaultdict(list) for name in functions}
    done: set[tuple[str, bytes]] = set()
    dtype = model.graph.output[0].type.tensor_type.elem_type

    def look(nodes: Iterable[NodeProto], known: Types, outputs: Iterable[str], told: Types) -> Types:
        """The types of all values that nodes make, once what they call was looked at."""
        graph = GraphProto(name="part", node=nodes, output=[ValueInfoProto(name=name) for name in outputs])
        graph.input.extend(ValueInfoProto(name=name, type=kind) for name, kind in known.items())
        for node in nodes:
            for name, shape in zip(node.output, hints.get(node.op_type, ()) if node.domain else (), strict=False):
                told[name] = helper.make_tensor_type_proto(dtype, [_NUMBERS.get(str(size), size) for size in shape])
        graph.value_info.extend(ValueInfoProto(name=name, type=kind) for name, kind in told.items())
        part = helper.make_model(graph, functions=functions.values(), opset_imports=model.opset_import, ir_version=10)
        inferred = shape_inference.infer_shapes(part, data_prop=True).graph
        whole = {info.name: info.type for info in (*inferred.output, *inferred.value_info) if _whole(info.type)}
        types = known | whole | told
        for node in nodes:
            function = functions.get(node.op_type) if node.domain else None
            if function is None or not all(name in types for name in node.input):
                continue
            inside = {inner: types[outer] for inner, outer in zip(function.input, node.input, strict=False)}
            key = function.name, b"".join(kind.SerializeToString() for kind in inside.values())
            if key not in done:
                done.add(key)
                pairs = zip(function.output, node.output, strict=True)
                given_back = {inner: types[outer] for inner, outer in pairs if outer in types}
                for name, kind in look(function.node, inside, function.output, given_back).items():
                    found[function.name][name].append(kind)
        return types

    given = {t.name: helper.make_tensor_type_proto(t.data_type, t.dims) for t in model.graph.initializer}
    ends = [*model.graph.input, *model.graph.output]
    for info in ends:
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = _NUMBERS[dim.dim_param]
    given |= {info.name: info.type for info in model.graph.input}
    gives = {info.name: info.type for info in model.graph.output}
    types = look(model.graph.node, given, gives, dict(gives))
    made = [name for node in model.graph.node for name in node.output if name in types and name not in gives]
    _write_shapes(model.graph, {name: [types[name]] for name in made})
    for function in model.functions:
        _write_shapes(function, found[function.name])
    for info in ends:
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_value in _NAMED:
                dim.dim_param = _NAMED[dim.dim_value]
    return model


def _whole(kind: TypeProto) -> bool:
    return kind.tensor_type.HasField("shape") and all(dim.dim_value for dim in kind.tensor_type.shape.dim)


def _write_shapes(where: GraphProto | FunctionProto, found: Mapping[str, list[TypeProto]]) -> None:
    told = {info.name: info.doc_string for info in where.value_info}
    del where.value_info[:]
    for name, kinds in found.items():
        dims = [[dim.dim_value for dim in kind.tensor_type.shape.dim] for kind in kinds]
        if len({len(each) for each in dims}) == 1:
            sizes = [set(each) for each in zip(*dims, strict=True)]  # one of each axis, or several
            shape = [_NAMED.get(min(each), min(each)) if len(each) == 1 else None for each in sizes]
            element = kinds[0].tensor_type.elem_type
            where.value_info.append(helper.make_tensor_value_info(name, element, shape, told.get(name, "")))
