"""The matrix product, where nearly all of the time goes, in a CPU's fastest form. Opened in chapter 12.

``nn.Linear`` gives float32 products to MKL, which on an AMD EPYC took twice as long as oneDNN, and adds the bias of
16-bit ones in a pass of its own. The kernel of oneDNN that compiled models call does it all in one.
"""

from __future__ import annotations

from functools import cache
from typing import TypeGuard, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.backends import mkldnn

SMALL = 2**24  # multiplications; below, checking costs more than oneDNN saves
Kind = TypeVar("Kind", bound=nn.Module)


class Linear(nn.Linear):
    """``nn.Linear``, by oneDNN where it runs on a CPU and nothing is differentiated or traced."""

    def forward(self, x: Float[Tensor, "*shape in_features"]) -> Float[Tensor, "*shape out_features"]:
        if _plain(x, self):
            return _onednn(x, self.weight, self.bias)
        return super().forward(x)


def linear_gelu(
    x: Float[Tensor, "*shape in_features"], linear: nn.Module, gelu: nn.Module, start: int = 0
) -> tuple[Float[Tensor, "*shape start"], Float[Tensor, "*shape hidden"]]:
    """``linear(x)`` cut at feature ``start``: what is before, and ``gelu`` of the rest.

    In bfloat16 oneDNN does both at once, rounding once less, unless somebody looks at either module.
    """
    if x.dtype == torch.bfloat16 and _alone(linear, Linear) and _alone(gelu, nn.GELU) and _plain(x, linear):
        weight, bias = linear.weight, linear.bias
        return _onednn(x, weight[:start], bias[:start]), _onednn(x, weight[start:], bias[start:], gelu.approximate)
    both = linear(x)
    before, rest = both.split((start, both.shape[-1] - start), dim=-1) if start else (both[..., :0], both)
    return before, gelu(rest)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str = "") -> Tensor:
    """``x weight^T + bias`` and, if its form is named, GELU."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], gelu)


def _plain(x: Tensor, linear: nn.Linear) -> bool:
    """Whether oneDNN may have this product, and it is worth the asking.

    Its kernel takes plain tensors of a CPU, of one dtype; it has no derivative, and no tracer, mode or transform of
    PyTorch's knows it.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or x.numel() * linear.out_features < SMALL:
        return False
    tensors = [x, linear.weight, *([] if linear.bias is None else [linear.bias])]
    return (
        x.dtype in _known()
        and x.shape[-1] == linear.in_features
        and all(type(t) in (Tensor, nn.Parameter) and (t.device.type, t.dtype) == ("cpu", x.dtype) for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and bool(mkldnn.enabled)
    )


@cache
def _known() -> tuple[torch.dtype, ...]:
    """The dtypes that oneDNN is good at on this processor."""
    if not (mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")):
        return ()
    return torch.float32, *[torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _alone(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether a call of the module is its kind's forward and nothing else: no hook, no wrapper."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and "forward" not in vars(module) and not any(hooks)
