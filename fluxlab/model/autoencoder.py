"""Pixels to latents and back: the VAE, 8 times smaller on a side and 16 channels deep. Opened in chapter 10.

Parameter names are the official checkpoint's (the naming of latent diffusion, 2022).
Axes: batch B, channels C, height H and width W in pixels, h and w in latent cells.
"""

from itertools import pairwise

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fluxlab.config import AutoEncoderConfig


class ResnetBlock(nn.Module):
    """Two convolutions around a shortcut, each after GroupNorm and SiLU."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Float[Tensor, "batch in_channels h w"]) -> Float[Tensor, "batch out_channels h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Every latent cell looks at every other, with one head as wide as the features."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels h w"]:
        normed = self.norm(x)
        # contiguous, or attention takes the slow kernel, whose memory grows with the square of the cells
        q, k, v = (rearrange(f(normed), "b c h w -> b 1 (h w) c").contiguous() for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[-2]))


class Downsample(nn.Module):
    """Halve the side: a strided convolution, padded at the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels h2 w2"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side: repeat each value, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels h2 w2"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def resnet_blocks(in_channels: int, out_channels: int, number: int, groups: int) -> nn.ModuleList:
    """Residual blocks in a row; the first changes the number of features."""
    widths = [in_channels] + [out_channels] * number
    return nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))


class DownLevel(nn.Module):
    """The residual blocks at one resolution on the way down, then half the side, except at the last."""

    def __init__(self, in_channels: int, out_channels: int, number: int, groups: int, last: bool) -> None:
        super().__init__()
        self.block = resnet_blocks(in_channels, out_channels, number, groups)
        self.downsample = nn.Identity() if last else Downsample(out_channels)

    def forward(self, x: Float[Tensor, "batch in_channels h w"]) -> Float[Tensor, "batch out_channels h2 w2"]:
        for block in self.block:
            x = block(x)
        return self.downsample(x)


class UpLevel(nn.Module):
    """The residual blocks at one resolution on the way up, then twice the side, except at the last."""

    def __init__(self, in_channels: int, out_channels: int, number: int, groups: int, last: bool) -> None:
        super().__init__()
        self.block = resnet_blocks(in_channels, out_channels, number, groups)
        self.upsample = nn.Identity() if last else Upsample(out_channels)

    def forward(self, x: Float[Tensor, "batch in_channels h w"]) -> Float[Tensor, "batch out_channels h2 w2"]:
        for block in self.block:
            x = block(x)
        return self.upsample(x)


class Middle(nn.Module):
    """A residual block, attention, a residual block, at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels h w"]:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pixels to the moments (mean and log variance) of each latent cell."""

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        c = config
        widths = [c.ch * mult for mult in c.ch_mult]
        self.conv_in = nn.Conv2d(c.in_channels, c.ch, 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(before, width, c.num_res_blocks, c.norm_groups, last=i == len(widths) - 1)
            for i, (before, width) in enumerate(pairwise([c.ch, *widths]))
        )
        self.mid = Middle(widths[-1], c.norm_groups)
        self.norm_out = nn.GroupNorm(c.norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.z_channels, 3, padding=1)

    def forward(self, pixels: Float[Tensor, "batch rgb height width"]) -> Float[Tensor, "batch moments h w"]:
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latent cells to pixels."""

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        c = config
        widths = [c.ch * mult for mult in c.ch_mult]
        self.conv_in = nn.Conv2d(c.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], c.norm_groups)
        self.up = nn.ModuleList(  # numbered as in the encoder, so run from the last to the first
            UpLevel(before, width, c.num_res_blocks + 1, c.norm_groups, last=i == 0)
            for i, (width, before) in enumerate(pairwise([*widths, widths[-1]]))
        )
        self.norm_out = nn.GroupNorm(c.norm_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], c.out_ch, 3, padding=1)

    def forward(self, z: Float[Tensor, "batch z_channels h w"]) -> Float[Tensor, "batch rgb height width"]:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    """The VAE, with the shift and scale that fit its latents to unit noise inside.

    Source: "High-Resolution Image Synthesis with Latent Diffusion Models", Rombach et al. 2022.
    """

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pixels: Float[Tensor, "batch rgb height width"]) -> Float[Tensor, "batch z_channels h w"]:
        """Pixels in [-1, 1] to the latent the transformer works on: the mean, ``(z - shift) * scale``."""
        mean, _ = self.encoder(pixels).chunk(2, dim=1)
        return (mean - self.config.shift_factor) * self.config.scale_factor

    def decode(self, latent: Float[Tensor, "batch z_channels h w"]) -> Float[Tensor, "batch rgb height width"]:
        """The transformer's latent to pixels, about [-1, 1]; not clamped."""
        return self.decoder(latent / self.config.scale_factor + self.config.shift_factor)

    def forward(self, pixels: Float[Tensor, "batch rgb height width"]) -> Float[Tensor, "batch rgb height width"]:
        """There and back: what a picture looks like to the model."""
        return self.decode(self.encode(pixels))
