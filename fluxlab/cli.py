"""The ``fluxlab`` command."""

import functools
import io
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from typer import Argument, Option

import fluxlab as fl
from fluxlab.arguments import whole
from fluxlab.config import FLUX2
from fluxlab.course.gallery import gallery, relatives
from fluxlab.files import at, replacing
from fluxlab.onnx.export import GRAPHS, PARTS
from fluxlab.pipeline.checks import as_batch, check_guidance, check_shown
from fluxlab.pipeline.latents import as_side
from fluxlab.speed.sharded import processes, rank
from fluxlab.tiny.recipe import SMOKE, Recipe
from fluxlab.tiny.train import train, train_member
from fluxlab.weights.convert import convert as convert_model
from fluxlab.weights.which import which as which_parts

_TINY = "flux-tiny-dev"
_SOURCE = """A whole model's folder in the other layout; or one part, a transformer or an autoencoder: a file, or a
diffusers folder of shards. Not needed for flux-tiny, to diffusers or comfyui."""

_OPTIONS: Any = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}
app = typer.Typer(
    help="FLUX.1: paint, explain, convert, export and train.", rich_markup_mode=None, **_OPTIONS
)  # markup would swallow "[default: ...]"


_EXPECTED: Any = (ValueError, OSError, ImportError, MemoryError, ArithmeticError, torch.OutOfMemoryError)
_EXPECTED += (Image.DecompressionBombError, SyntaxError)  # of pictures


def _warned(said: Warning | str, *_: Any) -> None:
    typer.secho(" ".join(str(said).split()), err=True, fg="yellow")


def _command(function: Callable[..., None]) -> None:
    """Make a function a command: a ~ in its paths is opened, and what goes wrong is one line, with exit code 2."""

    @functools.wraps(function)
    def run(**given: Any) -> None:
        try:
            with warnings.catch_warnings():
                vars(warnings)["showwarning"] = _warned
                function(**{k: at(value) if isinstance(value, Path) else value for k, value in given.items()})
        except BrokenPipeError:  # whoever reads has seen enough
            raise
        except _EXPECTED as error:
            typer.secho(f"fluxlab: {' '.join(str(error).split()) or type(error).__name__}", err=True, fg="red")
            raise typer.Exit(2) from error
        except RuntimeError as error:
            if found := [words for words in ("allocate memory", "overflow") if words in f"{error} {error.__cause__}"]:
                typer.secho(f"fluxlab: the sizes are too large for this machine ({found[0]})", err=True, fg="red")
                raise typer.Exit(2) from error
            if processes() < 2:
                raise
            typer.secho(f"fluxlab: another process of this run ended, so process {rank()} ends ({error})", err=True)
            raise typer.Exit(2) from error

    app.command()(run)


