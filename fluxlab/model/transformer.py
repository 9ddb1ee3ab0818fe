"""The whole transformer: tokens, time and text in, a velocity out. Opened in chapter 00.

Parameter names are the official checkpoints', so real weights load with no renaming.
Axes: batch B, tokens L = text T + image I, channels C.
"""

from contextlib import suppress
from dataclasses import fields, replace
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from fluxlab.config import EMBEDDING_DIM, FLUX2, ConfigError, FluxConfig, described
from fluxlab.model.blocks import DoubleStreamBlock, LastLayer, SingleStreamBlock
from fluxlab.model.embeddings import MLPEmbedder, timestep_embedding
from fluxlab.model.observe import Observed
from fluxlab.model.rope import EmbedND


class Flux(Observed):
    """The rectified flow transformer of FLUX.1, Black Forest Labs 2024. Sizes come from the config alone."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.pe_embedder = EmbedND(c.theta, c.axes_dim)
        self.img_in = nn.Linear(c.in_channels, c.hidden_size)
        self.time_in = MLPEmbedder(EMBEDDING_DIM, c.hidden_size)
        self.vector_in = MLPEmbedder(c.vec_in_dim, c.hidden_size)
        self.guidance_in = MLPEmbedder(EMBEDDING_DIM, c.hidden_size) if c.guidance_embed else None
        self.txt_in = nn.Linear(c.context_in_dim, c.hidden_size)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(c.hidden_size, c.num_heads, c.mlp_hidden_dim, c.qkv_bias) for _ in range(c.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(c.hidden_size, c.num_heads, c.mlp_hidden_dim) for _ in range(c.depth_single_blocks)
        )
        self.final_layer = LastLayer(c.hidden_size, c.out_channels)

    def forward(
        self,
        img: Float[Tensor, "batch image_tokens in_channels"],
        img_ids: Num[Tensor, "batch image_tokens axes"],
        txt: Float[Tensor, "batch text_tokens context_dim"],
        txt_ids: Num[Tensor, "batch text_tokens axes"],
        timesteps: Float[Tensor, " batch"],
        y: Float[Tensor, "batch vec_dim"],
        guidance: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch image_tokens out_channels"]:
        """Predict the velocity, noise minus data, of each image token.

        Args:
            img: packed noisy latent, in the dtype of the weights, as are ``txt`` and ``y``.
            img_ids: index, row and column of each image token, whole numbers in float32 or integers.
            txt: T5's last hidden state.
            txt_ids: zeros.
            timesteps: t in [0, 1], in float32; 1 is noise.
            y: CLIP's pooled output.
            guidance: strength of the distilled guidance, in float32; for models with a guidance embedder.

        Raises:
            ValueError: a shape, dtype or device does not fit; guidance is missing where the model needs it, or
                given where it has no use; a time is outside [0, 1].
        """
        self._check(img=img, img_ids=img_ids, txt=txt, txt_ids=txt_ids, timesteps=timesteps, y=y, guidance=guidance)

        img, timesteps = self.see("img", img), self.see("timesteps", timesteps)

        # 1. what the picture is to be, as one vector
        vec = self.time_in(timestep_embedding(timesteps).to(img))
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(img))
        vec = self.see("vec", vec + self.vector_in(y))  # B C

        # 2. tokens, and where each of them is
        img = self.img_in(img)  # B I C
        txt = self.txt_in(txt)  # B T C
        pe = self.pe_embedder(torch.cat((txt_ids, img_ids), dim=1))
        pe = self.see("pe", pe.to(img.device))  # B 1 T+I D/2 2 2

        # 3. two streams that meet in attention
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)

        # 4. one stream
        x = torch.cat((txt, img), dim=1)  # B T+I C
        for block in self.single_blocks:
            x = block(x, vec, pe)

        # 5. the text has done its work
        return self.see("velocity", self.final_layer(x[:, txt.shape[1] :], vec))

    def _check(self, **given: Tensor | None) -> None:
        """What does not fit is named before any work is done. The weights are asked nothing: they may be anywhere."""
        c: Any = self.config  # FLUX.2's too
        if c.guidance_embed and given["guidance"] is None:
            raise ValueError(
                "guidance is None, but this model has a guidance embedder; give one strength for each item of the "
                "batch, such as torch.full((batch,), 3.5)"
            )
        if not c.guidance_embed and given.pop("guidance") is not None:
            raise ValueError(
                "guidance was given, but this model has no guidance embedder (guidance_embed=False, as in schnell) "
                "and would ignore it; leave it out"
            )
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        if wrong := [name for name in given if name not in tensors]:
            raise ValueError(f"{wrong[0]} is {given[wrong[0]]!r}; give a tensor")
        img = tensors["img"]
        if not img.is_floating_point():
            raise ValueError(f"img is {img.dtype}; give a floating dtype, that of the weights")
        (batch, image), (_, text) = ((*tensors[name].shape, 0, 0)[:2] for name in ("img", "txt"))
        shapes = {
            "img": (batch, image, c.in_channels),
            "img_ids": (batch, image, len(c.axes_dim)),
            "txt": (batch, text, c.context_in_dim),
            "txt_ids": (batch, text, len(c.axes_dim)),
            "timesteps": (batch,),
            "y": (batch, getattr(c, "vec_in_dim", 0)),
            "guidance": (batch,),
        }
        for name, tensor in tensors.items():
            if tensor.shape != shapes[name]:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; this model, with this img, takes {shapes[name]}"
                )
            if name in ("txt", "y") and (tensor.device, tensor.dtype) != (img.device, img.dtype):
                said = f"{name} is {tensor.dtype} on {tensor.device}, and img is {img.dtype} on {img.device}"
                raise ValueError(f"{said}; give both alike, as the weights are")
            if name == "txt_ids" and tensor.device != tensors["img_ids"].device:
                raise ValueError(f"txt_ids is on {tensor.device}, and img_ids on {tensors['img_ids'].device}")
            if name not in ("img", "txt", "y") and tensor.is_floating_point() and tensor.itemsize < 4:
                raise ValueError(f"{name} is {tensor.dtype}, which rounds it; give float32")
        t = tensors["timesteps"]
        if t.device.type == "cpu" and not torch.compiler.is_compiling():  # where a look at the values costs nothing
            with suppress(RuntimeError):  # nor can those of a fake tensor be looked at
                if wrong := [value for value in t.tolist() if not 0 <= value <= 1]:
                    raise ValueError(f"timesteps has {wrong[0]:g}; t is in [0, 1], and the model multiplies it by 1000")
                if wrong := [value for value in tensors.get("guidance", t).tolist() if not isfinite(value)]:
                    raise ValueError(f"guidance has {wrong[0]}; give finite numbers, such as 3.5")


def build(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A model of a variant's sizes with random weights; on ``"meta"`` it has shapes and takes no memory.

    Args:
        name: of the variant.
        device: where its weights are made.
        dtype: of its weights.
        **overrides: any field of the config, such as ``depth=2, depth_single_blocks=2``.

    Returns:
        A ``Flux``, or a ``Flux2`` for flux2-dev, flux2-klein-4b and flux2-klein-9b.

    Raises:
        ConfigError: no such variant, no such field, or sizes that do not fit together.
    """
    from fluxlab.model.flux2 import Flux2  # made of the same parts as this module

    config: Any = described(name).transformer
    known = [field.name for field in fields(config)]
    if unknown := [field for field in overrides if field not in known]:
        raise ConfigError(f"{unknown[0]} is not a field of {type(config).__name__}; the fields are {', '.join(known)}")
    with torch.device("meta"):
        model = (Flux2 if name in FLUX2 else Flux)(replace(config, **overrides)).to(dtype)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        for module in model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return model
