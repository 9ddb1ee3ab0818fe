"""What a file is: which part of which model, in which layout, quantized how. Opened in chapter 15."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxlab.files import Checkpoint, Tensors, WeightsError, listed
from fluxlab.weights.dialects import dialect
from fluxlab.weights.layouts import variants_of
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
    r".*\b(decoder|lm_head|vision_model|visual_projection|text_projection|logit_scale|position_ids|spiece_model)\b.*"
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
        """Whose transformer or autoencoder it may be."""
        shapes = {name: tuple(entry.shape) for name, entry in self.tensors.entries.items()}
        return variants_of(shapes, self.kind, self.layout) if self.kind in ("transformer", "autoencoder") else []

    def __str__(self) -> str:
        entries, of = self.tensors.entries, f" of {' or '.join(self.variants) or 'no variant here'}"
        if self.kind == "t5":
            of = f" of width {entries[_T5_WIDTH[self.layout]].shape[-1]}" if _T5_WIDTH[self.layout] in entries else ""
        named = f"names after {self.prefix!r}; " if self.prefix else ""
        said = f"the {_CALLED.get(self.kind, self.kind)}{'' if self.kind in ('clip', 'lora') else of}"
        numbers = sum(entry.numel() for entry in entries.values())
        quantization = self.tensors.metadata["quantization"]
        return f"{said} in the {self.layout} layout; {named}{quantization}; {numbers:,} numbers"


_CALLED = {"t5": "T5 encoder", "clip": "CLIP text model", "lora": "LoRA"}
_T5_WIDTH = {"transformers": "shared.weight", "llama.cpp": "token_embd.weight"}  # one row of the table of words


def which(path: str | Path) -> list[Part]:
    """The parts of a model in a safetensors or GGUF file, or in a folder or an index of shards.

    Raises:
        WeightsError: it cannot be read, or holds none of FLUX's parts; the message says what it looks like.
    """
    tensors = open_tensors(path)
    if (who := dialect(tensors)) is not None:
        return [Part("lora", who, "", tensors)]
    found: dict[tuple[str, str], set[str]] = {}
    for part, begins in _PARTS.items():
        matches = (re.match(_PREFIX + begins, name) for name in tensors)
        found |= {part: prefixes} if (prefixes := {match[1] for match in matches if match}) else {}
    if twice := [f"{kind} after {sorted(prefixes)}" for (kind, _), prefixes in found.items() if len(prefixes) > 1]:
        raise WeightsError(f"{path}: holds more than one {', '.join(twice)}; save the one that is meant alone")
    prefixes = {prefix for (prefix,) in found.values()}
    parts = []
    for (kind, layout), (prefix,) in found.items():
        longer = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        names = [n for n in tensors if n.startswith(prefix) and not (longer and n.startswith(longer))]
        parts.append(Part(kind, layout, prefix, tensors.renamed({n.removeprefix(prefix): n for n in names})))
    left = [n for n in tensors if not n.startswith(tuple(prefixes)) and not UNUSED.fullmatch(n)]
    if not parts or left:
        what = f"{len(left)} tensors belong to no part of FLUX" if parts else "this is no part of FLUX"
        raise WeightsError(f"{path}: {what}: {listed(left or list(tensors), 4) or 'it is empty'}")
    return parts


def open_part(path: str | Path, kind: str) -> Part:
    """The one part that is asked for.

    Raises:
        WeightsError: the file cannot be read, or does not hold it; the message says what it holds.
    """
    parts = which(path)
    found = next((part for part in parts if part.kind == kind), None)
    if found is None:
        raise WeightsError(
            f"{path}: this is {'; and '.join(map(str, parts))}, where the {_CALLED.get(kind, kind)} was expected"
        )
    return found


def open_tensors(path: str | Path) -> Tensors:
    """All tensors of a safetensors or GGUF file, or of shards; quantized ones are widened when they are read.

    Raises:
        WeightsError: it cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_file() and os.access(path, os.R_OK):
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                return read_gguf(path)
    return unscaled(Checkpoint(path))
