"""The check cell of an exercise."""

from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import product
from math import floor, log10
from typing import Any


def check(answer: Any, right: str | Callable[[Any], bool], hint: str) -> None:
    """Say whether an answer is right; one that is still ``None`` is not answered yet, and nothing fails.

    Args:
        answer: the reader's: a number, a text, a truth value, or a sequence of such; numbers to three digits.
        right: the ``fingerprint`` of the right one, which does not give it away; or a function that says whether an
            answer is right. An answer of a kind that cannot be judged is wrong.
        hint: what to think of, for an answer that is wrong.
    """
    if answer is None:
        print("not answered yet: put your answer in place of None and run the cell again")
        return
    try:
        verdict = right in map(_hashed, _forms(answer)) if isinstance(right, str) else bool(right(answer))
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, ArithmeticError, AssertionError):
        verdict = False
    print("right" if verdict else f"not yet: {answer!r} is not it. {hint}")


def fingerprint(answer: Any) -> str:
    """What ``check`` knows an answer by."""
    return _hashed(next(_forms(answer)))


def _forms(answer: Any) -> Iterator[str]:
    """An answer as text: as it is first, then with its numbers one more or less in the third digit."""
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    if isinstance(answer, (bool, str)):
        yield str(answer).strip().lower()
    elif hasattr(answer, "__len__"):
        forms = [list(_forms(each)) for each in _flat(answer)]
        few = sum(len(each) > 1 for each in forms) <= 10  # else no neighbours of any
        yield from map(" ".join, product(*(each if few else each[:1] for each in forms)))
    else:
        value = float(answer)
        if abs(value - round(value)) <= 1e-6 * min(1, abs(value)):  # a count, say: its neighbours are wrong
            yield from (f"{round(value):.9g}", f"{value:.2e}")
        else:
            unit = 10.0 ** (floor(log10(abs(value))) - 2)
            yield from (f"{value + n * unit:.2e}" for n in (0, -1, 1))


def _flat(answer: Any) -> Iterator[Any]:
    for each in answer:
        each = each.tolist() if hasattr(each, "tolist") else each
        yield from _flat(each) if hasattr(each, "__len__") and not isinstance(each, str) else [each]


def _hashed(form: str) -> str:
    return sha256(form.encode()).hexdigest()[:12]
