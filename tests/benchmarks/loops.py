"""Whole loops: flux-tiny's beside diffusers' pipeline, and a few full-width blocks with modulation ahead."""

from __future__ import annotations

import tempfile

import torch
from diffusers import FluxPipeline

import fluxlab as fl
from fluxlab.pipeline.schedule import schedule
from fluxlab.tiny.measure import measure as judge
from fluxlab.weights.convert import convert
from tests.benchmarks.blocks import floor
from tests.benchmarks.timing import DEVICE, FAST, Run, compare, measure, told

PROMPT = "a small red circle left of a large blue square on a white background"


def theirs(compiled: bool) -> Run:
    """diffusers' loop from the same noise and encoded prompt to a latent."""
    pipe = fl.load("flux-tiny-dev", device=DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        convert(pipe.variant, f"{folder}/x", "diffusers", dtype=torch.float32)
        them = FluxPipeline.from_pretrained(f"{folder}/x").to(DEVICE)
    them.set_progress_bar_config(disable=True)
    if compiled:
        them.transformer.compile()
    inputs = pipe.prepare([PROMPT], [0], 128, 128)
    given = {"prompt_embeds": inputs.txt, "pooled_prompt_embeds": inputs.y, "num_inference_steps": 20}
    given |= {"guidance_scale": 4.0, "height": 128, "width": 128, "output_type": "latent"}
    return lambda: them(**given, latents=inputs.img).images


def ours(*speedups) -> Run:
    pipe = fl.load("flux-tiny-dev", device=DEVICE)
    for speedup in speedups:
        speedup(pipe)
    inputs, times = pipe.prepare([PROMPT], [0], 128, 128), schedule(20, 64)
    return lambda: fl.denoise(pipe.model, inputs, times, progress=False)


@torch.no_grad()
def tiny(quick: bool) -> None:
    """Twenty steps, from the noise and the encoded prompt to the clean tokens."""
    model = fl.load("flux-tiny-dev", device=DEVICE).model
    once = floor(model, 64, 32, model.config, torch.float32, 6)
    runs: dict[str, Run] = {
        "ours": ours(),
        "ours, modulation ahead": ours(fl.speed.modulation_ahead),
        "diffusers": theirs(compiled=False),
        "floor": lambda: [once() for _ in range(20)],
    }
    times = measure(runs, 5 if quick else 12, 10)
    for name in ("ours", "ours, modulation ahead", "floor"):
        compare("loop", "flux-tiny, 20 steps", times, name, "diffusers")
    torch.compiler.reset()
    runs = {
        "ours, compiled, ahead": ours(fl.speed.compile, fl.speed.modulation_ahead),
        "ours, compiled whole": ours(lambda pipe: fl.speed.compile(pipe, whole=True)),
        "ours, compiled whole, ahead": ours(lambda pipe: fl.speed.compile(pipe, whole=True), fl.speed.modulation_ahead),
        "diffusers compiled": theirs(compiled=True),
        "diffusers": runs["diffusers"],
    }
    times = measure(runs, 5 if quick else 12, 10)
    for name in ("ours, compiled, ahead", "ours, compiled whole", "ours, compiled whole, ahead"):
        for peer in ("diffusers compiled", "diffusers"):
            compare("loop", "flux-tiny, 20 steps", times, name, peer)


@torch.no_grad()
def wide(quick: bool) -> None:
    """Two double and four single blocks at full width, four steps; the same with modulation ahead."""
    dtype, steps = getattr(torch, FAST), 4
    torch.manual_seed(0)
    config = fl.FluxConfig(depth=1, depth_single_blocks=2) if quick else fl.FluxConfig(depth=2, depth_single_blocks=4)
    plain = fl.Flux(config).to(DEVICE, dtype).eval()
    with torch.device("meta"):
        ahead = fl.Flux(config)
    ahead.load_state_dict(plain.state_dict(), assign=True)
    pipe = fl.Pipeline(fl.VARIANTS["flux-dev"], ahead, None, None, DEVICE, dtype)  # type: ignore[arg-type]
    fl.speed.modulation_ahead(pipe)
    inputs = fl.example_inputs("flux-dev", 256, 256, dtype=dtype, device=DEVICE)
    times = schedule(steps, 256)
    runs: dict[str, Run] = {
        "ahead": lambda: fl.denoise(ahead, inputs, times, progress=False),
        "plain": lambda: fl.denoise(plain, inputs, times, progress=False),
    }
    weights = sum(p.numel() for p in plain.parameters())
    modulation = sum(p.numel() for n, p in plain.named_parameters() if "mod" in n)
    what = f"{config.depth} + {config.depth_single_blocks} blocks at full width, {steps} steps, 256 + 512"
    found = measure(runs, 5, 2 if quick else 3)
    compare("loop", what, found, "ahead", "plain", **{"weights that may leave": f"{modulation / weights:.0%}"})


PUT = {
    "as it is": (),
    "modulation_ahead": (fl.speed.modulation_ahead,),
    "quantize int8": (fl.speed.quantize,),
    "quantize int8 dynamic": (lambda pipe: fl.speed.quantize(pipe, "int8 dynamic"),),
    "cache_steps(0.1)": (lambda pipe: fl.speed.cache_steps(pipe, 0.1),),
    "cache_steps(0.2)": (lambda pipe: fl.speed.cache_steps(pipe, 0.2),),
}


def pictures(quick: bool) -> None:
    """What each option does to flux-tiny's pictures, by its judge: everything right, of so many prompts."""
    number = 16 if quick else 128
    for name, speedups in PUT.items():
        pipe = fl.load("flux-tiny-dev", device=DEVICE)
        for speedup in speedups:
            speedup(pipe)
        right = judge(pipe, number)["all"]
        said = {"skipped": f"{pipe.speedups[0].skipped} of {pipe.speedups[0].forwards}"} if "cache" in name else {}
        told("pictures", f"{name}, {number} prompts", right=f"{right:.1%}", **said)
