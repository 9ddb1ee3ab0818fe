"""Example inputs, and inputs on disk."""

import pytest
import torch
from PIL import Image

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
    with pytest.raises(ValueError, match="height is 0; it must be a whole number of at least 1"):
        fl.example_inputs("flux-dev", height=0, device="meta")


def test_shapes_without_values_are_not_written(tmp_path):
    with pytest.raises(fl.WeightsError, match="is on the meta device: it has no values to write"):
        fl.example_inputs("flux-dev", device="meta").save(tmp_path / "inputs.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_usual_guidance_and_steps_are_the_published_ones():
    """The model cards, and the published commands' defaults."""
    usual = {name: (variant.guidance, variant.num_steps) for name, variant in fl.VARIANTS.items() if variant.repo}
    assert usual == {
        "flux-dev": (3.5, 50),
        "flux-schnell": (None, 4),
        "flux-krea-dev": (4.5, 50),
        "flux-kontext-dev": (2.5, 30),
        "flux-fill-dev": (30.0, 50),
        "flux-canny-dev": (30.0, 50),
        "flux-depth-dev": (10.0, 50),
    }
    given = {name: fl.example_inputs(name, 32, 32, device="meta").guidance is None for name in usual}
    assert [name for name, none in given.items() if none] == ["flux-schnell"]
    assert fl.example_inputs("flux-tiny-dev", 32, 32).guidance.tolist() == [4.0]


def test_inputs_and_steps_are_compared_by_identity():
    """Tensors have no truth value, so a comparison by content could only fail."""
    inputs, step = fl.example_inputs("flux-tiny-dev"), fl.Step(0, 1.0, 0.5, *[torch.ones(1, 2, 2)] * 3)
    assert inputs == inputs
    assert inputs != fl.example_inputs("flux-tiny-dev")
    assert step == step
    assert step != fl.Step(0, 1.0, 0.5, *[torch.ones(1, 2, 2)] * 3)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fl.example_inputs("flux-tiny-dev", height=128.0), "height is 128.0; it must be a whole number"),
        (lambda: fl.example_inputs("flux-tiny-dev", batch=0), "batch is 0; it must be a whole number of at least 1"),
        (lambda: fl.example_inputs("flux-tiny-dev", seed="3"), "seed is '3'; it must be a whole number"),
        (lambda: fl.schedule(4.0, 64), "num_steps is 4.0; it must be a whole number"),
        (lambda: fl.schedule(4, "64"), "image_tokens is '64'; it must be a whole number"),
        (lambda: fl.noise([1.5], 32, 32), "seed is 1.5; it must be a whole number"),
        (lambda: fl.noise([], 32, 32), "seed is an empty list"),
        (lambda: fl.noise([0], 32, None), "width is None; it must be a whole number"),
        (lambda: fl.image_ids(1.0, 32, 32), "batch is 1.0; it must be a whole number"),
        (lambda: fl.image_ids(1, 32, 32, index=0.5), "index is 0.5; it must be a whole number of at least 0"),
        (lambda: fl.text_ids(1, 2.5), "text_tokens is 2.5; it must be a whole number of at least 0"),
        (lambda: fl.unpack(torch.zeros(1, 4, 64), 32.0, 32), "height is 32.0; it must be a whole number"),
    ],
)
def test_numbers_of_the_wrong_kind_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.usefixtures("as_users_run_it")
def test_whole_numbers_of_any_kind_will_do():
    import numpy as np

    assert fl.schedule(np.int64(4), torch.tensor(64)) == fl.schedule(4, 64)
    assert torch.equal(fl.noise(torch.tensor([3]), 32, 32), fl.noise(3, 32, 32))


def test_ids_stay_on_the_cpu_beside_a_model_on_mps():
    """Angles are computed in float64, which MPS lacks."""
    from fluxlab.pipeline.latents import ids_device

    assert [str(ids_device(device)) for device in ("mps", "mps:0", "cpu", "cuda:1")] == ["cpu", "cpu", "cpu", "cuda:1"]


@pytest.fixture
def other_defaults():
    """Of torch: float64, on the meta device."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def test_noise_and_ids_do_not_follow_the_defaults_of_torch(other_defaults):
    latent = fl.noise([3], 32, 32)
    inputs = fl.example_inputs("flux-tiny-dev", 32, 32, seed=1)
    ids = fl.image_ids(1, 32, 32), fl.text_ids(1, 5)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    assert torch.equal(latent, fl.noise([3], 32, 32))
    for tensor in (*ids, *inputs.kwargs().values()):
        assert (tensor.dtype, tensor.device.type) == (torch.float32, "cpu")
    same = fl.example_inputs("flux-tiny-dev", 32, 32, seed=1).kwargs()
    assert all(torch.equal(tensor, same[name]) for name, tensor in inputs.kwargs().items())


@pytest.mark.usefixtures("as_users_run_it")
def test_a_picture_does_not_follow_the_defaults_of_torch(tiny, other_defaults):
    image = Image.new("RGB", (64, 64), "green")
    options = {"num_steps": 2, "height": 64, "width": 64, "image": image, "strength": 0.5, "progress": False}
    picture = tiny("a red ring", **options)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    assert picture.tobytes() == tiny("a red ring", **options).tobytes()


@pytest.mark.usefixtures("as_users_run_it")
def test_files_and_what_is_computed_ahead_do_not_follow_them_either(tmp_path, tiny, other_defaults):
    fl.example_inputs("flux-tiny-dev", 32, 32).save(tmp_path / "x.safetensors")
    options = {"num_steps": 2, "height": 64, "width": 64, "progress": False}
    with fl.speed.modulation_ahead(tiny):
        picture = tiny("a red ring", **options)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    assert fl.FluxInputs.load(tmp_path / "x.safetensors").img.shape == (1, 4, 64)
    with fl.speed.modulation_ahead(tiny):
        assert picture.tobytes() == tiny("a red ring", **options).tobytes()
