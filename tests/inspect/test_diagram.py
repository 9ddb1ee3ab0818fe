"""The map of the model."""

import itertools
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from matplotlib import font_manager
from PIL import ImageFont

import fluxlab as fl

SVG = "{http://www.w3.org/2000/svg}"


def elements(diagram, kind):
    return list(ElementTree.fromstring(diagram._repr_svg_()).iter(f"{SVG}{kind}"))


def texts(diagram):
    return [element.text for element in elements(diagram, "text")]


def boxes(diagram):
    """Each rectangle of a diagram, left, top, right, bottom, with its texts; the first one is the page."""
    found = []
    for element in ElementTree.fromstring(diagram.svg):
        if element.tag == f"{SVG}rect":
            left, top, width, height = (float(element.get(key, 0)) for key in ("x", "y", "width", "height"))
            found.append(((left, top, left + width, top + height), []))
        elif element.tag == f"{SVG}text" and element.get("font-size") and len(found) > 1:
            found[-1][1].append(element)
    return found[1:]


def extent(text):
    """Left, top, right and bottom of a text in a font wider than the usual ones."""
    bold = "DejaVu Sans:bold" if text.get("font-weight") == "bold" else "DejaVu Sans"
    font = ImageFont.truetype(font_manager.findfont(bold), int(text.get("font-size")))
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[text.get("text-anchor")]
    return font.getbbox(text.text, anchor=anchor), float(text.get("x")), float(text.get("y"))


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell", "flux-tiny-dev"])
def test_the_map_is_valid_svg_with_the_variants_sizes(name):
    config = fl.VARIANTS[name].transformer
    shown = texts(fl.model_map(name))
    assert f"{config.depth} × double-stream block" in shown
    assert ("guidance" in shown) == config.guidance_embed
    assert {"t", "vec", f"{config.depth_single_blocks} × single-stream block", "Euler step"} <= set(shown)


def drawings():
    for name in ("flux-dev", "flux-schnell", "flux-fill-dev", "flux-tiny-dev"):
        yield fl.model_map(name)
        yield fl.block_diagram("double", name)
        yield fl.block_diagram("single", name, height=1360, width=768)


def test_no_text_touches_its_frame_or_another_text():
    for diagram in drawings():
        for (left, top, right, bottom), inside in boxes(diagram):
            taken = []
            for text in inside:
                (a, b, c, d), x, y = extent(text)
                if not left < x < right + 1:  # the label of an arrow
                    continue
                room = (x + a - left, right - x - c, y + b - top, bottom - y - d)
                assert min(room) >= 2, (text.text, room)
                taken.append((x + a, y + b, x + c, y + d))
            for one, other in itertools.combinations(taken, 2):
                apart = one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
                assert apart, [text.text for text in inside]


def test_no_box_lies_on_another():
    for diagram in drawings():
        for (one, _), (other, _) in itertools.combinations(boxes(diagram), 2):
            assert one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]


def lines(diagram):
    """Each arrow's first and last point, its colour, and whether it is dashed."""
    for path in elements(diagram, "path"):
        if path.get("fill") == "none":
            points = [tuple(map(float, point.split())) for point in path.get("d")[1:].split(" L")]
            yield points[0], points[-1], path.get("stroke"), path.get("stroke-dasharray") is not None


def joined(diagram):
    """From the title of which box to the title of which box each arrow goes."""
    found = boxes(diagram)

    def at(point):
        x, y = point
        titles = [t[0].text for (a, b, c, d), t in found if a - 1 <= x <= c + 1 and b - 1 <= y <= d + 1]
        assert len(titles) == 1, point
        return titles[0]

    return [(at(start), at(end), colour, dashed) for start, end, colour, dashed in lines(diagram)]


def test_the_loop_gives_the_next_time_and_the_moved_tokens():
    dashed = {(start, end) for start, end, _, dashed in joined(fl.model_map()) if dashed}
    assert dashed == {("Euler step", "t"), ("Euler step", "img_in")}


def test_modulation_and_rotation_reach_what_they_steer():
    reached = [(start, end) for start, end, _, _ in joined(fl.model_map())]
    double, single = "19 × double-stream block", "38 × single-stream block"
    assert {end for start, end in reached if start == "modulation"} == {double, single, "last layer"}
    assert {end for start, end in reached if start == "RoPE"} == {double, single}
    assert {start for start, end in reached if end == "vec"} == {"t", "guidance", "CLIP text"}
    assert reached.count((double, single)) == 2  # text and image


@pytest.mark.parametrize(
    ("kind", "sources"),
    [("double", ["txt_mod", "img_mod"] * 4 + ["vec"] * 2), ("single", ["modulation"] * 2 + ["vec"])],
)
def test_a_blocks_modulation_reaches_every_step_that_it_steers(kind, sources):
    diagram = fl.block_diagram(kind)
    blue = [(start, end) for start, end, colour, _ in joined(diagram) if colour == "#2563eb"]
    assert sorted(start for start, _ in blue) == sorted(sources)
    steered = [title for title in texts(diagram) if title.startswith("×")]
    assert sorted(end for _, end in blue if end.startswith("×")) == sorted(steered)
    attention = next(title for title in texts(diagram) if "attend" in title)
    assert ("pe", attention) in {(start, end) for start, end, _, _ in joined(diagram)}


def test_a_partial_token_is_drawn_whole():
    assert "3 × 112 × 112" in fl.model_map("flux-dev", height=100, width=100).svg


def test_a_lit_part_stands_out():
    plain, lit = (fl.model_map(lit=part).svg for part in (None, "rope"))
    assert plain.count("#d97706") == 0
    assert lit.count("#d97706") == 1
    assert fl.model_map(lit=["rope", "vae"]).svg.count("#d97706") == 2
    assert fl.model_map(lit=["embeddings", "modulation"]).svg.count("#d97706") == 4  # t, guidance, vec, modulation


def test_a_part_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="lit is 'double_block', which is not a part; did you mean double_blocks"):
        fl.model_map(lit="double_block")


def test_the_map_is_written_as_a_file(tmp_path):
    fl.model_map().save(tmp_path / "map.svg")
    assert (tmp_path / "map.svg").read_text() == fl.model_map().svg


@pytest.mark.parametrize("kind", ["double", "single"])
@pytest.mark.parametrize("name", ["flux-dev", "flux-tiny-schnell"])
def test_a_block_is_drawn_with_the_shapes_that_its_tensors_have(kind, name):
    shown = texts(fl.block_diagram(kind, name))
    shapes = {row["name"]: row["shape"] for row in fl.tensor_names(name)}
    names = ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0")
    if kind == "single":
        names = ("single_blocks.0.linear1", "single_blocks.0.mlp_act")
    for tensor in names:
        assert " × ".join(map(str, shapes[tensor][1:])) in shown


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


def test_a_graph_is_drawn_without_a_warning():
    """Of torchviz, which asks distutils for a version when it is first imported."""
    code = "import torch, fluxlab as fl; fl.graph(torch.nn.Linear(2, 2), torch.zeros(1, 2))"
    run = [sys.executable, "-W", "error:distutils:DeprecationWarning", "-c", code]
    subprocess.run(run, check=True, capture_output=True)


def test_a_graph_needs_numbers_and_gradients():
    with pytest.raises(ValueError, match="meta device"):
        fl.graph(fl.build("flux-tiny-dev", device="meta"), fl.example_inputs("flux-tiny-dev", device="meta"))
    with pytest.raises(ValueError, match="needs no gradient"):
        fl.graph(fl.build("flux-tiny-dev").requires_grad_(False), fl.example_inputs("flux-tiny-dev"))
