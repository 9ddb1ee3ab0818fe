"""``make bench ARGS=--versions``: exported/versions.html, sixty prompts painted by every version of flux-tiny.

dev and schnell stand beside each version that is faster or smaller: the pictures, the speed-up, the weights' memory,
the cost of a picture as a ratio, and the judged quality. The page is one file, and asks nothing of another host.
"""

from __future__ import annotations

import base64
import html
import io
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from PIL import Image

import fluxlab as fl
from fluxlab.tiny.measure import report
from fluxlab.tiny.world import random_scene
from tests.benchmarks.blocks import stored
from tests.benchmarks.timing import Run, machine, measure
from tests.weights.test_quantized import write_gguf

Put = Callable[[fl.Pipeline], object]
AHEAD: Put = fl.speed.modulation_ahead
VERSIONS: dict[str, tuple[str, dict[str, Any], tuple[Put, ...]]] = {
    "dev, as it is": ("flux-tiny-dev", {}, ()),
    "modulation ahead": ("flux-tiny-dev", {}, (AHEAD,)),
    "compiled, modulation ahead": ("flux-tiny-dev", {}, (fl.speed.compile, AHEAD)),
    "int8 weights": ("flux-tiny-dev", {}, (fl.speed.quantize,)),
    "int8 dynamic": ("flux-tiny-dev", {}, (lambda pipe: fl.speed.quantize(pipe, "int8 dynamic"),)),
    "Q4_0, widened as it runs": ("flux-tiny-dev", {}, ()),
    "first-block cache, 0.1": ("flux-tiny-dev", {}, (lambda pipe: fl.speed.cache_steps(pipe, 0.1),)),
    "first-block cache, 0.2": ("flux-tiny-dev", {}, (lambda pipe: fl.speed.cache_steps(pipe, 0.2),)),
    "10 steps": ("flux-tiny-dev", {"num_steps": 10}, ()),
    "4 steps": ("flux-tiny-dev", {"num_steps": 4}, ()),
    "schnell, 4 steps": ("flux-tiny-schnell", {}, ()),
    "schnell, 4 steps, compiled, ahead": ("flux-tiny-schnell", {}, (fl.speed.compile, AHEAD)),
    "schnell, 1 step": ("flux-tiny-schnell", {"num_steps": 1}, ()),
}


def main(path: Path = Path("exported/versions.html"), number: int = 60, seconds: float = 40) -> None:
    """Paint, time, judge, and write the page."""
    scenes = [random_scene(rng, held_out=True) for rng in [np.random.default_rng(0)] for _ in range(number)]
    prompts = [scene.caption() for scene in scenes]
    pipes, pictures, runs = {}, {}, dict[str, Run]()
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder, "x.gguf")
        whole = fl.load("flux-tiny-dev").model.state_dict()
        write_gguf(small, whole, gguf.GGMLQuantizationType.Q4_0)
        for name, (variant, options, puts) in VERSIONS.items():
            file: Any = {"transformer": small, "low_memory": True} if "Q4_0" in name else {}
            pipes[name] = pipe = fl.load(variant, **file)
            for put in puts:
                put(pipe)
            made: Any = [pipe(p, seed=i, progress=False, **options) for i, p in enumerate(prompts)]
            pictures[name] = made
            runs[name] = lambda pipe=pipe, options=options: pipe(prompts[0], progress=False, **options)
        held = {name: small.stat().st_size if "Q4_0" in name else stored(pipe.model) for name, pipe in pipes.items()}
        times = measure(runs, seconds, 7)
    rows = []
    for name in pipes:
        right = report(zip(map(np.asarray, pictures[name]), scenes, strict=True))["all"]
        cost = statistics.median(a / b for a, b in zip(times[name], times["dev, as it is"], strict=True))
        rows.append({"version": name, "cost": cost, "memory": held[name], "right": right})
        print(f"{name:36} cost {cost:5.2f}  weights {held[name] / 1e6:5.2f} MB  right {right:.0%}")
    path.write_text(page(prompts, pictures, rows))


def page(prompts: list[str], pictures: dict[str, list[Image.Image]], rows: list[dict[str, Any]]) -> str:
    """The table, then a row of pictures for each prompt."""
    cells = "".join(
        f"<tr><th scope=row>{html.escape(row['version'])}</th><td>{1 / row['cost']:.1f} ×</td>"
        f"<td>{row['cost']:.2f}</td><td>{row['memory'] / rows[0]['memory']:.2f}</td><td>{row['right']:.0%}</td></tr>"
        for row in rows
    )
    galleries = "".join(
        f"<h2>{i + 1} · {html.escape(prompt)}</h2><div class=row>"
        + "".join(
            f"<figure><img loading=lazy width=128 height=128 alt='{html.escape(name)}' src='{_inline(made[i])}'>"
            f"<figcaption>{html.escape(name)}</figcaption></figure>"
            for name, made in pictures.items()
        )
        + "</div>"
        for i, prompt in enumerate(prompts)
    )
    where = ", ".join(f"{name} {value}" for name, value in machine().items())
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<title>flux-tiny, faster and smaller</title><style>body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;"
        "margin:2em auto;padding:0 1em;color:#1f2933}table{border-collapse:collapse}td,th{padding:.3em 1em;text-align:"
        "right;border-bottom:1px solid #d9dee4}th[scope=row]{text-align:left;font-weight:normal}.row{display:flex;"
        "flex-wrap:wrap;gap:10px}figure{margin:0;width:128px}figcaption{font-size:13px}img{border:1px solid #c3cbd3}"
        "h2{font-size:17px;margin:1.6em 0 .4em}</style><h1>flux-tiny, faster and smaller</h1>"
        f"<p>{len(prompts)} prompts that training never saw, seeds 0 to {len(prompts) - 1}, 128 × 128 pixels, "
        "painted by flux-tiny-dev and -schnell as they are and by each version that is faster or smaller. A cost is "
        "the time of a whole picture, one at a time, to that of dev as it is, in the same run: the median of rounds "
        "taken in turn. Memory is that of the transformer's weights. Right: everything, by flux-tiny's judge.</p>"
        "<table><tr><th scope=col style='text-align:left'>version</th><th scope=col>speed-up</th><th scope=col>cost of "
        f"a picture</th><th scope=col>weights</th><th scope=col>right</th></tr>{cells}</table><p>Measured on: "
        f"{html.escape(where)}. Not measured: other hardware, other sizes, batches.</p>{galleries}</html>\n"
    )


def _inline(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
