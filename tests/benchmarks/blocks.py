"""`make bench`: a double block, a single block and a model of one each, at full width, beside diffusers'.

The floor is what no arrangement of a block can do without: its matrix products, with their biases, and its attention.
All have the same weights and run in turn, so that a machine that slows down slows all of them. Times are medians, and
ratios are medians of the ratios round by round: the figures that matter, of one run on one processor. Run it on a quiet
machine. The Makefile has the C library keep freed memory for the next run: else the pages of large tensors, fetched
anew each time, drown all the rest.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from itertools import accumulate

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch.nn import functional as F
from torch.profiler import profile

import fluxlab as fl
from fluxlab.model.rope import EmbedND
from fluxlab.weights.convert import diffusers_config
from fluxlab.weights.layouts import to_diffusers

CONFIG = fl.FluxConfig(depth=1, depth_single_blocks=1)
SIZES = ((1024, 512), (256, 512))
Run = Callable[[], object]


def models(dtype):
    """Ours and theirs, with the same random weights."""
    torch.manual_seed(0)
    ours = fl.Flux(CONFIG).to(dtype).eval()
    with torch.device("meta"):
        theirs = FluxTransformer2DModel.from_config(diffusers_config(CONFIG))
    theirs.load_state_dict(to_diffusers(ours.state_dict(), CONFIG), assign=True)
    return ours, theirs.eval()


def runs(dtype, image, text) -> dict[str, dict[str, Run]]:
    """For each kind of block, and for the whole: ours, diffusers', and the floor."""
    model, theirs = models(dtype)
    c = CONFIG
    side = int(image**0.5)
    inputs = fl.example_inputs("flux-dev", 16 * side, 16 * side, dtype=dtype)
    inputs.txt, inputs.txt_ids = inputs.txt[:, :text], inputs.txt_ids[:, :text]
    given = (inputs.img, inputs.txt, inputs.y, inputs.timesteps, inputs.img_ids[0], inputs.txt_ids[0], inputs.guidance)
    img, txt = torch.randn(1, image, c.hidden_size, dtype=dtype), torch.randn(1, text, c.hidden_size, dtype=dtype)
    vec = torch.randn(1, c.hidden_size, dtype=dtype)
    ids = torch.cat((inputs.txt_ids, inputs.img_ids), dim=1)
    pe, rotary = EmbedND(c.theta, c.axes_dim)(ids), FluxPosEmbed(c.theta, list(c.axes_dim))(ids[0])
    both = torch.cat((txt, img), dim=1)
    q, k, v = torch.randn(3, 1, c.num_heads, image + text, c.head_dim, dtype=dtype).unbind(0)
    double, double_theirs = model.double_blocks[0], theirs.transformer_blocks[0]
    single, single_theirs = model.single_blocks[0], theirs.single_transformer_blocks[0]

    def rows(name: str) -> int:
        """How many tokens the Linear of this name sees."""
        if "mod" in name or name.startswith(("time", "guidance", "vector")):
            return 1
        if "linear" in name and "final" not in name:
            return image + text
        return text if "txt" in name else image

    def floor(module: torch.nn.Module, attentions: int) -> Run:
        linears = [(n, m) for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)]
        products = [(m, torch.randn(rows(n), m.in_features, dtype=dtype)) for n, m in linears]

        def run() -> None:
            for linear, x in products:
                linear(x)
            for _ in range(attentions):
                F.scaled_dot_product_attention(q, k, v)

        return run

    return {
        "double": {
            "ours": lambda: double(img, txt, vec, pe),
            "diffusers": lambda: double_theirs(img, txt, vec, rotary)[::-1],
            "floor": floor(double, 1),
        },
        "single": {
            "ours": lambda: single(both, vec, pe),
            "diffusers": lambda: torch.cat(single_theirs(img, txt, vec, rotary), dim=1),
            "floor": floor(single, 1),
        },
        "whole": {
            "ours": lambda: model(**inputs.kwargs()),
            "diffusers": lambda: theirs(*given).sample,
            "floor": floor(model, 2),
        },
    }


def peak_memory(run: Run) -> float:
    """MiB that one run holds at its peak beside what it was given, as torch's allocator saw it."""
    with profile(profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(changes, initial=0)) / 2**20


def measure(kinds: dict[str, Run], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each run, taken in turn after one warm-up, at least 15 times each."""
    for run in kinds.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in kinds}
    end = time.perf_counter() + seconds
    while len(times["floor"]) < 15 or time.perf_counter() < end:
        for name, run in kinds.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long each row is timed, at least")
    seconds = parser.parse_args().seconds
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        "\n                          median ms (spread of the middle half)               ours to     "
        "outside the floor          peak MiB\n"
        "block   dtype    tokens    ours             diffusers        floor            diffusers   "
        "ours    theirs   ratio     ours  theirs"
    )
    for dtype in (torch.bfloat16, torch.float32):
        for image, text in SIZES:
            for block, kinds in runs(dtype, image, text).items():
                report(block, dtype, image, text, kinds, seconds)


def processor() -> str:
    """Its name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report(block, dtype, image, text, kinds, seconds) -> None:
    ours, theirs = kinds["ours"](), kinds["diffusers"]()
    pairs = zip(*((out if isinstance(out, tuple) else (out,)) for out in (ours, theirs)), strict=True)
    error = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    # in bfloat16 diffusers rounds the time and the guidance, ours does not
    most = 1e-5 if dtype is torch.float32 else 1e-1 if block == "whole" else 2e-2
    assert error < most, f"the two differ by {error:.1e}: nothing to compare"
    del ours, theirs, pairs
    memory = {name: peak_memory(kinds[name]) for name in ("ours", "diffusers")}
    times = measure(kinds, seconds)
    row = f"{block:7} {str(dtype)[6:]:8} {image}+{text}".ljust(27)
    for values in times.values():
        low, middle, high = statistics.quantiles(values, n=4)
        row += f"{middle:6.1f} (±{(high - low) / 2:5.1f})  "
    rounds = list(zip(times["ours"], times["diffusers"], times["floor"], strict=True))
    row += f"{statistics.median(a / b for a, b, _ in rounds):8.3f}   "
    outside = [statistics.median((row[i] - row[2]) / row[i] for row in rounds) for i in (0, 1)]
    excess = [statistics.median(row[i] - row[2] for row in rounds) for i in (0, 1)]
    row += "".join(f"{share:7.1%}  " for share in outside) + f"{excess[0] / excess[1]:6.2f}    "
    print(row + "  ".join(f"{m:5.0f}" for m in memory.values()), flush=True)


if __name__ == "__main__":
    main()
