"""What sizes a FLUX.1 model has. A config is a frozen dataclass, and a variant is a base plus its differences.

Every field's comment gives its value in FLUX.1 [dev] and why it is there. Nothing in the library
tests a model's name: code asks the config.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf
from numbers import Real
from typing import Any, Literal

from fluxlab.arguments import whole

VERSION = "0.1.0"
EMBEDDING_DIM = 256  # numbers of the sinusoid that a time or a guidance becomes, in every model


class ConfigError(ValueError):
    """A config whose numbers do not fit together, or a variant that does not exist."""


def _check_sizes(config: Any, *names: str, least: int = 1) -> None:
    for name in names:
        whole(name, getattr(config, name), least, error=ConfigError)


class _Widths:
    """What follows from the sizes of either transformer, and what they must be."""

    hidden_size: int
    num_heads: int
    mlp_ratio: float
    axes_dim: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.axes_dim, Iterable):
            raise ConfigError(f"axes_dim is {self.axes_dim!r}; give a number for each axis")
        dims = tuple(whole("axes_dim", dim, error=ConfigError) for dim in self.axes_dim)
        object.__setattr__(self, "axes_dim", dims)
        sizes = ("in_channels", "out_channels", "vec_in_dim", "context_in_dim", "hidden_size", "num_heads", "theta")
        _check_sizes(self, *(name for name in sizes if hasattr(self, name)))
        _check_sizes(self, "depth", "depth_single_blocks", least=0)
        if not (isinstance(self.mlp_ratio, Real) and 1 <= self.mlp_ratio * self.hidden_size < inf):
            raise ConfigError(
                f"mlp_ratio is {self.mlp_ratio!r}; it must be a finite number above 0, at least 1 / width"
            )
        if self.hidden_size % self.num_heads:
            said = f"num_heads is {self.num_heads}, which does not divide hidden_size {self.hidden_size}"
            raise ConfigError(f"{said}; choose a number of heads that does")
        if any(dim % 2 for dim in self.axes_dim):
            raise ConfigError(f"axes_dim is {self.axes_dim}; RoPE turns features in pairs: give positive even numbers")
        if sum(self.axes_dim) != self.head_dim:
            said = f"axes_dim is {self.axes_dim}, which sums to {sum(self.axes_dim)}"
            raise ConfigError(f"{said}; it must sum to the width of a head, hidden_size / num_heads = {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """Features of one head: 128."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden_dim(self) -> int:
        """Hidden width of an MLP: 12288."""
        return int(self.hidden_size * self.mlp_ratio)


@dataclass(frozen=True)
class FluxConfig(_Widths):
    """Sizes of the transformer. The defaults are FLUX.1 [dev]'s."""

    in_channels: int = 64  # 64: a 2x2 patch of a 16-channel latent; more where an edit model is shown a second picture
    out_channels: int = 64  # 64: the velocity of one such patch
    vec_in_dim: int = 768  # 768: the width of CLIP-L's pooled output
    context_in_dim: int = 4096  # 4096: the width of T5-XXL's sequence
    hidden_size: int = 3072  # 3072: the width of both residual streams
    mlp_ratio: float = 4.0  # 4: an MLP's hidden width over the hidden size, 12288
    num_heads: int = 24  # 24: heads of 3072 / 24 = 128 features
    depth: int = 19  # 19: blocks in which text and image have weights of their own
    depth_single_blocks: int = 38  # 38: blocks in which they share one set
    axes_dim: tuple[int, ...] = (16, 56, 56)  # features of a head that RoPE turns by index, row and column; sum to 128
    theta: int = 10_000  # 10000: the base of RoPE's frequencies
    qkv_bias: bool = True  # True: it matters, since QK-norm and RoPE come after it
    guidance_embed: bool = True  # True: guidance was distilled into the network; False in schnell


@dataclass(frozen=True)
class Flux2Config(_Widths):
    """Sizes of FLUX.2's transformer. The defaults are its [dev]'s."""

    in_channels: int = 128  # a 2x2 patch of a latent of 32 channels
    context_in_dim: int = 15360  # three layers of the language model, side by side
    hidden_size: int = 6144
    num_heads: int = 48
    depth: int = 8  # double blocks
    depth_single_blocks: int = 48
    mlp_ratio: float = 3.0
    axes_dim: tuple[int, ...] = (32, 32, 32, 32)  # which picture, row, column, place in the text
    theta: int = 2000
    guidance_embed: bool = True

    @property
    def out_channels(self) -> int:
        """Numbers of a token's velocity: 128."""
        return self.in_channels


