"""The loop that every stage of flux-tiny's training shares: it saves as it goes and resumes. Opened in chapter 16."""

import json
import math
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW, Muon, Optimizer
from tqdm.auto import tqdm

from fluxlab.files import read_tensors, write_tensors, write_text
from fluxlab.glossary import serves
from fluxlab.tiny.recipe import Recipe


def fit(
    stage: str,
    module: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    steps: int,
    learning_rate: float,
    run: Path,
    recipe: Recipe,
    preview: Callable[[Path], None] | None = None,
) -> None:
    """Train a module, resuming from what ``run`` holds of this stage; leave it frozen, with its averaged weights.

    Muon for the matrices of the blocks (modulation left out) and AdamW for the rest; a learning rate that warms up
    and falls as a cosine; gradients clipped at norm 1; and an exponential moving average of the weights, which looks
    further back the longer the training has run. At every save ``preview`` draws into the file that it is given.

    Source: "Muon is Scalable for LLM Training", Liu et al. 2025.
    """
    path, record = run / f"{stage}.state.safetensors", run / f"{stage}.jsonl"
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    parameters: list[Tensor] = list(named.values())
    inner = [n for n, p in named.items() if p.ndim == 2 and serves(n) in ("attention", "MLP", "attention and MLP")]
    matrices = [named[name] for name in inner]
    others = [p for name, p in named.items() if name not in inner]
    optimizers: list[Optimizer] = [AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    average = [p.detach().clone() for p in parameters]
    start = _restore(path, parameters, average, optimizers) if path.exists() else 0
    if record.exists():  # what came after the last save is done again
        whole = [line for line in record.read_text().splitlines(True) if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= start]
        write_text("".join(kept), record)
    losses: list[float] = []
    began = time.monotonic()
    module.train()
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # QK-norm, under autocast
    with tqdm(range(start, steps), desc=stage, initial=start, total=steps, unit="step", mininterval=10) as bar:
        for step in bar:
            warm, done = min(1.0, (step + 1) / (0.05 * steps + 1)), step / steps
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * done))
            generator = torch.Generator("cpu").manual_seed(recipe.seed * 1_000_003 + zlib.crc32(stage.encode()) + step)
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                value = loss(generator)
            module.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            for averaged, p in zip(average, parameters, strict=True):
                averaged.lerp_(p.detach(), 1 - min(0.999, (1 + step) / (10 + step)))
            losses.append(value.item())
            if (step + 1) % min(50, recipe.save_every) == 0:
                mean = sum(losses) / len(losses)
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                with record.open("a") as file:
                    entry = {"step": step + 1, "loss": round(mean, 6), "seconds": round(time.monotonic() - began, 1)}
                    file.write(json.dumps(entry) + "\n")
                losses.clear()
            if (step + 1) % recipe.save_every == 0 or step + 1 == steps:
                _save(path, step + 1, parameters, average, optimizers)
                if preview is not None:
                    _swap(parameters, average)
                    module.eval()
                    preview(run / f"{stage}-{step + 1:05d}.png")
                    module.train()
                    _swap(parameters, average)
    _swap(parameters, average)
    module.eval().requires_grad_(False)


@torch.no_grad()
def _swap(parameters: list[Tensor], average: list[Tensor]) -> None:
    """Put the averaged weights in place of the current ones, and those in place of the averaged."""
    for p, averaged in zip(parameters, average, strict=True):
        current = p.clone()
        p.copy_(averaged)
        averaged.copy_(current)


def _save(path: Path, step: int, parameters: list[Tensor], average: list[Tensor], optimizers: list[Optimizer]) -> None:
    tensors: dict[str, Tensor] = {"step": torch.tensor(step)}
    for i, p in enumerate(parameters):
        tensors |= {f"{i}.value": p, f"{i}.average": average[i]}
        tensors |= {f"{i}.{key}": value for each in optimizers for key, value in each.state.get(p, {}).items()}
    write_tensors(tensors, path)


@torch.no_grad()
def _restore(path: Path, parameters: list[Tensor], average: list[Tensor], optimizers: list[Optimizer]) -> int:
    saved = read_tensors(path)
    step = int(saved.pop("step"))
    owner = {p: each for each in optimizers for group in each.param_groups for p in group["params"]}
    for name, value in saved.items():
        i, key = name.split(".")
        p = parameters[int(i)]
        if key in ("value", "average"):
            {"value": p, "average": average[int(i)]}[key].copy_(value)
        else:  # an optimizer's: fused AdamW needs it in the weight's own memory layout
            owner[p].state[p][key] = torch.empty_like(p).copy_(value) if value.ndim else value
    return step
