"""The published layer table (torchinfo, two double and two single blocks, batch 2, 512x512), row by row."""

import pytest

import fluxlab as fl

ROWS = {  # layer: input, output, parameters
    "img_in": ((2, 1024, 64), (2, 1024, 3072), 199_680),
    "pe_embedder": ((2, 1536, 3), (2, 1, 1536, 64, 2, 2), 0),
    "double_blocks.0.img_mod.lin": ((2, 3072), (2, 18432), 56_641_536),
    "double_blocks.0.img_attn.qkv": ((2, 1024, 3072), (2, 1024, 9216), 28_320_768),
    "double_blocks.0.img_attn.norm.query_norm": ((2, 24, 1024, 128), (2, 24, 1024, 128), 128),
    "double_blocks.0.img_attn.proj": ((2, 1024, 3072), (2, 1024, 3072), 9_440_256),
    "double_blocks.0.img_mlp.0": ((2, 1024, 3072), (2, 1024, 12288), 37_761_024),
    "double_blocks.0.img_mlp.2": ((2, 1024, 12288), (2, 1024, 3072), 37_751_808),
    "double_blocks.1.txt_mod.lin": ((2, 3072), (2, 18432), 56_641_536),
    "double_blocks.1.txt_attn.qkv": ((2, 512, 3072), (2, 512, 9216), 28_320_768),
    "single_blocks.1.linear1": ((2, 1536, 3072), (2, 1536, 21504), 66_081_792),
    "single_blocks.1.linear2": ((2, 1536, 15360), (2, 1536, 3072), 47_188_992),
    "single_blocks.1.modulation.lin": ((2, 3072), (2, 9216), 28_320_768),
    "final_layer.adaLN_modulation.1": ((2, 3072), (2, 6144), 18_880_512),
    "final_layer.linear": ((2, 1024, 3072), (2, 1024, 64), 196_672),
}


@pytest.fixture(scope="module")
def table():
    model = fl.build("flux-dev", device="meta", depth=2, depth_single_blocks=2)
    inputs = fl.example_inputs("flux-dev", height=512, width=512, batch=2, device="meta")
    return {row["layer"].strip(): row for row in fl.summary(model, inputs, depth=9)}


@pytest.mark.parametrize("layer", ROWS)
def test_the_layer_has_the_published_row(table, layer):
    row = table[layer]
    assert (row["input"], row["output"], row["parameters"]) == ROWS[layer]
