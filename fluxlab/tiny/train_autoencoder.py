"""The first stage: pictures to latents and back. Opened in chapter 16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxlab.config import VARIANTS
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.tiny.loop import fit
from fluxlab.tiny.pictures import cached, draw, pixels_of, save_grid, to_float
from fluxlab.tiny.recipe import Recipe

CONFIG = VARIANTS["flux-tiny-dev"].autoencoder


def train_autoencoder(run: Path, recipe: Recipe) -> AutoEncoder:
    """Reconstruct 64x64 crops: absolute and squared error, and a pull of the posterior towards unit noise.

    The pull makes latents that bear the errors of a flow; that a latent at half the size is the picture at half the
    size makes them smooth, and so easier to learn.

    Source: "Auto-Encoding Variational Bayes", Kingma and Welling 2013; "EQ-VAE", Kouzelis et al. 2025.
    """
    torch.manual_seed(recipe.seed)
    autoencoder = AutoEncoder(CONFIG)
    nn.Module.to(autoencoder, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():  # start with little posterior noise: heavy noise makes it learn slowly
        bias: Tensor = autoencoder.encoder.state_dict()["conv_out.bias"]
        bias[CONFIG.z_channels :] = -3.0
    pixels = cached(
        run / "crops.safetensors",
        lambda: {
            "pixels": torch.stack([pixels_of(picture) for picture in draw(recipe.crops, 128, 128, recipe.seed + 1)])
        },
    )["pixels"]

    def error(latent: Tensor, crops: Tensor) -> Tensor:
        decoded = autoencoder.decoder(latent).float()
        return F.l1_loss(decoded, crops) + F.mse_loss(decoded, crops)

    def reconstruct(crops: Tensor, epsilon: Tensor) -> Tensor:
        mean, log_variance = autoencoder.encoder(crops).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 4)
        latent = mean + (0.5 * log_variance).exp() * epsilon
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        smaller = error(F.avg_pool2d(latent, 2), F.avg_pool2d(crops, 2))
        return error(latent, crops) + 0.5 * smaller + recipe.divergence * divergence

    def loss(generator: torch.Generator) -> Tensor:
        n = recipe.autoencoder_batch
        rows = torch.randint(len(pixels), (n,), generator=generator).tolist()
        corners = torch.randint(65, (n, 2), generator=generator).tolist()
        crops = torch.stack([pixels[i, :, y : y + 64, x : x + 64] for i, (y, x) in zip(rows, corners, strict=True)])
        epsilon = torch.randn(n, CONFIG.z_channels, 8, 8, generator=generator)
        return reconstruct(to_float(crops).contiguous(memory_format=torch.channels_last), epsilon)

    number = min(32, recipe.crops)
    held_out = torch.stack([pixels_of(picture) for picture in draw(number, 128, 128, recipe.seed + 2, held_out=True)])

    def preview(step: int) -> None:
        with torch.no_grad():
            truth = to_float(held_out)
            again = torch.cat([autoencoder(few) for few in truth.split(4)])
        errors = (truth - again.clamp(-1, 1)).square().mean(dim=(1, 2, 3)) / 4
        print(f"\nautoencoder, step {step}: {(-10 * errors.log10()).mean():.1f} dB on held-out pictures", flush=True)
        save_grid(run / f"autoencoder-{step:05d}.png", torch.cat((truth[:8], again[:8])), 8)

    slower = replace(recipe, learning_rate=recipe.autoencoder_learning_rate)
    fit("autoencoder", autoencoder, loss, recipe.autoencoder_steps, run, slower, preview)
    autoencoder.requires_grad_(False)
    return _measured(autoencoder, to_float(pixels[:512]))


@torch.no_grad()
def _measured(autoencoder: AutoEncoder, pixels: Tensor) -> AutoEncoder:
    """The same autoencoder, with the shift and scale that bring its latents to mean 0 and deviation 1."""
    raw = replace(autoencoder.config, scale_factor=1.0, shift_factor=0.0)
    measured = AutoEncoder(raw)
    measured.load_state_dict(autoencoder.state_dict())
    latents = torch.cat([measured.encode(batch) for batch in pixels.split(4)])
    config = replace(raw, scale_factor=round(1 / latents.std().item(), 4), shift_factor=round(latents.mean().item(), 4))
    print(f"autoencoder: scale_factor {config.scale_factor}, shift_factor {config.shift_factor}", flush=True)
    measured.config = config
    return measured.eval().requires_grad_(False)
