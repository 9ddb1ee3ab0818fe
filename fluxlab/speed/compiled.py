"""torch.compile, block by block or the whole forward at once."""

from typing import Any

import torch

from fluxlab.pipeline.checks import warn
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.speed.handle import Handle, check_in_memory


def compile(pipe: Pipeline, whole: bool = False, **options: Any) -> Handle:
    """Compile the transformer's blocks, one after the other, or the whole forward.

    Block by block is the better bargain: all blocks of a kind share one program, so that compiling takes as long for
    two as for all 57. It happens in the first forward. Another prompt, seed or step needs no other program; another
    size some more, once, after which sizes are variable. While ``capture`` or ``patch`` looks, the model runs eagerly.
    Merge a LoRA first: kept apart, each of its layers takes a program of its own, up to PyTorch's limit.

    Args:
        pipe: whose transformer.
        whole: the forward as one program.
        **options: of ``torch.compile``, such as ``mode="max-autotune"``.

    Raises:
        ValueError: something is on the pipeline that comes after it, or does not go with it; or weights are not in
            memory, as with ``low_memory``.
    """
    handle = Handle(pipe, "compile whole" if whole else "compile")
    check_in_memory(pipe.model)
    if any(not lora.merged for lora in pipe.loras):
        warn("a LoRA is kept apart, and each layer of it would take a program of its own; merge it before compiling")
    if " " in torch.__file__ and options.get("backend", "inductor") == "inductor":
        warn(
            f"PyTorch is in {torch.__file__!r}, a path with a space, where its compiler may fail; install it elsewhere"
        )
    for module in [pipe.model] if whole else [*pipe.model.double_blocks, *pipe.model.single_blocks]:
        handle.put(module, torch.compile(module.forward, **options))
    return handle.on()
