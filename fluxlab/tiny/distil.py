"""From the teacher to flux-tiny-dev and flux-tiny-schnell. Opened in chapter 16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import trange

from fluxlab.files import read_tensors
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.embeddings import timestep_embedding
from fluxlab.model.transformer import Flux
from fluxlab.pipeline.latents import noise, text_ids, unpack
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.pipeline.sampling import denoise
from fluxlab.pipeline.schedule import schedule
from fluxlab.pipeline.text import TextEncoders
from fluxlab.tiny.loop import fit
from fluxlab.tiny.pictures import Pictures, cached, number_of
from fluxlab.tiny.recipe import Recipe
from fluxlab.tiny.train_flow import DEV, SCHNELL, compiled, flow_inputs, noisy, sample_grid
from fluxlab.tiny.world import PICTURE_SIZES


def distil_guidance(run: Path, recipe: Recipe, autoencoder: AutoEncoder, teacher: Flux, text: TextEncoders) -> Flux:
    """flux-tiny-dev: told a guidance g in 1..8, predict ``u + g (c - u)`` of the teacher in one forward.

    Source: "On Distillation of Guided Diffusion Models", Meng et al. 2022.
    """
    torch.manual_seed(recipe.seed)
    student = Flux(DEV.transformer)
    student.load_state_dict(teacher.state_dict(), strict=False)
    assert student.guidance_in is not None
    nn.init.zeros_(student.guidance_in.out_layer.weight)
    nn.init.zeros_(student.guidance_in.out_layer.bias)
    for encoder in (text.t5, text.clip):
        encoder.requires_grad_(False)
    pictures = Pictures(run, recipe)
    with torch.no_grad():
        empty_txt, empty_y = text([""])
    forward, taught = compiled(recipe, student), compiled(recipe, teacher)

    def loss(generator: torch.Generator) -> Tensor:
        chosen, ids = pictures.batch(generator)
        clean, tokens = chosen["latents"], (chosen["t5_ids"], chosen["clip_ids"])
        img, t, _ = noisy(clean, generator, recipe.time_mean, recipe.time_spread)
        guidance = 1 + 7 * torch.rand(len(clean), generator=generator)
        with torch.no_grad():
            txt, y = text.encode(*tokens)
            places = text_ids(*txt.shape[:2])
            with_prompt = taught(img, ids, txt, places, t, y).float()
            without = taught(
                img, ids, empty_txt.expand_as(txt).contiguous(), places, t, empty_y.expand_as(y).contiguous()
            )
            target = without + guidance[:, None, None] * (with_prompt - without.float())
        return F.mse_loss(forward(img, ids, txt, places, t, y, guidance).float(), target)

    def preview(step: int) -> None:
        sample_grid(run / f"guidance-{step:05d}.png", Pipeline(DEV, student, autoencoder, text), recipe.previewed)

    gentle = replace(recipe, learning_rate=recipe.learning_rate / 3)
    fit("guidance", student, loss, recipe.guidance_steps, run, gentle, preview)
    return student.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Fewer steps
# ---------------------------------------------------------------------------------------------------------------------


def distil_steps(run: Path, recipe: Recipe, autoencoder: AutoEncoder, dev: Flux, text: TextEncoders) -> Flux:
    """flux-tiny-schnell: the flow from each noise straight to the picture that flux-tiny-dev makes of it.

    The paths of the first flow cross, since any noise may belong to any picture, and so it bends. Here each noise
    has one picture, the one that dev ends at in many steps, and the straight paths between the two hardly cross: few
    Euler steps follow them. Half of all times are those of a schedule of four steps.

    Source: reflow of "Flow Straight and Fast", Liu et al. 2022; for text to image, "InstaFlow", Liu et al. 2023. (The
    real schnell was distilled by "Adversarial Diffusion Distillation" in latent space, Sauer et al. 2024.)
    """
    paint_pairs(run, recipe, dev, text)
    student = without_guidance(dev, recipe.schnell_guidance)
    pairs = Pictures(run, recipe, "pairs")
    forward = compiled(recipe, student)

    def loss(generator: torch.Generator) -> Tensor:
        chosen, ids = pairs.batch(generator)
        clean, start = chosen["latents"], chosen["noise"]
        with torch.no_grad():
            txt, y = text.encode(chosen["t5_ids"], chosen["clip_ids"])
        stops = torch.randint(1, 5, (len(clean),), generator=generator) / 4
        anywhere = torch.rand(len(clean), generator=generator)
        t = torch.where(torch.rand(len(clean), generator=generator) < 0.5, stops, anywhere)
        img = torch.lerp(clean, start, t[:, None, None])
        return F.mse_loss(forward(img, ids, txt, text_ids(*txt.shape[:2]), t, y).float(), start - clean)

    def preview(step: int) -> None:
        sample_grid(run / f"steps-{step:05d}.png", Pipeline(SCHNELL, student, autoencoder, text), recipe.previewed)

    gentle = replace(recipe, learning_rate=recipe.learning_rate / 3)
    fit("steps", student, loss, recipe.reflow_steps, run, gentle, preview)
    return student.requires_grad_(False)


def without_guidance(dev: Flux, guidance: float) -> Flux:
    """The same function at one guidance, without the embedder: its output there is a constant, and joins a bias."""
    assert dev.guidance_in is not None
    student = Flux(SCHNELL.transformer)
    kept = {name: value for name, value in dev.state_dict().items() if not name.startswith("guidance_in")}
    student.load_state_dict(kept)
    with torch.no_grad():
        constant = dev.guidance_in(timestep_embedding(torch.tensor([guidance])))[0]
        student.time_in.out_layer.bias.add_(constant)
    return student


@torch.no_grad()
def paint_pairs(run: Path, recipe: Recipe, dev: Flux, text: TextEncoders) -> None:
    """What flux-tiny-dev makes of a noise, for the captions of training pictures, at each size."""
    for height, width in PICTURE_SIZES:

        def make(height: int = height, width: int = width) -> dict[str, Tensor]:
            captions = read_tensors(run / f"latents-{height}x{width}.safetensors")
            number = min(number_of(recipe.pairs, height, width), len(captions["latents"]))
            size = recipe.image_tokens // (captions["latents"][0, 0].numel() // 4)
            painted, starts = [], []
            for first in trange(0, number, size, desc=f"pairs {height}x{width}", unit="batch", mininterval=10):
                last = min(first + size, number)
                tokens = (captions[name][first:last].int() for name in ("t5_ids", "clip_ids"))
                start = noise(range(first, last), height, width)
                inputs = flow_inputs(start, *text.encode(*tokens), recipe.schnell_guidance)
                times = schedule(DEV.num_steps, inputs.img.shape[1])
                with torch.autocast("cpu", torch.bfloat16):
                    ended = denoise(dev, inputs, times, progress=False)
                starts.append(start.half())
                painted.append(unpack(ended, height, width).half())
            kept = {name: captions[name][:number] for name in ("t5_ids", "clip_ids")}
            return {"latents": torch.cat(painted), "noise": torch.cat(starts), **kept}

        cached(run / f"pairs-{height}x{width}.safetensors", make)
