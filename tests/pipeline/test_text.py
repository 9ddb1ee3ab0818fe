"""Text conditioning against the encoders called by hand."""

import logging

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

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
