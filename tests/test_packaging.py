"""The project's own files agree with each other."""

import ast
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from vulture import Vulture

from tests.chapters import NOTEBOOKS, code, read

ROOT = Path(__file__).parents[1]
PINS = dict(
    line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line and line[0] != "#"
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]


@pytest.mark.parametrize("text", RANGES)
def test_each_range_admits_its_pin(text):
    requirement = Requirement(text)
    pins = {name.lower().replace("_", "-"): version for name, version in PINS.items()}
    assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")])


def test_the_oldest_python_that_is_named_is_named_alike_and_every_pin_admits_its_first_release():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    for file in ("README.md", ".github/workflows/ci.yml", "Makefile"):
        assert re.search(rf"ython[^\n]*\b{re.escape(oldest)}\b", (ROOT / file).read_text()), file
    needed = {name: metadata(name).get("Requires-Python") or "" for name in PINS}
    assert {name: what for name, what in needed.items() if not SpecifierSet(what).contains(f"{oldest}.0")} == {}


def test_the_conda_environment_is_in_step_with_the_pins():
    text = (ROOT / "environment.yml").read_text()
    assert "-r requirements.txt" in text
    assert "-e ." in text
    assert re.search(r"pytorch-cpu=(\S+)", text)[1] == PINS["torch"]
    assert f"python={PROJECT['requires-python'].removeprefix('>=')}" in text


def test_what_ci_runs_is_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()
    assert "run: make test\n" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_importing_fluxlab_brings_in_no_heavy_library():
    heavy = ["transformers", "matplotlib", "onnx", "diffusers", "torchinfo", "sentencepiece"]
    code = f"import sys, fluxlab; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


ROOMS = [
    "arguments",
    "config",
    "glossary",
    "files",
    "extras",
    "model",
    "weights",
    "pipeline",
    "speed",
    "inspect",
    "onnx",
    "tiny",
]
ROOMS += ["course", "__init__", "cli", "__main__"]


def modules():
    for path in sorted((ROOT / "fluxlab").rglob("*.py")):
        yield path.relative_to(ROOT / "fluxlab"), ast.parse(path.read_text())


def imported(tree):
    """Full dotted names, of what is imported inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def test_imports_run_one_way():
    """model knows nothing of weights, weights nothing of pipeline, and so on up."""
    for path, tree in modules():
        room = path.parts[0].removesuffix(".py")
        assert room in ROOMS, f"{path} is in no room of the house"
        for name in imported(tree):
            assert not name.startswith("."), f"{path} imports {name}: write it out from fluxlab on"
            if name.split(".")[0] == "fluxlab":
                below = [*name.split("."), "__init__"][1]
                assert below in ROOMS[: ROOMS.index(room) + 1], f"{path} imports {name}, which stands above it"


def test_no_private_name_of_another_library_is_used():
    """A name with an underscore that nothing here defines is somebody else's, and may be gone tomorrow."""
    ours, used = {"_fields", "_getframe"}, {}  # both are documented by Python
    for path, tree in modules():
        ours |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        ours |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        ours |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
        names = [node.attr for node in attributes] + [part for name in imported(tree) for part in name.split(".")]
        used |= {name: path for name in names if re.match("_[^_]", name)}
    assert {name: path for name, path in used.items() if name not in ours} == {}


def test_there_is_no_dead_code():
    """All is used by the library or by a chapter; what only a test uses is dead."""
    found_by_name = ["_repr_*", "__class__", "types", "doc_string", "domain", "raw_data"]  # by Jupyter, torch, protobuf
    found_by_name += ["fingerprint", "set_strength", "explore", "tensor_names", "rotation"]
    vulture = Vulture(ignore_names=found_by_name, ignore_decorators=["@app.*", "@_command"])
    vulture.scavenge([ROOT / "fluxlab"])
    for path in NOTEBOOKS:
        vulture.scan("\n".join(cell.source for cell in code(read(path))), filename=path)
    assert [each.get_report() for each in vulture.get_unused_code() if each.filename.suffix == ".py"] == []


def test_the_model_needs_torch_einops_and_jaxtyping_alone():
    allowed = {"fluxlab", "torch", "einops", "jaxtyping", *sys.stdlib_module_names}
    for path in (ROOT / "fluxlab/model").glob("*.py"):
        assert {name.split(".")[0] for name in imported(ast.parse(path.read_text()))} <= allowed, path


def test_every_file_in_exported_is_told_of():
    folder = ROOT / "exported"
    told = (folder / "README.md").read_text().replace("\\*", "*")
    patterns = re.findall(r"[\w*.-]+\.(?:onnx|svg|png|json|html|md)", told)
    bare = [
        f.name for f in folder.iterdir() if f.is_file() and not any(fnmatch(f.name, pattern) for pattern in patterns)
    ]
    assert bare == ["README.md"]
