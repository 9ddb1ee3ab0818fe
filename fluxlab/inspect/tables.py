"""Where the parameters, the floating point operations and the gigabytes are. Opened in chapter 12.

Everything is counted on the meta device or from the config: no weights are read and no numbers are computed.
Letters: B batch, T text tokens, I image tokens, L = T + I, C hidden size, M hidden width of an MLP.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fluxlab.config import FluxConfig, Variant, variant
from fluxlab.extras import importing
from fluxlab.glossary import named
from fluxlab.inspect.table import Table
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.transformer import build
from fluxlab.pipeline.inputs import FluxInputs, example_inputs
from fluxlab.pipeline.latents import grid

DTYPES = {"float32": 4, "bfloat16": 2, "float8": 1, "4 bits": 0.5}  # bytes of one number


def summary(
    model: nn.Module | str, inputs: FluxInputs | Mapping[str, Tensor] | Tensor | None = None, depth: int = 3
) -> Table:
    """torchinfo's table: each layer, what goes in, what comes out, and its parameters.

    Its column of multiply-adds is left out, since it counts a Linear once for each picture and not once for each
    token; ``flops`` counts them. Works on the meta device at full size.

    Args:
        model: any module, or the name of a variant.
        inputs: what it is called with; by default, for a variant, a usual picture.
        depth: how many levels of modules to show.

    Raises:
        ConfigError: no such variant.
        ValueError: a module without inputs.
    """
    with importing():
        import torchinfo

    if isinstance(model, str):
        inputs = inputs or example_inputs(model, device="meta")
        model = build(model, device="meta")
    if inputs is None:
        raise ValueError("inputs is None; give what the module is called with: FluxInputs, a dict or a tensor")
    given = inputs.kwargs() if isinstance(inputs, FluxInputs) else inputs
    device = next((p.device for p in model.parameters()), None)
    modes = {module: module.training for module in model.modules()}
    try:
        found = torchinfo.summary(model, input_data=given, device=device, depth=depth, verbose=0)
    finally:
        for module, training in modes.items():
            module.training = training
    paths = {id(module): name for name, module in model.named_modules()}
    rows = (
        {
            "layer": "  " * max(info.depth - 1, 0) + (paths.get(info.layer_id, "") or type(model).__name__),
            "kind": info.class_name,
            "input": tuple(info.input_size),
            "output": tuple(info.output_size),
            "parameters": info.num_params,
        }
        for info in found.summary_list
        if info.depth <= depth
    )
    return Table(rows, title=f"{found.total_params:,} parameters")


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


def parameter_table(name: str, by: Literal["part", "kind"] = "part") -> Table:
    """The transformer's parameters: by part, in the order of the forward, or by kind of weight.

    In a single block linear1 and linear2 serve attention and MLP at once; their rows and columns are counted where
    they belong, and the bias of linear2, which both share, with attention.

    Raises:
        ConfigError: no such variant.
        ValueError: ``by`` is something else.
    """
    if by not in ("part", "kind"):
        raise ValueError(f"by is {by!r}; it is 'part' or 'kind'")
    c = variant(name).transformer
    counts: dict[str, int] = {}
    for weight, entry in named(c, "weight").items():
        shape = entry.shape(c)
        number = shape[0] * (shape[1] if len(shape) > 1 else 1)
        parts = {_part(weight, c): number} if by == "part" else kinds_of(weight, number, c)
        for part, share in parts.items():
            counts[part] = counts.get(part, 0) + share
    total = sum(counts.values())
    rows = [
        {by: part, "parameters": number, "share": f"{number / total:.2%}", "GB in bfloat16": round(number * 2 / 1e9, 3)}
        for part, number in counts.items()
    ]
    whole = {by: "all", "parameters": total, "share": "100.00%", "GB in bfloat16": round(total * 2 / 1e9, 3)}
    return Table([*rows, whole], title=f"{name}: parameters by {by}")


def _part(weight: str, c: FluxConfig) -> str:
    head = weight.split(".")[0]
    blocks = {"double_blocks": c.depth, "single_blocks": c.depth_single_blocks}
    return f"{blocks[head]} × {head.removesuffix('s').replace('_', ' ')}" if head in blocks else head


def kinds_of(weight: str, number: int, c: FluxConfig) -> dict[str, int]:
    """Whom a weight serves: attention, MLP, modulation, norms, or what is around the blocks."""
    wide, hidden = c.hidden_size, c.mlp_hidden_dim
    if "mod" in weight:
        return {"modulation": number}
    if "blocks" not in weight:
        return {"input and output": number}
    if "norm" in weight:
        return {"QK-norm": number}
    if "linear1" in weight:
        rows = 3 * wide + hidden
        return {"attention": number * 3 * wide // rows, "MLP": number * hidden // rows}
    if "linear2.weight" in weight:
        return {"attention": wide * wide, "MLP": wide * hidden}
    return {"MLP" if "mlp" in weight else "attention": number}


# ---------------------------------------------------------------------------------------------------------------------
# Operations
# ---------------------------------------------------------------------------------------------------------------------


def flops(
    name: str, height: int | None = None, width: int | None = None, text_tokens: int | None = None, batch: int = 1
) -> Table:
    """Floating point operations of one forward of the transformer, by part: two for each multiply-add.

    Linears cost ``2 * tokens * in * out``, attention ``4 * L^2 * C`` a block; norms, RoPE and the other elementwise
    work are left out, as is usual.

    Args:
        name: of the variant.
        height: of the picture, in pixels; by default the variant's usual one. A partial token counts whole.
        width: likewise.
        text_tokens: by default the variant's usual number.
        batch: pictures at once.

    Raises:
        ConfigError: no such variant.
        ValueError: a side is not positive, or batch below 1.
    """
    chosen = variant(name)
    c = chosen.transformer
    image, text = _tokens(chosen, height, width, text_tokens, batch)
    counts: dict[str, int] = {}
    for weight, entry in named(c, "weight").items():
        if len(shape := entry.shape(c)) == 2:
            cost = 2 * batch * _rows(weight, image, text) * shape[0] * shape[1]
            counts[_work(weight)] = counts.get(_work(weight), 0) + cost
    attention = 4 * batch * (image + text) ** 2 * c.hidden_size
    counts |= {"double blocks, attention": attention * c.depth}
    counts |= {"single blocks, attention": attention * c.depth_single_blocks}
    total = sum(counts.values())
    rows = [{"part": part, "GFLOP": n / 1e9, "share": f"{n / total:.2%}"} for part, n in sorted(counts.items())]
    title = f"{name}: one forward, {image} image and {text} text tokens, batch {batch}"
    return Table([*rows, {"part": "all", "GFLOP": total / 1e9, "share": "100.00%"}], title=title)


def _tokens(chosen: Variant, height: int | None, width: int | None, text: int | None, batch: int) -> tuple[int, int]:
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    rows, columns = grid(*(chosen.size if side is None else side for side in (height, width)))
    return rows * columns, chosen.t5_length if text is None else text


def _rows(weight: str, image: int, text: int) -> int:
    """How many vectors of one picture a Linear is applied to."""
    if "mod" in weight or re.match(r"(time|vector|guidance)_in", weight):
        return 1
    if weight.startswith("single"):
        return image + text
    return text if "txt" in weight else image


def _work(weight: str) -> str:
    if "blocks" not in weight:
        return "input, embedders and last layer"
    return f"{weight.split('_')[0]} blocks, {'modulation' if 'mod' in weight else 'linears'}"


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def memory(
    name: str, height: int | None = None, width: int | None = None, text_tokens: int | None = None, batch: int = 1
) -> Table:
    """Gigabytes (10^9 bytes) of the weights of every part, and of the largest tensors of one forward, by dtype.

    Args:
        name: of the variant.
        height: of the picture, in pixels; by default the variant's usual one. A partial token counts whole.
        width: likewise.
        text_tokens: by default the variant's usual number.
        batch: pictures at once.

    Raises:
        ConfigError: no such variant.
        ValueError: a side is not positive, or batch below 1.
    """
    chosen = variant(name)
    c = chosen.transformer
    image, text = _tokens(chosen, height, width, text_tokens, batch)
    tokens, wide, hidden = batch * (image + text), c.hidden_size, c.mlp_hidden_dim
    numbers = {f"weights: {part}": number for part, number in _weights(chosen)}
    numbers |= {
        "tensor: residual stream": tokens * wide,
        "tensor: q, k and v": 3 * tokens * wide,
        "tensor: a double block's MLP hidden": batch * image * hidden,
        "tensor: a single block's linear1": tokens * (3 * wide + hidden),
        "tensor: attention weights, if ever whole": batch * c.num_heads * (image + text) ** 2,
    }
    rows = (
        {"what": what, "numbers": n, **{k: n * size / 1e9 for k, size in DTYPES.items()}} for what, n in numbers.items()
    )
    return Table(rows, title=f"{name}: GB, {image} image and {text} text tokens, batch {batch}")


def _weights(chosen: Variant) -> Iterator[tuple[str, int]]:
    """Parameters of each part of a whole model."""
    with torch.device("meta"):
        parts: dict[str, Any] = {"transformer": build(chosen.name, device="meta")}
        parts["VAE"] = AutoEncoder(chosen.autoencoder)
        parts["T5 encoder"], parts["CLIP text"] = text_encoders(chosen)
    for part, module in parts.items():
        yield part, sum(p.numel() for p in module.parameters())


def text_encoders(chosen: Variant) -> tuple[Any, Any]:
    """The two text encoders without weights, from their configs: in data/, or as published."""
    with importing():
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from fluxlab.weights.find import data_folder

    if chosen.embedded:
        t5 = T5Config.from_pretrained(str(data_folder() / chosen.t5))
        clip = CLIPTextConfig.from_pretrained(str(data_folder() / chosen.clip))
    else:
        t5 = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
        clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    return T5EncoderModel(t5), CLIPTextModel(clip)
