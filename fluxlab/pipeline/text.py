"""What a prompt says: T5 gives a sequence of vectors, CLIP gives one. Opened in chapter 01.

Both are transformers' classes, the same for the full model and for flux-tiny. Prompts are padded to a fixed length
and no attention mask is used, so padding takes part, as it did when FLUX was trained.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fluxlab.config import Variant
from fluxlab.extras import importing
from fluxlab.files import WeightsError, at, what_it_is
from fluxlab.pipeline.checks import as_texts, finite, warn
from fluxlab.weights.load import empty_encoder

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

Encoded = tuple[Float[Tensor, "batch text context_dim"], Float[Tensor, "batch vec_dim"]]


@dataclass(eq=False, repr=False)
class TextEncoders:
    """The two encoders with their tokenizers."""

    t5: T5EncoderModel
    t5_tokenizer: T5Tokenizer
    t5_length: int
    clip: CLIPTextModel
    clip_tokenizer: CLIPTokenizer
    clip_length: int
    device: torch.device | str = "cpu"  # where the ids are sent

    def __post_init__(self) -> None:
        for words, encoder in ((self.t5_tokenizer, self.t5), (self.clip_tokenizer, self.clip)):
            if len(words) > (rows := encoder.config.vocab_size):
                told = f"{words.name_or_path}: this tokenizer has {len(words)} pieces, and its encoder {rows}"
                raise WeightsError(f"{told}; take both from one model")
        end, said = self.clip_tokenizer.eos_token_id, self.clip.config.eos_token_id
        if said not in (2, end):  # by it CLIP finds the place that it pools; 2 is what old configs have
            told = f"CLIP's config.json has eos_token_id {said}, and its tokenizer ends prompts with {end}"
            raise WeightsError(f"{told}: every prompt would give the same vector; take both from one model")

    def tokenize(self, prompts: str | Sequence[str]) -> tuple[Int[Tensor, "batch text"], Int[Tensor, "batch clip"]]:
        """Token ids for T5 and for CLIP, padded to their lengths; a longer prompt is cut, with a warning.

        Raises:
            ValueError: a prompt is not text.
        """
        prompts = as_texts("prompt", prompts)
        t5_ids = _tokenize(self.t5_tokenizer, prompts, self.t5_length, "T5")
        return t5_ids, _tokenize(self.clip_tokenizer, prompts, self.clip_length, "CLIP")

    def encode(self, t5_ids: Int[Tensor, "batch text"], clip_ids: Int[Tensor, "batch clip"]) -> Encoded:
        """T5's last hidden state (``txt``) and CLIP's pooled output (``y``)."""
        txt = self.t5(input_ids=t5_ids.to(self.device), attention_mask=None).last_hidden_state
        y = self.clip(input_ids=clip_ids.to(self.device), attention_mask=None).pooler_output
        return txt, y

    @torch.no_grad()
    def __call__(self, prompts: str | Sequence[str]) -> Encoded:
        """``txt`` and ``y`` of each prompt.

        Raises:
            ValueError: a prompt is not text, or what an encoder gives is not finite.
        """
        txt, y = self.encode(*self.tokenize(prompts))
        return finite(txt, "T5's output"), finite(y, "CLIP's output")

    def __repr__(self) -> str:
        return f"TextEncoders(T5: {self.t5_length} tokens, CLIP: {self.clip_length} tokens, on {self.device})"


def tokenizer(kind: str, source: str | Path) -> Any:
    """transformers' tokenizer for "t5" or "clip", from a folder; a ``WeightsError`` where none can be read from it."""
    with importing():
        from transformers import CLIPTokenizer, T5Tokenizer
    kinds: dict[str, Any] = {"t5": T5Tokenizer, "clip": CLIPTokenizer}
    try:
        return kinds[kind].from_pretrained(os.path.expanduser(source))
    except Exception as error:  # a spoilt vocabulary raises Exception itself
        files = [file for file in sorted(at(source).glob("*")) if file.is_file()]
        spoilt = next((f"{file}: {said}" for file in files if (said := what_it_is(file))), None)
        torn = f"{source}: no {kind.upper()} tokenizer can be read from it ({error}); fetch its files again"
        raise WeightsError(spoilt or torn) from error


def _tokenize(words: Any, prompts: Sequence[str], length: int, who: str) -> Int[Tensor, "batch tokens"]:
    for prompt, ids in zip(prompts, words(prompts, verbose=False).input_ids, strict=True):
        if len(ids) > length:
            cut = words.decode(ids[length - 1 : -1])  # one place goes to the end token
            warn(f"prompt {prompt!r} has {len(ids)} {who} tokens and {who} reads {length}; this part is cut: {cut!r}")
    padded = words(prompts, padding="max_length", truncation=True, max_length=length)
    return torch.tensor(padded.input_ids, dtype=torch.int64, device="cpu")


def text_encoders(chosen: Variant) -> tuple[T5EncoderModel, CLIPTextModel]:
    """A variant's two text encoders on the meta device, from their configs: those in data/, or the published."""
    return empty_encoder("t5", chosen.t5, chosen), empty_encoder("clip", chosen.clip, chosen)
