"""The course's chapters, and what must hold when `pytest --nbmake notebooks` executes one."""

import os
import re
from collections.abc import Iterator
from difflib import unified_diff
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell
from nbmake.nb_result import NotebookError, NotebookResult
from nbmake.nb_run import NotebookRun

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MEMORY = 1.5e9  # bytes that a chapter may take

OFFLINE = """
def offline():
    import socket

    connect = socket.socket.connect

    def only_local(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a chapter reached for the network: {address}")
        return connect(self, address)

    socket.socket.connect = only_local

offline()
del offline
"""
PEAK = """
import re
from pathlib import Path

from torch.version import cuda

if (status := Path("/proc/self/status")).exists():
    peak, mapped = (int(re.search(rf"{name}:\\s+(\\d+) kB", status.read_text())[1]) for name in ("VmHWM", "RssFile"))
    print(peak - mapped * bool(cuda))  # of PyTorch's CUDA build the libraries alone are 0.4 GB more
"""


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: NotebookNode) -> str:
    """What a cell says in words; pictures are not compared, nor what cells tagged ``measured`` print."""
    if "measured" in cell.metadata.get("tags", ()):
        return ""
    words = []
    for output in cell.outputs:
        if output.output_type == "stream":
            words.append(output.text)
        elif not any(kind.startswith("image/") for kind in output.data):
            words.append(output.data["text/plain"])
    return "".join(words)


def added(why: str, source: str) -> NotebookNode:
    return new_code_cell(source, metadata={"added": why})


def with_checks(notebook: NotebookNode) -> NotebookNode:
    """The notebook offline, each exercise's solution run after its check, and at the end the memory asked for."""
    cells, waiting = [added("offline", OFFLINE)], None
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "code" and "fl.check(" in cell.source:
            waiting = (len(cells), cell.source.replace("answer = None\n", ""))
        elif waiting and (solution := re.search(r"<summary>Solution.*?```python\n(.*?)```", cell.source, re.S)):
            cells.insert(waiting[0], added("solution", f"{solution[1]}\n{waiting[1]}"))
            waiting = None
    notebook.cells = [*cells, added("peak", PEAK)]
    return notebook


class Chapter(NotebookRun):
    """A chapter executed once, as a reader would in another folder, and judged by what it printed, took and left."""

    peak: int | None = None  # bytes of its kernel, where Linux tells

    def execute(self) -> NotebookResult:
        committed = read(self.filename)
        with TemporaryDirectory() as folder, patch.dict(os.environ):
            os.environ.pop("TQDM_DISABLE", None)  # its reader sees progress bars
            nbformat.write(with_checks(read(self.filename)), Path(folder, self.filename.name))
            self.filename = Path(folder, self.filename.name)
            result = super().execute()
            written = [path.name for path in Path(folder).iterdir() if path != self.filename]
        cells = {why: [c for c in result.nb.cells if c.metadata.get("added") == why] for why in ("solution", "peak")}
        result.nb.cells = [cell for cell in result.nb.cells if "added" not in cell.metadata]
        if result.error is None:
            self.peak = 1024 * int(printed(cells["peak"][0]) or 0) or None
            faults = [*self.faults(result.nb, committed, cells["solution"], written)]
            if faults:
                result.error = NotebookError(faults[0].splitlines()[0], "\n\n".join(faults), -1)
        return result

    def faults(
        self, executed: NotebookNode, committed: NotebookNode, solutions: list[NotebookNode], written: list[str]
    ) -> Iterator[str]:
        for cell in solutions:
            if not printed(cell).endswith("right\n"):
                yield f"a solution is not right: {printed(cell)}\n{cell.source}"
        for now, before in zip(code(executed), code(committed), strict=True):
            if printed(now) != printed(before):
                texts = (printed(cell).splitlines() for cell in (before, now))
                difference = "\n".join(unified_diff(*texts, "committed", "executed", lineterm=""))
                yield f"a cell prints another text than the committed one\n{before.source}\n\n{difference}"
        if written:
            yield f"it wrote {written} beside itself"
        if self.peak and self.peak > MEMORY:
            yield f"it took {self.peak / 1e9:.2f} GB of memory; a chapter may take {MEMORY / 1e9}"
