"""The ``fluxlab`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import fluxlab as fl
from fluxlab.files import replacing
from fluxlab.onnx.export import GRAPHS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # which would swallow "[default: ...]"
    help="FLUX.1, opened.",
)


def _fail(error: Exception) -> typer.Exit:
    typer.secho(f"fluxlab: {error}", err=True, fg="red")
    return typer.Exit(2)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to paint.")],
    output: Annotated[Path, typer.Option(help="The PNG file to write.")] = Path("picture.png"),
    variant: Annotated[str, typer.Option(help="Which model.")] = "flux-tiny-dev",
    source: Annotated[
        str | None,
        typer.Option(help="For a full-size model: its folder on disk, or its hub repository (owner/name)."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Forwards of the model. [default: the variant's]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Distilled guidance. [default: the variant's]")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise: the same seed gives the same picture.")] = 0,
    width: Annotated[int | None, typer.Option(help="In pixels, a multiple of 16.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels, a multiple of 16.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to start from.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How much of --image becomes noise, above 0, at most 1. [default: 0.7]"),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What --true-cfg leads away from.")] = None,
    true_cfg: Annotated[float, typer.Option(help="Above 1: guidance by a second forward a step.")] = 1.0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Paint a prompt."""
    from PIL import Image

    if not output.parent.is_dir():
        raise _fail(ValueError(f"--output {output}: there is no folder {output.parent}"))
    if output.is_dir() or Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise _fail(ValueError(f"--output is {str(output)!r}; give the name of a picture, such as picture.png"))
    try:
        start = Image.open(image) if image else None
        picture = fl.load(variant, source, device)(
            prompt,
            seed=seed,
            num_steps=steps,
            guidance=guidance,
            width=width,
            height=height,
            image=start,
            strength=strength,
            negative_prompt=negative_prompt,
            true_cfg=true_cfg,
        )
        assert isinstance(picture, Image.Image)
        with replacing(output) as temporary:
            picture.save(temporary)
    except (ValueError, OSError) as error:
        raise _fail(error) from error
    typer.echo(f"{output}: {picture.width} x {picture.height} pixels")


