"""The menus of ``fl.explore`` in JupyterLab, in a real browser."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.browser import Browser, needed, wait_for

pytestmark = needed

CELL = """
import torch
import fluxlab as fl

model = fl.build("flux-tiny-dev")
with torch.no_grad(), fl.capture(model, ["vec", "double_blocks.*.img.output", "velocity"]) as tape:
    model(**fl.example_inputs("flux-tiny-dev").kwargs())
fl.explore(tape)
"""
PICTURES = "document.querySelectorAll('.widget-output img').length"
PICTURE = "document.querySelector('.widget-output img')?.src"
CHOOSE = """
const menu = Array.from(document.querySelectorAll('select')).find(each => each.innerText.includes('velocity'));
menu.selectedIndex = 1;
menu.dispatchEvent(new Event('change', {bubbles: true}));
"""


@pytest.fixture
def lab(tmp_path):
    """JupyterLab with one notebook, under a configuration of its own; gives its address."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
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


def connected(lab):
    """Whether the page holds a kernel that waits for work: before, JupyterLab would ask which one to take."""
    try:
        kernels = json.load(urllib.request.urlopen(f"{lab}/api/kernels"))
    except urllib.error.HTTPError:  # the server lists a kernel that is just starting
        return False
    return any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels)


def test_choosing_another_tensor_changes_the_picture(lab, tmp_path):
    browser = Browser(tmp_path / "profile")
    try:
        browser.command("Page.navigate", url=f"{lab}/lab/tree/explore.ipynb")
        wait_for(lambda: connected(lab), 60)
        browser.value("jupyterapp.commands.execute('notebook:run-all-cells')")
        wait_for(lambda: browser.value(PICTURE), 60)
        first = browser.value(PICTURE)
        browser.value(CHOOSE)
        wait_for(lambda: browser.value(PICTURE) not in (None, first), 60)
        for _ in range(6):  # another menu changed too: it must not leave a second picture
            time.sleep(1)
            assert browser.value(PICTURES) == 1
    finally:
        browser.close()
