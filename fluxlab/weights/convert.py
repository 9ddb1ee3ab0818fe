"""Whole files from the official layout to diffusers' and back, one tensor at a time. Opened in chapter 15."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fluxlab.config import AutoEncoderConfig, Variant
from fluxlab.extras import importing
from fluxlab.files import Checkpoint, WeightsError, read_json, replacing, stream_tensors, write_text
from fluxlab.weights.find import find_files
from fluxlab.weights.layouts import Config, Layout, rules, shapes
from fluxlab.weights.load import autoencoder_config, check_shapes, load_encoder

Tensors = Mapping[str, Tensor]
Named = Iterable[tuple[str, Tensor]]


def convert(
    variant: Variant, output: str | Path, to: Layout, source: str | Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """Convert a whole model: transformer, autoencoder, text encoders, tokenizers and scheduler; or one part of it.

    The text encoders and tokenizers are the same in both layouts. What is written is read back and compared. The
    output is a diffusers pipeline, or a folder laid out as the official repository is; of one part, a diffusers
    folder or an official file. The source is a folder in the other layout, or nothing for the variants carried in
    data/, to diffusers; or one part, a transformer or an autoencoder: a file, a folder of shards, or their index.
    Without ``dtype``, each tensor keeps its own.

    Raises:
        WeightsError: a part is missing, is not this variant's, or is in that layout already; or the output exists.
    """
    _check_output(output, to)
    part = Path(source or "").expanduser()  # a whole model's folder has its text encoders in it
    if source and (part.is_file() or (any(part.glob("*.safetensors*")) and not any(part.glob("text_encoder*")))):
        vae = "encoder.conv_in.weight" in Checkpoint(source)
        config: Config = autoencoder_config(variant, source) if vae else variant.transformer
        return convert_part(source, output, config, to, dtype)
    if to == "official" and source is None:
        raise WeightsError("source is missing; give the diffusers folder to convert")
    with importing():
        from transformers import CLIPTextModel, T5EncoderModel
    with replacing(output) as folder:
        files = find_files(variant, source, "official" if to == "diffusers" else "diffusers")
        load_encoder(T5EncoderModel, files.t5)
        load_encoder(CLIPTextModel, files.clip)
        folder.mkdir()
        names = ("transformer", "vae") if to == "diffusers" else (variant.transformer_file, variant.autoencoder_file)
        transformer, autoencoder = (folder / Path(name).name for name in names)
        convert_part(files.transformer, transformer, variant.transformer, to, dtype)
        convert_part(files.autoencoder, autoencoder, autoencoder_config(variant, files.autoencoder), to, dtype)
        for encoder, tokenizer, number in (
            (files.t5, files.t5_tokenizer, "_2"),
            (files.clip, files.clip_tokenizer, ""),
        ):
            _copy_folder(encoder, folder / f"text_encoder{number}", True, dtype)
            _copy_folder(tokenizer, folder / f"tokenizer{number}", False, dtype)
        if to == "diffusers":
            (folder / "scheduler").mkdir()
            _write_json(scheduler_config(variant), folder / "scheduler/scheduler_config.json")
            _write_json({"_class_name": variant.pipeline} | _PIPELINE, folder / "model_index.json")
    return None


def convert_part(
    source: str | Path, output: str | Path, config: Config, to: Layout, dtype: torch.dtype | None = None
) -> None:
    """Convert one part, as ``convert`` does, to the sizes of ``config``.

    Raises:
        WeightsError: the source is not this part in the other layout, or the output exists.
    """
    _check_output(output, to)
    checkpoint = Checkpoint(source, dtype)
    check_shapes(checkpoint, shapes(config, "diffusers" if to == "official" else "official"))
    entries = dict(_converted(checkpoint.entries, config, to))
    with replacing(output) as file:
        if to == "diffusers":
            file.mkdir()
            _write_json(diffusers_config(config), file / "config.json")
            file /= "diffusion_pytorch_model.safetensors"
        _write(entries, lambda: _converted(checkpoint, config, to), file, factors(config) if to == "official" else {})


def factors(config: Config) -> dict[str, str]:
    """What an official VAE file leaves to be known: the scale and shift of its latents, to go into its metadata."""
    names = ("scale_factor", "shift_factor") if isinstance(config, AutoEncoderConfig) else ()
    return {name: str(getattr(config, name)) for name in names}


def _check_output(output: str | Path, to: str) -> None:
    if to not in get_args(Layout):
        raise WeightsError(f"to is {to!r}; choose {' or '.join(get_args(Layout))}")
    if Path(output).expanduser().exists():
        raise WeightsError(f"{output}: exists already; remove it, or name another output")


def _converted(tensors: Tensors, config: Config, to: Layout) -> Named:
    for rule in rules(config):
        if to == "diffusers":
            yield from rule.split(tensors[rule.official]).items()
            continue
        given = {name: tensors[name] for name in rule.diffusers}
        if len({tensor.dtype for tensor in given.values()}) > 1:
            said = ", ".join(f"{name} ({tensor.dtype})" for name, tensor in given.items())
            raise WeightsError(f"{said} become one tensor, {rule.official}; give a dtype for all")
        yield rule.official, rule.join(given)


def _write(entries: Tensors, tensors: Callable[[], Named], path: Path, metadata: dict[str, str]) -> None:
    """Write a file, and read it back; byte by byte, so that a NaN is equal to itself."""
    stream_tensors(entries, tensors(), path, metadata)
    written = Checkpoint(path)
    for name, tensor in tensors():
        if not torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (written[name], tensor))):
            raise WeightsError(f"{path.name}: {name} was not written as it is; is the disk sound?")


def _write_json(said: dict[str, Any], path: Path) -> None:
    write_text(json.dumps(said, indent=2) + "\n", path)


def _copy_folder(source: Path, output: Path, encoder: bool, dtype: torch.dtype | None) -> None:
    """A text encoder's weights and config, or a tokenizer's files, from a folder that may hold both."""
    output.mkdir()
    for file in filter(Path.is_file, source.iterdir()):
        if encoder != (file.name == "config.json" or ".safetensors" in file.name):
            continue
        if file.suffix == ".safetensors":
            shard = Checkpoint(file, dtype)
            _write(shard.entries, shard.items, output / file.name, shard.metadata)
        elif file.name == "config.json" and dtype is not None:
            _write_json(read_json(file) | {"dtype": str(dtype).removeprefix("torch.")}, output / file.name)
        else:
            shutil.copyfile(file, output / file.name)


def diffusers_config(config: Config) -> dict[str, Any]:
    """What diffusers' ``config.json`` says of a transformer or an autoencoder."""
    if isinstance(config, AutoEncoderConfig):
        levels = len(config.ch_mult)
        return {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [config.ch * mult for mult in config.ch_mult],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "in_channels": config.in_channels,
            "latent_channels": config.z_channels,
            "layers_per_block": config.num_res_blocks,
            "norm_num_groups": config.norm_groups,
            "out_channels": config.out_ch,
            "sample_size": config.resolution,
            "scaling_factor": config.scale_factor,
            "shift_factor": config.shift_factor,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "use_post_quant_conv": False,
            "use_quant_conv": False,
        }
    for name, only in (("theta", 10_000), ("mlp_ratio", 4.0), ("qkv_bias", True)):
        if (given := getattr(config, name)) != only:
            raise WeightsError(f"{name} is {given}, and diffusers' transformer has no other than {only}")
    return {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": config.head_dim,
        "axes_dims_rope": list(config.axes_dim),
        "guidance_embeds": config.guidance_embed,
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context_in_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "out_channels": config.out_channels,
        "pooled_projection_dim": config.vec_in_dim,
    }


def scheduler_config(variant: Variant) -> dict[str, Any]:
    """What diffusers' scheduler is told: whether the schedule bends, and how."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 1.0 if not variant.time_shift else 3.0,
        "use_dynamic_shifting": variant.time_shift,
    }


_PIPELINE = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
