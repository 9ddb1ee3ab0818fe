"""The site that `make course` builds, from the chapters as they are committed, in a real browser at two widths."""

import functools
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import axe_core_python
import pytest

from fluxlab.weights.find import data_folder
from tests.browser import Browser, needed, wait_for
from tests.chapters import NOTEBOOKS

ROOT = data_folder().parent
DRAWN = "Array.from(document.querySelectorAll('.math')).every(each => each.querySelector('mjx-container'))"
SERIOUS = """axe.run().then(found => found.violations.filter(each => ['serious', 'critical'].includes(each.impact))
    .map(each => each.id + ': ' + each.nodes[0].html))"""
PAGES = ["index", *(path.stem for path in NOTEBOOKS), "run", "using", "sheet", "glossary", "reference", "elsewhere"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "source").mkdir()
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "-b",
        "html",
        "-d",
        folder / "doctrees",
        "-c",
        ROOT / "notebooks",
    ]
    ran = subprocess.run([*map(str, command), folder / "source", folder / "html"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr  # a warning is an error
    return folder / "html"


class Links(HTMLParser):
    """What a page refers to, and its anchors."""

    def __init__(self, page):
        super().__init__()
        self.found, self.anchors = [], set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value and (tag, name) != ("link", "canonical"):
                self.found.append((tag, value))
            if name in ("id", "name"):
                self.anchors.add(value)


def test_every_link_and_picture_of_the_site_leads_somewhere(site):
    pages = {page.name: Links(page) for page in site.glob("*.html")}
    for name, page in pages.items():
        for tag, link in page.found:
            if link.startswith(("http:", "https:", "data:", "mailto:")):
                assert tag == "a", f"{name} loads {link}"  # another host is only ever linked to
                continue
            target, _, anchor = link.partition("#")
            file = site / (target.partition("?")[0] or name)
            assert file.exists(), f"{name}: {link}"
            if anchor and file.name in pages:
                assert anchor in pages[file.name].anchors, f"{name}: {link}"


def test_the_first_page_leads_to_every_chapter(site):
    links = {link for _, link in Links(site / "index.html").found}
    assert {f"{path.stem}.html" for path in NOTEBOOKS} <= links
    svg = (site / "index.html").read_text().partition("<svg")[2].partition("</svg>")[0]
    assert svg.count('<a href="') > 10


def test_the_reference_has_every_public_name(site):
    import fluxlab as fl

    text = (site / "reference.html").read_text()
    for name in fl.__all__:
        thing = getattr(fl, name)
        if callable(thing):
            assert f'id="fluxlab.{name}"' in text or f'id="{thing.__module__}.{name}"' in text, name


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    for domain in ("Network", "Runtime", "Log", "Page"):
        opened.command(f"{domain}.enable")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def address(site):
    handler = functools.partial(Quiet, directory=str(site))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def happened(browser, method):
    return [event for event in browser.events if event.get("method") == method]


@needed
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_without_a_fault(browser, address, page, width):
    browser.command(
        "Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=width < 600
    )
    browser.events.clear()
    browser.command("Page.navigate", url=f"{address}/{page}.html")
    wait_for(lambda: browser.value("1") and happened(browser, "Page.loadEventFired"))
    wait_for(lambda: browser.value(DRAWN))
    asked = {
        e["params"]["requestId"]: e["params"]["request"]["url"] for e in happened(browser, "Network.requestWillBeSent")
    }
    assert asked
    assert not [url for url in asked.values() if not url.startswith((address, "data:", "blob:", "about:"))]
    assert not happened(browser, "Runtime.exceptionThrown")
    failed = [asked.get(event["params"]["requestId"], "") for event in happened(browser, "Network.loadingFailed")]
    assert not [url for url in failed if url.startswith(address)]
    answers = [event["params"]["response"] for event in happened(browser, "Network.responseReceived")]
    assert not [answer["url"] for answer in answers if answer["status"] >= 400]
    logged = [event["params"]["entry"] for event in happened(browser, "Log.entryAdded")]
    assert not [entry["text"] for entry in logged if entry["level"] == "error"]
    shown = browser.value("document.querySelector('article').innerText")
    assert len(shown) > 200
    assert "$$" not in shown
    assert browser.value("document.documentElement.scrollWidth") <= width + 1  # nothing reaches beyond the page
    if width == 1400 and page in ("index", "00_the_whole_model", "07_double_stream_block", "glossary"):
        browser.value((Path(axe_core_python.__file__).parent / "axe.min.js").read_text())
        found = browser.value(SERIOUS)
        assert found == []
