"""What was captured of a run, and the file it is kept in. Opened in chapter 14."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxlab.files import Checkpoint, WeightsError, write_tensors
from fluxlab.inspect.table import Table


class Tape(Mapping[str, Tensor]):
    """What was captured: ``tape[name]``, and ``tape.forward(i)[name]`` where the model ran more than once."""

    def __init__(self) -> None:
        self.forwards = 0  # how often the model ran
        self.running = False  # while it does
        self.text_tokens: int | None = None  # of the run, where it is known
        self.heads: list[str] | None = None  # which the attention weights are of, or "mean"; None for all
        self.from_text = True  # whether the first columns of attention weights are those of the text
        self.nbytes = 0  # of memory, all that is kept
        self._kept: dict[str, dict[int, Tensor]] = {}

    def put(self, name: str, index: int, tensor: Tensor) -> None:
        """Keep a tensor of the forward with this index."""
        runs = self._kept.setdefault(name, {})
        self.nbytes += tensor.nbytes - (runs[index].nbytes if index in runs else 0)
        runs[index] = tensor

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name, of the one forward that was run.

        Raises:
            KeyError: it was not captured, or there are several, one for each forward.
        """
        runs = self._runs(name)
        if len(runs) > 1:
            raise KeyError(
                f"{name!r} was captured in {len(runs)} forwards; take one, tape.forward(0)[{name!r}], or all of them "
                f"on a first axis, tape.stack({name!r})"
            )
        return next(iter(runs.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._kept

    __eq__, __hash__ = object.__eq__, object.__hash__  # comparing tensors gives tensors, not one truth value

    def get(self, name: str, default: Any = None) -> Any:
        """As ``tape[name]``; the default where it was not captured."""
        return self[name] if name in self._kept else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def forward(self, index: int) -> dict[str, Tensor]:
        """All that was captured in one forward; in a sampling run with one forward a step, in one step.

        Raises:
            IndexError: the model did not run that often, or nothing was captured then.
        """
        wanted = index + self.forwards if index < 0 else index
        found = {name: runs[wanted] for name, runs in self._kept.items() if wanted in runs}
        if not found:
            raise IndexError(f"index is {index}, and the forwards that were captured are {self.captured}")
        return found

    def stack(self, name: str) -> Tensor:
        """A tensor of every captured forward, on a new first axis, in the order of the run.

        Raises:
            KeyError: it was not captured.
            ValueError: it has not the same shape in all of them.
        """
        found = list(self._runs(name).values())
        if shapes := {tuple(each.shape) for each in found[1:]} - {tuple(found[0].shape)}:
            said = f"{name} is {tuple(found[0].shape)} in one forward and {shapes.pop()} in another"
            raise ValueError(f"{said}; look at them one by one, with tape.forward(i)[{name!r}]")
        return torch.stack(found)

    def _runs(self, name: str) -> dict[int, Tensor]:
        if name not in self._kept:
            have = f"captured are {list(self)[:8]}" if self else "nothing was: run the model inside the with block"
            raise KeyError(f"{name!r} was not captured; {have}")
        return self._kept[name]

    @property
    def captured(self) -> list[int]:
        """Which forwards something was kept of."""
        return sorted({i for runs in self._kept.values() for i in runs})

    @property
    def table(self) -> Table:
        """One row for each name, its numbers taken over all forwards; what is not finite is counted apart."""
        return Table((self._row(name, list(runs.values())) for name, runs in self._kept.items()), title=self._title())

    def _title(self) -> str:
        return f"Tape of {self.forwards} forward{'s' * (self.forwards != 1)}, {self.nbytes / 2**20:.1f} MiB"

    def _row(self, name: str, tensors: list[Tensor]) -> dict[str, Any]:
        numbers: dict[str, Any] = dict.fromkeys(("mean", "std", "min", "max", "not finite"))
        if tensors[0].device.type != "meta":
            values = torch.cat([tensor.detach().cpu().flatten().double() for tensor in tensors])
            good = values[values.isfinite()]
            bad = values.numel() - good.numel()
            numbers["not finite"] = f"{bad}!" if bad else ""
            if good.numel():
                numbers |= {"mean": good.mean().item(), "std": good.std(correction=0).item()}
                numbers |= {"min": good.min().item(), "max": good.max().item()}
        kind = str(tensors[0].dtype).removeprefix("torch.")
        times = {"forwards": len(tensors)} if len(self.captured) > 1 else {}
        return {"name": name, **times, "shape": tuple(tensors[0].shape), "dtype": kind, **numbers}

    def __repr__(self) -> str:
        return repr(self.table) if self else f"{self._title()}: nothing captured yet"

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, one tensor for each name and forward."""
        tensors = {f"{i}/{name}": tensor for name, runs in self._kept.items() for i, tensor in runs.items()}
        about = {"forwards": self.forwards, "text_tokens": self.text_tokens, "heads": self.heads, "names": [*self]}
        about["from_text"] = self.from_text
        write_tensors(tensors, path, {key: json.dumps(value) for key, value in about.items()})

    @classmethod
    def load(cls, path: str | Path) -> Tape:
        """Read what ``save`` wrote, names and forwards in the order of the run.

        Raises:
            WeightsError: the file is not readable as safetensors, or is not a tape.
        """
        saved, tape = Checkpoint(path), cls()
        try:
            about = {key: json.loads(saved.metadata[key]) for key in ("forwards", "text_tokens", "heads", "names")}
            tape.forwards, tape.text_tokens, tape.heads = int(about["forwards"]), about["text_tokens"], about["heads"]
            tape.from_text = json.loads(saved.metadata.get("from_text", "true"))
            order = {name: i for i, name in enumerate(about["names"])}
            keys = [(int(index), name) for index, _, name in (key.partition("/") for key in saved.entries)]
        except (KeyError, ValueError, TypeError) as error:
            raise WeightsError(f"{path}: not a tape; a tape is what tape.save writes") from error
        for index, name in sorted(keys, key=lambda key: (order.get(key[1], len(order)), key[0])):  # not as strings
            tape.put(name, index, saved[f"{index}/{name}"])
        return tape
