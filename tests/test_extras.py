"""Libraries that are not there, or do not fit: said in one line, wherever they are used."""

import sys
import types

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fluxlab as fl
from fluxlab.cli import app
from fluxlab.course import others
from fluxlab.tiny.measure import look
from fluxlab.tiny.train import train
from tests.helpers import SMALL, small_inputs


def tape():
    model = fl.Flux(SMALL)
    with fl.capture(model, "img_in") as taken:
        model(**small_inputs())
    return taken


USES = [
    ("torchinfo", lambda path: fl.summary("flux-tiny-dev")),
    ("matplotlib", lambda path: fl.plots.figure()),
    ("pygraphviz", lambda path: fl.graph(fl.build("flux-tiny-dev"), fl.example_inputs("flux-tiny-dev"))),
    ("torchviz", lambda path: fl.graph(fl.build("flux-tiny-dev"), fl.example_inputs("flux-tiny-dev"))),
    ("ipywidgets", lambda path: fl.explore(tape())),
    ("IPython", lambda path: fl.explore(tape())),
    ("onnx", lambda path: fl.export_onnx("flux-dev", path / "x.onnx")),
    ("onnx", lambda path: fl.export_onnx("flux-dev", path / "x.onnx", flat=True)),
    ("onnxscript", lambda path: fl.export_onnx("flux-tiny-dev", path / "x.onnx", "clip", weights=True)),
    ("scipy", lambda path: look(np.zeros((8, 8, 3), np.uint8))),
    ("scipy", lambda path: train(path / "run", output=path / "out")),
    ("diffusers", lambda path: others.other("SD 1.5")),
]


@pytest.mark.parametrize(("library", "use"), USES)
def test_a_missing_library_is_said_with_what_brings_it(tmp_path, monkeypatch, library, use):
    for name in [name for name in sys.modules if name.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        ImportError, match=rf"^{library} is not installed here; pip install 'fluxlab\[course\]' brings it$"
    ):
        use(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("library", "arguments"), [("torchinfo", ["summary"]), ("pygraphviz", ["export"]), ("onnx", ["export", "flux-dev"])]
)
def test_the_command_says_it_too(tmp_path, monkeypatch, library, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    if arguments == ["export", "flux-dev"]:
        arguments = [*arguments, "--output", "x.onnx"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.output == f"fluxlab: {library} is not installed here; pip install 'fluxlab[course]' brings it\n"


def test_a_torchvision_of_another_torch_is_named(monkeypatch):
    """What transformers raises then names one of its own classes, and keeps the reason to itself."""
    spoilt = types.ModuleType("transformers")

    def absent(name):
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ModuleNotFoundError(f"Could not import module '{name}'. Are this object's requirements...") from error

    spoilt.__getattr__ = absent
    monkeypatch.setitem(sys.modules, "transformers", spoilt)
    message = rf"torchvision::nms.*built for another torch than {torch.__version__.partition('+')[0]}.*or remove it"
    with pytest.raises(ImportError, match=message):
        fl.load("flux-tiny-dev")
