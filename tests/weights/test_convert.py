"""Whole files and whole models, official to diffusers and back."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxImg2ImgPipeline, FluxPipeline, FluxTransformer2DModel
from typer.testing import CliRunner

import fluxlab as fl
from fluxlab.cli import app
from fluxlab.files import Checkpoint, write_tensors
from fluxlab.weights.convert import convert, convert_part, diffusers_config
from fluxlab.weights.find import data_folder
from fluxlab.weights.layouts import shapes
from fluxlab.weights.load import autoencoder_config
from tests.helpers import SMALL, SMALL_AUTOENCODER, linux, peak_anonymous_memory, randomise
from tests.weights.test_quantized import Q, write_gguf

TINY = fl.VARIANTS["flux-tiny-dev"]
PROMPT = "a small red circle left of a large blue square on a white background"


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert") / "diffusers"
    result = CliRunner().invoke(app, ["convert", "flux-tiny-dev", str(folder), "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    return folder


def parts():
    return {
        "transformer": (SMALL, fl.Flux(SMALL), FluxTransformer2DModel),
        "autoencoder": (SMALL_AUTOENCODER, fl.AutoEncoder(SMALL_AUTOENCODER), AutoencoderKL),
    }


@pytest.mark.parametrize("part", ["transformer", "autoencoder"])
def test_a_part_goes_there_and_back_bit_by_bit(part, tmp_path):
    config, module, theirs = parts()[part]
    official = randomise(module).state_dict()
    write_tensors(official, tmp_path / "official.safetensors")
    convert_part(tmp_path / "official.safetensors", tmp_path / "diffusers", config, "diffusers")
    assert theirs.from_pretrained(tmp_path / "diffusers") is not None
    convert_part(tmp_path / "diffusers", tmp_path / "again.safetensors", config, "official")
    again = Checkpoint(tmp_path / "again.safetensors")
    assert again.entries.keys() == official.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in official.items())


def test_shards_written_by_diffusers_are_read(tmp_path):
    config, module, _ = parts()["transformer"]
    write_tensors(randomise(module).state_dict(), tmp_path / "official.safetensors")
    convert_part(tmp_path / "official.safetensors", tmp_path / "whole", config, "diffusers")
    FluxTransformer2DModel.from_pretrained(tmp_path / "whole").save_pretrained(
        tmp_path / "shards", max_shard_size="200KB"
    )
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    convert_part(tmp_path / "shards", tmp_path / "again.safetensors", config, "official")
    again = Checkpoint(tmp_path / "again.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in module.state_dict().items())


def test_the_dtype_is_cast_on_the_way(tmp_path):
    config, module, _ = parts()["transformer"]
    write_tensors(randomise(module).state_dict(), tmp_path / "official.safetensors")
    convert_part(tmp_path / "official.safetensors", tmp_path / "half", config, "diffusers", torch.bfloat16)
    half = Checkpoint(tmp_path / "half")
    assert {entry.dtype for entry in half.entries.values()} == {torch.bfloat16}
    assert torch.equal(half["x_embedder.weight"], module.state_dict()["img_in.weight"].bfloat16())


def test_the_last_layers_shift_and_scale_change_places(tmp_path):
    config, module, _ = parts()["transformer"]
    write_tensors(randomise(module).state_dict(), tmp_path / "official.safetensors")
    convert_part(tmp_path / "official.safetensors", tmp_path / "diffusers", config, "diffusers")
    shift, scale = module.final_layer.adaLN_modulation[1].weight.chunk(2)
    assert torch.equal(Checkpoint(tmp_path / "diffusers")["norm_out.linear.weight"], torch.cat((scale, shift)))


def test_diffusers_paints_the_same_picture(pipeline_folder, tiny):
    theirs = FluxPipeline.from_pretrained(pipeline_folder)
    theirs.set_progress_bar_config(disable=True)
    picture = theirs(
        PROMPT,
        height=128,
        width=128,
        num_inference_steps=8,
        guidance_scale=4.0,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    ours = tiny(PROMPT, seed=3, num_steps=8, guidance=4.0, progress=False)
    assert np.asarray(ours).std() > 20  # a picture
    assert abs(np.asarray(ours).astype(int) - np.asarray(picture)).max() <= 1


def test_diffusers_paints_the_same_picture_with_true_cfg(pipeline_folder, tiny):
    theirs = FluxPipeline.from_pretrained(pipeline_folder)
    theirs.set_progress_bar_config(disable=True)
    picture = theirs(
        PROMPT,
        negative_prompt="a black background",
        true_cfg_scale=2.5,
        height=96,
        width=160,
        num_inference_steps=6,
        guidance_scale=1.0,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    options = {"negative_prompt": "a black background", "true_cfg": 2.5, "height": 96, "width": 160, "guidance": 1.0}
    ours = tiny(PROMPT, seed=3, num_steps=6, progress=False, **options)
    assert abs(np.asarray(ours).astype(int) - np.asarray(picture)).max() <= 1


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_diffusers_paints_the_same_picture_from_a_picture(pipeline_folder, tiny, monkeypatch, strength):
    """diffusers samples the posterior here; it is patched to the mode, which is what the reference takes."""
    import diffusers.pipelines.flux.pipeline_flux_img2img as module

    monkeypatch.setattr(module, "retrieve_latents", lambda output, *_, **__: output.latent_dist.mode())
    theirs = FluxImg2ImgPipeline.from_pretrained(pipeline_folder)
    theirs.set_progress_bar_config(disable=True)
    start = tiny("a large yellow ring on a black background", seed=0, progress=False)
    picture = theirs(
        PROMPT,
        image=start,
        strength=strength,
        height=128,
        width=128,
        num_inference_steps=8,
        guidance_scale=4.0,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    ours = tiny(PROMPT, image=start, strength=strength, seed=3, num_steps=8, guidance=4.0, progress=False)
    assert abs(np.asarray(ours).astype(int) - np.asarray(picture)).max() <= 1


def test_a_whole_model_comes_back_from_diffusers(pipeline_folder, tmp_path, tiny):
    convert(TINY, tmp_path / "official", "official", pipeline_folder)
    again = fl.load("flux-tiny-dev", tmp_path / "official")
    for part in ("model", "autoencoder"):
        mine, theirs = (getattr(pipe, part).state_dict() for pipe in (again, tiny))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    options = {"num_steps": 2, "progress": False}  # the same weights at other addresses may round otherwise
    pictures = [np.asarray(pipe(PROMPT, **options)).astype(int) for pipe in (again, tiny)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_the_scheduler_config_is_the_published_one(pipeline_folder):
    """FLUX.1 [dev]'s scheduler_config.json."""
    config = json.loads((pipeline_folder / "scheduler/scheduler_config.json").read_text())
    published = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    assert published.items() <= config.items()
    assert config["use_dynamic_shifting"] is True


