import pytest
import torch

from fluxlab.arguments import is_finite

HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found(dtype, number):
    tensor = torch.linspace(-3, 3, 60).reshape(3, 4, 5).to(dtype)
    assert is_finite(tensor)
    tensor[1, 2, 3] = number
    assert not is_finite(tensor)
    assert not is_finite(tensor[1, 2, 3])
    assert is_finite(tensor[2])


def test_the_largest_numbers_and_no_numbers_are_finite():
    for dtype in (torch.float32, torch.float64, *HALVES):
        largest = torch.finfo(dtype).max
        assert is_finite(torch.tensor([largest, -largest], dtype=dtype))
    assert is_finite(torch.empty(0, 3))
