"""The VAE in tiles against diffusers' tiled VAE, and what tiles change."""

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import fluxlab as fl
from fluxlab.pipeline import tiles
from fluxlab.weights.convert import diffusers_config
from fluxlab.weights.layouts import to_diffusers


@pytest.fixture(scope="module")
def theirs(tiny):
    autoencoder = AutoencoderKL.from_config(diffusers_config(tiny.autoencoder.config)).eval()
    autoencoder.load_state_dict(to_diffusers(tiny.autoencoder.state_dict(), tiny.autoencoder.config))
    autoencoder.enable_tiling()
    autoencoder.tile_sample_min_size, autoencoder.tile_latent_min_size = 64, 8
    return autoencoder


# at 14 the last tile is 2 wide, at 13 it is 1; at 8 a second tile lies in the first
@pytest.mark.parametrize("cells", [(16, 14), (13, 8), (6, 20), (8, 8)])
@torch.no_grad()
def test_tiled_decoding_equals_diffusers(tiny, theirs, cells):
    config = tiny.autoencoder.config
    latent = torch.randn(2, 16, *cells, generator=torch.Generator().manual_seed(0))
    ours = tiles.in_tiles(tiny.autoencoder.decode, latent, 8, 64)
    other = theirs.decode(latent / config.scale_factor + config.shift_factor).sample
    assert ours.shape == other.shape
    assert (ours - other).abs().max() <= 1e-4
    whole = tiny.autoencoder.decode(latent)
    assert ((ours - whole).abs().max() > 1e-2) == (max(cells) > 8)


@torch.no_grad()
def test_tiled_encoding_equals_diffusers(tiny, theirs):
    config = tiny.autoencoder.config
    pixels = torch.rand(1, 3, 112, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = tiles.in_tiles(tiny.autoencoder.encode, pixels, 64, 8)
    other = (theirs.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scale_factor
    assert (ours - other).abs().max() <= 1e-4


def test_the_pipeline_works_in_tiles_of_twice_the_trained_side(tiny):
    tokens = fl.pack(fl.noise([0], 272, 32) * 0.5)
    whole, tiled = (tiny.decode(tokens, 272, 32, tiled=tiled)[0] for tiled in (False, True))
    assert whole.size == tiled.size == (32, 272)
    assert whole.tobytes() != tiled.tobytes()
    latent = fl.unpack(tokens, 272, 32)
    with torch.no_grad():
        expected = tiles.in_tiles(tiny.autoencoder.decode, latent, 32, 256)
    assert torch.equal(tiles.decode(tiny.autoencoder, latent, tiled=True), expected)
    small = fl.pack(fl.noise([0], 256, 32))
    assert tiny.decode(small, 256, 32, tiled=True)[0].tobytes() == tiny.decode(small, 256, 32)[0].tobytes()


def test_a_prompt_is_painted_in_tiles(tiny, monkeypatch):
    asked = []
    for name in ("encode", "decode"):
        real = getattr(tiles, name)
        watch = lambda vae, x, tiled, real=real, name=name: asked.append((name, tiled)) or real(vae, x, tiled)  # noqa: E731
        monkeypatch.setattr(f"fluxlab.pipeline.pipeline.{name}", watch)
    options = {"image": Image.new("RGB", (32, 32)), "num_steps": 2, "strength": 0.5, "progress": False}
    tiny("a ring", **options)
    tiny("a ring", tiled=True, **options)
    assert asked == [("encode", False), ("decode", False), ("encode", True), ("decode", True)]


def test_no_tile_is_larger_than_asked(tiny):
    """So that a picture of any size takes the memory of one tile."""
    seen = []

    def function(x):
        seen.append(tuple(x.shape[-2:]))
        return x.repeat_interleave(8, -1).repeat_interleave(8, -2)

    x = torch.randn(1, 1, 50, 37)
    assert torch.allclose(tiles.in_tiles(function, x, 16, 128), function(x), atol=1e-6)  # what is local is not changed
    assert max(max(shape) for shape in seen[:-1]) == 16
