"""The one table of names: every weight, tensor and symbol of FLUX, what it is, its axes, and its chapter.

Capture takes its names from here, and so do ``fl.explain``, the doc strings in the ONNX graphs and the chapters; the
tables of chapter 12 and flux-tiny's training ask here what a weight is for.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Literal

from fluxlab.config import EMBEDDING_DIM, Flux2Config, FluxConfig

Config = FluxConfig | Flux2Config

Kind = Literal["input", "tensor", "weight", "symbol"]


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    name: str
    kind: Kind
    axes: str  # such as "B I 3C"; empty for a single number
    meaning: str  # one sentence, which stands alone
    chapter: str  # its number
    tokens: str = ""  # of a weight, what it is applied to: I, T or L tokens, or 1 vector for the whole picture
    serves: str = ""  # of a weight: attention, MLP, attention and MLP, QK-norm, modulation, input and output

    def shape(self, config: Config, batch: int = 1, text: int = 512, image: int = 4096) -> tuple[int, ...]:
        """The sizes that the axes stand for, with ``batch`` pictures at once, and of each so many tokens."""
        c = config
        sizes = {"B": batch, "T": text, "I": image, "L": text + image, "C": c.hidden_size, "H": c.num_heads}
        sizes |= {"D": c.head_dim, "M": c.mlp_hidden_dim, "V": getattr(c, "vec_in_dim", 0), "X": c.context_in_dim}
        sizes |= {"P": c.in_channels, "O": c.out_channels, "A": len(c.axes_dim), "E": EMBEDDING_DIM}
        return tuple(_size(axis, sizes) for axis in self.axes.split())


def _size(axis: str, sizes: dict[str, int]) -> int:
    """The value of one axis, such as ``3C+M`` or ``D/2``."""
    terms = (re.fullmatch(r"(\d*)([A-Z]?)(?:/(\d+))?", term).groups() for term in axis.split("+"))  # type: ignore[union-attr]
    return sum(int(times or 1) * sizes.get(letter, 1) // int(divided or 1) for times, letter, divided in terms)


# A heading gives the kind of the names below it, and what they begin with. {i} is the number of a block. A name with
# {stream} stands for two, img and txt; with it go {word}, image or text, and {S}, I or T. A layer among the weights
# stands for its weight and its bias.
_TABLE = """
== input: name | axes | chapter | meaning
img        | B I P | 02 | The noisy latent, packed: one token for each 2x2 patch; it changes from step to step.
img_ids    | B I A | 02 | The place of each image token: index, row, column.
txt        | B T X | 01 | T5's last hidden state: one vector for each token of the prompt, padding too.
txt_ids    | B T A | 02 | The place of each text token: zero on every axis, so text is not rotated.
timesteps  | B     | 03 | The time t of each picture: 1 is noise, 0 is the picture.
y          | B V   | 01 | CLIP's pooled output: the prompt as one vector.
guidance   | B     | 04 | Strength of the distilled guidance: a number the network is told, not CFG.
== tensor: name | axes | chapter | meaning
vec                    | B C           | 04 | Time, guidance and CLIP's vector, summed: it steers every modulation.
pe                     | B 1 L D/2 2 2 | 05 | One rotation matrix for each token and pair of features.
time_in                | B C           | 04 | The time, embedded by a sinusoid and an MLP.
guidance_in            | B C           | 04 | The guidance, embedded by a sinusoid and an MLP.
vector_in              | B C           | 04 | CLIP's vector, brought to the hidden size by an MLP.
img_in                 | B I C         | 02 | The image tokens at the hidden size: the start of the image's stream.
txt_in                 | B T C         | 01 | The text tokens at the hidden size: the start of the text's stream.
final_layer.shift      | B 1 C         | 09 | Added to the normed image tokens before the last Linear.
final_layer.scale      | B 1 C         | 09 | The image tokens are multiplied by 1 plus this before the last Linear.
final_layer.norm_final | B I C         | 09 | The image tokens, normed for the last time.
velocity               | B I O         | 09 | The prediction: noise minus picture, the direction of the path.
clean                  | B I O         | 03 | The picture the model sees coming: img - t * velocity.
== tensor double_blocks.{i}.: name | axes | chapter | meaning
{stream}.input                | B {S} C   | 07 | The {word} residual stream before the block.
{stream}.middle               | B {S} C   | 07 | The {word} residual stream between attention and the MLP.
{stream}.output               | B {S} C   | 07 | The {word} residual stream after the block.
{stream}_mod.shift1           | B 1 C     | 06 | Added to the normed {word} tokens before attention.
{stream}_mod.scale1           | B 1 C     | 06 | The {word} tokens are multiplied by 1 plus this before attention.
{stream}_mod.gate1            | B 1 C     | 06 | How much of attention's output the {word} stream takes in.
{stream}_mod.shift2           | B 1 C     | 06 | Added to the normed {word} tokens before the MLP.
{stream}_mod.scale2           | B 1 C     | 06 | The {word} tokens are multiplied by 1 plus this before the MLP.
{stream}_mod.gate2            | B 1 C     | 06 | How much of the MLP's output the {word} stream takes in.
{stream}_mod.lin              | B 6C      | 06 | The {word} modulation before it is cut into shifts, scales and gates.
{stream}_norm1                | B {S} C   | 07 | The {word} tokens, normed before attention.
{stream}_norm2                | B {S} C   | 07 | The {word} tokens, normed before the MLP.
{stream}_attn.qkv             | B {S} 3C  | 07 | Queries, keys and values of the {word} tokens, side by side.
{stream}_attn.q_raw           | B H {S} D | 07 | Queries of the {word} before their norm.
{stream}_attn.k_raw           | B H {S} D | 07 | Keys of the {word} before their norm.
{stream}_attn.norm.query_norm | B H {S} D | 07 | Queries of the {word}, normed, not yet rotated.
{stream}_attn.norm.key_norm   | B H {S} D | 07 | Keys of the {word}, normed, not yet rotated.
q                             | B H L D   | 07 | Queries of text and image, rotated.
k                             | B H L D   | 07 | Keys of text and image, rotated.
v                             | B H L D   | 07 | Values of text and image, neither normed nor rotated.
attention                     | B H L L   | 14 | Attention weights: each row, a query's, sums to 1.
attended                      | B L C     | 07 | Attention's output for text and image, the heads side by side.
{stream}_attn.proj            | B {S} C   | 07 | Attention's output for the {word}, its heads mixed, not yet gated.
{stream}_mlp.0                | B {S} M   | 07 | The hidden features of the {word} MLP, before GELU.
{stream}_mlp.1                | B {S} M   | 07 | The hidden features of the {word} MLP, after GELU.
{stream}_mlp.2                | B {S} C   | 07 | The {word} MLP's output, not yet gated.
== tensor single_blocks.{i}.: name | axes | chapter | meaning
input            | B L C    | 08 | The one residual stream, text then image, before the block.
output           | B L C    | 08 | The one residual stream, text then image, after the block.
modulation.shift | B 1 C    | 06 | Added to the normed tokens before the block's first Linear.
modulation.scale | B 1 C    | 06 | The normed tokens are multiplied by 1 plus this before the block's first Linear.
modulation.gate  | B 1 C    | 06 | How much of the block's output the residual stream takes in.
modulation.lin   | B 3C     | 06 | The block's modulation before it is cut into shift, scale and gate.
pre_norm         | B L C    | 08 | Text and image tokens, normed before the block's first Linear.
linear1          | B L 3C+M | 08 | Queries, keys, values and the MLP's hidden features before GELU, side by side.
q_raw            | B H L D  | 08 | Queries of text and image before their norm.
k_raw            | B H L D  | 08 | Keys of text and image before their norm.
norm.query_norm  | B H L D  | 08 | Queries of text and image, normed, not yet rotated.
norm.key_norm    | B H L D  | 08 | Keys of text and image, normed, not yet rotated.
q                | B H L D  | 08 | Queries of text and image, rotated.
k                | B H L D  | 08 | Keys of text and image, rotated.
v                | B H L D  | 08 | Values of text and image, neither normed nor rotated.
attention        | B H L L  | 14 | Attention weights: each row, a query's, sums to 1.
attended         | B L C    | 08 | Attention's output for text and image, the heads side by side.
mlp_act          | B L M    | 08 | The MLP's hidden features, after GELU.
linear2          | B L C    | 08 | What attention and MLP make together, not yet gated.
== weight: name | axes | chapter | applied to | serves | meaning
img_in                | C P | 02 | I | input and output | Brings an image token to the hidden size.
txt_in                | C X | 01 | T | input and output | Brings a text token to the hidden size.
time_in.in_layer      | C E | 04 | 1 | input and output | First layer of the time's MLP.
time_in.out_layer     | C C | 04 | 1 | input and output | Second layer of the time's MLP.
guidance_in.in_layer  | C E | 04 | 1 | input and output | First layer of the guidance's MLP; schnell has none.
guidance_in.out_layer | C C | 04 | 1 | input and output | Second layer of the guidance's MLP; schnell has none.
vector_in.in_layer    | C V | 04 | 1 | input and output | First layer of the MLP that takes CLIP's vector.
vector_in.out_layer   | C C | 04 | 1 | input and output | Second layer of the MLP that takes CLIP's vector.
== weight double_blocks.{i}.: name | axes | chapter | applied to | serves | meaning
{stream}_mod.lin                    | 6C C | 06 | 1   | modulation | Makes two shifts, scales and gates for the {word}.
{stream}_attn.qkv                   | 3C C | 07 | {S} | attention  | Makes the {word} queries, keys and values.
{stream}_attn.norm.query_norm.scale | D    | 07 | {S} | QK-norm    | Scales the {word} queries, alike in every head.
{stream}_attn.norm.key_norm.scale   | D    | 07 | {S} | QK-norm    | Scales the {word} keys, alike in every head.
{stream}_attn.proj                  | C C  | 07 | {S} | attention  | Mixes the heads for the {word} stream.
{stream}_mlp.0                      | M C  | 07 | {S} | MLP        | First layer of the {word} MLP.
{stream}_mlp.2                      | C M  | 07 | {S} | MLP        | Second layer of the {word} MLP.
== weight single_blocks.{i}.: name | axes | chapter | applied to | serves | meaning
modulation.lin        | 3C C   | 06 | 1 | modulation        | Makes the block's shift, scale and gate.
linear1               | 3C+M C | 08 | L | attention and MLP | Makes q, k and v, and is the first layer of the MLP.
linear2               | C C+M  | 08 | L | attention and MLP | Mixes the heads, and is the second layer of the MLP.
norm.query_norm.scale | D      | 08 | L | QK-norm           | Scales the queries, alike in every head.
norm.key_norm.scale   | D      | 08 | L | QK-norm           | Scales the keys, alike in every head.
== weight final_layer.: name | axes | chapter | applied to | serves | meaning
linear              | O C  | 09 | I | input and output | Makes the numbers of a token's velocity.
adaLN_modulation.1  | 2C C | 09 | 1 | modulation       | Makes the last shift and scale, in this order.
== symbol: name | axes | chapter | meaning
B        | | 00 | Batch: pictures at once.
T        | T | 01 | Text tokens, padding too.
I        | I | 02 | Image tokens: (height / 16) * (width / 16).
L        | L | 07 | All tokens of the joint sequence, text first: T + I.
C        | C | 00 | The hidden size, the width of a residual stream.
H        | H | 07 | Heads of attention.
D        | D | 07 | Features of one head: C / H.
M        | M | 07 | Hidden features of an MLP.
V        | V | 01 | The width of CLIP's vector.
X        | X | 01 | The width of T5's sequence.
P        | P | 02 | Channels of an image token: those of 2x2 cells of the latent; more where a second picture is shown.
O        | O | 09 | Channels of a token's velocity.
A        | A | 05 | Axes of RoPE: index, row, column.
E        | E | 04 | Numbers of the sinusoid that a time or a guidance becomes.
t        | | 03 | The time on the path: 1 is noise, 0 is the picture.
mu       | | 03 | How far the schedule is bent: linear in the image tokens.
theta    | | 05 | The base of RoPE's frequencies: 10000 in FLUX.1.
omega    | | 05 | A frequency of RoPE: theta^(-2i/d) for pair i of an axis of d features.
shift    | | 06 | What a modulation adds to the normed tokens.
scale    | | 06 | A modulation multiplies the normed tokens by 1 plus this.
gate     | | 06 | What a sub-layer's result is multiplied by before it joins the stream.
latent   | | 10 | The picture as the VAE keeps it: 16 channels, 8 times smaller on a side.
true CFG | | 11 | Guidance by two forwards: away + strength * (towards - away).
"""

# The VAE's weights, by pattern. Their shapes follow from the config, level by level: explain reads them off the model.
AUTOENCODER = {
    r"(encoder|decoder)\.conv_in": "The first convolution: from pixels, or from the latent, to features.",
    r"(encoder|decoder)\.conv_out": "The last convolution: to the latent's mean and log variance, or to pixels.",
    r"(encoder|decoder)\.norm_out": "A GroupNorm before the last convolution.",
    r"(encoder|decoder)\..+\.(block\.\d+|block_[12])\.norm[12]": "A residual block's GroupNorm, before a convolution.",
    r"(encoder|decoder)\..+\.(block\.\d+|block_[12])\.conv[12]": "A convolution of a residual block.",
    r"(encoder|decoder)\..+\.nin_shortcut": "A 1x1 convolution past a block that changes the number of features.",
    r"encoder\.down\.\d+\.downsample\.conv": "A strided convolution that halves the side.",
    r"decoder\.up\.\d+\.upsample\.conv": "The convolution after the side is doubled.",
    r"(encoder|decoder)\.mid\.attn_1\.norm": "A GroupNorm before the VAE's attention.",
    r"(encoder|decoder)\.mid\.attn_1\.[qkv]": "A 1x1 convolution that makes queries, keys or values for attention.",
    r"(encoder|decoder)\.mid\.attn_1\.proj_out": "A 1x1 convolution after the VAE's attention.",
}

# How FLUX.2 differs, name by name and then word by word: it has no CLIP, no bias, and shared modulations.
_SECOND = {
    r"double_blocks\.\{i\}\.(img|txt)_mod\.": r"double_stream_modulation_\1.",
    r"single_blocks\.\{i\}\.modulation\.": "single_stream_modulation.",
}
_SECOND_AXES = {"3C+M": "3C+2M", "M": "2M"}  # gate and value side by side, before SwiGLU
_SECOND_WORDS = {
    "GELU": "SwiGLU",
    "T5's last hidden state": "Three layers of a language model, side by side",
    ", padding too.": ".",
    "zero on every axis, so text is not rotated": "its number on the last axis",
    "index, row, column": "index, row, column, zero",
    "Time, guidance and CLIP's vector, summed": "Time and guidance, summed",
    "schnell has none": "klein has none",
    "The block's modulation": "The single blocks' modulation",
    "Makes the block's shift, scale and gate": "Makes the shift, scale and gate of all single blocks",
    "the block's first Linear": "a single block's first Linear",
    "How much of the block's output": "How much of a single block's output",
    "The width of T5's sequence": "The width of the text's sequence",
    "10000 in FLUX.1": "2000",
    "16 channels": "32 channels",
    "linear in the image tokens": "by the image tokens and the steps",
}

_STREAMS = (("img", "image", "I"), ("txt", "text", "T"))


@cache
def entries() -> tuple[Entry, ...]:
    """The table, one entry for each stream and each of weight and bias; ``{i}`` is still there."""
    found: list[Entry] = []
    for section in _TABLE.split("== ")[1:]:
        heading, *lines = section.splitlines()
        kind, _, head = heading.partition(":")[0].partition(" ")
        for line in lines:
            for stream, word, letter in _STREAMS if "{stream}" in line else (("", "", ""),):
                filled = line.replace("{stream}", stream).replace("{word}", word).replace("{S}", letter)
                name, axes, chapter, *use, meaning = (cell.strip() for cell in filled.split("|"))
                entry = Entry(head + name, kind, axes, meaning, chapter, *use)  # type: ignore[arg-type]
                found += _parts(entry) if kind == "weight" and not name.endswith(".scale") else [entry]
    return tuple(found)


def _parts(layer: Entry) -> list[Entry]:
    """A layer's weight and its bias."""
    weight, bias = (replace(layer, name=f"{layer.name}.{part}") for part in ("weight", "bias"))
    meaning = f"Bias: {layer.meaning[0].lower()}{layer.meaning[1:]}"
    return [weight, replace(bias, axes=layer.axes.partition(" ")[0], meaning=meaning)]


