"""The kinds of part of FLUX's transformer as ONNX functions, from a Linear to a whole block. Opened in chapter 13.

Each is written once and called with its weights as named inputs. Norms, rotation and attention are single operators of
opset 23 (RMSNormalization, RotaryEmbedding, Attention), or for older tools spelled out in those of opset 17.

Axes: batch B, text tokens T, image tokens I, tokens L = T + I, heads H, head width D, channels C.
"""

import math

from onnx import TensorProto, ValueInfoProto, helper

from fluxlab.config import EMBEDDING_DIM, FluxConfig
from fluxlab.glossary import Entry
from fluxlab.onnx.text import NEW, SILU, Writer

AXES = {"B": "B", "T": "T", "I": "I", "L": "T+I"}  # of free size
_WIDE = ("img_ids", "txt_ids", "timesteps", "guidance", "pe")  # float32 in a model of any dtype
_HEADS = {  # how the names of a part's tensors begin in the glossary
    "DoubleStreamBlock": "double_blocks.{i}.",
    "SingleStreamBlock": "single_blocks.{i}.",
    "LastLayer": "final_layer.",
}
# of both streams of a double block: what comes before attention, and after it
_BEFORE = """
    {s}_mod.shift1, {s}_mod.scale1, {s}_mod.gate1, {s}_mod.shift2, {s}_mod.scale2, {s}_mod.gate2 = DoubleModulation(
        vec, {s}_mod.lin.weight, {s}_mod.lin.bias)
    {s}_norm1 = LayerNorm({s})
    # The {word} tokens, normed and steered, before attention
    {s}_modulated1 = Modulate({s}_norm1, {s}_mod.shift1, {s}_mod.scale1)
    # Queries, keys and values of the {word}; queries and keys normed
    {s}_attn.q, {s}_attn.k, {s}_attn.v = Project({s}_modulated1, {s}_attn.qkv.weight, {s}_attn.qkv.bias,
        {s}_attn.norm.query_norm.scale, {s}_attn.norm.key_norm.scale)"""
_AFTER = """
    {s}_attn.proj = Linear({s}_attended, {s}_attn.proj.weight, {s}_attn.proj.bias)
    {s}.middle = AddGated({s}, {s}_mod.gate1, {s}_attn.proj)
    {s}_norm2 = LayerNorm({s}.middle)
    # The {word} tokens, normed and steered, before the MLP
    {s}_modulated2 = Modulate({s}_norm2, {s}_mod.shift2, {s}_mod.scale2)
    {s}_mlp.2 = MLP({s}_modulated2, {s}_mlp.0.weight, {s}_mlp.0.bias, {s}_mlp.2.weight, {s}_mlp.2.bias)
    {s}.output = AddGated({s}.middle, {s}_mod.gate2, {s}_mlp.2)"""
# what a block hands on to the next: wires from one source to all of them would hide all else
_HANDED = """next.vec = Identity(vec)  # For the next block: so a picture of the whole is a straight column
    next.pe = Identity(pe)  # For the next block"""


