"""What flux-tiny-fill-dev learns from: pictures with a hole, and what stands in it. Opened in chapter 18.

Axes: batch B, height H and width W in pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from fluxlab.tiny.measure import look, ndimage
from fluxlab.tiny.pictures import USUAL
from fluxlab.tiny.world import Picture, random_picture

_KEPT = 10  # of 255: the mean error below which a thing outside of the hole was left as it was


@dataclass(frozen=True)
class Hole:
    """A rectangle of a picture to be painted anew, and what the prompt says of it."""

    box: tuple[int, int, int, int]  # top, bottom, left, right
    prompt: str

    def inside(self) -> NDArray[np.bool_]:
        """Which pixels of a picture of the usual size it has: H W."""
        return masks_of(torch.tensor([self.box]), *USUAL)[0, 0].bool().numpy()


def hole_on(picture: Picture, which: int, rng: Generator | None = None) -> Hole:
    """A box around one of the things; the prompt names that thing alone. Without ``rng``, six pixels away from it."""
    height, width = picture.masks.shape[1:]
    rows, columns = np.nonzero(picture.masks[which])
    margin = np.full(4, 6) if rng is None else rng.integers(3, 15, 4)
    top, left = rows.min() - margin[0], columns.min() - margin[1]
    bottom, right = rows.max() + 1 + margin[2], columns.max() + 1 + margin[3]
    box = max(0, int(top)), min(height, int(bottom)), max(0, int(left)), min(width, int(right))
    return Hole(box, _alone(picture, which))


def half_around(picture: Picture, which: int) -> Hole:
    """The half of the picture in which one of two things stands; the prompt names that thing alone."""
    height, width = picture.masks.shape[1:]
    halves = {
        "left of": ((0, height, 0, width // 2), (0, height, width // 2, width)),
        "above": ((0, height // 2, 0, width), (height // 2, height, 0, width)),
    }
    return Hole(halves[picture.scene.where][which], _alone(picture, which))


def _alone(picture: Picture, which: int) -> str:
    return f"{picture.scene.things[which].words()} on a {picture.scene.background} background"


def random_hole(picture: Picture, rng: Generator) -> Hole:
    """As training sees them: a box on a thing, a half, any box, or all; of the first two, six in ten name it alone."""
    height, width = picture.masks.shape[1:]
    which, chance = int(rng.integers(len(picture.masks))), rng.random()
    if chance < 0.6:
        hole = hole_on(picture, which, rng)
    elif chance < 0.8 and len(picture.masks) == 2:
        hole = half_around(picture, which)
    elif chance < 0.95:
        (top, bottom), (left, right) = (sorted(rng.choice(side + 1, 2, replace=False)) for side in (height, width))
        hole = Hole((int(top), int(bottom), int(left), int(right)), picture.caption)
    else:
        hole = Hole((0, height, 0, width), picture.caption)
    return hole if rng.random() < 0.6 else replace(hole, prompt=picture.caption)


def masks_of(boxes: Int[Tensor, "batch 4"], height: int, width: int) -> Float[Tensor, "batch 1 height width"]:
    """1 inside of each box."""
    top, bottom, left, right = boxes[..., None, None, None].unbind(1)
    y, x = torch.arange(height)[:, None], torch.arange(width)
    return ((y >= top) & (y < bottom) & (x >= left) & (x < right)).float()


def scenes_with_holes(number: int, half: bool) -> Iterator[tuple[Picture, int, Hole]]:
    """Held-out pictures of two things, which of the two is to be painted anew, and the hole on it.

    A box never reaches the other thing.
    """
    rng = np.random.default_rng(1)
    while number:
        picture = random_picture(rng, *USUAL, held_out=True, complete=True)
        if len(picture.masks) == 1:
            continue
        which = int(rng.integers(2))
        hole = half_around(picture, which) if half else hole_on(picture, which)
        if half or not picture.masks[1 - which][hole.inside()].any():
            number -= 1
            yield picture, which, hole


def judge_hole(painted: NDArray[np.uint8], picture: Picture, which: int, hole: Hole) -> dict[str, float]:
    """Whether the thing in the hole is the prompt's, alone and on its background; and whether the other was kept.

    Right: colour and shape, the shape's overlap above 0.6.
    Kept: the mean error over the other thing and three pixels around it, outside of the hole, is below 10 of 255.
    """
    top, bottom, left, right = hole.box
    height, width = picture.masks.shape[1:]
    background, patches = look(painted)
    inside = [p for p in patches if left <= p.middle[0] * width < right and top <= p.middle[1] * height < bottom]
    thing = picture.scene.things[which]
    right_thing = len(inside) == 1 and (inside[0].colour, inside[0].shape) == (thing.colour, thing.shape)
    other = ndimage().binary_dilation(picture.masks[1 - which] > 0.5, iterations=3)
    other[top:bottom, left:right] = False
    error = float(np.abs(painted.astype(float) - picture.pixels)[other].mean())
    hole_right = right_thing and inside[0].fit > 0.6 and background == picture.scene.background
    return {"hole": float(hole_right), "kept": float(error < _KEPT), "error": error}
