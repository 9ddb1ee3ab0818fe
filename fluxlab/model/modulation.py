"""How one vector steers every layer: shift, scale and gate from the time, the guidance and CLIP. Opened in chapter 06.

Axes: batch B, tokens L, channels C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fluxlab.model.linear import Linear
from fluxlab.model.observe import Observed


class ModulationOut(NamedTuple):
    """What steers one sub-layer, the same for every token."""

    shift: Float[Tensor, "batch 1 channels"]
    scale: Float[Tensor, "batch 1 channels"]
    gate: Float[Tensor, "batch 1 channels"]


class Modulation(Observed):
    """``Linear(SiLU(vec))`` cut into shift, scale and gate: once in a single block, twice in a double block.

    Source: AdaLN-Zero of "Scalable Diffusion Models with Transformers", Peebles and Xie 2022.
    """

    def __init__(self, dim: int, double: bool) -> None:
        super().__init__()
        self.multiplier = 6 if double else 3
        self.names = (
            [kind + part for part in ("1", "2") for kind in ModulationOut._fields] if double else ModulationOut._fields
        )
        self.lin = Linear(dim, self.multiplier * dim)

    def forward(self, vec: Float[Tensor, "batch channels"]) -> tuple[ModulationOut, ...]:
        parts = self.lin(F.silu(vec))[:, None, :].chunk(self.multiplier, dim=-1)  # each B 1 C
        seen = [self.see(name, part) for name, part in zip(self.names, parts, strict=True)]
        return tuple(ModulationOut(*seen[i : i + 3]) for i in range(0, self.multiplier, 3))


def modulate(
    x: Float[Tensor, "batch tokens channels"],
    shift: Float[Tensor, "batch 1 channels"],
    scale: Float[Tensor, "batch 1 channels"],
) -> Float[Tensor, "batch tokens channels"]:
    """``x * (1 + scale) + shift``: at zero it changes nothing."""
    return torch.addcmul(shift, x, 1 + scale)


def add_gated(
    x: Float[Tensor, "batch tokens channels"],
    gate: Float[Tensor, "batch 1 channels"],
    update: Float[Tensor, "batch tokens channels"],
) -> Float[Tensor, "batch tokens channels"]:
    """``x + gate * update``: the residual stream takes in what a sub-layer made, as far as the gate is open.

    A gate is taken as it is, without the 1 that is added to a scale: at zero it is shut.
    """
    return torch.addcmul(x, gate, update)
