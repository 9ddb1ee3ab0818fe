"""Look at any inner tensor of a run, or change it for a while, without touching the model. Opened in chapter 14.

Axes: batch B, heads H, tokens L, head width D, channels C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from fluxlab.files import Checkpoint, WeightsError, write_tensors
from fluxlab.inspect.names import Names, choose
from fluxlab.inspect.table import Table
from fluxlab.model.observe import Observed

Range = slice | Literal["text", "image"] | None
Change = Callable[[Tensor], Tensor]
_CHUNK = 64 * 2**20  # bytes of scores at a time


class Tape(Mapping[str, Tensor]):
    """What was captured: ``tape[name]``, and ``tape.forward(i)[name]`` where the model ran more than once."""

    def __init__(self) -> None:
        self.forwards = 0  # how often the model ran
        self.text_tokens: int | None = None  # of the run, where it is known
        self.nbytes = 0  # of memory, all that is kept
        self._kept: dict[str, dict[int, Tensor]] = {}

    def _keep(self, name: str, index: int, tensor: Tensor) -> None:
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
        """A tensor of every captured forward, on a new first axis."""
        return torch.stack(list(self._runs(name).values()))

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

    @staticmethod
    def _row(name: str, tensors: list[Tensor]) -> dict[str, Any]:
        if tensors[0].device.type == "meta":
            numbers: dict[str, Any] = dict.fromkeys(("mean", "std", "min", "max", "not finite"))
        else:
            values = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
            good = values[values.isfinite()]
            bad = values.numel() - good.numel()
            some = good.numel() > 0
            numbers = {
                "mean": good.mean().item() if some else None,
                "std": good.std(correction=0).item() if some else None,
                "min": good.min().item() if some else None,
                "max": good.max().item() if some else None,
                "not finite": f"{bad}!" if bad else "",
            }
        kind = str(tensors[0].dtype).removeprefix("torch.")
        times = {} if len(tensors) == 1 else {"forwards": len(tensors)}
        return {"name": name, **times, "shape": tuple(tensors[0].shape), "dtype": kind, **numbers}

    def __repr__(self) -> str:
        return repr(self.table) if self else f"{self._title()}: nothing captured yet"

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, one tensor for each name and forward."""
        tensors = {f"{i}/{name}": tensor for name, runs in self._kept.items() for i, tensor in runs.items()}
        about = {"forwards": str(self.forwards), "text_tokens": str(self.text_tokens or "")}
        write_tensors(tensors, path, about)

    @classmethod
    def load(cls, path: str | Path) -> Tape:
        """Read what ``save`` wrote.

        Raises:
            WeightsError: the file is not readable as safetensors, or is not a tape.
        """
        saved = Checkpoint(path)
        if "forwards" not in saved.metadata:
            raise WeightsError(f"{path}: not a tape; a tape is what tape.save writes")
        tape = cls()
        tape.forwards = int(saved.metadata["forwards"])
        tape.text_tokens = int(saved.metadata["text_tokens"] or 0) or None
        for key in saved.entries:
            index, name = key.split("/", 1)
            tape._keep(name, int(index), saved[key])
        return tape


