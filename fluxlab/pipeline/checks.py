"""What this room refuses, and how it warns."""

import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fluxlab.arguments import is_finite, is_number, whole


def as_list(name: str, value: Any) -> list[Any]:
    """One value or several, as a list, of tensors and arrays too; a ``ValueError`` where there is none."""
    value = value.tolist() if getattr(value, "ndim", 2) < 2 else value
    values = list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes) else [value]
    if not values:
        raise ValueError(f"{name} is an empty list; give at least one")
    return values


def as_texts(name: str, value: Any) -> list[str]:
    """One text or several, as a list; a ``ValueError`` where one of them is not text, or there is none."""
    texts = as_list(name, value)
    if wrong := [each for each in texts if not isinstance(each, str) or re.search("[\ud800-\udfff]", each)]:
        raise ValueError(f"{name} is {wrong[0]!r}; give text")
    return texts


def finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor itself; a ``ValueError``, where ``what`` says whose, if a value of it is infinite or not a number."""
    if not is_finite(tensor):
        bad, advice = int((~tensor.isfinite()).sum()), "look at the weights and at what they were given"
        if tensor.dtype == torch.float16:
            advice = "float16 ends at 65504, which FLUX exceeds: use bfloat16 or float32, as in pipe.to(torch.bfloat16)"
        raise ValueError(f"{what} has {bad} of {tensor.numel()} values that are not finite; {advice}")
    return tensor


def warn(message: str) -> None:
    """A warning that points at the caller's line: the first outside of this library and the decorators around it."""
    level, frame, inside = 1, sys._getframe(1), ("fluxlab", "torch", "jaxtyping", "beartype")
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)


_MADE = ("edges", "depth")  # made of image, where control is not given
_NEEDED = {"hole": ("image", "mask"), "reference": ("image",), "pictures": ("image",), "nothing": ()}


def starts_from(kind: str, given: Mapping[str, object]) -> bool:
    """Whether ``image`` is what the loop starts from; else it is shown."""
    shown = "image" in _NEEDED.get(kind, ()) or (kind in _MADE and given["control"] is None)
    return given["image"] is not None and not shown


def check_shown(who: str, kind: str, given: Mapping[str, object]) -> None:
    """A ``ValueError`` where a picture that this model is shown is missing, or it has no use for one that is given."""
    made = kind in _MADE and given["image"] is not None
    needed = _NEEDED.get(kind, () if made else ("control",))
    used = (*needed, "image", *(["control"] if made else []), *(["mask"] if starts_from(kind, given) else []))
    for name, picture in given.items():
        if picture is None and name in needed:
            instead = ", or image to make it from" if kind in _MADE else ""
            raise ValueError(f"{name} is missing: {who} is shown {' and '.join(needed)} beside the noise{instead}")
        if picture is not None and name not in used:
            alone = " without image" if name == "mask" and given["image"] is None else ""
            raise ValueError(f"{name} is given, and {who} has no use for it{alone}; leave it out")
    several = isinstance(image := given["image"], Iterable) and not (isinstance(image, str) or hasattr(image, "shape"))
    if kind != "pictures" and several:
        raise ValueError(f"image is a {type(image).__name__}; {who} takes one picture")


def as_batch(prompt: str | Sequence[str], seed: int | Sequence[int]) -> tuple[list[str], list[int]]:
    """As many prompts as seeds, where one of either serves all of the other; else a ``ValueError``."""
    prompts, seeds = as_texts("prompt", prompt), [whole("seed", each, -(2**63)) for each in as_list("seed", seed)]
    if len(prompts) == 1:
        prompts *= len(seeds)
    if len(seeds) == 1:
        seeds *= len(prompts)
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds; give one seed, or one for each prompt")
    return prompts, seeds


def check_guidance(guidance: float | None, true_cfg: float, negative_prompt: str | None) -> None:
    """A ``ValueError`` where one of them is out of its range, or has no effect."""
    if guidance is not None and not is_number(guidance):
        raise ValueError(f"guidance is {guidance!r}; it must be a finite number, such as 3.5")
    if not is_number(true_cfg, least=1):
        raise ValueError(f"true_cfg is {true_cfg!r}; it must be at least 1, where it is off")
    if negative_prompt is not None and true_cfg == 1:
        raise ValueError("negative_prompt has no effect while true_cfg is 1; give a true_cfg above 1, such as 3")
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        raise ValueError(f"negative_prompt is {negative_prompt!r}; give one string, which serves every picture")
    as_texts("negative_prompt", negative_prompt or "")


def check_callback(callback: object) -> None:
    """A ``ValueError`` where it cannot be called."""
    if callback is not None and not callable(callback):
        raise ValueError(f"callback is {callback!r}; give a function that takes a Step")


def first_step(
    num_steps: int, image: Image.Image | None, strength: Any, shown: bool = False
) -> tuple[int, float | None]:
    """The step that a loop from ``image`` begins with, as diffusers counts it, and the strength by default.

    Raises:
        ValueError: the strength is out of its range, has no use, or leaves nothing of the image.
    """
    if strength is not None and not (is_number(strength, most=1) and strength > 0):
        raise ValueError(f"strength is {strength!r}; it must be above 0 and at most 1, where nothing of image is left")
    if image is None and strength is not None:
        why = "this model is shown the image and starts from noise" if shown else "there is no image to start from"
        raise ValueError(f"strength is {strength}, but {why}; {'' if shown else 'give image, or '}leave it out")
    if image is None:
        return 0, None
    strength = 0.7 if strength is None else strength
    start = min(num_steps - 1, int(num_steps - num_steps * strength))
    if start == 0 and strength < 1:
        said = f"strength is {strength}, and {num_steps} steps take all of that from noise"
        advice = "give more steps, a smaller strength, or 1 if that is meant"
        raise ValueError(f"{said}: nothing of image would be left; {advice}")
    return start, strength


def as_weights(strength: float | Sequence[float] | None, number: int) -> list[float]:
    """Redux's weight of each picture; a ``ValueError`` unless it is one finite number, or as many as pictures."""
    weights = as_list("strength", 1.0 if strength is None else strength)
    weights = weights * number if len(weights) == 1 else weights
    if len(weights) != number or not all(map(is_number, weights)):
        raise ValueError(f"strength is {strength!r}; give one finite number, or one for each of {number} pictures")
    return [float(each) for each in weights]
