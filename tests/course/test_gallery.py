"""The grid of prompts and pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxlab.course.gallery import PROMPTS, gallery, relatives


@pytest.fixture(scope="module")
def sheet():
    return np.asarray(gallery("flux-tiny-dev")).astype(int)


def test_the_same_seed_gives_the_same_grid_and_another_another():
    one, again, other = (
        np.asarray(gallery("flux-tiny-dev", PROMPTS[:2], columns=2, seed=seed)).astype(int) for seed in (0, 0, 1)
    )
    assert np.array_equal(one, again)
    assert abs(one - other).mean() > 1


def test_the_grid_in_exported_is_this_one(sheet):
    """Within what another machine's arithmetic may change."""
    committed = np.asarray(Image.open(Path(__file__).parents[2] / "exported/flux-tiny-dev-gallery.png"))
    assert committed.shape == sheet.shape
    assert abs(sheet - committed).mean() < 1


def test_fewer_prompts_make_a_smaller_grid(sheet):
    small = gallery("flux-tiny-dev", PROMPTS[:2], columns=2)
    assert small.width < sheet.shape[1]
    assert small.height < sheet.shape[0]


def test_the_relatives_in_exported_are_these():
    committed = np.asarray(Image.open(Path(__file__).parents[2] / "exported/flux-tiny-relatives.png")).astype(int)
    painted = np.asarray(relatives()).astype(int)
    assert committed.shape == painted.shape
    assert abs(painted - committed).mean() < 1
