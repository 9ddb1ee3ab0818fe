"""What a forward takes of memory and of time where its weights stay in their file, or stay quantized.

A transformer of full width, of fewer blocks, is written with random numbers: in bfloat16, and as GGUF in Q8_0 and
Q4_0. Each way to load it runs in a process of its own. Its own memory is what the system calls anonymous: pages of
mapped files, which can be dropped and read again, are not in it. The arithmetic is in the dtype that the processor is
fast in.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

import fluxlab as fl
from fluxlab.files import stream_tensors
from tests.benchmarks.timing import FAST, told

DEPTHS = {"depth": 1, "depth_single_blocks": 3}
RUN = """
import sys, threading, time, torch
from pathlib import Path
import fluxlab as fl

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1e6

peak, start = 0.0, own()
def watch():
    global peak
    while True:
        peak = max(peak, own())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
path, dtype, low, depths = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3] == "low", eval(sys.argv[4])
model = fl.build("flux-schnell", "meta", **depths)
fl.load_weights(model, path, dtype=dtype, low_memory=low)
inputs = fl.example_inputs("flux-schnell", 256, 256, dtype=dtype).kwargs()
seconds = []
with torch.no_grad():
    for _ in range(3):
        begun = time.perf_counter()
        model(**inputs)
        seconds.append(time.perf_counter() - begun)
print(peak - start, min(seconds))
"""


def write_all(folder: Path) -> dict[str, Path]:
    """The same numbers three times."""
    entries = {n: t.to(torch.bfloat16) for n, t in fl.build("flux-schnell", "meta", **DEPTHS).state_dict().items()}

    def numbers():
        for i, (name, entry) in enumerate(entries.items()):
            generator = torch.Generator().manual_seed(i)
            yield name, (torch.randn(entry.shape, generator=generator) * 0.02).to(torch.bfloat16)

    paths = {"bfloat16": folder / "x.safetensors", "Q8_0": folder / "8.gguf", "Q4_0": folder / "4.gguf"}
    stream_tensors(entries, numbers(), paths["bfloat16"])
    for kind in ("Q8_0", "Q4_0"):
        writer = GGUFWriter(paths[kind], "flux", use_temp_file=True)
        for name, tensor in numbers():
            used = GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
            data = tensor.float().numpy()
            writer.add_tensor(name, quantize(data, used) if tensor.ndim == 2 else data, raw_dtype=used)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def little_memory(quick: bool) -> None:
    """Write, run and tell."""
    if sys.platform != "linux":
        told("memory", "not measured: it reads /proc, which only Linux has")
        return
    blocks = " + ".join(map(str, DEPTHS.values()))
    with tempfile.TemporaryDirectory() as folder:
        usual = 0.0
        for kind, path in write_all(Path(folder)).items():
            for way in ("whole", "low"):
                if quick and (kind, way) not in (("bfloat16", "whole"), ("bfloat16", "low"), ("Q4_0", "low")):
                    continue
                command = [sys.executable, "-c", RUN, str(path), FAST, way, repr(DEPTHS)]
                ran = subprocess.run(command, capture_output=True, text=True, check=True)
                own, seconds = map(float, ran.stdout.split())
                usual = usual or seconds
                what = f"{kind}, {way} memory, {blocks} blocks, 256 x 256, {FAST}"
                sizes = {"own GB": round(own, 2), "file GB": round(path.stat().st_size / 1e9, 2)}
                told("memory", what, ratio=round(seconds / usual, 2), to="to bfloat16, whole", **sizes)
