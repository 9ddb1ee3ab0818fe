"""The picture world."""

import numpy as np
import pytest

from fluxlab.tiny import world


def pictures(number, **options):
    rng = np.random.default_rng(0)
    return [world.random_picture(rng, **options) for _ in range(number)]


def test_the_same_seed_draws_the_same_pictures():
    for a, b in zip(pictures(5), pictures(5), strict=True):
        assert np.array_equal(a.pixels, b.pixels)
        assert a.caption == b.caption


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("size", world.PICTURE_SIZES)
def test_each_thing_is_drawn_in_its_colour_where_its_mask_says(shape, size):
    rng = np.random.default_rng(0)
    for colour, value in world.COLOURS.items():
        scene = world.Scene((world.Thing(shape, colour, "large"),), "center", "gray")
        picture = world.draw_scene(scene, rng, *size)
        inside, outside = picture.masks[0] == 1, picture.masks[0] == 0
        assert abs(picture.pixels[inside].mean(0) - value).max() < 10
        assert abs(picture.pixels[outside].mean(0) - world.BACKGROUNDS["gray"]).max() < 8
        assert 0.03 < inside.mean() < 0.2
        assert not picture.masks[0][[0, -1]].any()  # not cut by the edge


def test_things_lie_where_the_scene_says():
    for picture in pictures(200):
        y, x = np.mgrid[:128, :128] / 128
        centres = [((mask * x).sum() / mask.sum(), (mask * y).sum() / mask.sum()) for mask in picture.masks]
        scene = picture.scene
        if len(centres) == 2:
            axis = 0 if scene.where == "left of" else 1
            assert centres[0][axis] + 0.2 < centres[1][axis]
        else:
            assert np.allclose(centres[0], world.PLACES[scene.where], atol=0.1)


def test_a_complete_caption_names_everything():
    rng = np.random.default_rng(1)
    for _ in range(200):
        scene = world.random_scene(rng)
        caption = scene.caption(rng)
        words = caption.replace(",", " ").split()
        assert f"{scene.background} background" in caption
        for thing in scene.things:
            assert {thing.shape, thing.colour, thing.size} <= set(words)


def test_captions_have_several_phrasings():
    scene = world.Scene((world.Thing("ring", "orange", "small"),), "center", "navy")
    rng = np.random.default_rng(0)
    assert scene.caption() == "a small orange ring in the center on a navy background"
    assert len({scene.caption(rng, complete=False) for _ in range(300)}) > 12
    assert "an orange ring" in {scene.caption(rng, complete=False).split(" on ")[0] for _ in range(300)}


def test_a_tenth_is_held_out_and_never_drawn_for_training():
    assert not any(picture.scene.held_out for picture in pictures(300))
    assert all(picture.scene.held_out for picture in pictures(30, held_out=True))


def test_edges_are_anti_aliased():
    for picture in pictures(20):
        assert ((picture.masks > 0.1) & (picture.masks < 0.9)).any()
