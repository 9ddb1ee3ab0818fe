"""What was put on a pipeline, and how it comes off."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.weights.stream import refuse

_ORDER = ("shard", "quantize", "compile", "compile whole", "modulation_ahead", "cache_steps")
_APART = (  # what does not go together
    *({"shard", other} for other in ("quantize", "compile", "compile whole")),
    *({"compile whole", other} for other in ("compile", "cache_steps")),
)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two forwards are given the same."""
    return a is b or (a is not None and b is not None and a.device == b.device and torch.equal(a, b))


def check_in_memory(*parts: nn.Module) -> None:
    """A ``ValueError`` where weights come one by one, as with ``low_memory``."""
    if any(p.is_meta for part in parts for p in part.parameters()):
        raise ValueError("weights are not in memory: low_memory has them come one by one; load with low_memory=False")


class Handle:
    """One thing that was put on: a context manager; ``str`` of it says what, as the picture's ``info`` does."""

    def __init__(self, pipe: Pipeline, kind: str, said: str = "") -> None:
        if not isinstance(pipe, Pipeline):
            raise ValueError(f"pipe is a {type(pipe).__name__}; give the pipeline that fl.load makes")
        self.pipe, self.kind, self.said = pipe, kind, said or kind
        self._stack = ExitStack()
        on = [handle.kind for handle in pipe.speedups]
        if later := [other for other in on if _ORDER.index(other) >= _ORDER.index(kind)]:
            raise ValueError(f"{later[-1]} is on this pipeline already, and {kind} comes before it: undo that first")
        for other in on:
            if {kind, other} in _APART:
                raise ValueError(f"{kind} does not go with {other}, which is on this pipeline; undo that first")

    def __reduce_ex__(self, _: Any) -> str:
        """A ``ValueError``: the copy would undo what is on the original."""
        raise ValueError("a pipeline with a speed-up on cannot be copied or pickled: undo it first")

    def put(self, module: nn.Module, method: Callable[..., Any], name: str = "forward") -> None:
        """Another forward for a module, until ``undo``; or another method, of a compiled one for what it wraps."""
        own = vars(module if name == "forward" else getattr(module, "_orig_mod", module))
        if name in own:
            self.later(partial(own.update, {name: own[name]}))
        else:
            self.later(partial(own.pop, name))
        own[name] = method
        if name == "forward":
            said = "a model with a speed-up on cannot be copied or pickled: undo it first"  # it would run the original
            self.put(module, partial(refuse, said), "__reduce_ex__")

    def later(self, undo: Callable[[], object]) -> None:
        """What else ``undo`` has to do; what comes last is done first."""
        self._stack.callback(undo)

    def on(self) -> "Handle":
        """The handle, once all of it is on."""
        self.pipe.speedups.append(self)
        return self

    def undo(self) -> None:
        """Take it off: the pipeline is as it was before.

        Raises:
            ValueError: something was put on after it, which comes off first; or it is off already.
        """
        if self not in self.pipe.speedups:
            raise ValueError(f"{self.kind} is off already")
        if (last := self.pipe.speedups[-1]) is not self:
            raise ValueError(f"{last.kind} was put on after {self.kind}; undo that first")
        self.pipe.speedups.pop()
        self._stack.close()

    def __enter__(self) -> "Handle":
        if self not in self.pipe.speedups:
            raise ValueError(f"{self.kind} is off already; put it on anew")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        while self in self.pipe.speedups:  # after an error, what was put on later comes off too
            (self if kind is None else self.pipe.speedups[-1]).undo()

    def __repr__(self) -> str:
        return self.said
