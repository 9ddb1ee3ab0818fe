"""How one vector steers every layer: shift, scale and gate from the time, the guidance and CLIP. Opened in chapter 06.

Axes: batch B, tokens L, channels C.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fluxlab.model.observe import Observed


class ModulationOut(NamedTuple):
    """What steers one sub-layer, the same for every token: ``(1 + scale) * x + shift`` before it, ``gate`` after it."""

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
        self.lin = nn.Linear(dim, self.multiplier * dim)

    def forward(self, vec: Float[Tensor, "batch channels"]) -> tuple[ModulationOut, ...]:
        parts = self.lin(F.silu(vec))[:, None, :].chunk(self.multiplier, dim=-1)  # each B 1 C
        seen = [self.see(name, part) for name, part in zip(self.names, parts, strict=True)]
        return tuple(ModulationOut(*seen[i : i + 3]) for i in range(0, self.multiplier, 3))
