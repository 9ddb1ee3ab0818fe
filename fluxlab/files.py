"""Safetensors files: read tensor by tensor, and written whole or not at all. Pickles are never read. Chapter 15."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {  # safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WeightsError(ValueError):
    """A file that cannot be read, or that does not hold what it should."""


class Entry(NamedTuple):
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """The tensors of a safetensors file, or of a folder of shards, by name; each is read when it is asked for."""

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            WeightsError: no such path, a file of it is not whole safetensors, or a name is in two files.
        """
        self.path = Path(path).expanduser()
        self._where: dict[str, safe_open] = {}
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        for file in map(_open, _shards(self.path)):
            self.metadata |= file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 (a file handle, not a dict)
                part = file.get_slice(name)
                if name in self.entries:
                    raise WeightsError(f"{self.path}: {name} is in two files; remove the one of another checkpoint")
                if part.get_dtype() not in DTYPES:
                    raise WeightsError(f"{self.path}: {name} holds {part.get_dtype()}, which is not read here")
                self._where[name] = file
                self.entries[name] = Entry(tuple(part.get_shape()), DTYPES[part.get_dtype()])

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)


def _shards(path: Path) -> list[Path]:
    """The files a path stands for: itself, or in a folder those of the index, or the only one."""
    if not path.is_dir():
        return [path]
    indices, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        try:
            return sorted({path / file for file in json.loads(indices[0].read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"{indices[0]}: not an index of shards ({error!r})") from error
    if len(files) != 1:
        raise WeightsError(
            f"{path}: this folder has {len(files)} safetensors files and {len(indices)} indices; name one file"
        )
    return files


def _open(path: Path) -> safe_open:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            start = file.read(2)
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        if start == b"PK" or start[:1] == b"\x80":  # a safetensors file can begin so too, by its header's length
            raise WeightsError(
                f"{path}: this is a pickle, which can run code and is never read; give safetensors"
            ) from error
        raise WeightsError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from error
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error}); look at its permissions") from error


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        WeightsError: the file cannot be read.
    """
    checkpoint = Checkpoint(path)
    return {name: checkpoint[name] for name in checkpoint.entries}


def describe_difference(wanted: Collection[str], found: Collection[str], most: int = 8) -> str:
    """Which names are missing and which unexpected, in words; empty where none is."""
    differences = (("missing", set(wanted) - set(found)), ("unexpected", set(found) - set(wanted)))
    return "; ".join(f"{len(names)} {what}: {listed(sorted(names), most)}" for what, names in differences if names)


def listed(words: list[str], most: int = 8) -> str:
    """The first few of a list, and how many more there are."""
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside the real one: it takes the real one's place if all goes well, and is gone if not."""
    path = Path(path)
    if not path.parent.is_dir():
        raise WeightsError(f"{path}: there is no folder {path.parent}; make it first")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that are in memory as a safetensors file, whole or not at all.

    Raises:
        WeightsError: a tensor is on the meta device, or there is no such folder.
    """
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise WeightsError(f"{empty[0]} is on the meta device and has no values to write")
    entries = {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    stream_tensors(entries, ((name, tensor.detach().cpu()) for name, tensor in tensors.items()), path, metadata)


def stream_tensors(
    entries: Mapping[str, Entry],
    tensors: Iterable[tuple[str, Tensor]],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file one tensor at a time, so that the memory it takes is that of one tensor.

    Args:
        entries: every tensor's shape and dtype, in the order of the file.
        tensors: name and value, in the same order.
        path: of the file, which is written whole or not at all.
        metadata: words to go with them.

    Raises:
        WeightsError: what comes is not what ``entries`` says.

    Source: the safetensors format: eight bytes of length, a header in JSON, the values one after the other.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, (shape, dtype) in entries.items():
        if dtype not in _NAMES:
            raise WeightsError(f"{name} is {dtype}, which is not written here")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, entry), (given, tensor) in zip(entries.items(), tensors, strict=True):
            if (given, tuple(tensor.shape), tensor.dtype) != (name, *entry):
                raise WeightsError(f"{given} is {tuple(tensor.shape)} {tensor.dtype}, where {name} {entry} was to come")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        WeightsError: there is no such file, or it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({error}); fetch or write it again") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: holds a {type(found).__name__}, where a JSON object was expected")
    return found


def write_text(text: str, path: str | Path) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
