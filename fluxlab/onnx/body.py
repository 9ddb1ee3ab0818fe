"""How one ONNX function is written, and what all of them share. Opened in chapter 13."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from onnx import FunctionProto, NodeProto, TensorProto, ValueInfoProto, helper

from fluxlab.glossary import entries

DOMAIN = "fluxlab"
NEW = 23  # the opset with norms, rotation and attention as operators


class Body:
    """The inside of one function, in the making: each call adds a node and gives the name of what it makes."""

    def __init__(self, name: str, inputs: Sequence[str], doc: str, opset: int, glossary: str = "") -> None:
        self.name, self.inputs, self.doc, self.opset, self.glossary = name, list(inputs), doc, opset, glossary
        self.nodes: list[NodeProto] = []

    def ops(self, kind: str, *inputs: str, outs: Sequence[str], domain: str = "", **attributes: Any) -> Sequence[str]:
        """A node with several outputs; its doc string is what the glossary says of the first."""
        said = meanings().get(self.glossary + outs[0])
        node = helper.make_node(kind, inputs, outs, outs[0], said, domain or None, **attributes)
        self.nodes.append(node)
        return outs

    def op(self, kind: str, *inputs: str, out: str, **attributes: Any) -> str:
        """A node with one output."""
        return self.ops(kind, *inputs, outs=[out], **attributes)[0]

    def call(self, kind: str, *inputs: str, out: str) -> str:
        """A call of another function of ours."""
        return self.ops(kind, *inputs, outs=[out], domain=DOMAIN)[0]

    def calls(self, kind: str, *inputs: str, outs: Sequence[str]) -> Sequence[str]:
        """The same with several outputs."""
        return self.ops(kind, *inputs, outs=outs, domain=DOMAIN)

    def whole(self, out: str, *values: int) -> str:
        """A constant of whole numbers."""
        return self.op("Constant", out=out, value_ints=list(values))

    def number(self, out: str, value: float, like: str) -> str:
        """A constant number in the dtype of another value."""
        return self.op("CastLike", self.op("Constant", out=f"{out}.float", value_float=value), like, out=out)

    def split(self, x: str, sizes: Sequence[int], outs: Sequence[str], axis: int = -1) -> Sequence[str]:
        """A tensor cut along an axis."""
        return self.ops("Split", x, self.whole(f"{outs[0]}.sizes", *sizes), outs=outs, axis=axis)

    def function(self, *outputs: str) -> FunctionProto:
        """The finished function."""
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(DOMAIN, 1)]
        made = helper.make_function(DOMAIN, self.name, self.inputs, outputs, self.nodes, imports)
        made.doc_string = self.doc
        return made


@cache
def meanings() -> dict[str, str]:
    """What the glossary says of each name."""
    return {entry.name: entry.meaning for entry in entries()}


def linear(opset: int) -> FunctionProto:
    """``x @ weight^T + bias``."""
    b = Body("Linear", ("x", "weight", "bias"), "x @ weight^T + bias", opset)
    turned = b.op("Transpose", "weight", out="weight_transposed", perm=[1, 0])
    return b.function(b.op("Add", b.op("MatMul", "x", turned, out="product"), "bias", out="y"))


def silu(opset: int) -> FunctionProto:
    """``x * sigmoid(x)``."""
    b = Body("SiLU", ("x",), "x * sigmoid(x)", opset)
    return b.function(b.op("Mul", "x", b.op("Sigmoid", "x", out="sigmoid"), out="y"))


def without_numbers(name: str, shape: Sequence[int], dtype: int) -> TensorProto:
    """A weight's dtype and shape; its numbers are said to be in a file, which need not be there to be looked at."""
    return TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)


def value(name: str, dtype: int, axes: Sequence[str | int], meaning: str = "") -> ValueInfoProto:
    """A tensor's dtype and shape; an axis of free size has a name."""
    return helper.make_tensor_value_info(name, dtype, axes, meaning)
