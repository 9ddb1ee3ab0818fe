"""Whole files from the official layout to diffusers' and back, one tensor at a time. Opened in chapter 15."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fluxlab.config import AutoEncoderConfig, Variant
from fluxlab.files import Checkpoint, Entry, WeightsError, read_json, replacing, stream_tensors, write_text
from fluxlab.weights.find import Files, find_files
from fluxlab.weights.layouts import Config, rules
from fluxlab.weights.load import autoencoder_config, check_shapes, diffusers_shapes, official_shapes

Layout = Literal["official", "diffusers"]
_SHARD = "diffusion_pytorch_model.safetensors"


def convert_part(
    source: str | Path, output: str | Path, config: Config, to: Layout, dtype: torch.dtype | None = None
) -> None:
    """Convert one part, a transformer or an autoencoder, and read it back to see that it is what it should be.

    Args:
        source: a file, or a folder of shards.
        output: an official file, or a diffusers folder (``config.json`` and the weights). It is written whole or not
            at all, and what stands there already is left alone.
        config: of the part.
        to: the layout to write; the source must be in the other.
        dtype: to cast to; by default each tensor keeps its own.

    Raises:
        WeightsError: the source is not this part in the other layout, or the output exists.
    """
    output = Path(output).expanduser()
    _check_free(output)
    checkpoint = Checkpoint(source)
    check_shapes(checkpoint, diffusers_shapes(config) if to == "official" else official_shapes(config))
    with replacing(output) as temporary:
        if to == "diffusers":
            temporary.mkdir()
            write_text(json.dumps(diffusers_config(config), indent=2) + "\n", temporary / "config.json")
        file = temporary / _SHARD if to == "diffusers" else temporary
        shapes = diffusers_shapes(config) if to == "diffusers" else official_shapes(config)
        kept = {name: entry.dtype for name, entry in _source_entries(checkpoint, config, to, dtype)}
        stream_tensors(
            {name: Entry(shapes[name], dtype or kept[name]) for name in kept},
            _converted(checkpoint, config, to, dtype),
            file,
            factors(config) if to == "official" else None,
        )
        written = Checkpoint(file)
        for name, tensor in _converted(checkpoint, config, to, dtype):
            _check_written(written[name], tensor, name, output)


def convert(
    variant: Variant,
    output: str | Path,
    to: Layout,
    source: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Convert a whole model: transformer, autoencoder, text encoders, tokenizers and scheduler.

    The text encoders and tokenizers are the same in both layouts.

    Args:
        variant: which model.
        output: the folder to make: a diffusers pipeline, or a folder laid out as the official repository is.
        to: the layout to write.
        source: a folder in the other layout; nothing for the variants carried in data/, to diffusers.
        dtype: to cast all weights to; by default each tensor keeps its own.

    Raises:
        WeightsError: a part is missing or not this variant's, or the output exists.
    """
    output = Path(output).expanduser()
    _check_free(output)
    if to == "diffusers":
        files = find_files(variant, source)
    else:
        if source is None:
            raise WeightsError("source is missing; give the diffusers folder to convert")
        names = ("transformer", "vae", "text_encoder_2", "tokenizer_2", "text_encoder", "tokenizer")
        kinds = ("transformer", "autoencoder", "t5", "t5_tokenizer", "clip", "clip_tokenizer")
        files = Files(**{kind: Path(source).expanduser() / name for kind, name in zip(kinds, names, strict=True)})
        if missing := [str(path) for path in vars(files).values() if not path.is_dir()]:
            raise WeightsError(f"not found: {', '.join(missing)}; source must be a whole diffusers pipeline")
        files.check(variant)
    parts: dict[str, Path] = vars(files)
    with replacing(output) as temporary:
        temporary.mkdir()
        places = {"diffusers": ("transformer", "vae"), "official": (variant.transformer_file, variant.autoencoder_file)}
        for kind, config, place in (
            ("transformer", variant.transformer, places[to][0]),
            ("autoencoder", autoencoder_config(variant, parts["autoencoder"]), places[to][1]),
        ):
            convert_part(parts[kind], temporary / Path(place).name, config, to, dtype)
        for kind, place in (("t5", "text_encoder_2"), ("clip", "text_encoder")):
            _copy_encoder(parts[kind], temporary / place, dtype)
        for kind, place in (("t5_tokenizer", "tokenizer_2"), ("clip_tokenizer", "tokenizer")):
            _copy_tokenizer(parts[kind], temporary / place)
        if to == "diffusers":
            (temporary / "scheduler").mkdir()
            text = json.dumps(scheduler_config(variant), indent=2) + "\n"
            write_text(text, temporary / "scheduler/scheduler_config.json")
            index = {"_class_name": variant.pipeline} | _PIPELINE
            write_text(json.dumps(index, indent=2) + "\n", temporary / "model_index.json")


