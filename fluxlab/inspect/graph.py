"""The autograd graph of a module, drawn by torchviz and graphviz. No graphviz of the system's is needed."""

import re
import subprocess
import sys
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fluxlab.extras import importing
from fluxlab.inspect.diagram import Diagram
from fluxlab.inspect.looker import eagerly
from fluxlab.inspect.names import unwrapped
from fluxlab.inspect.working_memory import tensors_in
from fluxlab.pipeline.inputs import FluxInputs

_DRAW = """
import sys, pygraphviz
sys.stdout.buffer.write(pygraphviz.AGraph(string=sys.stdin.read()).draw(format="svg", prog="dot"))
"""


def graph(module: nn.Module, inputs: FluxInputs | Mapping[str, Tensor] | Tensor) -> Diagram:
    """Every operation between a module's weights and what it gives, as autograd recorded it.

    Args:
        module: any module, on a device that computes.
        inputs: what it is called with.

    Raises:
        ValueError: the module is on the meta device, or needs no gradient.
        RuntimeError: graphviz could not draw it.
    """
    with importing():
        import pygraphviz  # noqa: F401
        from torchviz import make_dot

    module = unwrapped(module)[""]
    parameters = dict(module.named_parameters())
    if any(p.device.type == "meta" for p in parameters.values()):
        raise ValueError("module is on the meta device, where autograd records names of nothing; build it on the cpu")
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError("module needs no gradient, so autograd records nothing; call module.requires_grad_(True)")
    with torch.inference_mode(False), torch.enable_grad(), eagerly():
        if isinstance(inputs, Tensor):
            output = module(inputs)
        else:
            output = module(**(inputs.kwargs() if isinstance(inputs, FluxInputs) else inputs))
    numbers: dict[str, int] = {}  # nodes are named by their places in memory: by their order, each run draws the same
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # torchviz asks distutils for a version
        dot = make_dot(tuple(tensors_in(output)), params=parameters)
    source = re.sub(r"\b\d{9,}\b", lambda place: f"n{numbers.setdefault(place[0], len(numbers))}", dot.source)
    # in a process of its own: graphviz' C libraries speak of the system's fonts, and a fault of theirs ends a process
    drawn = subprocess.run([sys.executable, "-c", _DRAW], input=source.encode(), capture_output=True, check=False)
    if drawn.returncode:
        raise RuntimeError(f"graphviz could not draw it: {drawn.stderr.decode(errors='replace').strip()[-300:]}")
    svg = drawn.stdout.decode()
    return Diagram(svg[svg.index("<svg") :])
