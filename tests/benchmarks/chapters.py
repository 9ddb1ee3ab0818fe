"""`make bench`: what each chapter takes, its exercises' solutions with it, beside what the course promises."""

import time

from tests.chapters import MEMORY, NOTEBOOKS, Chapter

SECONDS = 60


def main() -> None:
    print(f"\nchapter                        seconds of {SECONDS}    GB of {MEMORY / 1e9}")
    for path in NOTEBOOKS:
        chapter = Chapter(path, default_timeout=600)
        start = time.perf_counter()
        error = chapter.execute().error
        row = f"{path.stem:30} {time.perf_counter() - start:13.1f}"
        row += f"{chapter.peak / 1e9:12.2f}" if chapter.peak else "    untold"
        print(row, f"  failed: {error.summary}" if error else "", flush=True)


if __name__ == "__main__":
    main()