def test_a_file_of_another_variant_is_told_which_it_looks_like(tmp_path, monkeypatch):
    schnell = replace(SMALL, guidance_embed=False)
    monkeypatch.setitem(fl.VARIANTS, "flux-dev", replace(TINY, name="flux-dev", transformer=SMALL))
    write_tensors(fl.Flux(SMALL).state_dict(), tmp_path / "dev.safetensors")
    message = r"unexpected: guidance_in.* It looks like the transformer of flux-dev in the official layout"
    with pytest.raises(fl.WeightsError, match=message):
        convert_part(tmp_path / "dev.safetensors", tmp_path / "out", schnell, "diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["dev.safetensors"]

    convert_part(tmp_path / "dev.safetensors", tmp_path / "diffusers", SMALL, "diffusers")
    loaded = fl.load_weights(fl.build("flux-dev", device="meta"), tmp_path / "diffusers").state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in Checkpoint(tmp_path / "dev.safetensors").items())


def test_a_conversion_that_stops_leaves_nothing(tmp_path, monkeypatch):
    config, module, _ = parts()["transformer"]
    write_tensors(module.state_dict(), tmp_path / "official.safetensors")
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    with pytest.raises(fl.WeightsError, match="was not written as it is"):
        convert_part(tmp_path / "official.safetensors", tmp_path / "out", config, "diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["official.safetensors"]


def test_what_stands_there_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(fl.WeightsError, match="exists already"):
        convert(TINY, tmp_path / "out", "diffusers")
    assert (tmp_path / "out/mine.txt").read_text() == "mine"


@linux
def test_converting_takes_the_memory_of_a_few_tensors(tmp_path):
    config = replace(SMALL, hidden_size=512, num_heads=4, axes_dim=(16, 56, 56), depth=4, depth_single_blocks=8)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in fl.Flux(config).state_dict().items()}
    write_tensors({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "large.safetensors")
    grown = peak_anonymous_memory(
        f"from fluxlab.weights.convert import convert_part\nconfig = fl.{config!r}",
        f"convert_part({str(tmp_path / 'large.safetensors')!r}, {str(tmp_path / 'out')!r}, config, 'diffusers')",
    )
    assert grown < (tmp_path / "large.safetensors").stat().st_size / 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flux-tiny", "out"], "unknown variant 'flux-tiny'; did you mean"),
        (["flux-dev", "out"], "weights of flux-dev are not carried in data/"),
        (["flux-tiny-dev", "no/such/out"], "there is no folder"),
        (["flux-tiny-dev", "out", "--to", "official"], "is in the official layout already, and in that dtype"),
        (["flux-tiny-dev", "out", "--dtype", "int4"], "dtype is 'int4'; choose"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["convert", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["transformer", "autoencoder"])
def test_the_command_converts_one_part(part, pipeline_folder, tmp_path, tiny):
    """A part is known by its tensors; its file may have any name."""
    source = pipeline_folder / {"transformer": "transformer", "autoencoder": "vae"}[part]
    output = tmp_path / "part.safetensors"
    arguments = ["convert", "flux-tiny-dev", str(output), "--source", str(source), "--to", "official"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    module = tiny.model if part == "transformer" else tiny.autoencoder
    again = Checkpoint(output)
    assert all(torch.equal(again[name], tensor) for name, tensor in module.state_dict().items())


def test_a_part_that_is_already_in_the_layout_is_refused(pipeline_folder, tmp_path):
    with pytest.raises(fl.WeightsError, match="in the diffusers layout"):
        convert_part(pipeline_folder / "transformer", tmp_path / "out", TINY.transformer, "diffusers")


def test_a_model_whose_last_part_fails_leaves_nothing(tmp_path, monkeypatch):
    import fluxlab.weights.convert as module

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module.shutil, "copyfile", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(TINY, tmp_path / "out", "diffusers")
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_diffusers_cannot_say_is_refused(tmp_path):
    config = replace(SMALL, theta=500)
    write_tensors(fl.Flux(config).state_dict(), tmp_path / "official.safetensors")
    with pytest.raises(fl.WeightsError, match="theta is 500, and diffusers' transformer has no other than 10000"):
        convert_part(tmp_path / "official.safetensors", tmp_path / "out", config, "diffusers")


def test_the_measured_scale_and_shift_go_along(pipeline_folder, tiny):
    config = json.loads((pipeline_folder / "vae/config.json").read_text())
    assert config["scaling_factor"] == tiny.autoencoder.config.scale_factor != 1
    assert config["shift_factor"] == tiny.autoencoder.config.shift_factor != 0


def test_a_diffusers_vae_says_its_scale_and_shift_in_the_config_beside_it(pipeline_folder, tmp_path):
    vae = shutil.copytree(pipeline_folder / "vae", tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5, "shift_factor": None}))
    for path in (vae, vae / "diffusion_pytorch_model.safetensors"):
        found = autoencoder_config(TINY, path)
        assert (found.scale_factor, found.shift_factor) == (0.5, 0.0)  # null is no shift there


@pytest.mark.parametrize("name", [name for name in fl.VARIANTS if "tiny" not in name])
def test_a_folder_names_the_class_that_paints_with_it(name, tmp_path):
    known = fl.VARIANTS[name]
    small = replace(TINY.transformer, in_channels=known.transformer.in_channels)
    chosen = replace(TINY, name=name, transformer=small, pipeline=known.pipeline, transformer_file="x.safetensors")
    source = tmp_path / "official"
    convert(TINY, tmp_path / "whole", "diffusers")
    convert(TINY, source, "official", tmp_path / "whole")
    write_tensors(fl.Flux(small).state_dict(), source / "x.safetensors")
    convert(chosen, tmp_path / "out", "diffusers", source)
    kinds = {"fill": "FluxFill", "canny": "FluxControl", "depth": "FluxControl", "kontext": "FluxKontext"}
    kind = kinds.get(name.split("-")[1], "Flux")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "out")).__name__ == f"{kind}Pipeline"


