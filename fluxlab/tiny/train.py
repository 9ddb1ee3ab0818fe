"""How a flux-tiny is made: one command, in stages, from a seed. Opened in chapter 16.

The flux-tiny in data/ took several runs; the README beside it tells of them.

    tokenizers   from the picture world's captions
    autoencoder  pictures to latents and back; then its scale and shift are measured
    text         T5 and CLIP learn what is where, from captions alone
    latents      the pictures that the transformer learns from, encoded once
    flow         rectified flow, with the text encoders, some captions dropped so that CFG works: the teacher
    guidance     flux-tiny-dev: the teacher's CFG output at any guidance, in one forward
    steps        flux-tiny-schnell: the same pictures in 1 to 4 steps
    publish      the weights, under the official names, with the losses and sample grids
    measures     what both get right of 256 held-out prompts

Every stage saves its state as it goes and, run again, continues where it stopped: the random numbers of a step depend
on the seed, the stage and the step alone.
"""

import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fluxlab.files import WeightsError, at, write_tensors, write_text
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.transformer import Flux
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.pipeline.text import TextEncoders, tokenizer
from fluxlab.tiny.distil import distil_guidance, distil_steps
from fluxlab.tiny.family import MEMBERS
from fluxlab.tiny.measure import measure_all, ndimage
from fluxlab.tiny.pictures import USUAL, Pictures, encode_pictures
from fluxlab.tiny.recipe import DEV, SCHNELL, TEACHER, Recipe
from fluxlab.tiny.train_autoencoder import train_autoencoder
from fluxlab.tiny.train_flow import train_flow
from fluxlab.tiny.train_text import train_text, train_tokenizers
from fluxlab.weights.convert import factors
from fluxlab.weights.find import data_folder
from fluxlab.weights.load import autoencoder_config, empty_encoder, load_weights


def train(run: Path, recipe: Recipe | None = None, output: Path | None = None, earlier: Path | None = None) -> None:
    """Run every stage that is not finished in the folder ``run``.

    Args:
        run: keeps the state of every stage.
        recipe: how long each stage is, and with what settings.
        output: where flux-tiny is written, if anywhere.
        earlier: folder of a flux-tiny to go on from: its autoencoder and tokenizers stay as they are, its text
            encoders and its teacher learn more. By default everything starts from new weights.

    Raises:
        WeightsError: ``earlier`` is not the folder of a flux-tiny.
        ValueError: ``run`` was begun with another recipe, or from another ``earlier``.
        OSError: a folder cannot be made.
        ImportError: there is an ``output``, and scipy is not installed, with which it is measured.
    """
    run, output, earlier = at(run), output and at(output), earlier and at(earlier)
    recipe = recipe or Recipe()
    _begin(run, output, asdict(recipe) | {"earlier": earlier is not None and _fingerprint(earlier)})
    autoencoder, text = begin_anew(run, recipe) if earlier is None else go_on_from(earlier)
    encode_pictures(run, recipe, autoencoder, text)
    learned = train_flow(run, recipe, autoencoder, text, earlier and earlier / TEACHER)
    dev = distil_guidance(Pictures(run, recipe), learned, autoencoder, text)
    schnell = distil_steps(run, recipe, autoencoder, dev, text)
    if output is not None:
        pipes = [Pipeline(DEV, dev, autoencoder, text), Pipeline(SCHNELL, schnell, autoencoder, text)]
        publish(run, output, pipes, learned)
        number = recipe.measured
        _write_measures(run, output, "", lambda: [row for pipe in pipes for row in measure_all(pipe, number)])


def begin_anew(run: Path, recipe: Recipe) -> tuple[AutoEncoder, TextEncoders]:
    """The stages before the flow: tokenizers, autoencoder, text."""
    if not (run / "t5/spiece.model").exists() or not (run / "clip/tokenizer.json").exists():
        train_tokenizers(run, recipe.seed)
    return train_autoencoder(run, recipe), train_text(run, recipe)


def go_on_from(folder: Path) -> tuple[AutoEncoder, TextEncoders]:
    """What those stages made for the flux-tiny that is published in a folder."""
    weights = folder / Path(DEV.autoencoder_file).name
    with torch.device("meta"):
        autoencoder = AutoEncoder(autoencoder_config(DEV, weights))
    kinds = {kind: folder / kind for kind in ("t5", "clip")}
    t5, clip = (load_weights(empty_encoder(kind, path), path, dtype=torch.float32) for kind, path in kinds.items())
    words = [tokenizer(kind, path) for kind, path in kinds.items()]
    text = TextEncoders(t5, words[0], DEV.t5_length, clip, words[1], DEV.clip_length)
    return load_weights(autoencoder, weights, dtype=torch.float32), text


def _fingerprint(folder: Path) -> str:
    """Which flux-tiny it is, wherever the folder is: a checksum of its teacher."""
    if not (folder / TEACHER).is_file():
        raise WeightsError(f"earlier is {folder}, which has no {TEACHER}; give the folder of a flux-tiny")
    return f"{zlib.crc32((folder / TEACHER).read_bytes()):08x}"


