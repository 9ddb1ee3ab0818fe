"""Text conditioning against the encoders called by hand."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

import fluxlab as fl
from fluxlab.files import WeightsError
from fluxlab.pipeline.text import text_encoders
from fluxlab.weights.find import data_folder

PROMPTS = ["a small red circle left of a large blue square on a white background", "a purple star, black background"]


def test_both_outputs_equal_the_classes_called_by_hand(tiny):
    folder = data_folder() / "flux-tiny"
    t5, clip = T5EncoderModel.from_pretrained(folder / "t5"), CLIPTextModel.from_pretrained(folder / "clip")
    options = {"padding": "max_length", "max_length": 32, "truncation": True, "return_tensors": "pt"}
    t5_ids = T5Tokenizer.from_pretrained(folder / "t5")(PROMPTS, **options).input_ids
    clip_ids = CLIPTokenizer.from_pretrained(folder / "clip")(PROMPTS, **options).input_ids
    with torch.no_grad():
        txt = t5.float()(input_ids=t5_ids).last_hidden_state
        y = clip.float()(input_ids=clip_ids).pooler_output
    ours = tiny.text(PROMPTS)
    assert torch.equal(ours[0], txt)
    assert torch.equal(ours[1], y)


def test_different_prompts_give_different_vectors(tiny):
    """CLIP pools where it finds its end token; with a wrong id in the config it pools the first, always the same."""
    _, y = tiny.text(PROMPTS)
    assert (y[0] - y[1]).abs().max() > 0.1


def test_padding_takes_part(tiny):
    """No attention mask: T5's vectors of a prompt depend on how far it is padded."""
    txt, _ = tiny.text(PROMPTS[:1])
    tokens = tiny.text.t5_tokenizer(PROMPTS[:1], return_tensors="pt").input_ids
    unpadded = tiny.text.t5(input_ids=tokens).last_hidden_state
    assert (txt[:, : tokens.shape[1]] - unpadded).abs().max() > 1e-3


def test_the_special_tokens_are_t5s(tiny):
    ids, _ = tiny.text.tokenize(["a ring"])
    assert ids.shape == (1, 32)
    assert ids[0, 2:].tolist() == [1] + [0] * 29  # end, then padding
    assert tiny.text.t5_tokenizer.unk_token_id == 2


@pytest.mark.parametrize("prompt", ["", "A Photo of über-größe, 犬!", "¿🙂?", "zyzzyva 1234567890", "\n\t"])
def test_any_prompt_tokenizes(tiny, prompt):
    t5_ids, clip_ids = tiny.text.tokenize([prompt])
    assert t5_ids.max() < tiny.text.t5.config.vocab_size
    assert clip_ids.max() < tiny.text.clip.config.vocab_size
    words = tiny.text.clip_tokenizer.decode(clip_ids[0], skip_special_tokens=True)
    assert words.replace(" ", "") == "".join(prompt.lower().split())


def test_every_word_of_the_picture_world_is_one_token(tiny):
    prompt = PROMPTS[0]
    assert len(tiny.text.t5_tokenizer(prompt).input_ids) == len(prompt.split()) + 1


@pytest.mark.filterwarnings("ignore:.*CLIP tokens")
def test_a_prompt_too_long_is_cut_with_a_warning_that_says_what(tiny):
    prompt = "red " * 31 + "navy ring"
    with pytest.warns(UserWarning, match="has 34 T5 tokens") as caught:
        t5_ids, _ = tiny.text.tokenize([prompt])
    assert any("T5 reads 32; this part is cut: 'navy ring'" in str(w.message) for w in caught)
    assert t5_ids[0, -1] == 1


