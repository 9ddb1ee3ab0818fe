"""Steps that change little are not computed whole: the first block tells."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from fluxlab.arguments import is_number
from fluxlab.model.observe import observers
from fluxlab.pipeline.inputs import FluxInputs
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.speed.handle import Handle, same


@dataclass
class _Kept:
    """Of the last forward that ran whole, with one prompt."""

    txt: Tensor
    y: Tensor
    t: float = 0
    img: Tensor | None = None
    first: Tensor | None = None  # what the first block added
    rest: Tensor | None = None  # and what all others did


class CacheHandle(Handle):
    """Counts what was skipped in the last loop."""

    forwards = 0
    skipped = 0

    def __repr__(self) -> str:
        return f"{self.said}: {self.skipped} of {self.forwards} forwards skipped"


def cache_steps(pipe: Pipeline, threshold: float) -> CacheHandle:
    """Leave out all blocks but the first, where the first does nearly what it did the last time.

    What the first block adds to its stream is compared with what it added in the last forward that ran whole: mean
    absolute difference over mean absolute value. Below the threshold, what all others added then is added again. The
    handle counts ``skipped`` of the last loop's ``forwards``, and the picture's ``info`` says so. While ``patch``
    changes something, nothing is skipped. What is captured of other blocks was made by the forwards that ran whole.

    Args:
        pipe: whose transformer; it needs a double block and a single block at least.
        threshold: from 0, which never skips; 0.05 to 0.2 are usual.

    Raises:
        ValueError: the threshold is no such number, or the model has no such blocks; or as ``compile`` says.

    Source: first-block caching of ParaAttention, Cheng 2024; the idea is that of "Timestep Embedding Tells: It's Time
    to Cache for Video Diffusion Model", Liu et al. 2024.
    """
    if not (is_number(threshold, least=0)):
        raise ValueError(f"threshold is {threshold!r}; give a number from 0, which never skips, such as 0.1")
    handle = CacheHandle(pipe, "cache_steps", f"cache_steps({threshold:g})")
    doubles, singles = list(pipe.model.double_blocks), list(pipe.model.single_blocks)
    if not doubles or not singles:
        raise ValueError("cache_steps compares what the first double block does; this model has none, or no other")
    kept: list[_Kept] = []  # one for the prompt, one for what is led away from
    now: Any = None
    lock = Lock()  # what is kept is of one forward at a time
    skipping, patched, middle = False, False, torch.empty(0)
    whole = pipe.model.forward

    def clears(name: str) -> None:
        """At another loop or other weights nothing is kept."""
        own = getattr(pipe.model, name, None)

        def told(*what: Any) -> None:
            kept.clear()
            if own is not None:
                own(*what)

        handle.put(pipe.model, told, name)

    def forward(*args: Any, **given: Any) -> Tensor:
        nonlocal now, skipping
        inputs = FluxInputs(*args, **given)
        if inputs.timesteps is None:
            return whole(*args, **given)  # which says that it is missing
        txt, y, t = inputs.txt, inputs.y, float(inputs.timesteps.max())
        with lock:
            now = next((each for each in kept if same(each.txt, txt) and same(each.y, y)), None)
            other = now is None or now.first is None or now.first.shape[1] != inputs.img.shape[1]
            if other or t > now.t or (t == now.t and not same(now.img, inputs.img)):
                kept[:] = [each for each in kept if each is not now and each.t >= t]
                if not kept:  # another loop begins
                    handle.forwards = handle.skipped = 0
                kept.append(now := _Kept(txt, y))
            now.t, now.img, skipping = t, inputs.img, False
            handle.forwards += 1
            return whole(*args, **given)

    def first(run: Callable[..., Any]) -> Callable[..., Any]:
        def block(img: Tensor, txt: Tensor, *steer: Any) -> Any:
            nonlocal skipping, patched, middle
            out, text = run(img, txt, *steer)
            added = out - img
            patched = any(getattr(each, "changes", False) for each in observers.get())
            if now.first is not None and now.rest is not None:
                change = (added - now.first).abs().mean() / now.first.abs().mean()
                skipping = bool(change < threshold) and not patched
            handle.skipped += skipping
            if not skipping:
                now.first, middle = added, torch.cat((text, out), dim=1)
            return out, text

        return block

    def other(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda img, txt, *steer: (img, txt) if skipping else run(img, txt, *steer)

    def single(run: Callable[..., Any], last: bool) -> Callable[..., Any]:
        def block(x: Tensor, *steer: Any) -> Tensor:
            if skipping:
                return x + now.rest if last else x
            x = run(x, *steer)
            if last:
                now.rest = None if patched else x - middle
            return x

        return block

    handle.put(pipe.model, forward)
    clears("loop_begins")
    clears("weights_change")
    handle.put(doubles[0], first(doubles[0].forward))
    for block in doubles[1:]:
        handle.put(block, other(block.forward))
    for block in singles:
        handle.put(block, single(block.forward, block is singles[-1]))
    handle.on()
    return handle
