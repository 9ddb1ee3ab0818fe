"""The menus of ``fl.explore`` in JupyterLab, in a real browser."""

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.onnx.test_netron import CHROMIUM, Browser, wait_for

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; on Debian or Ubuntu: apt-get install chromium")

CELL = """
import torch
import fluxlab as fl

model = fl.build("flux-tiny-dev")
with torch.no_grad(), fl.capture(model, ["vec", "velocity"]) as tape:
    model(**fl.example_inputs("flux-tiny-dev").kwargs())
fl.explore(tape)
"""
READY = "document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status"
SHOWN = "Array.from(document.querySelectorAll('.widget-output img, .jupyter-widgets-output-area img'))"
CHOOSE = """
const menu = Array.from(document.querySelectorAll('select')).find(each => each.innerText.includes('velocity'));
menu.selectedIndex = 1;
menu.dispatchEvent(new Event('change', {bubbles: true}));
"""


@pytest.fixture
def lab(tmp_path):
    """JupyterLab with one notebook, under a configuration of its own; gives its address."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}  # else JupyterLab asks which
    notebook = new_notebook(cells=[new_code_cell(CELL)], metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "explore.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--expose-app-in-browser", f"--port={port}", "--IdentityProvider.token="]
    folders = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | folders | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "jupyterlab", *options]
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def answers():
        try:
            return urllib.request.urlopen(f"{url}/api/status").status == 200
        except urllib.error.URLError:
            return False

    try:
        wait_for(answers, 60)
        yield url
    finally:
        server.terminate()
        server.wait(20)


def test_choosing_another_tensor_changes_the_picture(lab, tmp_path):
    browser = Browser(tmp_path / "profile")
    try:
        browser.command("Page.navigate", url=f"{lab}/lab/tree/explore.ipynb")
        wait_for(lambda: browser.value(READY) == "idle", 60)
        browser.value("jupyterapp.commands.execute('notebook:run-all-cells')")
        wait_for(lambda: browser.value(f"{SHOWN}.length") == 1, 60)
        first = browser.value(f"{SHOWN}[0].src")
        browser.value(CHOOSE)
        wait_for(lambda: browser.value(f"{SHOWN}.length && {SHOWN}[0].src") not in (0, first), 60)
    finally:
        browser.screenshot().save("/tmp/pix/explore.png")
        print(browser.value("document.querySelector('.jp-Notebook').innerHTML")[:6000])
        browser.close()
