"""Numbers, devices and dtypes that are given, and numbers in tensors, each checked, and refused in one sentence."""

import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max


def whole(name: str, value: Any, least: int = 1, most: int = 2**64 - 1, error: type[ValueError] = ValueError) -> int:
    """An argument as an int: Python's, numpy's or a tensor's; a ``ValueError`` where it is none, or out of range."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        limit = f"at least {least}" if number < least else f"at most {most}"
        raise error(f"{name} is {value!r}; it must be a whole number of {limit}")
    return number


def is_number(value: Any, least: float = -LARGEST, most: float = LARGEST) -> bool:
    """Whether it is a real number in a range: by default, one that float32 holds."""
    try:
        return isinstance(value, Real) and least <= float(value) <= most
    except OverflowError:  # a whole number that no float holds
        return False


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are: its least and its largest tell, in a twentieth of the time of isfinite."""
    if tensor.is_meta or not tensor.numel():
        return True
    return all(bool(end.isfinite()) for end in (tensor.float() if tensor.itemsize == 1 else tensor).aminmax())


def cast(name: str, tensor: Tensor, dtype: torch.dtype, error: type[ValueError] = ValueError) -> Tensor:
    """A tensor in a dtype; an error where a finite number would become infinite."""
    made = tensor.to(dtype)
    if made is not tensor and not is_finite(made) and bool((made.isinf() & tensor.isfinite()).any()):
        half = dtype == torch.float16 and tensor.dtype != torch.float64
        raise error(f"{name} has values that {dtype} cannot hold; take {torch.bfloat16 if half else tensor.dtype}")
    return made


def check_dtype(dtype: Any, error: type[ValueError] = ValueError) -> None:
    """An error where it is no floating dtype of two bytes and more."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise error(f"dtype is {dtype!r}; give a floating dtype of 16 bits or more, such as torch.bfloat16")


def check_place(device: Any, dtype: torch.dtype | None) -> None:
    """A ``ValueError`` where there is no such device here; or as ``check_dtype``, of a dtype that is given."""
    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        why = str(error).partition(". ")[0].splitlines()[0]  # torch goes on for pages
        raise ValueError(f"device is {str(device)!r}, which cannot be used here ({why})") from error
    if dtype is not None:
        check_dtype(dtype)
