"""Where a variant's files are: carried in data/, in a folder on disk, or on a hub, if the user names it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fluxlab.config import Variant
from fluxlab.files import WeightsError, read_json

_T5_TOKENIZER = (("tokenizer.json",), ("spiece.model",))  # either will do
_CLIP_TOKENIZER = (("tokenizer.json",), ("vocab.json", "merges.txt"))


@dataclass(frozen=True)
class Files:
    """The parts of one model on disk; the text encoders and tokenizers are folders in the Hugging Face format."""

    transformer: Path
    autoencoder: Path
    t5: Path
    t5_tokenizer: Path
    clip: Path
    clip_tokenizer: Path

    def check(self, variant: Variant) -> None:
        """
        Raises:
            WeightsError: a part is not there, the message lists all that are missing; or a text encoder is not as
                wide as the transformer takes it.
        """
        if missing := [f"{part} ({path})" for part, path in vars(self).items() if not path.exists()]:
            folder = self.transformer.parent
            hint = "give the folder that holds the model's files"
            if (folder / "transformer").is_dir():
                hint = f"{folder} is in diffusers' layout, which `fluxlab convert --to official` brings to this one"
            raise WeightsError(f"not found: {', '.join(missing)}; {hint}")
        for folder, ways in ((self.t5_tokenizer, _T5_TOKENIZER), (self.clip_tokenizer, _CLIP_TOKENIZER)):
            if not any(all((folder / name).is_file() for name in names) for names in ways):
                said = " nor ".join(" and ".join(names) for names in ways)
                raise WeightsError(f"{folder}: has neither {said}; fetch the tokenizer's files again")
        config = variant.transformer
        for folder, key, width in (
            (self.t5, "d_model", config.context_in_dim),
            (self.clip, "hidden_size", config.vec_in_dim),
        ):
            told = read_json(folder / "config.json")
            if (found := told.get("text_config", told).get(key)) != width:  # CLIP's may tell of both its towers
                raise WeightsError(
                    f"{folder}: {key} is {found} in its config.json, and {variant.name} takes {width}; is it another "
                    f"encoder's folder?"
                )


def data_folder() -> Path:
    """The folder data/: where the environment variable FLUXLAB_DATA points, or beside the package in a checkout.

    Raises:
        WeightsError: it is in neither place.
    """
    named = os.environ.get("FLUXLAB_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "data"
    if not folder.is_dir():
        raise WeightsError(
            f"no data/ folder at {folder}; flux-tiny's weights come with the repository: clone it, and set "
            f"FLUXLAB_DATA to its data/ folder if fluxlab is installed elsewhere"
        )
    return folder


def find_files(variant: Variant, source: str | Path | None = None) -> Files:
    """The files of a variant.

    Args:
        variant: which model.
        source: for the embedded variants nothing; else a folder laid out as the official repository is
            (``flux1-dev.safetensors``, ``ae.safetensors``, ``text_encoder``, ``text_encoder_2``, ``tokenizer``,
            ``tokenizer_2``), or the name of such a repository on the Hugging Face hub (``owner/name``), from which
            what is not in the local cache is downloaded.

    Raises:
        WeightsError: no source where one is needed, or a part is missing.
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
        folder = Path(source).expanduser()
        if not folder.is_dir():
            folder = _download(str(source), variant)
        files = Files(
            transformer=folder / Path(variant.transformer_file).name,
            autoencoder=folder / Path(variant.autoencoder_file).name,
            t5=folder / "text_encoder_2",
            t5_tokenizer=folder / "tokenizer_2",
            clip=folder / "text_encoder",
            clip_tokenizer=folder / "tokenizer",
        )
    files.check(variant)
    return files


def _download(source: str, variant: Variant) -> Path:
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise WeightsError(f"source is {source!r}, which is neither a folder that exists nor a hub name (owner/name)")
    here = Path(source)
    if here.exists() or here.suffix == ".safetensors" or here.parent.is_dir():
        what = (
            "a file" if here.exists() else f"not there (nor looked for on the hub, as {here.parent} is a folder here)"
        )
        raise WeightsError(f"source is {source!r}, which is {what}; give the folder that holds all parts of the model")
    from huggingface_hub import snapshot_download

    parts = ["text_encoder/*", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*"]
    patterns = [variant.transformer_file, variant.autoencoder_file, *parts]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"source is {source!r}: there is no such folder, and from the hub it cannot be fetched ({error})"
        ) from error