def test_a_whole_model_that_lacks_its_vae_is_no_single_part(pipeline_folder, tmp_path):
    convert(TINY, tmp_path / "official", "official", pipeline_folder)
    (tmp_path / "official/ae.safetensors").unlink()
    result = CliRunner().invoke(
        app, ["convert", "flux-tiny-dev", str(tmp_path / "out"), "--source", str(tmp_path / "official")]
    )
    assert result.exit_code == 2
    assert f"not found in {tmp_path}/official: autoencoder (ae.safetensors or vae); give" in result.output


def test_a_diffusers_folder_is_loaded_as_it_is(pipeline_folder, tiny):
    again = fl.load("flux-tiny-dev", pipeline_folder)
    for ours, theirs in ((again.model, tiny.model), (again.autoencoder, tiny.autoencoder)):
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert again.autoencoder.config == tiny.autoencoder.config


def test_what_becomes_one_tensor_must_be_of_one_dtype(tmp_path):
    config, module, _ = parts()["transformer"]
    write_tensors(module.state_dict(), tmp_path / "x.safetensors")
    convert_part(tmp_path / "x.safetensors", tmp_path / "out", config, "diffusers")
    part = Checkpoint(tmp_path / "out")
    mixed = {name: part[name].half() if name.endswith("0.attn.to_k.weight") else part[name] for name in part.entries}
    write_tensors(mixed, tmp_path / "mixed.safetensors")
    with pytest.raises(
        fl.WeightsError, match=r"to_k.weight \(torch.float16\).* become one tensor, .*; give a dtype for all"
    ):
        convert_part(tmp_path / "mixed.safetensors", tmp_path / "again.safetensors", config, "official")
    convert_part(tmp_path / "mixed.safetensors", tmp_path / "again.safetensors", config, "official", torch.float32)

    eight = {name: part[name].to(torch.float8_e4m3fn) if name.endswith("to_k.weight") else part[name] for name in mixed}
    write_tensors(eight, tmp_path / "eight.safetensors")
    convert_part(tmp_path / "eight.safetensors", tmp_path / "half.safetensors", config, "official", torch.float16)


