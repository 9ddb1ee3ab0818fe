"""Two of flux-tiny's relatives, shown something beside the noise, trained on from its teacher. Opened in chapter 18.

    fill     a hole in a picture, to be painted as the prompt says; all around it stays
    kontext  a picture, to be changed as an instruction says; its text encoders learn new words

Each learns as flux-tiny did: a flow that needs CFG, then guidance distilled into it; the autoencoder stays as it is.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import reduce
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fluxlab.config import TINY_FILL, TINY_KONTEXT, FluxConfig
from fluxlab.files import read_tensors
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.transformer import Flux
from fluxlab.pipeline.latents import COMPRESSION, PIXELS, pack, unpack
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.pipeline.shown import Shown
from fluxlab.pipeline.text import TextEncoders
from fluxlab.tiny.distil import distil_guidance
from fluxlab.tiny.edits import ASKED, KINDS, Edit, judge_edit, of_edits, random_edit
from fluxlab.tiny.follow import Adapter, measure_canny, train_canny
from fluxlab.tiny.holes import Hole, judge_hole, masks_of, random_hole, scenes_with_holes
from fluxlab.tiny.loop import fit
from fluxlab.tiny.measure import mean_of
from fluxlab.tiny.pictures import USUAL, Examples, Pictures, draw, encode, file_of, pixels_of, save_grid, to_float
from fluxlab.tiny.recipe import TEACHER, Recipe
from fluxlab.tiny.train_flow import Grid, learn_flow
from fluxlab.tiny.train_text import Reader, new_text_encoders, train_tokenizers
from fluxlab.tiny.truth import answer_loss, of_slots, of_tokens
from fluxlab.tiny.world import Picture, random_scene


def encode_holes(run: Path, recipe: Recipe, autoencoder: AutoEncoder, text: TextEncoders) -> None:
    """Two holes for each picture: the latents of the whole and of the rest, the holes, and the prompts."""
    rng = np.random.default_rng((recipe.seed, 7))
    drawn = draw(recipe.fill_pictures, *USUAL, (recipe.seed + 4, *USUAL))

    def some(number: int) -> Examples:
        batch = list(islice(drawn, number // 2))
        holes = [random_hole(picture, rng) for picture in batch for _ in range(2)]
        boxes = torch.tensor([hole.box for hole in holes])
        pixels = to_float(pixels_of(batch)).repeat_interleave(2, 0)
        rest = pixels * (1 - masks_of(boxes, *USUAL))
        return {"latents": pixels, "rest": rest}, {"boxes": boxes.short()}, [hole.prompt for hole in holes]

    encode(file_of(run, "fill"), 2 * recipe.fill_pictures, some, autoencoder, text)


class Holes(Pictures):
    """Batches of what ``encode_holes`` wrote."""

    kind, sizes, variant = "fill", (USUAL,), TINY_FILL
    stages = ("fill", lambda recipe: recipe.fill_steps), ("fill-guidance", lambda recipe: recipe.fill_guidance_steps)
    learns_words, keeping = False, 16.0

    def shown(self, chosen: dict[str, Tensor]) -> Shown:
        """The rest of each picture, and its hole."""
        return Shown.hole(unpack(chosen["rest"], *USUAL), masks_of(chosen["boxes"], *USUAL))

    def changed(self, chosen: dict[str, Tensor]) -> Tensor:
        """The tokens that the hole touches: only there does guidance lead away from the picture."""
        cells = pack(masks_of(chosen["boxes"], *USUAL)[..., ::COMPRESSION, ::COMPRESSION])
        return cells.amax(2, keepdim=True) > 0


def train_fill(run: Path, recipe: Recipe, autoencoder: AutoEncoder, text: TextEncoders, earlier: Path) -> Pipeline:
    """flux-tiny-fill-dev; guidance acts in the hole alone: around it the prompt decides nothing."""
    encode_holes(run, recipe, autoencoder, text)
    return _learn(Holes(run, recipe), autoencoder, text, earlier, fill_grid)


def _learn(pictures: Pictures, autoencoder: AutoEncoder, text: TextEncoders, earlier: Path, grid: Grid) -> Pipeline:
    """The flow on from flux-tiny's teacher, then guidance."""
    recipe, variant = pictures.recipe, pictures.variant
    torch.manual_seed(recipe.seed)
    teacher = widened(earlier / TEACHER, variant.transformer)
    learn_flow(pictures, teacher, autoencoder, text, recipe.learning_rate / 2, grid)
    return Pipeline(variant, distil_guidance(pictures, teacher, autoencoder, text, grid), autoencoder, text)


