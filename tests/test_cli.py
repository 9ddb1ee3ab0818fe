"""The command, as it is typed."""

import warnings

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


def test_generate_paints_in_tiles(tmp_path, tiny):
    options = {"num_steps": 1, "height": 272, "width": 128}  # a tile is 256 pixels
    output = tmp_path / "tall.png"
    result = run("generate", "a red ring", "--output", output, "--steps", 1, "--height", 272, "--width", 128, "--tiled")
    assert result.exit_code == 0, result.output
    assert Image.open(output).tobytes() == tiny("a red ring", tiled=True, progress=False, **options).tobytes()
    assert Image.open(output).tobytes() != tiny("a red ring", progress=False, **options).tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "flux-tny"], "unknown variant"),
        (["--variant", "flux-dev"], "give source="),
        (["--output", "nowhere/x.png"], "there is no folder nowhere"),
        (["--output", "picture"], "give the name of a picture, such as picture.png"),
        (["--output", "picture.xyz"], "give the name of a picture"),
        (["--output", "picture.psd"], "give the name of a picture"),
        (["--output", "."], "give the name of a picture"),
        (["--output", "picture.palm"], "cannot write mode RGB as Palm"),
        (["--output", "~nobody-here/x.png"], "there is no folder ~nobody-here"),
        (["--device", "meta"], "shapes and no numbers"),
        (["--guidance", "1e300"], "guidance is 1e+300; it must be a finite number"),
        (["--width", "1600000", "--height", "1600000"], "height is 1600000; it must be a whole number of at most"),
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


def test_export_writes_one_onnx_file(tmp_path):
    result = run("export", "flux-dev", "--part", "single_block", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "flux-dev-single_block.onnx" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["flux-dev-single_block.onnx"]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("option", "value", "said"), [("--part", "middle", "part is 'middle'"), ("--opset", 3, "opset")]
)
def test_export_says_what_is_wrong(tmp_path, option, value, said):
    result = run("export", "flux-dev", "--output", tmp_path / "x.onnx", option, value)
    assert result.exit_code == 2
    assert said in result.output
    assert list(tmp_path.iterdir()) == []


def test_explain_and_summary_print_what_the_library_says():
    assert "Time, guidance and CLIP" in run("explain", "vec").output
    assert run("explain", "vecc").exit_code == 2
    shown = run("summary", "--variant", "flux-schnell", "--depth", 1, "--height", 512, "--width", 512).output
    assert "11,891,178,560 parameters" in shown
    assert repr(fl.flops("flux-schnell", 512, 512)) in shown
    assert repr(fl.memory("flux2-klein-4b")) in run("summary", "--variant", "flux2-klein-4b").output


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "generate",
            [
                "Paint a prompt.",
                "--negative-prompt <str>",
                "Forwards of the model. [default: the variant's]",
                "(0, 1]; of Redux, its weight.",
            ],
        ),
        ("export", ["Write ONNX graphs", "[default: all that is in exported/]"]),
        ("which", ["Say what a file is"]),
        ("convert", ["Convert weights between", "[default: as it is]"]),
        ("train-tiny", ["Train flux-tiny:"]),
        ("explain", ["Say what a name stands for"]),
        ("summary", ["Print a model's layers"]),
    ],
)
def test_every_command_has_help(command, said):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert all(words in " ".join(result.output.split()) for words in said)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a ring", "--output", "file/x.png"],
        ["generate", "a ring", "--lora", "x.safetensors=0.5", "--lora", "x.safetensors=0.8"],
        ["export", "--output", "file/exported"],
        ["export", "--output", "out", "--weights"],
        ["export", "--output", "out", "--opset", "17"],
        ["export", "flux-dev", "--output", "file/x.onnx"],
        ["export", "flux-dev", "--output", "x.onnx", "--opset", "3"],
        ["explain", "vecc"],
        ["summary", "--variant", "flux-tny"],
        ["convert", "flux-tiny-dev", "file/out"],
        ["convert", "flux-tiny-dev", "out", "--to", "comfy"],
        ["train-tiny", "--run", "file/run"],
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_what_goes_wrong_is_one_line_and_code_2(tmp_path, monkeypatch, arguments):
    """A file stands where a folder should be, or nothing has such a name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    result = run(*arguments)
    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1
    assert result.output.startswith("fluxlab: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_export_without_the_data_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXLAB_DATA", str(tmp_path / "nowhere"))
    result = run("export", "--output", tmp_path / "exported")
    assert result.exit_code == 2
    assert result.output.startswith("fluxlab: no data/ folder at")
    assert list((tmp_path / "exported").iterdir()) == []


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("export", "flux-dev", "--part", "single_block", "--output", "~/x.onnx").exit_code == 0
    assert (tmp_path / "x.onnx").is_file()


def test_a_reader_who_has_seen_enough_is_no_error(monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(fl, "explain", gone)
    assert isinstance(run("explain", "vec").exception, BrokenPipeError)


def test_sizes_beyond_the_machine_are_a_sentence():
    result = run("summary", "--height", 10**9, "--width", 10**9)
    assert result.exit_code == 2
    assert "too large for this machine" in result.output


def test_pictures_that_cannot_be_taken_are_a_sentence_before_any_work(tmp_path):
    bomb, torn = tmp_path / "bomb.png", tmp_path / "torn.png"
    Image.new("1", (16000, 16000)).save(bomb)
    Image.new("RGB", (200, 200), "red").save(torn)
    torn.write_bytes(torn.read_bytes()[:200])
    for path, message in ((bomb, "decompression bomb"), (torn, "truncated")):
        result = run("generate", "a ring", "--image", path, "--output", tmp_path / "x.png", "--variant", "flux-dev")
        assert result.exit_code == 2
        assert message in result.output
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", "100"], "width is 100; it must be a multiple of 16"),
        (["--steps", "0"], "steps is 0"),
        (["--guidance", "nan"], "guidance is nan"),
        (["--negative-prompt", "b"], "negative_prompt has no effect while true_cfg is 1"),
        (["--variant", "flux-tiny-fill-dev"], "image is missing: flux-tiny-fill-dev is shown image and mask"),
    ],
)
def test_what_is_wrong_is_said_before_weights_are_read(monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fluxlab.pipeline.load.fill", lambda *_: pytest.fail("weights were read"))
    result = run("generate", "a", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("as_users_run_it")
def test_a_warning_is_one_line_of_the_command(tmp_path):
    with warnings.catch_warnings(action="default"):
        said = run("generate", "a " * 60, "--steps", 1, "--output", tmp_path / "x.png").stderr
    assert "prompt 'a a" in said
    assert "site-packages" not in said


def test_no_depth_is_below_zero():
    assert "depth is -1" in run("summary", "--depth", -1).stderr
