"""What is where, as questions with a few options each, for text and for image tokens. Opened in chapter 16.

Colour, shape and size of the thing at some place, or nothing; and the background.
Axes: captions B, slots S (the five places, then what is behind), image tokens I, options O of all questions.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fluxlab.tiny.world import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Picture, Scene

SLOTS = (*PLACES, "background")
OPTIONS = (("nothing", *COLOURS), ("nothing", *SHAPES), ("nothing", *SIZES), tuple(BACKGROUNDS))  # four questions
NUMBER = sum(len(words) for words in OPTIONS)
_TWO = {"left of": ("left", "right"), "above": ("top", "bottom")}  # where two things stand
_UNASKED = -100  # what cross-entropy leaves out
_COVERED = 0.2  # of a token's square, for a thing to be there


def of_slots(scenes: list[Scene]) -> Int[Tensor, "batch slots 4"]:
    """The right option for each slot and question: colour, shape and size of what stands there; what is behind."""
    right = np.zeros((len(scenes), len(SLOTS), len(OPTIONS)), np.int64)
    right[:, :-1, 3] = right[:, -1, :3] = _UNASKED
    for row, scene in zip(right, scenes, strict=True):
        row[-1, 3] = OPTIONS[3].index(scene.background)
        for i, place in enumerate(_TWO.get(scene.where, (scene.where,))):
            row[SLOTS.index(place), :3] = _options(scene, i)
    return torch.from_numpy(right)


def of_tokens(picture: Picture) -> Int[Tensor, "image_tokens 4"]:
    """The right option for each image token, a square of 16 pixels, and question: what covers a fifth of it or more."""
    covered = reduce(picture.masks, "n (r h) (c w) -> (r c) n", "mean", h=16, w=16)
    right = np.zeros((len(covered), len(OPTIONS)), np.int64)
    right[:, 3] = OPTIONS[3].index(picture.scene.background)
    for i in range(len(picture.scene.things)):
        mostly = (covered[:, i] > _COVERED) & (covered[:, i] == covered.max(axis=1))
        right[mostly, :3] = _options(picture.scene, i)
    return torch.from_numpy(right)


def _options(scene: Scene, thing: int) -> list[int]:
    words = scene.things[thing].colour, scene.things[thing].shape, scene.things[thing].size
    return [options.index(word) for options, word in zip(OPTIONS, words, strict=False)]


def answer_loss(told: Float[Tensor, "*places options"], right: Int[Tensor, "*places 4"]) -> Tensor:
    """Cross-entropy of the logits of all options, those of each question side by side; the four questions' sum."""
    questions = told.float().split([len(words) for words in OPTIONS], dim=-1)
    losses = [F.cross_entropy(q.flatten(0, -2), right[..., i].long().flatten()) for i, q in enumerate(questions)]
    return torch.stack(losses).sum()
