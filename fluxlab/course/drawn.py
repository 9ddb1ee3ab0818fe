"""Drawn pictures of two things, whose truth is known, with noise in them as on the way. Opened in chapter 14.

Axes: pictures P, text tokens T, image tokens I.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import reduce
from torch import Tensor

from fluxlab.pipeline.inputs import FluxInputs
from fluxlab.pipeline.latents import pack
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.tiny.pictures import pixels_of, to_float
from fluxlab.tiny.world import BACKGROUNDS, COLOURS, Scene, draw_scene, random_scene

_COVERED = 0.2  # share of a token's square that a thing must cover to count as there, as in fluxlab.tiny.truth


@dataclass(frozen=True, eq=False)
class Word:
    """A word that a caption says once, of one of two things."""

    text: str
    kind: str  # "colour" or "shape"
    picture: int
    column: int  # its place among the text tokens
    own: Tensor  # I: whether its thing covers the token
    other: Tensor  # I: whether the other thing does


class Drawn:
    """Scenes of two things that training never saw, drawn and encoded, with the words of their captions."""

    @torch.no_grad()
    def __init__(self, pipe: Pipeline, number: int = 48, seed: int = 14) -> None:
        rng, size = np.random.default_rng(seed), pipe.variant.size
        self.scenes: list[Scene] = []
        while len(self.scenes) < number:
            scene = random_scene(rng, held_out=True)
            self.scenes += [scene] * (len(scene.things) == 2)
        self.pictures = [draw_scene(scene, rng, size, size) for scene in self.scenes]
        self.ids, _ = pipe.text.tokenize(captions := [scene.caption() for scene in self.scenes])
        pixels = to_float(pixels_of(self.pictures))
        self.clean = torch.cat([pack(pipe.autoencoder.encode(few)) for few in pixels.split(4)])  # P I channels
        self._inputs = pipe.prepare(captions, range(number), size, size)
        pieces = [[p.strip("▁") for p in pipe.text.t5_tokenizer.convert_ids_to_tokens(row)] for row in self.ids]
        self.words = [word for i in range(number) for word in self._words(i, pieces[i])]

    def _words(self, picture: int, pieces: list[str]) -> list[Word]:
        covered = reduce(self.pictures[picture].masks, "n (r h) (c w) -> n (r c)", "mean", h=16, w=16)
        there = torch.from_numpy((covered > _COVERED) & (covered == covered.max(axis=0)))
        said = [(kind, i, getattr(t, kind)) for i, t in enumerate(self.scenes[picture].things) for kind in KINDS]
        return [
            Word(text, kind, picture, pieces.index(text), there[i], there[1 - i])
            for kind, i, text in said
            if pieces.count(text) == 1
        ]

    def at(self, t: float) -> FluxInputs:
        """The inputs of a forward at time t: each picture mixed with noise, with its caption."""
        img = torch.lerp(self.clean, self._inputs.img, t)
        return replace(self._inputs, img=img, timesteps=torch.full((len(img),), t))


KINDS = ("colour", "shape")


def swapped(scene: Scene, what: str) -> Scene:
    """The scene with another colour of its first thing, or of its background, for ``what`` "thing" or "background"."""
    if what == "background":
        return replace(scene, background=_another(scene.background, list(BACKGROUNDS), 1))
    first, *rest = scene.things
    return replace(scene, things=(replace(first, colour=_another(first.colour, list(COLOURS), 3)), *rest))


def _another(word: str, words: list[str], by: int) -> str:
    return words[(words.index(word) + by) % len(words)]
