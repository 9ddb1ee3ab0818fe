"""What must hold for any input, not for chosen ones."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fluxlab as fl
from fluxlab.model.rope import EmbedND
from tests.helpers import SMALL, randomise, small_inputs

settings.register_profile("fluxlab", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("fluxlab")

AXES = SMALL.axes_dim
positions = st.integers(0, 200)
seeds = st.integers(0, 2**16)


def random(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotated(x, position):
    table = EmbedND(SMALL.theta, AXES)(torch.tensor([[position]], dtype=torch.float32))
    return fl.apply_rope(x, x, table)[0]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), seeds)
def test_unpack_undoes_pack_for_any_size(rows, columns, batch, seed):
    latent = random(seed, batch, 16, 2 * rows, 2 * columns, dtype=torch.float32)
    assert torch.equal(fl.unpack(fl.pack(latent), 16 * rows, 16 * columns), latent)


@given(seeds, st.tuples(positions, positions, positions))
def test_rope_keeps_norms(seed, position):
    x = random(seed, 1, 1, 1, sum(AXES))
    pairs = x.unflatten(-1, (-1, 2)).norm(dim=-1)
    assert torch.allclose(rotated(x, position).unflatten(-1, (-1, 2)).norm(dim=-1), pairs, rtol=1e-6)


@given(seeds, *(st.tuples(positions, positions, positions) for _ in range(3)))
def test_scores_between_image_tokens_depend_on_differences_of_positions_alone(seed, a, b, shift):
    q, k = random(seed, 2, 1, 1, 1, sum(AXES)).unbind(0)
    moved_a, moved_b = (tuple(x + s for x, s in zip(place, shift, strict=True)) for place in (a, b))
    before = (rotated(q, a) * rotated(k, b)).sum()
    after = (rotated(q, moved_a) * rotated(k, moved_b)).sum()
    assert (before - after).abs() < 1e-5 * q.norm() * k.norm()


@given(seeds, *(st.tuples(positions, positions, positions) for _ in range(2)))
def test_scores_between_text_and_image_tokens_do_not(seed, a, b):
    """Text stays at (0, 0, 0) wherever the image tokens are: what it sees of one depends on where that is."""
    assume(a != b)
    q, k = random(seed, 2, 1, 1, 1, sum(AXES)).unbind(0)
    at_a, at_b = ((rotated(q, (0, 0, 0)) * rotated(k, place)).sum() for place in (a, b))
    assert (at_a - at_b).abs() > 1e-5 * q.norm() * k.norm()  # what no two image tokens exceed that move together


@given(st.integers(1, 100), st.integers(1, 20_000), st.booleans())
def test_a_schedule_strictly_falls_from_1_to_0(steps, tokens, shift):
    times = fl.schedule(steps, tokens, shift)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (1, 0)
    assert all(a > b for a, b in pairwise(times))


@pytest.fixture(scope="module")
def model():
    return randomise(fl.Flux(SMALL)).double()


@given(seeds, st.integers(2, 4))
@settings(max_examples=5)
@torch.no_grad()
def test_a_batch_equals_its_items(model, seed, batch):
    inputs = small_inputs(batch, torch.float64, seed)
    singles = [model(**{name: t[i : i + 1] for name, t in inputs.items()}) for i in range(batch)]
    assert (model(**inputs) - torch.cat(singles)).abs().max() < 1e-9


@given(seeds)
@settings(max_examples=5)
@torch.no_grad()
def test_permuting_image_tokens_with_their_ids_permutes_the_output(model, seed):
    inputs = small_inputs(1, torch.float64, seed)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    shuffled = inputs | {"img": inputs["img"][:, order], "img_ids": inputs["img_ids"][:, order]}
    assert (model(**shuffled) - model(**inputs)[:, order]).abs().max() < 1e-9
    assert (model(**inputs | {"img": inputs["img"][:, order]}) - model(**inputs)[:, order]).abs().max() > 1e-3


@given(seeds)
@settings(max_examples=5)
@torch.no_grad()
def test_the_text_rows_of_the_last_single_block_do_not_reach_the_output(model, seed):
    inputs = small_inputs(1, torch.float64, seed)

    def spoil(rows):
        def hook(_module, _inputs, out):
            out = out.clone()
            out[:, rows] += 7
            return out

        handle = model.single_blocks[-1].register_forward_hook(hook)
        try:
            return model(**inputs)
        finally:
            handle.remove()

    plain = model(**inputs)
    assert torch.equal(spoil(slice(0, 5)), plain)
    assert not torch.equal(spoil(slice(5, 6)), plain)
