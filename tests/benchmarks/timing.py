"""How times are taken: what is compared runs in turn, so that a machine that slows down slows all of it.

A ratio is the median of the ratios round by round, with half the distance between its quartiles; it is the figure that
matters, of one run on one machine. Milliseconds are medians.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], object]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = "bfloat16" if DEVICE == "cuda" or "AVX512" in torch.backends.cpu.get_cpu_capability() else "float32"
ROWS: list[dict[str, Any]] = []


def measure(runs: dict[str, Run], seconds: float, least: int = 15) -> dict[str, list[float]]:
    """Milliseconds of each run, taken in turn after one warm-up."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < least or time.perf_counter() < end:
        rounds += 1
        for name, run in runs.items():
            synchronise()
            start = time.perf_counter()
            run()
            synchronise()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def compare(section: str, what: str, times: dict[str, list[float]], ours: str, peer: str, **more: Any) -> None:
    """One row: a ratio, and the times that it is of."""
    ratios = [a / b for a, b in zip(times[ours], times[peer], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    found = {"ratio": round(middle, 3), "spread": round((high - low) / 2, 3)}
    found |= {"ms": round(statistics.median(times[ours]), 2), "peer_ms": round(statistics.median(times[peer]), 2)}
    told(section, what, to=f"{ours} to {peer}", **found, **more)


def told(section: str, what: str, **found: Any) -> None:
    """Keep a row, and print it at once."""
    ROWS.append({"section": section, "what": what, **found})
    shown = dict(found)
    ratio = f"{shown.pop('ratio'):7.3f} ± {shown.pop('spread', 0):.3f}" if "ratio" in shown else " " * 15
    to = shown.pop("to", "")
    times = f"{shown.pop('ms'):10.1f} / {shown.pop('peer_ms'):.1f} ms" if "peer_ms" in shown else ""
    rest = ", ".join(f"{name} {value}" for name, value in shown.items())
    print(f"{section:9} {what:44} {ratio}  {to:42}{times:24} {rest}".rstrip(), flush=True)


def machine() -> dict[str, Any]:
    """What the times are of."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else processor()
    threads, system = torch.get_num_threads(), f"{platform.system()} {platform.release()}"
    told = {
        "device": name,
        "threads": threads,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    return told | {"system": system, "python": platform.python_version(), "torch": torch.__version__}


def processor() -> str:
    """Its name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write(path: Path, quick: bool) -> None:
    """All rows and the machine, as JSON."""
    path.write_text(json.dumps({"machine": machine(), "quick": quick, "rows": ROWS}, indent=1) + "\n")