def test_nan_is_kept_and_what_a_dtype_cannot_hold_is_refused(tmp_path, pipeline_folder):
    config, module, _ = parts()["transformer"]
    weights = module.state_dict()
    weights["img_in.weight"][0, 0] = float("nan")
    write_tensors(weights, tmp_path / "nan.safetensors")
    convert_part(tmp_path / "nan.safetensors", tmp_path / "out", config, "diffusers", torch.float16)
    weights["img_in.weight"][0, 0] = 1e6
    write_tensors(weights, tmp_path / "large.safetensors")
    with pytest.raises(
        fl.WeightsError, match=r"img_in.weight has values that torch.float16 cannot hold; take torch.bfloat16"
    ):
        convert_part(tmp_path / "large.safetensors", tmp_path / "half", config, "diffusers", torch.float16)

    whole = shutil.copytree(pipeline_folder, tmp_path / "whole")
    encoder = Checkpoint(whole / "text_encoder_2")
    name = "encoder.block.0.layer.0.SelfAttention.k.weight"
    spoilt = {each: encoder[each] for each in encoder.entries} | {name: encoder[name] * float("nan")}
    write_tensors(spoilt, whole / "text_encoder_2/model.safetensors")
    convert(TINY, tmp_path / "official", "official", whole)


def test_a_text_encoder_that_cannot_be_read_is_refused_before_anything_is_written(pipeline_folder, tmp_path):
    """A scale where nothing is to be scaled; weights that are missing."""
    whole = shutil.copytree(pipeline_folder, tmp_path / "whole")
    encoder = dict(Checkpoint(whole / "text_encoder_2"))
    scale = "encoder.block.0.layer.0.SelfAttention.k.scale_weight"
    write_tensors(encoder | {scale: torch.ones(1)}, whole / "text_encoder_2/model.safetensors")
    message = f"{scale} .* scales encoder.block.0.layer.0.SelfAttention.k.weight, which is torch.float32"
    with pytest.raises(fl.WeightsError, match=message):
        convert(TINY, tmp_path / "official", "official", whole)
    encoder.pop("encoder.final_layer_norm.weight")
    encoder.pop("encoder.block.0.layer.0.layer_norm.weight")
    write_tensors(encoder, whole / "text_encoder_2/model.safetensors")
    with pytest.raises(fl.WeightsError, match=r"2 missing: encoder.block.0.layer.0.layer_norm.weight, encoder.final"):
        convert(TINY, tmp_path / "official", "official", whole)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.usefixtures("as_users_run_it")
