"""ONNX functions and graphs, written as the formulas they are. Opened in chapter 13.

A function is written in Python's own syntax, with a sentence that says what it does, and what it gives after an arrow::

    def Modulate(x, shift, scale) -> y:
        "x * (1 + scale) + shift"
        y = x * (1.0 + scale) + shift

What is called is a function that was written before, or else an operator of ONNX's standard, as ``+ - * / @`` are;
keywords are attributes. Names may have dots, as those of weights do; ``*weights`` are all that the glossary has for the
function. A comment, behind a line or above it, becomes the description of the node that begins there. A number among
the inputs becomes a constant: whole numbers are int64, a list of others float32, a tuple float64, and a single one has
the model's dtype. Constants are written as tensors, the only form that every tool takes.
"""

import ast
import re
from collections.abc import Mapping

import numpy as np
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from fluxlab.config import VERSION
from fluxlab.glossary import Entry, entries

DOMAIN = "fluxlab"
NEW = 23  # the opset with norms, rotation and attention as operators
SILU = """
def SiLU(x) -> y:
    "x * sigmoid(x)"
    y = x * Sigmoid(x)
"""
_AXES = "B pictures, T text tokens, I image tokens, R of a reference; h rows and w columns of a latent, 8h x 8w pixels"
_HOW = {
    "not included": "text encoders, VAE and sampling loop are graphs of their own; a file without numbers does not run",
    "to look": "in Netron, ƒ opens a function, Ctrl+U shows the names of nodes, such as a block's number",
    "numbers": "fluxlab export VARIANT --weights; one without: onnx.load(path, load_external_data=False)",
}
_OPERATORS = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.Div: "Div", ast.MatMult: "MatMul"}
_DOT = "\N{MIDDLE DOT}"  # which Python takes inside a name, so it stands for a name's dots while Python reads the text


