"""Where a variant's files are: carried in data/, in a folder on disk, or on a hub, if the user names it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fluxlab.config import Variant
from fluxlab.files import WeightsError, read_json
from fluxlab.weights.layouts import Layout


@dataclass(frozen=True)
class Files:
    """The parts of one model on disk; the text encoders and tokenizers are folders in the Hugging Face format."""

    transformer: Path
    autoencoder: Path
    t5: Path
    t5_tokenizer: Path
    clip: Path
    clip_tokenizer: Path


def data_folder() -> Path:
    """The folder data/: where the environment variable FLUXLAB_DATA points, or beside the package in a checkout.

    Raises:
        WeightsError: it is in neither place.
    """
    named = os.environ.get("FLUXLAB_DATA")
    folder = Path(named).expanduser() if named else Path(__file__).resolve().parents[2] / "data"
    if not folder.is_dir():
        hint = "clone it, and set FLUXLAB_DATA to its data/ folder if fluxlab is installed elsewhere"
        raise WeightsError(f"no data/ folder at {folder}; flux-tiny's weights come with the repository: {hint}")
    return folder


def find_files(variant: Variant, source: str | Path | None = None, layout: Layout = "official") -> Files:
    """The files of a variant, once its text encoders are seen to be as wide as the transformer takes them.

    The source is nothing for the embedded variants; else a folder laid out as the official repository is
    (``flux1-dev.safetensors``, ``ae.safetensors``, ``text_encoder``, ``text_encoder_2``, ``tokenizer``,
    ``tokenizer_2``), or the name of such a repository on the Hugging Face hub (``owner/name``), from which what is not
    in the local cache is downloaded. diffusers' layout has ``transformer`` and ``vae``, which are folders too.

    Raises:
        WeightsError: no source where one is needed, a part is missing, or a text encoder is another model's.
    """
    if source is None and variant.embedded:
        data = data_folder()
        t5, clip = data / variant.t5, data / variant.clip
        files = Files(data / variant.transformer_file, data / variant.autoencoder_file, t5, t5, clip, clip)
    elif source is None:
        raise WeightsError(
            f"the weights of {variant.name} are not carried in data/; give source=, a folder that holds "
            f"{variant.transformer_file}, {variant.autoencoder_file} and the text encoders, or the hub repository "
            f"{variant.repo!r} to download them from. For shapes alone, build({variant.name!r}, device='meta')"
        )
    else:
        weights = [Path(name).name for name in (variant.transformer_file, variant.autoencoder_file)]
        parts = weights if layout == "official" else ["transformer", "vae"]
        parts += ["text_encoder_2", "tokenizer_2", "text_encoder", "tokenizer"]
        folder = Path(source).expanduser()
        folder = folder if folder.is_dir() else _download(str(source), parts)
        files = Files(*(folder / part for part in parts))
    _check(files, variant)
    return files


def _check(files: Files, variant: Variant) -> None:
    if missing := [f"{part} ({path})" for part, path in vars(files).items() if not path.exists()]:
        folder, hint = files.transformer.parent, "give the folder that holds the model's files"
        if (folder / "transformer").is_dir() and folder / "transformer" != files.transformer:
            hint = f"{folder} is in diffusers' layout, which `fluxlab convert --to official` brings to this one"
        raise WeightsError(f"not found: {', '.join(missing)}; {hint}")
    for folder, names in ((files.t5_tokenizer, ["spiece.model"]), (files.clip_tokenizer, ["vocab.json", "merges.txt"])):
        if not ((folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in names)):
            said = f"has neither tokenizer.json nor {' and '.join(names)}"
            raise WeightsError(f"{folder}: {said}; fetch the tokenizer's files again")
    wide = variant.transformer.context_in_dim, variant.transformer.vec_in_dim
    for folder, key, width in zip((files.t5, files.clip), ("d_model", "hidden_size"), wide, strict=True):
        told = read_json(folder / "config.json")
        if (found := told.get("text_config", told).get(key)) != width:  # CLIP's may tell of both its towers
            said = f"{key} is {found} in its config.json, and {variant.name} takes {width}"
            raise WeightsError(f"{folder}: {said}; is it another encoder's folder?")


def _download(source: str, parts: list[str]) -> Path:
    here = Path(source)
    if source.count("/") != 1 or source[0] in "./~" or here.suffix == ".safetensors" or here.parent.is_dir():
        neither = "neither a folder that exists nor a hub name (owner/name, where no folder owner is)"
        what = "a file" if here.is_file() else neither
        raise WeightsError(f"source is {source!r}, which is {what}; give the folder that holds all parts of the model")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[p for part in parts for p in (part, f"{part}/*")]))
    except (OSError, ValueError) as error:
        said = f"there is no such folder, and from the hub it cannot be fetched ({error})"
        raise WeightsError(f"source is {source!r}: {said}") from error
