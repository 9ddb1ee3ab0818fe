"""Counts of the models that FLUX is set beside, from their published configs, on the meta device."""

import pytest

import fluxlab as fl
from fluxlab.course.others import KINDS, OTHERS, kinds, other

COUNTS = {  # counted from the published configs and checkpoints
    "Llama 7B": 6_738_415_616,
    "SD 1.5": 859_520_964,
    "SD 2.1": 865_910_724,
    "SDXL": 2_567_463_684,
    "SD3-medium": 2_028_328_000,
    "SD3.5-medium": 2_243_171_520,
    "SD3.5-large": 8_056_627_520,
    "FLUX.1 dev": 11_901_408_320,
    "FLUX.1 schnell": 11_891_178_560,
    "T5-XXL encoder": 4_762_310_656,
    "CLIP-L text": 123_060_480,
    "FLUX.1 VAE": 83_819_683,
}


def test_each_of_the_other_models_has_its_published_count_here():
    assert list(COUNTS) == list(OTHERS)


@pytest.mark.parametrize("name", OTHERS)
def test_the_model_has_the_published_number_of_parameters(name):
    model = other(name)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_the_position_buffer_is_what_sd35_medium_lacks_to_its_announced_size():
    model = other("SD3.5-medium")
    assert sum(b.numel() for b in model.buffers()) == 384 * 384 * 1536


@pytest.mark.parametrize("name", OTHERS)
def test_the_kinds_sum_to_the_whole(name):
    counts = kinds(other(name))
    assert tuple(counts) == KINDS
    assert sum(counts.values()) == COUNTS[name]


def test_kinds_by_hand():
    llama = kinds(other("Llama 7B"))
    assert llama["attention"] == 32 * 4 * 4096**2
    assert llama["MLP"] == 32 * 3 * 4096 * 11008
    flux = kinds(other("FLUX.1 dev"))
    assert flux["modulation"] == 3_247_448_064  # published
    assert flux["convolution"] == 0
    sd3 = kinds(other("SD3-medium"))
    streams = 23 * (6 + 6) + (6 + 2) + 2  # shift, scale and gate twice; the last text stream has a shift and a scale
    assert sd3["modulation"] == streams * (1536 * 1536 + 1536)
    assert kinds(other("SD 1.5"))["convolution"] > kinds(other("SD 1.5"))["attention"]


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="SDXL"):
        other("SD 9")


def test_flux_2_is_counted_by_what_its_weights_are_for():
    model = fl.build("flux2-klein-4b", device="meta")
    counted = kinds(model)
    assert sum(counted.values()) == sum(p.numel() for p in model.parameters())
    assert counted["attention"] > counted["modulation"] > counted["the rest"] > counted["convolution"] == 0
    assert counted["MLP"] > counted["attention"]