def _begin(run: Path, output: Path | None, given: dict[str, Any]) -> None:
    """Ask now for what the end needs, and hold a run to the recipe it began with: no other may be mixed in."""
    if output is not None:
        ndimage()  # what is written is measured at the very end
    for folder in [run] if output is None else [run, output / "training"]:
        folder.mkdir(parents=True, exist_ok=True)
    if (path := run / "recipe.json").exists() and (before := json.loads(path.read_text())) != given:
        both = {name: (before.get(name), given.get(name)) for name in before | given}
        changed = {name: pair for name, pair in both.items() if pair[0] != pair[1]}
        raise ValueError(f"{path.parent} was begun with another recipe (then, now): {changed}; name another folder")
    write_text(json.dumps(given, indent=2) + "\n", path)


def train_member(
    member: str, run: Path, recipe: Recipe | None = None, output: Path | None = None, earlier: Path | None = None
) -> None:
    """Train a relative of flux-tiny, ``fill``, ``kontext`` or ``canny``, and measure it: a LoRA, where it is canny.

    The other arguments are those of ``train``; it always goes on from an ``earlier`` one, by default that in data/.

    Raises:
        ValueError: no such member; and as ``train`` does.
    """
    if member not in MEMBERS:
        *others, last = MEMBERS
        raise ValueError(f"member is {member!r}; there are {', '.join(others)} and {last}")
    train_it, measure_it = MEMBERS[member]
    run, output = at(run), output and at(output)
    earlier = at(earlier or data_folder() / "flux-tiny")
    recipe = recipe or Recipe()
    _begin(run, output, asdict(recipe) | {"earlier": _fingerprint(earlier), "member": member})
    autoencoder, known = go_on_from(earlier)
    made = train_it(run, recipe, autoencoder, known, earlier)
    if output is None:
        return
    if isinstance(made, Pipeline):
        pipe = made
        _write_rounded(pipe.model, output / Path(pipe.variant.transformer_file).name)
        if pipe.text is not known:
            _write_encoders(pipe.text, output / member)
    else:
        write_tensors(made.tensors(), lora := output / "flux-tiny-canny-dev-lora.safetensors")
        dev = load_weights(Flux(DEV.transformer), earlier / Path(DEV.transformer_file).name, dtype=torch.float32)
        pipe = Pipeline(DEV, dev, autoencoder, known)
        pipe.add_lora({lora: 1.0})
    _write_record(run, output / "training", (member, f"{member}-guidance"), rows=4, prefix=f"{member}-")
    _write_measures(run, output, f"{member}-", lambda: measure_it(pipe, recipe.judged))


def _write_measures(run: Path, output: Path, prefix: str, measure: Callable[[], list[dict[str, Any]]]) -> None:
    if not (measures := run / "measures.json").exists():
        write_text(json.dumps(measure(), indent=1) + "\n", measures)
    (output / f"training/{prefix}measures.json").write_bytes(measures.read_bytes())


def publish(run: Path, output: Path, pipes: list[Pipeline], teacher: Flux) -> None:
    """Write flux-tiny as the library loads it: official names, bfloat16, text encoders in the Hugging Face format.

    The modules given are rounded too, so that what is measured is what is written. Beside them: the teacher, which has
    flux-tiny-schnell's sizes and needs CFG, the recipe, the losses, and the sample grids of a few steps of each stage.
    """
    autoencoder = pipes[0].autoencoder
    files: dict[str, Any] = {pipe.variant.transformer_file: pipe.model for pipe in pipes}
    for name, module in (files | {TEACHER: teacher, DEV.autoencoder_file: autoencoder}).items():
        metadata = factors(autoencoder.config) if module is autoencoder else None
        _write_rounded(module, output / name.removeprefix("flux-tiny/"), metadata)
    _write_encoders(pipes[0].text, output)
    _write_record(run, output / "training", ("flow", "guidance", "steps"), rows=1)
    _write_record(run, output / "training", ("autoencoder",), rows=2)  # truth and reconstruction


def _write_rounded(module: torch.nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(module.to(torch.bfloat16).state_dict(), path, metadata)
    module.to(torch.float32)


def _write_encoders(text: TextEncoders, folder: Path) -> None:
    parts: dict[str, list[Any]] = {"t5": [text.t5, text.t5_tokenizer], "clip": [text.clip, text.clip_tokenizer]}
    for name, (encoder, words) in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in Path(words.name_or_path).iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
        encoder.to(torch.bfloat16).save_pretrained(folder / name)
        encoder.to(torch.float32)


def _write_record(run: Path, folder: Path, stages: Iterable[str], rows: int, prefix: str = "") -> None:
    """The recipe, the losses, and the first rows of a few sample grids of each stage."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{prefix}recipe.json").write_bytes((run / "recipe.json").read_bytes())
    for file in run.glob("*.jsonl"):
        (folder / file.name).write_bytes(file.read_bytes())
    for stage in stages:
        for grid in _a_few(sorted(run.glob(f"{stage}-[0-9]*.png"))):
            with Image.open(grid) as picture:
                top = picture.crop((0, 0, picture.width, rows * USUAL[0])).quantize(128)
                top.save(folder / grid.name, optimize=True)


def _a_few(grids: list[Path], most: int = 6) -> list[Path]:
    """The first, the last and some between, the steps from one to the next growing by about the same factor."""
    places = {round(len(grids) ** (i / (most - 1))) - 1 for i in range(most)}
    return [grid for i, grid in enumerate(grids) if i in places]
