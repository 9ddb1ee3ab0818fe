"""A double block, a single block and a model of one each, at full width, beside diffusers' on the same weights.

The floor is what no arrangement of a block can do without: its matrix products, with their biases, and its attention.
"""

from __future__ import annotations

import math
import statistics
from itertools import accumulate

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import nn
from torch.nn import functional as F
from torch.profiler import profile

import fluxlab as fl
from fluxlab.model.rope import EmbedND
from fluxlab.weights.convert import diffusers_config
from fluxlab.weights.layouts import to_diffusers
from tests.benchmarks.timing import DEVICE, FAST, Run, compare, measure, told

CONFIG = fl.FluxConfig(depth=1, depth_single_blocks=1)
SIZES = ((1024, 512), (256, 512))


def models(dtype, config=CONFIG):
    """Ours and theirs, with the same random weights."""
    torch.manual_seed(0)
    ours = fl.Flux(config).to(DEVICE, dtype).eval()
    with torch.device("meta"):
        theirs = FluxTransformer2DModel.from_config(diffusers_config(config))
    theirs.load_state_dict(to_diffusers(ours.state_dict(), config), assign=True)
    return ours, theirs.eval()


def example(image, text, dtype):
    """Inputs of so many tokens, ours and as diffusers takes them."""
    side = 16 * math.isqrt(image)
    inputs = fl.example_inputs("flux-dev", side, side, dtype=dtype, device=DEVICE)
    inputs.txt, inputs.txt_ids = inputs.txt[:, :text], inputs.txt_ids[:, :text]
    given = (inputs.img, inputs.txt, inputs.y, inputs.timesteps, inputs.img_ids[0], inputs.txt_ids[0], inputs.guidance)
    return inputs, given


def floor(module: nn.Module, image: int, text: int, c: fl.FluxConfig, dtype, attentions: int) -> Run:
    """Its products and attentions alone."""

    def rows(name: str) -> int:
        """How many tokens the Linear of this name sees."""
        if "mod" in name or name.startswith(("time", "guidance", "vector")):
            return 1
        if "linear" in name and "final" not in name:
            return image + text
        return text if "txt" in name else image

    linears = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    products = [(m, torch.randn(rows(n), m.in_features, dtype=dtype, device=DEVICE)) for n, m in linears]
    shape = 1, c.num_heads, image + text, c.head_dim
    q, k, v = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(3))

    def run() -> None:
        for linear, x in products:
            linear(x)
        for _ in range(attentions):
            F.scaled_dot_product_attention(q, k, v)

    return run


def runs(dtype, image, text) -> dict[str, dict[str, Run]]:
    """For each kind of block, and for the whole: ours, diffusers', and the floor."""
    model, theirs = models(dtype)
    c, (inputs, given) = CONFIG, example(image, text, dtype)
    like = {"dtype": dtype, "device": DEVICE}
    img, txt = torch.randn(1, image, c.hidden_size, **like), torch.randn(1, text, c.hidden_size, **like)
    vec = torch.randn(1, c.hidden_size, **like)
    ids = torch.cat((inputs.txt_ids, inputs.img_ids), dim=1)
    pe, rotary = EmbedND(c.theta, c.axes_dim)(ids).to(DEVICE), FluxPosEmbed(c.theta, list(c.axes_dim))(ids[0])
    both = torch.cat((txt, img), dim=1)
    double, double_theirs = model.double_blocks[0], theirs.transformer_blocks[0]
    single, single_theirs = model.single_blocks[0], theirs.single_transformer_blocks[0]
    parts = {"double": (double, 1), "single": (single, 1), "whole": (model, 2)}
    floors = {name: floor(part, image, text, c, dtype, n) for name, (part, n) in parts.items()}
    return {
        "double": {
            "ours": lambda: double(img, txt, vec, pe),
            "diffusers": lambda: double_theirs(img, txt, vec, rotary)[::-1],
            "floor": floors["double"],
        },
        "single": {
            "ours": lambda: single(both, vec, pe),
            "diffusers": lambda: torch.cat(single_theirs(img, txt, vec, rotary), dim=1),
            "floor": floors["single"],
        },
        "whole": {
            "ours": lambda: model(**inputs.kwargs()),
            "diffusers": lambda: theirs(*given).sample,
            "floor": floors["whole"],
        },
    }


