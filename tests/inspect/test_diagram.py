"""The map of the model."""

import xml.etree.ElementTree as ElementTree

import pytest

import fluxlab as fl


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell", "flux-tiny-dev"])
def test_the_map_is_valid_svg_with_the_variants_sizes(name):
    config = fl.VARIANTS[name].transformer
    svg = fl.model_map(name)._repr_svg_()
    texts = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert f"{config.depth} × double-stream block" in texts
    assert ("time + guidance + CLIP" in texts) == config.guidance_embed


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
