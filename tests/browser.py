"""A headless Chromium, driven by its DevTools protocol."""

import base64
import io
import itertools
import json
import shutil
import subprocess
import time
import urllib.request

import pytest
import websocket
from PIL import Image

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needed = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; on Debian or Ubuntu: apt-get install chromium")
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
        try:
            self._connect(profile)
        except BaseException:
            self.process.kill()
            raise

    def _connect(self, profile):
        port_file = profile / "DevToolsActivePort"
        wait_for(port_file.exists)
        wait_for(lambda: len(port_file.read_text().splitlines()) == 2)
        port = port_file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            pages = json.load(answer)
        page = next(each for each in pages if each["type"] == "page")
        self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=60)
        self.numbers = itertools.count(1)
        self.events = []  # of what was enabled

    def command(self, method, **parameters):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != number:
            self.events.append(answer)
        return answer["result"]

    def value(self, script):
        return self.command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)["result"].get(
            "value"
        )

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
