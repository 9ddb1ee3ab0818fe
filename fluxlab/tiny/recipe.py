"""How long each stage of flux-tiny's training is, and with what settings. Opened in chapter 16."""

from dataclasses import dataclass, fields
from typing import Any

from fluxlab.config import VARIANTS

DEV, SCHNELL = VARIANTS["flux-tiny-dev"], VARIANTS["flux-tiny-schnell"]
TEACHER = "training/teacher.safetensors"  # in the folder of a flux-tiny


@dataclass(frozen=True)
class Recipe:
    """How long each stage is, and with what settings."""

    seed: int = 0
    crops: int = 6_000  # pictures whose 64x64 crops the autoencoder learns from
    autoencoder_steps: int = 2_600
    autoencoder_batch: int = 16
    divergence: float = 4e-3  # weight of the posterior's divergence from unit noise
    pictures: int = 24_000  # of the usual size; a sixteenth of that, or fewer, of each other size
    text_steps: int = 1_600  # text encoders alone, from captions
    captions: int = 128  # in a batch
    flow_steps: int = 8_500  # on from a teacher that had learned for 21,500
    time_mean: float = 1.5  # of the logit-normal times: what is where is settled near the noise, above t = 0.95
    time_spread: float = 2.0
    reading: float = 0.1  # weight of the error in telling, halfway, what each token shows
    guidance_steps: int = 2_500
    pairs: int = 9_000  # of a noise and what flux-tiny-dev paints from it, in the usual size, for flux-tiny-schnell
    schnell_guidance: float = 4.0  # at which they are painted
    reflow_steps: int = 2_500
    fill_pictures: int = 8_000  # each with two holes, for flux-tiny-fill-dev
    fill_steps: int = 9_500
    fill_guidance_steps: int = 1_000
    edits: int = 12_000  # for flux-tiny-kontext-dev
    told_by_caption: float = 0.25  # of them are told by the caption of the picture after
    edit_text_steps: int = 1_200  # in which the encoders learn the tokenizers' new words
    edit_steps: int = 15_900
    edit_guidance_steps: int = 500
    canny_pictures: int = 8_000  # for the LoRA of flux-tiny-canny-dev
    canny_rank: int = 16
    canny_steps: int = 2_500
    previewed: int = 24  # held-out prompts painted at every save, in rows of eight
    measured: int = 256  # held-out prompts
    judged: int = 128  # held-out edits, or half as many boxes and as many halves, for the relatives
    image_tokens: int = 4_096  # in a batch: 64 pictures of 128x128, 16 of 256x256
    usual_share: float = 0.8  # of the batches are of the usual size
    learning_rate: float = 2e-3
    text_learning_rate: float = 1e-3
    autoencoder_learning_rate: float = 1.5e-3
    caption_dropout: float = 0.1
    vector_dropout: float = 0.3  # of CLIP's vector alone, so that T5's sequence is read
    save_every: int = 500
    compile: bool = True


_TWO_STEPS: dict[str, Any] = {field.name: 2 for field in fields(Recipe) if field.name.endswith("_steps")}
SMOKE = Recipe(  # to see that every stage works
    **_TWO_STEPS,
    crops=8,
    autoencoder_batch=2,
    pictures=16,
    captions=5,
    pairs=4,
    canny_pictures=16,
    edits=16,
    fill_pictures=4,
    previewed=2,
    measured=1,
    judged=2,
    image_tokens=256,
    save_every=1,
    compile=False,
)
