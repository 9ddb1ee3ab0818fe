"""`make bench`: one double and one single block at full width, beside diffusers' on the same weights, and the floor.

The floor is what no arrangement of this model can do without: its matrix products (with their biases), as nn.Linear
has PyTorch compute them, and its attention, alone. The library's own products are faster than that on some CPUs, so
beside it stands the fastest floor, the same with those. All run in turn, so that a machine that slows down slows all
of them. Times are medians, those outside a floor medians of the differences round by round; the figures that matter
are ratios of one run. Run it on a quiet machine. The Makefile has the C library keep freed memory for the next run:
else the pages of large tensors, fetched anew each time, drown all the rest.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from itertools import accumulate

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch.nn import functional as F
from torch.profiler import profile

import fluxlab as fl
from fluxlab.model.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxlab.model.linear import Linear
from fluxlab.model.rope import EmbedND
from fluxlab.weights.layouts import to_diffusers

CONFIG = fl.FluxConfig(depth=1, depth_single_blocks=1)
SIZES = ((1024, 512), (256, 256))
Run = Callable[[], object]


def prefixed(tensors, prefix):
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def blocks(dtype):
    """Ours and theirs, with the same random weights."""
    torch.manual_seed(0)
    c = CONFIG
    double = DoubleStreamBlock(c.hidden_size, c.num_heads, c.mlp_hidden_dim)
    single = SingleStreamBlock(c.hidden_size, c.num_heads, c.mlp_hidden_dim)
    official = {f"double_blocks.0.{n}": t for n, t in double.state_dict().items()}
    official |= {f"single_blocks.0.{n}": t for n, t in single.state_dict().items()}
    with torch.device("meta"):
        rest = {n: t for n, t in fl.Flux(c).state_dict().items() if n not in official}
    theirs = to_diffusers(official | rest, c)
    double_theirs = FluxTransformerBlock(c.hidden_size, c.num_heads, c.head_dim)
    single_theirs = FluxSingleTransformerBlock(c.hidden_size, c.num_heads, c.head_dim)
    double_theirs.load_state_dict(prefixed(theirs, "transformer_blocks.0."))
    single_theirs.load_state_dict(prefixed(theirs, "single_transformer_blocks.0."))
    return [block.to(dtype).eval() for block in (double, double_theirs, single, single_theirs)]


def runs(dtype, image, text) -> dict[str, dict[str, Run]]:
    """For each kind of block: ours, diffusers', and the two floors."""
    double, double_theirs, single, single_theirs = blocks(dtype)
    c = CONFIG
    side = int(image**0.5)
    img, txt = torch.randn(1, image, c.hidden_size, dtype=dtype), torch.randn(1, text, c.hidden_size, dtype=dtype)
    vec = torch.randn(1, c.hidden_size, dtype=dtype)
    ids = torch.cat((fl.text_ids(1, text), fl.image_ids(1, 16 * side, 16 * side)), dim=1)
    pe, rotary = EmbedND(c.theta, c.axes_dim)(ids), FluxPosEmbed(c.theta, list(c.axes_dim))(ids[0])
    both = torch.cat((txt, img), dim=1)
    q, k, v = torch.randn(3, 1, c.num_heads, image + text, c.head_dim, dtype=dtype).unbind(0)

    def products(block: torch.nn.Module, tokens: Callable[[str], int]) -> dict[str, Run]:
        """Every Linear of a block on as many rows as it sees, by PyTorch's product and by the library's."""
        linears = [(n, m) for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)]
        inputs = [torch.randn(tokens(n), m.in_features, dtype=dtype) for n, m in linears]

        def run(product: Callable[[torch.nn.Linear, torch.Tensor], torch.Tensor]) -> None:
            for (_, linear), x in zip(linears, inputs, strict=True):
                product(linear, x)
            F.scaled_dot_product_attention(q, k, v)

        return {"floor": lambda: run(torch.nn.Linear.forward), "fastest": lambda: run(Linear.forward)}

    return {
        "double": {
            "ours": lambda: double(img, txt, vec, pe),
            "diffusers": lambda: double_theirs(img, txt, vec, rotary)[::-1],
            **products(double, lambda n: 1 if "mod" in n else image if n.startswith("img") else text),
        },
        "single": {
            "ours": lambda: single(both, vec, pe),
            "diffusers": lambda: torch.cat(single_theirs(img, txt, vec, rotary), dim=1),
            **products(single, lambda n: 1 if "mod" in n else image + text),
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
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        "\n                         median ms (spread of the middle half)                          "
        "outside the floor           outside the fastest         peak MiB\n"
        "block   dtype    tokens    ours             diffusers        floor            fastest          "
        "ours      theirs    ratio   ours      theirs    ratio   ours  theirs"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for image, text in SIZES:
            for block, kinds in runs(dtype, image, text).items():
                report(block, dtype, image, text, kinds, seconds)


def report(block, dtype, image, text, kinds, seconds) -> None:
    ours, theirs = kinds["ours"](), kinds["diffusers"]()
    pairs = zip(*((out if isinstance(out, tuple) else (out,)) for out in (ours, theirs)), strict=True)
    error = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    assert error < (1e-5 if dtype is torch.float32 else 2e-2), f"the two differ by {error:.1e}: nothing to compare"
    del ours, theirs, pairs
    memory = {name: peak_memory(kinds[name]) for name in ("ours", "diffusers")}
    times = measure(kinds, seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    row = f"{block:7} {str(dtype)[6:]:8} {image}+{text}".ljust(27)
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        row += f"{median[name]:6.1f} (±{(high - low) / 2:5.1f})  "
    for floor in ("floor", "fastest"):
        ours, theirs = (
            statistics.median(a - b for a, b in zip(times[name], times[floor], strict=True))
            for name in ("ours", "diffusers")
        )
        row += "".join(f"{f'{x / median[n]:.1%}':>7}   " for x, n in ((ours, "ours"), (theirs, "diffusers")))
        row += "below   " if ours < 0 else f"{ours / theirs:5.2f}   "
    print(row + "  ".join(f"{m:4.0f}" for m in memory.values()), flush=True)


if __name__ == "__main__":
    main()
