"""At which times the model is asked, from noise at t = 1 to the picture at t = 0. Opened in chapter 03.

The more image tokens, the more noise it takes to hide a picture, so the schedule of [dev] lingers near t = 1.
"""

import math

from fluxlab.arguments import whole


def shift_mu(image_tokens: int) -> float:
    """How far the schedule bends: linear in the image tokens, 0.5 at 256 and 1.15 at 4096, and on beyond both."""
    return 0.5 + (1.15 - 0.5) * (image_tokens - 256) / (4096 - 256)


def shift_time(t: float, mu: float) -> float:
    """``e^mu / (e^mu + 1/t - 1)``: 0 and 1 stay, what is between moves towards 1.

    Source: "Scaling Rectified Flow Transformers", Esser et al. 2024, section 5.3.2, with alpha = e^mu.
    """
    return math.exp(mu) * t / (math.exp(mu) * t + (1 - t))  # so that 1 gives 1 exactly


def schedule(num_steps: int, image_tokens: int, shift: bool = True) -> list[float]:
    """``num_steps + 1`` times that fall from 1 to 0, bent by the image tokens of one picture ([dev]).

    Without ``shift`` they fall evenly ([schnell]).

    Raises:
        ValueError: one of the two is not a whole number of at least 1; or shifted times would not fall.
    """
    num_steps = whole("num_steps", num_steps)
    image_tokens = whole("image_tokens", image_tokens, most=2**17 if shift else 2**64)
    even = [1 - i / num_steps for i in range(num_steps)] + [0.0]
    return [shift_time(t, shift_mu(image_tokens)) for t in even] if shift else even
