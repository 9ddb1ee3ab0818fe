"""The text encoders, before the flow: from captions alone they learn to tell what is where. Opened in chapter 16.

FLUX's encoders had read a great deal before FLUX was trained. New ones have to find out that in "a red ring left of a
blue star" *red* belongs to *ring* and both to the left. The flow teaches that slowly; captions with truth, quickly.
Axes: captions B, text tokens T, slots S (the five places, then what is behind), options O of all questions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fluxlab.pipeline.text import TextEncoders
from fluxlab.tiny.loop import fit
from fluxlab.tiny.recipe import Recipe
from fluxlab.tiny.text import new_text_encoders
from fluxlab.tiny.truth import NUMBER, SLOTS, answer_loss, of_slots
from fluxlab.tiny.world import random_scene


class Reader(nn.Module):
    """Says what each slot holds, twice: from T5's sequence, where a query for each slot looks at the tokens as image
    tokens do, and from CLIP's vector. It is there for this training alone.
    """

    def __init__(self, width: int, vec_width: int) -> None:
        """Read a sequence of ``width``, and one vector of ``vec_width``."""
        super().__init__()
        self.query = nn.Parameter(torch.randn(len(SLOTS), width))
        self.key, self.value, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, NUMBER)
        self.from_vector = nn.Linear(vec_width, len(SLOTS) * NUMBER)

    def forward(
        self, txt: Float[Tensor, "batch text_tokens width"], y: Float[Tensor, "batch vec_width"]
    ) -> Float[Tensor, "2 batch slots options"]:
        """Logits of all options, those of each question side by side: T5's, then CLIP's."""
        found = F.scaled_dot_product_attention(self.query.expand(len(txt), -1, -1), self.key(txt), self.value(txt))
        return torch.stack((self.out(found), rearrange(self.from_vector(y), "b (s o) -> b s o", s=len(SLOTS))))


def train_text(run: Path, recipe: Recipe) -> TextEncoders:
    """T5 and CLIP, having learned from training captions to tell what is where; the flow trains them on."""
    torch.manual_seed(recipe.seed)
    text = new_text_encoders(run)
    reader = Reader(text.t5.config.d_model, text.clip.config.hidden_size)

    def loss(generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        scenes = [random_scene(rng) for _ in range(recipe.captions)]
        tokens = text.tokenize([scene.caption(rng, complete=False) for scene in scenes])
        return answer_loss(reader(*text.encode(*tokens)), of_slots(scenes).expand(2, -1, -1, -1))

    slower = replace(recipe, learning_rate=recipe.text_learning_rate)
    fit("text", nn.ModuleList((text.t5, text.clip, reader)), loss, recipe.text_steps, run, slower)
    return text
