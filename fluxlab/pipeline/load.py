"""A model with its weights, found, opened and put together. Opened in chapters 00 and 15."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fluxlab.arguments import check_place
from fluxlab.config import variant
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.transformer import Flux
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.pipeline.redux import Redux
from fluxlab.pipeline.text import TextEncoders, tokenizer
from fluxlab.weights.find import find_files
from fluxlab.weights.load import autoencoder_config, empty_encoder, fill, fit, weights_of
from fluxlab.weights.lora import Lora


def load(
    name: str,
    source: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    lora: Mapping[Any, float] | None = None,
    redux: str | Path | None = None,
    low_memory: bool | None = None,
    **files: str | Path | None,
) -> Pipeline:
    """A model with its weights, ready to paint; in float32 for flux-tiny and in bfloat16 for the others by default.

    Args:
        name: of the variant; flux-tiny's are carried in the repository.
        source: a folder as the official repository is or as diffusers writes it, a file of one part or of several, or
            a repository on the Hugging Face hub.
        device: where the model runs.
        dtype: of the weights and of the arithmetic. Quantized files are widened to it.
        lora: LoRA files, each with its strength; they are kept apart, and the pipeline's ``lora`` takes them off.
        redux: the folder of FLUX.1-Redux-dev: then ``image=`` is one picture to vary, or several.
        low_memory: whether each layer's weights are read, widened and moved when it runs, and left when it has run, so
            that a model larger than the memory runs; by default, if they would not fit.
        **files: ``transformer``, ``autoencoder``, ``t5``, ``clip``: loose files (or folders), each in place of the
            source's; ``tokenizers``: the folder that holds ``tokenizer_2`` and ``tokenizer``.

    Raises:
        ConfigError: no such variant.
        ValueError: no such device here, or no floating dtype; ``redux`` for a model whose ``image=`` means something
            else; or a LoRA's strength is no finite number.
        WeightsError: files are missing, or hold another model.
    """
    chosen = variant(name)
    check_place(device, dtype)
    if redux is not None and chosen.shown != "nothing":
        raise ValueError(f"redux is given, and image= of {name} means something else; give it to dev, Krea or schnell")
    found = find_files(chosen, source, **files)
    dtype = dtype or (torch.float32 if chosen.embedded else torch.bfloat16)
    with torch.device("meta"):
        model, autoencoder = Flux(chosen.transformer), AutoEncoder(autoencoder_config(chosen, found.autoencoder))
    t5, clip = (empty_encoder(kind, getattr(found, kind), chosen) for kind in ("t5", "clip"))
    words = tokenizer("t5", found.t5_tokenizer), tokenizer("clip", found.clip_tokenizer)
    parts: list[torch.nn.Module] = [model, autoencoder, t5, clip]
    paths = found.transformer, found.autoencoder, found.t5, found.clip
    tensors = [weights_of(part, path, dtype) for part, path in zip(parts, paths, strict=True)]
    if lora:
        Lora({"transformer": model, "clip": clip, "t5": t5}, lora).undo()  # what does not fit is refused before work
    teller = Redux.load(redux, device, dtype, chosen.transformer.context_in_dim) if redux is not None else None
    low_memory = not fit(tensors, device) if low_memory is None else low_memory
    for part, own in zip(parts, tensors, strict=True):
        fill(part, own, device, low_memory)
    text = TextEncoders(t5, words[0], chosen.t5_length, clip, words[1], chosen.clip_length, device)
    pipe = Pipeline(chosen, model, autoencoder, text, device, dtype, redux=teller, files=found)
    pipe.lora = pipe.add_lora(lora) if lora else None
    return pipe
