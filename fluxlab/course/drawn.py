"""Drawn pictures of two things, whose truth is known, with noise in them as on the way. Opened in chapter 14."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fluxlab.pipeline.inputs import FluxInputs
from fluxlab.pipeline.latents import pack
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.tiny.pictures import pixels_of, to_float
from fluxlab.tiny.truth import covers
from fluxlab.tiny.world import BACKGROUNDS, COLOURS, Scene, draw_scene, random_scene


@dataclass(frozen=True, eq=False)
class Word:
    """A word that a caption says once, of one of two things."""

    text: str
    kind: str  # "colour" or "shape"
    picture: int
    column: int  # its place among the text tokens
    own: Tensor  # of each image token, whether the word's thing covers a fifth of it or more
    other: Tensor  # likewise the other thing


class Drawn:
    """Scenes of two things that training never saw, drawn and encoded, with the words of their captions."""

    @torch.no_grad()
    def __init__(self, pipe: Pipeline, number: int = 48, seed: int = 14) -> None:
        rng, size = np.random.default_rng(seed), pipe.variant.size
        self.scenes: list[Scene] = []
        while len(self.scenes) < number:
            self.scenes += [scene for scene in [random_scene(rng, held_out=True)] if len(scene.things) == 2]
        self.pictures = [draw_scene(scene, rng, size, size) for scene in self.scenes]
        captions = [scene.caption() for scene in self.scenes]
        self.ids, _ = pipe.text.tokenize(captions)
        self._start = pipe.prepare(captions, range(number), size, size)
        self.clean = torch.cat(
            [pack(pipe.autoencoder.encode(few)) for few in to_float(pixels_of(self.pictures)).split(4)]
        )
        self.words: list[Word] = []
        for i, (scene, picture) in enumerate(zip(self.scenes, self.pictures, strict=True)):
            said = [p.strip("▁") for p in pipe.text.t5_tokenizer.convert_ids_to_tokens(self.ids[i].tolist())]
            there = torch.from_numpy(covers(picture))
            named = [(kind, n, getattr(t, kind)) for n, t in enumerate(scene.things) for kind in ("colour", "shape")]
            once = [(k, n, word) for k, n, word in named if said.count(word) == 1]
            self.words += [Word(word, k, i, said.index(word), there[n], there[1 - n]) for k, n, word in once]

    def at(self, t: float) -> FluxInputs:
        """The inputs of a forward at time t: each picture mixed with noise, with its caption."""
        img = torch.lerp(self.clean, self._start.img, t)
        return replace(self._start, img=img, timesteps=torch.full((len(img),), t))


def swapped(scene: Scene, what: str) -> Scene:
    """The scene with another colour, of its first thing or of its background: ``what`` is "thing" or "background"."""
    words, word = (BACKGROUNDS, scene.background) if what == "background" else (COLOURS, scene.things[0].colour)
    another = [*words, *words][[*words].index(word) + len(words) // 2 - 1]
    if what == "background":
        return replace(scene, background=another)
    return replace(scene, things=(replace(scene.things[0], colour=another), *scene.things[1:]))
