"""How flux-tiny is made: one command, in stages, from a seed. Opened in chapter 16.

    tokenizers   from the picture world's captions
    autoencoder  pictures to latents and back; then its scale and shift are measured
    latents      the pictures that the transformer learns from, encoded once
    flow         rectified flow, with the text encoders, and captions dropped so that CFG works: the teacher
    guidance     flux-tiny-dev: the teacher's CFG output at any guidance, in one forward
    publish      the weights, in the official names, into data/

Every stage saves its state as it goes and, run again, continues where it stopped: each step draws its random numbers
from the seed and the step alone.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from fluxlab.config import VARIANTS
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.transformer import Flux
from fluxlab.pipeline.inputs import FluxInputs
from fluxlab.pipeline.latents import image_ids, noise, pack, text_ids, unpack
from fluxlab.pipeline.sampling import denoise
from fluxlab.pipeline.schedule import schedule
from fluxlab.pipeline.text import TextEncoders
from fluxlab.tiny.tokenizers import train_tokenizers
from fluxlab.tiny.world import PICTURE_SIZES, random_picture
from fluxlab.weights.convert import factors
from fluxlab.weights.files import Checkpoint, read_tensors, write_tensors, write_text

DEV, SCHNELL = VARIANTS["flux-tiny-dev"], VARIANTS["flux-tiny-schnell"]


@dataclass(frozen=True)
class Recipe:
    """How long each stage is, and with what."""

    seed: int = 0
    crops: int = 6_000  # pictures whose 64x64 crops the autoencoder learns from
    autoencoder_steps: int = 2_600
    autoencoder_batch: int = 16
    divergence: float = 4e-3  # weight of the posterior's divergence from unit noise
    pictures: int = 24_000  # of the usual size; a sixteenth of that, or fewer, for each other size
    flow_steps: int = 14_000
    guidance_steps: int = 1_500
    image_tokens: int = 4_096  # in a batch: 64 pictures of 128x128, 16 of 256x256
    usual_share: float = 0.8  # of the batches are of the usual size
    learning_rate: float = 2.5e-3
    autoencoder_learning_rate: float = 1.5e-3
    caption_dropout: float = 0.1
    save_every: int = 500
    compile: bool = True


SMOKE = Recipe(
    crops=8,
    autoencoder_steps=2,
    autoencoder_batch=2,
    pictures=16,
    flow_steps=2,
    guidance_steps=2,
    image_tokens=256,
    save_every=1,
    compile=False,
)


def train(run: Path, recipe: Recipe | None = None, output: Path | None = None) -> None:
    """Run every stage that is not finished in the folder ``run``; write flux-tiny into ``output`` if given."""
    recipe = recipe or Recipe()
    run.mkdir(parents=True, exist_ok=True)
    _same_recipe(run / "recipe.json", recipe)
    if not (run / "t5/spiece.model").exists() or not (run / "clip/tokenizer.json").exists():
        train_tokenizers(run, recipe.seed)
    autoencoder = train_autoencoder(run, recipe)
    encode_pictures(run, recipe, autoencoder)
    teacher, text = train_flow(run, recipe, autoencoder)
    student = distil_guidance(run, recipe, autoencoder, teacher, text)
    if output is not None:
        publish(run, output, autoencoder, student, text)


def _same_recipe(path: Path, recipe: Recipe) -> None:
    """A run goes on as it began: what another recipe left there is not mixed in."""
    given = asdict(recipe)
    if path.exists() and (before := json.loads(path.read_text())) != given:
        changed = {name: (before.get(name), value) for name, value in given.items() if before.get(name) != value}
        raise ValueError(f"{path.parent} was begun with another recipe (then, now): {changed}; name another folder")
    write_text(json.dumps(given, indent=2) + "\n", path)


# ---------------------------------------------------------------------------------------------------------------------
# The loop that every stage shares
# ---------------------------------------------------------------------------------------------------------------------


def fit(
    stage: str,
    module: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    steps: int,
    run: Path,
    recipe: Recipe,
    preview: Callable[[int], None] | None = None,
) -> None:
    """Train a module, resuming what ``run`` holds of this stage; leave it with its averaged weights.

    Muon for the matrices of the blocks (modulation left out) and AdamW for all else, a learning rate that warms up
    and falls as a cosine, gradients cut at norm 1, and an exponential moving average of the weights, whose memory
    grows with the steps.

    Source: "Muon is Scalable for LLM Training", Liu et al. 2025.
    """
    path, record = run / f"{stage}.state.safetensors", run / f"{stage}.jsonl"
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    parameters: list[Tensor] = list(named.values())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "_blocks" in name and "mod" not in name]
    others = [p for p in parameters if not any(p is matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    average = [p.detach().clone() for p in parameters]
    start = _restore(path, parameters, average, optimizers) if path.exists() else 0
    losses: list[float] = []
    began = time.monotonic()
    module.train()
    with tqdm(range(start, steps), desc=stage, initial=start, total=steps, unit="step", mininterval=10) as bar:
        for step in bar:
            warm, done = min(1.0, (step + 1) / (0.05 * steps + 1)), step / steps
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * done))
            generator = torch.Generator("cpu").manual_seed(recipe.seed * 1_000_003 + step)
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                value = loss(generator)
            module.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.999, (1 + step) / (10 + step)))
            losses.append(value.item())
            if (step + 1) % min(50, recipe.save_every) == 0:
                mean = sum(losses) / len(losses)
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                with record.open("a") as file:
                    entry = {"step": step + 1, "loss": round(mean, 6), "seconds": round(time.monotonic() - began, 1)}
                    file.write(json.dumps(entry) + "\n")
                losses.clear()
            if (step + 1) % recipe.save_every == 0 or step + 1 == steps:
                _save(path, step + 1, parameters, average, optimizers)
                if preview is not None:
                    with _averaged(parameters, average):
                        module.eval()
                        preview(step + 1)
                        module.train()
    with torch.no_grad():
        for p, mean_p in zip(parameters, average, strict=True):
            p.copy_(mean_p)
    module.eval()


@contextmanager
def _averaged(parameters: list[Tensor], average: list[Tensor]) -> Iterator[None]:
    """The averaged weights in place of the current ones, for a while."""
    current = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, current)


def _save(
    path: Path, step: int, parameters: list[Tensor], average: list[Tensor], optimizers: list[torch.optim.Optimizer]
) -> None:
    tensors: dict[str, Tensor] = {"step": torch.tensor(step)}
    for i, p in enumerate(parameters):
        tensors |= {f"{i}.value": p, f"{i}.average": average[i]}
        tensors |= {f"{i}.{key}": value for each in optimizers for key, value in each.state.get(p, {}).items()}
    write_tensors(tensors, path)


def _restore(
    path: Path, parameters: list[Tensor], average: list[Tensor], optimizers: list[torch.optim.Optimizer]
) -> int:
    saved = Checkpoint(path)
    owner = {id(p): each for each in optimizers for group in each.param_groups for p in group["params"]}
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.copy_(saved[f"{i}.value"])
            average[i].copy_(saved[f"{i}.average"])
            state = {key: saved[f"{i}.{key}"] for key in _STATE if f"{i}.{key}" in saved.entries}
            # in the weight's memory layout, as it was
            owner[id(p)].state[p] = {k: torch.empty_like(p).copy_(v) if v.ndim else v for k, v in state.items()}
    return int(saved["step"])


_STATE = ("exp_avg", "exp_avg_sq", "step", "momentum_buffer")  # what AdamW and Muon keep of a weight


def _compiled(recipe: Recipe, module: Any) -> Any:
    return torch.compile(module, dynamic=False) if recipe.compile else module


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder
# ---------------------------------------------------------------------------------------------------------------------


def train_autoencoder(run: Path, recipe: Recipe) -> AutoEncoder:
    """Reconstruct 64x64 crops: absolute and squared error, and a pull of the posterior towards unit noise.

    The pull makes latents that bear the errors of a flow; that a latent at half the size is the picture at half the
    size makes them smooth, and so easier to learn.

    Source: "Auto-Encoding Variational Bayes", Kingma and Welling 2013; "EQ-VAE", Kouzelis et al. 2025.
    """
    torch.manual_seed(recipe.seed)
    autoencoder = AutoEncoder(DEV.autoencoder)
    nn.Module.to(autoencoder, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():  # start with little posterior noise: heavy noise makes it learn slowly
        bias: Tensor = autoencoder.encoder.state_dict()["conv_out.bias"]
        bias[DEV.autoencoder.z_channels :] = -3.0
    pixels = _cached(
        run / "crops.safetensors",
        lambda: {"pixels": torch.stack([p for p, _ in _draw(recipe.crops, 128, 128, recipe.seed + 1)])},
    )["pixels"]

    def error(latent: Tensor, crops: Tensor) -> Tensor:
        decoded = autoencoder.decoder(latent).float()
        return F.l1_loss(decoded, crops) + F.mse_loss(decoded, crops)

    def reconstruct(crops: Tensor, epsilon: Tensor) -> Tensor:
        mean, log_variance = autoencoder.encoder(crops).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 4)
        latent = mean + (0.5 * log_variance).exp() * epsilon
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        smaller = error(F.avg_pool2d(latent, 2), F.avg_pool2d(crops, 2))
        return error(latent, crops) + 0.5 * smaller + recipe.divergence * divergence

    def loss(generator: torch.Generator) -> Tensor:
        n = recipe.autoencoder_batch
        rows = torch.randint(len(pixels), (n,), generator=generator).tolist()
        corners = torch.randint(65, (n, 2), generator=generator).tolist()
        crops = torch.stack([pixels[i, :, y : y + 64, x : x + 64] for i, (y, x) in zip(rows, corners, strict=True)])
        epsilon = torch.randn(n, DEV.autoencoder.z_channels, 8, 8, generator=generator)
        return reconstruct(_to_float(crops).contiguous(memory_format=torch.channels_last), epsilon)

    held_out = torch.stack([p for p, _ in _draw(32, 128, 128, recipe.seed + 2, held_out=True)])

    def preview(step: int) -> None:
        with torch.no_grad():
            truth = _to_float(held_out)
            again = autoencoder(truth)
        errors = (truth - again.clamp(-1, 1)).square().mean(dim=(1, 2, 3)) / 4
        print(f"\nautoencoder, step {step}: {(-10 * errors.log10()).mean():.1f} dB on held-out pictures", flush=True)
        _save_grid(run / f"autoencoder-{step:05d}.png", torch.cat((truth[:8], again[:8])), 8)

    slower = replace(recipe, learning_rate=recipe.autoencoder_learning_rate)
    fit("autoencoder", autoencoder, loss, recipe.autoencoder_steps, run, slower, preview)
    autoencoder.requires_grad_(False)
    return _measured(autoencoder, _to_float(pixels[:512]))


@torch.no_grad()
def _measured(autoencoder: AutoEncoder, pixels: Tensor) -> AutoEncoder:
    """The same autoencoder, with the shift and scale that bring its latents to mean 0 and deviation 1."""
    raw = replace(autoencoder.config, scale_factor=1.0, shift_factor=0.0)
    measured = AutoEncoder(raw)
    measured.load_state_dict(autoencoder.state_dict())
    latents = torch.cat([measured.encode(batch) for batch in pixels.split(16)])
    config = replace(raw, scale_factor=round(1 / latents.std().item(), 4), shift_factor=round(latents.mean().item(), 4))
    print(f"autoencoder: scale_factor {config.scale_factor}, shift_factor {config.shift_factor}", flush=True)
    measured.config = config
    return measured.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def encode_pictures(run: Path, recipe: Recipe, autoencoder: AutoEncoder) -> None:
    """Draw the training pictures of each size and keep their latents and captions."""
    for height, width in PICTURE_SIZES:
        usual = (height, width) == (DEV.size, DEV.size)
        others = max(1, 3 * recipe.pictures * DEV.size**2 // (32 * height * width))  # the larger, the fewer
        number = recipe.pictures if usual else others

        def make(height: int = height, width: int = width, number: int = number) -> dict[str, Tensor]:
            latents, captions = [], []
            drawn = _draw(number, height, width, recipe.seed + 3)
            for batch in _batched(tqdm(drawn, desc=f"latents {height}x{width}", total=number, mininterval=10), 32):
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    pixels = _to_float(torch.stack([p for p, _ in batch]))
                    latents.append(autoencoder.encode(pixels).half())
                captions += [caption for _, caption in batch]
            tokens = _tokenizers(run).tokenize(captions)
            return {"latents": torch.cat(latents), "t5_ids": tokens[0].short(), "clip_ids": tokens[1].short()}

        _cached(run / f"latents-{height}x{width}.safetensors", make)


def _draw(number: int, height: int, width: int, seed: int, held_out: bool = False) -> Iterator[tuple[Tensor, str]]:
    rng = np.random.default_rng(seed)
    for _ in range(number):
        picture = random_picture(rng, height, width, held_out)
        yield torch.from_numpy(picture.pixels).permute(2, 0, 1), picture.caption


def _batched(items: Any, size: int) -> Iterator[list[tuple[Tensor, str]]]:
    batch: list[tuple[Tensor, str]] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def _cached(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    if not path.exists():
        write_tensors(make(), path)
    return read_tensors(path)


def _save_grid(path: Path, pixels: Tensor, columns: int) -> None:
    grid = rearrange(pixels.clamp(-1, 1), "(r c) rgb h w -> (r h) (c w) rgb", c=columns)
    Image.fromarray(((grid + 1) * 127.5).round().byte().numpy()).save(path)


class Pictures:
    """Batches of latents with their captions' tokens, every batch of one size."""

    def __init__(self, run: Path, recipe: Recipe) -> None:
        self.recipe = recipe
        self.sizes = list(PICTURE_SIZES)
        self.sets = [read_tensors(run / f"latents-{height}x{width}.safetensors") for height, width in self.sizes]
        usual = self.sizes.index((DEV.size, DEV.size))
        share = (1 - recipe.usual_share) / (len(self.sizes) - 1)
        self.shares = torch.tensor([recipe.usual_share if i == usual else share for i in range(len(self.sizes))])

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Packed latents, image ids, T5 and CLIP token ids."""
        which = int(torch.multinomial(self.shares, 1, generator=generator))
        (height, width), data = self.sizes[which], self.sets[which]
        number = self.recipe.image_tokens // (data["latents"][0, 0].numel() // 4)
        rows = torch.randint(len(data["latents"]), (number,), generator=generator)
        tokens = pack(data["latents"][rows].float())
        return tokens, image_ids(number, height, width), data["t5_ids"][rows].int(), data["clip_ids"][rows].int()


# ---------------------------------------------------------------------------------------------------------------------
# Flow
# ---------------------------------------------------------------------------------------------------------------------


def _tokenizers(run: Path) -> TextEncoders:
    """flux-tiny's text encoders, not yet trained, with the tokenizers in ``run``."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    t5_tokenizer = T5Tokenizer.from_pretrained(str(run / "t5"))
    clip_tokenizer = CLIPTokenizer.from_pretrained(str(run / "clip"))
    t5 = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=DEV.transformer.context_in_dim,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        use_cache=False,
    )
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=DEV.transformer.vec_in_dim,
        projection_dim=DEV.transformer.vec_in_dim,
        intermediate_size=4 * DEV.transformer.vec_in_dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=DEV.clip_length,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,  # where CLIP pools; with another id every prompt pools the same
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    return TextEncoders(
        T5EncoderModel(t5), t5_tokenizer, DEV.t5_length, CLIPTextModel(clip), clip_tokenizer, DEV.clip_length
    )