@dataclass(frozen=True)
class AutoEncoderConfig:
    """Sizes of the VAE. The defaults are those of every FLUX.1 model."""

    resolution: int = 256  # 256: the side of the pictures it was trained on; it works at any multiple of 8
    in_channels: int = 3  # 3: red, green, blue
    ch: int = 128  # 128: features at full resolution
    out_ch: int = 3  # 3: red, green, blue
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)  # features at each resolution over `ch`; each but the last halves the side
    num_res_blocks: int = 2  # 2: residual blocks at each resolution on the way down; one more on the way up
    z_channels: int = 16  # 16: channels of the latent (SD 1.5 and SDXL have 4)
    scale_factor: float = 0.3611  # 0.3611: one over the standard deviation of the VAE's own latents
    shift_factor: float = 0.1159  # 0.1159: their mean; both bring latents to the unit noise they are mixed with
    norm_groups: int = 32  # 32: groups of each GroupNorm

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult if isinstance(self.ch_mult, Iterable) else ()))
        if not self.ch_mult or not all(isinstance(mult, int) and mult > 0 for mult in self.ch_mult):
            raise ConfigError(f"ch_mult is {self.ch_mult}; give whole numbers of at least 1, one for each resolution")
        _check_sizes(self, "resolution", "in_channels", "ch", "out_ch", "num_res_blocks", "z_channels", "norm_groups")
        numbers = all(isinstance(each, Real) for each in (self.scale_factor, self.shift_factor))
        if not (numbers and 0 < self.scale_factor < inf and -inf < self.shift_factor < inf):
            factors = f"scale_factor is {self.scale_factor!r} and shift_factor {self.shift_factor!r}"
            raise ConfigError(f"{factors}; both must be finite, and scale_factor above 0")
        for mult in (1, *self.ch_mult):
            if self.ch * mult % self.norm_groups:
                features = f"the {self.ch * mult} features of one resolution (ch {self.ch} x {mult})"
                raise ConfigError(f"norm_groups is {self.norm_groups}, which does not divide {features}")


@dataclass(frozen=True)
class Variant:
    """One published model: its parts, where they are found, and how it is usually called. The defaults are [dev]'s."""

    name: str
    transformer: FluxConfig = FluxConfig()
    autoencoder: AutoEncoderConfig = AutoEncoderConfig()
    t5: str = "google/t5-v1_1-xxl"  # the encoder, with its tokenizer: a folder below data/, or its hub name
    clip: str = "openai/clip-vit-large-patch14"  # the same for CLIP's text model
    t5_length: int = 512  # text tokens the prompt is padded to
    clip_length: int = 77  # tokens CLIP reads
    num_steps: int = 50  # the usual number of steps
    guidance: float | None = 3.5  # the usual guidance; None where there is no guidance embedder
    time_shift: bool = True  # whether the schedule bends with the number of image tokens
    repo: str | None = "black-forest-labs/FLUX.1-dev"  # of the official files; None where data/ carries them
    transformer_file: str = "flux1-dev.safetensors"  # the single-file checkpoint of the transformer
    autoencoder_file: str = "ae.safetensors"  # the same for the VAE
    size: int = 1024  # the usual side of a picture, in pixels
    pipeline: str = "FluxPipeline"  # diffusers' class that paints with it
    shown: Literal["nothing", "hole", "edges", "depth", "reference"] = "nothing"  # beside the noise

    def __post_init__(self) -> None:
        if len(self.autoencoder.ch_mult) != 4:
            why = "since FLUX's tokens and sizes are those of a latent 8 times smaller than the picture"
            raise ConfigError(f"ch_mult is {self.autoencoder.ch_mult}; a variant's VAE has 4 resolutions, {why}")

    @property
    def embedded(self) -> bool:
        """Whether the weights are carried in data/."""
        return self.repo is None


_DEV = Variant("flux-dev")


def _relative(base: Variant, title: str, in_channels: int = 64, **differences: Any) -> Variant:
    """A model that differs from a dev in what its image tokens carry and in its defaults."""
    named = {key: vars(base)[key].replace("dev", f"{title.lower()}-dev") for key in ("name", "transformer_file")}
    changed: dict[str, Any] = named | {"repo": base.repo and base.repo.replace("dev", f"{title}-dev")}
    transformer = replace(base.transformer, in_channels=in_channels)
    return replace(base, transformer=transformer, **changed, **differences)


