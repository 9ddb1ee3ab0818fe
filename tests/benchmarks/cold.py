"""What a first picture costs: imports, loading, the whole command. Each in a process of its own, in turn."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fluxlab as fl
from tests.benchmarks.timing import compare, told

ENCODERS = "import torch; from transformers import T5EncoderModel, CLIPTextModel, T5Tokenizer, CLIPTokenizer"
RUNS = {
    "import fluxlab": ["-c", "import fluxlab"],
    "import torch": ["-c", "import torch"],
    "fluxlab generate": ["-m", "fluxlab", "generate", "a red circle"],
    "importing torch and the encoders": ["-c", ENCODERS],
}


def cold(quick: bool) -> None:
    """Seconds from the start of a process to its end."""
    times: dict[str, list[float]] = {name: [] for name in RUNS}
    where = os.environ | {"PYTHONPATH": str(Path(fl.__file__).parents[1])}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2 if quick else 5):
            for name, arguments in RUNS.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, *arguments], cwd=folder, check=True, capture_output=True, env=where)
                times[name].append((time.perf_counter() - start) * 1e3)
    beyond = [a - b for a, b in zip(times["import fluxlab"], times["import torch"], strict=True)]
    compare(
        "cold", "import", times, "import fluxlab", "import torch", beyond=f"{sorted(beyond)[len(beyond) // 2]:.0f} ms"
    )
    compare("cold", "flux-tiny, 20 steps", times, "fluxlab generate", "importing torch and the encoders")


def graphs(quick: bool) -> None:
    """How long an ONNX export takes, and how large it is."""
    with tempfile.TemporaryDirectory() as folder:
        for name, options in (("flux-dev", {}), ("flux-tiny-dev", {"weights": True})):
            path, start = Path(folder) / f"{name}.onnx", time.perf_counter()
            fl.export_onnx(name, path, **options)
            seconds, size = time.perf_counter() - start, path.stat().st_size / 1e3
            what = f"{name}, {'with' if options else 'without'} weights"
            told("onnx", what, seconds=round(seconds, 2), kB=round(size))
