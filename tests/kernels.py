"""Kernels that begin as copies of one process, which has imported once what every chapter imports.

Run with an address, this file is that process; with a kernel's arguments too, it is what Jupyter starts and watches: it
asks for a copy, and ends when the copy does.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Thread


@contextmanager
def copied_kernels(folder: Path) -> Iterator[None]:
    """Write a kernelspec under ``folder``, which goes into ``JUPYTER_PATH``, and run the process that it asks."""
    command = [sys.executable, "-P", __file__, str(folder / "address")]
    spec = {"argv": [*command, "-f", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    (folder / "kernels/python3").mkdir(parents=True)
    (folder / "kernels/python3/kernel.json").write_text(json.dumps(spec))
    with Popen(command, stdout=PIPE) as process:
        try:
            process.stdout.readline()  # it listens
            yield
        finally:
            process.kill()


def ask(address: str, arguments: list[str]) -> None:
    with Client(address) as copy:
        copy.send((arguments, os.getcwd(), dict(os.environ)))
        wait_for(copy)


def wait_for(other: Connection) -> None:
    """Either end of the connection lives as long as the other: the copy may be done, the asking process be killed."""
    with suppress(EOFError, OSError):
        other.recv()
    os._exit(0)


def serve(address: str) -> None:
    from ipykernel.kernelapp import launch_new_instance
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer  # noqa: F401

    import fluxlab  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a copy
    listener = Listener(address)
    print("listening", flush=True)
    while True:
        asking = listener.accept()
        arguments, folder, environment = asking.recv()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            Thread(target=wait_for, args=(asking,), daemon=True).start()
            return launch_new_instance(argv=arguments)
        asking.close()


if __name__ == "__main__":
    address, *arguments = sys.argv[1:]
    ask(address, arguments) if arguments else serve(address)
