"""Example inputs, and inputs on disk."""

import pytest
import torch

import fluxlab as fl


def test_the_example_inputs_have_the_published_shapes():
    """512x512, batch 2, of the reference implementation."""
    inputs = fl.example_inputs("flux-dev", height=512, width=512, batch=2, device="meta")
    shapes = {name: list(tensor.shape) for name, tensor in inputs.kwargs().items()}
    assert shapes == {
        "img": [2, 1024, 64],
        "img_ids": [2, 1024, 3],
        "txt": [2, 512, 4096],
        "txt_ids": [2, 512, 3],
        "timesteps": [2],
        "y": [2, 768],
        "guidance": [2],
    }


def test_schnell_takes_no_guidance_and_256_text_tokens():
    inputs = fl.example_inputs("flux-schnell", height=768, width=1360, device="meta")
    assert inputs.guidance is None
    assert inputs.img.shape[1] + inputs.txt.shape[1] == 4080 + 256


@pytest.mark.parametrize("name", fl.VARIANTS)
def test_every_variant_runs_on_its_example_inputs(name):
    inputs = fl.example_inputs(name, height=128, width=192, batch=2, device="meta")
    config = fl.VARIANTS[name].transformer
    assert fl.build(name, device="meta")(**inputs.kwargs()).shape == (2, 96, config.out_channels)


def test_saved_inputs_come_back_as_they_were(tmp_path):
    for name in ("flux-tiny-dev", "flux-tiny-schnell"):
        inputs = fl.example_inputs(name, dtype=torch.bfloat16)
        inputs.save(tmp_path / "inputs.safetensors")
        again = fl.FluxInputs.load(tmp_path / "inputs.safetensors")
        assert inputs.kwargs().keys() == again.kwargs().keys()
        assert all(torch.equal(tensor, again.kwargs()[key]) for key, tensor in inputs.kwargs().items())


def test_a_file_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"img": torch.zeros(1), "prompt": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(fl.WeightsError, match=r"5 missing: img_ids, .*; 1 unexpected: prompt"):
        fl.FluxInputs.load(tmp_path / "other.safetensors")


def test_the_inputs_say_their_shapes():
    assert "txt       [1, 32, 128]       torch.float32, cpu" in repr(fl.example_inputs("flux-tiny-dev"))


def test_a_size_of_zero_is_refused_not_replaced():
    with pytest.raises(ValueError, match="height is 0; it must be a positive number"):
        fl.example_inputs("flux-dev", height=0, device="meta")


def test_shapes_without_values_are_not_written(tmp_path):
    with pytest.raises(fl.WeightsError, match="is on the meta device and has no values to write"):
        fl.example_inputs("flux-dev", device="meta").save(tmp_path / "inputs.safetensors")
    assert not list(tmp_path.iterdir())