def define_parts(writer: Writer, c: FluxConfig) -> None:
    """Every kind of part that a model of this config has, the smallest first.

    Raises:
        ValueError: the config has no biases of q, k and v, which every function here takes.
    """
    if not c.qkv_bias:
        raise ValueError("qkv_bias is False, and the graph is written for models whose qkv has a bias")
    gelu = 'Gelu(x, approximate="tanh")'
    rms_norm = "y = RMSNormalization(x, scale, axis=-1, epsilon=1e-6)"
    turn = "turned = RotaryEmbedding(wide, cos, sin, interleaved=1)"
    heads = "Attention(q_rotated, k_rotated, v)"
    if writer.opset < 20:
        gelu = f"0.5 * x * (1.0 + Tanh({math.sqrt(2 / math.pi)} * (x + 0.044715 * (x * x * x))))"
    if writer.opset < NEW:
        axes = "[-1]" if writer.opset >= 18 else "axes=[-1]"
        rms_norm = f"""wide = Cast(x, to={TensorProto.FLOAT})
    length = Sqrt(ReduceMean(wide * wide, {axes}) + [1e-6])
    y = CastLike(wide / length, x) * scale"""
        turn = f"""cos_heads = Unsqueeze(cos, [1, 4])
    sin_heads = Unsqueeze(sin, [1, 4])
    first, second = Split(Reshape(wide, [0, 0, 0, -1, 2]), [1, 1], axis=-1)
    both = Concat(first * cos_heads - second * sin_heads, first * sin_heads + second * cos_heads, axis=-1)
    turned = Reshape(both, [0, 0, 0, {c.head_dim}])"""
        scores = f"q_rotated @ Transpose(k_rotated, perm=[0, 1, 3, 2]) * {c.head_dim**-0.5}"
        heads = f"""(
        Softmax({scores}, axis=-1)  # Attention weights: each row, a query's, sums to 1
        @ v)"""

    half = EMBEDDING_DIM // 2
    of_times = [math.exp(-math.log(10_000) * i / half) for i in range(half)]
    of_pairs = tuple(c.theta ** (-2 * i / dim) for dim in c.axes_dim for i in range(dim // 2))
    axis_of_pair = [axis for axis, dim in enumerate(c.axes_dim) for _ in range(dim // 2)]
    text = f"""{SILU}
def Linear(x, weight, bias) -> y:
    "x @ weight^T + bias"
    y = x @ Transpose(weight, perm=[1, 0]) + bias

def GELU(x) -> y:
    "GELU in its tanh form: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))"
    y = {gelu}

def LayerNorm(x) -> y:
    "LayerNorm without weights of its own; the modulation that follows has them"
    ones = Expand(1.0, [{c.hidden_size}])
    y = LayerNormalization(x, ones, axis=-1, epsilon=1e-6)

def RMSNorm(x, scale) -> y:
    "x / sqrt(mean(x^2) + 1e-6) * scale, in float32"
    {rms_norm}

def TimestepEmbedding(t) -> y:
    "cos and sin of 1000 t at {half} frequencies, in float32"
    frequencies = {of_times}
    angles = Unsqueeze(t * [1000.0], [1]) * frequencies
    y = Cast(Concat(Cos(angles), Sin(angles), axis=-1), to={writer.dtype})

def MLPEmbedder(x, in_layer.weight, in_layer.bias, out_layer.weight, out_layer.bias) -> y:
    "Linear, SiLU, Linear"
    hidden = Linear(x, in_layer.weight, in_layer.bias)
    y = Linear(SiLU(hidden), out_layer.weight, out_layer.bias)

def EmbedND(ids) -> pe:
    "One rotation matrix for each token and pair of features: position times frequency"
    axis_of_pair = {axis_of_pair}
    frequencies = {of_pairs}
    angles = Cast(Gather(ids, axis_of_pair, axis=2), to={TensorProto.DOUBLE}) * frequencies
    cos = Unsqueeze(Cast(Cos(angles), to={TensorProto.FLOAT}), [-1])
    sin = Unsqueeze(Cast(Sin(angles), to={TensorProto.FLOAT}), [-1])
    pe = Unsqueeze(Reshape(Concat(cos, Neg(sin), sin, cos, axis=-1), [0, 0, 0, 2, 2]), [1])

def RoPE(x, pe) -> y:
    "Turn each pair of neighbouring features by its token's angle"
    wide = Cast(x, to={TensorProto.FLOAT})
    column = Gather(Squeeze(pe, [1]), 0, axis=4)
    cos = Gather(column, 0, axis=3)
    sin = Gather(column, 1, axis=3)
    {turn}
    y = CastLike(turned, x)

def Attention(q, k, v, pe) -> attended:
    "Rotate q and k; softmax(q k^T / sqrt(D)) v"
    q_rotated = RoPE(q, pe)  # Each query turned by its token's place
    k_rotated = RoPE(k, pe)  # Each key turned by its token's place
    # Each query takes in the values of all tokens, by softmax(q k^T / sqrt(D)): B H L D
    heads = {heads}
    attended = Reshape(  # B L C
        Transpose(heads, perm=[0, 2, 1, 3]),  # The heads of a token side by side: B L H D
        [0, 0, {c.hidden_size}])

def SplitHeads(qkv) -> (q, k, v):
    "B L 3C to q, k and v, each B H L D; packed as (K H D)"
    apart = Transpose(  # 3 B H L D
        Reshape(qkv, [0, 0, 3, {c.num_heads}, {c.head_dim}]),  # Packed as (K H D): three times H heads of D features
        perm=[2, 0, 3, 1, 4])
    q = Gather(apart, 0)  # The first third: queries
    k = Gather(apart, 1)  # The second third: keys
    v = Gather(apart, 2)  # The last third: values

def QKNorm(q_raw, k_raw, norm.query_norm.scale, norm.key_norm.scale) -> (q, k):
    "RMSNorm of queries and keys, each with a scale of its own"
    q = RMSNorm(q_raw, norm.query_norm.scale)
    k = RMSNorm(k_raw, norm.key_norm.scale)

def Project(x, qkv.weight, qkv.bias, norm.query_norm.scale, norm.key_norm.scale) -> (q, k, v):
    "Queries and keys, normed, and values"
    qkv = Linear(x, qkv.weight, qkv.bias)
    q_raw, k_raw, v = SplitHeads(qkv)
    q, k = QKNorm(q_raw, k_raw, norm.query_norm.scale, norm.key_norm.scale)

def MLP(x, 0.weight, 0.bias, 2.weight, 2.bias) -> y:
    "Linear, GELU, Linear"
    hidden = Linear(x, 0.weight, 0.bias)
    y = Linear(GELU(hidden), 2.weight, 2.bias)

def Modulate(x, shift, scale) -> y:
    "x * (1 + scale) + shift"
    y = x * (1.0 + scale) + shift

def AddGated(x, gate, update) -> y:
    "x + gate * update: the residual stream takes in a share"
    y = x + gate * update

def SplitStreams(tokens, txt) -> (text, image):
    "As many tokens as there are of text, and the rest, the image"
    text_tokens = Shape(txt, start=1, end=2)
    text = Slice(tokens, [0], text_tokens, [1])
    image = Slice(tokens, text_tokens, [{2**62}], [1])

def SplitReference(tokens, img) -> (image, reference):
    "As many tokens as there are of the noise, and the rest, of the picture that is shown"
    image_tokens = Shape(img, start=1, end=2)
    image = Slice(tokens, [0], image_tokens, [1])
    reference = Slice(tokens, image_tokens, [{2**62}], [1])

def DoubleModulation(vec, lin.weight, lin.bias) -> (shift1, scale1, gate1, shift2, scale2, gate2):
    "Linear(SiLU(vec)), cut into shift, scale and gate, for attention and for the MLP"
    lin = Linear(  # Six vectors of C features, side by side
        SiLU(vec), lin.weight, lin.bias)  # The vector that steers, activated
    # Shift, scale and gate around attention, then around the MLP
    shift1, scale1, gate1, shift2, scale2, gate2 = Split(
        Unsqueeze(lin, [1]), {[c.hidden_size] * 6}, axis=-1)  # The same for every token: B 1 6C

def SingleModulation(vec, lin.weight, lin.bias) -> (shift, scale, gate):
    "Linear(SiLU(vec)), cut into shift, scale and gate"
    lin = Linear(SiLU(vec), lin.weight, lin.bias)
    shift, scale, gate = Split(Unsqueeze(lin, [1]), {[c.hidden_size] * 3}, axis=-1)

def DoubleStreamBlock(img, txt, vec, pe, *weights) -> (
        img.output, txt.output, next.vec, next.pe):
    "Text and image, each with weights of its own, meet in one attention"
    {_BEFORE.format(s="txt", word="text")} {_BEFORE.format(s="img", word="image")}
    q = Concat(txt_attn.q, img_attn.q, axis=2)
    k = Concat(txt_attn.k, img_attn.k, axis=2)
    v = Concat(txt_attn.v, img_attn.v, axis=2)
    attended = Attention(q, k, v, pe)
    txt_attended, img_attended = SplitStreams(attended, txt)  # Attention's output, text and image apart again
    {_AFTER.format(s="txt", word="text")} {_AFTER.format(s="img", word="image")}
    {_HANDED}

def SingleStreamBlock(x, vec, pe, *weights) -> (output, next.vec, next.pe):
    "Text and image as one sequence; attention and MLP side by side, from one Linear and into one Linear"
    modulation.shift, modulation.scale, modulation.gate = SingleModulation(
        vec, modulation.lin.weight, modulation.lin.bias)
    pre_norm = LayerNorm(x)
    # Normed and steered tokens, which attention and MLP both read
    modulated = Modulate(pre_norm, modulation.shift, modulation.scale)
    linear1 = Linear(modulated, linear1.weight, linear1.bias)
    # What linear1 made for attention, and for the MLP
    qkv, mlp_hidden = Split(linear1, [{3 * c.hidden_size}, {c.mlp_hidden_dim}], axis=-1)
    q_raw, k_raw, v = SplitHeads(qkv)
    q, k = QKNorm(q_raw, k_raw, norm.query_norm.scale, norm.key_norm.scale)
    attended = Attention(q, k, v, pe)
    mlp_act = GELU(mlp_hidden)
    # Attention's output and the MLP's features, for the one linear2
    side_by_side = Concat(attended, mlp_act, axis=-1)
    linear2 = Linear(side_by_side, linear2.weight, linear2.bias)
    output = AddGated(x, modulation.gate, linear2)
    {_HANDED}

def LastLayer(x, vec, *weights) -> velocity:
    "Modulated a last time, features become the velocity of a token's patch; shift comes before scale"
    adaLN_modulation.1 = Linear(  # Shift and scale, side by side
        SiLU(vec), adaLN_modulation.1.weight, adaLN_modulation.1.bias)  # The vector that steers, activated
    shift, scale = Split(
        Unsqueeze(adaLN_modulation.1, [1]), {[c.hidden_size] * 2}, axis=-1)  # The same for every token: B 1 2C
    norm_final = LayerNorm(x)
    modulated = Modulate(norm_final, shift, scale)  # Normed and steered tokens
    # Noise minus picture, the direction of the path, for each number of the token's patch
    velocity = Linear(modulated, linear.weight, linear.bias)
"""
    writer.define(text, _HEADS)


def value(entry: Entry, c: FluxConfig, dtype: int, name: str = "") -> ValueInfoProto:
    """A tensor's dtype, shape and meaning, under its name or another; an axis of free size has a name."""
    kind = TensorProto.FLOAT if entry.name in _WIDE else dtype
    axes = [AXES.get(axis, size) for axis, size in zip(entry.axes.split(), entry.shape(c), strict=True)]
    return helper.make_tensor_value_info(name or entry.name, kind, axes, entry.meaning)
