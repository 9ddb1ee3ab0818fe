"""Packing, ids and noise."""

import pytest
import torch

import fluxlab as fl


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 160), (40, 72)])
def test_unpack_undoes_pack(height, width):
    latent = fl.noise([0, 1], height, width)
    tokens = fl.pack(latent)
    assert tokens.shape[1:] == (latent.shape[2] * latent.shape[3] // 4, 64)
    assert torch.equal(fl.unpack(tokens, height, width), latent)


def test_pack_equals_diffusers():
    from diffusers import FluxPipeline

    latent = fl.noise([0, 1], 48, 80)
    theirs = FluxPipeline._pack_latents(latent, 2, 16, 6, 10)
    assert torch.equal(fl.pack(latent), theirs)
    assert torch.equal(fl.unpack(theirs, 48, 80), FluxPipeline._unpack_latents(theirs, 48, 80, 8))


def test_a_token_holds_its_patch_channel_slowest():
    latent = torch.arange(16.0)[None, :, None, None] * 4 + torch.arange(4.0).reshape(1, 1, 2, 2)
    assert torch.equal(fl.pack(latent), torch.arange(64.0).reshape(1, 1, 64))


def test_the_ids_are_index_row_and_column():
    ids = fl.image_ids(2, 32, 48, index=1)
    assert ids.dtype is torch.float32
    assert ids[1].tolist() == [[1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 1, 0], [1, 1, 1], [1, 1, 2]]
    assert not fl.text_ids(2, 5).any()


def test_the_ids_equal_diffusers():
    from diffusers import FluxPipeline

    theirs = FluxPipeline._prepare_latent_image_ids(1, 5, 7, "cpu", torch.float32)
    assert torch.equal(fl.image_ids(1, 80, 112)[0], theirs)


def test_the_noise_of_a_seed_does_not_depend_on_the_batch():
    assert torch.equal(fl.noise([3, 7], 32, 32)[1:], fl.noise([7], 32, 32))
    assert not torch.equal(fl.noise([3], 32, 32), fl.noise([7], 32, 32))


def test_a_partial_token_counts_whole():
    """The reference: latents of 2 ceil(H/16) by 2 ceil(W/16)."""
    assert fl.noise([0], 1000, 1016).shape == (1, 16, 126, 128)


def test_unpacking_to_another_size_is_refused():
    with pytest.raises(ValueError, match=r"tokens has 4 image tokens, but a picture 64 high and 32 wide has 4 x 2 = 8"):
        fl.unpack(torch.zeros(1, 4, 64), 64, 32)


def test_a_latent_with_an_odd_side_is_refused():
    with pytest.raises(ValueError, match=r"latent has sides \(4, 5\); both must be even"):
        fl.pack(torch.zeros(1, 16, 4, 5))


@pytest.mark.parametrize(("height", "width", "message"), [(0, 64, "height is 0"), (64, -16, "width is -16")])
def test_a_size_that_is_not_positive_is_refused(height, width, message):
    with pytest.raises(ValueError, match=message):
        fl.image_ids(1, height, width)
