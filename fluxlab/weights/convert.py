"""Whole models from one layout to another, one tensor at a time. Opened in chapter 15."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from fluxlab.config import AutoEncoderConfig, Variant
from fluxlab.files import Checkpoint, Tensors, WeightsError, at, is_index, replacing, stream_tensors, write_text
from fluxlab.weights.find import find_files
from fluxlab.weights.layouts import Config, Layout
from fluxlab.weights.load import autoencoder_config, empty_encoder, opened, weights_of
from fluxlab.weights.which import is_gguf, which

Target = Literal["official", "diffusers", "comfyui"]


def convert(
    variant: Variant,
    output: str | Path,
    to: Target,
    source: str | Path | None = None,
    dtype: torch.dtype | None = None,
    **files: str | Path | None,
) -> None:
    """Convert a whole model: transformer, autoencoder, text encoders, tokenizers and scheduler; or one part of it.

    What is written is read back and compared. The output is a diffusers pipeline, a folder laid out as the official
    repository is, or one ComfyUI checkpoint, which has no tokenizers; of one part, a diffusers folder or an official
    file. The source and the files are what ``find_files`` takes; or the source is one part, a transformer or an
    autoencoder. Quantized files are written widened. Without ``dtype``, each tensor keeps its own; of a
    text encoder in float8, bfloat16.

    Raises:
        WeightsError: a part is missing, is not this variant's, or would be written as it is; or the output exists.
    """
    _check_output(output, to)
    one = at(source or "")  # a whole model's folder has its text encoders in it
    alone = one.is_file() or (any(one.glob("*.safetensors*")) and not any(one.glob("text_encoder*")))
    if source and alone and not any(files.values()):
        kinds = [part.kind for part in which(one)]
        if kinds in (["transformer"], ["autoencoder"]):
            config = variant.transformer if kinds == ["transformer"] else autoencoder_config(variant, one)
            return convert_part(one, output, config, to, dtype)
    found = find_files(variant, source, **files)
    vae = autoencoder_config(variant, found.autoencoder)
    encoders = {kind: empty_encoder(kind, getattr(found, kind), variant) for kind in ("t5", "clip")}
    texts = {kind: _text(encoder, getattr(found, kind), dtype) for kind, encoder in encoders.items()}
    layout: Layout = "diffusers" if to == "diffusers" else "official"
    transformer = opened(found.transformer, variant.transformer, layout, dtype)
    autoencoder = opened(found.autoencoder, vae, layout, dtype)
    if to != "comfyui" and _as_it_is(found.transformer, transformer) and _as_it_is(found.autoencoder, autoencoder):
        raise WeightsError(f"{found.transformer.parent}: is in the {to} layout already, and in that dtype")
    with replacing(output) as target:
        if to == "comfyui":
            parts = {"model.diffusion_model.": transformer, "vae.": autoencoder}
            parts["text_encoders.t5xxl.transformer."] = texts["t5"]
            parts["text_encoders.clip_l.transformer."] = texts["clip"]
            return _write(parts, target, factors(vae))
        target.mkdir()
        names = ("transformer", "vae") if to == "diffusers" else (variant.transformer_file, variant.autoencoder_file)
        _write_part(transformer, target / Path(names[0]).name, variant.transformer, layout)
        _write_part(autoencoder, target / Path(names[1]).name, vae, layout)
        for kind, tokenizer, number in (("t5", found.t5_tokenizer, "_2"), ("clip", found.clip_tokenizer, "")):
            folder, words = target / f"text_encoder{number}", target / f"tokenizer{number}"
            folder.mkdir()
            _write({"": texts[kind]}, folder / "model.safetensors")
            held = str(next(iter(texts[kind].entries.values())).dtype).removeprefix("torch.")
            _write_json(encoders[kind].config.to_dict() | {"dtype": held}, folder / "config.json")
            words.mkdir()
            for file in tokenizer.iterdir():  # an encoder's files may be in the same folder
                if file.suffix in (".json", ".txt", ".model") and file.name != "config.json" and not is_index(file):
                    shutil.copyfile(file, words / file.name)
        if to == "diffusers":
            (target / "scheduler").mkdir()
            _write_json(scheduler_config(variant), target / "scheduler/scheduler_config.json")
            _write_json({"_class_name": variant.pipeline} | _PIPELINE, target / "model_index.json")
    return None


def convert_part(
    source: str | Path, output: str | Path, config: Config, to: Target, dtype: torch.dtype | None = None
) -> None:
    """Convert one part, as ``convert`` does, to the sizes of ``config``.

    Raises:
        WeightsError: the source is not this part, or would be written as it is; or the output exists.
    """
    _check_output(output, to)
    if to == "comfyui":
        raise WeightsError("to is 'comfyui', which is one file of all parts; for one part take official or diffusers")
    source = at(source)
    tensors = opened(source, config, to, dtype)
    if _as_it_is(source, tensors):
        raise WeightsError(f"{source}: is in the {to} layout already, and in that dtype")
    _write_part(tensors, output, config, to)


def _as_it_is(source: Path, tensors: Tensors) -> bool:
    """Whether a source holds just these tensors, by these names."""
    return tensors.mapped and not is_gguf(source) and list(tensors) == list(Checkpoint(source))


def _write_part(tensors: Tensors, output: str | Path, config: Config, to: Layout) -> None:
    with replacing(output) as file:
        if to == "diffusers":
            file.mkdir()
            _write_json(diffusers_config(config), file / "config.json")
            file /= "diffusion_pytorch_model.safetensors"
        _write({"": tensors}, file, factors(config) if to == "official" else {})


def factors(config: Config) -> dict[str, str]:
    """What an official VAE file does not say: the scale and shift of its latents, to go into its metadata."""
    names = ("scale_factor", "shift_factor") if isinstance(config, AutoEncoderConfig) else ()
    return {name: str(getattr(config, name)) for name in names}


def _check_output(output: str | Path, to: str) -> None:
    if to not in get_args(Target):
        raise WeightsError(f"to is {to!r}; choose {', '.join(get_args(Target))}")
    if at(output).exists():
        raise WeightsError(f"{output}: exists already; remove it, or name another output")


def _text(encoder: nn.Module, source: Path, dtype: torch.dtype | None) -> Tensors:
    """A text encoder's tensors, each once, under the names that every release of transformers reads."""
    tensors = weights_of(encoder, source, dtype)
    prefix = "text_model." if type(encoder).__name__ == "CLIPTextModel" else ""
    return tensors.renamed({prefix + name: name for name in tensors if name != "encoder.embed_tokens.weight"})


