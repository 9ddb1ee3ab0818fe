"""Where a token is: rotary position embedding on three axes (index, row, column). Opened in chapter 05.

Each pair of neighbouring features of a head is turned by an angle that grows with the position. Text tokens sit at
(0, 0, 0), which turns nothing. Axes: batch B, tokens L, heads H, head width D.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float, Num
from torch import Tensor, nn


def rope(positions: Num[Tensor, "batch tokens"], dim: int, theta: float) -> Float[Tensor, "batch tokens pairs 2 2"]:
    """Rotation matrices for positions along one axis, in float32.

    ``angle = position * theta^(-2i / dim)`` for the pair ``i = 0 .. dim/2 - 1``, as ``[[cos, -sin], [sin, cos]]``.
    The angles are computed in float64 (float32 where a device lacks it) and cast.

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
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=dtype, device=positions.device) / dim)
    angles = positions[..., None].to(dtype) * frequencies  # B L D/2
    cos, sin = angles.cos().float(), angles.sin().float()
    return rearrange(torch.stack((cos, -sin, sin, cos), dim=-1), "b l d (i j) -> b l d i j", i=2, j=2)


class EmbedND(nn.Module):
    """One table of rotations for a sequence whose tokens have a position on several axes."""

    def __init__(self, theta: int, axes_dim: tuple[int, ...]) -> None:
        super().__init__()
        self.theta = theta
        self.axes_dim = axes_dim

    def forward(self, ids: Num[Tensor, "batch tokens axes"]) -> Float[Tensor, "batch 1 tokens pairs 2 2"]:
        per_axis = [rope(ids[..., axis], dim, self.theta) for axis, dim in enumerate(self.axes_dim)]
        return torch.cat(per_axis, dim=-3).unsqueeze(1)  # B 1 L D/2 2 2: one for all heads


def apply_rope(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads tokens dim"],
    rotation: Float[Tensor, "#batch 1 tokens pairs 2 2"],
) -> tuple[Float[Tensor, "batch heads tokens dim"], Float[Tensor, "batch heads tokens dim"]]:
    """Turn queries and keys, in float32 at least; the dtype that came in goes out.

    ``(x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos)`` for each pair of neighbouring features. A pair is a complex
    number and a turn the product with ``cos + i sin``, the first column of its matrix: one pass over the memory.
    """
    turn = torch.view_as_complex(rotation[..., 0].contiguous())  # B 1 L D/2
    return _turned(q, turn), _turned(k, turn)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))  # B H L D/2 2
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).type_as(x)
