"""Every test runs with jaxtyping's runtime checker on: a wrong shape in a signature is an error."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401

install_import_hook("fluxlab", "tests.typechecker.check")  # for every module of fluxlab imported from here on

import pytest


@pytest.fixture(scope="session")
def tiny():
    import fluxlab

    return fluxlab.load("flux-tiny-dev")


@pytest.fixture
def as_users_run_it():
    """Without the runtime checker of shapes, which would speak first."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def pytest_collection_modifyitems(items):
    """The longest first, chapters before all, so that no worker is left alone with them at the end."""
    items.sort(key=lambda item: 2 - 2 * hasattr(item, "nbmake") - item.name.startswith("test_all_stages"))
