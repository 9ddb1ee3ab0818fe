"""How a module is watched while it runs, for ``capture`` and ``patch``. Opened in chapter 14."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from fluxlab.inspect.names import Names, choose, unwrapped
from fluxlab.inspect.tape import Tape
from fluxlab.model.blocks import DoubleStreamBlock
from fluxlab.model.observe import observers

Take = Callable[[str, Tensor], Tensor]
Attend = Callable[[str, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(eq=False)
class Looker:
    """What ``see`` asks of each of its tensors: some are only remembered, until what is made of them is there.

    Blocks may lie in one another. Attention weights are of the q and k that go on after all of them, and come before
    the output of attention, whichever block asks for either.
    """

    points: dict[tuple[nn.Module, str], str]
    take: Callable[..., Tensor]
    tape: Tape
    doubles: set[nn.Module]  # the double blocks among what is looked at
    changes: bool
    parts: dict[tuple[nn.Module, str], Tensor] = field(default_factory=dict)
    thread: int = field(default_factory=get_ident)

    def __call__(self, module: nn.Module, point: str, tensor: Tensor) -> Tensor:
        """The tensor that goes on."""
        if get_ident() != self.thread:  # asyncio.to_thread takes the observers along
            return tensor
        lookers = [each for each in observers.get() if isinstance(each, Looker) and each.thread == self.thread]
        if point == "txt.input" and (module in self.doubles or not self.doubles):
            self.tape.text_tokens = tensor.shape[1]
        if point == "attended" and self is lookers[0]:
            for each in lookers:
                tensor = each.attend(module, tensor)
        if name := self.points.get((module, point)):
            tensor = self.take(name, tensor)
        if point in ("q", "k", "v") and self is lookers[-1]:
            for each in lookers:
                if (module, "attention") in each.points:
                    each.parts[module, point] = tensor
        if (module, "clean") in self.points:
            if point in ("img", "timesteps"):
                self.parts[module, point] = tensor
            elif point == "velocity":
                img, t = self.parts.pop((module, "img")), self.parts.pop((module, "timesteps"))[:, None, None]
                self.take("clean", img[..., : tensor.shape[-1]] - (t.to(tensor.device) * tensor).to(tensor.dtype))
        return tensor

    def attend(self, module: nn.Module, attended: Tensor) -> Tensor:
        """The output of attention, once whoever asks for its weights has had them."""
        if name := self.points.get((module, "attention")):
            return self.take(name, *(self.parts.pop((module, each)) for each in ("q", "k", "v")), attended)
        return attended


@contextmanager
def watching(
    model: nn.Module, names: Names, take: Take, attend: Attend, tape: Tape, changes: bool = False
) -> Iterator[list[str]]:
    """Each named tensor passes ``take``, and q, k, v and the output of named attention pass ``attend``.

    The tape is told how often the model runs, and how many tokens are text.

    Nothing stays on the model: the observers of this thread ask which module it is, and so does PyTorch's hook for all
    modules, which puts one on a layer while that runs, to come after those of others. So copies are not watched, and
    other threads neither.

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

    def ours() -> bool:
        return get_ident() == thread and observer in observers.get()  # no other thread, no other task of asyncio

    def before(module: nn.Module, args: Any) -> None:
        if module is model and ours():
            tape.forwards += 1
            tape.running = True
        if module in outputs and ours():
            again = any(module is outer for outer, _ in calls)
            calls.append((module, None if again else module.register_forward_hook(last)))

    def last(module: nn.Module, args: Any, output: Any) -> Any:
        if not ours():
            return None
        end(module)
        seen.add(outputs[module])
        return _each(outputs[module], output, taken)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if ours() and (module is model or (module in outputs and output is None)):  # as of a forward that failed
            tape.running = tape.running and module is not model
            end(module)

    def end(module: nn.Module) -> None:
        """Of a call, and of those in it that did not come to their end."""
        while calls:
            inner, handle = calls.pop()
            if handle is not None:
                handle.remove()
            if inner is module:
                break

    calls: list[tuple[nn.Module, RemovableHandle | None]] = []  # of watched layers, one in another
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
        observer.thread = -1  # in another context it may still be asked
        before_handle.remove()
        after_handle.remove()
        end(model)
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
    if isinstance(output, tuple) and any(isinstance(part, Tensor | tuple) for part in output):
        several = enumerate(output)
        parts = [_each(f"{name}.{i}", p, take) if isinstance(p, Tensor | tuple) else p for i, p in several]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    raise ValueError(f"{name} gives a {type(output).__name__}, not a tensor; name one of its parts")
