"""The check cells of the course."""

import tracemalloc

import numpy as np
import pytest
import torch

import fluxlab as fl
from fluxlab.course.exercise import fingerprint


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "not answered yet"),
        (4, "right"),
        (5, "not yet: 5 is not it. Two and two."),
        ("four", "not yet: 'four' is not it. Two and two."),
    ],
)
def test_an_answer_is_told_whether_it_is_right(capsys, answer, says):
    fl.check(answer, lambda a: a - 4 == 0, "Two and two.")
    assert capsys.readouterr().out.startswith(says)


def test_an_answer_that_cannot_be_reckoned_with_is_wrong(capsys):
    fl.check(0, lambda a: 1 / a > 0, "Not zero.")
    assert capsys.readouterr().out.startswith("not yet")


@pytest.mark.parametrize(
    ("right", "also", "wrong"),
    [
        (0.26949, (0.2694, 0.27, 0.269), (0.273, -0.269, 269, "0.269")),
        (7.1968, (7.2, 7.19), (7.22, 7)),
        (3072, (3072.0,), (3071, 3073, 3062, 3082, 30720)),
        (57, (57.0,), (56, 58, 56.9)),
        (2.0, (2,), (2.01, True)),
        ("T5", ("t5", " T5 "), ("CLIP", 5)),
        (True, (True,), (False, 1)),
        ((0, 5, 9), ([0, 5, 9],), ((0, 9, 5), (0, 5), 59)),
        ([0.8492, 12], ((0.85, 12),), ((0.8492, 13),)),
        (3.004, (3.0, 3), (3.02, 2)),
        (1234.5, (1230, 1234), (1250,)),
        (249.7, (250,), (252,)),
        (1.0, (0.99999994,), (0.999, 2)),
    ],
)
def test_a_right_answer_is_known_by_its_fingerprint(capsys, right, also, wrong):
    for answer in (right, *also):
        fl.check(answer, fingerprint(right), "A hint.")
        assert capsys.readouterr().out == "right\n"
    for answer in wrong:
        fl.check(answer, fingerprint(right), "A hint.")
        assert capsys.readouterr().out.startswith("not yet")


def test_a_tensor_is_an_answer(capsys):
    assert fingerprint(torch.tensor([1, 2])) == fingerprint((1, 2))
    fl.check(torch.rand(64), fingerprint(3), "A hint.")  # more forms than can be tried
    assert capsys.readouterr().out.startswith("not yet")


def test_a_matrix_is_judged_in_little_memory(capsys):
    answer = np.random.default_rng(0).random((512, 64))
    tracemalloc.start()
    fl.check(answer, fingerprint(3), "")
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    fl.check(answer, fingerprint(answer), "")
    fl.check([[1, 2], [3, 4]], fingerprint([1, 2, 3, 4]), "")
    assert capsys.readouterr().out.count("right") == 2
