"""Where a token is: rotary position embedding on three axes (index, row, column). Opened in chapter 05.

Each pair of neighbouring features of a head is turned by an angle that grows with the position. Text tokens sit at
(0, 0, 0), which turns nothing. Axes: batch B, tokens L, heads H, head width D.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Num
from torch import Tensor, nn

Heads = Float[Tensor, "batch heads tokens dim"]
Rotations = Float[Tensor, "#batch 1 tokens pairs 2 2"]  # one 2x2 matrix for each pair of features


def rope(positions: Num[Tensor, "batch tokens"], dim: int, theta: float) -> Float[Tensor, "batch tokens pairs 2 2"]:
    """Rotation matrices for positions along one axis, in float32.

    ``angle = position * theta^(-2i / dim)`` for the pair ``i = 0 .. dim/2 - 1``, as ``[[cos, -sin], [sin, cos]]``.
    The angles are computed in float64 and then cast, so leave the positions on the CPU for a device without float64.

    Args:
        positions: whole numbers, in float32 or an integer dtype: bfloat16 is not exact above 256.
        dim: features of a head that belong to this axis, even.
        theta: base of the frequencies; 10000 in FLUX.

    Raises:
        ValueError: ``dim`` is odd or not positive.

    Source: "RoFormer", Su et al. 2021.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim is {dim}; RoPE turns features in pairs, so it must be a positive even number")
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    angles = positions[..., None] * frequencies  # B L D/2
    cos, sin = angles.cos().float(), angles.sin().float()
    return rearrange(torch.stack((cos, -sin, sin, cos), dim=-1), "b l d (i j) -> b l d i j", i=2, j=2)


class EmbedND(nn.Module):
    """The rotations of a sequence whose tokens have a position on several axes, the axes side by side."""

    def __init__(self, theta: int, axes_dim: tuple[int, ...]) -> None:
        super().__init__()
        self.theta = theta
        self.axes_dim = axes_dim

    def forward(self, ids: Num[Tensor, "batch tokens axes"]) -> Float[Tensor, "batch 1 tokens pairs 2 2"]:
        per_axis = [rope(ids[..., axis], dim, self.theta) for axis, dim in enumerate(self.axes_dim)]
        return torch.cat(per_axis, dim=-3).unsqueeze(1)  # B 1 L D/2 2 2: one for all heads


def apply_rope(q: Heads, k: Heads, pe: Rotations) -> tuple[Heads, Heads]:
    """Turn queries and keys, in float32 at least; the dtype that came in goes out."""
    return rotate(q, pe), rotate(k, pe)


def rotate(x: Heads, pe: Rotations) -> Heads:
    """``(x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos)`` for each pair of neighbouring features.

    A matrix times a vector is the sum of its columns, each times one number of the vector.
    """
    x0, x1 = x.unflatten(-1, (-1, 1, 2)).unbind(-1)  # each B H L D/2 1
    turned = pe[..., 0] * x0 + pe[..., 1] * x1  # B H L D/2 2, in float32 if x is narrower
    return turned.flatten(-2).type_as(x)