def part_of(source: str | Path) -> Literal["transformer", "autoencoder"] | None:
    """Which part a file or a folder of shards holds; None for a folder that holds a whole model, or nothing."""
    source = Path(source).expanduser()
    if any((source / name).is_dir() for name in ("transformer", "vae", "text_encoder", "text_encoder_2")):
        return None
    if source.is_dir() and (len(list(source.glob("*.safetensors"))) != 1) and not list(source.glob("*.index.json")):
        return None
    return "autoencoder" if "encoder.conv_in.weight" in Checkpoint(source).entries else "transformer"


def factors(config: Config) -> dict[str, str]:
    """What an official VAE file leaves to be known: the scale and shift of its latents, to go into its metadata."""
    if not isinstance(config, AutoEncoderConfig):
        return {}
    return {"scale_factor": str(config.scale_factor), "shift_factor": str(config.shift_factor)}


def _check_free(output: Path) -> None:
    if output.exists():
        raise WeightsError(f"{output}: exists already; remove it, or name another output")
    if not output.parent.is_dir():
        raise WeightsError(f"{output}: there is no folder {output.parent}; make it first")


def _source_entries(
    checkpoint: Checkpoint, config: Config, to: Layout, dtype: torch.dtype | None
) -> Iterator[tuple[str, Entry]]:
    """Each output tensor's name, and the entry of the source tensor that it comes from."""
    for rule in rules(config):
        if to == "diffusers":
            yield from ((name, checkpoint.entries[rule.official]) for name in rule.diffusers)
        else:
            entries = [checkpoint.entries[name] for name in rule.diffusers]
            if dtype is None and len({entry.dtype for entry in entries}) > 1:
                said = ", ".join(f"{n} ({e.dtype})" for n, e in zip(rule.diffusers, entries, strict=True))
                raise WeightsError(
                    f"{checkpoint.path}: {said} become one tensor, {rule.official}; give a dtype for all"
                )
            yield rule.official, entries[0]


def _converted(
    checkpoint: Checkpoint, config: Config, to: Layout, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    for rule in rules(config):
        if to == "diffusers":
            parts = rule.split(checkpoint[rule.official])
        else:
            given = {name: checkpoint[name] for name in rule.diffusers}
            parts = {rule.official: rule.join({n: _cast(t, dtype or t.dtype, n) for n, t in given.items()})}
        for name, tensor in parts.items():
            yield name, _cast(tensor, dtype or tensor.dtype, name)


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Values that the dtype cannot hold are refused, not made infinite."""
    cast = tensor.to(dtype).contiguous()
    if dtype is torch.float16 and cast.isinf().sum() != tensor.float().isinf().sum():
        raise WeightsError(f"dtype is {dtype}, which ends at 65504, and {name} has larger values; take bfloat16")
    return cast


def _check_written(written: Tensor, given: Tensor, name: str, output: Path) -> None:
    """Byte by byte, so that a NaN is equal to itself."""
    if not torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (written, given))):
        raise WeightsError(f"{output}: {name} was not written as it is; is the disk sound?")


def _copy_encoder(source: Path, output: Path, dtype: torch.dtype | None) -> None:
    """A text encoder's weights and config, from a folder that may hold its tokenizer too."""
    output.mkdir()
    config = read_json(source / "config.json")
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    write_text(json.dumps(config, indent=2) + "\n", output / "config.json")
    whole = Checkpoint(source)  # every shard is there and can be read
    for file in source.glob("*.safetensors.index.json"):
        shutil.copyfile(file, output / file.name)
    for file in source.glob("*.safetensors"):
        shard = Checkpoint(file)
        entries = {
            name: Entry(shape, dtype if dtype is not None and kept.is_floating_point else kept)
            for name, (shape, kept) in shard.entries.items()
        }
        stream_tensors(entries, ((n, _cast(shard[n], e.dtype, n)) for n, e in entries.items()), output / file.name)
    written = Checkpoint(output)
    for name, entry in written.entries.items():
        _check_written(written[name], whole[name].to(entry.dtype), name, output)


def _copy_tokenizer(source: Path, output: Path) -> None:
    """A tokenizer's files, from a folder that may hold its encoder too."""
    output.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json" and ".safetensors" not in file.name:
            shutil.copyfile(file, output / file.name)


def diffusers_config(config: Config) -> dict[str, Any]:
    """What diffusers' ``config.json`` says of a transformer or an autoencoder."""
    if isinstance(config, AutoEncoderConfig):
        levels = len(config.ch_mult)
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": [config.ch * mult for mult in config.ch_mult],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "force_upcast": True,
            "in_channels": config.in_channels,
            "latent_channels": config.z_channels,
            "layers_per_block": config.num_res_blocks,
            "mid_block_add_attention": True,
            "norm_num_groups": config.norm_groups,
            "out_channels": config.out_ch,
            "sample_size": config.resolution,
            "scaling_factor": config.scale_factor,
            "shift_factor": config.shift_factor,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "use_post_quant_conv": False,
            "use_quant_conv": False,
        }
    for name, value in (("theta", 10_000), ("mlp_ratio", 4.0), ("qkv_bias", True)):
        if getattr(config, name) != value:
            raise WeightsError(
                f"{name} is {getattr(config, name)}, and diffusers' transformer has no other than {value}"
            )
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
        "patch_size": 1,
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
