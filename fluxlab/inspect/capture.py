"""Look at any inner tensor of a run, or change it for a while, without touching the model. Opened in chapter 14.

Axes: batch B, heads H, tokens L, head width D, channels C.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral, Real
from threading import Lock, get_ident
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fluxlab.arguments import check_place
from fluxlab.inspect.attention import Range, attention_weights, tokens_of
from fluxlab.inspect.looker import Looker
from fluxlab.inspect.names import Names, choose, unwrapped
from fluxlab.inspect.tape import Tape
from fluxlab.model.blocks import DoubleStreamBlock
from fluxlab.model.observe import observers

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
        dtype: what to keep them as; by default as they are, and attention weights in float32.
        limit: GiB that the tape may hold.

    Raises:
        ValueError: a name picks nothing; ``limit`` is no number above 0; heads or tokens that the model does not have,
            or of no attention; no such device here, or no floating dtype of 16 bits or more; a tensor made outside the
            model's forward; at the end of the block, a model that did not run in it, a forward that was asked for and
            not run, or a name that no forward made.
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

    with _watching(model, names, take, attend, tape) as chosen:
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
    with _watching(model, name, apply, attend, Tape(), changes=True) as chosen:
        if "clean" in chosen:
            raise ValueError("'clean' is worked out from the velocity and does not go on; change 'velocity' instead")
        yield


# ---------------------------------------------------------------------------------------------------------------------
# How a module is watched
# ---------------------------------------------------------------------------------------------------------------------

Take = Callable[[str, Tensor], Tensor]
Attend = Callable[[str, Tensor, Tensor, Tensor, Tensor], Tensor]


@contextmanager
def _watching(
    model: nn.Module, names: Names, take: Take, attend: Attend, tape: Tape, changes: bool = False
) -> Iterator[list[str]]:
    """Each named tensor passes ``take``, and q, k, v and the output of named attention pass ``attend``.

    The tape is told how often the model runs, and how many tokens are text.

    Nothing is put on the model: PyTorch's hooks for all modules, and the observers of this thread, ask which module it
    is. So copies are not watched, other threads neither, and nothing can stay behind.

    Raises:
        ValueError: the model did not run, or a name was made by no forward.
    """
    modules = unwrapped(model)
    model = modules[""]
    chosen, groups = choose(model, names)
    outputs = {modules[name]: name for name in chosen if name in modules}
    points: dict[tuple[nn.Module, str], str] = {}  # a module and a name below it, to the whole name
    for name in chosen:
        if name not in modules:
            owner = max((path for path in modules if not path or name.startswith(f"{path}.")), key=len)
            points[modules[owner], name[len(owner) :].lstrip(".")] = name
    thread, seen = get_ident(), set[str]()

    def taken(name: str, *tensors: Tensor) -> Tensor:
        seen.add(name)
        return take(name, *tensors) if len(tensors) == 1 else attend(name, *tensors)

    def before(module: nn.Module, args: Any) -> None:
        if module is model and get_ident() == thread and observer in observers.get():  # no other task of asyncio
            tape.forwards += 1
            tape.running = True

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if get_ident() != thread or observer not in observers.get():
            return None
        tape.running = tape.running and module is not model
        if module not in outputs or output is None:  # as of a forward that failed
            return None
        seen.add(outputs[module])
        return _each(outputs[module], output, taken)

    before_handle = register_module_forward_pre_hook(before)
    after_handle = register_module_forward_hook(after, always_call=True)
    doubles: set[nn.Module] = {part for part in modules.values() if isinstance(part, DoubleStreamBlock)}
    observer = Looker(points, taken, tape, doubles, changes)
    observers.set((*observers.get(), observer))
    try:
        with eagerly():
            yield chosen
    finally:
        observers.set(tuple(each for each in observers.get() if each is not observer))
        before_handle.remove()
        after_handle.remove()
    if not tape.forwards and not seen:  # a part of an autoencoder runs without a forward of the whole
        raise ValueError(
            f"the {type(model).__name__} that was given did not run inside the with block, so there is nothing to see "
            f"or to change; run that very module there, in this thread, not a copy or an exported form of it"
        )
    if unmade := [group for group, those in groups.items() if not seen.intersection(those)]:
        raise ValueError(
            f"{unmade[0]!r} was made by none of the {tape.forwards} forwards, so it was neither seen nor changed"
        )


_blocks: list[ExitStack] = []  # that are open now, in all threads and tasks
_lock = Lock()


@contextmanager
def eagerly() -> Iterator[None]:
    """Nothing runs compiled meanwhile. Blocks may overlap: the last to end puts back what the first found."""
    with _lock:
        _blocks.append(_blocks[0] if _blocks else ExitStack())
        if len(_blocks) == 1:
            _blocks[0].enter_context(torch.compiler.set_stance("force_eager"))
            _blocks[0].enter_context(warnings.catch_warnings())
            # it warns that hooks fire twice: ours ask whose call it is
            warnings.filterwarnings("ignore", message="Using `torch.compile")
    try:
        yield
    finally:
        with _lock:
            stack = _blocks.pop()
            if not _blocks:
                stack.close()


def _each(name: str, output: Any, take: Take) -> Any:
    """What a layer gives: one tensor, or several in a tuple, where what is no tensor is left alone."""
    if isinstance(output, Tensor):
        return take(name, output)
    if isinstance(output, tuple):
        several = enumerate(output)
        parts = [_each(f"{name}.{i}", p, take) if isinstance(p, Tensor | tuple) else p for i, p in several]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    raise ValueError(f"{name} gives a {type(output).__name__}, not a tensor; name one of its parts")
