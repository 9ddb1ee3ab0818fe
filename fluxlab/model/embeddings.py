"""Numbers become vectors: the timestep, the guidance and CLIP's pooled output. Opened in chapter 04.

Axes: batch B, channels C.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fluxlab.config import EMBEDDING_DIM

TIME_FACTOR = 1000.0  # t in [0, 1] and guidance are both multiplied by this before they are embedded


def timestep_embedding(
    t: Float[Tensor, " batch"], dim: int = EMBEDDING_DIM, max_period: float = 10_000.0
) -> Float[Tensor, "batch {dim}"]:
    """Sinusoidal embedding of a number: cosines first, then sines, in float32.

    ``angle_i = 1000 t * max_period^(-i / (dim / 2))`` for ``i = 0 .. dim/2 - 1``

    Args:
        t: one number for each item of the batch, a time in [0, 1] or a guidance strength.
        dim: width of the embedding, even.
        max_period: how far the frequencies reach: from 1 down to nearly ``1 / max_period``.

    Raises:
        ValueError: ``dim`` is odd or not positive.

    Source: "Denoising Diffusion Probabilistic Models", Ho et al. 2020, after "Attention Is All You Need", 2017.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim is {dim}; it must be a positive even number, half for cosines and half for sines")
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = (TIME_FACTOR * t.float())[:, None] * frequencies  # B, dim/2; in bfloat16, 750 would become 752
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear: lifts an embedding to the width of the model."""

    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.silu = nn.SiLU()
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Float[Tensor, "batch in_dim"]) -> Float[Tensor, "batch channels"]:
        return self.out_layer(self.silu(self.in_layer(x)))
