"""flux-tiny's tokenizers, trained on the picture world's captions, and its text encoders, not yet trained.

A unigram for T5, a byte-level BPE for CLIP, both written in the Hugging Face folder format, so the code that loads the
real ones loads them too. Opened in chapters 01 and 16.
"""

from __future__ import annotations

import io
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fluxlab.config import VARIANTS
from fluxlab.extras import importing
from fluxlab.pipeline.text import TextEncoders
from fluxlab.tiny.world import random_scene

DEV = VARIANTS["flux-tiny-dev"]

T5_VOCABULARY = 256  # pieces; the captions' few words, and every printable ASCII character for words unseen
CLIP_MERGES = 160


def train_tokenizers(folder: Path, seed: int = 0, captions: int = 8_000) -> None:
    """Write ``folder/t5`` and ``folder/clip``."""
    rng = np.random.default_rng(seed)
    corpus = [random_scene(rng).caption(rng, complete=False) for _ in range(captions)]
    for name in ("t5", "clip"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _train_t5(corpus, folder / "t5")
    _train_clip(corpus, folder / "clip")


def _train_t5(corpus: list[str], folder: Path) -> None:
    """Padding 0, end 1, unknown 2, as T5 has them; upper case is folded.

    The trainer takes as candidates what occurs in two different words, so each word is also shown with what may
    follow it: a word then becomes one piece.
    """
    import sentencepiece

    words = [caption.replace(",", "").split() for caption in corpus[:1000]]
    corpus = corpus + [mark.join(caption) for caption in words for mark in (", ", ". ", "s ", "; ")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="unigram",
        vocab_size=T5_VOCABULARY,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc_cf",
        required_chars="".join(sorted(set(string.printable.lower()) - set(string.whitespace))),
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "model_max_length": 32,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _train_clip(corpus: list[str], folder: Path) -> None:
    """Every byte is a token, alone and at the end of a word, so any prompt tokenizes; merges make words of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    with importing():
        from transformers import CLIPTokenizer

    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    raw.normalizer = CLIPTokenizer().backend_tokenizer.normalizer
    raw.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + CLIP_MERGES,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    raw.train_from_iterator(corpus, trainer)
    merges: Any = [tuple(merge) for merge in json.loads(raw.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=32)
    tokenizer.save_pretrained(folder)


def new_text_encoders(run: Path) -> TextEncoders:
    """Small encoders of random weights, with the tokenizers in ``run``."""
    with importing():
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    t5_tokenizer = T5Tokenizer.from_pretrained(str(run / "t5"))
    clip_tokenizer = CLIPTokenizer.from_pretrained(str(run / "clip"))
    t5 = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=DEV.transformer.context_in_dim,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        use_cache=False,
    )
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=DEV.transformer.vec_in_dim,
        projection_dim=DEV.transformer.vec_in_dim,
        intermediate_size=4 * DEV.transformer.vec_in_dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=DEV.clip_length,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,  # where CLIP pools; with another id every prompt pools the same
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    encoder: Any = T5EncoderModel(t5)
    position = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    nn.init.normal_(position.weight)  # near zero, as T5 has it, the order of words is found out late or never
    return TextEncoders(encoder, t5_tokenizer, DEV.t5_length, CLIPTextModel(clip), clip_tokenizer, DEV.clip_length)
