"""The first stage: pictures to latents and back. Opened in chapter 16."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxlab.files import read_tensors, write_tensors
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.pipeline.pictures import as_pictures
from fluxlab.tiny.loop import fit
from fluxlab.tiny.pictures import USUAL, draw, pixels_of, save_grid, to_float
from fluxlab.tiny.recipe import DEV, Recipe


def train_autoencoder(run: Path, recipe: Recipe) -> AutoEncoder:
    """Reconstruct 64x64 crops: absolute and squared error, and a pull of the posterior towards unit noise.

    The pull gives latents in which the small errors of a flow do little harm. That half a latent's size decodes to
    half the picture's makes latents smooth, and so easier to learn.

    Source: "Auto-Encoding Variational Bayes", Kingma and Welling 2013; "EQ-VAE", Kouzelis et al. 2025.
    """
    torch.manual_seed(recipe.seed)
    autoencoder = AutoEncoder(DEV.autoencoder)
    nn.Module.to(autoencoder, memory_format=torch.channels_last)  # type: ignore[call-overload]
    log_variance_bias = autoencoder.get_parameter("encoder.conv_out.bias").detach()[DEV.autoencoder.z_channels :]
    log_variance_bias.fill_(-3.0)  # start with little posterior noise: with much of it, learning is slow
    if not (path := run / "crops.safetensors").exists():
        write_tensors({"pixels": pixels_of(draw(recipe.crops, *USUAL, recipe.seed + 1))}, path)
    pixels = read_tensors(path)["pixels"]
    held_out = to_float(pixels_of(draw(min(32, recipe.crops), *USUAL, recipe.seed + 2, held_out=True)))

    def error(latent: Tensor, crops: Tensor) -> Tensor:
        decoded = autoencoder.decoder(latent).float()
        return F.l1_loss(decoded, crops) + F.mse_loss(decoded, crops)

    def loss(generator: torch.Generator) -> Tensor:
        n = recipe.autoencoder_batch
        rows = torch.randint(len(pixels), (n,), generator=generator).tolist()
        corners = torch.randint(65, (n, 2), generator=generator).tolist()
        cut = torch.stack([pixels[i, :, y : y + 64, x : x + 64] for i, (y, x) in zip(rows, corners, strict=True)])
        crops = to_float(cut).contiguous(memory_format=torch.channels_last)
        mean, log_variance = autoencoder.encoder(crops).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 4)
        latent = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        smaller = error(F.avg_pool2d(latent, 2), F.avg_pool2d(crops, 2))
        return error(latent, crops) + 0.5 * smaller + recipe.divergence * divergence

    @torch.no_grad()
    def preview(path: Path) -> None:
        again = torch.cat([autoencoder(few) for few in held_out.split(4)])
        errors = (held_out - again.clamp(-1, 1)).square().mean(dim=(1, 2, 3)) / 4
        print(f"\n{path.stem}: {(-10 * errors.log10()).mean():.1f} dB on held-out pictures", flush=True)
        save_grid(path, as_pictures(torch.cat((held_out[:8], again[:8]))), len(held_out[:8]))

    steps, learning_rate = recipe.autoencoder_steps, recipe.autoencoder_learning_rate
    fit("autoencoder", autoencoder, loss, steps, learning_rate, run, recipe, preview)
    nn.Module.to(autoencoder, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with torch.no_grad():  # the shift and scale that bring the latents to mean 0 and deviation 1
        means = torch.cat([autoencoder.encoder(few).chunk(2, dim=1)[0] for few in to_float(pixels[:512]).split(4)])
    scale, shift = round(1 / means.std().item(), 4), round(means.mean().item(), 4)
    print(f"autoencoder: scale_factor {scale}, shift_factor {shift}", flush=True)
    autoencoder.config = replace(autoencoder.config, scale_factor=scale, shift_factor=shift)
    return autoencoder
