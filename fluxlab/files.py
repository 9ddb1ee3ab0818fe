"""Safetensors files: read tensor by tensor, and written whole or not at all. Pickles are never read. Chapter 15."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_OTHERS = {  # how a file begins that is not safetensors: what it is, and what to do
    b"GGUF": "this is a GGUF file, and only safetensors are read here; fetch the safetensors file of the same model",
    b"PK": "this is a zip archive, as PyTorch saves a pickle, which can run code and is never read; give safetensors",
    b"\x80": "this is a pickle, which can run code and is never read; give safetensors",
    b"version https://git-lfs": "git-lfs has left this pointer in the file's place; run `git lfs pull` in its folder",
    b"<": "this is a web page, perhaps one that asks to log in or to accept a licence; do so, and fetch the file again",
}


class WeightsError(ValueError):
    """A file that cannot be read, or that does not hold what it should."""


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a safetensors file, or of shards, by name; each is read when it is asked for."""

    def __init__(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Of a file, a folder with one file or with shards and their index, or such an index.

        With ``dtype``, floating tensors are cast to it when they are read.

        Raises:
            WeightsError: no such path, a file of it is not whole safetensors, or a name is in two files.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise WeightsError(f"dtype is {dtype}; give a floating dtype, such as torch.bfloat16")
        self.path = Path(path).expanduser()
        self._where: dict[str, safe_open] = {}
        self.entries: dict[str, Tensor] = {}  # on the meta device: shapes and dtypes alone
        self.metadata: dict[str, str] = {}
        for file in map(_open, _shards(self.path)):
            self.metadata |= file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 (a file handle, not a dict)
                if name in self.entries:
                    raise WeightsError(f"{self.path}: {name} is in two files; remove the one of another checkpoint")
                tensor = file.get_tensor(name)  # mapped: no values are read yet
                self._where[name] = file
                self.entries[name] = tensor.to("meta", dtype if tensor.is_floating_point() else None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> Tensor:
        """
        Raises:
            WeightsError: the dtype cannot hold a value, which would become infinite.
        """
        tensor, dtype = self._where[name].get_tensor(name), self.entries[name].dtype
        cast = tensor.to(dtype)
        narrower = dtype != tensor.dtype and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
        if narrower and cast.float().isfinite().sum() != tensor.float().isfinite().sum():
            raise WeightsError(f"{self.path}: {name} has values that {dtype} cannot hold; take torch.bfloat16")
        return cast


def _shards(path: Path) -> list[Path]:
    """The files a path stands for: itself, those of an index, or in a folder those of its index or the only one."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            said = f": {listed([file.name for file in files])}" if files else ""
            raise WeightsError(f"{path}: this folder has {len(files)} checkpoints{said}; give the path of one file")
        path = files[0]
    if path.name.endswith(".index.json"):
        try:
            return sorted({path.parent / file for file in read_json(path)["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"{path}: not an index of shards ({error!r})") from error
    return [path]


def _open(path: Path) -> safe_open:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        with path.open("rb") as file:
            start = file.read(64).lstrip()
        torn = f"not a whole safetensors file: {path.stat().st_size:,} bytes ({error}); fetch or write it again"
        said = next((said for magic, said in _OTHERS.items() if start.startswith(magic)), torn)
        raise WeightsError(f"{path}: {said}") from error
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error}); look at its permissions") from error


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, or a ``WeightsError``."""
    return dict(Checkpoint(path))


def describe_difference(wanted: Collection[str], found: Collection[str], most: int = 8) -> str:
    """Which names are missing and which unexpected, in words; empty where none is."""
    differences = (("missing", set(wanted) - set(found)), ("unexpected", set(found) - set(wanted)))
    return "; ".join(f"{len(names)} {what}: {listed(sorted(names), most)}" for what, names in differences if names)


def listed(words: list[str], most: int = 8) -> str:
    """The first few of a list, and how many more there are."""
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside the real one: it takes the real one's place if all goes well, and is gone if not.

    Raises:
        WeightsError: the folder is not there.
    """
    path = Path(path).expanduser()
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
    stream_tensors(tensors, ((name, tensor.detach().cpu()) for name, tensor in tensors.items()), path, metadata)


def stream_tensors(
    entries: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, whole or not at all, one tensor at a time, so that it takes the memory of one tensor.

    ``entries`` give every tensor's shape and dtype, ``tensors`` its name and value, both in the order of the file.

    Raises:
        WeightsError: what comes is not what ``entries`` says.

    Source: the safetensors format: eight bytes of length, a header in JSON, the values one after the other.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + entry.numel() * entry.itemsize
        called = json.loads(save({"": torch.empty(0, dtype=entry.dtype)})[8:])[""]["dtype"]  # by safetensors itself
        header[name] = {"dtype": called, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, entry), (given, tensor) in zip(entries.items(), tensors, strict=True):
            if (given, tensor.shape, tensor.dtype) != (name, entry.shape, entry.dtype):
                raise WeightsError(f"{given} comes as {tensor.dtype} {list(tensor.shape)}, where {name} was to come")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        WeightsError: there is no such file, or it holds something else.
    """
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({error}); fetch or write it again") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: holds a {type(found).__name__}, where a JSON object was expected")
    return found


def write_text(text: str, path: str | Path) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
