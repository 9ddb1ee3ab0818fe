"""What Fill, Canny, Depth and Kontext are shown: whole pictures beside diffusers' pipelines of the same names."""

from dataclasses import replace

import diffusers.pipelines.flux.pipeline_flux_fill as fill_module
import diffusers.pipelines.flux.pipeline_flux_inpaint as inpaint_module
import diffusers.pipelines.flux.pipeline_flux_kontext as kontext_module
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxInpaintPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image, ImageDraw
from typer.testing import CliRunner

import fluxlab as fl
from fluxlab.cli import app
from fluxlab.files import write_tensors
from fluxlab.pipeline.control import edges
from fluxlab.pipeline.latents import pack
from fluxlab.pipeline.pictures import as_pixels, as_seen
from fluxlab.pipeline.schedule import schedule
from fluxlab.pipeline.shown import Shown, as_mask, preferred_size
from fluxlab.pipeline.tiles import encode
from fluxlab.weights.convert import convert
from tests.helpers import randomise

TINY = fl.VARIANTS["flux-tiny-dev"]
PROMPT = "a small red circle left of a large blue square on a white background"
OPTIONS = {"num_steps": 3, "guidance": 4.0, "progress": False}


def family(name, folder):
    """A variant with flux-tiny's encoders and VAE, and a transformer of random numbers."""
    known = fl.VARIANTS[name]
    sizes = replace(TINY.transformer, in_channels=known.transformer.in_channels)
    chosen = replace(TINY, name=name, transformer=sizes, pipeline=known.pipeline, shown=known.shown)
    model = randomise(fl.Flux(sizes))
    write_tensors(model.state_dict(), folder / "x.safetensors")
    convert(chosen, folder / "diffusers", "diffusers", transformer=folder / "x.safetensors", dtype=torch.float32)
    return chosen, folder / "diffusers"


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    made = {}
    for name in ("flux-fill-dev", "flux-canny-dev", "flux-kontext-dev"):
        chosen, folder = family(name, tmp_path_factory.mktemp(name))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(fl.VARIANTS, name, chosen)
            ours = fl.load(name, folder)
        theirs = DiffusionPipeline.from_pretrained(folder)
        theirs.set_progress_bar_config(disable=True)
        made[name] = ours, theirs
    return made


@pytest.fixture(autouse=True)
def the_mode(monkeypatch):
    """diffusers samples the posterior of what Fill and Canny are shown; here it takes the mode, as is published."""
    monkeypatch.setattr(fill_module, "retrieve_latents", lambda output, *_, **__: output.latent_dist.mode())
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_, **__: self.mode())


def drawn(width=128, height=128, colour="blue"):
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).ellipse((10, 20, width // 2, height // 2 + 10), fill=colour)
    return picture


def holes(width=128, height=128):
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).rectangle((width // 2, 8, width - 10, height // 2 + 3), fill=255)
    return mask


def painted(theirs, seeds=(3,), height=128, width=128, **options):
    return theirs(
        prompt=[PROMPT] * len(seeds),
        height=height,
        width=width,
        num_inference_steps=3,
        guidance_scale=4.0,
        max_sequence_length=32,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **options,
    ).images


def same(ours, theirs):
    ours = ours if isinstance(ours, list) else [ours]
    for a, b in zip(ours, theirs, strict=True):
        assert np.asarray(a).std() > 5
        assert abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 160)])
@pytest.mark.parametrize("seeds", [[3], [3, 4]])
def test_fill_is_diffusers(members, height, width, seeds):
    ours, theirs = members["flux-fill-dev"]
    image, mask = drawn(width, height), holes(width, height)
    found = ours(PROMPT, seed=seeds, image=image, mask=mask, height=height, width=width, **OPTIONS)
    same(found, painted(theirs, seeds, height, width, image=image, mask_image=mask))


def test_a_mask_of_another_size_or_gray_is_resized_and_cut_in_the_middle(members):
    ours, theirs = members["flux-fill-dev"]
    mask = holes(200, 200).resize((77, 77))  # with gray at its edges
    found = ours(PROMPT, seed=3, image=drawn(), mask=mask, **OPTIONS)
    same(found, painted(theirs, image=drawn(), mask_image=mask))


@pytest.mark.parametrize("seeds", [[3], [3, 4]])
def test_canny_is_diffusers(members, seeds):
    ours, theirs = members["flux-canny-dev"]
    edges = drawn(colour="black").convert("L").convert("RGB")
    found = ours(PROMPT, seed=seeds, control=edges, **OPTIONS)
    same(found, painted(theirs, seeds, control_image=edges))


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 160)])
@pytest.mark.parametrize("seeds", [[3], [3, 4]])
def test_kontext_is_diffusers(members, height, width, seeds):
    ours, theirs = members["flux-kontext-dev"]
    options = {"max_area": height * width, "_auto_resize": False}
    found = ours(PROMPT, seed=seeds, image=drawn(width, height), **OPTIONS)
    same(found, painted(theirs, seeds, height, width, image=drawn(width, height), **options))