class Writer:
    """Makes the functions and the graph of one model.

    Args:
        opset: of the standard's operators, 23 or later, or 17 for older tools.
        dtype: of weights and features, as ONNX numbers it.
    """

    def __init__(self, opset: int, dtype: int) -> None:
        self.opset, self.dtype = opset, dtype
        self.imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
        self.functions: dict[str, FunctionProto] = {}

    def define(self, text: str, heads: Mapping[str, str] | None = None) -> None:
        """Add a text's functions; ``heads``: how the glossary's names of a function's tensors begin, if it has them."""
        functions, comments = _read(text)
        for each in functions:
            assert isinstance(each, ast.FunctionDef)
            known = _below((heads or {}).get(each.name))
            inputs = [_dotted(argument.arg) for argument in each.args.args]
            if each.args.vararg:
                inputs += [name for name, entry in known.items() if entry.kind == "weight"]
            nodes = self._nodes(each.body, comments, known)
            made = helper.make_function(DOMAIN, each.name, inputs, _names(each.returns), nodes, self.imports)
            made.doc_string = _dotted(ast.get_docstring(each) or "")
            outs = [out for node in nodes for out in node.output if out in known]
            made.value_info.extend(ValueInfoProto(name=out, doc_string=known[out].meaning) for out in outs)
            self.functions[made.name] = made

    def call(self, function: str, path: str, *inputs: str, out: str = "") -> str:
        """A line that calls a function with the weights below a path; its result is named ``out``, or as the path."""
        weights = (f"{path}.{name}" for name in self.functions[function].input[len(inputs) :])
        return f"{out or path} = {function}({', '.join([*inputs, *weights])})"

    def nodes(self, text: str) -> list[NodeProto]:
        """The nodes of a text's lines, each named after what it makes and described as the glossary describes that."""
        return self._nodes(*_read(text), _below(""))

    def _nodes(self, lines: list[ast.stmt], comments: dict[int, str], known: dict[str, Entry]) -> list[NodeProto]:
        made: dict[str, NodeProto] = {}

        def value(expression: ast.expr, outs: list[str], said: str | None, inside: bool = True) -> str:
            """Add what makes a value, and give its name: that of the line, with the operator's if it is inside."""
            match expression:
                case ast.Name():
                    return _dotted(expression.id)
                case ast.Constant(value=None):  # an input that is left out
                    return ""
                case ast.BinOp(left=left, op=operator, right=right):
                    kind, given, attributes = _OPERATORS[type(operator)], [left, right], {}
                case ast.Call(func=ast.Name(id=kind), args=given, keywords=keywords):
                    attributes = {str(each.arg): ast.literal_eval(each.value) for each in keywords}
                case _:
                    number = ast.literal_eval(expression)
                    out = f"constant_{number}".replace(" ", "") if inside else outs[0]
                    made[out] = helper.make_node("Constant", [], [out], out, value=self._tensor(out, number))
                    return out
            inputs = [value(each, outs, comments.pop(each.lineno, None)) for each in given]
            if inside:
                same = sum(name.startswith(f"{outs[0]}.{kind}") for name in made)
                outs = [f"{outs[0]}.{kind}{same + 1 if same else ''}"]
            domain = DOMAIN if kind in self.functions else None
            said = said or (known[outs[0]].meaning if outs[0] in known else None)
            made[outs[0]] = helper.make_node(kind, inputs, outs, outs[0], said, domain, **attributes)
            return outs[0]

        for line in lines:
            if isinstance(line, ast.Assign):
                value(line.value, _names(line.targets[0]), comments.pop(line.lineno, None), inside=False)
        return list(made.values())

    def _tensor(self, name: str, number: float | list[float] | tuple[float, ...]) -> TensorProto:
        kinds = {float: self.dtype, list: TensorProto.FLOAT, tuple: TensorProto.DOUBLE, int: TensorProto.INT64}
        kind = kinds[int if np.asarray(number).dtype.kind == "i" else type(number)]
        return helper.make_tensor(name, kind, np.shape(number), np.ravel(number))

    def model(self, graph: GraphProto, variant: str = "") -> ModelProto:
        """The graph, with the functions that it takes; its properties say what it is of, and how it is opened."""
        called = {node.op_type for node in graph.node}
        for function in reversed(self.functions.values()):  # each is written after those that it calls
            called |= {node.op_type for node in function.node if function.name in called}
        functions = [function for name, function in self.functions.items() if name in called]
        options = {"producer_name": DOMAIN, "producer_version": VERSION, "doc_string": f"{graph.doc_string}. {_AXES}"}
        model = helper.make_model(graph, functions=functions, opset_imports=self.imports, ir_version=10, **options)
        helper.set_model_props(model, {"name": graph.name, "variant": variant or graph.name, "version": VERSION} | _HOW)
        return model


def without_numbers(name: str, shape: tuple[int, ...], dtype: int, meaning: str = "") -> TensorProto:
    """A weight's dtype and shape; its numbers are said to be in a file, which need not be there to be looked at."""
    return TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL, doc_string=meaning)


def _below(head: str | None) -> dict[str, Entry]:
    """The glossary's entries whose names begin so, by the rest of their names; of None, none."""
    return {e.name.removeprefix(head): e for e in entries() if head is not None and e.name.startswith(head)}


def _read(text: str) -> tuple[list[ast.stmt], dict[int, str]]:
    """A text's statements, and its comments by the number of the line that they are about."""
    comments: dict[int, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        code, _, comment = line.partition("# ")
        comments |= {number if code.strip() else number + 1: comment} if comment else {}
    names = re.compile(r"(?<![\w.])(?:\d+\.)?[A-Za-z_]\w*(?:\.\w+)*")
    text = names.sub(lambda name: f"{'_' * name[0][0].isdigit()}{name[0]}".replace(".", _DOT), text)
    return ast.parse(text).body, comments


def _dotted(name: str) -> str:
    return re.sub(r"^_(?=\d)", "", name.replace(_DOT, "."))


def _names(target: ast.expr | None) -> list[str]:
    return [_dotted(each.id) for each in ast.walk(target or ast.Tuple([])) if isinstance(each, ast.Name)]
