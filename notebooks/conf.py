"""The site: Sphinx reads the executed chapters, and the pages that are written here from the library itself.

`make course` runs it: ``sphinx-build -c notebooks exported/course/source exported/course``.
"""

import inspect
import json
import os
import re
import shutil
from pathlib import Path

import fluxlab as fl
from fluxlab.glossary import entries

# links to files, Binder and Colab lead to it: GitHub's workflow says what it is
REPOSITORY = f"https://github.com/{os.environ['GITHUB_REPOSITORY']}" if "GITHUB_REPOSITORY" in os.environ else ""
HERE = Path(__file__).parent

project, author, release = "fluxlab", "The fluxlab contributors", fl.__version__
project_copyright = f"{author}. Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx-mathjax-offline"]
nb_execution_mode = "off"  # they are executed before
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # they would come from another host: a widget is shown as its picture
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]
autodoc_typehints = "none"  # the signature has them
autodoc_member_order = "bysource"
napoleon_google_docstring = True
html_theme = "sphinx_book_theme"
html_title = "FLUX.1, opened room by room"
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
}
html_static_path, html_css_files = ["_static"], ["site.css"]
html_show_sourcelink = html_copy_source = False


def chapters() -> list[Path]:
    """In their order."""
    return sorted(HERE.glob("[0-9][0-9]_*.ipynb"))


def write_pages(app) -> None:
    """Beside the executed chapters: the first page, glossary, reference, and where all of it stands elsewhere."""
    source = Path(app.srcdir)
    for path in chapters():
        read = source / path.name
        book = json.loads((read if read.exists() else path).read_text())
        for cell in book["cells"]:
            if cell["cell_type"] == "markdown":
                text = "".join(cell["source"])
                text = re.sub(r"(\.ipynb#[\w-]+)", lambda anchor: anchor[1].lower(), text)  # as MyST makes them
                text = text.replace("](../README.md)", "](index.md)")
                cell["source"] = re.sub(r"\[([^\]]*)\]\(\.\./([^)]*)\)", _file, text)
        read.write_text(json.dumps(book))
    address = REPOSITORY or "https://github.com/OWNER/fluxlab"
    repo = address.removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{repo}/blob/main/notebooks"
    links = " · ".join(f"[{path.stem[:2]}]({colab}/{path.name})" for path in chapters())
    run = (HERE / "run.md").read_text().replace("CLONE", address).replace("REPO", repo).replace("COLAB", links)
    (source / "run.md").write_text(run)
    shutil.copytree(HERE / "sketches", source / "sketches", dirs_exist_ok=True)
    titles = {path.stem[:2]: path.stem for path in chapters()}
    svg = re.sub(
        r"(<text[^>]*)>(\d\d)(</text>)",
        lambda match: (
            f'<a href="{titles[match[2]]}.html">{match[1]} text-decoration="underline">{match[2]}{match[3]}</a>'
        ),
        fl.model_map().svg,
    )
    svg = svg.replace('role="img"', 'role="group"')
    (source / "index.md").write_text((HERE / "index.md").read_text().replace("MAP", svg))
    for page in ("elsewhere.md", "using.md"):
        (source / page).write_text(re.sub(r"\[([^\]]*)\]\(\.\./([^)]*)\)", _file, (HERE / page).read_text()))
    sheet = fl.cheat_sheet().svg.replace('width="1400" style="max-width: 100%; height: auto"', 'width="1960"')
    scrolls = f'<div style="overflow-x: auto" tabindex="0" role="region" aria-label="The sheet">{sheet}</div>'
    (source / "sheet.md").write_text(f"# The architecture on one page\n\n{scrolls}\n")
    (source / "glossary.md").write_text("\n".join(_glossary(titles)))
    (source / "reference.md").write_text("\n".join(_reference()))


def _file(match: re.Match[str]) -> str:
    return f"[{match[1]}]({REPOSITORY}/blob/main/{match[2]})" if REPOSITORY else match[1]


def _glossary(titles: dict[str, str]):
    yield "# Glossary\n\nThe library's own table of names: `fl.explain` prints a line of it, with sizes and source.\n"
    for kind in ("symbol", "input", "tensor", "weight"):
        yield f"## {kind.capitalize()}s\n\n| name | axes | what | chapter |\n|---|---|---|---|"
        for entry in entries():
            if entry.kind == kind and not entry.name.endswith(".bias"):
                chapter = (
                    f"[{entry.chapter}]({titles[entry.chapter]}.ipynb)" if entry.chapter in titles else entry.chapter
                )
                yield f"| `{entry.name}` | {entry.axes} | {entry.meaning.replace('*', chr(92) + '*')} | {chapter} |"
        yield ""


def _reference():
    yield "# Reference\n\n```{raw} html\n<style>dt.sig { overflow-wrap: anywhere; }</style>\n```\n"  # on a phone
    yield "```{eval-rst}"
    for name in fl.__all__:
        thing = getattr(fl, name)
        if inspect.isclass(thing):
            yield f".. autoclass:: fluxlab.{name}\n   :members:\n"
        elif inspect.isfunction(thing):
            yield f".. autofunction:: fluxlab.{name}\n"
        elif inspect.ismodule(thing):
            own = [each for each, value in vars(thing).items() if inspect.isfunction(value) and each[0] != "_"]
            public = getattr(thing, "__all__", [each for each in own if vars(thing)[each].__module__ == thing.__name__])
            yield f".. automodule:: {thing.__name__}\n"
            for each in public:
                kind = "autoclass" if inspect.isclass(getattr(thing, each)) else "autofunction"
                yield f".. {kind}:: {thing.__name__}.{each}\n"
    yield "```"


def setup(app) -> None:
    app.connect("builder-inited", write_pages)
