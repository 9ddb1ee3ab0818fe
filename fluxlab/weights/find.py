"""Where a variant's files are: carried in data/, on disk, or on a hub, if the user names it. Opened in chapter 15."""

import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxlab.config import Variant
from fluxlab.files import WeightsError, at, read_json
from fluxlab.weights.which import which


@dataclass(frozen=True)
class Files:
    """The parts of one model on disk, files or folders; tokenizers are folders in the Hugging Face format."""

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
    folder = at(named) if named else Path(__file__).resolve().parents[2] / "data"
    if not folder.is_dir():
        hint = "clone it, and set FLUXLAB_DATA to its data/ folder if fluxlab is installed elsewhere"
        raise WeightsError(f"no data/ folder at {folder}; flux-tiny's weights come with the repository: {hint}")
    return folder


def find_files(
    variant: Variant,
    source: str | Path | None = None,
    *,
    transformer: str | Path | None = None,
    autoencoder: str | Path | None = None,
    t5: str | Path | None = None,
    clip: str | Path | None = None,
    tokenizers: str | Path | None = None,
) -> Files:
    """The files of a variant, once its text encoders are seen to be as wide as the transformer takes them.

    The source is a folder laid out as the official repository is (``flux1-dev.safetensors``, ``ae.safetensors``,
    ``text_encoder``, ``text_encoder_2``, ``tokenizer``, ``tokenizer_2``) or as diffusers does (``transformer``, ``vae``
    and the same); or a file of one part or of several; or the name of a repository on the Hugging Face hub
    (``owner/name``), from which what is not in the local cache is downloaded, once it is said how much that is. Without
    it: data/ for the embedded variants; for the others such a folder that the environment variable FLUXLAB_WEIGHTS
    names, or the one in it that has the name of their repository, such as ``FLUX.1-dev``. The others are as in
    ``fl.load``.

    Raises:
        WeightsError: no source where one is needed, a part is missing, or a text encoder is another model's.
    """
    loose = {"transformer": transformer, "autoencoder": autoencoder, "t5": t5, "clip": clip}
    given = {part: at(path) for part, path in loose.items() if path is not None}
    places = {
        "transformer": (Path(variant.transformer_file).name, "transformer"),
        "autoencoder": (Path(variant.autoencoder_file).name, "vae"),
        "t5": ("text_encoder_2",),
        "t5_tokenizer": ("tokenizer_2",),
        "clip": ("text_encoder",),
        "clip_tokenizer": ("tokenizer",),
    }
    if source is None and not variant.embedded and (own := os.environ.get("FLUXLAB_WEIGHTS")):
        named = at(own).resolve() / str(variant.repo).rpartition("/")[2]
        source = named if named.is_dir() else named.parent
    path = None if source is None else at(source)
    if path is None and not given and not variant.embedded:
        raise WeightsError(
            f"the weights of {variant.name} are not carried in data/; give source=, or set FLUXLAB_WEIGHTS, a folder "
            f"that holds {variant.transformer_file}, {variant.autoencoder_file} and the text encoders; or the hub "
            f"repository {variant.repo!r} to download them from; or files: transformer=, autoencoder=, t5=, clip=, "
            f"and the folder tokenizers=. For shapes alone, build({variant.name!r}, device='meta')"
        )
    found: dict[str, Path] = {}
    if variant.embedded and (path is None or path.is_file()):
        names = (variant.transformer_file, variant.autoencoder_file, variant.t5, variant.t5, variant.clip, variant.clip)
        found = dict(zip(places, map(data_folder().joinpath, names), strict=True))
    if path is not None and path.is_file():
        parts = which(path)
        if parts[0].kind == "lora":
            raise WeightsError(f"{path}: this is {parts[0]}, which changes a model and is none; give it as lora=")
        found |= {part.kind: path for part in parts}
    elif path is not None:
        folder = path if path.is_dir() else _download(str(source), places)
        inside = ((part, folder / name) for part, names in places.items() for name in reversed(names))
        found = {part: place for part, place in inside if place.exists()}  # a part's first name is taken last, and wins
    found |= given
    for part in ("t5", "clip"):
        name = f"{part}_tokenizer"
        if tokenizers is not None:
            found[name] = at(tokenizers) / places[name][0]
        elif part in given and given[part].is_dir():
            complete = any((given[part] / file).is_file() for file in ("tokenizer.json", "spiece.model", "vocab.json"))
            found[name] = given[part] if complete else found.get(name, given[part])
    if missing := [f"{part} ({' or '.join(names)})" for part, names in places.items() if part not in found]:
        words = any("tokenizer" in part for part in missing)
        hint = "tokenizers=, a folder with tokenizer_2 for T5 and tokenizer for CLIP" if words else "the whole folder"
        hint += " (those in data/ have another vocabulary, and serve flux-tiny alone)" if words else ""
        where = f" in {source}" if source else ""
        raise WeightsError(f"not found{where}: {', '.join(missing)}; give {hint}, or each by its argument")
    files = Files(**found)
    _check(files, variant)
    return files


