"""What asks a model for its named tensors while it runs, for ``capture`` and ``patch``. Opened in chapter 14."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import get_ident

from torch import Tensor, nn

from fluxlab.inspect.tape import Tape
from fluxlab.model.observe import observers


@dataclass(eq=False)
class Looker:
    """What ``see`` asks of each of its tensors: some are only remembered, until what is made of them is there.

    Blocks may lie in one another. Attention weights are of the q and k that go on after all of them, and come before
    the output of attention, whichever block asks for either.
    """

    points: dict[tuple[nn.Module, str], str]
    take: Callable[..., Tensor]
    tape: Tape
    doubles: set[nn.Module]  # the double blocks among what is looked at
    changes: bool
    parts: dict[tuple[nn.Module, str], Tensor] = field(default_factory=dict)
    thread: int = field(default_factory=get_ident)

    def __call__(self, module: nn.Module, point: str, tensor: Tensor) -> Tensor:
        """The tensor that goes on."""
        if get_ident() != self.thread:  # asyncio.to_thread takes the observers along
            return tensor
        lookers = [each for each in observers.get() if isinstance(each, Looker) and each.thread == self.thread]
        if point == "txt.input" and (module in self.doubles or not self.doubles):
            self.tape.text_tokens = tensor.shape[1]
        if point == "attended" and self is lookers[0]:
            for each in lookers:
                tensor = each.attend(module, tensor)
        if name := self.points.get((module, point)):
            tensor = self.take(name, tensor)
        if point in ("q", "k", "v") and self is lookers[-1]:
            for each in lookers:
                if (module, "attention") in each.points:
                    each.parts[module, point] = tensor
        if (module, "clean") in self.points:
            if point in ("img", "timesteps"):
                self.parts[module, point] = tensor
            elif point == "velocity":
                img, t = self.parts.pop((module, "img")), self.parts.pop((module, "timesteps"))[:, None, None]
                self.take("clean", img[..., : tensor.shape[-1]] - (t.to(tensor.device) * tensor).to(tensor.dtype))
        return tensor

    def attend(self, module: nn.Module, attended: Tensor) -> Tensor:
        """The output of attention, once whoever asks for its weights has had them."""
        if name := self.points.get((module, "attention")):
            return self.take(name, *(self.parts.pop((module, each)) for each in ("q", "k", "v")), attended)
        return attended
