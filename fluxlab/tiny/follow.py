"""flux-tiny-canny-dev: a LoRA that makes flux-tiny-dev follow edges, in the format of the published ones. Chapter 18.

Every Linear gets two matrices of low rank and a bias, ``img_in`` 64 columns for the latent of the edges, and the norms
scales of their own; flux-tiny-dev itself stays as it is.
"""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.transformer import Flux
from fluxlab.pipeline.control import edges
from fluxlab.pipeline.latents import unpack
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.pipeline.shown import Shown
from fluxlab.pipeline.text import TextEncoders
from fluxlab.tiny.loop import fit
from fluxlab.tiny.measure import judge, mean_of
from fluxlab.tiny.pictures import USUAL, Examples, Pictures, draw, encode, file_of, pixels_of, to_float
from fluxlab.tiny.recipe import DEV, Recipe
from fluxlab.tiny.train_flow import guided_batch
from fluxlab.weights.load import load_weights


class Adapter(nn.Module):
    """What the LoRA file holds, for the layers of a model."""

    def __init__(self, model: nn.Module, rank: int) -> None:
        super().__init__()
        self.linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        self.scales = [name for name, _ in model.named_parameters() if name.endswith("_norm.scale")]
        shapes = {name: model.get_parameter(f"{name}.weight").shape for name in self.linears}
        self.down = nn.ParameterList(torch.randn(rank, columns) / columns**0.5 for _, columns in shapes.values())
        self.up = nn.ParameterList(torch.zeros(rows, rank) for rows, _ in shapes.values())
        self.bias = nn.ParameterList(torch.zeros(rows) for rows, _ in shapes.values())
        self.scale = nn.ParameterList(model.get_parameter(name).detach().clone() for name in self.scales)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that a model has with it."""
        found: dict[str, Tensor] = dict(zip(self.scales, self.scale, strict=True))
        for name, down, up, bias in zip(self.linears, self.down, self.up, self.bias, strict=True):
            linear: Any = model.get_submodule(name)
            found |= {f"{name}.weight": linear.weight + up @ down, f"{name}.bias": linear.bias + bias}
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Under the published names."""
        found = dict(zip(self.scales, self.scale, strict=True))
        for name, down, up, bias in zip(self.linears, self.down, self.up, self.bias, strict=True):
            found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.lora_B.bias": bias}
        return {name: tensor.detach().to(torch.bfloat16) for name, tensor in found.items()}


class EdgedPictures(Pictures):
    """Batches of what ``encode_edges`` wrote."""

    kind, sizes = "canny", (USUAL,)

    def shown(self, chosen: dict[str, Tensor]) -> Shown:
        """The edges of each picture."""
        return Shown.control(unpack(chosen["edges"], *USUAL))


def encode_edges(run: Path, recipe: Recipe, autoencoder: AutoEncoder, text: TextEncoders) -> None:
    """The latents of pictures and of their edges, and their captions."""
    drawn = draw(recipe.canny_pictures, *USUAL, (recipe.seed + 5, *USUAL))

    def some(number: int) -> Examples:
        batch = list(islice(drawn, number))
        lines = np.stack([np.asarray(edges(Image.fromarray(picture.pixels))) for picture in batch])
        pictures = {"latents": pixels_of(batch), "edges": torch.from_numpy(lines).permute(0, 3, 1, 2)}
        return {name: to_float(each) for name, each in pictures.items()}, {}, [picture.caption for picture in batch]

    encode(file_of(run, "canny"), recipe.canny_pictures, some, autoencoder, text)


def train_canny(run: Path, recipe: Recipe, autoencoder: AutoEncoder, text: TextEncoders, earlier: Path) -> Adapter:
    """The LoRA, by the flow's own loss, at guidances from 1 to 8."""
    encode_edges(run, recipe, autoencoder, text)
    torch.manual_seed(recipe.seed)
    with torch.device("meta"):
        model = Flux(DEV.transformer)
    load_weights(model, earlier / Path(DEV.transformer_file).name, dtype=torch.float32)
    channels = DEV.transformer.in_channels
    model.img_in.weight = nn.Parameter(F.pad(model.img_in.weight, (0, channels)), requires_grad=False)
    wide = Flux(replace(DEV.transformer, in_channels=2 * channels))  # for its sizes
    adapter, pictures = Adapter(model, recipe.canny_rank), EdgedPictures(run, recipe)

    def loss(generator: torch.Generator) -> Tensor:
        _, inputs, velocity = guided_batch(pictures, text, generator)
        found = functional_call(wide, adapter.weights(model), (), inputs.kwargs())
        return F.mse_loss(found.float(), velocity)

    fit("canny", adapter, loss, recipe.canny_steps, recipe.text_learning_rate, run, recipe)
    return adapter


def measure_canny(pipe: Pipeline, number: int = 128, **options: Any) -> list[dict[str, Any]]:
    """Of held-out pictures' edges and captions: the overlap of what is painted with the things, and right colours."""
    rows = []
    for seed, picture in enumerate(draw(number, *USUAL, 3, held_out=True)):
        control = edges(Image.fromarray(picture.pixels))
        painted: Any = pipe(picture.scene.caption(), control=control, seed=seed, progress=False, **options)
        right = judge(np.asarray(painted), picture.scene)
        overlap = _overlap(np.asarray(painted), picture.masks.max(axis=0) > 0.5)
        rows.append({"overlap": overlap, "colour": right["colour"], "all": right["all"]})
    return [{"number": number, **options} | mean_of(rows)]


def _overlap(pixels: NDArray[np.uint8], things: NDArray[np.bool_]) -> float:
    """Intersection over union of what differs from the background with the things that the edges are of."""
    behind = np.median(pixels[~things].astype(float), axis=0)
    found = np.linalg.norm(pixels - behind, axis=-1) > 60
    return float((found & things).sum() / (found | things).sum())
