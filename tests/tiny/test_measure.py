"""The judge, on pictures whose truth is known."""

import numpy as np
import pytest

from fluxlab.tiny.measure import judge, look, report
from fluxlab.tiny.world import PICTURE_SIZES, SHAPES, Scene, Thing, draw_scene, random_picture


def pictures(number, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [random_picture(rng, **options) for _ in range(number)]


@pytest.mark.parametrize("held_out", [False, True])
def test_true_pictures_are_judged_right(held_out):
    judged = report((picture.pixels, picture.scene) for picture in pictures(60, held_out=held_out))
    assert all(value >= 0.99 for value in judged.values()), judged


@pytest.mark.parametrize("size", PICTURE_SIZES)
def test_true_pictures_of_every_size_are_judged_right(size):
    judged = report((p.pixels, p.scene) for p in pictures(5, height=size[0], width=size[1]))
    assert judged["all"] == 1


def test_noise_and_a_bright_speck_do_not_confuse_it():
    rng = np.random.default_rng(0)
    for picture in pictures(20):
        pixels = picture.pixels + rng.normal(0, 6, picture.pixels.shape)
        pixels[:2, :2] = 255
        assert judge(pixels.clip(0, 255).astype(np.uint8), picture.scene)["all"] == 1


SCENE = Scene((Thing("circle", "red", "small"), Thing("square", "blue", "large")), "left of", "white")


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        (Scene((Thing("circle", "green", "small"), SCENE.things[1]), "left of", "white"), {"colour": 0.5}),
        (Scene((Thing("star", "red", "small"), SCENE.things[1]), "left of", "white"), {"shape": 0.5}),
        (Scene(SCENE.things[::-1], "left of", "white"), {"place": 0}),
        (Scene(SCENE.things, "above", "white"), {"place": 0}),
        (Scene(SCENE.things, "left of", "navy"), {"background": 0}),
        (Scene(SCENE.things[:1], "left", "white"), {"count": 0, "colour": 0.5, "shape": 0.5, "place": 0}),
    ],
)
def test_each_mistake_is_found_and_no_other(shown, wrong):
    judged = judge(draw_scene(shown, np.random.default_rng(0)).pixels, SCENE)
    right = {"colour": 1, "shape": 1, "place": 1, "background": 1, "count": 1}
    assert judged == right | wrong | {"all": 0}


def test_a_blob_is_no_shape():
    from scipy import ndimage

    blob = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(128, 128)), 8) > 0.025
    pixels = np.where(blob[..., None], (220, 38, 38), (250, 250, 250)).astype(np.uint8)
    _, patches = look(pixels)
    scenes = [Scene((Thing(shape, "red", "large"),), "center", "white") for shape in SHAPES]
    assert patches
    assert not any(judge(pixels, scene)["all"] for scene in scenes)


def test_what_overlaps_its_nearest_shape_by_less_than_three_fifths_is_none():
    pixels = np.full((128, 128, 3), 250, np.uint8)
    pixels[30:98, 50:78] = 220, 38, 38  # a bar is nearest to a square, and is none
    (bar,) = look(pixels)[1]
    right = judge(pixels, Scene((Thing(bar.shape, "red", "large"),), "center", "white"))
    assert 0.35 < bar.fit < 0.6
    assert (right["shape"], right["colour"], right["place"]) == (0, 1, 1)


def test_an_empty_picture_gets_nothing_but_its_background_right():
    judged = judge(np.full((128, 128, 3), 250, np.uint8), SCENE)
    assert judged == {"colour": 0, "shape": 0, "place": 0, "background": 1, "count": 0, "all": 0}
