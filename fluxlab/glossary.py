"""The one table of names: every weight, tensor and symbol of FLUX, what it is, its axes, and its chapter.

Capture takes its names from here, and so do ``fl.explain``, the doc strings in the ONNX graphs and the chapters.
A name may hold ``{i}`` for the number of a block, ``{stream}`` for img or txt, and ``{part}`` for weight or bias; with
the stream go ``{word}`` in the meaning, image or text, and ``{S}`` in the axes, I or T. Axes are the house's letters:
B batch, T text tokens, I image tokens, L = T + I, C hidden size, H heads, D head width, M hidden width of an MLP,
V width of CLIP's vector, X width of T5's sequence, P channels of an image token, O those of the velocity, A RoPE axes,
E numbers of a time's sinusoid.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from fluxlab.config import EMBEDDING_DIM, FluxConfig

Kind = Literal["input", "tensor", "weight", "symbol"]


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    name: str
    kind: Kind
    axes: str  # such as "B I 3C"; empty for a single number
    meaning: str  # one sentence
    chapter: str  # its number

    def shape(self, config: FluxConfig, batch: int = 1, text: int = 512, image: int = 4096) -> tuple[int, ...]:
        """The sizes that the axes stand for.

        Args:
            config: of the model.
            batch: pictures at once.
            text: text tokens.
            image: image tokens.
        """
        c = config
        sizes = {"B": batch, "T": text, "I": image, "L": text + image, "C": c.hidden_size, "H": c.num_heads}
        sizes |= {"D": c.head_dim, "M": c.mlp_hidden_dim, "V": c.vec_in_dim, "X": c.context_in_dim}
        sizes |= {"P": c.in_channels, "O": c.out_channels, "A": len(c.axes_dim), "E": EMBEDDING_DIM}
        return tuple(_size(axis, sizes) for axis in self.axes.split())


def _size(axis: str, sizes: dict[str, int]) -> int:
    """The value of one axis, such as ``3C+M`` or ``D/2``."""
    total = 0
    for term in axis.split("+"):
        times, letter, divided = re.fullmatch(r"(\d*)([A-Z]?)(?:/(\d+))?", term).groups()  # type: ignore[union-attr]
        total += int(times or 1) * sizes.get(letter, 1) // int(divided or 1)
    return total


_ = Entry
_TABLE = (
    # what one forward takes
    _("img", "input", "B I P", "The noisy latent, packed: one token for each 2x2 patch; where the loop stands.", "02"),
    _("img_ids", "input", "B I A", "The place of each image token: index, row, column.", "02"),
    _("txt", "input", "B T X", "T5's last hidden state: one vector for each token of the prompt, padding too.", "01"),
    _("txt_ids", "input", "B T A", "The place of each text token: zero on every axis, so text is not rotated.", "02"),
    _("timesteps", "input", "B", "The time t of each picture: 1 is noise, 0 is the picture.", "03"),
    _("y", "input", "B V", "CLIP's pooled output: the prompt as one vector.", "01"),
    _("guidance", "input", "B", "Strength of the distilled guidance: a number the network is told, not CFG.", "04"),
    # tensors around the blocks
    _("vec", "tensor", "B C", "Time, guidance and CLIP's vector, summed: it steers every modulation.", "04"),
    _("pe", "tensor", "B 1 L D/2 2 2", "One rotation matrix for each token and pair of features.", "05"),
    _("time_in", "tensor", "B C", "The time, embedded by a sinusoid and an MLP.", "04"),
    _("guidance_in", "tensor", "B C", "The guidance, embedded like the time.", "04"),
    _("vector_in", "tensor", "B C", "CLIP's vector, brought to the hidden size.", "04"),
    _(
        "img_in",
        "tensor",
        "B I C",
        "The image tokens at the hidden size: where the image's residual stream starts.",
        "02",
    ),
    _(
        "txt_in",
        "tensor",
        "B T C",
        "The text tokens at the hidden size: where the text's residual stream starts.",
        "01",
    ),
    _("final_layer.shift", "tensor", "B 1 C", "What the last modulation adds.", "09"),
    _("final_layer.scale", "tensor", "B 1 C", "What the last modulation multiplies by, less 1.", "09"),
    _("final_layer.norm_final", "tensor", "B I C", "The image tokens, normed for the last time.", "09"),
    _("velocity", "tensor", "B I O", "The prediction: noise minus picture, the direction of the path.", "09"),
    _("clean", "tensor", "B I O", "The picture the model sees coming: img - t * velocity.", "03"),
    # tensors of a double block
    _("double_blocks.{i}.{stream}.input", "tensor", "B {S} C", "The {word} residual stream before the block.", "07"),
    _("double_blocks.{i}.{stream}.middle", "tensor", "B {S} C", "The {word} stream, attention's share added.", "07"),
    _("double_blocks.{i}.{stream}.output", "tensor", "B {S} C", "The {word} stream, the MLP's share added.", "07"),
    _("double_blocks.{i}.{stream}_mod.shift1", "tensor", "B 1 C", "Added to the {word} tokens before attention.", "06"),
    _("double_blocks.{i}.{stream}_mod.scale1", "tensor", "B 1 C", "Multiplies the {word} tokens there, less 1.", "06"),
    _(
        "double_blocks.{i}.{stream}_mod.gate1",
        "tensor",
        "B 1 C",
        "How much of attention the {word} stream takes.",
        "06",
    ),
    _("double_blocks.{i}.{stream}_mod.shift2", "tensor", "B 1 C", "Added to the {word} tokens before the MLP.", "06"),
    _("double_blocks.{i}.{stream}_mod.scale2", "tensor", "B 1 C", "Multiplies the {word} tokens there, less 1.", "06"),
    _("double_blocks.{i}.{stream}_mod.gate2", "tensor", "B 1 C", "How much of the MLP the {word} stream takes.", "06"),
    _("double_blocks.{i}.{stream}_mod.lin", "tensor", "B 6C", "The {word} modulation before it is cut in six.", "06"),
    _("double_blocks.{i}.{stream}_norm1", "tensor", "B {S} C", "The {word} tokens, normed before attention.", "07"),
    _("double_blocks.{i}.{stream}_norm2", "tensor", "B {S} C", "The {word} tokens, normed before the MLP.", "07"),
    _("double_blocks.{i}.{stream}_attn.qkv", "tensor", "B {S} 3C", "Queries, keys, values of the {word} tokens.", "07"),
    _("double_blocks.{i}.{stream}_attn.q_raw", "tensor", "B H {S} D", "Queries of the {word} before their norm.", "07"),
    _("double_blocks.{i}.{stream}_attn.k_raw", "tensor", "B H {S} D", "Keys of the {word} before their norm.", "07"),
    _(
        "double_blocks.{i}.{stream}_attn.norm.query_norm",
        "tensor",
        "B H {S} D",
        "Queries of the {word}, normed, not yet rotated.",
        "07",
    ),
    _(
        "double_blocks.{i}.{stream}_attn.norm.key_norm",
        "tensor",
        "B H {S} D",
        "Keys of the {word}, normed, not yet rotated.",
        "07",
    ),
    _("double_blocks.{i}.q", "tensor", "B H L D", "Queries of text and image, rotated.", "07"),
    _("double_blocks.{i}.k", "tensor", "B H L D", "Keys of text and image, rotated.", "07"),
    _("double_blocks.{i}.v", "tensor", "B H L D", "Values of text and image, neither normed nor rotated.", "07"),
    _("double_blocks.{i}.attention", "tensor", "B H L L", "Attention weights: each row, a query's, sums to 1.", "14"),
    _("double_blocks.{i}.attended", "tensor", "B L C", "Attention's output, the heads side by side.", "07"),
    _("double_blocks.{i}.{stream}_attn.proj", "tensor", "B {S} C", "Attention's share for the {word}, ungated.", "07"),
    _("double_blocks.{i}.{stream}_mlp.0", "tensor", "B {S} M", "The MLP's hidden features of the {word}, raw.", "07"),
    _("double_blocks.{i}.{stream}_mlp.1", "tensor", "B {S} M", "The same after GELU.", "07"),
    _("double_blocks.{i}.{stream}_mlp.2", "tensor", "B {S} C", "The MLP's share for the {word}, ungated.", "07"),
    # tensors of a single block
    _(
        "single_blocks.{i}.input",
        "tensor",
        "B L C",
        "The one residual stream, text then image, before the block.",
        "08",
    ),
    _("single_blocks.{i}.output", "tensor", "B L C", "That stream after the block.", "08"),
    _("single_blocks.{i}.modulation.shift", "tensor", "B 1 C", "Added to the tokens before the block.", "06"),
    _("single_blocks.{i}.modulation.scale", "tensor", "B 1 C", "Multiplies the tokens before the block, less 1.", "06"),
    _("single_blocks.{i}.modulation.gate", "tensor", "B 1 C", "How much of the block the stream takes.", "06"),
    _("single_blocks.{i}.modulation.lin", "tensor", "B 3C", "The modulation before it is cut in three.", "06"),
    _("single_blocks.{i}.pre_norm", "tensor", "B L C", "The tokens, normed.", "08"),
    _("single_blocks.{i}.linear1", "tensor", "B L 3C+M", "Queries, keys, values and the MLP's way in, in one.", "08"),
    _("single_blocks.{i}.q_raw", "tensor", "B H L D", "Queries before their norm.", "08"),
    _("single_blocks.{i}.k_raw", "tensor", "B H L D", "Keys before their norm.", "08"),
    _("single_blocks.{i}.norm.query_norm", "tensor", "B H L D", "Queries, normed, not yet rotated.", "08"),
    _("single_blocks.{i}.norm.key_norm", "tensor", "B H L D", "Keys, normed, not yet rotated.", "08"),
    _("single_blocks.{i}.q", "tensor", "B H L D", "Queries, rotated.", "08"),
    _("single_blocks.{i}.k", "tensor", "B H L D", "Keys, rotated.", "08"),
    _("single_blocks.{i}.v", "tensor", "B H L D", "Values, neither normed nor rotated.", "08"),
    _("single_blocks.{i}.attention", "tensor", "B H L L", "Attention weights: each row, a query's, sums to 1.", "14"),
    _("single_blocks.{i}.attended", "tensor", "B L C", "Attention's output, the heads side by side.", "08"),
    _("single_blocks.{i}.mlp_act", "tensor", "B L M", "The MLP's hidden features, after GELU.", "08"),
    _("single_blocks.{i}.linear2", "tensor", "B L C", "What attention and MLP make together, ungated.", "08"),
    # weights
    _("img_in.{part}", "weight", "C P", "Brings an image token to the hidden size.", "02"),
    _("txt_in.{part}", "weight", "C X", "Brings a text token to the hidden size.", "01"),
    _("time_in.in_layer.{part}", "weight", "C E", "First half of the time's MLP.", "04"),
    _("time_in.out_layer.{part}", "weight", "C C", "Second half of the time's MLP.", "04"),
    _("guidance_in.in_layer.{part}", "weight", "C E", "First half of the guidance's MLP; schnell has none.", "04"),
    _("guidance_in.out_layer.{part}", "weight", "C C", "Second half of the guidance's MLP; schnell has none.", "04"),
    _("vector_in.in_layer.{part}", "weight", "C V", "First half of the MLP of CLIP's vector.", "04"),
    _("vector_in.out_layer.{part}", "weight", "C C", "Second half of the MLP of CLIP's vector.", "04"),
    _(
        "double_blocks.{i}.{stream}_mod.lin.{part}",
        "weight",
        "6C C",
        "Makes the {word} shifts, scales and gates.",
        "06",
    ),
    _("double_blocks.{i}.{stream}_attn.qkv.{part}", "weight", "3C C", "Makes the {word} queries, keys, values.", "07"),
    _(
        "double_blocks.{i}.{stream}_attn.norm.query_norm.scale",
        "weight",
        "D",
        "Scales the normed {word} queries, feature by feature, alike in every head.",
        "07",
    ),
    _(
        "double_blocks.{i}.{stream}_attn.norm.key_norm.scale",
        "weight",
        "D",
        "Scales the normed {word} keys, feature by feature, alike in every head.",
        "07",
    ),
    _("double_blocks.{i}.{stream}_attn.proj.{part}", "weight", "C C", "Mixes the heads for the {word} stream.", "07"),
    _("double_blocks.{i}.{stream}_mlp.0.{part}", "weight", "M C", "The {word} MLP's way in.", "07"),
    _("double_blocks.{i}.{stream}_mlp.2.{part}", "weight", "C M", "The {word} MLP's way out.", "07"),
    _("single_blocks.{i}.modulation.lin.{part}", "weight", "3C C", "Makes the block's shift, scale and gate.", "06"),
    _("single_blocks.{i}.linear1.{part}", "weight", "3C+M C", "Makes q, k and v, and is the MLP's way in.", "08"),
    _("single_blocks.{i}.linear2.{part}", "weight", "C C+M", "Mixes the heads and is the MLP's way out.", "08"),
    _("single_blocks.{i}.norm.query_norm.scale", "weight", "D", "Scales the normed queries, alike in each head.", "08"),
    _("single_blocks.{i}.norm.key_norm.scale", "weight", "D", "Scales the normed keys, alike in every head.", "08"),
    _("final_layer.linear.{part}", "weight", "O C", "Makes the numbers of a token's velocity.", "09"),
    _(
        "final_layer.adaLN_modulation.1.{part}",
        "weight",
        "2C C",
        "Makes the last shift and scale, in this order.",
        "09",
    ),
    # symbols
    _("B", "symbol", "", "Batch: pictures at once.", "00"),
    _("T", "symbol", "", "Text tokens: 512 in dev, 256 in schnell, padding too.", "01"),
    _("I", "symbol", "", "Image tokens: (height / 16) * (width / 16).", "02"),
    _("L", "symbol", "", "All tokens of the joint sequence, text first: T + I.", "07"),
    _("C", "symbol", "", "The hidden size, the width of a residual stream: 3072.", "00"),
    _("H", "symbol", "", "Heads of attention: 24.", "07"),
    _("D", "symbol", "", "Features of one head: C / H = 128.", "07"),
    _("M", "symbol", "", "Hidden features of an MLP: 4 C = 12288.", "07"),
    _("V", "symbol", "", "The width of CLIP's vector: 768.", "01"),
    _("X", "symbol", "", "The width of T5's sequence: 4096.", "01"),
    _(
        "P",
        "symbol",
        "",
        "Channels of an image token: 2x2 cells of 16 are 64; more where a second picture is shown.",
        "02",
    ),
    _("O", "symbol", "", "Channels of a token's velocity: 64.", "09"),
    _("A", "symbol", "", "Axes of RoPE: 3, which are index, row and column.", "05"),
    _("E", "symbol", "", "Numbers of the sinusoid that a time or a guidance becomes: 256.", "04"),
    _("t", "symbol", "", "The time on the path: 1 is noise, 0 is the picture.", "03"),
    _("mu", "symbol", "", "How far the schedule is bent: linear in the image tokens.", "03"),
    _("theta", "symbol", "", "The base of RoPE's frequencies: 10000.", "05"),
    _("omega", "symbol", "", "A frequency of RoPE: theta^(-2i/d) for pair i of an axis of d features.", "05"),
    _("shift", "symbol", "", "What a modulation adds to the normed tokens.", "06"),
    _("scale", "symbol", "", "What a modulation multiplies them by, less 1.", "06"),
    _("gate", "symbol", "", "What a sub-layer's result is multiplied by before it joins the stream.", "06"),
    _("latent", "symbol", "", "The picture as the VAE keeps it: 16 channels, 8 times smaller on a side.", "10"),
    _("true CFG", "symbol", "", "Guidance by two forwards: away + strength * (towards - away).", "11"),
)
del _

# The VAE's weights, by pattern. Their shapes follow from the config, level by level: explain reads them off the model.
AUTOENCODER = {
    r"(encoder|decoder)\.conv_in": "First convolution: from pixels, or from the latent, to features.",
    r"(encoder|decoder)\.conv_out": "Last convolution: to the latent's mean and log variance, or to pixels.",
    r"(encoder|decoder)\.norm_out": "GroupNorm before the last convolution.",
    r"(encoder\.down|decoder\.up)\.\d+\.block\.\d+\.norm[12]": "GroupNorm of a residual block, before its convolution.",
    r"(encoder\.down|decoder\.up)\.\d+\.block\.\d+\.conv[12]": "Convolution of a residual block.",
    r"(encoder\.down|decoder\.up)\.\d+\.block\.\d+\.nin_shortcut": (
        "1x1 convolution past a block that changes the number of features."
    ),
    r"encoder\.down\.\d+\.downsample\.conv": "Strided convolution that halves the side.",
    r"decoder\.up\.\d+\.upsample\.conv": "Convolution after the side was doubled.",
    r"(encoder|decoder)\.mid\.block_[12]\.norm[12]": "GroupNorm of a residual block at the lowest resolution.",
    r"(encoder|decoder)\.mid\.block_[12]\.conv[12]": "Convolution of a residual block at the lowest resolution.",
    r"(encoder|decoder)\.mid\.attn_1\.norm": "GroupNorm before the VAE's attention.",
    r"(encoder|decoder)\.mid\.attn_1\.[qkv]": "1x1 convolution that makes queries, keys or values of the latent cells.",
    r"(encoder|decoder)\.mid\.attn_1\.proj_out": "1x1 convolution after the VAE's attention.",
}

_STREAMS = {"img": ("image", "I"), "txt": ("text", "T")}


@cache
def entries() -> tuple[Entry, ...]:
    """The table, one entry for each stream and each of weight and bias; ``{i}`` is still there."""
    return tuple(part for line in _TABLE for stream in _by_stream(line) for part in _by_part(stream))


def _by_stream(entry: Entry) -> Iterator[Entry]:
    if "{stream}" not in entry.name:
        yield entry
        return
    for stream, (word, letter) in _STREAMS.items():
        yield replace(
            entry,
            name=entry.name.replace("{stream}", stream),
            axes=entry.axes.replace("{S}", letter),
            meaning=entry.meaning.replace("{word}", word),
        )


def _by_part(entry: Entry) -> Iterator[Entry]:
    if "{part}" not in entry.name:
        yield entry
        return
    yield replace(entry, name=entry.name.replace("{part}", "weight"))
    bias = f"Bias: {entry.meaning[0].lower()}{entry.meaning[1:]}"
    yield replace(entry, name=entry.name.replace("{part}", "bias"), axes=entry.axes.split()[0], meaning=bias)


def expand(entry: Entry, config: FluxConfig) -> list[Entry]:
    """The entry once for each block that a model of this config has; none for what the config leaves out."""
    if entry.name.startswith("guidance") and not config.guidance_embed:
        return []
    if entry.name.endswith("qkv.bias") and not config.qkv_bias:
        return []
    if "{i}" not in entry.name:
        return [entry]
    blocks = config.depth if entry.name.startswith("double") else config.depth_single_blocks
    return [replace(entry, name=entry.name.replace("{i}", str(i))) for i in range(blocks)]


def named(config: FluxConfig, *kinds: Kind) -> dict[str, Entry]:
    """Every name of these kinds that a model of this config has, block by block."""
    listed = [entry for entry in entries() if entry.kind in kinds]
    heads = list(dict.fromkeys(entry.name.split("{i}")[0] for entry in listed))
    found = [each for entry in listed for each in expand(entry, config)]

    def place(entry: Entry) -> tuple[int, int]:
        head, number, _ = (
            re.split(r"(?<=blocks\.)(\d+)", entry.name, maxsplit=1) if "blocks." in entry.name else (entry.name, 0, "")
        )
        return heads.index(head), int(number)

    return {entry.name: entry for entry in sorted(found, key=place)}


def autoencoder_entry(name: str) -> Entry | None:
    """What a weight of the VAE is; None if no weight of it has such a name."""
    layer, _, part = name.rpartition(".")
    for pattern, meaning in AUTOENCODER.items():
        if part in ("weight", "bias") and re.fullmatch(pattern, layer):
            bias = f"Bias: {meaning[0].lower()}{meaning[1:]}"
            return Entry(name, "weight", "", meaning if part == "weight" else bias, "10")
    return None
