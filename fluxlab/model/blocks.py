"""The three kinds of layer a token passes: double block, single block, last layer. Opened in chapters 07 to 09.

Text comes before image wherever they are joined.
Axes: batch B, tokens L = text T + image I, heads H, head width D, channels C, hidden width M of the MLP.
In FLUX.1 [dev]: T 512, I 4096 at 1024 x 1024, H 24, D 128, C 3072, M 12288. ``see`` names a tensor for whoever looks.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fluxlab.model.attention import QKNorm, SelfAttention, attention, split_heads
from fluxlab.model.modulation import Modulation
from fluxlab.model.observe import Observed
from fluxlab.model.rope import Rotations

ImageTokens = Float[Tensor, "batch image_tokens channels"]
TextTokens = Float[Tensor, "batch text_tokens channels"]
Tokens = Float[Tensor, "batch tokens channels"]
Vector = Float[Tensor, "batch channels"]


def layer_norm(dim: int) -> nn.LayerNorm:
    """LayerNorm without weights of its own: the modulation that follows takes their place."""
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class MLP(nn.Sequential):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(nn.Linear(dim, hidden_dim), nn.GELU(approximate="tanh"), nn.Linear(hidden_dim, dim))


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

    def forward(self, img: ImageTokens, txt: TextTokens, vec: Vector, pe: Rotations) -> tuple[ImageTokens, TextTokens]:
        img, txt = self.see("img.input", img), self.see("txt.input", txt)
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)

        # they meet in one attention
        img_attended, txt_attended = self.attend(
            (1 + img_mod1.scale) * self.img_norm1(img) + img_mod1.shift,
            (1 + txt_mod1.scale) * self.txt_norm1(txt) + txt_mod1.shift,
            pe,
        )

        # and each goes on with its share
        img = self.see("img.middle", img + img_mod1.gate * self.img_attn.proj(img_attended))
        txt = self.see("txt.middle", txt + txt_mod1.gate * self.txt_attn.proj(txt_attended))
        img_update = self.img_mlp((1 + img_mod2.scale) * self.img_norm2(img) + img_mod2.shift)
        txt_update = self.txt_mlp((1 + txt_mod2.scale) * self.txt_norm2(txt) + txt_mod2.shift)
        img = self.see("img.output", img + img_mod2.gate * img_update)
        txt = self.see("txt.output", txt + txt_mod2.gate * txt_update)
        return img, txt

    def attend(self, img: ImageTokens, txt: TextTokens, pe: Rotations) -> tuple[ImageTokens, TextTokens]:
        """One attention over both streams, each with queries, keys and values of its own."""
        img_q, img_k, img_v = self.img_attn.project(img)
        txt_q, txt_k, txt_v = self.txt_attn.project(txt)
        q = torch.cat((txt_q, img_q), dim=2)  # B H T+I D
        k = torch.cat((txt_k, img_k), dim=2)
        v = torch.cat((txt_v, img_v), dim=2)
        joint = attention(q, k, v, pe, self.see)  # B T+I C
        return joint[:, txt.shape[1] :], joint[:, : txt.shape[1]]


class SingleStreamBlock(Observed):
    """Text and image as one sequence; attention and MLP side by side, from one Linear and into one Linear.

    Source: "Scaling Vision Transformers to 22 Billion Parameters", Dehghani et al. 2023.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_dim: int) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.mlp_hidden_dim = hidden_size, num_heads, mlp_hidden_dim
        self.linear1 = nn.Linear(hidden_size, 3 * hidden_size + mlp_hidden_dim)  # qkv and the MLP's way in
        self.linear2 = nn.Linear(hidden_size + mlp_hidden_dim, hidden_size)  # proj and the MLP's way out
        self.norm = QKNorm(hidden_size // num_heads)
        self.pre_norm = layer_norm(hidden_size)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = Modulation(hidden_size, double=False)

    def forward(self, x: Tokens, vec: Vector, pe: Rotations) -> Tokens:
        x = self.see("input", x)
        (mod,) = self.modulation(vec)
        side_by_side = torch.cat(self.branches((1 + mod.scale) * self.pre_norm(x) + mod.shift, pe), dim=-1)
        return self.see("output", x + mod.gate * self.linear2(side_by_side))  # B L C+M -> B L C

    def branches(self, x: Tokens, pe: Rotations) -> tuple[Tokens, Float[Tensor, "batch tokens hidden"]]:
        """Attention's output and the MLP's hidden features, from one Linear."""
        qkv, mlp = self.linear1(x).split((3 * self.hidden_size, self.mlp_hidden_dim), dim=-1)
        q, k, v = split_heads(qkv, self.num_heads)  # each B H L D
        q, k = self.norm(self.see("q_raw", q), self.see("k_raw", k))
        return attention(q, k, v, pe, self.see), self.mlp_act(mlp)


class LastLayer(Observed):
    """Features become one velocity for each number of the token's patch, modulated a last time."""

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: ImageTokens, vec: Vector) -> Float[Tensor, "batch image_tokens out_channels"]:
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)  # the diffusers layout swaps them
        shift, scale = self.see("shift", shift), self.see("scale", scale)
        return self.linear((1 + scale) * self.norm_final(x) + shift)