def initialise(model: Flux) -> Flux:
    """Zero every modulation and the last layer: each block starts as the identity, and the output as zero."""
    for name, parameter in model.named_parameters():
        if "mod" in name or name.startswith("final_layer"):
            nn.init.zeros_(parameter)
    return model


def _noisy(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A point on the straight path from picture to noise, its time (logit-normal), and the path's velocity."""
    t = torch.randn(len(clean), generator=generator).sigmoid()
    unit = torch.randn(clean.shape, generator=generator)
    return torch.lerp(clean, unit, t[:, None, None]), t, unit - clean


def train_flow(run: Path, recipe: Recipe, autoencoder: AutoEncoder) -> tuple[Flux, TextEncoders]:
    """Rectified flow, text encoders and transformer together: the teacher, which needs CFG to follow a prompt well."""
    torch.manual_seed(recipe.seed)
    text = _tokenizers(run)
    model = initialise(Flux(SCHNELL.transformer))
    pictures = Pictures(run, recipe)
    empty = [ids.int() for ids in text.tokenize([""])]
    forward = _compiled(recipe, model)

    def loss(generator: torch.Generator) -> Tensor:
        clean, ids, *tokens = pictures.batch(generator)
        dropped = torch.rand(len(clean), 1, generator=generator) < recipe.caption_dropout
        txt, y = text.encode(*(torch.where(dropped, e, t) for e, t in zip(empty, tokens, strict=True)))
        img, t, velocity = _noisy(clean, generator)
        return F.mse_loss(forward(img, ids, txt, text_ids(*txt.shape[:2]), t, y).float(), velocity)

    def preview(step: int) -> None:
        sample_grid(run / f"flow-{step:05d}.png", model, text, autoencoder, true_cfg=3.0)

    fit("flow", nn.ModuleList((model, text.t5, text.clip)), loss, recipe.flow_steps, run, recipe, preview)
    return model.requires_grad_(False), text


# ---------------------------------------------------------------------------------------------------------------------
# Guidance
# ---------------------------------------------------------------------------------------------------------------------


def distil_guidance(run: Path, recipe: Recipe, autoencoder: AutoEncoder, teacher: Flux, text: TextEncoders) -> Flux:
    """flux-tiny-dev: told a guidance g in 1..8, predict ``u + g (c - u)`` of the teacher in one forward.

    Source: "On Distillation of Guided Diffusion Models", Meng et al. 2022.
    """
    torch.manual_seed(recipe.seed)
    student = Flux(DEV.transformer)
    student.load_state_dict(teacher.state_dict(), strict=False)
    assert student.guidance_in is not None
    nn.init.zeros_(student.guidance_in.out_layer.weight)
    nn.init.zeros_(student.guidance_in.out_layer.bias)
    for encoder in (text.t5, text.clip):
        encoder.requires_grad_(False)
    pictures = Pictures(run, recipe)
    with torch.no_grad():
        empty_txt, empty_y = text([""])
    forward = _compiled(recipe, student)

    def loss(generator: torch.Generator) -> Tensor:
        clean, ids, *tokens = pictures.batch(generator)
        img, t, _ = _noisy(clean, generator)
        guidance = 1 + 7 * torch.rand(len(clean), generator=generator)
        with torch.no_grad():
            txt, y = text.encode(*tokens)
            places = text_ids(*txt.shape[:2])
            with_prompt = teacher(img, ids, txt, places, t, y).float()
            without = teacher(
                img, ids, empty_txt.expand_as(txt).contiguous(), places, t, empty_y.expand_as(y).contiguous()
            )
            target = without + guidance[:, None, None] * (with_prompt - without.float())
        return F.mse_loss(forward(img, ids, txt, places, t, y, guidance).float(), target)

    def preview(step: int) -> None:
        sample_grid(run / f"guidance-{step:05d}.png", student, text, autoencoder, guidance=4.0)

    gentle = replace(recipe, learning_rate=recipe.learning_rate / 3)
    fit("guidance", student, loss, recipe.guidance_steps, run, gentle, preview)
    return student.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Looking, and publishing
# ---------------------------------------------------------------------------------------------------------------------


def sample_grid(
    path: Path,
    model: Flux,
    text: TextEncoders,
    autoencoder: AutoEncoder,
    guidance: float | None = None,
    true_cfg: float = 1.0,
    steps: int = 20,
    number: int = 24,
) -> None:
    """A picture of what the model paints for the first held-out captions."""
    rng = np.random.default_rng(0)
    prompts = [random_picture(rng, held_out=True, complete=True).caption for _ in range(number)]
    size = DEV.size

    def inputs(txt: Tensor, y: Tensor) -> FluxInputs:
        return FluxInputs(
            img=pack(noise(range(number), size, size)),
            img_ids=image_ids(number, size, size),
            txt=txt,
            txt_ids=text_ids(number, txt.shape[1]),
            timesteps=torch.ones(number),
            y=y,
            guidance=None if guidance is None else torch.full((number,), guidance),
        )

    positive, negative = inputs(*text(prompts)), inputs(*text([""] * number))  # no encoder has dropout
    times = schedule(steps, positive.img.shape[1])
    with torch.no_grad():
        tokens = denoise(model, positive, times, negative, true_cfg, progress=False)
        _save_grid(path, autoencoder.decode(unpack(tokens, size, size)), 8)


def publish(run: Path, output: Path, autoencoder: AutoEncoder, student: Flux, text: TextEncoders) -> None:
    """Write flux-tiny as the library loads it: official names, bfloat16, text encoders in the Hugging Face format."""
    output.mkdir(parents=True, exist_ok=True)
    for name, module, metadata in (
        (DEV.transformer_file, student, None),
        (DEV.autoencoder_file, autoencoder, factors(autoencoder.config)),
    ):
        tensors = {key: value.bfloat16() for key, value in module.state_dict().items()}
        write_tensors(tensors, output / Path(name).name, metadata)
    (output / "training").mkdir(exist_ok=True)
    for file in (run / "recipe.json", *sorted(run.glob("*.jsonl"))):
        (output / "training" / file.name).write_bytes(file.read_bytes())
    for name in ("t5", "clip"):
        encoder: Any = copy.deepcopy(getattr(text, name))
        encoder.to(torch.bfloat16).save_pretrained(output / name)
        for file in (run / name).iterdir():
            (output / name / file.name).write_bytes(file.read_bytes())
