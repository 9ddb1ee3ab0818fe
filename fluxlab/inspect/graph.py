"""The autograd graph of a module, drawn by torchviz and graphviz. No graphviz of the system's is needed."""

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fluxlab.extras import importing
from fluxlab.inspect.diagram import Diagram
from fluxlab.pipeline.inputs import FluxInputs


def graph(module: nn.Module, inputs: FluxInputs | Mapping[str, Tensor] | Tensor) -> Diagram:
    """Every operation between a module's weights and what it gives, as autograd recorded it.

    Args:
        module: any module, on a device that computes.
        inputs: what it is called with.

    Raises:
        ValueError: the module is on the meta device, or needs no gradient.
    """
    with importing():
        import pygraphviz
        from torchviz import make_dot

    parameters = dict(module.named_parameters())
    if any(p.device.type == "meta" for p in parameters.values()):
        raise ValueError("module is on the meta device, where autograd records names of nothing; build it on the cpu")
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError("module needs no gradient, so autograd records nothing; call module.requires_grad_(True)")
    with torch.enable_grad():
        if isinstance(inputs, Tensor):
            output = module(inputs)
        else:
            output = module(**(inputs.kwargs() if isinstance(inputs, FluxInputs) else inputs))
    numbers: dict[str, int] = {}  # nodes are named by their places in memory: by their order, each run draws the same
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchviz asks distutils about torch's version
        dot = make_dot(output, params=parameters)
    source = re.sub(r"\b\d{9,}\b", lambda place: f"n{numbers.setdefault(place[0], len(numbers))}", dot.source)
    with _quiet():
        drawn = pygraphviz.AGraph(string=source).draw(format="svg", prog="dot")
    svg = drawn.decode("utf-8")
    return Diagram(svg[svg.index("<svg") :])


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what graphviz' C libraries say of the system's fonts; what fails is still raised as a Python error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
