"""Pictures in and out, against PIL and diffusers' image processor."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

import fluxlab as fl
from fluxlab.pipeline.pictures import as_pictures, as_pixels, as_seen
from fluxlab.weights.find import data_folder

PROMPT = "a small red ring, 犬"
FEW = {"num_steps": 2, "height": 64, "width": 48, "progress": False}


def photo(width=100, height=80, mode="RGB"):
    draws = np.random.default_rng(0)
    return Image.fromarray(draws.integers(0, 256, (height, width, len(mode)), dtype=np.uint8), mode)


@pytest.mark.filterwarnings("ignore:image is 100 x 80")
@pytest.mark.parametrize("size", [(64, 80), (96, 48), (160, 208)])
def test_an_image_is_resized_as_diffusers_does(size):
    theirs = VaeImageProcessor(vae_scale_factor=16).preprocess(photo(), *size)
    assert (as_pixels(photo(), *size) - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize(("orientation", "turned"), [(1, None), (6, Image.Transpose.ROTATE_270), (2, 0)])
def test_an_image_is_turned_as_its_exif_says(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo().save(tmp_path / "photo.png", exif=exif)
    expected = photo() if turned is None else photo().transpose(turned)
    assert as_seen(Image.open(tmp_path / "photo.png")).tobytes() == expected.tobytes()


def test_the_size_of_an_image_is_that_of_the_turned_one(tiny, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(96, 64).save(tmp_path / "photo.jpg", exif=exif)
    image = Image.open(tmp_path / "photo.jpg")
    assert tiny(PROMPT, image=image, num_steps=2, strength=0.5, progress=False).size == (64, 96)


def transparent(mode):
    """Red, all of it seen through."""
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    if mode == "P":
        image = Image.new("P", (4, 4))
        image.putpalette([255, 0, 0])
        image.info["transparency"] = 0
    if mode == "RGB":
        image = Image.new("RGB", (4, 4), (255, 0, 0))
        image.info["transparency"] = (255, 0, 0)
    return image.convert("LA") if mode == "LA" else image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_laid_on_white(mode):
    assert transparent(mode).mode == mode
    assert np.asarray(as_seen(transparent(mode))).tolist() == [[[255, 255, 255]] * 4] * 4


def test_what_is_half_transparent_is_half_white():
    assert as_seen(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_are_as_pil_shows_them(mode):
    assert as_seen(photo().convert(mode)).tobytes() == photo().convert(mode).convert("RGB").tobytes()


def test_another_ratio_is_stretched_with_a_warning_that_points_at_the_caller(tiny):
    with pytest.warns(UserWarning, match=r"image is 100 x 80 .* stretched to 48 x 64, .* crop the image") as caught:
        tiny(PROMPT, image=photo(), strength=0.5, **FEW)
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_nearly_the_same_ratio_is_no_matter():
    as_pixels(photo(100, 80), 80, 96)  # 4 %
    with pytest.raises(UserWarning, match="stretched"):
        as_pixels(photo(100, 80), 80, 94)  # 6 %


def test_pixels_are_rounded_and_clamped():
    levels = torch.tensor([100.4, 100.6, 0.0, 254.7]) / 127.5 - 1
    pixels = torch.cat([levels, torch.tensor([-3.0, 1.5])]).expand(1, 3, 1, 6)
    assert np.asarray(as_pictures(pixels)[0])[0, :, 0].tolist() == [100, 101, 0, 255, 0, 255]


def test_a_png_says_how_it_was_made(tiny, tmp_path):
    tiny(PROMPT, seed=7, guidance=2.5, **FEW).save(tmp_path / "picture.png")
    expected = {
        "prompt": PROMPT,
        "seed": "7",
        "steps": "2",
        "sampler": "Euler",
        "guidance": "2.5",
        "true_cfg": "1.0",
        "size": "48x64",
        "variant": "flux-tiny-dev",
        "version": f"fluxlab {fl.__version__}",
        "parameters": f"{PROMPT}\nSteps: 2, Sampler: Euler, CFG scale: 1.0, Distilled CFG Scale: 2.5, Seed: 7, "
        f"Size: 48x64, Model: flux-tiny-dev, Version: fluxlab {fl.__version__}",
    }
    assert Image.open(tmp_path / "picture.png").info == expected


def test_each_picture_of_a_batch_has_its_own_prompt_and_seed(tiny):
    options = {"negative_prompt": "blue", "true_cfg": 2.0, "image": photo(48, 64), "strength": 0.5}
    first, second = tiny([PROMPT, "a star"], seed=[3, 4], **FEW, **options)
    assert (first.info["prompt"], first.info["seed"]) == (PROMPT, "3")
    assert (second.info["prompt"], second.info["seed"]) == ("a star", "4")
    said = "a star\nNegative prompt: blue\nSteps: 2, Sampler: Euler, CFG scale: 2.0, Distilled CFG Scale: 4.0, Seed: 4"
    assert second.info["parameters"].startswith(f"{said}, Size: 48x64, Denoising strength: 0.5, Model: flux-tiny-dev")


def test_a_picture_is_still_a_picture_of_pils(tiny, tmp_path):
    import pickle

    picture = tiny(PROMPT, **FEW)
    for suffix in ("jpg", "webp", "gif", "bmp", "tiff"):
        picture.save(tmp_path / f"picture.{suffix}")
        assert Image.open(tmp_path / f"picture.{suffix}").size == (48, 64)
    again = pickle.loads(pickle.dumps(picture))
    assert (again.tobytes(), again.info) == (picture.tobytes(), picture.info)
    assert picture.resize((8, 8)).info["prompt"] == PROMPT


def test_a_picture_whose_exif_cannot_be_read_is_taken_as_it_is(tmp_path):
    photo().save(tmp_path / "x.png", exif=b"garbage")
    assert np.array_equal(as_seen(Image.open(tmp_path / "x.png")), photo())


@pytest.mark.usefixtures("as_users_run_it")
def test_several_pictures_are_not_one(tiny):
    for images in ([photo()], iter([photo(), photo()]), (photo() for _ in range(2))):
        with pytest.raises(ValueError, match="flux-tiny-dev takes one picture"):
            tiny(PROMPT, image=images, **FEW)


@pytest.mark.usefixtures("as_users_run_it")
def test_a_picture_that_cannot_be_read_is_named(tmp_path, tiny):
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    closed = Image.open(tmp_path / "x.png")
    closed.close()
    for picture in (Image.open(tmp_path / "torn.png"), closed, Image.new("La", (64, 64))):
        with pytest.raises(ValueError, match=r"image (cannot be read|has mode 'La')"):
            tiny("a", image=picture, num_steps=2, progress=False)


def test_a_picture_says_the_loras_that_were_on_and_tiles():
    pipe = fl.load("flux-tiny-dev")
    file = data_folder() / "flux-tiny/flux-tiny-canny-dev-lora.safetensors"
    shown = {"control": Image.new("RGB", (64, 64)), "num_steps": 1, "progress": False}
    with pipe.add_lora({file: 0.5}) as lora:
        info = pipe("a", tiled=True, **shown).info
        assert info["lora"] == f"{file.name} at 0.5"
        assert info["tiled"] == "True"
        assert f"LoRA: {file.name} at 0.5, Tiled VAE: True" in info["parameters"]
        lora.merge()
        lora.set_strength(file, 1.0)
        assert pipe("a", **shown).info["lora"] == f"{file.name} at 1"
    assert "lora" not in pipe("a", num_steps=1, height=64, width=64, progress=False).info
