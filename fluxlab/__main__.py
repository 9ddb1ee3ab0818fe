"""``python -m fluxlab``: the command; ``torchrun -m fluxlab`` starts it in several processes."""

from fluxlab.cli import app

app()
