"""One model over several processes: each holds a part of every block's weights, by PyTorch's FSDP2."""

import os
from dataclasses import replace
from datetime import timedelta
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import distributed

from fluxlab.model.transformer import Flux
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.speed.handle import Handle, check_in_memory
from fluxlab.weights.stream import refuse


def processes() -> int:
    """How many processes ``torchrun`` started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this one is, from 0: the first speaks for all."""
    return int(os.environ.get("RANK", 0))


def shard(pipe: Pipeline, minutes: float = 10) -> Handle:
    """Divide the weights of the transformer's and T5's blocks among the processes that ``torchrun`` started.

    ``torchrun --nproc-per-node 2 -m fluxlab generate "a red circle"`` does it by itself. Every process runs the same
    script and paints the same picture; before a block runs, each gets the others' parts of it, and drops them after.
    On CPUs they talk by gloo, on GPUs by NCCL. Inputs are not cast. ``undo`` makes new modules, and moves
    the LoRAs that are on to these.

    Args:
        pipe: of every process alike.
        minutes: to wait for another process before the run ends; where the processes are connected already, they wait
            as was said then.

    Raises:
        ValueError: this is a single process, not one of several that ``torchrun`` started; ``minutes`` is no number
            above 0; a LoRA is merged into the weights; or they are not in memory, as with ``low_memory``.
    """
    if not (isinstance(minutes, Real) and minutes > 0):
        raise ValueError(f"minutes is {minutes!r}; give a number above 0")
    if processes() < 2:
        raise ValueError("this is one process; start several: torchrun --nproc-per-node 2 -m fluxlab generate …")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    check_in_memory(pipe.model, pipe.text.t5)
    if any(lora.merged for lora in pipe.loras):
        raise ValueError("a LoRA is merged into the weights, and could not be taken off again; undo() it first")
    handle = Handle(pipe, "shard", f"shard over {processes()} processes")
    cuda = torch.device(pipe.device).type == "cuda"
    if cuda:
        torch.cuda.set_device(pipe.model.img_in.weight.device)  # where FSDP puts a block's parts together
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=minutes))
    mesh = init_device_mesh("cuda" if cuda else "cpu", (processes(),))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    model, t5 = pipe.model, pipe.text.t5
    encoder: Any = t5
    for block in (*model.double_blocks, *model.single_blocks, *encoder.encoder.block):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    others = partial(refuse, "the weights are divided among processes; undo shard before others are loaded")
    for module in (model, t5):
        handle.later(module.register_load_state_dict_pre_hook(others).remove)

    def restore() -> None:
        loras = list(pipe.loras)  # which are of the modules that were divided
        for lora in reversed(loras):
            lora.undo()
        pipe.model, pipe.text.t5 = _gathered(model), _gathered(t5)
        for lora in loras:
            lora.move({"transformer": pipe.model, "t5": pipe.text.t5})

    handle.later(restore)
    return handle.on()


def _gathered(module: Any) -> Any:
    """A new module with all of its weights, since FSDP has no way back for the one that it divided."""
    from torch.distributed.tensor import DTensor

    weights = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in module.state_dict().items()}
    config = module.config
    if isinstance(module, Flux):  # which a LoRA that is not here any more may have widened
        config = replace(config, in_channels=module.img_in.in_features)
    with torch.device("meta"):
        whole = type(module)(config)
    whole.load_state_dict(weights, assign=True)
    if callable(tie := getattr(whole, "tie_weights", None)):
        tie()  # T5's one table of words has two names
    return whole.eval().requires_grad_(False)
