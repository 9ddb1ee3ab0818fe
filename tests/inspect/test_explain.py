"""Every name is explained, with a shape and a line of source that is there."""

import re
from pathlib import Path

import pytest

import fluxlab as fl
from fluxlab.glossary import autoencoder_entry, entries, serves
from fluxlab.inspect.explain import explanation, source_line

ROOT = Path(fl.__file__).parents[1]


def test_every_tensor_and_weight_has_its_line_of_source():
    model = fl.build("flux-dev", device="meta")
    for entry in entries():
        if entry.kind == "symbol":
            continue
        file, number, text = re.match(r"(\S+):(\d+)  (.+)", source_line(entry.name.replace("{i}", "0"), model)).groups()
        assert (ROOT / file).read_text().splitlines()[int(number) - 1].strip() == text


def test_an_input_has_its_line_in_the_signature():
    model = fl.build("flux-dev", device="meta")
    for name in ("img_ids", "txt", "txt_ids", "y", "guidance"):
        assert re.search(rf"  {name}: \w+\[Tensor", source_line(name, model))


def test_every_letter_of_a_shape_is_explained():
    symbols = {entry.name for entry in entries() if entry.kind == "symbol"}
    assert set(re.findall("[A-Z]", " ".join(entry.axes for entry in entries()))) <= symbols


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("double_blocks.7.img_attn.norm.query_norm.scale", ["chapter 07", "D = [128] in flux-dev", "self.scale ="]),
        ("double_blocks.0.txt.middle", ["text residual stream", "B T C = [1, 512, 3072]", 'see("txt.middle"']),
        ("single_blocks.3.attention", ["[1, 24, 4608, 4608] in flux-dev at 1024 x 1024"]),
        ("vec", ["Time, guidance and CLIP", "[1, 3072]"]),
        ("img_ids", ["chapter 02", "[1, 4096, 3]", "transformer.py"]),
        ("gate", ["chapter 06"]),
        ("clean", ["img - t * velocity", "looker.py"]),
    ],
)
def test_a_name_is_explained(name, said):
    text = explanation(name)
    assert all(part in text for part in said), text


def test_a_pattern_tells_each_kind_once(capsys):
    fl.explain("single_blocks.*.linear1*", "flux-tiny-dev")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("single")]
    assert [line.split()[0] for line in told] == [
        f"single_blocks.{{i}}.linear1{end}" for end in ("", ".weight", ".bias")
    ]


@pytest.mark.usefixtures("as_users_run_it")
def test_a_name_that_is_none_is_told_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'double_blocks\.0\.img_attn\.qkv"):
        fl.explain("double_blocks.0.img_attn.kqv.weight")
    with pytest.raises(ValueError, match="name is 3; give a name such as 'vec'"):
        fl.explain(3)
    with pytest.raises(ValueError, match="no name of flux-schnell"):
        fl.explain("guidance_in.in_layer.weight", "flux-schnell")


def test_no_name_is_listed_twice():
    names = [(entry.name, entry.kind) for entry in entries()]
    assert len(names) == len(set(names))
    assert all(entry.meaning.endswith(".") and re.fullmatch(r"\d\d", entry.chapter) for entry in entries())


def test_every_sentence_stands_alone():
    """``fl.explain`` prints one at a time, so none may lean on the one before it."""
    for entry in entries():
        assert not re.search(r"\b(less 1|there|the same|that stream)\b", entry.meaning, re.IGNORECASE), entry
    for block in ("double_blocks.0.img_mod.scale1", "single_blocks.0.modulation.scale", "final_layer.scale", "scale"):
        assert "multipli" in explanation(block)
        assert "by 1 plus this" in explanation(block)
    assert "hidden features of the image MLP, after GELU" in explanation("double_blocks.0.img_mlp.1")


def test_what_a_weight_serves_is_told_by_its_name_wherever_it_stands():
    assert serves("double_blocks.3.img_mod.lin.weight") == serves("final_layer.adaLN_modulation.1.bias") == "modulation"
    assert serves("0.single_blocks.11.linear1.weight") == "attention and MLP"  # in a list of modules
    assert serves("double_blocks.0.txt_attn.norm.key_norm.scale") == "QK-norm"
    assert (
        serves("encoder.block.0.layer.0.SelfAttention.q.weight") == serves("img_in") == serves("my_img_in.weight") == ""
    )
    assert all((entry.serves != "") == (entry.tokens != "") == (entry.kind == "weight") for entry in entries())


def test_every_weight_of_the_vae_is_explained():
    keys = fl.AutoEncoder(fl.VARIANTS["flux-tiny-dev"].autoencoder).state_dict()
    assert all(autoencoder_entry(key) for key in keys)
    assert explanation("encoder.*", "flux-tiny-dev").count("chapter 10") == sum(key.startswith("enc") for key in keys)
    assert "changes the number of features" in explanation("decoder.up.0.block.0.nin_shortcut.weight")
    assert "Bias: a GroupNorm before" in explanation("decoder.norm_out.bias")
    assert autoencoder_entry("decoder.norm_out.scale") is None
    told = explanation("decoder.mid.attn_1.q.weight")
    assert "[512, 512, 1, 1] in the VAE of flux-dev" in told
    assert "autoencoder.py" in told
    with pytest.raises(ValueError, match="no weight of the VAE"):
        explanation("decoder.mid.attn_2.q.weight")


@pytest.mark.parametrize(
    ("symbol", "variant", "said"),
    [
        ("C", "flux-tiny-dev", "C = 128 in flux-tiny-dev"),
        ("T", "flux-schnell", "T = 256 in flux-schnell"),
        ("I", "flux-dev", "I = 4096 in flux-dev at 1024 x 1024"),
        ("P", "flux-fill-dev", "P = 384 in flux-fill-dev"),
        ("H", "flux2-dev", "H = 48 in flux2-dev"),
        ("M", "flux2-dev", "M = 18432 in flux2-dev"),
        ("X", "flux2-dev", "The width of the text's sequence.\n  X = 15360 in flux2-dev"),
        ("A", "flux2-dev", "index, row, column, zero.\n  A = 4 in flux2-dev"),
        ("theta", "flux2-dev", "frequencies: 2000"),
    ],
)
def test_a_symbol_has_the_value_of_the_variant(symbol, variant, said):
    assert said in explanation(symbol, variant)


def test_flux_2_has_no_clip():
    with pytest.raises(ValueError, match="'V' is no name of flux2-dev"):
        explanation("V", "flux2-dev")
