"""FLUX.2's transformer: published counts, published names, and diffusers' output."""

from dataclasses import replace

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers as to_diffusers
from torch.utils.flop_counter import FlopCounterMode

import fluxlab as fl
from fluxlab.config import Flux2Config
from fluxlab.glossary import named, table_of
from fluxlab.model.flux2 import Flux2
from tests.helpers import randomise

SMALL = Flux2Config(12, 40, 64, 2, 2, 3, axes_dim=(8, 8, 8, 8))


@pytest.mark.parametrize(
    ("name", "count"),
    [("flux2-dev", 32_223_281_152), ("flux2-klein-4b", 3_875_544_576), ("flux2-klein-9b", 9_078_581_248)],
)
def test_counts_are_the_published(name, count):
    model = fl.build(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count
    assert not any(name.endswith("bias") for name in model.state_dict())


def inputs(config, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(batch, 7, 4)
    ids[..., 3] = torch.arange(7)  # text has places
    rows = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0), torch.zeros(1))
    return {
        "img": torch.randn(batch, 12, config.in_channels, generator=generator, dtype=dtype),
        "img_ids": rows.expand(batch, -1, -1),
        "txt": torch.randn(batch, 7, config.context_in_dim, generator=generator, dtype=dtype),
        "txt_ids": ids,
        "timesteps": torch.tensor([0.25, 0.5])[:batch],  # exact in thousandths
        "guidance": torch.tensor([4.0, 1.0])[:batch] if config.guidance_embed else None,
    }


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_the_output_is_diffusers(guidance, dtype, within):
    """In float64 the sinusoids of time are float32 still, in both; the noise shrinks."""
    config = replace(SMALL, guidance_embed=guidance)
    model = randomise(Flux2(config)).to(dtype)
    theirs = Flux2Transformer2DModel(
        in_channels=12,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=40,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=guidance,
    )
    theirs.load_state_dict(to_diffusers(dict(model.state_dict())))  # by its own table of published names; strictly
    theirs = theirs.to(dtype).eval()
    given = inputs(config, dtype)
    with torch.no_grad():
        ours = model(**given)
        expected = theirs(
            given["img"],
            given["txt"],
            given["timesteps"],
            given["img_ids"],
            given["txt_ids"],
            given["guidance"],
            return_dict=False,
        )[0]
    assert ((ours - expected).norm() / expected.norm()) < within


def test_text_is_rotated_there():
    """In FLUX.1 text sits at zero; here its places matter."""
    model, given = randomise(Flux2(SMALL)), inputs(SMALL)
    with torch.no_grad():
        moved = model(**given | {"txt_ids": given["txt_ids"].flip(1)})
        assert (moved - model(**given)).norm() > 1e-3 * moved.norm()


def test_modulation_is_18_per_cent_of_flux1s_27():
    """1.8 % of [dev] are the three shared modulations, 2.0 % with the last layer's own."""
    model = fl.build("flux2-dev", device="meta")
    total = sum(p.numel() for p in model.parameters())
    shared = sum(p.numel() for name, p in model.named_parameters() if "modulation" in name and "final" not in name)
    last = model.final_layer.adaLN_modulation[1].weight.numel()
    assert round(100 * shared / total, 1) == 1.8
    assert round(100 * (shared + last) / total, 1) == 2.0


def test_inner_tensors_are_seen():
    model = randomise(Flux2(SMALL))
    with fl.capture(model, ["double_blocks.1.img_attn.qkv", "single_blocks.0.linear1"]) as tape, torch.no_grad():
        model(**inputs(SMALL))
    assert tape["single_blocks.0.linear1"].shape == (2, 19, 3 * 64 + 2 * 192)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_does_not_fit_is_said():
    given = inputs(SMALL)
    with pytest.raises(ValueError, match="guidance is None, but this model has a guidance embedder"):
        Flux2(SMALL)(**given | {"guidance": None})
    with pytest.raises(ValueError, match="guidance was given, but this model has no guidance embedder"):
        Flux2(replace(SMALL, guidance_embed=False))(**given)
    with pytest.raises(fl.ConfigError, match="num_heads is 2, which does not divide hidden_size 63"):
        replace(SMALL, hidden_size=63)
    for wrong, said in (
        ({"depth": -1}, "depth is -1"),
        ({"mlp_ratio": -1}, "mlp_ratio is -1"),
        ({"axes_dim": 32}, "give"),
    ):
        with pytest.raises(fl.ConfigError, match=said):
            replace(SMALL, **wrong)
    with pytest.raises(fl.ConfigError, match="RoPE turns features in pairs"):
        fl.build("flux2-dev", device="meta", axes_dim=(31, 33, 32, 32))
    with pytest.raises(fl.ConfigError, match="depths is not a field of Flux2Config; the fields are in_channels"):
        fl.build("flux2-dev", device="meta", depths=2)
    assert len(fl.build("flux2-klein-4b", device="meta", depth=1, depth_single_blocks=2).single_blocks) == 2


