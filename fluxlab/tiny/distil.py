"""From the teacher to flux-tiny-dev and flux-tiny-schnell. Opened in chapter 16."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from fluxlab.files import read_tensors, write_tensors
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.embeddings import timestep_embedding
from fluxlab.model.transformer import Flux
from fluxlab.pipeline.latents import PIXELS, noise, text_ids, unpack
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.pipeline.sampling import denoise
from fluxlab.pipeline.schedule import schedule
from fluxlab.pipeline.text import TextEncoders
from fluxlab.tiny.loop import fit
from fluxlab.tiny.pictures import Pictures, file_of, missing
from fluxlab.tiny.recipe import DEV, SCHNELL, Recipe
from fluxlab.tiny.train_flow import Grid, compiled, flow_inputs, guided_batch, predicted, sample_grid


def distil_guidance(
    pictures: Pictures, teacher: Flux, autoencoder: AutoEncoder, text: TextEncoders, grid: Grid = sample_grid
) -> Flux:
    """Told a guidance g in 1..8, predict ``u + g (c - u)`` of the teacher in one forward: flux-tiny-dev.

    Where the prompt does not decide, the picture's own velocity is learned. A teacher that unlearns easily what it
    keeps of a picture is followed ``gently``: g in 1..4, errors count in proportion to it, and there ``c`` is learned.

    Source: "On Distillation of Guided Diffusion Models", Meng et al. 2022.
    """
    recipe, gently, (stage, steps) = pictures.recipe, pictures.gently, pictures.stages[1]
    torch.manual_seed(recipe.seed)
    student = Flux(pictures.variant.transformer)
    most, rate = (4, recipe.learning_rate / 10) if gently else (8, recipe.learning_rate / 3)
    student.load_state_dict(teacher.state_dict(), strict=False)
    assert student.guidance_in is not None
    for parameter in student.guidance_in.out_layer.parameters():  # at first, guidance changes nothing
        nn.init.zeros_(parameter)
    empty = text([""])
    forward, taught = compiled(recipe, student), compiled(recipe, teacher)

    def loss(generator: torch.Generator) -> Tensor:
        chosen, inputs, velocity = guided_batch(pictures, text, generator, most)
        guidance = inputs.kwargs()["guidance"][:, None, None]
        with torch.no_grad():
            told = replace(inputs, guidance=None)
            with_prompt = predicted(taught, told, velocity).float()
            txt, y = (e.expand_as(x).contiguous() for e, x in zip(empty, (told.txt, told.y), strict=True))
            without = predicted(taught, replace(told, txt=txt, y=y), velocity)
            target = without + guidance * (with_prompt - without.float())
            target = torch.where(pictures.changed(chosen), target, with_prompt if gently else velocity)
        error = predicted(forward, inputs, velocity).float() - target
        return pictures.mean((error / (guidance if gently else 1)).square(), chosen)

    preview = partial(grid, Pipeline(pictures.variant, student, autoencoder, text), recipe.previewed)
    fit(stage, student, loss, steps(recipe), rate, pictures.run, recipe, preview)
    return student


class Pairs(Pictures):
    """Batches of what ``paint_pairs`` wrote: a noise, and what flux-tiny-dev makes of it."""

    kind = "pairs"


def distil_steps(run: Path, recipe: Recipe, autoencoder: AutoEncoder, dev: Flux, text: TextEncoders) -> Flux:
    """flux-tiny-schnell: the flow from each noise straight to the picture that flux-tiny-dev makes of it.

    In the first flow any noise may go with any picture, so its straight paths cross, and what it learns bends. Here
    each noise has one picture; their straight paths hardly cross, and a few Euler steps can follow them. Half of all
    times are those of a schedule of four steps.

    Source: the reflow of "Flow Straight and Fast", Liu et al. 2022; for text to image, "InstaFlow", Liu et al. 2023.
    (The real schnell was distilled by "Adversarial Diffusion Distillation" in latent space, Sauer et al. 2024.)
    """
    paint_pairs(run, recipe, dev, text)
    student = without_guidance(dev, recipe.schnell_guidance)
    pairs = Pairs(run, recipe)
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

    preview = partial(sample_grid, Pipeline(SCHNELL, student, autoencoder, text), recipe.previewed)
    fit("steps", student, loss, recipe.reflow_steps, recipe.learning_rate / 3, run, recipe, preview)
    return student


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
    for path, height, width, number in missing(run, "pairs", recipe.pairs):
        captions = read_tensors(file_of(run, "latents", (height, width)))
        ids = {name: captions[name][:number] for name in ("t5_ids", "clip_ids")}
        starts = noise(range(len(ids["t5_ids"])), height, width)
        times, painted = schedule(DEV.num_steps, height * width // PIXELS**2), []
        batches = [each.split(recipe.image_tokens // (height * width // PIXELS**2)) for each in (starts, *ids.values())]
        for start, *tokens in tqdm(list(zip(*batches, strict=True)), desc=path.stem, unit="batch", mininterval=10):
            inputs = flow_inputs(start, *text.encode(*(each.int() for each in tokens)), recipe.schnell_guidance)
            with torch.autocast("cpu", torch.bfloat16):
                ended = denoise(dev, inputs, times, progress=False)
            painted.append(unpack(ended, height, width).half())
        write_tensors({"latents": torch.cat(painted), "noise": starts.half(), **ids}, path)
