"""What is where, as questions with a few options each, for text and for image tokens. Opened in chapter 16.

Four questions: colour, shape and size of the thing at some place, where "nothing" is an answer too; and the background.
Axes: captions B, slots S (the five places, then what is behind), image tokens I, options O of all questions.
"""

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fluxlab.tiny.world import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIDES, SIZES, Picture, Scene, Thing

SLOTS = (*PLACES, "background")
OPTIONS = (("nothing", *COLOURS), ("nothing", *SHAPES), ("nothing", *SIZES), tuple(BACKGROUNDS))  # one row a question
NUMBER = sum(len(words) for words in OPTIONS)
UNASKED = -100  # the target that cross-entropy skips
_COVERED = 0.2  # share of a token's square that a thing must cover to count as there


def of_slots(scenes: list[Scene]) -> Int[Tensor, "batch slots 4"]:
    """The right option for each slot and question: colour, shape and size of what stands there; what is behind."""
    right = np.zeros((len(scenes), len(SLOTS), len(OPTIONS)), np.int64)
    right[:, :-1, 3] = right[:, -1, :3] = UNASKED
    for row, scene in zip(right, scenes, strict=True):
        row[-1, 3] = OPTIONS[3].index(scene.background)
        for place, thing in zip(SIDES.get(scene.where, (scene.where,)), scene.things, strict=True):
            row[SLOTS.index(place), :3] = options_of(thing)
    return torch.from_numpy(right)


def of_tokens(picture: Picture) -> Int[Tensor, "image_tokens 4"]:
    """The right option for each image token, a square of 16 pixels, and question: what covers a fifth of it or more."""
    there = covers(picture)
    right = np.zeros((there.shape[1], len(OPTIONS)), np.int64)
    right[:, 3] = OPTIONS[3].index(picture.scene.background)
    for thing, tokens in zip(picture.scene.things, there, strict=True):
        right[tokens, :3] = options_of(thing)
    return torch.from_numpy(right)


def covers(picture: Picture) -> NDArray[np.bool_]:
    """For each thing, which image tokens show it: it covers a fifth of the square or more, and most of all things."""
    covered = reduce(picture.masks, "n (r h) (c w) -> n (r c)", "mean", h=16, w=16)
    shown: NDArray[np.bool_] = (covered > _COVERED) & (covered == covered.max(axis=0))
    return shown


def options_of(thing: Thing) -> list[int]:
    """The options that name a thing: its colour, shape and size."""
    words = (thing.colour, thing.shape, thing.size)
    return [options.index(word) for options, word in zip(OPTIONS, words, strict=False)]


def answer_loss(told: Float[Tensor, "*places options"], right: Int[Tensor, "*places 4"]) -> Tensor:
    """Cross-entropy summed over the four questions; ``told`` has the logits of their options side by side."""
    questions = told.float().split([len(words) for words in OPTIONS], dim=-1)
    losses = [F.cross_entropy(q.flatten(0, -2), right[..., i].long().flatten()) for i, q in enumerate(questions)]
    return torch.stack(losses).sum()