def test_a_layout_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(fl.WeightsError, match="to is 'comfy'; choose official, diffusers, comfyui"):
        convert(TINY, tmp_path / "out", "comfy")
    with pytest.raises(fl.WeightsError, match="to is 'comfy'; choose official, diffusers, comfyui"):
        convert_part(tmp_path / "x", tmp_path / "out", SMALL, "comfy")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"scaling_factor": None}, "scale_factor.: None.* cannot be used"),
        ({"scaling_factor": "much"}, "cannot be used .could not convert"),
        ({"scaling_factor": 0.0}, "scale_factor is 0.0 .* both must be finite"),
        ({"shift_factor": float("nan")}, "shift_factor nan; both must be finite"),
    ],
)
def test_a_scale_or_shift_that_is_no_number_is_refused(pipeline_folder, tmp_path, said, message):
    vae = shutil.copytree(pipeline_folder / "vae", tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | said))
    with pytest.raises(fl.WeightsError, match=message):
        autoencoder_config(TINY, vae)


def test_the_layouts_have_diffusers_own_names():
    """The table of names, for each published variant, against the state dict of diffusers' classes."""
    for config in {v.transformer for v in fl.VARIANTS.values()} | {v.autoencoder for v in fl.VARIANTS.values()}:
        kind = FluxTransformer2DModel if isinstance(config, fl.FluxConfig) else AutoencoderKL
        with torch.device("meta"):
            theirs = kind.from_config(diffusers_config(config)).state_dict()
        assert shapes(config, "diffusers") == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


def test_an_index_of_shards_is_a_source(tmp_path):
    config, module, theirs = parts()["transformer"]
    write_tensors(randomise(module).state_dict(), tmp_path / "x.safetensors")
    convert_part(tmp_path / "x.safetensors", tmp_path / "whole", config, "diffusers")
    theirs.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    index = next((tmp_path / "shards").glob("*.index.json"))
    shutil.copyfile(index, index.with_name("another.safetensors.index.json"))
    with pytest.raises(
        fl.WeightsError, match=r"2 checkpoints \(it holds another.safetensors.index.json, diffusion.*\); give the path"
    ):
        convert_part(tmp_path / "shards", tmp_path / "again.safetensors", config, "official")
    convert_part(index, tmp_path / "again.safetensors", config, "official")
    assert Checkpoint(tmp_path / "again.safetensors").keys() == module.state_dict().keys()


@linux
def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    """Here the system's limit on a file's size, which is met in the middle of the transformer's file."""
    code = f"""
import resource, signal
import fluxlab as fl
from fluxlab.weights.convert import convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
for to, name in (("diffusers", "folder"), ("comfyui", "x.safetensors")):
    try:
        convert(fl.variant("flux-tiny-dev"), {str(tmp_path)!r} + "/" + name, to)
    except OSError as error:
        print(error.strerror)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split("\n")[:2] == ["File too large"] * 2
    assert list(tmp_path.iterdir()) == []


@linux
def test_a_process_that_is_killed_leaves_no_half_output(tmp_path):
    code = f"""
import os, signal
import fluxlab as fl
import fluxlab.weights.convert as module
module.shutil.copyfile = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # in the middle, after the large files
module.convert(fl.variant("flux-tiny-dev"), {str(tmp_path / "out")!r}, "diffusers")
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == -9
    assert not (tmp_path / "out").exists()
    convert(TINY, tmp_path / "out", "diffusers")  # what it left does not stand in the way
    assert (tmp_path / "out/model_index.json").is_file()


