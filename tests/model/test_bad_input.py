"""What a forward refuses, before any work, and how it says so."""

import pytest
import torch

import fluxlab as fl
from tests.helpers import SMALL, small_inputs

CASES = {
    "a wrong channel count": ({"img": torch.zeros(1, 12, 60)}, r"img has shape \(1, 12, 60\); .* takes \(1, 12, 64\)"),
    "a missing token axis": ({"img": torch.zeros(1, 64)}, r"img has shape \(1, 64\)"),
    "ids with a wrong last axis": ({"img_ids": torch.zeros(1, 12, 2)}, r"img_ids has shape \(1, 12, 2\).*\(1, 12, 3\)"),
    "ids of a wrong length": ({"img_ids": torch.zeros(1, 5, 3)}, r"img_ids has shape \(1, 5, 3\).*\(1, 12, 3\)"),
    "text ids of a wrong length": ({"txt_ids": torch.zeros(1, 2, 3)}, r"txt_ids has shape \(1, 2, 3\)"),
    "ids without a batch axis": ({"img_ids": torch.zeros(12, 3)}, r"img_ids has shape \(12, 3\)"),
    "text of another width": ({"txt": torch.zeros(1, 5, 41)}, r"txt has shape \(1, 5, 41\).*\(1, 5, 40\)"),
    "a pooled vector of another width": ({"y": torch.zeros(1, 25)}, r"y has shape \(1, 25\).*\(1, 24\)"),
    "another batch": ({"y": torch.zeros(2, 24)}, r"y has shape \(2, 24\).*\(1, 24\)"),
    "a time that is a number": ({"timesteps": torch.tensor(0.5)}, r"timesteps has shape \(\).*\(1,\)"),
    "mixed dtypes": ({"txt": torch.zeros(1, 5, 40).half()}, r"txt is torch.float16 on cpu, and img is torch.float32"),
    "mixed devices": ({"y": torch.zeros(1, 24, device="meta")}, r"y is torch.float32 on meta, and img is .* on cpu"),
    "nothing at all": ({"img": torch.tensor(1.0)}, r"img has shape \(\); .* takes \(0, 0, 64\)"),
    "ids that are not exact": ({"img_ids": torch.zeros(1, 12, 3).bfloat16()}, r"img_ids is torch.bfloat16, which rou"),
    "a rounded time": (
        {"timesteps": torch.tensor([0.7123]).bfloat16()},
        "timesteps is torch.bfloat16, which rounds",
    ),
    "a rounded guidance": (
        {"guidance": torch.tensor([3.3]).half()},
        "guidance is torch.float16, which rounds",
    ),
    "a time of the 1000 scale": ({"timesteps": torch.tensor([712.3])}, r"timesteps has 712.3.*; t is in \[0, 1\]"),
    "a time before the start": ({"timesteps": torch.tensor([-0.1])}, r"timesteps has -0.1"),
    "a time that is not a number": ({"timesteps": torch.tensor([float("nan")])}, "timesteps has nan"),
    "a time of eight bits": (
        {"timesteps": torch.tensor([0.5]).to(torch.float8_e4m3fn)},
        "is torch.float8_e4m3fn, which",
    ),
    "a guidance that is not a number": ({"guidance": torch.tensor([float("nan")])}, "guidance has nan; give finite"),
    "a guidance without end": ({"guidance": torch.tensor([-float("inf")])}, "guidance has -inf; give finite"),
    "a guidance that is no tensor": ({"guidance": 3.5}, "guidance is 3.5; give a tensor"),
    "missing text": ({"txt": None}, "txt is None; give a tensor"),
    "missing guidance": ({"guidance": None}, r"guidance is None, but this model has a guidance embedder; give one"),
}


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("case", CASES)
def test_the_forward_refuses(case):
    changes, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        fl.Flux(SMALL)(**small_inputs(**changes))


@pytest.mark.usefixtures("as_users_run_it")
def test_integer_ids_are_welcome():
    model, inputs = fl.Flux(SMALL), small_inputs()
    whole = inputs | {"img_ids": inputs["img_ids"].long(), "txt_ids": inputs["txt_ids"].long()}
    assert torch.equal(model(**inputs), model(**whole))


@pytest.mark.parametrize("dim", [0, 7, -2])
def test_an_odd_rotation_is_refused(dim):
    with pytest.raises(ValueError, match=f"dim is {dim}; RoPE turns features in pairs"):
        fl.rope(torch.zeros(1, 4), dim, 10_000)


def test_an_odd_embedding_is_refused():
    with pytest.raises(ValueError, match="dim is 255; it must be a positive even number"):
        fl.timestep_embedding(torch.zeros(1), 255)
