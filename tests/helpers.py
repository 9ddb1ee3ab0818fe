"""What several tests need: small models with their inputs, and a process's memory."""

import os
import subprocess
import sys

import pytest
import torch

import fluxlab
from fluxlab.config import AutoEncoderConfig, FluxConfig

SMALL = FluxConfig(
    vec_in_dim=24, context_in_dim=40, hidden_size=64, num_heads=2, depth=2, depth_single_blocks=3, axes_dim=(4, 12, 16)
)
SMALL_AUTOENCODER = AutoEncoderConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=2, z_channels=4, norm_groups=16)


def small_inputs(batch=1, dtype=torch.float32, seed=0, config=SMALL, **changes):
    """Of twelve image tokens and five of text."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "img": torch.randn(batch, 12, config.in_channels, generator=generator, dtype=dtype),
        "img_ids": fluxlab.image_ids(batch, 48, 64),
        "txt": torch.randn(batch, 5, config.context_in_dim, generator=generator, dtype=dtype),
        "txt_ids": fluxlab.text_ids(batch, 5),
        "timesteps": torch.linspace(0.2, 0.9, batch),
        "y": torch.randn(batch, config.vec_in_dim, generator=generator, dtype=dtype),
        "guidance": torch.linspace(1, 6, batch) if config.guidance_embed else None,
    }
    return inputs | changes


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values in every parameter, the norms' too, so that none of them can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            spread = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            around = 1.0 if name.endswith("scale") or (p.ndim == 1 and "norm" in name and "bias" not in name) else 0.0
            p.copy_(around + spread * (0.2 if p.ndim == 1 else p[0].numel() ** -0.5))
    return module.eval()


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")


def peak_anonymous_memory(before: str, code: str) -> int:
    """Bytes by which ``code`` raises a fresh process's own memory (mapped files left out), at its peak."""
    watched = f"""
import pathlib, threading, time, torch, fluxlab as fl
{before}
def own():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
start = peak = own()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, own())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
{code}
peak, done = max(peak, own()), True
thread.join()
print(peak - start)
"""
    plain = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    }  # which keep the freed
    return int(subprocess.check_output([sys.executable, "-c", watched], text=True, env=plain))
