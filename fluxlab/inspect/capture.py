"""Look at any inner tensor of a run, or change it for a while, without touching the model. Opened in chapter 14.

Axes: batch B, heads H, tokens L, head width D, channels C.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from fluxlab.arguments import cast, check_place
from fluxlab.inspect.attention import Range, attention_weights, tokens_of
from fluxlab.inspect.looker import watching
from fluxlab.inspect.names import Names
from fluxlab.inspect.tape import Tape

Change = Callable[[Tensor], Tensor]


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

    The run is the same as without, to the bit. A model that was compiled runs eagerly meanwhile, and is as it was
    afterwards. Runs in other threads are not seen, and a copy of the model is another model.

    Args:
        model: a ``Flux``, one of its blocks, or any module, compiled or not; of others, the layers' outputs have names.
        names: a name, a pattern such as ``"double_blocks.*.img.output"``, a list of them, or a function of a name.
            Attention weights (``"double_blocks.7.attention"``) are computed only where the pattern has that word.
            Of a tensor that ``patch`` changes, a capture inside its block keeps the new one, one around it the old; of
            a layer that runs several times in one forward, the last is kept.
        heads: of the attention weights, these heads alone.
        queries: of the attention weights, these rows alone: a slice of tokens, ``"text"`` or ``"image"``.
        keys: likewise the columns.
        mean_heads: keep the mean over the heads, as ``B 1 L L``.
        forwards: keep these forwards alone, counted from 0; by default all.
        device: where to keep the tensors; by default where they are.
        dtype: what to keep floating ones as; by default as they are, and attention weights in float32.
        limit: GiB that the tape may hold.

    Raises:
        ValueError: a name picks nothing; ``limit`` is no number above 0; heads or tokens that the model does not have,
            or of no attention; no such device here, or no floating dtype of 16 bits or more, or one that cannot hold
            a value; a tensor made outside the model's forward; at the end of the block, a model that did not run in
            it, a forward that was asked for and not run, or a name that no forward made.
        MemoryError: the tape would grow above the limit.
    """
    check_place("cpu" if device is None else device, dtype)
    if not (isinstance(limit, Real) and limit > 0):
        raise ValueError(f"limit is {limit!r}; give the GiB that the tape may hold, such as 4")
    heads, forwards = _counted("heads", heads), _counted("forwards", forwards)
    tape = Tape()
    tape.from_text = keys in (None, "text") or (isinstance(keys, slice) and not keys.start and keys.step in (None, 1))
    tape.heads = ["mean"] if mean_heads else None if heads is None else [str(head) for head in heads]

    def keep(name: str, tensor: Tensor, nbytes: int | None = None) -> bool:
        """Whether this forward is wanted, and there is room."""
        if not tape.running:
            raise ValueError(
                f"{name} was made outside the model's forward (as by encode or decode, ahead of a loop, or again in "
                f"backward), so its forwards cannot be told apart; capture the part that is called, such as "
                f"autoencoder.decoder"
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
        kept = tensor.detach()
        if dtype is not None and kept.is_floating_point():
            kept = cast(name, kept, dtype)
        try:
            kept = kept.to(device)
            if kept.untyped_storage().nbytes() > kept.nbytes or kept.data_ptr() == tensor.data_ptr():
                kept = kept.clone()  # a view would keep all that it is a view of, and change when that is changed
        except NotImplementedError as error:
            why = str(error).splitlines()[0]
            raise ValueError(
                f"{name} cannot be kept ({why}); capture outside of torch.func, or without device"
            ) from error
        tape.put(name, tape.forwards - 1, kept)

    def take(name: str, tensor: Tensor) -> Tensor:
        if keep(name, tensor):
            put(name, tensor)
        return tensor

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> Tensor:
        rows, columns = (tokens_of(chosen, q.shape[2], tape.text_tokens) for chosen in (queries, keys))
        picked = range(q.shape[1]) if heads is None else heads
        if wrong := [head for head in picked if head >= q.shape[1]]:
            raise ValueError(f"heads has {wrong[0]}, and the model has heads 0 to {q.shape[1] - 1}")
        height, width = (len(range(q.shape[2])[chosen]) for chosen in (rows, columns))
        if not height * width:
            raise ValueError(f"queries is {queries!r} and keys is {keys!r}; of {q.shape[2]} tokens they pick none")
        count = q.shape[0] * (1 if mean_heads else len(picked)) * height * width
        if keep(name, q, count * (dtype or torch.float32).itemsize):
            if (changed := getattr(attended, "changed_weights", None)) is not None:
                changed = changed[:, picked][:, :, rows, columns].float()
                put(name, changed.mean(1, keepdim=True) if mean_heads else changed)
            else:
                put(name, attention_weights(q, k, picked, rows, columns, mean_heads))
        return attended

    with watching(model, names, take, attend, tape) as chosen:
        if (tape.heads or queries or keys) and not any(name.split(".")[-1] == "attention" for name in chosen):
            raise ValueError("heads, mean_heads, queries and keys are of attention weights, and names picks none")
        yield tape
    if late := [index for index in forwards or () if index >= tape.forwards]:
        raise ValueError(f"forwards has {late[0]}, counted from 0, and the model ran {tape.forwards} times")
    if unmade := [index for index in forwards or () if index not in tape.captured]:
        raise ValueError(
            f"forwards has {unmade[0]}, which made nothing of what names picks, as a step that was skipped"
        )


def _counted(name: str, given: Any) -> list[int] | None:
    """A list of whole numbers from 0, or nothing."""
    if given is None:
        return None
    found = list(given) if isinstance(given, Iterable) else []
    if not found or not all(isinstance(each, Integral) and int(each) >= 0 for each in found):
        raise ValueError(f"{name} is {given!r}; give a list of whole numbers, counted from 0, such as [0, 2]")
    return [int(each) for each in found]


@contextmanager
def patch(model: nn.Module, name: Names, change: Change) -> Iterator[None]:
    """Put something else in place of named tensors, as long as the ``with`` block lasts.

    Args:
        model: as for ``capture``.
        name: likewise; attention weights, where named, are changed before they meet the values.
        change: takes the tensor and gives the one to go on with, of the same shape, dtype and device.

    Raises:
        ValueError: a name picks nothing or cannot be changed; the change gave something that does not fit; at the end
            of the block, a model that did not run in it, or a name that no forward made.
    """

    def apply(name: str, tensor: Tensor) -> Tensor:
        changed = change(tensor.clone())  # which may write into it
        got = (tuple(changed.shape), changed.dtype, changed.device) if isinstance(changed, Tensor) else type(changed)
        if got != (expected := (tuple(tensor.shape), tensor.dtype, tensor.device)):
            raise ValueError(f"the change of {name} gave {got}; give back a tensor like the one it took, {expected}")
        return changed

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> Tensor:
        weights = attention_weights(q, k, range(q.shape[1]), slice(None), slice(None)).to(v.dtype)
        weights = apply(name, weights)
        attended = rearrange(weights @ v, "b h l d -> b l (h d)")
        attended.changed_weights = weights  # type: ignore[attr-defined]  # for a capture inside this block
        return attended

    if not callable(change):
        raise ValueError(
            f"change is a {type(change).__name__}; give a function of the tensor, such as torch.zeros_like"
        )
    with watching(model, name, apply, attend, Tape(), changes=True) as chosen:
        if "clean" in chosen:
            raise ValueError("'clean' is worked out from the velocity and does not go on; change 'velocity' instead")
        yield
