"""The map of the model."""

import os
import xml.etree.ElementTree as ElementTree

import pytest
import torch

import fluxlab as fl


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell", "flux-tiny-dev"])
def test_the_map_is_valid_svg_with_the_variants_sizes(name):
    config = fl.VARIANTS[name].transformer
    svg = fl.model_map(name)._repr_svg_()
    texts = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert f"{config.depth} × double-stream block" in texts
    assert ("time + guidance + CLIP" in texts) == config.guidance_embed


def test_a_partial_token_is_drawn_whole():
    assert "3 × 112 × 112" in fl.model_map("flux-dev", height=100, width=100).svg


def test_a_lit_part_is_drawn_otherwise_than_the_rest():
    plain, lit = (fl.model_map(lit=part).svg for part in (None, "rope"))
    assert plain.count("#d97706") == 0
    assert lit.count("#d97706") == 1
    assert fl.model_map(lit=["rope", "vae"]).svg.count("#d97706") == 2


def test_a_part_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="lit is 'double_block', which is not a part; did you mean double_blocks"):
        fl.model_map(lit="double_block")


def test_the_map_is_written_as_a_file(tmp_path):
    fl.model_map().save(tmp_path / "map.svg")
    assert (tmp_path / "map.svg").read_text() == fl.model_map().svg


@pytest.mark.parametrize("kind", ["double", "single"])
@pytest.mark.parametrize("name", ["flux-dev", "flux-tiny-schnell"])
def test_a_block_is_drawn_with_the_shapes_that_its_tensors_have(kind, name):
    svg = fl.block_diagram(kind, name).svg
    texts = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    shapes = {row["name"]: row["shape"] for row in fl.tensor_names(name)}
    names = ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0")
    if kind == "single":
        names = ("single_blocks.0.linear1", "single_blocks.0.mlp_act")
    for tensor in names:
        assert " × ".join(map(str, shapes[tensor][1:])) in texts


def test_another_kind_of_block_is_refused(as_users_run_it):
    with pytest.raises(ValueError, match="'double' or 'single'"):
        fl.block_diagram("triple")


def test_the_graph_of_a_module_has_its_weights():
    model = fl.build("flux-tiny-schnell")
    svg = fl.graph(model, fl.example_inputs("flux-tiny-schnell")).svg
    ElementTree.fromstring(svg)
    assert all(name in svg for name, _ in model.named_parameters())


def test_a_graph_is_drawn_without_a_word(capfd):
    fl.graph(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    os.write(2, b"after")
    assert capfd.readouterr().err == "after"


def test_a_graph_needs_numbers_and_gradients():
    with pytest.raises(ValueError, match="meta device"):
        fl.graph(fl.build("flux-tiny-dev", device="meta"), fl.example_inputs("flux-tiny-dev", device="meta"))
    with pytest.raises(ValueError, match="needs no gradient"):
        fl.graph(fl.build("flux-tiny-dev").requires_grad_(False), fl.example_inputs("flux-tiny-dev"))
