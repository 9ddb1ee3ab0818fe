"""Where the parameters, the floating point operations and the gigabytes are. Opened in chapter 12.

Everything is counted on the meta device or from the config: no weights are read and no numbers are computed.
Letters: B batch, T text tokens, I image tokens, L = T + I, C hidden size, M hidden width of an MLP.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from fluxlab.arguments import whole
from fluxlab.config import Variant, Variant2, described
from fluxlab.extras import importing
from fluxlab.glossary import Config, named, table_of
from fluxlab.inspect.looker import eagerly
from fluxlab.inspect.names import unwrapped
from fluxlab.inspect.table import Table
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.transformer import build
from fluxlab.pipeline.inputs import FluxInputs
from fluxlab.pipeline.latents import grid
from fluxlab.pipeline.text import text_encoders

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
        ValueError: a module without inputs, or whose weights stay in their file; what it says of its inputs; ``depth``
            is no whole number from 0.
    """
    with importing():
        import torchinfo

    depth = whole("depth", depth, 0)
    if isinstance(model, str):
        chosen = described(model)
        image, text = _tokens(chosen, None, None, None, 1)
        entries = named(chosen.transformer, "input").values()
        shapes = {entry.name: entry.shape(chosen.transformer, 1, text, image) for entry in entries}
        usual = {each: torch.empty(shape, dtype=torch.float32, device="meta") for each, shape in shapes.items()}
        inputs = usual if inputs is None else inputs
        model = cast(nn.Module, build(model, device="meta"))
    model = unwrapped(model)[""]
    if inputs is None:
        raise ValueError("inputs is None; give what the module is called with: FluxInputs, a dict or a tensor")
    if any("streamed" in vars(module) for module in model.modules()):
        raise ValueError("model keeps its weights in their file; for its layers give the variant's name")
    given = inputs.kwargs() if isinstance(inputs, FluxInputs) else inputs
    device = next((p.device for p in model.parameters()), None)
    modes = {module: module.training for module in model.modules()}
    try:
        with eagerly():
            found = torchinfo.summary(model, input_data=given, device=device, depth=depth, verbose=0)
    except RuntimeError as error:  # which says no more than that it failed
        raise error.__cause__ or error from None
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
    c = described(name).transformer
    counts = parameters_by(c, by)
    total = counts.total()
    rows = (
        {by: part, "parameters": n, "share": f"{n / total:.2%}", "GB in bfloat16": round(n * 2 / 1e9, 3)}
        for part, n in [*counts.items(), ("all", total)]
    )
    return Table(rows, title=f"{name}: parameters by {by}")


def parameters_by(c: Config, by: Literal["part", "kind"]) -> Counter[str]:
    """The numbers of ``parameter_table``, for a transformer of any sizes."""
    blocks = {"double_blocks": f"{c.depth} × double block", "single_blocks": f"{c.depth_single_blocks} × single block"}
    counts = Counter[str]()
    for name, entry in named(c, "weight").items():
        shape = entry.shape(c)
        number, head = math.prod(shape), name.split(".")[0]
        if by == "part":
            counts[blocks.get(head, head)] += number
        elif entry.serves == "attention and MLP":  # the longest side of linear1 and linear2 is shared
            wide = sum(int(times or 1) * c.mlp_hidden_dim for times in re.findall(r"\+(\d*)M", entry.axes))
            mlp = number // max(shape) * wide
            counts.update({"attention": number - mlp, "MLP": mlp})
        else:
            counts[entry.serves] += number
    return counts


def flops(
    name: str, height: int | None = None, width: int | None = None, text_tokens: int | None = None, batch: int = 1
) -> Table:
    """Floating point operations of one forward of the transformer, by part: two for each multiply-add.

    Linears cost ``2 * tokens * in * out``, attention ``4 * L^2 * C`` a block; norms, RoPE and the other elementwise
    work are left out, as is usual.

    The tokens of Kontext's reference are left out: they are counted where ``height`` is twice the picture's.

    Args:
        name: of the variant.
        height: of the picture, in pixels; by default the variant's usual one. A partial token counts whole.
        width: likewise.
        text_tokens: by default the variant's usual number.
        batch: pictures at once.

    Raises:
        ConfigError: no such variant.
        ValueError: a size is not a whole number of at least 1.
    """
    chosen = described(name)
    c = chosen.transformer
    image, text = _tokens(chosen, height, width, text_tokens, batch)
    applied = {"I": image, "T": text, "L": image + text, "1": 1}
    counts = Counter[str]()
    for weight, entry in named(c, "weight").items():
        if len(shape := entry.shape(c)) == 2:
            work = "modulation" if entry.serves == "modulation" else "linears"
            inside = "blocks" in weight or "stream_modulation" in weight
            part = f"{weight[:6]} blocks, {work}" if inside else "input, embedders and last layer"
            counts[part] += 2 * batch * applied[entry.tokens] * math.prod(shape)
    attention = 4 * batch * (image + text) ** 2 * c.hidden_size
    counts |= {"double blocks, attention": attention * c.depth}
    counts |= {"single blocks, attention": attention * c.depth_single_blocks}
    total = counts.total()
    rows = (
        {"part": part, "GFLOP": n / 1e9, "share": f"{n / total:.2%}"}
        for part, n in [*sorted(counts.items()), ("all", total)]
    )
    return Table(rows, title=f"{name}: one forward, {image} image and {text} text tokens, batch {batch}")


def _tokens(
    chosen: Variant | Variant2, height: int | None, width: int | None, text: int | None, batch: int
) -> tuple[int, int]:
    """Numbers of image and text tokens."""
    height, width = (chosen.size if side is None else side for side in (height, width))
    text = chosen.t5_length if text is None else text
    whole("batch", batch)
    return math.prod(grid(height, width)), whole("text_tokens", text)


def memory(
    name: str, height: int | None = None, width: int | None = None, text_tokens: int | None = None, batch: int = 1
) -> Table:
    """Gigabytes (10^9 bytes) of the weights of every part, and of the largest tensors of one forward, by dtype.

    Arguments and errors are those of ``flops``.
    """
    chosen = described(name)
    c = chosen.transformer
    image, text = _tokens(chosen, height, width, text_tokens, batch)
    tokens, wide = batch * (image + text), c.hidden_size
    shapes = {entry.name: entry.shape(c) for entry in table_of(c)}
    parts: dict[str, nn.Module] = {"transformer": build(name, device="meta")}
    if isinstance(chosen, Variant):
        with torch.device("meta"):
            t5, clip = text_encoders(chosen)
            parts |= {"VAE": AutoEncoder(chosen.autoencoder), "T5 encoder": t5, "CLIP text": clip}
    numbers = {f"weights: {part}": sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    numbers |= {
        "tensor: residual stream": tokens * wide,
        "tensor: q, k and v": 3 * tokens * wide,
        "tensor: a double block's MLP hidden": batch * image * shapes["double_blocks.{i}.img_mlp.0"][-1],
        "tensor: a single block's linear1": tokens * shapes["single_blocks.{i}.linear1"][-1],
        "tensor: attention weights, if ever whole": batch * c.num_heads * (image + text) ** 2,
    }
    rows = (
        {"what": what, "numbers": n, **{k: n * size / 1e9 for k, size in DTYPES.items()}} for what, n in numbers.items()
    )
    return Table(rows, title=f"{name}: GB, {image} image and {text} text tokens, batch {batch}")
