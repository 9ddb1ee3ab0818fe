"""Safetensors files: read, checked, and written whole or not at all. Pickles are never read. Opened in chapter 15."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class WeightsError(ValueError):
    """A file that cannot be read, or that does not hold what it should."""


def open_tensors(path: str | Path, device: str = "cpu") -> safe_open:
    """Open a safetensors file; its tensors are read when they are asked for.

    Raises:
        WeightsError: there is no such file, it cannot be read, or it is not whole safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if path.suffix in {".pt", ".pth", ".ckpt", ".bin", ".pkl"}:
        raise WeightsError(f"{path}: this looks like a pickle, which can run code and is never read; give safetensors")
    try:
        return safe_open(path, framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from error


def read_tensors(path: str | Path, required: Collection[str], optional: Collection[str] = ()) -> dict[str, Tensor]:
    """All tensors of a file, whose names must be the required ones and may be the optional ones.

    Raises:
        WeightsError: a name is missing or unknown, or the file cannot be read.
    """
    with open_tensors(path) as file:
        names = set(file.keys())
        if problems := describe_difference(set(required), names, set(optional)):
            raise WeightsError(f"{path}: {problems}")
        return {name: file.get_tensor(name) for name in sorted(names)}


def describe_difference(
    required: Collection[str], found: Collection[str], optional: Collection[str] = (), most: int = 8
) -> str:
    """What is missing and what is unexpected, in words; empty where nothing is."""
    missing = sorted(set(required) - set(found))
    unexpected = sorted(set(found) - set(required) - set(optional))
    parts = []
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - most} more" if len(names) > most else ""
            parts.append(f"{len(names)} {what}: {', '.join(names[:most])}{more}")
    return "; ".join(parts)


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file: first beside its place, then moved there, so that no half file is ever found."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, dict(metadata) if metadata else None)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same tensors in another dtype."""
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_text(text: str, path: str | Path) -> None:
    """Write a text file whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