@pytest.mark.filterwarnings("ignore:.*tokens and")
def test_a_prompt_too_long_is_warned_about_by_us_alone(tiny, caplog):
    """transformers would say that it leads to indexing errors, which is not so: it is cut."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        for tokenizer in (tiny.text.t5_tokenizer, tiny.text.clip_tokenizer):
            tokenizer.deprecation_warnings.clear()  # else it would have said so once already
        tiny.text.tokenize(["red " * 40])
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_one_prompt_is_a_batch_of_one(tiny):
    assert all(torch.equal(a, b) for a, b in zip(tiny.text("a ring"), tiny.text(["a ring"]), strict=True))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("prompts", "message"), [(None, "prompt is None; give text"), ([3], "prompt is 3; give"), ([], "an empty list")]
)
def test_what_is_no_text_is_refused(tiny, prompts, message):
    with pytest.raises(ValueError, match=message):
        tiny.text.tokenize(prompts)


def test_code_without_a_name_is_warned_too(tiny):
    with pytest.warns(UserWarning, match="this part is cut"):
        exec("encode('a ' * 100)", {"encode": tiny.text.tokenize, "__builtins__": {}})


def test_the_warning_of_a_long_prompt_points_at_the_callers_line(tiny):
    with pytest.warns(UserWarning, match="this part is cut") as caught:
        tiny.text("red " * 40)
    with pytest.warns(UserWarning, match="this part is cut") as deeper:
        tiny("red " * 40, num_steps=1, height=32, width=32, progress=False)
    assert {warning.filename for warning in [*caught, *deeper]} == {__file__}


@pytest.mark.parametrize(("part", "name"), [("t5", "T5"), ("clip", "CLIP")])
def test_an_encoder_that_overflows_is_named(tiny, monkeypatch, part, name):
    """As T5 does in float16."""
    encoder = getattr(tiny.text, part)
    layer = next(module for module in reversed(list(encoder.modules())) if "Norm" in type(module).__name__)
    hook = layer.register_forward_hook(lambda module, args, out: (out * 1e30 * 1e30).half().to(out))
    try:
        with pytest.raises(ValueError, match=rf"{name}'s output has \d+ of \d+ values that are not finite"):
            tiny("a ring", progress=False)
    finally:
        hook.remove()


def test_float16_is_told_of_its_range():
    from fluxlab.pipeline.checks import finite

    with pytest.raises(ValueError, match=r"x has 1 of 3 .* float16 ends at 65504, .*: use bfloat16 or float32"):
        finite(torch.tensor([1.0, 65504.0, 70000.0]).half(), "x")


def folder_with(tmp_path, part, more):
    """A copy of flux-tiny's encoder, with more tensors in its file."""
    folder = tmp_path / part
    shutil.copytree(data_folder() / "flux-tiny" / part, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_with(**folders):
    return fl.load("flux-tiny-dev", **folders).text


def test_a_t5_with_scales_beside_its_weights_is_refused(tmp_path):
    name = "encoder.block.0.layer.0.SelfAttention.q.scale_weight"
    folder = folder_with(tmp_path, "t5", {name: torch.ones(1)})
    with pytest.raises(
        WeightsError,
        match=rf"{name} .* scales encoder.block.0.layer.0.SelfAttention.q.weight, which is torch.\w+ \[128, 128\]",
    ):
        load_with(t5=folder)


def test_the_rest_of_a_whole_clip_is_no_fault(tmp_path, tiny):
    more = {"logit_scale": torch.ones(()), "text_projection.weight": torch.ones(64, 64)}
    folder = folder_with(tmp_path, "clip", more)
    assert torch.equal(load_with(clip=folder)(["a ring"])[1], tiny.text(["a ring"])[1])
    folder = folder_with(tmp_path / "other", "clip", {"final.scale_weight": torch.ones(1)})
    with pytest.raises(WeightsError, match=r"final.scale_weight .* scales final.weight, which is nothing"):
        load_with(clip=folder)


def test_t5s_one_table_of_words_is_one_parameter(tiny):
    """As transformers ties it: counted once, and moved once."""
    own = text_encoders(tiny.variant)[0]
    assert sum(p.numel() for p in tiny.text.t5.parameters()) == sum(p.numel() for p in own.parameters())
    assert tiny.text.t5.shared.weight is tiny.text.t5.encoder.embed_tokens.weight


@pytest.mark.parametrize("end", [999, None])
def test_a_clip_of_another_vocabulary_is_refused(tmp_path, end):
    """It would pool the same place of every prompt."""
    clip = shutil.copytree(data_folder() / "flux-tiny/clip", tmp_path / "clip")
    config = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps(config | {"eos_token_id": end}))
    with pytest.raises(WeightsError, match="every prompt would give the same vector"):
        fl.load("flux-tiny-dev", clip=clip)


@pytest.mark.parametrize(
    "odd",
    [{"num_heads": "4"}, {"num_heads": 0}, {"d_kv": -1}, {"text_config": 3}],
)
def test_an_odd_config_is_a_sentence(tmp_path, odd):
    t5 = shutil.copytree(data_folder() / "flux-tiny/t5", tmp_path / "t5")
    config = json.loads((t5 / "config.json").read_text())
    (t5 / "config.json").write_text(json.dumps(config | odd))
    with pytest.raises(WeightsError):
        fl.load("flux-tiny-dev", t5=t5)


def test_a_tokenizer_of_more_pieces_than_the_encoder_knows_is_refused(tmp_path):
    """Kontext's, whose words are others: its ids would be other words, or none."""
    flux_tiny = data_folder() / "flux-tiny"
    shutil.copytree(flux_tiny / "kontext/t5", tmp_path / "tokenizer_2")
    shutil.copytree(flux_tiny / "clip", tmp_path / "tokenizer")
    with pytest.raises(fl.WeightsError, match=r"this tokenizer has 122 pieces, and its encoder 114; take both"):
        fl.load("flux-tiny-dev", tokenizers=tmp_path)


@pytest.mark.parametrize("file", ["tokenizer_2/spiece.model", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 791656\n", "git-lfs has left this pointer"),
        ("<!doctype html><html></html>", "this is a web page"),
        ("", "tokenizer can be read from it .*; fetch its files again"),
    ],
)
def test_what_is_in_place_of_a_tokenizers_file_is_told(tmp_path, file, content, said):
    shutil.copytree(data_folder() / "flux-tiny/t5", tmp_path / "tokenizer_2")
    shutil.copytree(data_folder() / "flux-tiny/clip", tmp_path / "tokenizer")
    (tmp_path / file).write_text(content)
    with pytest.raises(fl.WeightsError, match=said):
        fl.load("flux-tiny-dev", tokenizers=tmp_path)
