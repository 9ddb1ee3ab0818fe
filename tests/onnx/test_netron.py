"""Every graph in exported/ opens in Netron: served here, shown by a real browser, a function opened."""

import base64
import io
import itertools
import json
import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import netron
import pytest
import websocket
from PIL import Image

from fluxlab.onnx.export import GRAPHS
from fluxlab.weights.find import data_folder

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; on Debian or Ubuntu: apt-get install chromium")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
OPTIONS += ["--disable-background-networking", "--disable-component-update"]
OPTIONS += ["--remote-allow-origins=*", "--window-size=1400,1120"]


class Browser:
    """A page of a headless Chromium, driven by its DevTools protocol."""

    def __init__(self, profile):
        self.profile = profile
        self.process = subprocess.Popen(
            [CHROMIUM, *OPTIONS, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
            stderr=subprocess.DEVNULL,
        )
        port_file = profile / "DevToolsActivePort"
        wait_for(port_file.exists)
        wait_for(lambda: len(port_file.read_text().splitlines()) == 2)
        port = port_file.read_text().splitlines()[0]
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        page = next(each for each in pages if each["type"] == "page")
        self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=60)
        self.numbers = itertools.count(1)

    def command(self, method, **parameters):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != number:
            pass
        return answer["result"]

    def value(self, script):
        return self.command("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def screenshot(self):
        return Image.open(io.BytesIO(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"])))

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the browser did not show it in time"
        time.sleep(0.05)


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


@pytest.mark.parametrize("file", GRAPHS)
def test_the_graph_opens_and_a_function_opens_inside_it(browser, tmp_path, file):
    host, port = netron.start(str(data_folder().parent / "exported" / file), browse=False)
    try:
        url = f"http://{host}:{port}"
        browser.command("Network.setCookie", name="consent", value="1", url=url)  # else a notice covers the page
        browser.command("Page.navigate", url=url)
        wait_for(lambda: browser.value("document.body.className") == "default")
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
    finally:
        netron.stop((host, port))


@pytest.mark.parametrize("kind", ["double", "single"])
def test_a_block_and_its_attention_open(browser, kind):
    """Two functions deep; what is seen there stands in chapter 13."""
    host, port = netron.start(str(data_folder().parent / f"exported/flux-dev-{kind}-block.onnx"), browse=False)
    try:
        url = f"http://{host}:{port}"
        browser.command("Network.setCookie", name="consent", value="1", url=url)
        browser.command("Page.navigate", url=url)
        wait_for(lambda: browser.value("document.body.className") == "default")
        wait_for(lambda: drawn(browser))
        opens(browser, f"{kind.capitalize()}StreamBlock")
        keep(browser, f"flux-dev-{kind}-block")
        opens(browser, "Attention")
        shown = browser.value("document.body.textContent")
        assert all(name in shown for name in ("RoPE", "Transpose", "Reshape", "B×24×T+I×128"))
        keep(browser, "attention")
    finally:
        netron.stop((host, port))


def opens(browser, name):
    """Open the function that a node of this name calls, or the first there is."""
    shown = browser.value("document.body.textContent")
    browser.value(
        "(() => { const nodes = Array.from(document.querySelectorAll('.node'));"
        "const opens = node => Array.from(node.querySelectorAll('text')).find(text => text.textContent.trim() === 'ƒ');"
        f"const node = nodes.find(node => opens(node) && node.textContent.includes({name!r})) || nodes.find(opens);"
        "opens(node).parentNode.dispatchEvent(new MouseEvent('click', {bubbles: true})) })()"
    )
    wait_for(lambda: browser.value("document.body.textContent") != shown)
    wait_for(lambda: browser.value("document.querySelectorAll('.node').length") > 1 and drawn(browser))


def keep(browser, name):
    """`make screenshots`: the page as a picture. The brackets around shapes are in few fonts."""
    if folder := os.environ.get("FLUXLAB_SCREENSHOTS"):
        browser.value("document.getElementById('toolbar').style.display = 'none'")
        browser.value(
            "document.querySelectorAll('text, tspan').forEach(text => text.childNodes.forEach(node => {"
            "if (node.nodeType === 3) node.data = node.data.replace('\\u3008', ' ').replace('\\u3009', '') }))"
        )
        browser.screenshot().crop((20, 80, 1380, 960)).save(Path(folder) / f"{name}-netron.png", optimize=True)