def encoder_config(folder: Path) -> dict[str, Any]:
    """What the ``config.json`` in a text encoder's folder says of it; CLIP's may tell of both its towers."""
    told = read_json(folder / "config.json")
    if not isinstance(own := told.get("text_config", told), dict):
        raise WeightsError(f"{folder}: text_config in its config.json is {own!r}, where a JSON object was expected")
    return own


def _check(files: Files, variant: Variant) -> None:
    if missing := [f"{part} ({path})" for part, path in vars(files).items() if not path.exists()]:
        raise WeightsError(f"not found: {', '.join(missing)}; give the folder or the file that holds it")
    for folder, names in ((files.t5_tokenizer, ["spiece.model"]), (files.clip_tokenizer, ["vocab.json", "merges.txt"])):
        if not ((folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in names)):
            said = f"has neither tokenizer.json nor {' and '.join(names)}"
            raise WeightsError(f"{folder}: {said}; fetch the tokenizer's files again")
    c = variant.transformer
    for folder, key, width in ((files.t5, "d_model", c.context_in_dim), (files.clip, "hidden_size", c.vec_in_dim)):
        told: dict[str, Any] = encoder_config(folder) if folder.is_dir() else {key: width}
        if (found := told.get(key)) != width:
            said = f"{key} is {found} in its config.json, and {variant.name} takes {width}"
            raise WeightsError(f"{folder}: {said}; is it another encoder's folder?")


def _download(source: str, places: Mapping[str, tuple[str, ...]]) -> Path:
    """A hub repository's files in the local cache: what is not there yet is told, with its size, and fetched."""
    here = Path(source)
    if source.count("/") != 1 or source[0] in "./~" or here.suffix in (".safetensors", ".gguf") or here.parent.is_dir():
        said = "neither a file or folder that exists nor a hub name (owner/name, where no folder owner is)"
        raise WeightsError(f"source is {source!r}, which is {said}; give the folder that holds all parts of the model")
    from huggingface_hub import constants, errors, snapshot_download

    def fetch(parts: Iterable[str], dry_run: bool) -> Any:
        inside = ("", "/*.json", "/*.safetensors", "/spiece.model", "/merges.txt")
        patterns = [f"{part}{file}" for part in parts for file in inside]
        return snapshot_download(source, allow_patterns=patterns, dry_run=dry_run)

    try:
        every = [name for names in places.values() for name in names]
        try:
            both = fetch(every, dry_run=True)
        except errors.RepositoryNotFoundError:  # or gated
            raise
        except OSError:  # without a network, the cache may still have all
            return Path(fetch(every, dry_run=False))
        held = {file.filename.partition("/")[0] for file in both}  # an official file, or else diffusers' folder
        parts = [next((name for name in names if name in held), names[0]) for names in places.values()]
        coming = [file for file in both if file.will_download and file.filename.partition("/")[0] in parts]
        size, cache = sum(file.file_size or 0 for file in coming), Path(constants.HF_HUB_CACHE)
        free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
        said = f"{source}: {len(coming)} files to download, {size / 1e9:.1f} GB, to {cache} ({free / 1e9:.1f} GB free)"
        if size > free:
            raise WeightsError(f"{said}; make room, or set HF_HOME to another disk")
        if coming:
            print(said, file=sys.stderr)
        return Path(fetch(parts, dry_run=False))
    except errors.GatedRepoError as error:
        ways = f"accept its licence at https://huggingface.co/{source}, then log in with `hf auth login`"
        raise WeightsError(f"{source}: this repository is gated; {ways}") from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(f"{source}: neither a folder here nor a repository on the hub; look at its name") from error
    except (OSError, errors.HFValidationError) as error:
        raise WeightsError(f"{source!r}: no such folder, and from the hub it cannot be fetched ({error})") from error
