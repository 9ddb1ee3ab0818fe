"""How well a picture follows its caption: an automatic judge of colours, shapes, places, count and background.

It looks for what differs from the background, and fits each patch it finds with every shape of the picture world.
Axes: height H, width W.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from fluxlab.extras import importing
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.tiny.world import BACKGROUNDS, COLOURS, PLACES, SHAPES, Scene, random_scene, shape_coverage


@dataclass(frozen=True)
class Patch:
    """One connected thing that a picture shows."""

    shape: str
    colour: str
    middle: tuple[float, float]  # across and down, as shares of width and height
    fit: float  # overlap with the best fitting shape, intersection over union


def ndimage() -> Any:
    """Of SciPy, or an ``ImportError`` that says what brings it."""
    with importing():
        import scipy.ndimage
    return scipy.ndimage


def look(pixels: NDArray[np.uint8]) -> tuple[str, list[Patch]]:
    """The background's name and the patches on it, largest first; specks below 0.6 % of the picture do not count."""
    height, width, _ = pixels.shape
    colours = pixels.astype(float)
    border = np.concatenate([colours[:4].reshape(-1, 3), colours[-4:].reshape(-1, 3), colours[:, :4].reshape(-1, 3)])
    behind = np.median(border, axis=0)
    labels, _ = ndimage().label(np.linalg.norm(colours - behind, axis=-1) > 60)
    sizes = np.bincount(labels.ravel())[1:]
    big = [int(i) + 1 for i in np.argsort(-sizes) if sizes[i] > 0.006 * height * width]
    return _nearest(behind, BACKGROUNDS), [_patch(labels == i, colours) for i in big]


def _nearest(colour: NDArray[np.float64], names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(colour - np.asarray(names[name]))))


def _patch(mask: NDArray[np.bool_], colours: NDArray[np.float64]) -> Patch:
    rows, columns = np.nonzero(mask)
    top, bottom, left, right = (int(edge) for edge in (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1))
    x, y, side = (left + right) / 2, (top + bottom) / 2, (bottom - top + right - left) / 2
    margin = 2 + int(side) // 4  # what a shape of the same size may reach beyond
    above, before = max(0, top - margin), max(0, left - margin)
    near = mask[above : bottom + margin, before : right + margin]
    fit, shape = max((_fit(near, shape, (x - before, y - above), side), shape) for shape in SHAPES)
    colour = _nearest(np.median(colours[mask], axis=0), COLOURS)
    return Patch(shape, colour, (x / mask.shape[1], y / mask.shape[0]), fit)


def _fit(mask: NDArray[np.bool_], shape: str, middle: tuple[float, float], side: float) -> float:
    """The best overlap of a shape with the mask, over a few angles and sizes, its box in the middle of the mask's."""
    best = 0.0
    for angle in (-0.1, 0.0, 0.1):
        rows, columns = np.nonzero(shape_coverage(shape, (50, 50), 25, angle, 100, 100) > 0.5)
        extent = (np.ptp(rows) + np.ptp(columns) + 2) / 2 / 25  # the shape's own box, in radii
        off = ((columns.min() + columns.max() + 1) / 2 - 50) / 25, ((rows.min() + rows.max() + 1) / 2 - 50) / 25
        for scale in (0.95, 1.0, 1.05):
            radius = scale * side / extent
            centre = middle[0] - off[0] * radius, middle[1] - off[1] * radius
            drawn = shape_coverage(shape, centre, radius, angle, *mask.shape) > 0.5
            best = max(best, float((drawn & mask).sum() / (drawn | mask).sum()))
    return best


def judge(pixels: NDArray[np.uint8], scene: Scene) -> dict[str, float]:
    """What a picture gets right of a scene: colour, shape and place as the share of its things, the others 0 or 1.

    Patches are paired with things in the way that gets most right; a thing without a patch gets nothing right.
    """
    background, patches = look(pixels)
    number = len(scene.things)
    orders = permutations([*patches[:3], *[None] * number], number)
    right = max((_compare(scene, order) for order in orders), key=lambda each: sum(each.values()))
    right |= {"background": float(background == scene.background), "count": float(len(patches) == number)}
    return right | {"all": float(all(value == 1 for value in right.values()))}


def _compare(scene: Scene, order: Sequence[Patch | None]) -> dict[str, float]:
    pairs = list(zip(scene.things, order, strict=True))
    return {
        "colour": float(np.mean([p is not None and p.colour == thing.colour for thing, p in pairs])),
        "shape": float(np.mean([p is not None and p.shape == thing.shape and p.fit > 0.6 for thing, p in pairs])),
        "place": float(_placed(scene, [patch.middle for patch in order if patch is not None])),
    }


def _placed(scene: Scene, middles: list[tuple[float, float]]) -> bool:
    """Whether there is a patch for each thing, at the place or in the relation that the scene says."""
    if len(middles) < len(scene.things):
        return False
    if len(middles) == 1:
        return min(PLACES, key=lambda place: float(np.hypot(*np.subtract(PLACES[place], middles[0])))) == scene.where
    across, down = np.subtract(middles[1], middles[0])
    return bool(across > abs(down) if scene.where == "left of" else down > abs(across))


def report(pictures: Iterable[tuple[NDArray[np.uint8], Scene]]) -> dict[str, float]:
    """The mean of each attribute over many pictures."""
    return mean_of([judge(pixels, scene) for pixels, scene in pictures])


def mean_of(judged: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each of the numbers that were found, over all of them, to four places."""
    return {name: round(float(np.mean([each[name] for each in judged])), 4) for name in judged[0]}


SETTINGS: dict[bool, tuple[dict[str, Any], ...]] = {  # of a model with a guidance embedder, and of one without
    True: (
        *({"guidance": guidance} for guidance in (1.0, 2.0, 4.0, 6.0, 8.0)),
        *({"num_steps": steps} for steps in (1, 2, 4, 8, 50)),
        *({"height": height, "width": width} for height, width in ((128, 192), (192, 128), (256, 256))),
    ),
    False: tuple({"num_steps": steps} for steps in (1, 2, 4, 8, 20)),
}


def measure(pipe: Pipeline, number: int = 256, batch: int = 64, **options: Any) -> dict[str, float]:
    """What a model gets right of held-out prompts: the first ``number`` scenes of seed 0, scene ``i`` from noise ``i``.

    ``options`` are the pipeline's, such as ``guidance``.
    """
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, held_out=True) for _ in range(number)]
    pictures: list[NDArray[np.uint8]] = []
    for first in range(0, number, batch):
        captions = [scene.caption() for scene in scenes[first : first + batch]]
        painted = pipe(captions, seed=range(first, first + len(captions)), progress=False, **options)
        pictures += [np.asarray(picture) for picture in painted]  # type: ignore[union-attr]
    return report(zip(pictures, scenes, strict=True))


def measure_all(pipe: Pipeline, number: int = 256) -> list[dict[str, Any]]:
    """One row for each of the ``SETTINGS`` of this model; what a row does not name is as usual."""
    rows = []
    for options in tqdm(SETTINGS[pipe.model.config.guidance_embed], desc=f"measuring {pipe.variant.name}"):
        rows.append({"variant": pipe.variant.name, **options, **measure(pipe, number, **options)})
    return rows
