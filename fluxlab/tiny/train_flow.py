"""The flow: from noise to pictures, with the text encoders. Opened in chapter 16."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fluxlab.glossary import serves
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.blocks import layer_norm
from fluxlab.model.transformer import Flux
from fluxlab.pipeline.inputs import FluxInputs, first_inputs
from fluxlab.pipeline.latents import COMPRESSION, PIXELS, pack, text_ids
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.pipeline.text import TextEncoders
from fluxlab.tiny.loop import fit
from fluxlab.tiny.pictures import USUAL, Pictures, save_grid
from fluxlab.tiny.recipe import SCHNELL, Recipe
from fluxlab.tiny.truth import NUMBER, answer_loss
from fluxlab.tiny.world import random_picture
from fluxlab.weights.load import load_weights

Grid = Callable[..., None]  # paints with a pipeline so many held-out examples into a file, with the pipeline's options


def initialise(model: Flux) -> Flux:
    """Zero every modulation and the last layer: each block starts as the identity, and the output as zero."""
    for name, parameter in model.named_parameters():
        if serves(name) == "modulation" or name.startswith("final_layer"):
            nn.init.zeros_(parameter)
    return model


def noisy(clean: Tensor, generator: torch.Generator, mean: float, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """A point on the straight path from picture to noise, its time (logit-normal), and the path's velocity."""
    t = (mean + spread * torch.randn(len(clean), generator=generator)).sigmoid()
    unit = torch.randn(clean.shape, generator=generator)
    return torch.lerp(clean, unit, t[:, None, None]), t, unit - clean


def dropped(
    tokens: Sequence[Tensor], empty: Sequence[Tensor], recipe: Recipe, generator: torch.Generator
) -> Iterator[Tensor]:
    """The tokens of T5 and CLIP, some captions' empty, so that CFG works; CLIP's alone more often."""
    chance = torch.rand(len(tokens[0]), 1, generator=generator)
    limits = (recipe.caption_dropout, recipe.caption_dropout + recipe.vector_dropout)
    return (torch.where(chance < limit, e, t) for limit, e, t in zip(limits, empty, tokens, strict=True))


def train_flow(
    run: Path, recipe: Recipe, autoencoder: AutoEncoder, text: TextEncoders, teacher: Path | None = None
) -> Flux:
    """Rectified flow, transformer and text encoders together: the teacher, which needs CFG to follow a prompt well.

    It starts from new weights, or from an earlier ``teacher``; then ``text`` must be what that one learned with.

    In these plain pictures neighbouring tokens are much alike, so what is where shows through a great deal of noise
    and is settled nearer to t = 1 than times around 0.5 reach. Hence the times are spread wide, and lean to the noise.

    Most of this error is noise and jitter that nothing can predict, and from it alone the network is slow to learn to
    ask the prompt what stands where. So halfway through the single blocks a linear reader tells from each image token
    what the clean picture shows there, and its error is added. After this training the reader is thrown away.

    Source: "Scaling Rectified Flow Transformers", Esser et al. 2024, for the times and their shift; "Representation
    Alignment for Generation", Yu et al. 2024, for learning from what the clean picture shows (there, the features of
    another network).
    """
    torch.manual_seed(recipe.seed)
    model = initialise(Flux(SCHNELL.transformer))
    if teacher is not None:
        load_weights(model, teacher, dtype=torch.float32)
    learn_flow(Pictures(run, recipe), model, autoencoder, text, recipe.learning_rate, sample_grid)
    return model


