"""Where the inner tensors can be looked at: a name beside a tensor. Opened in chapter 14.

What a submodule gives is reached by the submodule's own name. The few tensors that no submodule gives, such as
rotated queries or a gate, pass ``see``, which is the identity until somebody looks.
"""

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor, nn

See = Callable[[str, Tensor], Tensor]  # a name below the module and a tensor, to the tensor that goes on
Observer = Callable[[nn.Module, str, Tensor], Tensor]

observers: ContextVar[tuple[Observer, ...]] = ContextVar("observers", default=())  # those of this thread


def unseen(name: str, tensor: Tensor) -> Tensor:
    """Nobody looks."""
    return tensor


class Observed(nn.Module):
    """A module some of whose inner tensors have names."""

    def see(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as it is, or as the observers want it to go on."""
        if not torch.compiler.is_compiling():  # who looks has the model run eagerly
            for observer in observers.get():
                tensor = observer(self, name, tensor)
        return tensor
