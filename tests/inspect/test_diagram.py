"""The map of the model."""

import copy
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


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell", "flux-canny-dev", "flux-tiny-dev"])
def test_the_map_is_valid_svg_with_the_variants_sizes(name):
    config = fl.VARIANTS[name].transformer
    shown = texts(fl.model_map(name))
    assert f"{config.depth} × double-stream block" in shown
    assert ("guidance" in shown) == config.guidance_embed
    assert shown[shown.index("pack") + 1].endswith(" × 64")
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
                if not (left < x < right and top < y < bottom):  # the label of an arrow
                    continue
                room = (x + a - left, right - x - c, y + b - top, bottom - y - d)
                assert min(room) >= 4, (text.text, room)
                if text.get("text-anchor") == "middle":
                    assert c - a <= 0.9 * (right - left), text.text  # a sixth less in the usual fonts
                taken.append((x + a, y + b, x + c, y + d))
            for one, other in itertools.combinations(taken, 2):
                apart = one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
                assert apart, [text.text for text in inside]


def test_a_phone_shows_every_word_large_enough():
    for diagram in drawings():
        page = float(ElementTree.fromstring(diagram.svg).get("viewBox").split()[2])
        sizes = {int(text.get("font-size")) for text in elements(diagram, "text")}
        assert min(sizes) * 370 / page >= 9  # pixels, on a screen of 400 with its margins
        assert "max-width: 100%" in diagram.svg


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


def arrows(diagram):
    """Each arrow as "this > that"."""
    return [f"{start} > {end}" for start, end, _, _ in joined(diagram)]


def test_the_loop_gives_the_next_time_and_the_moved_tokens():
    dashed = {(start, end) for start, end, _, dashed in joined(fl.model_map()) if dashed}
    assert dashed == {("Euler step", "t"), ("Euler step", "img_in")}


def test_modulation_and_rotation_reach_what_they_steer():
    found = arrows(fl.model_map())
    double, single = "19 × double-stream block", "38 × single-stream block"
    for start, ends in {
        "t": ["vec"],
        "guidance": ["vec"],
        "CLIP": ["vec"],
        "vec": ["modulation"],
        "modulation": [double, single, "last layer"],
        "places": ["RoPE"],
        "RoPE": [double, single],
        "txt_in": [double],
        "img_in": [double],
        double: [single, single],  # text and image
        single: ["last layer"],
        "last layer": ["Euler step"],
    }.items():
        assert sorted(arrow for arrow in found if arrow.startswith(f"{start} > ")) == [f"{start} > {e}" for e in ends]
    assert not any("guidance" in arrow for arrow in arrows(fl.model_map("flux-schnell")))


def test_a_double_block_joins_text_and_image_then_rotates_then_attends():
    found = arrows(fl.block_diagram("double"))
    chain = ["qkv", "QK-norm", "join, text first", "rotate q and k", "attention", "proj", "× gate1, then add"]
    chain += ["LayerNorm", "MLP", "× gate2, then add"]
    for start, end in itertools.pairwise(chain):
        streams = 1 if "rotate" in start + end else 2
        assert found.count(f"{start} > {end}") == streams, (start, end)
    assert "pe > rotate q and k" in found
    for stream in ("txt", "img"):
        steered = [arrow for arrow in found if arrow.startswith(f"{stream}_mod > ")]
        assert steered == [f"{stream}_mod > {end}" for end in ("LayerNorm", chain[6], "LayerNorm", chain[9])]
        assert {f"vec > {stream}_mod", f"{stream} > LayerNorm", f"{stream} > {chain[6]}"} <= set(found)
    assert found.count(f"{chain[6]} > {chain[9]}") == 2  # past the MLP