def learn_flow(
    pictures: Pictures, model: Flux, autoencoder: AutoEncoder, text: TextEncoders, rate: float, grid: Grid
) -> None:
    """The stage itself; a reader learns along where ``pictures`` hold what each token shows."""
    recipe, (stage, steps) = pictures.recipe, pictures.stages[0]
    learners = (model, text.t5, text.clip) if pictures.learns_words else (model,)
    empty = [ids.int() for ids in text.tokenize([""])]
    width, depth = model.config.hidden_size, model.config.depth_single_blocks
    reads = "truth" in pictures.sets[0]
    reader = nn.Sequential(layer_norm(width), nn.Linear(width, NUMBER)) if reads else nn.Identity()
    halfway: list[Tensor] = []
    hook = model.single_blocks[depth // 2 - 1].register_forward_hook(lambda block, given, x: halfway.append(x))
    forward = compiled(recipe, model)

    def loss(generator: torch.Generator) -> Tensor:
        chosen, ids = pictures.batch(generator)
        clean, tokens = chosen["latents"], (chosen["t5_ids"], chosen["clip_ids"])
        txt, y = text.encode(*dropped(tokens, empty, recipe, generator))
        img, t, velocity = noisy(clean, generator, recipe.time_mean, recipe.time_spread)
        halfway.clear()
        inputs = pictures.shown(chosen).beside(FluxInputs(img, ids, txt, text_ids(*txt.shape[:2]), t, y))
        error = pictures.mean((predicted(forward, inputs, img).float() - velocity).square(), chosen)
        if not reads:
            return error
        told = reader(halfway[0][:, txt.shape[1] :])
        again = told.shape[1] // img.shape[1]  # a reference's tokens tell too what will stand where they are
        return error + recipe.reading * again * answer_loss(told, chosen["truth"].repeat(1, again, 1))

    for learner in learners:
        learner.requires_grad_()
    undistilled = replace(pictures.variant, transformer=model.config, guidance=None)
    painter = Pipeline(undistilled, model, autoencoder, text)
    preview = partial(grid, painter, recipe.previewed, true_cfg=pictures.true_cfg)
    fit(stage, nn.ModuleList((*learners, reader)), loss, steps(recipe), rate, pictures.run, recipe, preview)
    hook.remove()


def guided_batch(
    pictures: Pictures, text: TextEncoders, generator: torch.Generator, most: int = 8
) -> tuple[dict[str, Tensor], FluxInputs, Tensor]:
    """A batch, a forward's inputs for it with guidances from 1 to ``most``, and the path's velocity."""
    (chosen, ids), recipe = pictures.batch(generator), pictures.recipe
    img, t, velocity = noisy(chosen["latents"], generator, recipe.time_mean, recipe.time_spread)
    guidance = 1 + (most - 1) * torch.rand(len(img), generator=generator)
    with torch.no_grad():
        txt, y = text.encode(chosen["t5_ids"], chosen["clip_ids"])
    inputs = FluxInputs(img, ids, txt, text_ids(*txt.shape[:2]), t, y, guidance)
    return chosen, pictures.shown(chosen).beside(inputs), velocity


def predicted(forward: Callable[..., Tensor], inputs: FluxInputs, noise: Tensor) -> Tensor:
    """The velocity of the noise alone, whatever is shown beside it."""
    return forward(*inputs.kwargs().values())[:, : noise.shape[1]]


def compiled(recipe: Recipe, module: Flux) -> Callable[..., Tensor]:
    """The model's forward, compiled for pictures of the usual size; the others are too few for that to pay."""
    if not recipe.compile:
        return module
    fast = torch.compile(module, dynamic=False)
    usual = USUAL[0] * USUAL[1] // PIXELS**2
    return lambda img, *others: (fast if img.shape[1] == usual else module)(img, *others)


def flow_inputs(start: Tensor, txt: Tensor, y: Tensor, guidance: float | None = None) -> FluxInputs:
    """What the loop starts from: noise of ``N 16 h w``, and the encoded prompts."""
    height, width = (COMPRESSION * side for side in start.shape[2:])
    return first_inputs(pack(start), txt, y, height, width, guidance)


def sample_grid(pipe: Pipeline, number: int, path: Path, **options: Any) -> None:
    """What a model paints for the first ``number`` held-out captions, as one PNG; ``options`` are the pipeline's."""
    rng = np.random.default_rng(0)
    prompts = [random_picture(rng, held_out=True, complete=True).caption for _ in range(number)]
    painted: Any = pipe(prompts, seed=range(number), progress=False, **options)
    save_grid(path, painted, math.gcd(8, number))