@pytest.mark.parametrize("name", ["flux2-dev", "flux2-klein-4b", "flux2-klein-9b"])
def test_the_glossary_names_every_weight_with_its_shape(name):
    model = fl.build(name, device="meta")
    told = {each: entry.shape(model.config) for each, entry in named(model.config, "weight").items()}
    assert told == {each: tuple(weight.shape) for each, weight in model.state_dict().items()}
    by_kind = {row["kind"]: row["parameters"] for row in fl.parameter_table(name, "kind")}
    assert by_kind["all"] == sum(p.numel() for p in model.parameters())
    layers = {each: m.weight.numel() for each, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    modulation = sum(n for each, n in layers.items() if "modulation" in each or "adaLN" in each)
    assert by_kind["modulation"] == modulation


def test_modulation_is_two_percent_there():
    shares = {row["kind"]: row["share"] for row in fl.parameter_table("flux2-dev", "kind")}
    assert shares["modulation"] == "1.99%"
    assert {row["kind"]: row["share"] for row in fl.parameter_table("flux-dev", "kind")}["modulation"].startswith("27")


def test_flops_are_those_of_the_linears_that_run():
    """Beside what PyTorch counts of one forward on the meta device."""
    name, model = "flux2-klein-4b", fl.build("flux2-klein-4b", device="meta")
    given = inputs_of(model.config, 256, 512)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**given)
    table = {row["part"]: row["GFLOP"] for row in fl.flops(name, 256, 256)}
    assert table["all"] == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-3)


def inputs_of(config, image, text):
    shapes = {e.name: e.shape(config, text=text, image=image) for e in table_of(config) if e.kind == "input"}
    return {each: torch.empty(size, device="meta") for each, size in shapes.items() if each != "guidance"}


def test_every_tensor_it_names_is_captured_with_its_shape():
    model = randomise(Flux2(SMALL))
    known = named(SMALL, "tensor")
    with fl.capture(model, [*known]) as tape, torch.no_grad():
        model(**inputs(SMALL))
    shapes = {each: entry.shape(SMALL, batch=2, text=7, image=12) for each, entry in known.items()}
    assert {each: tuple(tape[each].shape) for each in known} == shapes
    names = [*known]
    assert names.index("double_stream_modulation_img.lin") < names.index("double_blocks.0.img.input")
    assert names.index("single_stream_modulation.lin") < names.index("single_blocks.0.input")


def test_tables_and_names_by_name():
    assert len(fl.tensor_names("flux2-klein-4b")) == len(
        named(fl.build("flux2-klein-4b", device="meta").config, "tensor")
    )
    assert "3,875,544,576 parameters" in str(fl.summary("flux2-klein-4b", depth=1))
    weights = next(row for row in fl.memory("flux2-klein-9b") if row["what"] == "weights: transformer")
    assert weights["numbers"] == 9_078_581_248


def test_explain_knows_it(capsys):
    for name in (
        "double_blocks.0.img_mlp.0.weight",
        "single_stream_modulation.lin.weight",
        "txt",
        "pe",
        "single_blocks.*",
    ):
        fl.explain(name, "flux2-dev")
    told = capsys.readouterr().out
    assert "[36864, 6144] in flux2-dev" in told
    assert "flux2.py:" in told
    assert "GELU" not in told
    assert "T5" not in told


def test_it_has_no_pipeline_and_says_so():
    with pytest.raises(fl.ConfigError, match="of flux2-dev the transformer alone is here"):
        fl.load("flux2-dev")


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("timesteps", lambda t: 500 * t, "timesteps has 125; t is in"),
        ("img_ids", lambda t: t.bfloat16(), "img_ids is torch.bfloat16, which rounds it"),
        ("txt_ids", lambda t: t[..., :3], "txt_ids has shape"),
        ("img", lambda t: t.long(), "img is torch.int64; give a floating dtype"),
        ("guidance", lambda t: t * torch.inf, "guidance has inf"),
    ],
)
def test_what_does_not_fit_is_named(name, change, message):
    given = inputs(SMALL)
    with pytest.raises(ValueError, match=message):
        Flux2(SMALL)(**given | {name: change(given[name])})