@app.command()
def export(
    variant: Annotated[
        str | None,
        typer.Argument(help="Of which model to write an ONNX file. [default: make everything in exported/ again]"),
    ] = None,
    output: Annotated[Path, typer.Option(help="The folder for everything, or the one ONNX file.")] = Path("exported"),
    part: Annotated[
        str, typer.Option(help="transformer, double_block, single_block, encoder, decoder, t5 or clip.")
    ] = "transformer",
    weights: Annotated[bool, typer.Option(help="Write the numbers too, so that the file runs.")] = False,
    source: Annotated[str | None, typer.Option(help="Where a full-size model's weights are.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    opset: Annotated[int, typer.Option(help="17 to 24; below 23, norms and attention are spelled out.")] = 23,
    flat: Annotated[bool, typer.Option(help="Without functions, for tools that know none.")] = False,
) -> None:
    """Write ONNX graphs, maps, diagrams and grids of pictures: all of exported/, or one model's ONNX file."""
    if variant is not None:
        target = output if output.suffix == ".onnx" else output / f"{variant}-{part}.onnx"
        try:
            fl.export_onnx(
                variant,
                target,
                part,  # type: ignore[arg-type]
                weights=weights,
                source=source,
                dtype=dtype,
                opset=opset,
                flat=flat,
            )
        except (ValueError, OSError) as error:
            raise _fail(error) from error
        typer.echo(f"{target}: {target.stat().st_size / 1e3:,.0f} kB")
        return
    from fluxlab.course.gallery import gallery

    output.mkdir(parents=True, exist_ok=True)

    def made(name: str, thing: Any) -> None:
        thing.save(output / name)
        typer.echo(output / name)

    for name in ("flux-dev", "flux-schnell", "flux-tiny-dev"):
        made(f"{name}-map.svg", fl.model_map(name))
    for name in ("flux-dev", "flux-tiny-dev"):
        made(f"{name}-double-block.svg", fl.block_diagram("double", name))
        made(f"{name}-single-block.svg", fl.block_diagram("single", name))
    model = fl.build("flux-tiny-dev")
    made("flux-tiny-dev-graph.svg", fl.graph(model, fl.example_inputs("flux-tiny-dev")))
    for name in ("flux-tiny-dev", "flux-tiny-schnell"):
        made(f"{name}-gallery.png", gallery(name))
    for file, (name, kind) in GRAPHS.items():
        fl.export_onnx(name, output / file, kind)
        typer.echo(output / file)


@app.command()
def explain(
    name: Annotated[str, typer.Argument(help="Of a weight, a tensor or a symbol, or a pattern such as 'vec*'.")],
    variant: Annotated[str, typer.Option(help="Whose sizes to give.")] = "flux-dev",
) -> None:
    """Say what a name stands for, with its shape and its line of source."""
    try:
        fl.explain(name, variant)
    except ValueError as error:
        raise _fail(error) from error


@app.command()
def summary(
    variant: Annotated[str, typer.Option(help="Which model.")] = "flux-dev",
    depth: Annotated[int, typer.Option(help="Levels of modules to show.")] = 2,
    height: Annotated[int | None, typer.Option(help="Of the picture, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the picture, in pixels.")] = None,
) -> None:
    """Print a model's layers, and where its parameters, operations and gigabytes are."""
    try:
        inputs = fl.example_inputs(variant, height=height, width=width, device="meta")
        typer.echo(fl.summary(fl.build(variant, device="meta"), inputs, depth))
        for table in (
            fl.parameter_table(variant),
            fl.parameter_table(variant, by="kind"),
            fl.flops(variant, height, width),
            fl.memory(variant, height, width),
        ):
            typer.echo(f"\n{table}")
    except ValueError as error:
        raise _fail(error) from error


@app.command()
def convert(
    variant: Annotated[str, typer.Argument(help="Which model.")],
    output: Annotated[Path, typer.Argument(help="The folder, or for one part the file or folder, to make.")],
    source: Annotated[
        str | None,
        typer.Option(
            help="A whole model's folder in the other layout; or one part, a transformer or an autoencoder: a file, or "
            "a diffusers folder of shards. Not needed for flux-tiny, to diffusers."
        ),
    ] = None,
    to: Annotated[str, typer.Option(help="The layout to write: diffusers or official.")] = "diffusers",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: as it is]")] = None,
) -> None:
    """Convert weights between the official layout and diffusers', and read them back to check."""
    import torch

    from fluxlab.weights.convert import convert as convert_model
    from fluxlab.weights.convert import convert_part, part_of
    from fluxlab.weights.load import autoencoder_config

    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    try:
        if to not in ("diffusers", "official"):
            raise ValueError(f"to is {to!r}; choose diffusers or official")
        if dtype is not None and dtype not in dtypes:
            raise ValueError(f"dtype is {dtype!r}; choose {', '.join(dtypes)}")
        chosen, kind = fl.variant(variant), dtypes.get(dtype or "")
        if source is not None and Path(source).expanduser().exists() and (part := part_of(source)):
            config = chosen.transformer if part == "transformer" else autoencoder_config(chosen, source)
            convert_part(source, output, config, to, kind)  # type: ignore[arg-type]
        else:
            convert_model(chosen, output, to, source, kind)  # type: ignore[arg-type]
    except (ValueError, OSError) as error:
        raise _fail(error) from error
    typer.echo(f"{output}: written, read back, and equal")


@app.command()
def train_tiny(
    run: Annotated[Path, typer.Option(help="Where the training keeps its state; run again, it goes on from there.")],
    output: Annotated[Path | None, typer.Option(help="Where flux-tiny is written when done.")] = None,
    earlier: Annotated[Path | None, typer.Option(help="Folder of a flux-tiny to go on from.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything drawn.")] = 0,
    smoke: Annotated[bool, typer.Option(help="A few steps of every stage, to see that all of it works.")] = False,
) -> None:
    """Train flux-tiny: tokenizers, autoencoder, text encoders, flow, guidance, fewer steps; then measure it."""
    from dataclasses import replace

    from fluxlab.tiny.recipe import SMOKE, Recipe
    from fluxlab.tiny.train import train

    try:
        train(run, replace(SMOKE if smoke else Recipe(), seed=seed), output, earlier)
    except (ValueError, OSError) as error:
        raise _fail(error) from error


if __name__ == "__main__":
    app()
