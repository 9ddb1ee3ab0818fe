"""Redux on random weights, beside diffusers' pipeline that comes before FluxPipeline."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxPriorReduxPipeline
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel
from typer.testing import CliRunner

import fluxlab as fl
from fluxlab.cli import app
from fluxlab.files import WeightsError, read_tensors, write_tensors
from fluxlab.pipeline.redux import Redux, ReduxEmbedder
from fluxlab.weights.convert import convert
from tests.helpers import randomise

PROMPT = "a small red circle left of a large blue square on a white background"
OPTIONS = {"num_steps": 3, "guidance": 4.0, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The published repository's layout, with a small SigLIP."""
    root = tmp_path_factory.mktemp("redux")
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    SiglipVisionModel(config).save_pretrained(root / "image_encoder")
    SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(root / "feature_extractor")
    embedder = randomise(ReduxEmbedder(32, 128))
    write_tensors(embedder.state_dict(), root / "flux1-redux-dev.safetensors")
    return root


@pytest.fixture(scope="module")
def pipe(folder):
    return fl.load("flux-tiny-dev", redux=folder)


def photo(colour, size=(128, 96)):
    rng = np.random.default_rng(len(colour))
    pixels = np.asarray(Image.new("RGB", size, colour)) // 2 + rng.integers(0, 128, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def theirs(pipe, folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("dev")
    convert(pipe.variant, root / "diffusers", "diffusers", dtype=torch.float32)
    base = FluxPipeline.from_pretrained(root / "diffusers")
    embedder = ReduxImageEncoder(redux_dim=32, txt_in_features=128)
    embedder.load_state_dict(pipe.redux.embedder.state_dict())
    prior = FluxPriorReduxPipeline(
        SiglipVisionModel.from_pretrained(folder / "image_encoder"),
        SiglipImageProcessor.from_pretrained(folder / "feature_extractor"),
        embedder,
        base.text_encoder,
        base.tokenizer,
        base.text_encoder_2,
        base.tokenizer_2,
    )
    base.set_progress_bar_config(disable=True)
    return prior, base


def painted(theirs, pipe, images, scales, **options):
    prior, base = theirs
    txt, y = pipe.text([PROMPT])
    many = len(images)
    told = prior(
        images,
        prompt_embeds=txt.repeat(many, 1, 1),
        pooled_prompt_embeds=y.repeat(many, 1),
        prompt_embeds_scale=scales,
        pooled_prompt_embeds_scale=scales,
    )
    start = fl.pack(fl.noise([3], 128, 128))
    shared = {"latents": start, "num_inference_steps": 3, "guidance_scale": 4.0, "height": 128, "width": 128}
    return base(**told, **shared, **options).images[0]


def same(ours, theirs):
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1


@pytest.mark.parametrize(
    ("colours", "strength", "scales"),
    [
        (["red"], None, [1.0]),
        (["red", "green"], None, [1.0, 1.0]),
        (["red", "green", "blue"], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]),
        (["red", "green"], 0.5, [0.5, 0.5]),
    ],
)
def test_redux_is_diffusers(pipe, theirs, colours, strength, scales):
    images = [photo(colour) for colour in colours]
    ours = pipe(PROMPT, image=images, strength=strength, seed=3, **OPTIONS)
    assert ours.size == (128, 128)  # its own, not the picture's
    same(ours, painted(theirs, pipe, images, scales))
    plain = pipe(PROMPT, image=[photo("white")], seed=3, **OPTIONS)
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(plain)).max() > 8  # the picture matters


def test_what_is_led_away_from_has_no_picture(pipe, theirs):
    images = [photo("red")]
    ours = pipe(PROMPT, image=images[0], seed=3, true_cfg=2.0, negative_prompt="a star", **OPTIONS)
    negative = {"negative_prompt": "a star", "true_cfg_scale": 2.0, "max_sequence_length": 32}
    same(ours, painted(theirs, pipe, images, [1.0], **negative))


def test_a_batch_is_shown_the_same_pictures(pipe):
    image = photo("red")
    both = pipe(PROMPT, image=image, seed=[3, 4], **OPTIONS)
    same(both[1], pipe(PROMPT, image=image, seed=4, **OPTIONS))


