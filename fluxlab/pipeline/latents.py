"""What the tokens are: noise, packing, and the place of each token. Opened in chapter 02.

The VAE makes a latent 8 times smaller than the picture; 2x2 patches of the latent are the image tokens, so one token
stands for 16x16 pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from fluxlab.arguments import whole
from fluxlab.pipeline.checks import as_list

COMPRESSION = 8  # pixels along one side of a latent cell
PATCH = 2  # latent cells along one side of a token
PIXELS = COMPRESSION * PATCH  # pixels along one side of a token


def grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of image tokens of a picture of this size in pixels, a partial token counted whole.

    Raises:
        ValueError: a side is not a whole number of at least 1.
    """
    return -(-whole("height", height) // PIXELS), -(-whole("width", width) // PIXELS)


def as_side(name: str, value: Any) -> int:
    """Of a picture to paint, in pixels; a ``ValueError`` where it is no whole number of tokens, or above 32,000."""
    side = whole(name, value, most=32_000)
    if side % PIXELS:
        said = f"{name} is {side}; it must be a multiple of {PIXELS}, one token is {PIXELS}x{PIXELS} pixels"
        raise ValueError(f"{said}: try {max(PIXELS, round(side / PIXELS) * PIXELS)}")
    return side


def noise(
    seeds: int | Sequence[int], height: int, width: int, channels: int = 16, device: torch.device | str = "cpu"
) -> Float[Tensor, "batch channels h w"]:
    """Unit noise in the latent's shape, one seed for each item of the batch, in float32.

    It is drawn on the CPU, so that a seed gives the same start on any device and in any batch.

    Raises:
        ValueError: a seed is not a whole number of 64 bits, or a side or ``channels`` not one of at least 1.
    """
    rows, columns = grid(height, width)
    shape = (whole("channels", channels), PATCH * rows, PATCH * columns)
    generators = [generator(seed) for seed in as_list("seed", seeds)]
    each = [torch.randn(shape, generator=seeded, dtype=torch.float32, device="cpu") for seeded in generators]
    return torch.stack(each).to(device)


def generator(seed: int) -> torch.Generator:
    """Of random numbers on the CPU; a seed is any whole number of 64 bits."""
    return torch.Generator("cpu").manual_seed(whole("seed", seed, -(2**63)))


def pack(latent: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch image_tokens patch"]:
    """Cut a latent into 2x2 patches, row by row: 16 channels become 64 numbers a token, channel slowest.

    Raises:
        ValueError: a side of the latent is odd.
    """
    if latent.shape[-2] % PATCH or latent.shape[-1] % PATCH:
        raise ValueError(f"latent has sides {tuple(latent.shape[-2:])}; both must be even, to be cut into 2x2 patches")
    return rearrange(latent, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PATCH, pw=PATCH)


def unpack(
    tokens: Float[Tensor, "batch image_tokens patch"], height: int, width: int
) -> Float[Tensor, "batch channels h w"]:
    """The latent that ``pack`` cut, for a picture of this size in pixels.

    Raises:
        ValueError: the number of tokens is not that of the size.
    """
    rows, columns = grid(height, width)
    if tokens.shape[1] != rows * columns:
        size = f"a picture {height} high and {width} wide has {rows} x {columns} = {rows * columns}"
        said = f"tokens has {tokens.shape[1]} image tokens, but {size}"
        raise ValueError(f"{said}; give the size that the tokens were packed from")
    return rearrange(tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=rows, ph=PATCH, pw=PATCH)


def image_ids(
    batch: int, height: int, width: int, index: int = 0, device: torch.device | str = "cpu"
) -> Float[Tensor, "batch image_tokens 3"]:
    """Index, row and column of each image token of pictures of a size in pixels, in float32, in the order of ``pack``.

    The index is 0 for the picture that is made; Kontext puts 1 on the picture it is shown.

    Raises:
        ValueError: a side or the batch is not a whole number of at least 1, or the index not one of at least 0.
    """
    rows, columns = grid(height, width)
    ids = torch.zeros(rows, columns, 3, dtype=torch.float32, device=device)
    ids[..., 0] = whole("index", index, 0)
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)[None, :]
    return ids.reshape(1, rows * columns, 3).repeat(whole("batch", batch), 1, 1)


def text_ids(batch: int, text_tokens: int, device: torch.device | str = "cpu") -> Float[Tensor, "batch text_tokens 3"]:
    """Zeros: every text token sits at (0, 0, 0), and RoPE leaves it as it is."""
    shape = (whole("batch", batch), whole("text_tokens", text_tokens, 0), 3)
    return torch.zeros(shape, dtype=torch.float32, device=device)


def ids_device(device: torch.device | str) -> torch.device | str:
    """Where the ids of a model on this device are kept: angles are computed there in float64, which MPS lacks."""
    return "cpu" if torch.device(device).type == "mps" else device