def peak_memory(run: Run) -> float:
    """MiB that one run holds at its peak beside what it was given, as torch's allocator saw it."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(changes, initial=0)) / 2**20


def check(block: str, dtype, kinds: dict[str, Run]) -> None:
    """Two that differ are not compared."""
    ours, theirs = kinds["ours"](), kinds["diffusers"]()
    pairs = zip(*((out if isinstance(out, tuple) else (out,)) for out in (ours, theirs)), strict=True)
    error = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    # in bfloat16 diffusers rounds the time and the guidance, ours does not
    most = 1e-5 if dtype is torch.float32 else 1e-1 if block == "whole" else 2e-2
    assert error < (most if DEVICE == "cpu" else 1e-1), f"the two differ by {error:.1e}: nothing to compare"


@torch.no_grad()
def forward(quick: bool) -> None:
    """Eager."""
    seconds, least = (4, 3) if quick else (6, 3)
    sizes = SIZES[1:] if quick else SIZES
    for dtype in (getattr(torch, FAST),) if quick or DEVICE == "cuda" else (torch.bfloat16, torch.float32):
        for image, text in sizes:
            for block, kinds in runs(dtype, image, text).items():
                if quick and block != "whole":
                    continue
                check(block, dtype, kinds)
                memory = [round(peak_memory(kinds[name])) for name in ("ours", "diffusers")]
                times = measure(kinds, seconds, least)
                shares = [
                    statistics.median((a - b) / a for a, b in zip(times[name], times["floor"], strict=True))
                    for name in ("ours", "diffusers")
                ]
                outside = " and ".join(f"{share:.1%}" for share in shares)
                what = f"{block}, {str(dtype)[6:]}, {image} + {text}"
                more = {"outside the floor": outside, "peak MiB": " and ".join(map(str, memory))}
                compare("forward", what, times, "ours", "diffusers", **more)


@torch.no_grad()
def compiled(quick: bool) -> None:
    """The whole compiled, beside diffusers' compiled and eager; never in a quick run."""
    for dtype in (torch.bfloat16, torch.float32):
        for image, text in SIZES[1:] if dtype is torch.bfloat16 else SIZES:  # compiling takes its time
            torch.compiler.reset()
            model, theirs = models(dtype)
            inputs, given = example(image, text, dtype)
            ours, compiled_theirs = torch.compile(model), torch.compile(theirs)
            kinds: dict[str, Run] = {
                "ours compiled": lambda ours=ours, inputs=inputs: ours(**inputs.kwargs()),
                "diffusers compiled": lambda them=compiled_theirs, given=given: them(*given).sample,
                "diffusers": lambda them=theirs, given=given: them(*given).sample,
            }
            times = measure(kinds, 8, 3)
            what = f"whole, {str(dtype)[6:]}, {image} + {text}"
            compare("compiled", what, times, "ours compiled", "diffusers compiled")
            compare("compiled", what, times, "ours compiled", "diffusers")


@torch.no_grad()
def int8(quick: bool) -> None:
    """The whole at full width, with 8-bit weights, beside itself."""
    from fluxlab.speed.quantized import quantize

    for kind in ("int8 dynamic",) if quick else ("int8", "int8 dynamic"):
        dtype = getattr(torch, FAST)
        model, _ = models(dtype)
        other, _ = models(dtype)
        inputs, _ = example(256, 512, dtype)
        before = sum(p.nbytes for p in model.parameters())
        pipe = fl.Pipeline(fl.VARIANTS["flux-dev"], other, None, None, DEVICE, dtype)  # type: ignore[arg-type]
        quantize(pipe, kind)
        kinds: dict[str, Run] = {
            kind: lambda other=other, inputs=inputs: other(**inputs.kwargs()),
            FAST: lambda model=model, inputs=inputs: model(**inputs.kwargs()),
        }
        times = measure(kinds, 2 if quick else 6, 3)
        compare("int8", "whole, 256 + 512", times, kind, FAST, weights=f"{stored(other) / before:.2f}")


def stored(model: nn.Module) -> int:
    """Bytes of its weights, quantized ones too."""

    def size(tensor) -> int:
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        return sum(size(getattr(tensor, part)) for part in parts) if parts else tensor.nbytes

    return sum(size(weight) for weight in model.parameters())


@torch.no_grad()
def scaling(quick: bool) -> None:
    """How a forward's time grows with the tokens, beside how its operations do."""
    dtype = getattr(torch, FAST)
    model, _ = models(dtype)
    totals, milliseconds, operations = [], [], []
    for image in (256, 1024) if quick else (256, 1024, 4096):
        inputs, _ = example(image, 1, dtype)
        times = measure({"ours": lambda inputs=inputs: model(**inputs.kwargs())}, 1, 3)["ours"]
        side = 16 * math.isqrt(image)
        c = CONFIG
        blocks = (
            2
            * image
            * sum(
                m.weight.numel()
                for n, m in model.named_modules()
                if isinstance(m, nn.Linear) and "txt" not in n and "mod" not in n
            )
        )
        totals.append(math.log(image))
        milliseconds.append(math.log(statistics.median(times)))
        operations.append(math.log(blocks + 2 * 4 * image**2 * c.hidden_size))
        told("scaling", f"{image} image tokens ({side} x {side} pixels), {FAST}", ms=round(statistics.median(times), 1))
    slopes = [statistics.linear_regression(totals, ys).slope for ys in (milliseconds, operations)]
    told("scaling", "fitted exponent", time=round(slopes[0], 2), operations=round(slopes[1], 2))