def _seconds() -> list[Entry]:
    """The table of FLUX.2; what all blocks share comes before them."""
    kept = (e for e in entries() if not re.match(r"[yV]$|vector_in|.*\.bias$", e.name))
    groups = groupby(kept, _in_blocks)
    return [entry for _, group in groups for entry in sorted(map(_second, group), key=_in_blocks)]


def _in_blocks(entry: Entry) -> bool:
    return "{i}" in entry.name


def _second(entry: Entry) -> Entry:
    """An entry as it is in FLUX.2."""
    name, axes, meaning = entry.name, entry.axes, entry.meaning
    for pattern, shared in _SECOND.items():
        name = re.sub(pattern, shared, name)
    if re.search(r"mlp\.0|linear1", name):
        axes = " ".join(_SECOND_AXES.get(axis, axis) for axis in axes.split())
    for words, others in _SECOND_WORDS.items():
        meaning = meaning.replace(words, others)
    return replace(entry, name=name, axes=axes, meaning=meaning, chapter="18")


def expand(entry: Entry, config: Config) -> list[Entry]:
    """The entry once for each block that a model of this config has; none for what the config leaves out."""
    if entry.name.startswith("guidance") and not config.guidance_embed:
        return []
    if entry.name.endswith("qkv.bias") and isinstance(config, FluxConfig) and not config.qkv_bias:
        return []
    if not _in_blocks(entry):
        return [entry]
    blocks = config.depth if entry.name.startswith("double") else config.depth_single_blocks
    return [replace(entry, name=entry.name.replace("{i}", str(i))) for i in range(blocks)]


