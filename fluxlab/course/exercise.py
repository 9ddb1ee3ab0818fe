"""The check cell of an exercise."""

from collections.abc import Callable
from typing import Any


def check(answer: Any, right: Callable[[Any], bool], hint: str) -> None:
    """Say whether an answer is right; one that is still ``None`` is not answered yet, and nothing fails.

    Args:
        answer: the reader's.
        right: whether it is right; an answer of a kind it cannot judge is wrong.
        hint: what to think of, for an answer that is wrong.
    """
    if answer is None:
        print("not answered yet: put your answer in place of None and run the cell again")
        return
    try:
        verdict = bool(right(answer))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, ArithmeticError):
        verdict = False
    print("right" if verdict else f"not yet: {answer!r} is not it. {hint}")
