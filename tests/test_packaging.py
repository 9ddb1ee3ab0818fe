"""The project's own files agree with each other."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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


def test_the_conda_environment_is_in_step_with_the_pins():
    text = (ROOT / "environment.yml").read_text()
    assert "-r requirements.txt" in text
    assert "-e ." in text
    assert re.search(r"pytorch-cpu=(\S+)", text)[1] == PINS["torch"]
    assert f"python={PROJECT['requires-python'].removeprefix('>=')}" in text


def test_what_ci_runs_is_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()
    assert "run: make test" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_importing_fluxlab_brings_in_no_heavy_library():
    heavy = ["transformers", "matplotlib", "onnx", "diffusers", "torchinfo", "sentencepiece"]
    code = f"import sys, fluxlab; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_imports_run_one_way():
    """model knows nothing of weights, weights nothing of pipeline, and so on up."""
    order = [
        "config",
        "glossary",
        "files",
        "extras",
        "model",
        "weights",
        "pipeline",
        "inspect",
        "onnx",
        "tiny",
        "course",
        "cli",
    ]
    for i, package in enumerate(order[:-1]):
        folder = ROOT / "fluxlab" / package
        for path in [folder.with_suffix(".py")] if folder.with_suffix(".py").exists() else folder.glob("*.py"):
            text = path.read_text()
            assert "import fluxlab" not in text, f"{path} imports the whole package"
            for later in order[i + 1 :]:
                assert f"fluxlab.{later}" not in text, f"{path} imports {later}"


def test_the_model_needs_torch_einops_and_jaxtyping_alone():
    allowed = {"fluxlab", "torch", "einops", "jaxtyping", *sys.stdlib_module_names}
    for path in (ROOT / "fluxlab/model").glob("*.py"):
        found = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        assert set(found) <= allowed, path
