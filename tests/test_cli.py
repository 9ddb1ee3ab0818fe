"""The command, as it is typed."""

import pytest
from PIL import Image
from typer.testing import CliRunner

import fluxlab as fl
from fluxlab.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_generate_paints_what_the_library_paints(tmp_path, tiny):
    output = tmp_path / "ring.png"
    result = run("generate", "a red ring", "--output", output, "--steps", 3, "--seed", 5, "--guidance", 2)
    assert result.exit_code == 0, result.output
    expected = tiny("a red ring", seed=5, num_steps=3, guidance=2.0, progress=False)
    assert Image.open(output).tobytes() == expected.tobytes()


def test_generate_starts_from_a_picture(tmp_path, tiny):
    start, output = Image.new("RGB", (96, 64), "green"), tmp_path / "out.png"
    start.save(tmp_path / "start.png")
    result = run("generate", "a red ring", "--output", output, "--image", tmp_path / "start.png", "--strength", 0.5)
    assert result.exit_code == 0, result.output
    expected = tiny("a red ring", image=start, strength=0.5, progress=False)
    assert Image.open(output).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "flux-tny"], "unknown variant"),
        (["--variant", "flux-dev"], "give source="),
        (["--width", "100"], "width is 100"),
        (["--output", "nowhere/x.png"], "there is no folder nowhere"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--strength", "0.5"], "there is no image"),
    ],
)
def test_generate_says_what_is_wrong_and_writes_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run("generate", "a ring", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


def test_export_makes_the_maps_and_the_gallery(tmp_path):
    result = run("export", "--output", tmp_path / "exported")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "exported/flux-dev-map.svg").read_text() == fl.model_map("flux-dev").svg
    assert Image.open(tmp_path / "exported/flux-tiny-dev-gallery.png").width > 1000


@pytest.mark.parametrize("command", ["generate", "export", "convert", "train-tiny"])
def test_every_command_has_help(command):
    assert "Usage" in run(command, "--help").output
