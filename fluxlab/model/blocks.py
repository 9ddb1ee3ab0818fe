"""The three kinds of layer a token passes: double block, single block, last layer. Opened in chapters 07 to 09.

Text comes before image wherever they are joined.
Axes: batch B, tokens L = text T + image I, heads H, head width D, channels C, hidden width M of the MLP.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fluxlab.model.attention import QKNorm, SelfAttention, attention, split_heads
from fluxlab.model.linear import Linear, linear_gelu
from fluxlab.model.modulation import Modulation, add_gated, modulate
from fluxlab.model.observe import Observed


def layer_norm(dim: int) -> nn.LayerNorm:
    """LayerNorm without weights of its own: the modulation that follows takes their place."""
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class MLP(nn.Sequential):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(Linear(dim, hidden_dim), nn.GELU(approximate="tanh"), Linear(hidden_dim, dim))

    def forward(self, x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
        way_in, gelu, way_out = self
        return way_out(linear_gelu(x, way_in, gelu)[1])


class DoubleStreamBlock(Observed):
    """Image and text, each with weights of its own, meet in one attention.

    Source: MMDiT of "Scaling Rectified Flow Transformers", Esser et al. 2024.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_dim: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.img_mod = Modulation(hidden_size, double=True)
        self.img_norm1 = layer_norm(hidden_size)
        self.img_attn = SelfAttention(hidden_size, num_heads, qkv_bias)
        self.img_norm2 = layer_norm(hidden_size)
        self.img_mlp = MLP(hidden_size, mlp_hidden_dim)

        self.txt_mod = Modulation(hidden_size, double=True)
        self.txt_norm1 = layer_norm(hidden_size)
        self.txt_attn = SelfAttention(hidden_size, num_heads, qkv_bias)
        self.txt_norm2 = layer_norm(hidden_size)
        self.txt_mlp = MLP(hidden_size, mlp_hidden_dim)

    def forward(
        self,
        img: Float[Tensor, "batch image_tokens channels"],
        txt: Float[Tensor, "batch text_tokens channels"],
        vec: Float[Tensor, "batch channels"],
        pe: Float[Tensor, "#batch 1 tokens pairs 2 2"],
    ) -> tuple[Float[Tensor, "batch image_tokens channels"], Float[Tensor, "batch text_tokens channels"]]:
        img, txt = self.see("img.input", img), self.see("txt.input", txt)
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)

        # they meet
        img_attn, txt_attn = self._attend(
            modulate(self.img_norm1(img), img_mod1.shift, img_mod1.scale),
            modulate(self.txt_norm1(txt), txt_mod1.shift, txt_mod1.scale),
            pe,
        )
        img = self.see("img.middle", add_gated(img, img_mod1.gate, self.img_attn.proj(img_attn)))
        txt = self.see("txt.middle", add_gated(txt, txt_mod1.gate, self.txt_attn.proj(txt_attn)))

        # and go on apart
        img_mlp = self.img_mlp(modulate(self.img_norm2(img), img_mod2.shift, img_mod2.scale))
        img = self.see("img.output", add_gated(img, img_mod2.gate, img_mlp))
        txt_mlp = self.txt_mlp(modulate(self.txt_norm2(txt), txt_mod2.shift, txt_mod2.scale))
        txt = self.see("txt.output", add_gated(txt, txt_mod2.gate, txt_mlp))
        return img, txt

    def _attend(
        self,
        img: Float[Tensor, "batch image_tokens channels"],
        txt: Float[Tensor, "batch text_tokens channels"],
        pe: Float[Tensor, "#batch 1 tokens pairs 2 2"],
    ) -> tuple[Float[Tensor, "batch image_tokens channels"], Float[Tensor, "batch text_tokens channels"]]:
        """One attention over both streams, each with queries, keys and values of its own."""
        q, k, v = self.txt_attn.project(txt)
        img_q, img_k, img_v = self.img_attn.project(img)
        q = torch.cat((q, img_q), dim=2)  # B H T+I D
        del img_q  # what is joined is not kept apart too
        k = torch.cat((k, img_k), dim=2)
        del img_k
        v = torch.cat((v, img_v), dim=2)
        del img_v
        joint = attention(q, k, v, pe, self.see)  # B T+I C
        return joint[:, txt.shape[1] :], joint[:, : txt.shape[1]]


class SingleStreamBlock(Observed):
    """Text and image as one sequence; attention and MLP side by side, from one Linear and into one Linear.

    Source: "Scaling Vision Transformers to 22 Billion Parameters", Dehghani et al. 2023.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear1 = Linear(hidden_size, 3 * hidden_size + mlp_hidden_dim)  # qkv and the MLP's way in
        self.linear2 = Linear(hidden_size + mlp_hidden_dim, hidden_size)  # proj and the MLP's way out
        self.norm = QKNorm(hidden_size // num_heads)
        self.pre_norm = layer_norm(hidden_size)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = Modulation(hidden_size, double=False)

    def forward(
        self,
        x: Float[Tensor, "batch tokens channels"],
        vec: Float[Tensor, "batch channels"],
        pe: Float[Tensor, "#batch 1 tokens pairs 2 2"],
    ) -> Float[Tensor, "batch tokens channels"]:
        x = self.see("input", x)
        (mod,) = self.modulation(vec)
        branches = self._branches(modulate(self.pre_norm(x), mod.shift, mod.scale), pe)
        x = add_gated(x, mod.gate, self.linear2(torch.cat(branches, dim=-1)))  # B L C+M -> B L C
        return self.see("output", x)

    def _branches(
        self, x: Float[Tensor, "batch tokens channels"], pe: Float[Tensor, "#batch 1 tokens pairs 2 2"]
    ) -> tuple[Float[Tensor, "batch tokens channels"], Float[Tensor, "batch tokens hidden"]]:
        """Attention and the MLP's hidden features, side by side."""
        qkv, hidden = linear_gelu(x, self.linear1, self.mlp_act, start=3 * x.shape[-1])
        del x  # what is read does not stay in memory
        q, k, v = split_heads(qkv, self.num_heads)
        del qkv
        q, k = self.norm(self.see("q_raw", q), self.see("k_raw", k))
        return attention(q, k, v, pe, self.see), hidden


class LastLayer(Observed):
    """Features become one velocity for each number of the token's patch, modulated a last time."""

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))

    def forward(
        self, x: Float[Tensor, "batch image_tokens channels"], vec: Float[Tensor, "batch channels"]
    ) -> Float[Tensor, "batch image_tokens out_channels"]:
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)  # the diffusers layout swaps them
        return self.linear(modulate(self.norm_final(x), self.see("shift", shift), self.see("scale", scale)))
