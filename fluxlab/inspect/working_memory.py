"""How much memory a call takes beside its weights, worked out on the meta device. Opened in chapter 12."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def working_memory(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Bytes of the tensors that are alive at the worst moment of one call, weights and inputs left out.

    Attention is taken to work in tiles, as fused kernels do ("FlashAttention", Dao et al. 2022), so that its weights
    are never whole. Not counted: what kernels need inside, and what an allocator rounds up.

    Args:
        module: any module; on the meta device nothing is computed.
        *args: what it is called with.
        **kwargs: likewise.
    """
    given = [*module.parameters(), *module.buffers(), *tree_leaves((args, kwargs))]
    with torch.no_grad(), _Alive([t for t in given if isinstance(t, Tensor)]) as alive, _Tiled():
        module(*args, **kwargs)
    return alive.peak


class _Alive(TorchDispatchMode):
    """Adds up the storages that operators make, until each is freed."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {t.untyped_storage()._cdata for t in given}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (place := tensor.untyped_storage()._cdata) not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(place)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, place, storage.nbytes())
        return made

    def _freed(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


class _Tiled(TorchFunctionMode):
    """Attention gives its output and makes nothing else."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, value = named["query"], named["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))
