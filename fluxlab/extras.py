"""The libraries that a plain installation does not bring, and those that do not fit beside torch."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# what torchao, which transformers imports where it is installed, has logged while it is imported: about GPU kernels
_LOUD = ("torchao", "torch.utils._pytree")


@contextmanager
def importing() -> Iterator[None]:
    """Around the import of a library that may be missing, or may not fit the others: says which, in one line.

    Raises:
        ImportError: it cannot be imported; the message says what to install.
    """
    try:
        with ExitStack() as quiet:
            for name in _LOUD:
                logger = logging.getLogger(name)
                quiet.callback(logger.setLevel, logger.level)
                logger.setLevel(logging.ERROR)
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
