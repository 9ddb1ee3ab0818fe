"""How much memory a call takes beside its weights, worked out on the meta device. Opened in chapter 12."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fluxlab.inspect.looker import eagerly
from fluxlab.inspect.names import unwrapped


def working_memory(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Bytes of the tensors that are alive at the worst moment of one call, weights and inputs left out.

    Attention is taken to work in tiles, as fused kernels do ("FlashAttention", Dao et al. 2022), so that its weights
    are never whole. Not counted: what a function of PyTorch needs inside, and what an allocator rounds up.

    Args:
        module: any module; on the meta device nothing is computed.
        *args: what it is called with.
        **kwargs: likewise.

    Raises:
        ValueError: it is no module.
    """
    module = unwrapped(module)[""]
    with (
        torch.no_grad(),
        eagerly(),
        _Alive([*module.parameters(), *module.buffers(), *tensors_in((args, kwargs))]) as alive,
    ):
        module(*args, **kwargs)
    return alive.peak


class _Alive(TorchFunctionMode):
    """Adds up the storages that functions make, until each is freed."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.given = [tensor.untyped_storage() for tensor in given]
        self.known = {id(storage) for storage in self.given}
        self.now = self.peak = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            made = named["query"].new_empty(*named["query"].shape[:-1], named["value"].shape[-1])
        else:
            made = func(*args, **kwargs)
        for tensor in tensors_in(made):
            storage = tensor.untyped_storage()
            if id(storage) not in self.known:
                self.known.add(id(storage))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        return made

    def _freed(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, or in the tuples, lists and dicts of one."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each)