def widened(teacher: Path, config: FluxConfig) -> Flux:
    """The teacher with more channels a token, which change nothing at first; guidance by CFG, as the teacher's."""
    model = Flux(replace(config, guidance_embed=False))
    tensors = read_tensors(teacher)
    narrow = tensors["img_in.weight"].float()
    tensors["img_in.weight"] = F.pad(narrow, (0, config.in_channels - narrow.shape[1]))
    model.load_state_dict(tensors)
    return model


def paint_hole(pipe: Pipeline, picture: Picture, hole: Hole, seed: int, **options: Any) -> Image.Image:
    """What a model paints into the hole of a picture."""
    image, mask = Image.fromarray(picture.pixels), Image.fromarray(255 * hole.inside().astype(np.uint8))
    painted: Any = pipe(hole.prompt, image=image, mask=mask, seed=seed, progress=False, **options)
    return painted


def measure_fill(pipe: Pipeline, number: int = 128, **options: Any) -> list[dict[str, Any]]:
    """What is right of so many pictures, half of them boxes and half halves, as painted and with the outside pasted."""
    rows = []
    for kind, half in (("box", False), ("half", True)):
        judged: dict[str, list[dict[str, float]]] = {"as painted": [], "pasted back": []}
        for seed, (picture, which, hole) in enumerate(scenes_with_holes(number // 2, half)):
            painted = np.asarray(paint_hole(pipe, picture, hole, seed, **options))
            pasted = np.where(hole.inside()[..., None], painted, picture.pixels)
            for found, pixels in zip(judged.values(), (painted, pasted), strict=True):
                found.append(judge_hole(pixels, picture, which, hole))
        rows += [{"hole is": kind, "outside": each, **options, **mean_of(found)} for each, found in judged.items()]
    return rows


def fill_grid(pipe: Pipeline, number: int, path: Path, **options: Any) -> None:
    """The first held-out pictures, half of the rows boxes: with their holes, and below as a model fills them."""
    columns = math.gcd(8, number)
    rows: list[Any] = []
    for half in (False, True):
        examples = list(scenes_with_holes(columns, half))
        rows += [np.where(hole.inside()[..., None], 128, picture.pixels) for picture, _, hole in examples]
        rows += [paint_hole(pipe, picture, hole, seed, **options) for seed, (picture, _, hole) in enumerate(examples)]
    save_grid(path, rows, columns)


def learn_instructions(run: Path, recipe: Recipe, known: TextEncoders) -> TextEncoders:
    """Encoders of their own for Kontext: tokenizers of captions and instructions, the rest as it was, then trained.

    The pieces that both tokenizers have keep their embeddings. Small readers tell from the encoders' output what a
    caption says, and what an instruction asks for.
    """
    rng = np.random.default_rng((recipe.seed, 8))
    edits = [random_edit(rng, kind=KINDS[-1 - i % len(KINDS)]) for i in range(recipe.edits // 2)]
    instructions, asked = [edit.instruction for edit in edits], of_edits(edits)
    folder = run / "kontext"
    if not (folder / "clip/tokenizer.json").exists():
        captions = [random_scene(rng).caption(rng, complete=False) for _ in edits]
        corpus = [words for pair in zip(captions, instructions, strict=True) for words in pair]
        train_tokenizers(folder, corpus=corpus)
    torch.manual_seed(recipe.seed)
    text = new_text_encoders(folder)
    parts: Any = (
        (text.t5, text.t5_tokenizer, known.t5, known.t5_tokenizer),
        (text.clip, text.clip_tokenizer, known.clip, known.clip_tokenizer),
    )
    for encoder, words, before, known_words in parts:
        table, old = (each.get_input_embeddings().weight.detach() for each in (encoder, before))
        table.copy_(old.mean(0) + torch.randn(table.shape) * old.std(0) / 2)
        places = known_words.get_vocab()
        for piece, row in words.get_vocab().items():
            if piece in places:
                table[row] = old[places[piece]]
        kept = {name: value for name, value in before.state_dict().items() if value.shape != old.shape}
        encoder.load_state_dict(kept, strict=False)
    width, vec_width = text.t5.config.d_model, text.clip.config.hidden_size
    readers = nn.ModuleList((Reader(width, vec_width), Reader(width, vec_width, len(ASKED))))

    def loss(generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        scenes = [random_scene(rng) for _ in range(recipe.captions)]
        start = int(rng.integers(len(edits) - recipe.captions + 1))
        told = [scene.caption(rng, complete=False) for scene in scenes]
        some, right = text.tokenize(told), of_slots(scenes).expand(2, -1, -1, -1)
        others, answers = text.tokenize(instructions[start : start + len(told)]), asked[start : start + len(told)]
        error = answer_loss(readers[0](*text.encode(*some)), right)
        return error + answer_loss(readers[1](*text.encode(*others)), answers.expand(2, -1, -1, -1))

    learners = nn.ModuleList((text.t5, text.clip, readers))
    fit("kontext-text", learners, loss, recipe.edit_text_steps, recipe.text_learning_rate, run, recipe)
    return text


def encode_edits(run: Path, recipe: Recipe, autoencoder: AutoEncoder, text: TextEncoders) -> None:
    """The latents before and after each edit, the tokens it changes, what each shows after, and the words."""
    rng = np.random.default_rng((recipe.seed, 9))

    def some(number: int) -> Examples:
        edits = [random_edit(rng) for _ in range(number)]
        captions = [edit.after.scene.caption(rng, complete=True) for edit in edits]
        by_caption = rng.random(number) < recipe.told_by_caption
        told = [c if by else edit.instruction for c, by, edit in zip(captions, by_caption, edits, strict=True)]
        sides = {"latents": [edit.after for edit in edits], "before": [edit.before for edit in edits]}
        changed = np.stack([edit.changed for edit in edits])
        touched = reduce(changed, "b (h p) (w q) -> b (h w)", "max", p=PIXELS, q=PIXELS)
        truth = torch.stack([of_tokens(edit.after).byte() for edit in edits])
        others = {"changed": torch.from_numpy(touched).byte(), "truth": truth}
        return {name: to_float(pixels_of(pictures)) for name, pictures in sides.items()}, others, told

    encode(file_of(run, "kontext"), recipe.edits, some, autoencoder, text)


class Edits(Pictures):
    """Batches of what ``encode_edits`` wrote."""

    kind, sizes, variant = "kontext", (USUAL,), TINY_KONTEXT
    stages = ("kontext", lambda recipe: recipe.edit_steps), ("kontext-guidance", lambda r: r.edit_guidance_steps)
    true_cfg, gently, keeping = 2.5, True, 16.0

    def shown(self, chosen: dict[str, Tensor]) -> Shown:
        """The picture before each edit."""
        return Shown.reference(unpack(chosen["before"], *USUAL))

    def changed(self, chosen: dict[str, Tensor]) -> Tensor:
        """The tokens that the edit touches."""
        return chosen["changed"][..., None] > 0


def train_kontext(run: Path, recipe: Recipe, autoencoder: AutoEncoder, known: TextEncoders, earlier: Path) -> Pipeline:
    """flux-tiny-kontext-dev and its text encoders: words first, then the flow with them, then guidance."""
    text = learn_instructions(run, recipe, known)
    encode_edits(run, recipe, autoencoder, text)
    return _learn(Edits(run, recipe), autoencoder, text, earlier, edit_grid)


def paint_edit(pipe: Pipeline, edit: Edit, seed: int, **options: Any) -> NDArray[np.uint8]:
    """What a model makes of a picture and an instruction."""
    image: Any = Image.fromarray(edit.before.pixels)
    painted: Any = pipe(edit.instruction, image=image, seed=seed, progress=False, **options)
    return np.asarray(painted)


def held_out_edits(number: int, rng: Generator) -> list[Edit]:
    """All kinds alike."""
    return [random_edit(rng, held_out=True, kind=KINDS[i % len(KINDS)]) for i in range(number)]


def measure_kontext(pipe: Pipeline, number: int = 128, **options: Any) -> list[dict[str, Any]]:
    """What is right of so many held-out edits, all kinds alike, and of each kind."""
    judged: dict[str, list[dict[str, float]]] = defaultdict(list)
    for seed, edit in enumerate(held_out_edits(number, np.random.default_rng(2))):
        found = judge_edit(paint_edit(pipe, edit, seed, **options), edit)
        judged["all"].append(found)
        judged[edit.kind].append(found)
    return [{"edit": kind, "number": len(some), **options, **mean_of(some)} for kind, some in judged.items()]


def edit_grid(pipe: Pipeline, number: int, path: Path, **options: Any) -> None:
    """Held-out pictures, and below each what a model makes of it when it is told to edit it."""
    rng, rows, columns = np.random.default_rng(2), [], math.gcd(8, number)
    for _ in range(2):
        edits = held_out_edits(columns, rng)
        rows += [edit.before.pixels for edit in edits]
        rows += [paint_edit(pipe, edit, seed, **options) for seed, edit in enumerate(edits)]
    save_grid(path, rows, columns)


MEMBERS: dict[str, tuple[Callable[..., Pipeline | Adapter], Callable[..., list[dict[str, Any]]]]] = {
    "fill": (train_fill, measure_fill),
    "kontext": (train_kontext, measure_kontext),
    "canny": (train_canny, measure_canny),
}
