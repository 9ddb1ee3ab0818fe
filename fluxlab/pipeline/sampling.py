"""The loop: ask the model which way, take a step, until the noise is a picture. Opened in chapter 11."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from fluxlab.pipeline.checks import as_list, check_callback, check_guidance, finite
from fluxlab.pipeline.inputs import FluxInputs
from fluxlab.pipeline.shown import Shown


@dataclass(frozen=True, eq=False)
class Step:
    """One step of the loop."""

    index: int  # 0 for the first
    t: float  # the time it starts from
    t_next: float  # the time it goes to
    img: Float[Tensor, "batch image_tokens channels"]  # the tokens at t
    velocity: Float[Tensor, "batch image_tokens channels"]  # what was predicted: noise minus picture
    img_next: Float[Tensor, "batch image_tokens channels"]  # the tokens at t_next

    @property
    def clean(self) -> Float[Tensor, "batch image_tokens channels"]:
        """The clean tokens that the model sees coming: one straight step from t all the way to 0."""
        return self.img - self.t * self.velocity


@torch.no_grad()
def denoise(
    model: Callable[..., Tensor],
    inputs: FluxInputs,
    times: Sequence[float],
    negative: FluxInputs | None = None,
    true_cfg: float = 1.0,
    callback: Callable[[Step], None] | None = None,
    progress: bool = True,
    shown: Shown | None = None,
) -> Float[Tensor, "batch image_tokens channels"]:
    """Euler steps along the predicted velocity: ``img + (t_next - t) * velocity``.

    Args:
        model: predicts the velocity. If it has a ``loop_begins``, that is told what the forwards will be given, and the
            times, before the first.
        inputs: the first forward's; ``img`` is where the loop starts. ``timesteps`` is set anew at every step.
        times: as ``schedule`` gives them: falling, from 1 for noise to 0; one step between each and the next.
        negative: the inputs of a negative prompt, for true classifier-free guidance; a second forward a step.
        true_cfg: its strength; at 1 the negative prompt makes no difference and is not run.
        callback: called after every step.
        progress: whether to draw a bar.
        shown: what the model is shown beside the noise; the loop moves the noise alone.

    Raises:
        ValueError: the times do not fall or lie beyond 0 and 1; ``true_cfg`` without ``negative``; noise and what
            is shown do not have the channels that the model takes; ``inputs.img`` is not finite, or what is predicted,
            at the first step where it is so.

    Source: "Flow Straight and Fast", Liu et al. 2022; "Classifier-Free Diffusion Guidance", Ho and Salimans 2022.
    """
    times = _checked(times)
    check_guidance(None, true_cfg, None)
    check_callback(callback)
    true_cfg = float(true_cfg)
    if true_cfg != 1 and negative is None:
        raise ValueError(f"true_cfg is {true_cfg}, but there is no negative prompt's inputs to lead away from")
    negative = None if true_cfg == 1 else negative
    shown = shown or Shown()
    channels = shown.beside(inputs).img.shape[2]
    if (wanted := getattr(getattr(model, "config", None), "in_channels", channels)) != channels:
        said = f"the model takes {wanted} channels a token, and noise with what is shown beside it has {channels}"
        raise ValueError(f"{said}; give shown, as Shown.hole or Shown.control make it, to a model of that kind alone")
    dtype = inputs.img.dtype
    img = finite(inputs.img, "inputs.img").to(torch.promote_types(dtype, torch.float32))  # many small steps add up here
    if callable(told := getattr(model, "loop_begins", None)):
        told([shown.beside(inputs)] + ([] if negative is None else [shown.away().beside(negative)]), times)
    steps = list(pairwise(times))
    for index, (t, t_next) in enumerate(tqdm(steps, desc="sampling", unit="step", disable=not progress)):
        timesteps = torch.full((img.shape[0],), t, dtype=torch.float32, device=img.device)
        moved = {"img": img.to(dtype), "timesteps": timesteps}
        velocity = model(**shown.beside(replace(inputs, **moved)).kwargs())[:, : img.shape[1]]
        if negative is not None:
            away = model(**shown.away().beside(replace(negative, **moved)).kwargs())[:, : img.shape[1]]
            velocity = away + true_cfg * (velocity - away)
        if velocity.shape != img.shape:
            raise ValueError(f"the model predicts {tuple(velocity.shape)}, and img to move is {tuple(img.shape)}")
        velocity = finite(velocity, f"what the model predicted at step {index}").to(img)
        img_next = shown.mixed(img + (t_next - t) * velocity, t_next)
        if callback is not None:
            callback(Step(index, t, t_next, img, velocity, img_next))
        img = img_next
    return img


def _checked(times: Sequence[float]) -> list[float]:
    numbers = as_list("times", times)
    half = str(getattr(times, "dtype", "")).endswith("float16")
    fall = all(isinstance(t, Real) for t in numbers) and all(1 >= a > b >= 0 for a, b in pairwise(numbers))
    if half or not fall or len(numbers) < 2:
        wanted = "two or more numbers that fall from 1, which is noise, to 0, which is the picture"
        raise ValueError(f"times is {times!r}; give {wanted}: not in thousandths, and not in half precision")
    return numbers
