"""How the model is made fast and small, from outside and for a while. Opened in chapter 17.

Each function changes the pipeline it is given and returns a handle: ``undo()`` takes it off again, and so does the end
of a ``with`` block. What was put on last comes off first. On one pipeline, in this order from left to right:

    quantize   compile   modulation_ahead   cache_steps

all of them go together, each at most once. ``shard`` goes with ``modulation_ahead`` and ``cache_steps``, put on after
it, and not with ``quantize`` and ``compile``; ``compile(whole=True)`` does not go with ``cache_steps``. What does not
go together, or comes in another order, is refused in a sentence.
"""

from fluxlab.speed.ahead import modulation_ahead
from fluxlab.speed.cache import cache_steps
from fluxlab.speed.compiled import compile
from fluxlab.speed.handle import Handle
from fluxlab.speed.quantized import quantize
from fluxlab.speed.sharded import shard

__all__ = ["Handle", "cache_steps", "compile", "modulation_ahead", "quantize", "shard"]
