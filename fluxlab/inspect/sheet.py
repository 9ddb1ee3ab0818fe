"""The whole architecture of a variant on one page, to hang on a wall."""

import re
from collections.abc import Iterator
from html import escape

from fluxlab.config import variant
from fluxlab.inspect.diagram import Diagram, block_diagram, model_map, words
from fluxlab.inspect.tables import flops, parameter_table


def cheat_sheet(name: str = "flux-dev") -> Diagram:
    """Map, both blocks with every shape, the formulas, and where parameters and operations are.

    Args:
        name: of the variant.

    Raises:
        ConfigError: no such variant.
    """
    columns = [("The whole", model_map(name)), ("Double-stream block", block_diagram("double", name))]
    columns += [("Single-stream block", block_diagram("single", name))]
    drawn, tallest = [words(40, 58, f"{name}: the whole model", 34, bold=True)], 0
    for i, (title, diagram) in enumerate(columns):
        [width, height] = map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', diagram.svg)[0])
        placed = f'<svg x="{40 + 650 * i}" y="130" width="{width}" height="{height}">'
        drawn += [words(54 + 650 * i, 112, title, 24, bold=True), re.sub("^<svg[^>]*>", placed, diagram.svg)]
        tallest = max(tallest, height)
    y = 112
    for title, lines in _told(name):
        drawn += [words(2010, y, title, 24, bold=True)]
        drawn += [words(2010, y + 36 + 28 * i, line, 19) for i, line in enumerate(lines)]
        y += 36 + 28 * len(lines) + 30
    height = max(130 + tallest, y) + 30
    return Diagram(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2800 {height}" width="1400" style="max-width: 100%; '
        f'height: auto" font-family="Helvetica, Arial, sans-serif" role="img" aria-label="{escape(name)} on one page">'
        f'<rect width="2800" height="{height}" fill="#ffffff"/>{"".join(drawn)}</svg>'
    )


def _told(name: str) -> Iterator[tuple[str, list[str]]]:
    """What stands beside the drawings."""
    chosen = variant(name)
    c, vae = chosen.transformer, chosen.autoencoder
    guided, and_g = (" + guidance_in(1000 g)", " and g") if c.guidance_embed else ("", "")
    shares, shift = " + ".join(map(str, c.axes_dim)), f"{-vae.shift_factor:+g}".replace("-", "− ").replace("+", "+ ")
    bent = "times bent: t' = e^μ / (e^μ + 1/t − 1)\nμ: 0.5 at 256 image tokens, 1.15 at 4096, linear between"
    formulas = f"""A flow from noise to picture
x_t = (1 − t) x_0 + t ε:  t = 1 is noise ε, t = 0 the latent x_0
velocity v = ε − x_0:  what the model predicts
Euler step: x + (t_next − t) v,  from t = 1 to t = 0
{bent if chosen.time_shift else "times evenly spaced"}
latent x_0 = (z {shift}) × {vae.scale_factor:g},  z the VAE's
packed: 2 × 2 cells of {vae.z_channels} channels, (c h w), make a token of {c.out_channels}

One vector steers every layer
vec = time_in(1000 t){guided} + vector_in(y)
t{and_g} as 128 cosines and 128 sines; each _in is Linear, SiLU, Linear
shift, scale, gate = Linear(SiLU(vec))
(1 + scale) × LayerNorm(x) + shift;  x + gate × what a layer gives
last layer: shift and scale once more, then Linear to {c.out_channels} numbers a token

Where a token is
text at (0, 0, 0), an image token at (0, row, column)
the {c.head_dim} features of a head: {shares}, in pairs of neighbours
pair i of d features turns by position × {c.theta:g}^(−2i/d)
q and k turn, after their RMSNorm; v does not"""
    for section in formulas.split("\n\n"):
        title, *lines = section.splitlines()
        yield title, lines
    parts = parameter_table(name)
    yield "Parameters", [f"{row['part']}: {row['parameters']:,}  ({row['share']})" for row in parts]
    kinds = {row["kind"]: row["share"] for row in parameter_table(name, by="kind")}
    yield "What they are for", [f"{kind}: {kinds[kind]}" for kind in ("MLP", "modulation", "attention")]
    work = list(flops(name))[:-1]
    most = sorted(work, key=lambda row: -float(row["GFLOP"]))[:4]
    yield "Operations of one forward", [f"{row['part']}: {_few(row['GFLOP'])} GFLOP ({row['share']})" for row in most]


def _few(number: float) -> str:
    return f"{number:,.0f}" if number > 100 else f"{number:.3f}"
