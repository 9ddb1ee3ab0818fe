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
        shown = browser.value("document.body.textContent")
        assert "Error" not in browser.value("document.title")
        wait_for(lambda: drawn(browser))
        browser.screenshot().save(tmp_path / "top.png")

        browser.value(
            "const all = Array.from(document.querySelectorAll('.node-item text'));"
            "const button = all.find(text => text.textContent.trim() === 'ƒ').parentNode;"
            "button.dispatchEvent(new MouseEvent('click', {bubbles: true}));"
        )
        wait_for(lambda: browser.value("document.body.textContent") != shown)
        wait_for(lambda: browser.value("document.querySelectorAll('.node').length") > 1 and drawn(browser))
        browser.screenshot().save(tmp_path / "inside.png")
        if folder := os.environ.get("FLUXLAB_SCREENSHOTS"):  # make screenshots
            browser.value("document.getElementById('toolbar').style.display = 'none'")
            browser.screenshot().crop((20, 80, 1380, 960)).save(Path(folder) / file.replace(".onnx", "-netron.png"))
    finally:
        netron.stop((host, port))
