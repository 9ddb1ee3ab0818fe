"""Configs that do not fit together, and names that do not exist."""

from dataclasses import replace

import numpy as np
import pytest

import fluxlab as fl


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes_dim": (15, 57, 56)}, "axes_dim is .* turns features in pairs: give positive even numbers"),
        ({"axes_dim": (16, 56, 58)}, r"sums to 130; it must sum to .* = 128"),
        ({"num_heads": 25}, "num_heads is 25, which does not divide hidden_size 3072"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be a whole number of at least 1"),
        ({"depth": -1}, "depth is -1; it must be a whole number of at least 0"),
        ({"mlp_ratio": -1.0}, "mlp_ratio is -1.0; it must be a finite number above 0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is nan; it must be a finite number above 0"),
        ({"num_heads": 24.0}, "num_heads is 24.0; it must be a whole number"),
        ({"depth": "19"}, "depth is '19'; it must be a whole number"),
        ({"theta": 0}, "theta is 0; it must be a whole number of at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(fl.ConfigError, match=message):
        fl.FluxConfig(**changes)


def test_groups_that_do_not_divide_the_features_are_refused():
    with pytest.raises(fl.ConfigError, match="norm_groups is 32, which does not divide the 48 features"):
        fl.AutoEncoderConfig(ch=48)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_factor": 0.0}, "scale_factor is 0.0 .* both must be finite, and scale_factor above 0"),
        ({"shift_factor": float("nan")}, "shift_factor nan; both must be finite"),
        ({"ch": 0}, "ch is 0; it must be a whole number of at least 1"),
        ({"ch_mult": ()}, r"ch_mult is \(\); give whole numbers"),
        ({"ch_mult": (1, -2)}, r"ch_mult is \(1, -2\); give whole numbers of at least 1"),
        ({"ch_mult": (1, 1.5)}, r"ch_mult is \(1, 1.5\); give whole numbers"),
    ],
)
def test_an_autoencoder_of_nothing_is_refused(changes, message):
    with pytest.raises(fl.ConfigError, match=message):
        fl.AutoEncoderConfig(**changes)


def test_a_variant_whose_latent_is_not_8_times_smaller_is_refused():
    dev = fl.VARIANTS["flux-dev"]
    with pytest.raises(fl.ConfigError, match="a variant's VAE has 4 resolutions"):
        replace(dev, autoencoder=replace(dev.autoencoder, ch_mult=(1, 2, 4)))


def test_an_unknown_variant_is_refused_with_the_nearest_names():
    with pytest.raises(fl.ConfigError, match=r"unknown variant 'flux-dav'; did you mean flux-dev"):
        fl.variant("flux-dav")


def test_an_unknown_field_is_refused():
    with pytest.raises(fl.ConfigError, match="layers is not a field of FluxConfig; the fields are in_channels"):
        fl.build("flux-dev", device="meta", layers=3)


def test_the_variants_differ_where_the_published_models_do():
    """Model cards of FLUX.1 [dev], [schnell] and FLUX.1 Tools."""
    channels = {name: v.transformer.in_channels for name, v in fl.VARIANTS.items()}
    assert channels["flux-fill-dev"] == 384
    assert {v.repo for v in fl.VARIANTS.values() if not v.embedded} == {
        f"black-forest-labs/FLUX.1-{title}"
        for title in ("dev", "schnell", "Krea-dev", "Kontext-dev", "Fill-dev", "Canny-dev", "Depth-dev")
    }
    assert fl.VARIANTS["flux-fill-dev"].transformer_file == "flux1-fill-dev.safetensors"
    assert channels["flux-canny-dev"] == channels["flux-depth-dev"] == 128
    dev, schnell = fl.VARIANTS["flux-dev"], fl.VARIANTS["flux-schnell"]
    assert (dev.t5_length, schnell.t5_length) == (512, 256)
    assert (dev.time_shift, schnell.time_shift) == (True, False)
    assert (dev.transformer.guidance_embed, schnell.transformer.guidance_embed) == (True, False)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (fl.FluxConfig, "mlp_ratio", "4"),
        (fl.FluxConfig, "axes_dim", "abc"),
        (fl.FluxConfig, "axes_dim", (16.0, 56, 56)),
        (fl.AutoEncoderConfig, "ch_mult", 3),
        (fl.AutoEncoderConfig, "scale_factor", "1"),
        (fl.AutoEncoderConfig, "shift_factor", None),
    ],
)
def test_a_size_of_another_kind_is_named(config, field, value):
    with pytest.raises(fl.ConfigError, match=field):
        config(**{field: value})


@pytest.mark.usefixtures("as_users_run_it")
def test_a_name_is_text():
    for name in (["flux-dev"], None, 3):
        with pytest.raises(fl.ConfigError, match="unknown variant"):
            fl.variant(name)
        with pytest.raises(fl.ConfigError, match="unknown variant"):
            fl.flops(name)


@pytest.mark.usefixtures("as_users_run_it")
def test_sizes_may_be_numpys():
    assert fl.FluxConfig(axes_dim=np.array([16, 56, 56])) == fl.FluxConfig()
    with pytest.raises(fl.ConfigError, match="mlp_ratio is 1e-05"):
        fl.FluxConfig(mlp_ratio=1e-5)