def test_kontext_with_true_cfg_is_diffusers(members):
    ours, theirs = members["flux-kontext-dev"]
    options = {
        "negative_prompt": "a black background",
        "true_cfg_scale": 2.5,
        "max_area": 128**2,
        "_auto_resize": False,
    }
    found = ours(PROMPT, seed=3, image=drawn(), negative_prompt="a black background", true_cfg=2.5, **OPTIONS)
    same(found, painted(theirs, image=drawn(), **options))


def test_kontext_knows_seventeen_sizes():
    """The published list: each of its sizes is its own nearest."""
    theirs = kontext_module.PREFERRED_KONTEXT_RESOLUTIONS
    assert len(theirs) == 17
    for width, height in theirs:
        assert preferred_size(Image.new("L", (width, height)), 1024) == (height, width)
    assert preferred_size(Image.new("L", (3000, 100)), 1024) == (672, 1568)
    assert preferred_size(Image.new("L", (300, 300)), 128) == (128, 128)


def test_each_part_is_shown_what_it_says():
    """By hand, number by number: channels after the noise's in the order latent, mask; ids with 1 on axis 0."""
    latent = torch.randn(1, 16, 4, 6)
    mask = torch.zeros(1, 1, 32, 48)
    mask[0, 0, 17, 33] = 1  # of the token in row 1, column 2: there row 1, column 1; in its first cell
    hole = Shown.hole(latent, mask).channels
    assert hole.shape == (1, 6, 320)
    assert torch.equal(hole[..., :64], Shown.control(latent).channels)
    assert hole[0, 5, 64:].nonzero().flatten().tolist() == [(1 * 8 + 1) * 4]
    assert not hole[0, :5, 64:].any()
    reference = Shown.reference(latent)
    assert torch.equal(reference.tokens, Shown.control(latent).channels)
    assert reference.ids[0].tolist() == [[1, row, column] for row in range(2) for column in range(3)]


def test_only_the_noise_is_moved(members):
    ours, _ = members["flux-kontext-dev"]
    inputs = ours.prepare([PROMPT], [0], 64, 64)
    shown = Shown.reference(torch.randn(1, 16, 4, 6))
    assert shown.beside(inputs).img.shape == (1, 16 + 6, 64)
    steps = []
    out = fl.denoise(ours.model, inputs, schedule(2, 16), callback=steps.append, progress=False, shown=shown)
    assert out.shape == (1, 16, 64)
    assert [step.velocity.shape for step in steps] == [(1, 16, 64)] * 2


def test_what_does_not_fit_is_refused_before_the_first_step(members, tiny):
    fill, canny = members["flux-fill-dev"][0], members["flux-canny-dev"][0]
    inputs = fill.prepare([PROMPT], [0], 64, 64)
    control = Shown.control(torch.zeros(1, 16, 8, 8))
    for model, shown, message in (
        (fill.model, None, "takes 384 channels a token, and noise with what is shown beside it has 64; give shown"),
        (fill.model, control, "takes 384 channels a token, .* has 128"),
        (tiny.model, control, "takes 64 channels a token, .* has 128"),
        (canny.model, Shown.control(torch.zeros(1, 16, 8, 6)), "channels for 12 tokens, and img has 16; prepare it"),
    ):
        with pytest.raises(ValueError, match=message):
            fl.denoise(model, inputs, [1.0, 0.0], progress=False, shown=shown)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "flux-fill-dev",
            {"image": drawn()},
            "mask is missing: flux-fill-dev is shown image and mask beside the noise",
        ),
        ("flux-fill-dev", {"mask": holes()}, "image is missing"),
        (
            "flux-canny-dev",
            {},
            "control is missing: flux-canny-dev is shown control beside the noise, or image to make",
        ),
        (
            "flux-canny-dev",
            {"control": drawn(), "mask": holes()},
            "mask is given, and flux-canny-dev has no use for it without image",
        ),
        ("flux-canny-dev", {"image": drawn(), "mask": holes()}, "mask is given, and flux-canny-dev has no use for it;"),
        ("flux-fill-dev", {"image": [drawn()], "mask": holes()}, "image is a list; flux-fill-dev takes one picture"),
        ("flux-kontext-dev", {}, "image is missing"),
        (
            "flux-kontext-dev",
            {"image": drawn(), "strength": 0.5},
            "strength is 0.5, but this model is shown the image and",
        ),
        ("flux-fill-dev", {"image": drawn(), "mask": Image.new("L", (9, 9))}, "mask is black everywhere"),
    ],
)
def test_a_picture_that_is_missing_or_of_no_use_is_said(members, name, given, message):
    with pytest.raises(ValueError, match=message):
        members[name][0](PROMPT, **given, **OPTIONS)


