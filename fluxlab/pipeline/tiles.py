"""Through the VAE and back, whole or in tiles, so that a large picture takes the memory of one tile. Chapter 10."""

from collections.abc import Callable

import torch
from torch import Tensor

from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.pipeline.checks import finite
from fluxlab.pipeline.latents import COMPRESSION


def encode(autoencoder: AutoEncoder, pixels: Tensor, tiled: bool = False) -> Tensor:
    """Pixels in [-1, 1] to a latent; in tiles of twice the side that the VAE was trained on, 512 pixels in FLUX.

    Raises:
        ValueError: the latent is not finite.
    """
    side = 2 * autoencoder.config.resolution if tiled else max(pixels.shape)
    return finite(in_tiles(autoencoder.encode, pixels, side, side // COMPRESSION), "the latent of image")


def decode(autoencoder: AutoEncoder, latent: Tensor, tiled: bool = False) -> Tensor:
    """A latent to pixels, in the same tiles; a ``ValueError`` where the pixels are not finite."""
    side = 2 * autoencoder.config.resolution // COMPRESSION if tiled else max(latent.shape)
    return finite(in_tiles(autoencoder.decode, latent, side, side * COMPRESSION), "what the VAE decoded")


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, side: int, side_out: int) -> Tensor:
    """``function`` of square tiles of ``x``, each a quarter of its side over the next, where one fades into the other.

    The VAE's GroupNorms and its attention look at all of what they are given, so this is not what it makes of the
    whole. With flux-tiny, a picture of 512 pixels in tiles of 256 is off by 1 to 5 of 255 on average and by 46 to 142
    at its worst place; one of 256 pixels in tiles of 64, by 4 to 13 and by 72 to 194.

    A tile of ``x`` has ``side``, and what ``function`` makes of it ``side_out``.

    Source: the algorithm of diffusers' ``AutoencoderKL.tiled_decode``.
    """
    if max(x.shape[-2:]) <= side:
        return function(x)
    over = side_out // 4
    kept, rows = side_out - over, []
    above: list[Tensor] = []
    for i in range(0, x.shape[-2], side * 3 // 4):
        row: list[Tensor] = []
        for j in range(0, x.shape[-1], side * 3 // 4):
            tile = function(x[..., i : i + side, j : j + side])
            tile = _fade(above[len(row)].mT, tile.mT, over).mT if above else tile
            row.append(_fade(row[-1], tile, over) if row else tile)
        rows.append(torch.cat([tile[..., :kept, :kept] for tile in row], dim=-1))
        above = row
    return torch.cat(rows, dim=-2)


def _fade(before: Tensor, after: Tensor, extent: int) -> Tensor:
    """``after``, whose first columns grow out of the last of ``before``."""
    extent = min(extent, after.shape[-1])
    share = torch.arange(extent, dtype=after.dtype, device=after.device) / extent
    return torch.cat([torch.lerp(before[..., -extent:], after[..., :extent], share), after[..., extent:]], dim=-1)
