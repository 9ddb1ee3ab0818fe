"""The course: each chapter as it is committed, and executed once as its reader would."""

import os
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from nbformat.v4 import new_code_cell
from nbmake.nb_run import NotebookRun

from tests.kernels import copied_kernels

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SECTIONS = ["Where we are", "The idea", "The code", "What people get wrong", "Check yourself", "What to remember"]

OFFLINE = """
import socket

connect = socket.socket.connect

def only_local(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"a chapter reached for the network: {address}")
    return connect(self, address)

socket.socket.connect = only_local
"""
PEAK = "import re; print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read()).group(1))"

chapters = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem[:2] for path in NOTEBOOKS])


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def printed(cell):
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


def solved(notebook):
    """The notebook with each exercise's solution run after its check; and where those cells are."""
    cells, places, waiting = [], [], None
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "code" and "fl.check(" in cell.source:
            waiting = (len(cells), cell.source.replace("answer = None\n", ""))
        elif waiting and (solution := re.search(r"<summary>Solution.*?```python\n(.*?)```", cell.source, re.S)):
            cells.insert(waiting[0], new_code_cell(f"{solution[1]}\n{waiting[1]}"))
            places.append(waiting[0])
            waiting = None
    notebook.cells = cells
    return notebook, places


@pytest.fixture(scope="module")
def jupyter_path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # half of two cores, so that the minute also holds beside other work
        folder = tmp_path_factory.mktemp("jupyter")
        with copied_kernels(folder) if sys.platform == "linux" else nullcontext():  # elsewhere a fork may not be safe
            yield folder


@chapters
def test_a_chapter_gives_its_committed_text_in_a_minute_and_its_solutions_are_right(
    path, tmp_path, monkeypatch, jupyter_path
):
    (tmp_path / "profile_default/startup").mkdir(parents=True)
    (tmp_path / "profile_default/startup/00.py").write_text(OFFLINE)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setenv("JUPYTER_PATH", str(jupyter_path))
    notebook, places = solved(read(path))
    measures_memory = os.path.exists("/proc/self/status")
    if measures_memory:
        notebook.cells.append(new_code_cell(PEAK))
    (tmp_path / "elsewhere").mkdir()
    nbformat.write(notebook, tmp_path / "elsewhere" / path.name)

    began = time.monotonic()
    result = NotebookRun(tmp_path / "elsewhere" / path.name, default_timeout=300).execute()
    seconds = time.monotonic() - began

    assert result.error is None, result.error.trace
    executed = result.nb
    if measures_memory:
        assert int(executed.cells.pop().outputs[0].text) * 1024 < 1.5e9
    for place in reversed(places):
        cell = executed.cells.pop(place)
        assert printed(cell).endswith("right\n"), cell.source
    for now, before in zip(code(executed), code(read(path)), strict=True):
        assert printed(now) == printed(before), before.source
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == [path.name]  # wrote nothing beside itself
    assert seconds < 60


@chapters
def test_a_chapter_is_committed_as_executed_in_order_and_clean(path):
    notebook = read(path)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    for cell in code(notebook):
        assert not any(output.get("name") == "stderr" or output.output_type == "error" for output in cell.outputs)
        said = "".join(str(output) for output in cell.outputs)
        assert not re.search(r"/(tmp|home|root|Users|work)/", re.sub(r"[A-Za-z0-9+/=\n]{200,}", "", said)), cell.source
    assert path.stat().st_size < 1_000_000


@chapters
def test_a_chapter_has_its_parts_in_order(path):
    headings = re.findall(r"^## (.+)$", text(read(path)), re.M)
    assert [each for each in headings if each in SECTIONS] == SECTIONS
    first = read(path).cells[0].source
    assert re.match(rf"# {path.stem[:2]} · .+\n\nAfter this chapter you can ", first)
    checks = [cell.source for cell in code(read(path)) if "fl.check(" in cell.source]
    assert len(checks) == 3
    assert all("answer = None" in check for check in checks)
    assert text(read(path)).count("<summary>Solution</summary>") == 3
    [remember] = re.findall(r"## What to remember\n+((?:- .+\n?)+)", text(read(path)))
    assert len(remember.strip().splitlines()) <= 5
    assert "**Read on:**" in text(read(path))


def anchors(path):
    """Headings as the pages made of notebooks name them."""
    return {heading.strip().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text(read(path)), re.M)}


@chapters
def test_links_of_a_chapter_resolve_and_it_is_in_the_chain(path):
    words = text(read(path))
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", words):
        file, _, anchor = unquote(target).partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        assert not anchor or there.suffix != ".ipynb" or anchor in anchors(there), target
    here = NOTEBOOKS.index(path)
    around = {"Previous": NOTEBOOKS[here - 1] if here else None, "Next": [*NOTEBOOKS, None][here + 1]}
    for word, other in around.items():
        link = re.search(rf"\[{word}: ([^\]]+)\]\(([^)]+)\)", words)
        assert (link[2] if link else None) == (other.name if other else None)
        assert link is None or read(other).cells[0].source.startswith(f"# {link[1]}\n")
