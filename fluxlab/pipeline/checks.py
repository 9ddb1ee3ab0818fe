"""What this room refuses, and how it warns."""

import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def as_list(name: str, value: Any) -> list[Any]:
    """One value or several, as a list; tensors and arrays are read too.

    Raises:
        ValueError: there is none.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    values = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    if not values:
        raise ValueError(f"{name} is an empty list; give at least one")
    return values


def finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor itself; ``what`` says in the error whose it is.

    Raises:
        ValueError: a value of it is infinite or not a number.
    """
    if tensor.device.type != "meta" and not tensor.isfinite().all():
        bad, advice = int((~tensor.isfinite()).sum()), "look at the weights and at what they were given"
        if tensor.dtype == torch.float16:
            advice = "float16 ends at 65504, which FLUX exceeds: use bfloat16 or float32, as in pipe.to(torch.bfloat16)"
        raise ValueError(f"{what} has {bad} of {tensor.numel()} values that are not finite; {advice}")
    return tensor


def warn(message: str) -> None:
    """A warning that points at the caller's line: the first outside of this library and the decorators around it."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in ("fluxlab", "torch", "jaxtyping", "beartype"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)
