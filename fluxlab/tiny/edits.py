"""What flux-tiny-kontext-dev learns from: a picture before, one after, and the words between. Opened in chapter 18.

Five kinds of edit: another colour, another shape, one thing less, one thing more, another background. All else stays,
to the pixel: before and after are drawn with the same jitter. Axes: height H, width W.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from fluxlab.tiny.measure import judge, ndimage
from fluxlab.tiny.truth import OPTIONS, UNASKED, options_of
from fluxlab.tiny.world import BACKGROUNDS, COLOURS, SHAPES, SIDES, Picture, Scene, Thing, draw_scene, random_scene

KINDS = ("colour", "shape", "remove", "add", "background")
_KEPT = 6  # of 255: the mean error off the edit below which the rest was left as it was
_BESIDE = {"left of": ("left of", "right of"), "above": ("above", "below")}  # the other: the first thing, the second


@dataclass(frozen=True)
class Edit:
    """What is asked of a picture, and the picture that answers it."""

    kind: str
    before: Picture
    after: Picture
    instruction: str
    thing: Thing  # that is recoloured, reshaped, removed or added, as it is before; one of them for the background
    become: Thing  # and after
    where: str  # of "left", "right", "top", "bottom", on which side of the other it stands
    changed: NDArray[np.bool_]  # H W: what the edit touches


def random_edit(rng: Generator, held_out: bool = False, kind: str | None = None) -> Edit:
    """An edit of a random scene: both sides from the training combinations; or, held out, the one with more things."""
    while True:
        scene, asked = random_scene(rng, held_out), kind or str(rng.choice(KINDS))
        if asked in ("remove", "add") and len(scene.things) == 1:
            continue
        which, seed = int(rng.integers(len(scene.things))), int(rng.integers(2**31))
        new, thing = scene, scene.things[which]
        if asked == "colour":
            new = _with(scene, which, replace(thing, colour=_other(COLOURS, thing.colour, rng)))
        elif asked == "shape":
            new = _with(scene, which, replace(thing, shape=_other(SHAPES, thing.shape, rng)))
        elif asked == "background":
            new = replace(scene, background=_other(BACKGROUNDS, scene.background, rng))
        if len({(each.shape, each.colour) for each in new.things}) < len(new.things):
            continue
        shown = draw_scene(scene, np.random.default_rng(seed), without=which if asked == "add" else None)
        after = draw_scene(new, np.random.default_rng(seed), without=which if asked == "remove" else None)
        if not held_out and (shown.scene.held_out or after.scene.held_out):
            continue
        masks = [picture.masks[which] for picture in (shown, after) if len(picture.masks) == len(scene.things)]
        changed = np.max(masks, axis=0) > 0
        if asked == "background":
            changed = after.masks.max(axis=0) < 1
        words = _instruction(asked, scene, new, which, rng)
        where = SIDES.get(scene.where, (scene.where,))[which]
        return Edit(asked, shown, after, words, thing, new.things[which], where, changed)


def _with(scene: Scene, which: int, thing: Thing) -> Scene:
    return replace(scene, things=tuple(thing if i == which else each for i, each in enumerate(scene.things)))


def _other(words: Any, than: str, rng: Generator) -> str:
    return str(rng.choice([word for word in words if word != than]))


def _instruction(kind: str, before: Scene, after: Scene, which: int, rng: Generator) -> str:
    """The edit in words; a thing is named by its shape, and by its colour too where the other has that shape."""
    thing, new = before.things[which], after.things[which]
    alike = sum(each.shape == thing.shape for each in before.things) > 1
    name = f"the {thing.colour} {thing.shape}" if alike or rng.random() < 0.3 else f"the {thing.shape}"
    if kind == "add":
        return f"put {thing.words()} {_BESIDE[before.where][which]} it"
    options = {
        "colour": (f"make {name} {new.colour}", f"turn {name} {new.colour}"),
        "shape": (f"turn {name} into a {new.shape}", f"make {name} a {new.shape}"),
        "remove": (f"remove {name}", f"take {name} away"),
        "background": (f"on a {after.background} background", f"make the background {after.background}"),
    }[kind]
    return options[int(rng.integers(len(options)))]


def judge_edit(painted: NDArray[np.uint8], edit: Edit) -> dict[str, float]:
    """Whether the picture shows what the edit asks for, with all its things right; and whether the rest was kept.

    Kept: the mean error from the picture after the edit, three pixels and more off what it touches, is below 6 of 255.
    """
    off = ~ndimage().binary_dilation(edit.changed, iterations=3)
    error = float(np.abs(painted.astype(float) - edit.after.pixels)[off].mean())
    found = judge(painted, edit.after.scene)["all"]
    return {"right": found, "kept": float(error < _KEPT), "both": found * (error < _KEPT), "error": error}


ASKED = ("thing", "become", "left", "right", "top", "bottom", "background")  # what instructions tell, slot by slot


def of_edits(edits: list[Edit]) -> Int[Tensor, "batch slots 4"]:
    """The right option for each slot and question of ``truth.OPTIONS``; what an instruction leaves open is unasked."""
    right = np.zeros((len(edits), len(ASKED), len(OPTIONS)), np.int64)
    right[:, :-1, 3] = right[:, -1] = UNASKED
    for row, edit in zip(right, edits, strict=True):
        thing, become = options_of(edit.thing), options_of(edit.become)
        if edit.kind in ("colour", "shape", "remove"):
            named = f"{edit.thing.colour} {edit.thing.shape}" in edit.instruction
            row[0, :3] = thing[0] if named else UNASKED, thing[1], UNASKED
        if edit.kind == "colour":
            row[1, :3] = become[0], UNASKED, UNASKED
        elif edit.kind == "shape":
            row[1, :3] = UNASKED, become[1], UNASKED
        elif edit.kind == "add":
            row[ASKED.index(edit.where), :3] = become
        elif edit.kind == "background":
            row[-1, 3] = OPTIONS[3].index(edit.after.scene.background)
    return torch.from_numpy(right)
