"""Attention: queries and keys are normed and rotated, then every token looks at every token. Opened in chapter 07.

There is no mask anywhere in FLUX, the padding of the text included.
Axes: batch B, tokens L, heads H, head width D, channels C = H * D. In FLUX.1: H 24, D 128.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fluxlab.model.observe import Observed, See, unseen
from fluxlab.model.rope import Heads, Rotations, apply_rope


def attention(q: Heads, k: Heads, v: Heads, pe: Rotations, see: See = unseen) -> Float[Tensor, "batch tokens channels"]:
    """Rotate q and k, attend, and lay the heads side by side: ``softmax(q k^T / sqrt(D)) v``."""
    q, k = apply_rope(q, k, pe)
    q, k, v = see("q", q), see("k", k), see("v", v)  # each B H L D
    return see("attended", rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))


def split_heads(qkv: Float[Tensor, "batch tokens qkv"], heads: int) -> Float[Tensor, "3 batch heads tokens dim"]:
    """Queries, keys and values of one Linear's output, which is packed as ``(K H D)``."""
    return rearrange(qkv, "b l (k h d) -> k b h l d", k=3, h=heads)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + 1e-6) * scale`` over the last axis, in float32 at least.

    Source: "Root Mean Square Layer Normalization", Zhang and Sennrich 2019.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
        return F.rms_norm(x, self.scale.shape, self.scale, eps=1e-6)


class QKNorm(nn.Module):
    """RMSNorm of queries and keys, each with a scale of its own. It keeps the scores from growing; v is left alone.

    Source: "Scaling Vision Transformers to 22 Billion Parameters", Dehghani et al. 2023.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Heads, k: Heads) -> tuple[Heads, Heads]:
        return self.query_norm(q), self.key_norm(k)


class SelfAttention(Observed):
    """One stream's share of a double block's attention: qkv before it, a projection after. The block attends."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Float[Tensor, "batch tokens channels"]) -> tuple[Heads, Heads, Heads]:
        """Queries and keys, normed, and values."""
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        q, k = self.norm(self.see("q_raw", q), self.see("k_raw", k))
        return q, k, v
