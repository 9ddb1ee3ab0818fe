"""Where the inner tensors can be looked at: a name beside a tensor. Opened in chapter 14.

What a submodule gives is reached by the submodule's own name. The few tensors that no submodule gives, such as
rotated queries or a gate, pass ``see``, which is the identity until somebody looks.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

See = Callable[[str, Tensor], Tensor]  # a name below the module and a tensor, to the tensor that goes on


def unseen(name: str, tensor: Tensor) -> Tensor:
    """Nobody looks."""
    return tensor


class Observed(nn.Module):
    """A module some of whose inner tensors have names."""

    observers: tuple[See, ...] = ()

    def see(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as it is, or as the observers want it to go on."""
        for observer in self.observers:
            tensor = observer(name, tensor)
        return tensor
