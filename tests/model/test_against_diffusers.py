"""The transformer and the autoencoder against diffusers' on the same random weights."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.transformer import Flux
from fluxlab.pipeline.latents import image_ids, text_ids
from fluxlab.weights.layouts import from_diffusers, to_diffusers
from tests.conftest import SMALL, SMALL_AUTOENCODER, randomise

KINDS = {
    "dev": SMALL,
    "schnell": replace(SMALL, guidance_embed=False),
    "fill": replace(SMALL, in_channels=384),
    "deep": replace(SMALL, depth=3, depth_single_blocks=1, num_heads=4, axes_dim=(2, 6, 8)),
}


def diffusers_transformer(config, dtype):
    theirs = FluxTransformer2DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        num_single_layers=config.depth_single_blocks,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_in_dim,
        pooled_projection_dim=config.vec_in_dim,
        guidance_embeds=config.guidance_embed,
        axes_dims_rope=config.axes_dim,
    )
    return theirs.to(dtype).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_transformer_equals_diffusers(kind, dtype, tolerance):
    config = KINDS[kind]
    ours = randomise(Flux(config)).to(dtype)
    theirs = diffusers_transformer(config, dtype)
    theirs.load_state_dict(to_diffusers(ours.state_dict(), config))

    generator = torch.Generator().manual_seed(1)
    img = torch.randn(2, 24, config.in_channels, generator=generator, dtype=dtype)
    txt = torch.randn(2, 7, config.context_in_dim, generator=generator, dtype=dtype)
    y = torch.randn(2, config.vec_in_dim, generator=generator, dtype=dtype)
    t, guidance = torch.tensor([0.3, 0.9]), torch.tensor([3.5, 1.0]) if config.guidance_embed else None
    ids, txt_ids = image_ids(2, 64, 96), text_ids(2, 7)
    with torch.no_grad():
        mine = ours(img, ids, txt, txt_ids, t, y, guidance)
        other = theirs(img, txt, y, t, ids[0], txt_ids[0], guidance).sample
    assert mine.abs().mean() > 0.1  # not a comparison of zeros
    largest = 1.0 if dtype == torch.float32 else mine.abs().max()  # diffusers norms and rotates in float32 here too
    assert (mine - other).abs().max() <= tolerance * largest


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_the_autoencoder_equals_diffusers(part):
    c = SMALL_AUTOENCODER
    ours = randomise(AutoEncoder(c))
    theirs = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(c.ch_mult),
        up_block_types=["UpDecoderBlock2D"] * len(c.ch_mult),
        block_out_channels=[c.ch * mult for mult in c.ch_mult],
        layers_per_block=c.num_res_blocks,
        latent_channels=c.z_channels,
        norm_num_groups=c.norm_groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
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
