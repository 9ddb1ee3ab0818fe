"""What a model of the family is shown beside noise and text: a hole to fill, edges or depth, or other pictures.

It adds to each token's channels, to the tokens, to the text or to what a step gives: nothing inside the transformer
changes.
Opened in chapter 18.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float, Num
from PIL import Image
from torch import Tensor

from fluxlab.pipeline.inputs import FluxInputs
from fluxlab.pipeline.latents import COMPRESSION, PIXELS, ids_device, image_ids, pack, text_ids
from fluxlab.pipeline.pictures import as_seen, stretched


@dataclass(frozen=True, eq=False)
class Shown:
    """Prepared once and given to every forward: more channels for each token of the noise, more tokens after them, or
    more text.

    One picture serves a whole batch.
    """

    channels: Float[Tensor, "one image_tokens more"] | None = None
    tokens: Float[Tensor, "one more_tokens patch"] | None = None
    ids: Num[Tensor, "one more_tokens 3"] | None = None  # the places of these tokens
    text: Float[Tensor, "one more_text context_dim"] | None = None
    weight: float = 1.0  # of the prompt's own text and vector, beside that
    kept: Float[Tensor, "one image_tokens patch"] | None = None  # of a picture, to be kept where painted is 0
    painted: Float[Tensor, "one image_tokens patch"] | None = None
    noise: Float[Tensor, "batch image_tokens patch"] | None = None  # that the loop began with

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: something is given without what belongs to it.
        """
        for names in (("tokens", "ids"), ("kept", "painted", "noise")):
            if len(missing := [name for name in names if getattr(self, name) is None]) not in (0, len(names)):
                raise ValueError(f"of {', '.join(names)}, which go together, {' and '.join(missing)} is missing")

    @classmethod
    def hole(cls, latent: Tensor, mask: Float[Tensor, "one 1 height width"]) -> "Shown":
        """For Fill: the latent of the picture with its hole made gray, and the mask, 1 where there is to be painted.

        The 8x8 pixels of each latent cell become 64 channels, which are then packed as a latent is: 256 a token.
        """
        cells = rearrange(mask, "b 1 (h p) (w q) -> b (p q) h w", p=COMPRESSION, q=COMPRESSION)
        return cls(channels=torch.cat((pack(latent), pack(cells).to(latent)), dim=2))

    @classmethod
    def control(cls, latent: Tensor) -> "Shown":
        """For Canny and Depth: the latent of the picture of edges or of depth."""
        return cls(channels=pack(latent))

    @classmethod
    def reference(cls, latent: Tensor) -> "Shown":
        """For Kontext: the latent of the picture to change, whose places have 1 on the axis that is otherwise 0."""
        height, width = (side * COMPRESSION for side in latent.shape[-2:])
        ids = image_ids(len(latent), height, width, index=1, device=ids_device(latent.device))
        return cls(tokens=pack(latent), ids=ids)

    @classmethod
    def pictures(cls, tokens: Float[Tensor, "pictures patches context_dim"], weights: Sequence[float]) -> "Shown":
        """For Redux: its tokens for each picture, summed with their weights; the prompt has the sum of the weights."""
        each = torch.tensor(weights, dtype=tokens.dtype, device=tokens.device)[:, None, None]
        return cls(text=(each * tokens).sum(0, keepdim=True), weight=float(sum(weights)))

    def around(self, latent: Tensor, mask: Float[Tensor, "one 1 height width"], noise: Tensor) -> "Shown":
        """The same, and outside of the mask the picture itself, put back at every step: holes without Fill.

        A latent cell is painted as the first of its 8x8 pixels says, as in diffusers.
        """
        cells = mask[..., ::COMPRESSION, ::COMPRESSION].expand_as(latent)
        return replace(self, kept=pack(latent), painted=pack(cells), noise=noise)

    def away(self) -> "Shown":
        """The same for a forward that is led away from: without what is told as text."""
        return replace(self, text=None, weight=1.0)

    def mixed(self, img: Tensor, t: float) -> Tensor:
        """The tokens after a step to time ``t``, outside of the mask those of the picture with as much noise."""
        if self.kept is None or self.painted is None or self.noise is None:
            return img
        outside = torch.lerp(self.kept.to(img), self.noise.to(img), t)
        return torch.where(self.painted.to(img.device) > 0, img, outside)

    def beside(self, inputs: FluxInputs) -> FluxInputs:
        """The inputs of a forward with all of it.

        Raises:
            ValueError: there are channels for another number of tokens.
        """
        img, ids = inputs.img, inputs.img_ids
        batch = len(img)
        if self.text is not None:
            txt = torch.cat((self.weight * inputs.txt, self.text.to(inputs.txt).expand(batch, -1, -1)), dim=1)
            places = text_ids(*txt.shape[:2]).to(inputs.txt_ids)
            inputs = replace(inputs, txt=txt, txt_ids=places, y=self.weight * inputs.y)
        if self.channels is not None:
            if self.channels.shape[1] != img.shape[1]:
                said = f"shown has channels for {self.channels.shape[1]} tokens, and img has {img.shape[1]}"
                raise ValueError(f"{said}; prepare it at the size of the picture")
            img = torch.cat((img, self.channels.to(img).expand(batch, -1, -1)), dim=2)
        if self.tokens is not None and self.ids is not None:
            img = torch.cat((img, self.tokens.to(img).expand(batch, -1, -1)), dim=1)
            ids = torch.cat((ids, self.ids.to(ids).expand(batch, -1, -1)), dim=1)
        return replace(inputs, img=img, img_ids=ids)


def as_mask(mask: Image.Image, height: int, width: int) -> Float[Tensor, "1 1 height width"]:
    """A gray picture as 0, to keep, and 1, to paint, from its middle on, ``stretched``; what is transparent is kept.

    Raises:
        ValueError: it is no PIL image of 8 bits a channel, or all of it is to be kept.
    """
    gray = stretched(as_seen(mask, "mask", "black").convert("L"), height, width, "mask")
    painted = torch.frombuffer(bytearray(gray.tobytes()), dtype=torch.uint8).reshape(1, 1, height, width) >= 128
    if not painted.any():
        raise ValueError("mask is black everywhere, so nothing would be painted; make it white where there is to be")
    return painted.float()


def preferred_size(image: Image.Image, side: int) -> tuple[int, int]:
    """Height and width that Kontext knows nearest to a picture's ratio: of its 17 sizes, at about ``side`` squared.

    Source: the published code's list, whose widths and heights lie between 672 and 1568 at a megapixel.
    """
    high = (1568, 1504, 1456, 1392, 1328, 1248, 1184, 1104, 1024)
    wide = (672, 688, 720, 752, 800, 832, 880, 944, 1024)
    sizes = {*zip(high, wide, strict=True), *zip(wide, high, strict=True)}
    height, width = min(sizes, key=lambda size: abs(image.width / image.height - size[1] / size[0]))
    return (max(1, round(height * side / 1024 / PIXELS)) * PIXELS, max(1, round(width * side / 1024 / PIXELS)) * PIXELS)
