"""Pictures in and out: a PIL image as numbers in [-1, 1], and numbers as a picture that says how it was made."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fluxlab.config import VERSION
from fluxlab.pipeline.checks import warn


class Picture(Image.Image):
    """A PIL image whose texts in ``info`` are written when it is saved as PNG; a copy or a crop is a plain one."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """As PIL's ``save``, whose ``pnginfo``, where it is given, takes the place of those texts."""
        texts = PngInfo()
        for key, value in self.info.items():
            if isinstance(key, str) and isinstance(value, str):
                texts.add_text(key, value)
        super().save(fp, format, **({"pnginfo": texts} | params))


def as_pictures(pixels: Float[Tensor, "batch rgb height width"]) -> list[Picture]:
    """Numbers in [-1, 1] to 8 bits, rounded; what is beyond is clamped."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    pictures = [Image.fromarray(picture) for picture in scaled.permute(0, 2, 3, 1).cpu().numpy()]
    for picture in pictures:
        picture.__class__ = Picture
    return pictures  # type: ignore[return-value]


def as_seen(image: Image.Image, name: str = "image", ground: str = "white") -> Image.Image:
    """A picture in RGB as a viewer shows it: turned as its EXIF data say, and laid on white where it is transparent.

    ``name`` says in the error whose argument it is.

    Raises:
        ValueError: it is no PIL image, is empty, has more than 8 bits a channel, cannot be read to its end, or PIL
            cannot bring its mode to RGB.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"{name} is a {type(image).__name__}; give a PIL image: Image.open(path), or fromarray")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{name} has mode {image.mode!r}, more than 8 bits a channel; bring it to 8 bits first")
    if not all(image.size):
        raise ValueError(f"{name} is {image.width} x {image.height} pixels, so there is nothing to see; give another")
    try:
        image.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{name} cannot be read ({error}); open it again, or fetch it again") from error
    with suppress(SyntaxError):  # EXIF data that cannot be read: viewers show the picture as it is
        image = ImageOps.exif_transpose(image)
    try:
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image.convert("RGBA"))
        return image.convert("RGB")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} has mode {image.mode!r} ({error}); bring it to RGB first") from error


def as_pixels(image: Image.Image, height: int, width: int, name: str = "image") -> Float[Tensor, "1 rgb height width"]:
    """An RGB picture as numbers in [-1, 1], in float32 on the CPU, ``stretched``."""
    return torch.from_numpy(np.array(stretched(image, height, width, name))).permute(2, 0, 1)[None].float() / 127.5 - 1


def stretched(image: Image.Image, height: int, width: int, name: str = "image") -> Image.Image:
    """A picture of another size, without regard to its ratio; above 5 % of distortion a warning says it.

    The published pipelines resize so too.
    """
    if not 1 / 1.05 <= width / height * image.height / image.width <= 1.05:
        said = f"{name} is {image.width} x {image.height} pixels (width x height)"
        warn(f"{said} and is stretched to {width} x {height}, another ratio; to avoid it, crop the {name} to that")
    return image.resize((width, height), Image.Resampling.LANCZOS)


def made_by(given: Mapping[str, Any]) -> dict[str, str]:
    """How a picture was made, for its ``info``: each argument that was used, and all of them as one text.

    That text, ``parameters``, is laid out as AUTOMATIC1111's web interface does, which other programs read.
    """
    info = {key: str(value) for key, value in given.items() if value is not None}
    info |= {"sampler": "Euler", "version": f"fluxlab {VERSION}"}
    names = {"steps": "Steps", "sampler": "Sampler", "true_cfg": "CFG scale", "guidance": "Distilled CFG Scale"}
    names |= {"seed": "Seed", "size": "Size", "strength": "Denoising strength", "variant": "Model"}
    names |= {"lora": "LoRA", "speed": "Speed", "tiled": "Tiled VAE", "version": "Version"}
    lines = [info["prompt"]]
    if "negative_prompt" in info:
        lines.append(f"Negative prompt: {info['negative_prompt']}")
    told = [key for key in names if key in info and not isinstance(given.get(key), list)]  # Redux's weights are one
    lines.append(", ".join(f"{names[key]}: {info[key]}" for key in told))
    return info | {"parameters": "\n".join(lines)}
