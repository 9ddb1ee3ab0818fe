"""`make bench` with --course: what each chapter takes, its solutions with it, beside what the course promises."""

import time

from tests.benchmarks.timing import told
from tests.chapters import MEMORY, NOTEBOOKS, Chapter

SECONDS = 60


def main() -> None:
    for path in NOTEBOOKS:
        chapter = Chapter(path, default_timeout=600)
        start = time.perf_counter()
        error = chapter.execute().error
        found = {
            "seconds": round(time.perf_counter() - start, 1),
            f"of {SECONDS}, GB": round((chapter.peak or 0) / 1e9, 2),
        }
        told("course", path.stem, **found, **{f"of {MEMORY / 1e9}; failed": error.summary} if error else {})
