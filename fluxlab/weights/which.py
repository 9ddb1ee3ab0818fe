"""What a file is: which part of which model, in which layout, quantized how. Opened in chapter 15."""

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxlab.config import VARIANTS
from fluxlab.files import Checkpoint, Tensors, WeightsError, at, listed
from fluxlab.weights.dialects import dialect
from fluxlab.weights.layouts import shapes
from fluxlab.weights.quantized import read_gguf, unscaled

_PREFIX = (
    r"((?:(?:model|diffusion_model|transformer|module|_orig_mod|first_stage_model|vae|text_encoders|t5xxl|clip_l|"
    r"text_encoder|text_encoder_2|text_model)\.)*)"
)
_PARTS = {  # part, layout: how names begin that no other has
    ("transformer", "official"): r"(?:double|single)_blocks\.\d+\.(?!processor)",
    ("transformer", "diffusers"): r"(?:single_)?transformer_blocks\.\d+\.",
    ("autoencoder", "official"): r"(?:encoder|decoder)\.(?:mid|down|up)\.",
    ("autoencoder", "diffusers"): r"(?:encoder|decoder)\.(?:mid_block|down_blocks|up_blocks)\.",
    ("t5", "transformers"): r"encoder\.block\.\d+\.layer\.",
    ("t5", "llama.cpp"): r"enc\.blk\.\d+\.",
    ("clip", "transformers"): r"encoder\.layers\.\d+\.(?:self_attn|mlp|layer_norm)",
}
# of whole text encoders and their trainings: what the encoders here have no use for
UNUSED = re.compile(
    r".*\b(decoder|dec|lm_head|vision_model|visual_projection|text_projection|logit_scale|position_ids|spiece_model)\b.*"
)


@dataclass(frozen=True)
class Part:
    """One part of a model in a file, with its names as the layout has them: prefixes are taken off, values widened."""

    kind: str  # transformer, autoencoder, t5, clip or lora
    layout: Any  # official, diffusers, transformers or llama.cpp; of a LoRA its dialect
    prefix: str
    tensors: Tensors

    @property
    def variants(self) -> list[str]:
        """Whose transformer or autoencoder it may be: those that have exactly these names and shapes."""
        if self.kind not in ("transformer", "autoencoder"):
            return []
        found = {name: tuple(entry.shape) for name, entry in self.tensors.entries.items()}
        return [name for name, known in VARIANTS.items() if shapes(getattr(known, self.kind), self.layout) == found]

    def __str__(self) -> str:
        entries, of = self.tensors.entries, ""
        if self.kind in ("transformer", "autoencoder"):
            of = f" of {' or '.join(self.variants) or 'no variant here'}"
        elif self.kind == "t5" and (words := entries.get(_T5_WORDS[self.layout])) is not None:
            of = f" of width {words.shape[-1]}"
        named = f"names after {self.prefix!r}; " if self.prefix else ""
        numbers = sum(entry.numel() for entry in entries.values())
        kinds = Counter(self.tensors.kinds.values()).most_common()
        said = f"{named}{', '.join(f'{kind} ({count})' for kind, count in kinds)}; {numbers:,} numbers"
        return f"the {_CALLED.get(self.kind, self.kind)}{of} in the {self.layout} layout; {said}"


_CALLED = {"t5": "T5 encoder", "clip": "CLIP text model", "lora": "LoRA"}
_T5_WORDS = {"transformers": "shared.weight", "llama.cpp": "token_embd.weight"}  # the table of words


def which(path: str | Path) -> list[Part]:
    """The parts of a model in a safetensors or GGUF file, or in a folder or an index of shards.

    Raises:
        WeightsError: it cannot be read, or holds none of FLUX's parts; the message says what it looks like.
    """
    tensors = open_tensors(path)
    if (who := dialect(tensors)) is not None:
        return [Part("lora", who, "", tensors)]
    found: dict[tuple[str, str], set[str]] = defaultdict(set)  # each part's prefixes
    for part, begins in _PARTS.items():
        for name in tensors:
            if match := re.match(_PREFIX + begins, name):
                found[part].add(match[1])
    if twice := [f"{kind} after {sorted(prefixes)}" for (kind, _), prefixes in found.items() if len(prefixes) > 1]:
        raise WeightsError(f"{path}: holds more than one {', '.join(twice)}; save the one that is meant alone")
    prefixes = {prefix for (prefix,) in found.values()}
    longest = {name: max(filter(name.startswith, prefixes), key=len, default=None) for name in tensors}
    left = [name for name, prefix in longest.items() if prefix is None and not UNUSED.fullmatch(name)]
    parts = []
    for (kind, layout), (prefix,) in found.items():
        names = {name.removeprefix(prefix): name for name, own in longest.items() if own == prefix}
        parts.append(Part(kind, layout, prefix, tensors.renamed(names)))
    if not parts or left:
        what = f"{len(left)} tensors belong to no part of FLUX" if parts else "this is no part of FLUX"
        raise WeightsError(f"{path}: {what}: {listed(left or list(tensors), 4) or 'it is empty'}")
    return parts


def open_part(path: str | Path, kind: str) -> Part:
    """The one part that is asked for; else a ``WeightsError``, which says what the file holds."""
    parts = which(path)
    if wanted := [part for part in parts if part.kind == kind]:
        return wanted[0]
    said = "; and ".join(map(str, parts))
    raise WeightsError(f"{path}: this is {said}, where the {_CALLED.get(kind, kind)} was expected")


def open_tensors(path: str | Path) -> Tensors:
    """All tensors of a safetensors or GGUF file, or of shards; quantized ones are widened when they are read.

    Raises:
        WeightsError: it cannot be read.
    """
    path = at(path)
    return read_gguf(path) if is_gguf(path) else unscaled(Checkpoint(path))


def is_gguf(path: Path) -> bool:
    """Whether a file that can be read begins as GGUF does."""
    if not (path.is_file() and os.access(path, os.R_OK)):
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
