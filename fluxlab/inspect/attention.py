"""Attention weights, worked out again from queries and keys, as little of them at a time as is kept. Chapter 14.

Axes: batch B, heads H, tokens L, head width D.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fluxlab.arguments import whole
from fluxlab.model.rope import Heads

Range = slice | Literal["text", "image"] | None
_CHUNK = 64 * 2**20  # bytes of scores at a time


def attention_weights(
    q: Heads, k: Heads, heads: Sequence[int], queries: slice, keys: slice, mean_heads: bool = False
) -> Float[Tensor, "batch kept_heads queries keys"]:
    """``softmax(q k^T / sqrt(D))`` of rotated q and k, a few rows of one head at a time, in float32 at least.

    Args:
        q: rotated queries.
        k: rotated keys.
        heads: which to keep.
        queries: the rows to keep.
        keys: the columns to keep; the softmax runs over all of them.
        mean_heads: give the mean over ``heads``, as one head.

    Raises:
        ValueError: there is no such head.
    """
    if wrong := [head for head in heads if not 0 <= head < q.shape[1]]:
        raise ValueError(f"heads has {wrong[0]}, and the model has heads 0 to {q.shape[1] - 1}")
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, columns = q[:, :, queries].shape[2], k[:, :, keys].shape[2]
    out = q.new_zeros((q.shape[0], 1 if mean_heads else len(heads), rows, columns), dtype=wide)
    step = max(1, _CHUNK // (q.shape[0] * k.shape[2] * wide.itemsize))
    for i, head in enumerate(heads):
        towards = k[:, head].to(wide).transpose(1, 2)
        for start in range(0, rows, step):
            some = q[:, head, queries][:, start : start + step].to(wide)
            weights = (some @ towards / math.sqrt(q.shape[3])).softmax(dim=-1)[..., keys]
            if mean_heads:
                out[:, 0, start : start + step] += weights / len(heads)
            else:
                out[:, i, start : start + step] = weights
    return out


def tokens_of(chosen: Range, tokens: int, text: int | None) -> slice:
    """The tokens that a slice or a word stands for, where ``text`` of ``tokens`` are the text's."""
    if chosen is None or isinstance(chosen, slice):
        chosen = chosen or slice(None)
        for part, least in ((chosen.start, -(2**63)), (chosen.stop, -(2**63)), (chosen.step, 1)):
            if part is not None:
                whole(f"queries or keys is {chosen!r}, in which a part", part, least)
        return chosen
    if chosen not in ("text", "image"):
        raise ValueError(f"queries and keys are a slice, 'text' or 'image'; got {chosen!r}")
    if text is None:
        raise ValueError(
            f"{chosen!r} needs to know where the text ends, which a single block is not told; give a slice"
        )
    return slice(0, text) if chosen == "text" else slice(text, tokens)
