"""Safetensors files: read tensor by tensor, and written whole or not at all. Pickles are never read. Chapter 15."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fluxlab.arguments import cast, check_dtype

_OTHERS = {  # how a file begins that is not safetensors: what it is, and what to do
    b"PK": "this is a zip archive, as PyTorch saves a pickle, which can run code and is never read; give safetensors",
    b"\x80": "this is a pickle, which can run code and is never read; give safetensors",
    b"version https://git-lfs": "git-lfs has left this pointer in the file's place; run `git lfs pull` in its folder",
    b"GGUF": "this is a GGUF file, where safetensors was expected; only a whole model's or a text encoder's may be one",
    b"<": "this is a web page, perhaps one that asks to log in or to accept a licence; do so, and fetch the file again",
}
# what JSON of another form than expected, or of numbers that no float holds, leads to
MISREAD = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


class WeightsError(ValueError):
    """A file that cannot be read, or that does not hold what it should."""

    def __str__(self) -> str:
        """One line, whatever the names in the file are."""
        return "".join(each if each.isprintable() else repr(each)[1:-1] for each in super().__str__())


def at(path: str | Path) -> Path:
    """A path whose ~ is opened; a ``WeightsError`` where it is none, or the system refuses to look at it."""
    try:
        opened = Path(os.path.expanduser(path))  # Path's own raises where there is no such user
        opened.exists()  # which raises where a name is too long, or a folder is closed
    except (TypeError, OSError) as error:
        raise WeightsError(f"{path!r} is no path of a file or a folder ({error})") from error
    return opened


class Tensors(Mapping):  # type: ignore[type-arg]  # of str to Tensor: said, a runtime checker would read one to see
    """Tensors by name, each read when it is asked for; ``entries`` tell shapes and dtypes ahead, on the meta device."""

    def __init__(
        self,
        path: Path,
        entries: dict[str, Tensor],
        read: Callable[[str], Tensor],
        metadata: Mapping[str, str] | None = None,
        mapped: bool = False,  # whether what is read stays in the file, and takes no memory that cannot be given back
        kinds: Mapping[str, str] | None = None,  # what the file holds of each, where it is read as another dtype
    ) -> None:
        self.path, self.entries, self.metadata, self.mapped = path, entries, dict(metadata or {}), mapped
        self.kinds = {n: str(e.dtype).removeprefix("torch.") for n, e in entries.items()} | dict(kinds or {})
        self._read = read

    __eq__, __hash__ = object.__eq__, object.__hash__  # a comparison would read all

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """The tensors that ``names`` lists, from each new name to its old one."""
        entries = {new: self.entries[old] for new, old in names.items()}
        kinds = {new: self.kinds[old] for new, old in names.items()}
        return Tensors(self.path, entries, lambda name: self[names[name]], self.metadata, self.mapped, kinds)

    def cast(self, dtype: torch.dtype | None) -> Tensors:
        """With the floating ones of a dtype; of None, as they are.

        Raises:
            WeightsError: no floating dtype of two bytes and more; when a tensor is read, a value would become infinite.
        """
        if dtype is None:
            return self
        check_dtype(dtype, WeightsError)
        entries = {name: e.to(dtype) if e.is_floating_point() else e for name, e in self.entries.items()}
        mapped = self.mapped and all(entries[name].dtype == e.dtype for name, e in self.entries.items())

        def read(name: str) -> Tensor:
            return cast(f"{self.path}: {name}", self[name], entries[name].dtype, WeightsError)

        return Tensors(self.path, entries, read, self.metadata, mapped)


class Checkpoint(Tensors):
    """The tensors of a safetensors file, or of shards."""

    def __init__(self, path: str | Path) -> None:
        """Of a file, a folder with one file or with shards and their index, or such an index.

        Raises:
            WeightsError: no such path, a file of it is not whole safetensors, or a name is in two files.
        """
        path = at(path)
        metadata: dict[str, str] = {}
        where: dict[str, safe_open] = {}
        entries: dict[str, Tensor] = {}
        files, promised = _shards(path)
        for file, inside in map(_open, files):
            if twice := sorted(entries.keys() & inside):
                raise WeightsError(f"{path}: {twice[0]} is in two files; remove the one of another checkpoint")
            metadata |= file.metadata() or {}
            entries |= inside
            where |= dict.fromkeys(inside, file)
        if promised is not None and (problem := describe_difference(promised, entries)):
            raise WeightsError(f"{path}: its files are not those of its index: {problem}; fetch both again")
        super().__init__(path, entries, lambda name: where[name].get_tensor(name), metadata, mapped=True)


def _shards(path: Path) -> tuple[list[Path], Collection[str] | None]:
    """The files of a path: itself, those of an index, or in a folder the only ones; and the names that an index has."""
    if path.is_dir():
        kinds = (".safetensors.index.json", ".safetensors.index.*.json", ".safetensors")  # the second of a variant
        files = next((found for kind in kinds if (found := sorted(path.glob(f"[!.]*{kind}")))), [])
        if len(files) != 1:
            there = listed([file.name for file in files or sorted(path.iterdir())]) or "nothing"
            said = f"{path}: this folder has {len(files)} checkpoints (it holds {there})"
            raise WeightsError(f"{said}; give the path of one file")
        path = files[0]
    if is_index(path):
        try:
            promised = read_json(path)["weight_map"]
            shards = {at(path.parent / file) for file in promised.values()}
        except MISREAD as error:
            raise WeightsError(f"{path}: not an index of shards ({type(error).__name__}: {error})") from error
        if absent := sorted(file.name for file in shards if not file.exists()):
            raise WeightsError(f"{path}: names {len(absent)} files that are not there: {listed(absent)}; fetch them")
        return sorted(shards), promised
    return [path], None


def is_index(path: Path) -> bool:
    """Whether a file is named as an index of shards is, with or without a variant: ``….index.fp16.json``."""
    return re.search(r"\.index(\.\w+)?\.json$", path.name) is not None


def _open(path: Path) -> tuple[safe_open, dict[str, Tensor]]:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        file = safe_open(path, framework="pt", device="cpu")
        return file, {name: file.get_tensor(name).to("meta") for name in file.keys()}  # noqa: SIM118 (no dict)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error}); look at its permissions") from error
    except (SafetensorError, RuntimeError, ValueError, TypeError, AttributeError, OverflowError) as error:
        torn = f"not a whole safetensors file: {path.stat().st_size:,} bytes ({error}); fetch or write it again"
        raise WeightsError(f"{path}: {what_it_is(path) or torn}") from error


def what_it_is(path: Path) -> str | None:
    """What a file is that is not what it should be, where it tells."""
    with path.open("rb") as opened:
        start = opened.read(64)
    if start[4:9] == bytes(4) + b"{":  # safetensors begin with the length of a JSON object
        return None
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((said for magic, said in _OTHERS.items() if start.startswith(magic)), None)


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
        WeightsError: the folder is not there, or the path is one itself.
    """
    path = at(path)
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; give the path of a file in it")
    if not path.parent.is_dir():
        raise WeightsError(f"{path}: there is no folder {path.parent}; make it first")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:40]}.") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)