def _write(parts: Mapping[str, Tensors], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file of parts after prefixes, and read it back; byte by byte, so that a NaN is equal to itself."""
    places = {prefix + name: (part, name) for prefix, part in parts.items() for name in part}
    entries = {name: part.entries[own] for name, (part, own) in places.items()}
    stream_tensors(entries, ((name, part[own]) for name, (part, own) in places.items()), path, metadata)
    written = Checkpoint(path)
    for name, (part, own) in places.items():
        if not torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (written[name], part[own]))):
            raise WeightsError(f"{path.name}: {name} was not written as it is; is the disk sound?")


def _write_json(said: dict[str, Any], path: Path) -> None:
    write_text(json.dumps(said, indent=2) + "\n", path)


def diffusers_config(config: Config) -> dict[str, Any]:
    """What diffusers' ``config.json`` says of a transformer or an autoencoder.

    Raises:
        WeightsError: it has no way to say a size.
    """
    told: dict[str, Any]
    if isinstance(config, AutoEncoderConfig):
        levels, no_convs = len(config.ch_mult), dict.fromkeys(("use_quant_conv", "use_post_quant_conv"), False)
        told = {"_class_name": "AutoencoderKL", "in_channels": config.in_channels, "out_channels": config.out_ch}
        told |= {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        told |= {"block_out_channels": [config.ch * mult for mult in config.ch_mult], "sample_size": config.resolution}
        told |= {"layers_per_block": config.num_res_blocks, "norm_num_groups": config.norm_groups}
        told |= {"latent_channels": config.z_channels, "scaling_factor": config.scale_factor}
        return told | {"shift_factor": config.shift_factor} | no_convs
    for name, only in (("theta", 10_000), ("mlp_ratio", 4.0), ("qkv_bias", True)):
        if (given := getattr(config, name)) != only:
            raise WeightsError(f"{name} is {given}, and diffusers' transformer has no other than {only}")
    told = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": config.guidance_embed}
    told |= {"attention_head_dim": config.head_dim, "num_attention_heads": config.num_heads}
    told |= {"axes_dims_rope": list(config.axes_dim), "in_channels": config.in_channels}
    told |= {"num_layers": config.depth, "num_single_layers": config.depth_single_blocks}
    told |= {"joint_attention_dim": config.context_in_dim, "pooled_projection_dim": config.vec_in_dim}
    return told | {"out_channels": config.out_channels}


def scheduler_config(variant: Variant) -> dict[str, Any]:
    """What diffusers' scheduler is told: whether the schedule bends, and how."""
    bends = {"use_dynamic_shifting": variant.time_shift, "shift": 3.0 if variant.time_shift else 1.0}
    ends = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15}
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000} | ends | bends


_PIPELINE = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