def table_of(config: Config) -> list[Entry]:
    """The table for a model of this config: FLUX.1's or FLUX.2's."""
    return _seconds() if isinstance(config, Flux2Config) else list(entries())


def named(config: Config, *kinds: Kind) -> dict[str, Entry]:
    """Every name of these kinds that a model of this config has, block by block."""
    listed = (entry for entry in table_of(config) if entry.kind in kinds)
    found: dict[str, Entry] = {}
    for _, group in groupby(listed, lambda entry: "{i}" in entry.name and entry.name.split("{i}")[0]):
        copies = [made for entry in group if (made := expand(entry, config))]
        by_block = zip(*copies, strict=True)
        found |= {entry.name: entry for block in by_block for entry in block}
    return found


def serves(weight: str) -> str:
    """What a weight of a ``Flux`` is for, by its name, whatever module it stands in; empty if it is none."""
    name = re.sub(r"(?<=_blocks\.)\d+", "{i}", f".{weight}")
    return next((e.serves for e in entries() if e.kind == "weight" and name.endswith(f".{e.name}")), "")


def autoencoder_entry(name: str) -> Entry | None:
    """What a weight of the VAE is; None if no weight of it has such a name."""
    layer = name.rpartition(".")[0]
    for pattern, meaning in AUTOENCODER.items():
        if re.fullmatch(pattern, layer):
            return next((e for e in _parts(Entry(layer, "weight", "", meaning, "10")) if e.name == name), None)
    return None
