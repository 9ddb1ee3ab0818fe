"""What Canny and Depth are shown, made of a picture: its edges, or how near everything is. Opened in chapter 18."""

from pathlib import Path

import numpy as np
from PIL import Image

from fluxlab.extras import importing
from fluxlab.pipeline.pictures import as_seen

DEPTH_MODEL = "LiheYoung/depth-anything-large-hf"


def edges(image: Image.Image) -> Image.Image:
    """A picture's edges, white on black: OpenCV's Canny at the published thresholds, 50 and 200.

    Raises:
        ValueError: ``image`` is no PIL image of 8 bits a channel.
        ImportError: OpenCV is not installed.

    Source: "A Computational Approach to Edge Detection", Canny 1986.
    """
    with importing():
        import cv2
    return Image.fromarray(cv2.Canny(np.asarray(as_seen(image)), 50, 200)).convert("RGB")


def depth(image: Image.Image, model: str | Path = DEPTH_MODEL) -> Image.Image:
    """How near everything in a picture is: white is nearest. By transformers' pipeline, which scales least to greatest.

    Args:
        image: of any size.
        model: a folder in the Hugging Face format; or the name of a hub repository that is in the local cache, as by
            default the one that FLUX.1-Depth-dev was trained with: nothing is downloaded.

    Raises:
        ValueError: ``image`` is no PIL image of 8 bits a channel; or there is no such model on this disk.
        ImportError: what transformers needs for pictures is not installed.

    Source: "Depth Anything", Yang et al. 2024.
    """
    with importing():
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation, pipeline
    image = as_seen(image)
    try:
        network = AutoModelForDepthEstimation.from_pretrained(model, local_files_only=True, use_safetensors=True)
        processor = AutoImageProcessor.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        told = f"the depth model, {str(model)!r}, is not on this disk ({' '.join(str(error).split())[:200]})"
        advice = f"fetch it with `hf download {model}`, or give control=, a picture of depth"
        raise ValueError(f"{told}; {advice}") from error
    estimate = pipeline("depth-estimation", model=network, image_processor=processor)
    return estimate(image)["depth"].convert("RGB")
