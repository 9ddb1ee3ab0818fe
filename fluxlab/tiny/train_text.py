"""flux-tiny's tokenizers and text encoders, and what they learn ahead of the flow. Opened in chapters 01 and 16.

The tokenizers, unigram for T5 and byte-level BPE for CLIP, are trained on the picture world's captions. They and the
encoders have the Hugging Face format, so the code that loads the real ones loads them too.

FLUX's encoders had read a great deal before FLUX was trained. New ones have to find out that in "a red ring left of a
blue star" *red* belongs to *ring* and both to the left. The flow teaches that slowly, captions with truth quickly.
Axes: captions B, text tokens T, slots S (the five places, then what is behind), options O of all questions.
"""

import io
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fluxlab.pipeline.text import TextEncoders, tokenizer
from fluxlab.tiny.loop import fit
from fluxlab.tiny.recipe import DEV, Recipe
from fluxlab.tiny.truth import NUMBER, SLOTS, answer_loss, of_slots
from fluxlab.tiny.world import random_scene

T5_VOCABULARY = 256  # pieces: the captions' few words, and every printable ASCII character for words never seen
CLIP_MERGES = 160


def train_tokenizers(folder: Path, seed: int = 0, corpus: list[str] | None = None) -> None:
    """Write ``folder/t5`` and ``folder/clip``, from captions or from a corpus of one's own."""
    rng = np.random.default_rng(seed)
    corpus = corpus or [random_scene(rng).caption(rng, complete=False) for _ in range(8_000)]
    for name, train in (("t5", _train_t5), ("clip", _train_clip)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        train(corpus, folder / name)


def _train_t5(corpus: list[str], folder: Path) -> None:
    """Padding is 0, the end 1 and unknown 2, as in T5; capitals become small letters.

    The trainer considers only what occurs in two different words. So each word is also shown with several endings:
    then the whole word becomes one piece.
    """
    import sentencepiece

    # The trainer considers only what occurs in two different words: with several endings, a whole word becomes a piece.
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
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "T5Tokenizer", **special, "extra_ids": 0, "model_max_length": DEV.t5_length}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _train_clip(corpus: list[str], folder: Path) -> None:
    """Every byte is a token, alone and at the end of a word, so any prompt tokenizes; merges make words of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    raw, real = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix="")), CLIPTokenizer()
    raw.normalizer, raw.pre_tokenizer = real.backend_tokenizer.normalizer, real.backend_tokenizer.pre_tokenizer
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
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=DEV.clip_length).save_pretrained(folder)


def new_text_encoders(run: Path) -> TextEncoders:
    """Small encoders with random weights, and the tokenizers in ``run``."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    t5_tokenizer, clip_tokenizer = (tokenizer(kind, run / kind) for kind in ("t5", "clip"))
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
        eos_token_id=clip_tokenizer.eos_token_id,  # CLIP pools here; with another id every prompt pools the same place
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    encoder: Any = T5EncoderModel(t5)
    position = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    nn.init.normal_(position.weight)  # T5's own start near zero, and then word order is learned late or never
    return TextEncoders(encoder, t5_tokenizer, DEV.t5_length, CLIPTextModel(clip), clip_tokenizer, DEV.clip_length)


class Reader(nn.Module):
    """Says what each slot holds, twice: from T5's sequence, where a query for each slot attends to the tokens as image
    tokens do, and from CLIP's vector. It is needed for this training alone.
    """

    def __init__(self, width: int, vec_width: int, slots: int = len(SLOTS)) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(slots, width))
        self.key, self.value, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, NUMBER)
        self.from_vector = nn.Linear(vec_width, slots * NUMBER)

    def forward(
        self, txt: Float[Tensor, "batch text_tokens width"], y: Float[Tensor, "batch vec_width"]
    ) -> Float[Tensor, "2 batch slots options"]:
        """Logits of all options, those of each question side by side: T5's, then CLIP's."""
        found = F.scaled_dot_product_attention(self.query.expand(len(txt), -1, -1), self.key(txt), self.value(txt))
        return torch.stack((self.out(found), rearrange(self.from_vector(y), "b (s o) -> b s o", s=len(self.query))))


def train_text(run: Path, recipe: Recipe) -> TextEncoders:
    """T5 and CLIP, once they have learned from captions to tell what is where; the flow trains them further."""
    torch.manual_seed(recipe.seed)
    text = new_text_encoders(run)
    reader = Reader(text.t5.config.d_model, text.clip.config.hidden_size)

    def loss(generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        scenes = [random_scene(rng) for _ in range(recipe.captions)]
        tokens = text.tokenize([scene.caption(rng, complete=False) for scene in scenes])
        return answer_loss(reader(*text.encode(*tokens)), of_slots(scenes).expand(2, -1, -1, -1))

    learners = nn.ModuleList((text.t5, text.clip, reader))
    fit("text", learners, loss, recipe.text_steps, recipe.text_learning_rate, run, recipe)
    return text