def check_plain(name: str, tensor: Any) -> None:
    """A ``WeightsError`` unless a tensor has plain values: not on the meta device, quantized, divided or sparse."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        advice = "; undo what made it so, as quantize or shard" if isinstance(tensor, Tensor) else ""
        raise WeightsError(f"{name} is a {type(tensor).__name__}, where a plain tensor was expected{advice}")
    if tensor.is_meta or tensor.layout != torch.strided:
        what = "on the meta device: it has no values" if tensor.is_meta else f"{tensor.layout}: it has no plain values"
        raise WeightsError(f"{name} is {what} to write")
    if tensor.dtype == torch.complex128:
        raise WeightsError(f"{name} is complex128, which safetensors cannot hold; give torch.complex64")


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that are in memory as a safetensors file, whole or not at all.

    Raises:
        WeightsError: a tensor has no values or no plain ones, or there is no such folder.
    """
    for name, tensor in tensors.items():
        check_plain(name, tensor)
    stream_tensors(tensors, ((name, tensor.detach().cpu()) for name, tensor in tensors.items()), path, metadata)


def stream_tensors(
    entries: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, whole or not at all, in the memory of one tensor.

    ``entries`` give every tensor's shape and dtype, ``tensors`` its name and value, both in the order of the file.

    Raises:
        WeightsError: what comes is not what ``entries`` says.
        ValueError: fewer or more come.

    Source: the safetensors format: eight bytes of length, a header in JSON, the values one after the other.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | {k: str(v) for k, v in (metadata or {}).items()}}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + entry.numel() * entry.itemsize
        empty = torch.empty(0, dtype=entry.dtype, device="cpu")
        called = json.loads(save({"": empty})[8:])[""]["dtype"]  # by safetensors itself
        header[name] = {"dtype": called, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, entry), (given, tensor) in zip(entries.items(), tensors, strict=True):
            if (given, tensor.shape, tensor.dtype) != (name, entry.shape, entry.dtype):
                wanted = f"{name} of {entry.dtype} {list(entry.shape)}"
                raise WeightsError(f"{given} of {tensor.dtype} {list(tensor.shape)} came, where {wanted} was expected")
            file.write(tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object; a ``WeightsError`` where there is no such file, or it holds something else."""
    try:
        found = json.loads(at(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error})") from error
    except MISREAD as error:
        torn = f"cannot be read as JSON ({error}); fetch or write it again"
        raise WeightsError(f"{path}: {what_it_is(at(path)) or torn}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: holds a {type(found).__name__}, where a JSON object was expected")
    return found


def write_text(text: str, path: str | Path) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