_TINY_DEV = Variant(
    "flux-tiny-dev",
    transformer=FluxConfig(
        vec_in_dim=64,
        context_in_dim=128,
        hidden_size=128,
        num_heads=4,
        depth=2,
        depth_single_blocks=4,
        axes_dim=(4, 14, 14),
    ),
    autoencoder=AutoEncoderConfig(
        resolution=128,
        ch=32,
        ch_mult=(1, 2, 2, 2),
        num_res_blocks=1,
        scale_factor=1.0176,  # both measured from its own latents, when it was trained
        shift_factor=-0.0416,
        norm_groups=8,
    ),
    t5="flux-tiny/t5",
    clip="flux-tiny/clip",
    t5_length=32,
    clip_length=32,
    num_steps=20,
    guidance=4.0,
    repo=None,
    transformer_file="flux-tiny/flux-tiny-dev.safetensors",
    autoencoder_file="flux-tiny/ae.safetensors",
    size=128,
)


def _schnell(base: Variant, **differences: Any) -> Variant:
    """What [schnell] changes: no guidance embedder, no time shift, few steps."""
    named = {key: vars(base)[key] for key in ("name", "repo", "transformer_file")}
    changed: dict[str, Any] = {key: value and value.replace("dev", "schnell") for key, value in named.items()}
    changed |= {"transformer": replace(base.transformer, guidance_embed=False), "num_steps": 4}
    return replace(base, guidance=None, time_shift=False, **changed, **differences)


TINY_FILL = _relative(_TINY_DEV, "Fill", 384, pipeline="FluxFillPipeline", shown="hole")
_WORDS: dict[str, Any] = {"t5": "flux-tiny/kontext/t5", "clip": "flux-tiny/kontext/clip"}  # instructions have others
_EDITS: dict[str, Any] = {"guidance": 2.5, "pipeline": "FluxKontextPipeline", "shown": "reference"}
TINY_KONTEXT = _relative(_TINY_DEV, "Kontext", **_WORDS, **_EDITS)

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _DEV,
        _schnell(_DEV, t5_length=256),
        _relative(_DEV, "Krea", guidance=4.5),
        _relative(_DEV, "Kontext", num_steps=30, **_EDITS),
        # 384 = 64 noisy latent + 64 latent of the masked picture + 256 mask (8x8 pixels of each latent cell, 2x2 cells)
        _relative(_DEV, "Fill", 384, guidance=30.0, pipeline="FluxFillPipeline", shown="hole"),
        # 128 = 64 noisy latent + 64 latent of the edge or depth picture
        _relative(_DEV, "Canny", 128, guidance=30.0, pipeline="FluxControlPipeline", shown="edges"),
        _relative(_DEV, "Depth", 128, guidance=10.0, pipeline="FluxControlPipeline", shown="depth"),
        _TINY_DEV,
        _schnell(_TINY_DEV),
        TINY_FILL,
        TINY_KONTEXT,
    )
}


@dataclass(frozen=True)
class Variant2:
    """A model of FLUX.2, of which the transformer alone is here, to be built and counted. The defaults are [dev]'s."""

    name: str
    transformer: Flux2Config = Flux2Config()
    t5_length: int = 512  # text tokens; they are a language model's, not T5's
    size: int = 1024  # the usual side of a picture, in pixels


FLUX2 = {
    second.name: second
    for second in (
        Variant2("flux2-dev"),
        Variant2("flux2-klein-4b", Flux2Config(128, 7680, 3072, 24, 5, 20, guidance_embed=False)),
        Variant2("flux2-klein-9b", Flux2Config(128, 12288, 4096, 32, 8, 24, guidance_embed=False)),
    )
}


def described(name: str) -> Variant | Variant2:
    """The variant of that name, or one of FLUX.2, which can be built and counted; errors as ``variant``'s."""
    return FLUX2[str(name)] if str(name) in FLUX2 else variant(name)


def variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        ConfigError: there is none; the message gives the nearest names.
    """
    if str(name) in VARIANTS:
        return VARIANTS[str(name)]
    if str(name) in FLUX2:
        raise ConfigError(f"of {name} the transformer alone is here: fl.build({name!r}, device='meta'), and the tables")
    near = difflib.get_close_matches(str(name), VARIANTS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? All of them" if near else "there are"
    raise ConfigError(f"unknown variant {str(name)[:60]!r}; {hint}: {', '.join(VARIANTS)}")