def test_a_mask_of_nothing_is_refused_before_the_text_is_read(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny.text), "encode", lambda *_: pytest.fail("the prompt was encoded"))
    with pytest.raises(ValueError, match="mask is black everywhere"):
        tiny(PROMPT, image=drawn(), mask=Image.new("L", (9, 9)), strength=0.5, **OPTIONS)


def test_pictures_that_flux_tiny_is_not_shown_are_refused(tiny, tmp_path):
    drawn().save(tmp_path / "x.png")
    for option in ("control", "mask"):
        with pytest.raises(ValueError, match=f"{option} is given, and flux-tiny-dev has no use for it"):
            tiny(PROMPT, **{option: drawn()}, **OPTIONS)
        arguments = ["generate", PROMPT, "--output", str(tmp_path / "y.png"), f"--{option}", str(tmp_path / "x.png")]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert f"{option} is given, and flux-tiny-dev has no use for it" in result.output


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("seeds", [[3], [3, 4]])
def test_a_hole_without_fill_is_diffusers(tiny, tmp_path, monkeypatch, strength, seeds):
    """By mixing at every step, as FluxInpaintPipeline does."""
    monkeypatch.setattr(inpaint_module, "retrieve_latents", lambda output, *_, **__: output.latent_dist.mode())
    convert(TINY, tmp_path / "folder", "diffusers", dtype=torch.float32)
    theirs = FluxInpaintPipeline.from_pretrained(tmp_path / "folder")
    theirs.set_progress_bar_config(disable=True)
    options = {"seed": seeds, "strength": strength, "num_steps": 5, "guidance": 4.0, "progress": False}
    found = tiny(PROMPT, image=drawn(), mask=holes(), **options)
    expected = theirs(
        [PROMPT] * len(seeds),
        image=drawn(),
        mask_image=holes(),
        strength=strength,
        height=128,
        width=128,
        num_inference_steps=5,
        guidance_scale=4.0,
        max_sequence_length=32,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    same(found, expected)
    kept = np.asarray(holes()) == 0
    whole = tiny.decode(pack(encode(tiny.autoencoder, as_pixels(drawn(), 128, 128))), 128, 128)[0]
    changed = abs(np.asarray(found[0]).astype(int) - np.asarray(whole)).max(axis=2)
    assert np.median(changed[kept]) <= 3  # what is kept is what the VAE makes of the picture
    if strength == 1:
        assert changed[~kept].mean() > 5 * changed[kept].mean()


def test_canny_makes_edges_of_a_picture(members):
    """Once it has the picture's size, as is published."""
    ours, _ = members["flux-canny-dev"]
    image = drawn(256, 256)
    made = edges(image.resize((128, 128), Image.Resampling.LANCZOS))
    size = {"height": 128, "width": 128}
    with_edges = ours(PROMPT, control=made, seed=[3], **size, **OPTIONS)
    same(ours(PROMPT, image=image, seed=[3], **size, **OPTIONS), with_edges)
    assert (
        np.abs(
            np.asarray(with_edges).astype(int) - np.asarray(ours(PROMPT, control=image, seed=[3], **size, **OPTIONS))
        ).max()
        > 8
    )


def test_depth_makes_depth_of_a_picture(members, monkeypatch):
    ours, _ = members["flux-canny-dev"]
    pipe = replace(ours, variant=replace(ours.variant, shown="depth"))
    with pytest.raises(ValueError, match=r"is not on this disk .* or give control="):
        pipe(PROMPT, image=drawn(), **OPTIONS)
    monkeypatch.setattr("fluxlab.pipeline.pipeline.depth", lambda image: drawn(colour="red"))
    same(
        pipe(PROMPT, image=drawn(), seed=[3], **OPTIONS), pipe(PROMPT, control=drawn(colour="red"), seed=[3], **OPTIONS)
    )


def test_canny_starts_from_a_picture_too(members):
    ours, _ = members["flux-canny-dev"]
    options = OPTIONS | {"num_steps": 6}
    usual = ours(PROMPT, control=drawn(), **options)
    begun = ours(PROMPT, control=drawn(), image=drawn(colour="red"), strength=0.4, **options)
    assert abs(np.asarray(usual).astype(int) - np.asarray(begun)).mean() > 3


def test_a_canny_lora_on_dev_is_shown_edges(tiny, tmp_path, members):
    """BFL's layout: img_in grows, and the pipeline takes control= as long as the LoRA is on."""
    ours, _ = members["flux-canny-dev"]
    name = "img_in"
    down, up = torch.randn(4, 128), torch.randn(128, 4) / 30
    write_tensors({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "x.safetensors")
    usual = np.asarray(tiny(PROMPT, **OPTIONS))
    with tiny.add_lora({tmp_path / "x.safetensors": 0.85}):
        with pytest.raises(ValueError, match="control is missing"):
            tiny(PROMPT, **OPTIONS)
        one, other = (
            np.asarray(tiny(PROMPT, control=drawn(colour=c), **OPTIONS)).astype(int) for c in ("red", "black")
        )
        assert abs(one - other).max() > 3
    assert np.array_equal(np.asarray(tiny(PROMPT, **OPTIONS)), usual)
    assert ours.variant.shown == "edges"


@pytest.mark.usefixtures("as_users_run_it")
def test_a_mask_is_zero_or_one():
    mask = Image.new("L", (4, 4), 127)
    mask.putpixel((2, 1), 128)
    assert as_mask(mask, 4, 4)[0, 0].nonzero().tolist() == [[1, 2]]
    for wrong, said in (
        ("x", "is a str; give a PIL image"),
        (mask.convert("I"), "has mode 'I'"),
        (Image.new("L", (0, 4)), "is 0 x 4"),
    ):
        with pytest.raises(ValueError, match=f"mask {said}"):
            as_mask(wrong, 4, 4)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("control", "said"),
    [
        ("x.png", "is a str; give a PIL image"),
        (np.zeros((32, 32, 3), np.uint8), "is a ndarray; give a PIL image"),
        (Image.new("I;16", (32, 32)), "has mode 'I;16', more than 8 bits"),
        (Image.new("RGB", (0, 32)), "is 0 x 32 pixels"),
    ],
)
def test_a_control_that_is_no_picture_is_refused_by_its_name(members, control, said):
    ours, _ = members["flux-canny-dev"]
    with pytest.raises(ValueError, match=f"control {said}"):
        ours(PROMPT, control=control)


def test_the_size_of_a_control_is_that_of_the_turned_one(members, tmp_path):
    ours, _ = members["flux-canny-dev"]
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn().resize((64, 32)).save(tmp_path / "x.png", exif=exif)
    assert ours(PROMPT, control=Image.open(tmp_path / "x.png"), num_steps=1, progress=False).size == (32, 64)


def test_edges_of_a_picture_of_another_ratio_are_told(members):
    with pytest.warns(UserWarning, match="image is 100 x 40 pixels .* is stretched to 64 x 64"):
        members["flux-canny-dev"][0](PROMPT, image=Image.new("RGB", (100, 40)), height=64, width=64, **OPTIONS)
    with pytest.warns(UserWarning, match="control is 100 x 40 pixels"):
        members["flux-canny-dev"][0](PROMPT, control=Image.new("RGB", (100, 40)), height=64, width=64, **OPTIONS)


def test_what_is_transparent_of_a_mask_is_kept(tmp_path):
    """As some editors save a brush: white everywhere, and opaque where it went."""
    mask = Image.new("RGBA", (128, 128), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (32, 32, 96, 96))
    assert as_mask(mask, 128, 128).sum() == 64 * 64


def test_a_mask_between_the_cells_of_the_latent_is_refused(tiny):
    """diffusers takes every eighth pixel of it; one that has no white there would paint nothing."""
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (33, 33, 39, 39))
    picture = Image.new("RGB", (128, 128), "red")
    with pytest.raises(ValueError, match=r"mask is white between the latent's cells alone, .* make its white larger"):
        tiny("a blue square", image=picture, mask=mask, strength=1.0, num_steps=2, progress=False)