def test_a_target_that_cannot_be_written_is_said_before_anything_is_read(tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("fluxlab.files.tempfile.TemporaryDirectory", forbidden)
    result = CliRunner().invoke(app, ["convert", "flux-tiny-dev", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "Permission denied" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_file_of_floats_is_no_official_file_yet(tmp_path):
    """Its names, dtypes and values are; its format is not."""
    config, module, _ = parts()["transformer"]
    halves = {name: tensor.half() for name, tensor in randomise(module).state_dict().items()}
    write_gguf(tmp_path / "x.gguf", halves, Q.F16)
    convert_part(tmp_path / "x.gguf", tmp_path / "x.safetensors", config, "official")
    again = Checkpoint(tmp_path / "x.safetensors")
    assert again.keys() == halves.keys()
    assert all(torch.equal(again[name], tensor.to(again[name].dtype)) for name, tensor in halves.items())


def test_quantized_files_are_written_widened(tmp_path, tiny):
    """GGUF to the official layout and to diffusers'; the same numbers as the model that is loaded from it."""
    write_gguf(tmp_path / "x.gguf", tiny.model.state_dict())
    loaded = fl.load("flux-tiny-dev", tmp_path / "x.gguf").model.state_dict()
    for to in ("official", "diffusers"):
        output = tmp_path / ("x.safetensors" if to == "official" else "folder")
        convert(TINY, output, to, tmp_path / "x.gguf", torch.float32)
        again = fl.load_weights(fl.build("flux-tiny-dev", device="meta"), output).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in loaded.items())


def test_loose_files_go_with_a_folder_of_the_two_others(tmp_path):
    """And of a tokenizer's folder, the words alone are taken."""
    data, words = data_folder() / "flux-tiny", tmp_path / "words"
    (tmp_path / "some").mkdir()
    for name in ("flux-tiny-dev", "ae"):
        shutil.copy(data / f"{name}.safetensors", tmp_path / "some")
    for part, name in (("t5", "tokenizer_2"), ("clip", "tokenizer")):
        shutil.copytree(data / part, words / name)
        for other in ("pytorch_model.bin", "t5.gguf"):
            (words / name / other).write_bytes(b"x")
    loose = {"t5": data / "t5", "clip": data / "clip", "tokenizers": words}
    convert(TINY, tmp_path / "whole", "diffusers", tmp_path / "some", torch.float32, **loose)
    held = {file.name for name in ("tokenizer", "tokenizer_2") for file in (tmp_path / "whole" / name).iterdir()}
    assert held == {"tokenizer.json", "tokenizer_config.json", "spiece.model"}
    assert fl.load("flux-tiny-dev", tmp_path / "whole")("a red ring", num_steps=1, progress=False).size == (128, 128)
    convert(TINY, tmp_path / "part", "diffusers", data / "flux-tiny-dev.safetensors", t5=None)
    assert (tmp_path / "part/config.json").is_file()


@pytest.mark.usefixtures("as_users_run_it")
def test_a_dtype_that_is_a_word_is_refused(tmp_path):
    with pytest.raises(fl.WeightsError, match="dtype is 'bfloat16'; give a floating dtype"):
        convert(TINY, tmp_path / "x", "diffusers", dtype="bfloat16")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("to", ["official", "diffusers", "comfyui"])
def test_a_folder_of_both_layouts_is_converted_to_either(tmp_path, to):
    """As people have: an official transformer beside the parts of a diffusers folder."""
    variant = fl.variant("flux-tiny-dev")
    convert(variant, tmp_path / "whole", "diffusers")
    shutil.copytree(tmp_path / "whole", mixed := tmp_path / "mixed", ignore=shutil.ignore_patterns("transformer"))
    shutil.copy(data_folder() / variant.transformer_file, mixed)
    convert(variant, tmp_path / to, to, mixed)
    own, same = (fl.load("flux-tiny-dev", folder).model.state_dict() for folder in (mixed, tmp_path / to))
    assert all(torch.equal(tensor, same[name]) for name, tensor in own.items())
