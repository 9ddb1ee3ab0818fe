"""Memory of a call, against what can be counted by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fluxlab as fl
from fluxlab.inspect.working_memory import working_memory


class Attend(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class AttendByKeyword(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(query=x, key=x, value=x)


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, device="meta", dtype=dtype)


def test_two_linears_hold_both_their_outputs_at_once():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(10, 1000), nn.Linear(1000, 20))
    assert working_memory(net, meta(100, 10)) == 4 * 100 * (1000 + 20)


def test_what_is_freed_is_taken_off_and_views_are_free():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(10, 1000), nn.Flatten(0), nn.Unflatten(0, (100, 1000)), nn.ReLU(), nn.ReLU())
    assert working_memory(net, meta(100, 10)) == 2 * 4 * 100 * 1000


@pytest.mark.parametrize("attend", [Attend, AttendByKeyword])
def test_attention_weights_are_never_whole(attend):
    assert working_memory(attend(), meta(1, 2, 4096, 8)) == 4 * 2 * 4096 * 8


def test_blocks_in_a_row_need_no_more_than_one_of_each():
    inputs = fl.example_inputs("flux-dev", height=256, width=256, device="meta").kwargs()
    few, more = (
        working_memory(fl.build("flux-dev", device="meta", depth=n, depth_single_blocks=n), **inputs) for n in (1, 3)
    )
    assert few == more


def test_numbers_make_no_difference(tiny):
    sums = [
        working_memory(model, **fl.example_inputs("flux-tiny-dev", device=device).kwargs())
        for model, device in ((tiny.model, "cpu"), (fl.build("flux-tiny-dev", device="meta"), "meta"))
    ]
    assert sums[0] == sums[1]
