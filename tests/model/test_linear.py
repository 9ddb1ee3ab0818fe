"""The product that a CPU computes fast: the same numbers as nn.Linear's, and nn.Linear's own wherever more is asked."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fluxlab.model import linear as fast
from fluxlab.model.blocks import MLP
from fluxlab.model.linear import Linear, linear_gelu
from tests.helpers import randomise

onednn = pytest.mark.skipif(torch.float32 not in fast._known(), reason="this processor has no oneDNN worth the asking")
bfloat16 = pytest.mark.skipif(torch.bfloat16 not in fast._known(), reason="this processor has no bfloat16 products")
DTYPES = [pytest.param(torch.float32, marks=onednn), pytest.param(torch.bfloat16, marks=bfloat16)]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """What oneDNN was asked for; small products count too."""
    seen = []
    real = fast._onednn

    def spy(x, weight, bias, gelu=""):
        seen.append(gelu)
        return real(x, weight, bias, gelu)

    monkeypatch.setattr(fast, "_onednn", spy)
    monkeypatch.setattr(fast, "SMALL", 0)
    return seen


def made(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return Linear(24, 40, bias=bias).to(dtype).requires_grad_(False), torch.randn(2, 7, 24, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 24), (2, 7, 24), (2, 3, 7, 24), (2, 0, 24)])
def test_the_same_numbers_as_nn_linear(dtype, bias, shape, calls):
    linear, _ = made(dtype, bias)
    x = torch.randn(shape, dtype=dtype)
    out = linear(x)
    assert calls == [""]
    wide = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    assert out.dtype == dtype
    assert out.shape == (*shape[:-1], 40)
    torch.testing.assert_close(out, F.linear(x, linear.weight, linear.bias))
    torch.testing.assert_close(out.double(), wide, rtol=torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


@onednn
def test_strided_tensors_are_read_as_they_lie():
    linear, x = made()
    turned = torch.randn(7, 2, 24).transpose(0, 1)
    torch.testing.assert_close(linear(turned), linear(turned.contiguous()))
    linear.weight = nn.Parameter(linear.weight.T.contiguous().T, requires_grad=False)
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias))


def test_gradients_are_those_of_nn_linear(calls):
    linear, x = made()
    for asks in (linear.weight, linear.bias, x):
        asks.requires_grad_(True)
        (grad,) = torch.autograd.grad(linear(x).square().sum(), asks)
        (expected,) = torch.autograd.grad(F.linear(x, linear.weight, linear.bias).square().sum(), asks)
        torch.testing.assert_close(grad, expected)
        asks.requires_grad_(False)
    assert not calls


def test_forward_derivatives_and_transforms_go_through(calls):
    linear, x = made()
    expected = F.linear(x, linear.weight)
    _, tangent = torch.func.jvp(linear, (x,), (x,))
    torch.testing.assert_close(tangent, expected)
    with torch.no_grad(), forward_ad.dual_level():
        out = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, x)))
    torch.testing.assert_close(out.tangent, expected)
    torch.testing.assert_close(torch.vmap(linear)(x), F.linear(x, linear.weight, linear.bias))
    assert not calls


@pytest.mark.filterwarnings("ignore")  # of what is old in PyTorch, and still used
def test_tracers_modes_and_casts_see_a_linear(calls):
    linear, x = made()
    exported = torch.export.export(nn.Sequential(linear), (x,))
    assert "aten.linear" in str(exported.graph)
    assert "aten::linear" in str(torch.jit.trace(linear, x, check_trace=False).inlined_graph)
    with FlopCounterMode(display=False) as counter:
        linear(x)
    assert counter.get_total_flops() == 2 * 2 * 7 * 24 * 40
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False, deterministic=False, allow_tf32=False):
        linear(x)
    assert linear.to("meta")(x.to("meta")).shape == (2, 7, 40)
    assert not calls


def test_what_does_not_fit_is_told_by_pytorch():
    linear, x = made()
    for wrong, message in ((x[..., :5], "shapes cannot be multiplied"), (x.double(), "dtype")):
        with pytest.raises(RuntimeError, match=message):
            nn.Linear.forward(linear, wrong)
        with pytest.raises(RuntimeError, match=message):
            linear.forward(wrong)


@onednn
def test_small_products_are_left_to_nn_linear(monkeypatch, calls):
    linear, x = made()
    monkeypatch.setattr(fast, "SMALL", x.numel() * 40 + 1)
    linear(x)
    assert not calls
    monkeypatch.setattr(fast, "SMALL", x.numel() * 40)
    linear(x)
    assert calls == [""]


@bfloat16
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("start", [0, 16])
def test_linear_and_gelu_at_once_round_once_less(approximate, start, calls):
    linear, x = made(torch.bfloat16)
    gelu = nn.GELU(approximate)
    before, hidden = linear_gelu(x, linear, gelu, start)
    assert calls == ["", approximate]
    both = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    expected = F.gelu(both[..., start:], approximate=approximate)
    twice = F.gelu(both[..., start:].bfloat16(), approximate=approximate)
    torch.testing.assert_close(before, both[..., :start].bfloat16())
    torch.testing.assert_close(hidden, twice)
    assert (hidden - expected).norm() < (twice - expected).norm()


@bfloat16
def test_whoever_looks_between_sees_both_modules(calls):
    mlp, x = randomise(MLP(24, 40)).bfloat16().requires_grad_(False), made(torch.bfloat16)[1]
    unseen = mlp(x)
    assert calls == ["", "tanh", ""]
    for module, register in ((mlp[0], "register_forward_hook"), (mlp[1], "register_forward_pre_hook")):
        seen = []
        handle = getattr(module, register)(lambda *given, seen=seen: seen.append(given[-1]))
        torch.testing.assert_close(mlp(x), unseen, rtol=2**-6, atol=1e-2)  # rounded once more
        assert len(seen) == 1
        handle.remove()
    calls.clear()
    mlp(x)
    assert calls == ["", "tanh", ""]


@bfloat16
def test_a_module_put_in_place_of_a_linear_is_called():
    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.weight, self.bias = inner.weight, inner.bias
            self.in_features, self.out_features = inner.in_features, inner.out_features

        def forward(self, x):
            return 2 * self.inner(x)

    mlp, x = randomise(MLP(24, 40)).bfloat16().requires_grad_(False), made(torch.bfloat16)[1]
    expected = mlp[2](mlp[1](2 * mlp[0](x)))
    mlp[0] = Doubled(mlp[0])
    assert torch.equal(mlp(x), expected)
    mlp[0] = mlp[0].inner
    mlp[0].forward = lambda x: 2 * Linear.forward(mlp[0], x)  # as libraries that move weights about do
    assert torch.equal(mlp(x), expected)


@bfloat16
def test_a_compiled_block_is_one_graph_of_pytorchs_own_operations():
    code = """
import torch, fluxlab as fl
from fluxlab.model import linear
linear.SMALL = 0
model = fl.build("flux-tiny-dev", dtype=torch.bfloat16).requires_grad_(False)
block, seen = model.single_blocks[0], []
x, vec = torch.randn(1, 16, 128).bfloat16(), torch.randn(1, 128).bfloat16()
pe = model.pe_embedder(fl.image_ids(1, 64, 64))
expected = block(x, vec, pe)

def backend(graph, inputs):
    seen.append(graph.code)
    return graph

compiled = torch.compile(block, fullgraph=True, backend=backend)(x, vec, pe)
torch.testing.assert_close(compiled, expected, rtol=2e-2, atol=2e-2)
assert len(seen) == 1 and "gelu" in seen[0] and "mkldnn" not in seen[0], seen
"""
    subprocess.run([sys.executable, "-c", code], check=True)  # apart: what checks shapes here does not compile
