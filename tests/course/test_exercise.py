"""The check cells of the course."""

import pytest

import fluxlab as fl


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