def test_a_single_block_rotates_beside_its_mlp():
    found = arrows(fl.block_diagram("single"))
    chain = ["x, text first", "LayerNorm", "linear1", "q, k, v", "QK-norm", "rotate q, k", "attention", "side by side"]
    chain += ["linear2", "× gate, then add"]
    wanted = [f"{start} > {end}" for start, end in itertools.pairwise(chain)]
    wanted += ["linear1 > GELU", "GELU > side by side", "pe > rotate q, k", "x, text first > × gate, then add"]
    wanted += ["vec > modulation", "modulation > LayerNorm", "modulation > × gate, then add"]
    assert sorted(found) == sorted(wanted)


def test_steering_alone_is_green():
    for diagram, sources in (
        (fl.model_map(), {"t", "guidance", "vec", "modulation"}),
        (fl.block_diagram("double"), {"vec", "txt_mod", "img_mod"}),
        (fl.block_diagram("single"), {"vec", "modulation"}),
    ):
        for start, _, colour, _ in joined(diagram):
            assert (colour == "#009e73") == (start in sources)


def test_chapters_stand_by_themselves_in_the_map():
    """The site makes a link of each text of two digits."""
    shown = [text for text in texts(fl.model_map()) if text and text.isdigit() and len(text) == 2]
    assert set(shown) == {f"{number:02}" for number in range(1, 12)}


def test_a_drawing_says_its_arrows_in_words():
    assert "modulation to last layer" in ElementTree.fromstring(fl.model_map().svg).get("aria-label")


def test_a_partial_token_is_drawn_whole():
    assert "3 × 112 × 112" in fl.model_map("flux-dev", height=100, width=100).svg


def test_a_lit_part_stands_out():
    plain, lit = (fl.model_map(lit=part).svg for part in (None, "rope"))
    assert plain.count("#ffe08a") == 0
    assert lit.count("#ffe08a") == 1
    assert fl.model_map(lit=["rope", "vae"]).svg.count("#ffe08a") == 2
    assert fl.model_map(lit=["embeddings", "modulation"]).svg.count("#ffe08a") == 4  # t, guidance, vec, modulation


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
        shape = " × ".join(map(str, shapes[tensor][1:]))
        assert {shape, f"GELU, {shape}"} & set(shown)


def test_another_kind_of_block_is_refused(as_users_run_it):
    with pytest.raises(ValueError, match="'double' or 'single'"):
        fl.block_diagram("triple")


def test_the_graph_of_a_module_has_its_weights():
    model = fl.build("flux-tiny-schnell")
    svg = fl.graph(model, fl.example_inputs("flux-tiny-schnell")).svg
    ElementTree.fromstring(svg)
    assert all(name in svg for name, _ in model.named_parameters())


def test_a_graph_of_what_gives_tensors_in_tuples_or_by_names(tiny):
    ids = {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
    parts: list = [(torch.nn.LSTM(2, 3), torch.zeros(4, 1, 2)), (copy.deepcopy(tiny.text.t5), ids)]
    for module, inputs in parts:
        svg = fl.graph(module.requires_grad_(True), inputs).svg
        assert all(name in svg for name, _ in module.named_parameters())


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


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell", "flux-fill-dev", "flux-tiny-dev"])
def test_the_sheet_has_all_of_it_on_one_page(name):
    sheet = fl.cheat_sheet(name)
    shown, whole = texts(sheet), fl.build(name, device="meta")
    for drawing in (fl.model_map(name), fl.block_diagram("double", name), fl.block_diagram("single", name)):
        assert set(texts(drawing)) <= set(shown)
    assert f"all: {sum(p.numel() for p in whole.parameters()):,}  (100.00%)" in shown
    assert any("guidance_in(" in line for line in shown) == whole.config.guidance_embed
    assert any("bent" in line for line in shown) == fl.VARIANTS[name].time_shift
    assert any(line.endswith("(c h w), make a token of 64") for line in shown)  # Fill's 320 more are not packed noise
    page = ElementTree.fromstring(sheet.svg)
    width, height = map(float, page.get("viewBox").split()[2:])
    for text in page.findall(f"{SVG}text"):
        text.set("text-anchor", "start")
        (_, _, right, below), x, y = extent(text)
        assert x + right < width - 20, text.text
        assert y + below < height - 20, text.text
