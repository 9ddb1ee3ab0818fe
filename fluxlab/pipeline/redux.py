"""Redux: pictures told to the transformer as if they were text, by SigLIP and two Linears. Opened in chapter 18."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fluxlab.extras import importing
from fluxlab.files import WeightsError, at, read_json
from fluxlab.pipeline.checks import finite
from fluxlab.pipeline.pictures import as_seen
from fluxlab.weights.load import load_weights

if TYPE_CHECKING:
    from transformers import SiglipVisionModel


class ReduxEmbedder(nn.Module):
    """Features of a picture's patches as tokens of T5's width, with the published names."""

    def __init__(self, width: int = 1152, context_dim: int = 4096) -> None:
        super().__init__()
        self.redux_up = nn.Linear(width, 3 * context_dim)
        self.redux_down = nn.Linear(3 * context_dim, context_dim)

    def forward(self, features: Float[Tensor, "batch patches width"]) -> Float[Tensor, "batch patches context_dim"]:
        """One token for each patch."""
        return self.redux_down(F.silu(self.redux_up(features)))


class Redux(nn.Module):
    """SigLIP, the embedder behind it, and how a picture is brought to SigLIP's size: 729 tokens from each picture."""

    def __init__(self, encoder: SiglipVisionModel, embedder: ReduxEmbedder, processor: Any) -> None:
        super().__init__()
        self.encoder, self.embedder, self.processor = encoder, embedder, processor

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = torch.bfloat16,
        context_dim: int = 4096,
    ) -> Redux:
        """From the published repository's folder, or as diffusers writes it, for a transformer of this ``context_dim``.

        In it are ``image_encoder`` and ``feature_extractor`` in the Hugging Face format, and
        ``flux1-redux-dev.safetensors`` or ``image_embedder``.

        Raises:
            WeightsError: a part is missing, or not what it should be.
        """
        with importing():
            from transformers import AutoImageProcessor, SiglipVisionConfig, SiglipVisionModel
        folder = at(folder)
        official = folder / "flux1-redux-dev.safetensors"
        weights = official if official.exists() else folder / "image_embedder"
        encoder_folder, processor_folder = folder / "image_encoder", folder / "feature_extractor"
        if missing := [str(path) for path in (weights, encoder_folder, processor_folder) if not path.exists()]:
            said = f"not found: {', '.join(missing)}"
            raise WeightsError(f"{said}; give the folder of FLUX.1-Redux-dev, whose parts they are")
        told = read_json(encoder_folder / "config.json")
        try:
            config: Any = SiglipVisionConfig.from_dict(told.get("vision_config", told))
            processor: Any = AutoImageProcessor.from_pretrained(processor_folder)
        except (OSError, ValueError, TypeError) as error:
            raise WeightsError(f"{folder}: its SigLIP cannot be read ({error})") from error
        with torch.device("meta"):
            encoder, embedder = SiglipVisionModel(config), ReduxEmbedder(config.hidden_size, context_dim)
        load_weights(encoder, encoder_folder, device, dtype)
        return cls(encoder, load_weights(embedder, weights, device, dtype), processor)

    @torch.no_grad()
    def forward(
        self, images: Sequence[Image.Image], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "pictures patches context_dim"]:
        """The tokens of each picture, where and in the dtype that the parts run in.

        Raises:
            ValueError: one is no PIL image of 8 bits a channel; or what SigLIP gives is not finite.
        """
        pixels = self.processor([as_seen(image) for image in images], return_tensors="pt").pixel_values
        features = self.encoder(pixel_values=pixels.to(device, dtype)).last_hidden_state
        return finite(self.embedder(features), "what Redux makes of image")
