"""Embedding, rotation, and what each size and input changes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_timestep_embedding
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

import fluxlab as fl
from fluxlab.model.rope import EmbedND
from tests.helpers import SMALL, randomise, small_inputs


def test_the_timestep_embedding_has_the_published_values():
    embedded = fl.timestep_embedding(torch.tensor([0.5]), 256)[0]
    published = {0: -0.883849, 1: 0.945946, 127: 0.998557, 128: -0.467772, 129: 0.324325, 255: 0.053705}
    for index, value in published.items():
        assert embedded[index].item() == pytest.approx(value, abs=2e-5)  # float32 angles up to 500


def test_the_timestep_embedding_equals_diffusers():
    t = torch.linspace(0, 1, 33)
    theirs = get_timestep_embedding(t * 1000, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert (fl.timestep_embedding(t, 256) - theirs).abs().max() <= 1e-6


def test_the_timestep_embedding_keeps_a_bfloat16_time_exact():
    t = torch.tensor([0.75], dtype=torch.bfloat16)
    assert torch.equal(fl.timestep_embedding(t), fl.timestep_embedding(t.float()))


def test_the_rotation_equals_diffusers():
    axes, ids = (4, 12, 16), fl.image_ids(1, 160, 240)
    table = EmbedND(10_000, axes)(ids)
    q = torch.randn(1, 2, ids.shape[1], sum(axes), generator=torch.Generator().manual_seed(0))
    ours, _ = fl.apply_rope(q, q, table)
    theirs = apply_rotary_emb(q.transpose(1, 2), FluxPosEmbed(10_000, axes)(ids[0]), sequence_dim=1).transpose(1, 2)
    assert (ours - theirs).abs().max() <= 1e-6


def test_the_angles_are_exact_far_from_the_origin():
    """Against numpy in float64. With angles in float32 the error is 2e-4 here."""
    positions = np.arange(4000, 4096)
    angles = positions[:, None] * 10_000.0 ** (-np.arange(0, 56, 2) / 56)
    for given in (torch.from_numpy(positions), torch.from_numpy(positions).float()):
        table = fl.rope(given[None], 56, 10_000)[0]
        assert np.abs(table[..., 0, 0].numpy() - np.cos(angles)).max() < 1e-7
        assert np.abs(table[..., 1, 0].numpy() - np.sin(angles)).max() < 1e-7


def test_places_may_stay_on_the_cpu():
    """As they must for a device without float64; meta stands for such a device here."""
    inputs = small_inputs()
    there = {name: t if name.endswith("ids") else t.to("meta") for name, t in inputs.items()}
    with fl.capture(model := fl.Flux(SMALL).to("meta"), "pe") as tape:
        assert model(**there).is_meta
    assert tape["pe"].is_meta


def test_a_forward_can_be_traced_without_values():
    from torch.func import vmap

    model, inputs = randomise(fl.Flux(SMALL)), small_inputs(2)
    each = {name: t[:, None] for name, t in inputs.items()}
    with torch.no_grad():
        mapped = vmap(lambda given: model(**given))(each)[:, 0]
        assert (mapped - model(**inputs)).abs().max() < 1e-5


def test_the_rotation_leaves_text_alone():
    q = torch.randn(1, 2, 5, 32)
    ours, _ = fl.apply_rope(q, q, EmbedND(10_000, (4, 12, 16))(fl.text_ids(1, 5)))
    assert torch.equal(ours, q)


def test_the_rotation_has_one_table_for_all_heads_in_float32():
    table = EmbedND(10_000, (16, 56, 56))(torch.zeros(1, 4336, 3, device="meta"))
    assert list(table.shape) == [1, 1, 4336, 64, 2, 2]
    assert table.dtype is torch.float32


def test_the_rotation_is_computed_once_a_forward(monkeypatch):
    calls, forward = [], EmbedND.forward
    monkeypatch.setattr(EmbedND, "forward", lambda self, ids: calls.append(ids) or forward(self, ids))
    fl.Flux(SMALL)(**small_inputs())
    assert len(calls) == 1


def test_guidance_given_where_it_has_no_use_is_refused():
    model = fl.Flux(replace(SMALL, guidance_embed=False))
    with pytest.raises(ValueError, match=r"no guidance embedder .* leave it out"):
        model(**small_inputs())


def test_guidance_changes_the_prediction():
    model = fl.Flux(SMALL)
    one, four = (model(**small_inputs(guidance=torch.tensor([g]))) for g in (1.0, 4.0))
    assert not torch.equal(one, four)


def test_build_makes_random_weights_of_the_asked_dtype_and_sizes():
    model = fl.build("flux-tiny-dev", dtype=torch.bfloat16, depth=1, guidance_embed=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert len(model.double_blocks) == 1
    assert model.guidance_in is None
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(model.single_blocks[0].norm.key_norm.scale.float(), torch.ones(32))
    assert model.img_in.weight.std() > 0.01


def test_the_shapes_in_signatures_are_checked_in_these_tests():
    from jaxtyping import TypeCheckError

    with pytest.raises(TypeCheckError):
        fl.timestep_embedding(torch.zeros(2, 2))
    with pytest.raises(TypeCheckError):
        fl.unpack(torch.zeros(4, 64), 32, 32)


@pytest.mark.parametrize("changes", [{"theta": 100}, {"axes_dim": (8, 8, 16)}, {"num_heads": 4, "axes_dim": (4, 4, 8)}])
def test_each_size_without_weights_of_its_own_changes_the_prediction(changes):
    """The same weights under another config; sizes that shape a weight are held by the counts."""
    model, inputs = randomise(fl.Flux(SMALL)), small_inputs()
    other = fl.Flux(replace(SMALL, **changes))
    weights = {n: t for n, t in model.state_dict().items() if t.shape == other.state_dict()[n].shape}
    other.load_state_dict(weights, strict=False)
    assert (model(**inputs) - other(**inputs)).abs().max() > 1e-4


def test_a_model_without_qkv_bias_has_none():
    model = fl.Flux(replace(SMALL, qkv_bias=False))
    assert model.double_blocks[0].img_attn.qkv.bias is None


def test_the_longest_period_changes_the_embedding():
    t = torch.tensor([0.5])
    assert not torch.equal(fl.timestep_embedding(t), fl.timestep_embedding(t, max_period=100.0))


def test_queries_and_keys_of_a_published_size_have_the_published_shape():
    """1360x768 with 256 text tokens: [1, 24, 4336, 128]."""
    model = fl.build("flux-schnell", device="meta", depth=1, depth_single_blocks=1)
    seen = []
    model.single_blocks[0].norm.register_forward_hook(lambda _, __, out: seen.extend(out))
    model(**fl.example_inputs("flux-schnell", height=768, width=1360, device="meta").kwargs())
    assert [list(t.shape) for t in seen] == [[1, 24, 4336, 128]] * 2
