"""The transformer and the autoencoder against diffusers' on the same random weights."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.transformer import Flux
from fluxlab.weights.convert import diffusers_config
from fluxlab.weights.layouts import from_diffusers, to_diffusers
from tests.helpers import SMALL, SMALL_AUTOENCODER, randomise, small_inputs

KINDS = {
    "dev": SMALL,
    "schnell": replace(SMALL, guidance_embed=False),
    "fill": replace(SMALL, in_channels=384),
    "deep": replace(SMALL, depth=3, depth_single_blocks=1, num_heads=4, axes_dim=(2, 6, 8)),
}


def diffusers_transformer(config, dtype):
    return FluxTransformer2DModel.from_config(diffusers_config(config)).to(dtype).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_transformer_equals_diffusers(kind, dtype, tolerance):
    config = KINDS[kind]
    ours = randomise(Flux(config)).to(dtype)
    theirs = diffusers_transformer(config, dtype)
    theirs.load_state_dict(to_diffusers(ours.state_dict(), config))

    inputs = small_inputs(2, dtype, 1, config)
    img, ids, txt, txt_ids, t, y, guidance = inputs.values()
    with torch.no_grad():
        mine = ours(**inputs)
        other = theirs(img, txt, y, t, ids[0], txt_ids[0], guidance).sample
    assert mine.abs().mean() > 0.1  # not a comparison of zeros
    largest = 1.0 if dtype == torch.float32 else mine.abs().max()  # diffusers norms and rotates in float32 here too
    assert (mine - other).abs().max() <= tolerance * largest


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_the_autoencoder_equals_diffusers(part):
    c = SMALL_AUTOENCODER
    ours = randomise(AutoEncoder(c))
    theirs = AutoencoderKL.from_config(diffusers_config(c)).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict(), c))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if part == "encode":
            pixels = torch.randn(2, 3, 32, 48, generator=generator)
            mine = ours.encode(pixels)
            other = (theirs.encode(pixels).latent_dist.mode() - c.shift_factor) * c.scale_factor
        else:
            latent = torch.randn(2, c.z_channels, 8, 12, generator=generator)
            mine, other = ours.decode(latent), theirs.decode(latent / c.scale_factor + c.shift_factor).sample
    assert mine.abs().mean() > 0.05
    assert (mine - other).abs().max() <= 1e-5


@pytest.mark.parametrize("config", [*KINDS.values(), SMALL_AUTOENCODER])
def test_there_and_back_is_bit_exact(config):
    module = randomise(Flux(config) if hasattr(config, "axes_dim") else AutoEncoder(config))
    official = module.state_dict()
    again = from_diffusers(to_diffusers(official, config), config)
    assert again.keys() == official.keys()
    assert all(torch.equal(again[name], official[name]) for name in official)
