"""flux-tiny's world: pictures of coloured shapes, made by code, with caption and truth. Opened in chapter 16.

A scene says what is there; drawing it adds jitter, and gives the pixels and one mask for each thing. A tenth of all
scenes is held out: training never sees them, measuring sees nothing else.
Axes: things N, height H, width W.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (220, 38, 38),
    "green": (34, 160, 70),
    "blue": (37, 90, 235),
    "yellow": (250, 215, 40),
    "purple": (140, 50, 190),
    "orange": (245, 130, 25),
    "cyan": (40, 200, 220),
    "pink": (250, 140, 190),
}
BACKGROUNDS = {"white": (250, 250, 250), "black": (12, 12, 12), "gray": (128, 128, 128), "navy": (16, 24, 72)}
SIZES = {"small": 0.15, "large": 0.21}  # radius over the shorter side of the picture
PLACES = {"left": (0.28, 0.5), "right": (0.72, 0.5), "top": (0.5, 0.28), "bottom": (0.5, 0.72), "center": (0.5, 0.5)}
SIDES = {"left of": ("left", "right"), "above": ("top", "bottom")}  # where two things stand, by their relation
PICTURE_SIZES = ((128, 128), (128, 192), (192, 128), (192, 192), (256, 256))  # height, width in pixels

_PLACE_WORDS = {
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "center": ("in the center", "in the middle"),
}
_RELATION_WORDS = {"left of": ("left of", "to the left of"), "above": ("above", "over")}
_INVERSE_WORDS = {"left of": ("right of", "to the right of"), "above": ("below", "under")}
_PHRASINGS = (
    "{what} on a {background} background",
    "{what}, on a {background} background",
    "{what}, {background} background",
    "a {background} background with {what}",
    "a picture of {what} on a {background} background",
)


@dataclass(frozen=True)
class Thing:
    """One coloured shape: a word from each of ``SHAPES``, ``COLOURS`` and ``SIZES``."""

    shape: str
    colour: str
    size: str

    def words(self, with_size: bool = True) -> str:
        """As a caption names it, with its article."""
        words = [self.size] * with_size + [self.colour, self.shape]
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one thing at a place, or two, the first of them left of the second or above it."""

    things: tuple[Thing, ...]
    where: str  # a place for one thing, a relation for two
    background: str

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept from training: one in ten, by a checksum of its words."""
        return zlib.crc32(self.caption().encode()) % 10 == 0

    def without(self, which: int) -> "Scene":
        """The scene with one of its two things left out."""
        return Scene((self.things[1 - which],), SIDES[self.where][1 - which], self.background)

    def caption(self, rng: Generator | None = None, complete: bool = True) -> str:
        """One phrasing of the scene.

        Args:
            rng: draws the phrasing; without it, the plain one.
            complete: if False, the size, the place or the relation may be left unsaid.
        """
        may_omit = rng if not complete else None
        with_size = not _happens(0.25, may_omit)
        first, *rest = (thing.words(with_size) for thing in self.things)
        if not rest:
            what = first if _happens(0.2, may_omit) else f"{first} {_choose(_PLACE_WORDS[self.where], rng)}"
        elif _happens(0.1, may_omit):
            what = _choose((f"{first} and {rest[0]}", f"{rest[0]} and {first}"), rng)
        else:
            forward = f"{first} {_choose(_RELATION_WORDS[self.where], rng)} {rest[0]}"
            backward = f"{rest[0]} {_choose(_INVERSE_WORDS[self.where], rng)} {first}"
            what = forward if rng is None or _happens(0.65, rng) else backward
        return _choose(_PHRASINGS, rng).format(what=what, background=self.background)


def _choose(options: tuple[str, ...], rng: Generator | None) -> str:
    """One of the options; without ``rng``, the first."""
    return options[0] if rng is None else options[rng.integers(len(options))]


def _happens(share: float, rng: Generator | None) -> bool:
    """True in that share of draws; without ``rng``, never."""
    return rng is not None and rng.random() < share


@dataclass(frozen=True)
class Picture:
    """A drawn scene and its truth."""

    scene: Scene
    caption: str
    pixels: NDArray[np.uint8]  # H W 3
    masks: NDArray[np.float32]  # N H W: how much of each pixel the thing covers, 0 to 1


def random_scene(rng: Generator, held_out: bool = False) -> Scene:
    """A scene from the training combinations, or from the held-out ones; two things never look alike."""
    while True:
        things = tuple(
            Thing(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), str(rng.choice(list(SIZES))))
            for _ in range(1 + (rng.random() < 0.6))
        )
        where = str(rng.choice(list(PLACES if len(things) == 1 else SIDES)))
        scene = Scene(things, where, str(rng.choice(list(BACKGROUNDS))))
        looks = {(thing.shape, thing.colour) for thing in things}
        if len(looks) == len(things) and scene.held_out == held_out:
            return scene


def random_picture(
    rng: Generator, height: int = 128, width: int = 128, held_out: bool = False, complete: bool = False
) -> Picture:
    """A random scene, phrased and drawn."""
    scene = random_scene(rng, held_out)
    return draw_scene(scene, rng, height, width, scene.caption(rng, complete))


def draw_scene(
    scene: Scene, rng: Generator, height: int = 128, width: int = 128, caption: str = "", without: int | None = None
) -> Picture:
    """Draw a scene: anti-aliased, with jitter in place, size, angle and colour; by default with its plain caption.

    ``without`` is one of two things to leave out; all else is as it is with it.
    """
    pixels = np.tile(_jittered(BACKGROUNDS[scene.background], 5, rng), (height, width, 1))
    masks: list[NDArray[np.float64]] = []
    for i, (thing, (x, y)) in enumerate(zip(scene.things, _centres(scene, rng), strict=True)):
        radius = SIZES[thing.size] * min(height, width) * rng.uniform(0.93, 1.07)
        mask = shape_coverage(thing.shape, (x * width, y * height), radius, rng.uniform(-0.08, 0.08), height, width)
        colour = _jittered(COLOURS[thing.colour], 8, rng)
        if i != without:
            pixels = pixels + mask[..., None] * (colour - pixels)
            masks = [m * (1 - mask) for m in masks] + [mask]
    scene = scene if without is None else scene.without(without)
    rounded = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return Picture(scene, caption or scene.caption(), rounded, np.stack(masks).astype(np.float32))


def _jittered(colour: tuple[int, int, int], spread: float, rng: Generator) -> NDArray[np.float64]:
    return np.clip(np.asarray(colour) + rng.uniform(-spread, spread, 3), 0, 255)


def _centres(scene: Scene, rng: Generator) -> list[tuple[float, float]]:
    """Centre of each thing, as shares of width and height."""
    if len(scene.things) == 1:
        x, y = PLACES[scene.where]
        return [(x + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.03, 0.03))]
    along = (0.27 + rng.uniform(-0.02, 0.02), 0.73 + rng.uniform(-0.02, 0.02))
    across = (0.5 + rng.uniform(-0.14, 0.14), 0.5 + rng.uniform(-0.14, 0.14))
    pairs = list(zip(along, across, strict=True))
    return pairs if scene.where == "left of" else [(y, x) for x, y in pairs]


def shape_coverage(
    shape: str, centre: tuple[float, float], radius: float, angle: float, height: int, width: int
) -> NDArray[np.float64]:
    """How much of each pixel the shape covers: its signed distance, cut to one pixel around the edge."""
    y, x = np.mgrid[:height, :width] + 0.5
    x, y = (x - centre[0]) / radius, (y - centre[1]) / radius
    cos, sin = np.cos(angle), np.sin(angle)
    distance = _DISTANCES[shape](cos * x + sin * y, cos * y - sin * x)
    return np.clip(0.5 - distance * radius, 0, 1)


Distance = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


def _polygon(points: list[tuple[float, float]]) -> Distance:
    """Signed distance to a polygon, negative inside."""

    def distance(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
        for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
            ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
            t = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, np.hypot(px - t * ex, py - t * ey))
            if ey:
                inside ^= ((ay > y) != (by > y)) & (px < ex * py / ey)
        return np.where(inside, -nearest, nearest)

    return distance


_CORNERS = ((0.32, -1), (0.32, -0.32), (1, -0.32))  # of a cross, from one arm to the next
_QUARTERS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # cosine and sine of the turns that lead to the others
_DISTANCES: dict[str, Distance] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.95,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.76) - 0.22,
    "square": _polygon([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]),
    "triangle": _polygon([(0.0, -1.0), (1.0, 0.75), (-1.0, 0.75)]),
    "star": _polygon([(r * np.sin(i * np.pi / 5), -r * np.cos(i * np.pi / 5)) for i, r in enumerate(5 * (1.12, 0.47))]),
    "cross": _polygon([(c * x - s * y, s * x + c * y) for c, s in _QUARTERS for x, y in _CORNERS]),
}