@_command
def generate(
    prompt: Annotated[str, Argument(help="What to paint.")],
    output: Annotated[Path, Option(help="The PNG file to write.")] = Path("picture.png"),
    variant: Annotated[str, Option(help="Which model.")] = _TINY,
    source: Annotated[
        str | None, Option(help="A full-size model: its folder, or a hub repository (owner/name).")
    ] = None,
    steps: Annotated[int | None, Option(help="Forwards of the model. [default: the variant's]")] = None,
    guidance: Annotated[float | None, Option(help="Distilled guidance. [default: the variant's]")] = None,
    seed: Annotated[int, Option(help="Of the noise: the same seed gives the same picture.")] = 0,
    width: Annotated[int | None, Option(help="In pixels, a multiple of 16. [default: the picture's, or usual]")] = None,
    height: Annotated[int | None, Option(help="Likewise.")] = None,
    image: Annotated[
        list[Path] | None, Option(help="A picture to start from, to fill, to change or to vary. For Redux, repeatable.")
    ] = None,
    mask: Annotated[Path | None, Option(help="White where --image is to be painted; Fill is made for it.")] = None,
    control: Annotated[Path | None, Option(help="For Canny and Depth: the picture of edges or of depth.")] = None,
    redux: Annotated[
        Path | None, Option(help="The folder of FLUX.1-Redux-dev, which gives --image to the model as text.")
    ] = None,
    strength: Annotated[
        float | None, Option(help="How much of --image becomes noise, (0, 1]; of Redux, its weight.")
    ] = None,
    negative_prompt: Annotated[str | None, Option(help="What --true-cfg leads away from.")] = None,
    true_cfg: Annotated[float, Option(help="Above 1: guidance by a second forward a step.")] = 1.0,
    tiled: Annotated[bool, Option("--tiled", help="A large picture through the VAE in tiles: less memory.")] = False,
    lora: Annotated[
        list[str] | None, Option(help="A LoRA file; with =0.8 behind it, at that strength. Repeatable.")
    ] = None,
    low_memory: Annotated[bool, Option("--low-memory", help="Leave weights on disk until they are needed.")] = False,
    device: Annotated[str, Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Paint a prompt."""
    kind = Image.registered_extensions().get(output.suffix.lower())
    if output.is_dir() or kind not in Image.SAVE:
        raise ValueError(f"--output is {str(output)!r}; give the name of a picture, such as picture.png")
    Image.new("RGB", (1, 1)).save(io.BytesIO(), kind)  # or it cannot be written as one
    if device == "meta":
        raise ValueError("--device is meta, which has shapes and no numbers to paint with; take cpu, cuda or mps")
    options: Any = {"guidance": guidance, "width": width, "height": height, "strength": strength, "true_cfg": true_cfg}
    options |= {"seed": seed, "num_steps": steps, "negative_prompt": negative_prompt, "tiled": tiled}
    as_batch(prompt, seed)
    check_guidance(guidance, true_cfg, negative_prompt)
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            as_side(name, side)
    whole("steps", 1 if steps is None else steps)
    with replacing(output) as temporary:
        shown: Any = {"mask": mask, "control": control}
        options |= {name: _opened(path) for name, path in shown.items() if path}
        images = [_opened(path) for path in image or ()]
        options |= {"image": images[0] if len(images) == 1 else images} if images else {}
        if redux is None and not lora:  # which may change what it is shown
            given = {name: options.get(name) for name in ("image", "mask", "control")}
            check_shown(variant, fl.variant(variant).shown, given)
        loras, low = dict(map(_strength, lora or ())), low_memory or (False if processes() > 1 else None)
        if len(loras) < len(lora or ()):
            raise ValueError("--lora names a file twice; give each once")
        if processes() > 1 and device == "cuda":  # each process on a GPU of its own
            device = f"cuda:{os.environ.get('LOCAL_RANK', rank())}"
        pipe = fl.load(variant, source, device, lora=loras, redux=redux, low_memory=low)
        if processes() > 1:
            fl.speed.shard(pipe)
        picture: Any = pipe(prompt, **options, progress=rank() == 0)
        picture.save(temporary)
    if rank() == 0:
        typer.echo(f"{output}: {picture.width} x {picture.height} pixels")


def _opened(path: Path) -> Image.Image:
    image = Image.open(at(path))
    image.load()  # all of it, before any work is done
    return image


def _strength(said: str) -> tuple[str, float]:
    file, _, strength = said.rpartition("=")
    try:
        return (file, float(strength)) if file else (said, 1.0)
    except ValueError:
        return said, 1.0  # the = is in the file's name


def _of_one(given: object) -> None:
    """Without a variant, options of one file have no use."""
    if given:
        raise ValueError("without a variant all of exported/ is written, and only --output has a use; name a variant")


@_command
def export(
    variant: Annotated[
        str | None, Argument(help="Whose ONNX file to write. [default: all that is in exported/]")
    ] = None,
    output: Annotated[Path, Option(help="The folder for everything, or the one ONNX file.")] = Path("exported"),
    part: Annotated[str, Option(help=f"{', '.join(PARTS[:-1])} or {PARTS[-1]}.")] = "transformer",
    weights: Annotated[bool, Option(help="Write the numbers too, so that the file runs.")] = False,
    source: Annotated[str | None, Option(help="The folder or hub repository of a full-size model.")] = None,
    dtype: Annotated[str, Option(help="float32, float16 or bfloat16.")] = "float32",
    opset: Annotated[int, Option(help="17 to 24; below 23, norms and attention are spelled out.")] = 23,
    flat: Annotated[bool, Option(help="Without functions: for OpenVINO, and quantizers of your own.")] = False,
    quantize: Annotated[str | None, Option(help="int8: products of integers, with --weights; flat, opset 17.")] = None,
) -> None:
    """Write ONNX graphs, maps, diagrams and grids of pictures: all of exported/, or one model's ONNX file.

    Without --weights a file has no numbers: it is to be looked at, in Netron, and does not run. With them it is for
    onnxruntime, onnxslim, onnxsim and onnx-graphsurgeon; with --flat for OpenVINO and for quantizers and converters
    of your own; with --opset 17 for tools that know no later one. exported/README.md has the whole table.
    """
    if variant is not None:
        target = output if output.suffix == ".onnx" else output / f"{variant}-{part}.onnx"
        how: Any = {"weights": weights, "source": source, "dtype": dtype, "opset": opset, "flat": flat}
        fl.export_onnx(variant, target, part, **how, quantize=quantize)  # type: ignore[arg-type]
        return typer.echo(f"{target}: {target.stat().st_size / 1e3:,.0f} kB")
    _of_one(weights or flat or quantize or source or (part, dtype, opset) != ("transformer", "float32", 23))
    output.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {f"{name}-map.svg": fl.model_map(name) for name in ("flux-dev", "flux-schnell", _TINY)}
    made["flux-dev-cheat-sheet.svg"] = fl.cheat_sheet("flux-dev")
    for name, block in product(("flux-dev", _TINY), ("double", "single")):
        made[f"{name}-{block}-block.svg"] = fl.block_diagram(block, name)  # type: ignore[arg-type]
    made[f"{_TINY}-graph.svg"] = fl.graph(fl.build(_TINY), fl.example_inputs(_TINY))
    made |= {f"{name}-gallery.png": gallery(name) for name in (_TINY, "flux-tiny-schnell")}
    made["flux-tiny-relatives.png"] = relatives()
    for file, thing in made.items():
        thing.save(output / file)
        typer.echo(output / file)
    for file, (name, kind) in GRAPHS.items():
        fl.export_onnx(name, output / file, kind)
        typer.echo(output / file)
    return None


@_command
def explain(
    name: Annotated[str, Argument(help="Of a weight, a tensor or a symbol, or a pattern such as 'vec*'.")],
    variant: Annotated[str, Option(help="Whose sizes to give.")] = "flux-dev",
) -> None:
    """Say what a name stands for, with its shape and its line of source."""
    fl.explain(name, variant)


@_command
def summary(
    variant: Annotated[str, Option(help="Which model.")] = "flux-dev",
    depth: Annotated[int, Option(help="Levels of modules to show.")] = 2,
    height: Annotated[int | None, Option(help="Of the picture, in pixels.")] = None,
    width: Annotated[int | None, Option(help="Of the picture, in pixels.")] = None,
) -> None:
    """Print a model's layers, and where its parameters, operations and gigabytes are."""
    tables = [fl.parameter_table(variant), fl.parameter_table(variant, by="kind")]
    tables += [fl.flops(variant, height, width), fl.memory(variant, height, width)]
    if variant not in FLUX2:  # whose tables alone are here
        inputs = fl.example_inputs(variant, height=height, width=width, device="meta")
        tables.insert(0, fl.summary(fl.build(variant, device="meta"), inputs, depth))
    typer.echo("\n\n".join(map(str, tables)))


@_command
def convert(
    variant: Annotated[str, Argument(help="Which model.")],
    output: Annotated[Path, Argument(help="The folder, or for one part the file or folder, to make.")],
    source: Annotated[str | None, Option(help=_SOURCE)] = None,
    to: Annotated[str, Option(help="The layout to write: diffusers, official or comfyui.")] = "diffusers",
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16. [default: as it is]")] = None,
) -> None:
    """Convert weights between official, diffusers' and ComfyUI's layouts, and read them back to check."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; choose float32, bfloat16 or float16")
    convert_model(fl.variant(variant), output, to, source, dtype and getattr(torch, dtype))  # type: ignore[arg-type]
    typer.echo(f"{output}: written, read back, and equal")


@_command
def which(files: Annotated[list[Path], Argument(help="Files, or folders of shards.")]) -> None:
    """Say what a file is: which part of which model, in which layout, quantized how."""
    for file in files:
        for part in which_parts(file):
            typer.echo(f"{file}: {part}")


@_command
def train_tiny(
    run: Annotated[Path, Option(help="Where the training keeps its state; run again, it goes on from there.")],
    output: Annotated[Path | None, Option(help="Where flux-tiny is written when done.")] = None,
    earlier: Annotated[Path | None, Option(help="Folder of a flux-tiny to go on from.")] = None,
    member: Annotated[str | None, Option(help="A relative instead: fill or kontext; or canny, a LoRA on it.")] = None,
    seed: Annotated[int, Option(min=0, help="Of everything drawn.")] = 0,
    smoke: Annotated[bool, Option(help="A few steps of every stage, to see that all of it works.")] = False,
) -> None:
    """Train flux-tiny: tokenizers, autoencoder, text encoders, flow, guidance, fewer steps; then measure it."""
    recipe = replace(SMOKE if smoke else Recipe(), seed=seed)
    if member is None:
        train(run, recipe, output, earlier)
    else:
        train_member(member, run, recipe, output, earlier)