def test_a_mask_of_another_ratio_is_stretched_with_a_warning():
    with pytest.warns(UserWarning, match="mask is 64 x 64 pixels .* is stretched to 96 x 32"):
        as_mask(Image.new("L", (64, 64), 255), 32, 96)


def test_what_belongs_together_comes_together():
    tokens, ids, cells = torch.zeros(1, 4, 64), torch.zeros(1, 4, 3), torch.zeros(1, 16, 64)
    for given, missing in (
        ({"tokens": tokens}, "ids is missing"),
        ({"ids": ids}, "tokens is missing"),
        ({"kept": cells, "painted": cells}, "noise is missing"),
        ({"noise": cells}, "kept and painted is missing"),
    ):
        with pytest.raises(ValueError, match=missing):
            Shown(**given)
    Shown(tokens=tokens, ids=ids, kept=cells, painted=cells, noise=cells)


@pytest.mark.parametrize("mode", ["L", "1", "RGB"])
def test_a_transparency_that_cannot_be_read_is_said(mode):
    odd = Image.new(mode, (64, 64))
    odd.info["transparency"] = b"\x00\x01"
    try:
        odd.convert("RGBA")
    except TypeError:
        with pytest.raises(ValueError, match=f"image has mode '{mode}' .*; bring it to RGB first"):
            as_seen(odd)
    else:
        assert as_seen(odd).mode == "RGB"
