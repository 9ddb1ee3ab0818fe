"""The libraries that a plain installation does not bring, and those that do not fit beside torch."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that libraries log."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def importing() -> Iterator[None]:
    """Around the import of a library that may be missing, or may not fit the others: says which, in one line.

    Raises:
        ImportError: it cannot be imported; the message says what to install.
    """
    try:
        with quiet():  # torchao and others log, while they are imported, of kernels they lack
            yield
    except (ImportError, RuntimeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            library = cause.name.partition(".")[0]
            raise ImportError(f"{library} is not installed here; pip install 'fluxlab[course]' brings it") from error
        raise ImportError(
            f"a library cannot be imported ({cause}); if it was built for another torch than {torch.__version__}, as a "
            f"torchvision often is, install the one that fits, or remove it: fluxlab does not need it"
        ) from error
