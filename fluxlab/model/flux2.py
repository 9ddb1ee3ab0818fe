"""FLUX.2, the next model of the same house: what it does differently. Opened in chapter 18.

One modulation serves all double blocks of a stream, and one all single blocks; no Linear has a bias; the MLP is gated
(SwiGLU); there are four axes, and text has places on the last of them; there is no CLIP, and the text comes from three
layers of a language model, side by side. Parameter names are the published checkpoint's.

Axes: batch B, tokens L = text T + image I, channels C, hidden width M of the MLP.
"""

from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from fluxlab.config import EMBEDDING_DIM, Flux2Config
from fluxlab.model.blocks import DoubleStreamBlock, ImageTokens, LastLayer, SingleStreamBlock, TextTokens, Tokens
from fluxlab.model.embeddings import MLPEmbedder, timestep_embedding
from fluxlab.model.modulation import Modulation, ModulationOut
from fluxlab.model.observe import Observed
from fluxlab.model.rope import EmbedND, Rotations
from fluxlab.model.transformer import Flux

Steer = tuple[ModulationOut, ...]


class SwiGLU(nn.Module):
    """``silu(gate) * x`` of the two halves of the last axis ("GLU Variants Improve Transformer", Shazeer 2020)."""

    def forward(self, x: Float[Tensor, "*shape double"]) -> Float[Tensor, "*shape hidden"]:
        gate, x = x.chunk(2, dim=-1)
        return F.silu(gate) * x


def gated_mlp(hidden_size: int, mlp_hidden_dim: int) -> nn.Sequential:
    """Gate and value side by side, their product, and back."""
    return nn.Sequential(nn.Linear(hidden_size, 2 * mlp_hidden_dim), SwiGLU(), nn.Linear(mlp_hidden_dim, hidden_size))


class DoubleStreamBlock2(DoubleStreamBlock):
    """FLUX.1's double block with a gated MLP, steered from outside."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_dim: int) -> None:
        super().__init__(hidden_size, num_heads, mlp_hidden_dim)
        self.img_mod = self.txt_mod = None  # type: ignore[assignment]
        self.img_mlp = gated_mlp(hidden_size, mlp_hidden_dim)  # type: ignore[assignment]
        self.txt_mlp = gated_mlp(hidden_size, mlp_hidden_dim)  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self, img: ImageTokens, txt: TextTokens, img_mod: Steer, txt_mod: Steer, pe: Rotations
    ) -> tuple[ImageTokens, TextTokens]:
        img, txt = self.see("img.input", img), self.see("txt.input", txt)
        (img_mod1, img_mod2), (txt_mod1, txt_mod2) = img_mod, txt_mod
        img_attended, txt_attended = self.attend(
            (1 + img_mod1.scale) * self.img_norm1(img) + img_mod1.shift,
            (1 + txt_mod1.scale) * self.txt_norm1(txt) + txt_mod1.shift,
            pe,
        )
        img = self.see("img.middle", img + img_mod1.gate * self.img_attn.proj(img_attended))
        txt = self.see("txt.middle", txt + txt_mod1.gate * self.txt_attn.proj(txt_attended))
        img_update = self.img_mlp((1 + img_mod2.scale) * self.img_norm2(img) + img_mod2.shift)
        txt_update = self.txt_mlp((1 + txt_mod2.scale) * self.txt_norm2(txt) + txt_mod2.shift)
        img = self.see("img.output", img + img_mod2.gate * img_update)
        return img, self.see("txt.output", txt + txt_mod2.gate * txt_update)


class SingleStreamBlock2(SingleStreamBlock):
    """FLUX.1's single block with a gated MLP, steered from outside."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_dim: int) -> None:
        super().__init__(hidden_size, num_heads, 2 * mlp_hidden_dim)
        self.modulation = None  # type: ignore[assignment]
        self.linear2 = nn.Linear(hidden_size + mlp_hidden_dim, hidden_size)
        self.mlp_act = SwiGLU()  # type: ignore[assignment]

    def forward(self, x: Tokens, mod: ModulationOut, pe: Rotations) -> Tokens:  # type: ignore[override]
        x = self.see("input", x)
        side_by_side = torch.cat(self.branches((1 + mod.scale) * self.pre_norm(x) + mod.shift, pe), dim=-1)
        return self.see("output", x + mod.gate * self.linear2(side_by_side))


class Flux2(Observed):
    """The rectified flow transformer of FLUX.2, Black Forest Labs 2025. Sizes come from the config alone."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.config = config
        c = config
        sizes = c.hidden_size, c.num_heads, c.mlp_hidden_dim
        self.pe_embedder = EmbedND(c.theta, c.axes_dim)
        self.img_in = nn.Linear(c.in_channels, c.hidden_size)
        self.txt_in = nn.Linear(c.context_in_dim, c.hidden_size)
        self.time_in = MLPEmbedder(EMBEDDING_DIM, c.hidden_size)
        self.guidance_in = MLPEmbedder(EMBEDDING_DIM, c.hidden_size) if c.guidance_embed else None
        self.double_stream_modulation_img = Modulation(c.hidden_size, double=True)
        self.double_stream_modulation_txt = Modulation(c.hidden_size, double=True)
        self.single_stream_modulation = Modulation(c.hidden_size, double=False)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock2(*sizes) for _ in range(c.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock2(*sizes) for _ in range(c.depth_single_blocks))
        self.final_layer = LastLayer(c.hidden_size, c.in_channels)
        for module in self.modules():  # no Linear of FLUX.2 has a bias: those of shared parts lose theirs
            if isinstance(module, nn.Linear):
                module.register_parameter("bias", None)

    _check: Any = Flux._check

    def forward(
        self,
        img: Float[Tensor, "batch image_tokens in_channels"],
        img_ids: Num[Tensor, "batch image_tokens axes"],
        txt: Float[Tensor, "batch text_tokens context_dim"],
        txt_ids: Num[Tensor, "batch text_tokens axes"],
        timesteps: Float[Tensor, " batch"],
        guidance: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch image_tokens in_channels"]:
        """Predict the velocity, noise minus data, of each image token; arguments are those of ``Flux.forward``.

        The ids have four numbers: which picture (0 for the one that is made, 10, 20, … for those it is shown), row,
        column, and for text its place in the prompt.

        Raises:
            ValueError: as ``Flux.forward`` says.
        """
        self._check(img=img, img_ids=img_ids, txt=txt, txt_ids=txt_ids, timesteps=timesteps, guidance=guidance)
        img, timesteps = self.see("img", img), self.see("timesteps", timesteps)
        vec = self.time_in(timestep_embedding(timesteps).to(img))
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(img))
        vec = self.see("vec", vec)
        img_mod, txt_mod = self.double_stream_modulation_img(vec), self.double_stream_modulation_txt(vec)
        (mod,) = self.single_stream_modulation(vec)
        pe = self.see("pe", self.pe_embedder(torch.cat((txt_ids, img_ids), dim=1)).to(img.device))
        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt, img_mod, txt_mod, pe)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, mod, pe)
        return self.see("velocity", self.final_layer(x[:, txt.shape[1] :], vec))
