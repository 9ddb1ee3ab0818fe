"""``make bench``: one table, and exported/bench.json with the machine it was measured on.

``--quick`` takes three minutes, the whole fifteen; ``--course`` adds each chapter's seconds and memory; ``--versions``
writes a page of pictures beside what they cost. Run it on a quiet machine.
"""

import argparse
import warnings
from pathlib import Path

import torch

from tests.benchmarks import blocks, chapters, cold, loops, memory, versions
from tests.benchmarks.timing import machine, write

SECTIONS = {
    "forward": blocks.forward,
    "compiled": blocks.compiled,
    "int8": blocks.int8,
    "tiny": loops.tiny,
    "wide": loops.wide,
    "scaling": blocks.scaling,
    "memory": memory.little_memory,
    "pictures": loops.pictures,
    "onnx": cold.graphs,
    "cold": cold.cold,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rows, each for a shorter time")
    parser.add_argument("--course", action="store_true", help="each chapter too")
    parser.add_argument("--versions", action="store_true", help="exported/versions.html instead: pictures beside costs")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, help="some sections, and no file")
    parser.add_argument("--output", type=Path, default=Path("exported/bench.json"))
    asked = parser.parse_args()
    if " " in torch.__file__ and not {"compiled", "tiny"}.isdisjoint(asked.only or SECTIONS):
        parser.error(f"PyTorch's compiler cannot link from {torch.__file__!r}, a path with a space; clone elsewhere")
    warnings.simplefilter("ignore")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    if asked.versions:
        return versions.main()
    for name in asked.only or [each for each in SECTIONS if not (asked.quick and each == "compiled")]:
        SECTIONS[name](asked.quick)
    if asked.course:
        chapters.main()
    if not asked.only:
        write(asked.output, asked.quick)
    return None


if __name__ == "__main__":
    main()