@contextmanager
def capture(
    model: nn.Module,
    names: Names,
    *,
    heads: Sequence[int] | None = None,
    queries: Range = None,
    keys: Range = None,
    mean_heads: bool = False,
    forwards: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    limit: float = 4.0,
) -> Iterator[Tape]:
    """Keep named tensors of what the model runs inside the ``with`` block.

    The run is the same as without, to the bit; but in bfloat16 on a CPU, where an MLP's way in (``img_mlp.0``,
    ``txt_mlp.0``, ``linear1``) or GELU (``img_mlp.1``, ``txt_mlp.1``, ``mlp_act``) is kept, the two are computed one
    after the other and not at once, which rounds the hidden features once more.

    Args:
        model: a ``Flux``, one of its blocks, or any module; of others, the outputs of the layers have names.
        names: a name, a pattern such as ``"double_blocks.*.img.output"``, a list of them, or a function of a name.
            Attention weights (``"double_blocks.7.attention"``) are computed only where the pattern has that word.
        heads: of the attention weights, these heads alone.
        queries: of the attention weights, these rows alone: a slice of tokens, ``"text"`` or ``"image"``.
        keys: likewise the columns.
        mean_heads: keep the mean over the heads, as ``B 1 L L``.
        forwards: keep these forwards alone, counted from 0; by default all.
        device: where to keep the tensors; by default where they are.
        dtype: what to keep them as; by default as they are, and attention weights in float32.
        limit: GiB that the tape may hold.

    Raises:
        ValueError: a name picks nothing; heads or tokens that the model has not; a dtype that holds no fractions; a
            tensor made outside the model's forward.
        MemoryError: the tape would grow above the limit.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; give a floating dtype of torch, such as torch.float16")
    tape, chosen = Tape(), choose(model, names)

    def keep(name: str, tensor: Tensor, nbytes: int | None = None) -> bool:
        """Whether this forward is wanted, and there is room."""
        if tape.forwards == 0:
            raise ValueError(
                f"{name} was made outside the model's forward (as by encode or decode), so its forwards cannot be told "
                f"apart; capture the part that is called, such as autoencoder.decoder"
            )
        if forwards is not None and tape.forwards - 1 not in forwards:
            return False
        size = tensor.numel() * (dtype or tensor.dtype).itemsize if nbytes is None else nbytes
        if tape.nbytes + size > limit * 2**30:
            raise MemoryError(
                f"{name} takes {size / 2**30:.2f} GiB more, and the tape holds {tape.nbytes / 2**30:.2f} of {limit:g}; "
                f"name fewer tensors, give dtype, forwards, heads, queries, keys or mean_heads, or raise limit"
            )
        return True

    def put(name: str, tensor: Tensor) -> None:
        kept = tensor.detach().to(device=device, dtype=dtype)
        if kept.untyped_storage().nbytes() > kept.nbytes or kept.data_ptr() == tensor.data_ptr():
            kept = kept.clone()  # a view would keep all that it is a view of, and change when that is changed
        tape._keep(name, tape.forwards - 1, kept)

    def take(name: str, tensor: Tensor) -> Tensor:
        if keep(name, tensor):
            put(name, tensor)
        return tensor

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> Tensor:
        rows, columns = (_tokens(r, q.shape[2], tape.text_tokens) for r in (queries, keys))
        picked = range(q.shape[1]) if heads is None else heads
        count = q.shape[0] * (1 if mean_heads else len(picked)) * _length(rows, q) * _length(columns, q)
        if keep(name, q, count * (dtype or torch.float32).itemsize):
            put(name, attention_weights(q, k, picked, rows, columns, mean_heads))
        return attended

    def started(text: int | None) -> None:
        tape.forwards += 1
        tape.text_tokens = text

    with _watching(model, chosen, take, attend, started):
        yield tape


@contextmanager
def patch(model: nn.Module, name: Names, change: Change) -> Iterator[None]:
    """Put something else in place of named tensors, as long as the ``with`` block lasts.

    Args:
        model: as for ``capture``.
        name: likewise; attention weights, where named, are changed before they meet the values.
        change: takes the tensor and gives the one to go on with, of the same shape, dtype and device.

    Raises:
        ValueError: a name picks nothing or cannot be changed; the change gave something that does not fit.
    """
    chosen = choose(model, name)
    if "clean" in chosen:
        raise ValueError("'clean' is worked out from the velocity and does not go on; change 'velocity' instead")

    def apply(name: str, tensor: Tensor) -> Tensor:
        changed = change(tensor)
        got = (tuple(changed.shape), changed.dtype, changed.device) if isinstance(changed, Tensor) else type(changed)
        if got != (expected := (tuple(tensor.shape), tensor.dtype, tensor.device)):
            raise ValueError(f"the change of {name} gave {got}; give back a tensor like the one it took, {expected}")
        return changed

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> Tensor:
        weights = attention_weights(q, k, range(q.shape[1]), slice(None), slice(None)).to(v.dtype)
        return rearrange(apply(name, weights) @ v, "b h l d -> b l (h d)")

    with _watching(model, chosen, apply, attend, lambda text: None):
        yield


def attention_weights(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads tokens dim"],
    heads: Sequence[int],
    queries: slice,
    keys: slice,
    mean_heads: bool = False,
) -> Float[Tensor, "batch kept_heads queries keys"]:
    """``softmax(q k^T / sqrt(D))`` of rotated q and k, a few rows of one head at a time, in float32 at least.

    Args:
        q: rotated queries.
        k: rotated keys.
        heads: which to keep.
        queries: the rows to keep.
        keys: the columns to keep; the softmax runs over all of them.
        mean_heads: give the mean over ``heads``, as one head.

    Raises:
        ValueError: there is no such head.
    """
    if wrong := [head for head in heads if not 0 <= head < q.shape[1]]:
        raise ValueError(f"heads has {wrong[0]}, and the model has heads 0 to {q.shape[1] - 1}")
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, columns = q[:, :, queries].shape[2], k[:, :, keys].shape[2]
    out = q.new_zeros((q.shape[0], 1 if mean_heads else len(heads), rows, columns), dtype=wide)
    step = max(1, _CHUNK // (q.shape[0] * k.shape[2] * wide.itemsize))
    for i, head in enumerate(heads):
        towards = k[:, head].to(wide).transpose(1, 2)
        for start in range(0, rows, step):
            some = q[:, head, queries][:, start : start + step].to(wide)
            weights = (some @ towards / math.sqrt(q.shape[3])).softmax(dim=-1)[..., keys]
            if mean_heads:
                out[:, 0, start : start + step] += weights / len(heads)
            else:
                out[:, i, start : start + step] = weights
    return out


def _tokens(chosen: Range, tokens: int, text: int | None) -> slice:
    if chosen is None or isinstance(chosen, slice):
        return chosen or slice(None)
    if chosen not in ("text", "image"):
        raise ValueError(f"queries and keys are a slice, 'text' or 'image'; got {chosen!r}")
    if text is None:
        raise ValueError(
            f"{chosen!r} needs to know where the text ends, which a single block is not told; give a slice"
        )
    return slice(0, text) if chosen == "text" else slice(text, tokens)


def _length(chosen: slice, q: Tensor) -> int:
    return len(range(*chosen.indices(q.shape[2])))


# ---------------------------------------------------------------------------------------------------------------------
# How a module is watched
# ---------------------------------------------------------------------------------------------------------------------

Attend = Callable[[str, Tensor, Tensor, Tensor, Tensor], Tensor]


@contextmanager
def _watching(
    model: nn.Module,
    names: Sequence[str],
    take: Callable[[str, Tensor], Tensor],
    attend: Attend,
    started: Callable[[int | None], None],
) -> Iterator[None]:
    """Each named tensor passes ``take``, and q, k, v and the output of named attention pass ``attend``."""
    modules = dict(model.named_modules())
    points: dict[str, set[str]] = {}
    given: dict[str, Any] = {}

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.update(signature(module.forward).bind(*args, **kwargs).arguments)
        text = given.get("txt")
        started(text.shape[1] if isinstance(text, Tensor) else None)

    with ExitStack() as undo:
        undo.callback(given.clear)
        undo.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for name in names:
            if name in modules:
                undo.callback(modules[name].register_forward_hook(_on_output(name, take)).remove)
            else:
                owner = max((path for path in modules if not path or name.startswith(f"{path}.")), key=len)
                points.setdefault(owner, set()).add(name[len(owner) :].lstrip("."))
        for owner, wanted in points.items():
            module = modules[owner]
            assert isinstance(module, Observed)
            observer = _observer(f"{owner}." if owner else "", wanted, take, attend, given)
            module.observers = (*module.observers, observer)
            undo.callback(_leave, module, observer)
        yield


def _on_output(name: str, take: Callable[[str, Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return take(name, output)
        if isinstance(output, tuple):
            return tuple(take(f"{name}.{i}", part) for i, part in enumerate(output))
        raise ValueError(f"{name} gives a {type(output).__name__}, not a tensor; name one of its parts")

    return hook


def _observer(
    prefix: str, wanted: set[str], take: Callable[[str, Tensor], Tensor], attend: Attend, given: dict[str, Any]
) -> Callable[[str, Tensor], Tensor]:
    parts: dict[str, Tensor] = {}

    def see(point: str, tensor: Tensor) -> Tensor:
        if point in wanted:
            tensor = take(prefix + point, tensor)
        if "attention" in wanted and point in ("q", "k", "v"):
            parts[point] = tensor
        elif "attention" in wanted and point == "attended":
            tensor = attend(f"{prefix}attention", parts.pop("q"), parts.pop("k"), parts.pop("v"), tensor)
        if "clean" in wanted and point == "img":
            parts["img"] = tensor
        elif "clean" in wanted and point == "velocity":
            t = given["timesteps"][:, None, None].to(tensor.device)
            take("clean", parts.pop("img")[..., : tensor.shape[-1]] - (t * tensor).to(tensor.dtype))
        return tensor

    return see


def _leave(module: Observed, observer: Callable[[str, Tensor], Tensor]) -> None:
    """Take one observer away and, with the last, every trace."""
    module.observers = tuple(each for each in module.observers if each is not observer)
    if not module.observers:
        del module.observers
