"""The course: each chapter as it is committed; tests/chapters.py judges it as `pytest --nbmake notebooks` runs it."""

import re
import sys
from urllib.parse import unquote

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests import chapters as judge
from tests.chapters import NOTEBOOKS, Chapter, code, read

SECTIONS = ["Where we are", "The idea", "Build it", "The code", "Real values", "What people get wrong"]
SECTIONS += ["Check yourself", "What to remember"]
NOT_BUILT = ("00", "12", "18")  # nothing there is written by hand

chapters = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem[:2] for path in NOTEBOOKS])


def text(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


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
    wanted = [each for each in SECTIONS if each != "Build it" or path.stem[:2] not in NOT_BUILT]
    assert [each for each in headings if each in SECTIONS] == wanted
    first = read(path).cells[0].source
    assert re.match(rf"# {path.stem[:2]} · .+\n\nAfter this chapter you can ", first)
    checks = [cell.source for cell in code(read(path)) if "fl.check(" in cell.source]
    assert len(checks) == 3
    assert all("answer = None" in check for check in checks)
    assert text(read(path)).count("<summary>Solution</summary>") == 3
    [remember] = re.findall(r"## What to remember\n+((?:- .+\n?)+)", text(read(path)))
    assert len(remember.strip().splitlines()) <= 5
    assert "**Read on:**" in text(read(path))


@chapters
def test_every_picture_says_what_it_shows(path):
    for cell in code(read(path)):
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            assert len(cell.metadata["mystnb"]["image"]["alt"].split()) > 4, cell.source
    for said in re.findall(r"!\[([^\]]*)\]\(", text(read(path))):
        assert len(said.split()) > 4, said


@chapters
def test_cells_are_short_and_formulas_are_ones_that_github_draws(path):
    for cell in code(read(path)):
        assert len(cell.source.splitlines()) <= 15, cell.source
    assert "\\operatorname" not in text(read(path))


@chapters
def test_a_chapter_asserts_what_it_says(path):
    said = sum(len(re.findall(r"^\s*assert ", cell.source, re.M)) for cell in code(read(path)))
    assert said >= 8


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


def executed(path, *cells):
    nbformat.write(new_notebook(cells=cells), path)
    return Chapter(path, default_timeout=60).execute()


def test_what_a_chapter_must_not_do_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "MEMORY", 1e6)
    other = new_code_cell("print(1)", outputs=[new_output("stream", name="stdout", text="2\n")])
    writes = new_code_cell("open('left.txt', 'w').close()")
    check = new_code_cell("answer = None\nfl = __import__('types').SimpleNamespace(check=print)\nfl.check(answer)")
    solution = new_markdown_cell("<summary>Solution</summary>\n```python\nanswer = 'wrong'\n```")
    check.outputs = [new_output("stream", name="stdout", text="None\n")]
    result = executed(tmp_path / "00.ipynb", other, writes, check, solution)
    for fault in ("-2\n+1", "left.txt", "a solution is not right: wrong", "GB of memory")[
        : 4 if sys.platform == "linux" else 3
    ]:
        assert fault in result.error.trace
    assert len(result.nb.cells) == 4  # what was added to judge it is gone, --overwrite writes none of it
    assert [path.name for path in tmp_path.iterdir()] == ["00.ipynb"]


def test_a_chapter_that_reaches_for_the_network_fails(tmp_path):
    reach = new_code_cell("import urllib.request\nurllib.request.urlopen('http://192.0.2.1', timeout=1)")
    assert "a chapter reached for the network" in executed(tmp_path / "00.ipynb", reach).error.trace
