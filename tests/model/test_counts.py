"""Counts, names and shapes against published facts: the official checkpoints and their model cards."""

import pytest
import torch

import fluxlab as fl

PARAMETERS = {  # counted from the official checkpoints' headers
    "flux-dev": (11_901_408_320, 780),
    "flux-krea-dev": (11_901_408_320, 780),
    "flux-kontext-dev": (11_901_408_320, 780),
    "flux-schnell": (11_891_178_560, 776),
    "flux-canny-dev": (11_901_604_928, 780),
    "flux-depth-dev": (11_901_604_928, 780),
    "flux-fill-dev": (11_902_391_360, 780),
}


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_variant_has_the_published_number_of_parameters_and_tensors(name):
    model = fl.build(name, device="meta")
    assert (count(model), len(model.state_dict())) == PARAMETERS[name]


def test_the_parts_of_dev_have_the_published_number_of_parameters():
    model = fl.build("flux-dev", device="meta")
    parts = {
        "double_blocks.7": 339_831_296,
        "single_blocks.20": 141_591_808,
        "final_layer": 19_077_184,
        "img_in": 199_680,
        "txt_in": 12_585_984,
        "time_in": 10_229_760,
        "guidance_in": 10_229_760,
        "vector_in": 11_802_624,
    }
    assert {name: count(model.get_submodule(name)) for name in parts} == parts
    modulation = [m for name, m in model.named_modules() if name.endswith((".lin", "adaLN_modulation.1"))]
    assert sum(map(count, modulation)) == 3_247_448_064
    assert round(100 * sum(map(count, modulation)) / count(model), 1) == 27.3


def test_two_double_and_two_single_blocks_have_the_published_number_of_parameters():
    assert count(fl.build("flux-dev", device="meta", depth=2, depth_single_blocks=2)) == 1_026_971_200


def test_the_autoencoder_has_the_published_number_of_parameters_and_tensors():
    with torch.device("meta"):
        autoencoder = fl.AutoEncoder(fl.VARIANTS["flux-dev"].autoencoder)
    assert (count(autoencoder), len(autoencoder.state_dict())) == (83_819_683, 244)
    assert count(autoencoder.decoder) == 49_545_475
    assert not any("quant" in name for name in autoencoder.state_dict())


def test_the_keys_are_the_official_checkpoints():
    """The naming published with the reference implementation."""
    linear = ("weight", "bias")
    expected = {f"{name}.{leaf}" for name in ("img_in", "txt_in", "final_layer.linear") for leaf in linear}
    expected |= {f"final_layer.adaLN_modulation.1.{leaf}" for leaf in linear}
    for name in ("time_in", "vector_in", "guidance_in"):
        expected |= {f"{name}.{layer}.{leaf}" for layer in ("in_layer", "out_layer") for leaf in linear}
    for n in range(19):
        for stream in ("img", "txt"):
            block = f"double_blocks.{n}.{stream}"
            parts = ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")
            expected |= {f"{block}_{part}.{leaf}" for part in parts for leaf in linear}
            expected |= {f"{block}_attn.norm.{which}_norm.scale" for which in ("query", "key")}
    for n in range(38):
        block = f"single_blocks.{n}"
        parts = ("linear1", "linear2", "modulation.lin")
        expected |= {f"{block}.{part}.{leaf}" for part in parts for leaf in linear}
        expected |= {f"{block}.norm.{which}_norm.scale" for which in ("query", "key")}
    assert set(fl.build("flux-dev", device="meta").state_dict()) == expected


def test_the_full_model_builds_on_meta_without_memory():
    model = fl.build("flux-dev", device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in model.parameters())


def test_schnell_has_devs_keys_without_the_guidance_embedder():
    dev, schnell = (set(fl.build(name, device="meta").state_dict()) for name in ("flux-dev", "flux-schnell"))
    assert dev - schnell == {f"guidance_in.{la}.{le}" for la in ("in_layer", "out_layer") for le in ("weight", "bias")}
    assert schnell < dev


def test_the_autoencoders_keys_are_the_published_ones():
    """The naming of latent diffusion: down.i.block.j, mid.attn_1, up.i.upsample."""
    convs = ["conv_in", "conv_out", "norm_out"]
    blocks = ("norm1", "conv1", "norm2", "conv2")
    expected = {f"{half}.{name}" for half in ("encoder", "decoder") for name in convs}
    for half in ("encoder", "decoder"):
        expected |= {f"{half}.mid.{block}.{name}" for block in ("block_1", "block_2") for name in blocks}
        expected |= {f"{half}.mid.attn_1.{name}" for name in ("norm", "q", "k", "v", "proj_out")}
    for i in range(4):
        expected |= {f"encoder.down.{i}.block.{j}.{name}" for j in range(2) for name in blocks}
        expected |= {f"decoder.up.{i}.block.{j}.{name}" for j in range(3) for name in blocks}
    expected |= {f"encoder.down.{i}.downsample.conv" for i in (0, 1, 2)}
    expected |= {f"decoder.up.{i}.upsample.conv" for i in (1, 2, 3)}
    expected |= {f"encoder.down.{i}.block.0.nin_shortcut" for i in (1, 2)}
    expected |= {f"decoder.up.{i}.block.0.nin_shortcut" for i in (0, 1)}
    with torch.device("meta"):
        autoencoder = fl.AutoEncoder(fl.VARIANTS["flux-dev"].autoencoder)
    assert set(autoencoder.state_dict()) == {f"{name}.{leaf}" for name in expected for leaf in ("weight", "bias")}
