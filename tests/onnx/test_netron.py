"""Every graph in exported/ opens in Netron: served here, shown by a real browser, a function opened."""

import os
import time
from contextlib import contextmanager
from pathlib import Path

import netron
import pytest
from PIL import ImageChops

from fluxlab.onnx.export import GRAPHS
from fluxlab.weights.find import data_folder
from tests.browser import Browser, needed, wait_for

pytestmark = needed


def drawn(browser):
    """Whether the middle of the page shows more than an empty sheet."""
    picture = browser.screenshot().convert("L")
    middle = picture.crop((0, 60, picture.width, picture.height - 80))
    return sum(middle.histogram()[:100]) > 300


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@contextmanager
def shown(browser, file):
    """A graph of exported/, open in Netron."""
    host, port = netron.start(str(data_folder().parent / "exported" / file), browse=False)
    try:
        url = f"http://{host}:{port}"
        browser.command("Network.setCookie", name="consent", value="1", url=url)  # else a notice covers the page
        browser.command("Page.navigate", url=url)
        wait_for(lambda: browser.value("document.body.className") == "default")
        yield
    finally:
        netron.stop((host, port))


@pytest.mark.parametrize("file", GRAPHS)
def test_the_graph_opens_and_a_function_opens_inside_it(browser, tmp_path, file):
    with shown(browser, file):
        assert browser.value("document.querySelectorAll('.node').length") > 1
        assert "Error" not in browser.value("document.title")
        wait_for(lambda: drawn(browser))
        edges, labels = (
            browser.value(f"document.querySelectorAll('.{what}').length") for what in ("edge-path", "edge-label")
        )
        assert labels >= 0.95 * edges > 0, f"{labels} of {edges} edges have a shape"
        browser.screenshot().save(tmp_path / "top.png")
        if file in ("flux-dev.onnx", "vae-decoder.onnx"):
            keep(browser, file.removesuffix(".onnx"))

        opens(browser, "LayerNorm" if "block" in file else "")
        browser.screenshot().save(tmp_path / "inside.png")


@pytest.mark.parametrize("kind", ["double", "single"])
def test_a_block_and_its_attention_open(browser, kind):
    """Two functions deep; what is seen there stands in chapter 13."""
    with shown(browser, f"flux-dev-{kind}-block.onnx"):
        wait_for(lambda: drawn(browser))
        opens(browser, f"{kind.capitalize()}StreamBlock")
        keep(browser, f"flux-dev-{kind}-block")
        opens(browser, "Attention")
        text = browser.value("document.body.textContent")
        assert all(name in text for name in ("RoPE", "Transpose", "Reshape", "B×24×T+I×128"))
        keep(browser, "attention")


def opens(browser, name):
    """Open the function that a node of this name calls, or the first there is."""
    before = browser.value("document.body.textContent")
    browser.value(
        "(() => { const nodes = Array.from(document.querySelectorAll('.node'));"
        "const opens = node => Array.from(node.querySelectorAll('text')).find(text => text.textContent.trim() === 'ƒ');"
        f"const node = nodes.find(node => opens(node) && node.textContent.includes({name!r})) || nodes.find(opens);"
        "opens(node).parentNode.dispatchEvent(new MouseEvent('click', {bubbles: true})) })()"
    )
    wait_for(lambda: browser.value("document.body.textContent") != before)
    wait_for(lambda: browser.value("document.querySelectorAll('.node').length") > 1 and drawn(browser))


def keep(browser, name, most=1100):
    """`make screenshots`: a graph as a picture, its top if it is tall. Brackets around shapes are in few fonts."""
    if folder := os.environ.get("FLUXLAB_SCREENSHOTS"):
        browser.value("document.getElementById('toolbar').style.display = 'none'")
        browser.value(
            "document.querySelectorAll('text, tspan').forEach(text => text.childNodes.forEach(node => {"
            "if (node.nodeType === 3) node.data = node.data.replace('\\u3008', ' ').replace('\\u3009', '') }))"
        )
        width, height = (
            browser.value(f"document.getElementById('canvas').getBBox().{side}") for side in ("width", "height")
        )
        size = {"width": max(1400, int(width) + 200), "height": int(min(most, height)) + 200}
        browser.command("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)
        time.sleep(1)
        page = browser.screenshot().convert("RGB")
        page = page.crop((40, 40, page.width - 20, page.height - 60))  # without menus and the bar at the side
        left, top, right, bottom = ImageChops.invert(page).convert("L").point(lambda v: 255 * (v > 40)).getbbox()
        around = (max(0, left - 20), max(0, top - 20), min(page.width, right + 20), min(page.height, bottom + 20))
        page.crop(around).save(Path(folder) / f"{name}-netron.png", optimize=True)
        browser.command("Emulation.clearDeviceMetricsOverride")
