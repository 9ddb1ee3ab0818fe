"""The schedule against published values and diffusers' scheduler."""

import itertools

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

import fluxlab as fl
from fluxlab.pipeline.schedule import shift_mu


def test_the_shift_has_the_published_values():
    """FLUX.1 [dev]: base shift 0.5 at 256 image tokens, max shift 1.15 at 4096."""
    assert [round(shift_mu(n), 4) for n in (256, 4096, 1024, 64)] == [0.5, 1.15, 0.63, 0.4675]


def test_four_steps_have_the_published_times():
    assert fl.schedule(4, 1024) == pytest.approx([1, 0.849235, 0.652489, 0.384945, 0], abs=1e-6)


def test_fifty_steps_have_the_published_times():
    times = fl.schedule(50, 1024)
    assert [times[i] for i in (1, 10, 40, 49)] == pytest.approx([0.989248, 0.882497, 0.319451, 0.036904], abs=1e-6)


def test_without_shift_the_steps_are_even():
    assert fl.schedule(4, 1024, shift=False) == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 8192])
@pytest.mark.parametrize("steps", [1, 4, 20, 50])
def test_the_schedule_equals_diffusers(steps, tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=shift_mu(tokens))
    assert fl.schedule(steps, tokens) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize(("steps", "tokens", "message"), [(0, 64, "num_steps is 0"), (4, 0, "image_tokens is 0")])
def test_numbers_below_one_are_refused(steps, tokens, message):
    with pytest.raises(ValueError, match=message):
        fl.schedule(steps, tokens)


def test_more_tokens_than_a_schedule_can_tell_apart_are_refused():
    with pytest.raises(ValueError, match="image_tokens is 200704; it must be a whole number of at most 131072"):
        fl.schedule(50, 200_704)
    times = fl.schedule(1000, 2**17)
    assert all(a > b for a, b in itertools.pairwise(times))
    assert fl.schedule(4, 10**7, shift=False) == [1, 0.75, 0.5, 0.25, 0]