def test_it_is_read_as_diffusers_writes_it(folder, pipe, tmp_path):
    embedder = ReduxImageEncoder(redux_dim=32, txt_in_features=128)
    embedder.load_state_dict(pipe.redux.embedder.state_dict())
    embedder.save_pretrained(tmp_path / "image_embedder")
    for name in ("image_encoder", "feature_extractor"):
        (tmp_path / name).symlink_to(folder / name)
    images = [photo("red"), photo("green")]
    assert torch.equal(Redux.load(tmp_path, dtype=None, context_dim=128)(images), pipe.redux(images))


def test_it_is_read_as_published(folder, tmp_path):
    """Whose SigLIP has names of an older transformers."""
    shutil.copytree(folder, tmp_path / "x")
    weights = tmp_path / "x/image_encoder/model.safetensors"
    write_tensors({f"vision_model.{name}": tensor for name, tensor in read_tensors(weights).items()}, weights)
    found, plain = (Redux.load(each, context_dim=128).state_dict() for each in (tmp_path / "x", folder))
    assert all(torch.equal(tensor, found[name]) for name, tensor in plain.items())


def test_a_cache_tells_text_with_pictures_from_text_without(pipe):
    picture = photo("red")
    with fl.speed.cache_steps(pipe, 1e9) as cache:
        pipe("", image=picture, true_cfg=3.0, num_steps=3, progress=False)
    assert (cache.forwards, cache.skipped) == (6, 4)


def test_it_is_moved_and_cast_with_the_pipeline(folder):
    pipe = fl.load("flux-tiny-dev", redux=folder).to(torch.bfloat16)
    assert pipe(PROMPT, image=photo("red"), **OPTIONS).size == (128, 128)
    assert {p.dtype for p in pipe.redux.parameters()} == {torch.bfloat16}


def test_published_sizes_are_counted():
    with torch.device("meta"):
        assert sum(p.numel() for p in ReduxEmbedder().parameters()) == 64_503_808


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "image is missing: flux-tiny-dev is shown image beside the noise"),
        ({"image": []}, "image is an empty list"),
        ({"image": [photo("red")], "mask": photo("red")}, "mask is given, and flux-tiny-dev has no use for it"),
        ({"image": photo("red"), "strength": [1.0, 2.0]}, "give one finite number, or one for each of 1 pictures"),
        ({"image": photo("red"), "strength": float("nan")}, "give one finite number"),
        ({"image": "x.png"}, "image is a str; give a PIL image"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_what_redux_cannot_use_is_said(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, **given, **OPTIONS)


def test_several_pictures_without_redux_are_refused(tiny):
    with pytest.raises(ValueError, match="image is a list; flux-tiny-dev takes one picture"):
        tiny(PROMPT, image=[photo("red"), photo("green")], **OPTIONS)


@pytest.mark.parametrize("lost", ["flux1-redux-dev.safetensors", "image_encoder", "feature_extractor"])
def test_a_missing_part_is_named(folder, tmp_path, lost):
    for each in folder.iterdir():
        if each.name != lost:
            (tmp_path / each.name).symlink_to(each)
    with pytest.raises(WeightsError, match=r"not found: .*give the folder of FLUX.1-Redux-dev"):
        fl.load("flux-tiny-dev", redux=tmp_path)


def test_an_embedder_of_another_width_is_refused(folder):
    with pytest.raises(WeightsError, match=r"redux_down.bias is torch.float32 \[128\], where floating \[64\]"):
        Redux.load(folder, context_dim=64)


def test_the_command_takes_it(folder, tmp_path):
    photo("red").save(tmp_path / "a.png")
    photo("green").save(tmp_path / "b.png")
    arguments = ["generate", PROMPT, "--output", str(tmp_path / "c.png"), "--redux", str(folder), "--steps", "2"]
    result = CliRunner().invoke(
        app, [*arguments, "--image", str(tmp_path / "a.png"), "--image", str(tmp_path / "b.png")]
    )
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "c.png").info["strength"] == "[1.0, 1.0]"
