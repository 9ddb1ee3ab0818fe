"""flux-tiny, from prompt to picture."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

import fluxlab as fl
from fluxlab.tiny.measure import measure

PROMPT = "a large blue square on a white background"
FEW = {"num_steps": 3, "progress": False}
GREEN = Image.new("RGB", (128, 128), "green")


def pixels(picture):
    return np.asarray(picture).astype(int)


def differ(a, b):
    return abs(pixels(a) - pixels(b)).max() > 8


def test_the_same_seed_gives_the_same_picture_and_another_another(tiny):
    first, again, other = (tiny(PROMPT, seed=seed, **FEW) for seed in (1, 1, 2))
    assert first.size == (128, 128)
    assert np.array_equal(pixels(first), pixels(again))
    assert differ(first, other)


def test_a_batch_gives_what_each_prompt_gives_alone(tiny):
    prompts = [PROMPT, "a small red ring on a black background"]
    together = tiny(prompts, seed=[3, 4], **FEW)
    alone = [tiny(prompt, seed=seed, **FEW) for prompt, seed in zip(prompts, (3, 4), strict=True)]
    assert all(abs(pixels(a) - pixels(b)).max() <= 1 for a, b in zip(together, alone, strict=True))


def test_one_prompt_serves_several_seeds(tiny):
    inputs = tiny.prepare(["a red ring"], [0, 1], 128, 128)
    assert len(inputs.img) == len(inputs.txt) == len(inputs.y) == 2
    with pytest.raises(ValueError, match="2 prompts and 3 seeds; give one seed"):
        tiny.prepare(["a", "b"], [0, 1, 2], 128, 128)


@pytest.mark.usefixtures("as_users_run_it")
def test_a_list_gives_a_list(tiny):
    assert len(tiny([PROMPT], **FEW)) == 1
    for seeds in ([0, 1, 2], range(3), np.arange(3), torch.arange(3), (i for i in range(3))):
        assert len(tiny(PROMPT, seed=seeds, num_steps=1, progress=False)) == 3
    assert len(tiny(PROMPT, seed=torch.tensor([3]), num_steps=1, progress=False)) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"num_steps": 7},
        {"guidance": 1.0},
        {"true_cfg": 3.0},
        {"true_cfg": 3.0, "negative_prompt": "a red circle on a black background"},
        {"seed": 5},
        {"image": Image.new("RGB", (128, 128), "green")},
        {"image": Image.new("RGB", (128, 128), "green"), "strength": 0.4},
    ],
)
def test_each_option_changes_the_picture(tiny, changes):
    base = {"seed": 0, "guidance": 4.0, "num_steps": 6, "progress": False}
    if "negative_prompt" in changes:
        base["true_cfg"] = 3.0
    if "strength" in changes:
        base["image"] = changes["image"]
    assert differ(tiny(PROMPT, **base), tiny(PROMPT, **(base | changes)))


def test_the_size_is_what_was_asked(tiny):
    assert tiny(PROMPT, height=96, width=160, **FEW).size == (160, 96)
    assert tiny(PROMPT, image=Image.new("RGB", (150, 90)), strength=0.5, **FEW).size == (144, 80)


def test_a_weak_strength_keeps_the_image_and_full_strength_forgets_it(tiny):
    image = tiny(PROMPT, seed=0, progress=False)
    other = Image.new("RGB", (128, 128), "black")
    weak = tiny(PROMPT, seed=1, image=image, strength=0.1, num_steps=20, progress=False)
    assert abs(pixels(weak) - pixels(image)).mean() < 12
    full = [tiny(PROMPT, seed=1, image=start, strength=1.0, **FEW) for start in (image, other)]
    assert np.array_equal(*map(pixels, full))


@pytest.mark.parametrize(
    ("strength", "number"), [(1.0, 10), (0.75, 10), (0.5, 10), (0.01, 10), (0.9, 10), (0.8, 5), (0.7, 10), (0.3, 20)]
)
def test_image_to_image_takes_the_steps_that_diffusers_takes(tiny, strength, number):
    """At 0.9 of 10 and 0.8 of 5, ``int(steps * (1 - strength))`` would be one off."""
    from types import SimpleNamespace

    from diffusers import FluxImg2ImgPipeline

    times = fl.schedule(number, 16)
    stand_in = SimpleNamespace(scheduler=SimpleNamespace(timesteps=times[:-1], order=1))
    theirs, count = FluxImg2ImgPipeline.get_timesteps(stand_in, number, strength, "cpu")
    options = {"image": GREEN.resize((64, 64)), "strength": strength, "num_steps": number}
    _, steps = tiny(PROMPT, return_steps=True, progress=False, **options)
    assert ([step.t for step in steps], len(steps)) == (theirs, count)


def test_the_steps_are_returned_and_called_back(tiny):
    seen = []
    picture, steps = tiny(PROMPT, callback=seen.append, return_steps=True, **FEW)
    assert [step.index for step in seen] == [0, 1, 2]
    assert seen == steps
    assert (steps[0].t, steps[-1].t_next) == (1, 0)
    assert torch.equal(steps[0].img_next, steps[1].img)
    assert torch.equal(steps[-1].clean, steps[-1].img_next)
    assert np.array_equal(pixels(tiny.decode(steps[-1].img_next, 128, 128)[0]), pixels(picture))


def test_the_loop_equals_diffusers_euler_scheduler(tiny):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    inputs = tiny.prepare([PROMPT], [0], 128, 128)
    times = fl.schedule(5, 64)
    scheduler.set_timesteps(sigmas=times[:-1])
    assert scheduler.sigmas.tolist() == pytest.approx(times, abs=1e-7)  # it rounds them to float32
    ours = fl.denoise(tiny.model, inputs, scheduler.sigmas.tolist(), progress=False)
    img = inputs.img
    with torch.no_grad():
        for t in scheduler.timesteps:
            kwargs = inputs.kwargs() | {"img": img, "timesteps": t[None] / 1000}
            img = scheduler.step(tiny.model(**kwargs), t, img, return_dict=False)[0]
    assert (ours - img).abs().max() <= 1e-5


def test_one_forward_a_step_and_two_with_true_cfg(tiny):
    calls = []
    hook = tiny.model.register_forward_hook(lambda *_: calls.append(1))
    tiny(PROMPT, **FEW)
    one, _ = len(calls), calls.clear()
    tiny(PROMPT, true_cfg=3.0, **FEW)
    hook.remove()
    assert (one, len(calls)) == (3, 6)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 100}, "height is 100; it must be a multiple of 16, .* try 96"),
        ({"width": 0}, "width is 0; it must be a whole number of at least 1"),
        ({"height": 128.0}, "height is 128.0; it must be a whole number"),
        ({"num_steps": 0}, "num_steps is 0; it must be a whole number of at least 1"),
        ({"num_steps": 4.0}, "num_steps is 4.0; it must be a whole number"),
        ({"num_steps": "4"}, "num_steps is '4'; it must be a whole number"),
        ({"prompt": None}, "prompt is None; give text"),
        ({"prompt": [["a ring"]]}, r"prompt is \['a ring'\]; give text"),
        ({"prompt": b"a ring"}, "prompt is b'a ring'; give text"),
        ({"prompt": "a \udcff"}, r"prompt is 'a \\udcff'; give text"),
        ({"prompt": ["a ring", 3]}, "prompt is 3; give text"),
        ({"image": GREEN, "strength": "0.5"}, "strength is '0.5'; it must be above 0"),
        ({"true_cfg": "3"}, "true_cfg is '3'; it must be at least 1"),
        ({"image": GREEN.convert("F")}, "image has mode 'F', more than 8 bits a channel"),
        ({"image": Image.new("I;16", (16, 16))}, "image has mode 'I;16', more than 8 bits a channel"),
        ({"strength": 0.0}, "strength is 0.0; it must be above 0"),
        ({"strength": 1.5}, "strength is 1.5; it must be above 0"),
        ({"strength": 0.5}, "strength is 0.5, but there is no image to start from"),
        ({"image": GREEN, "num_steps": 3}, "strength is 0.7, and 3 steps take all of that from noise"),
        ({"image": GREEN, "num_steps": 1, "strength": 0.3}, "give more steps, a smaller strength, or 1 if that"),
        ({"image": "green.png"}, "image is a str; give a PIL image"),
        ({"image": np.asarray(GREEN)}, "image is a ndarray; give a PIL image"),
        ({"image": Image.new("RGB", (16, 0))}, "image is 16 x 0 pixels"),
        ({"image": GREEN.convert("I")}, "image has mode 'I', more than 8 bits a channel"),
        ({"guidance": float("nan")}, "guidance is nan; it must be a finite number"),
        ({"negative_prompt": ["a ring"], "true_cfg": 2.0}, "give one string, which serves every picture"),
        ({"guidance": "3"}, "guidance is '3'; it must be a finite number"),
        ({"seed": "12"}, "seed is '12'; it must be a whole number"),
        ({"seed": 1.0}, "seed is 1.0; it must be a whole number"),
        ({"seed": [1.7]}, "seed is 1.7; it must be a whole number"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be a whole number of at most 18446744073709551615"),
        ({"true_cfg": 0.5}, "true_cfg is 0.5; it must be at least 1"),
        ({"negative_prompt": "a ring"}, "negative_prompt has no effect while true_cfg is 1"),
        ({"seed": []}, "seed is an empty list"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "2 prompts and 3 seeds"),
    ],
)
def test_what_cannot_be_painted_is_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**({"prompt": PROMPT, "progress": False} | options))


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("flux-tiny-dev", {"colour": 0.97, "place": 0.97, "background": 0.97, "shape": 0.92, "all": 0.8}),
        ("flux-tiny-schnell", {"colour": 0.93, "place": 0.93, "background": 0.93, "shape": 0.85, "all": 0.65}),
    ],
)
def test_pictures_follow_prompts_that_training_never_saw(name, least):
    """At the variant's own settings: 20 steps at guidance 4, and 4 steps. The card has the shares of 256 prompts."""
    right = measure(fl.load(name), number=64)
    assert all(right[attribute] >= bound for attribute, bound in least.items()), right


def test_a_size_in_the_prompt_is_the_size_in_the_picture(tiny):
    def size(word):
        prompt = f"a {word} red triangle on the right on a black background"
        pictures = tiny(prompt, seed=range(16), progress=False)
        return np.mean([(np.asarray(picture)[..., 0] > 120).mean() for picture in pictures])

    assert size("small") < 0.6 * size("large")


def test_guidance_helps_the_picture_follow(tiny):
    weak, strong = (measure(tiny, number=32, num_steps=8, guidance=guidance) for guidance in (1.0, 8.0))
    assert strong["shape"] > weak["shape"] + 0.05
    assert strong["all"] > weak["all"]


def test_noise_that_is_not_finite_is_refused(tiny):
    inputs = tiny.prepare([PROMPT], [0], 128, 128)
    inputs.img[0, 3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"inputs.img has 1 of 4096 values that are not finite"):
        fl.denoise(tiny.model, inputs, [1.0, 0.0], progress=False)


def test_a_prediction_that_is_not_finite_is_refused_at_its_step(tiny, monkeypatch):
    forward, calls = type(tiny.model).forward, []

    def overflow(self, **inputs):
        calls.append(1)
        return (forward(self, **inputs) * (1e6 if len(calls) == 3 else 1)).half()

    monkeypatch.setattr(type(tiny.model), "forward", overflow)
    with pytest.raises(
        ValueError, match=r"what the model predicted at step 2 has .*; float16 .* use bfloat16 or float32"
    ):
        tiny(PROMPT, num_steps=20, progress=False)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("decode", {}, r"what the VAE decoded has \d+ of 12288 values that are not finite"),
        ("encode", {"image": GREEN.resize((64, 64)), "strength": 0.5}, r"the latent of image has \d+ of 1024 values"),
    ],
)
def test_a_vae_that_overflows_is_refused_not_painted_black(tiny, monkeypatch, part, options, message):
    real, calls = getattr(type(tiny.autoencoder), part), []
    monkeypatch.setattr(type(tiny.autoencoder), part, lambda self, x: (real(self, x) * 1e6).half())
    hook = tiny.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError, match=message):
            tiny(PROMPT, num_steps=2, height=64, width=64, progress=False, **options)
    finally:
        hook.remove()
    assert len(calls) == (2 if part == "decode" else 0)  # before any step, where it can be known


def test_a_velocity_of_another_shape_is_refused(tiny, monkeypatch):
    inputs = tiny.prepare([PROMPT], [0], 32, 32)
    monkeypatch.setattr(type(tiny.model), "forward", lambda *_, img, **__: img[:, :2])
    with pytest.raises(ValueError, match=r"the model predicts \(1, 2, 64\), and img to move is \(1, 4, 64\)"):
        fl.denoise(tiny.model, inputs, [1.0, 0.0], progress=False)


def test_many_small_steps_add_up_in_float32(tiny, monkeypatch):
    """In bfloat16, 1 - 0.0002 is 1: fifty such steps would leave the tokens where they were."""
    monkeypatch.setattr(type(tiny.model), "forward", lambda *_, img, **__: torch.full_like(img, 0.01))
    inputs = tiny.prepare([PROMPT], [0], 32, 32)
    inputs.img = torch.ones(1, 4, 64, dtype=torch.bfloat16)
    ended = fl.denoise(tiny.model, inputs, fl.schedule(50, 64, shift=False), progress=False)
    assert ended.dtype is torch.float32
    assert (ended - (1 - torch.tensor(0.01).bfloat16().item())).abs().max() < 1e-5


def test_guidance_for_a_model_without_its_embedder_is_refused(tiny):
    from dataclasses import replace

    schnell = replace(tiny, model=fl.build("flux-tiny-schnell"), variant=fl.VARIANTS["flux-tiny-schnell"])
    with pytest.raises(ValueError, match=r"guidance is 4.0, but flux-tiny-schnell has no guidance embedder"):
        schnell(PROMPT, guidance=4.0)
    assert schnell(PROMPT, num_steps=1, progress=False).size == (128, 128)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    "times",
    [
        [1.0],
        [1.0, 0.5, 0.7, 0.0],
        [1.0, 0.5, 0.5, 0.0],
        [0.0, 1.0],
        [1000.0, 500.0, 0.0],
        [1.0, float("nan"), 0.0],
        [1.0, -0.1],
        ["1.0", "0.0"],
        torch.tensor([0.7123, 0.0], dtype=torch.bfloat16),
        np.array([0.7123, 0.0], dtype=np.float16),
    ],
)
def test_times_that_do_not_fall_from_1_to_0_are_refused(tiny, times):
    inputs = tiny.prepare([PROMPT], [0], 32, 32)
    with pytest.raises(ValueError, match=r"times is .*; give two or more numbers that fall from 1"):
        fl.denoise(tiny.model, inputs, times, progress=False)


@pytest.mark.usefixtures("as_users_run_it")
def test_times_may_be_a_tensor_or_an_array(tiny):
    inputs, times = tiny.prepare([PROMPT], [0], 32, 32), [1.0, 0.5, 0.25, 0.0]
    ends = [fl.denoise(tiny.model, inputs, as_(times), progress=False) for as_ in (list, torch.tensor, np.array)]
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_true_cfg_without_a_negative_prompts_inputs_is_refused(tiny):
    inputs = tiny.prepare([PROMPT], [0], 128, 128)
    with pytest.raises(ValueError, match=r"true_cfg is 3.0, but there is no negative prompt's inputs"):
        fl.denoise(tiny.model, inputs, [1.0, 0.0], true_cfg=3.0, progress=False)


@pytest.mark.usefixtures("as_users_run_it")
def test_a_device_that_is_not_here_is_refused(tiny):
    with pytest.raises(ValueError, match=r"device is torch.float16 and dtype torch.float32; give one dtype"):
        tiny.to(torch.float16, torch.float32)
    with pytest.raises(ValueError, match="device is 'nonsense', which cannot be used here"):
        fl.load("flux-tiny-dev", device="nonsense")


def test_bfloat16_paints_nearly_the_same_picture(tiny):
    """The dtype of real weights: from a prompt, from a picture, and with true CFG."""
    half = fl.load("flux-tiny-dev", dtype=torch.bfloat16)
    assert half.model.img_in.weight.dtype is half.text.t5.dtype is torch.bfloat16
    image = Image.new("RGB", (128, 128), "green")
    for options in ({}, {"image": image}, {"true_cfg": 2.0}):
        ours, theirs = (pixels(pipe(PROMPT, num_steps=6, progress=False, **options)) for pipe in (half, tiny))
        assert 0 < abs(ours - theirs).mean() < 8


@pytest.mark.usefixtures("as_users_run_it")
def test_numpy_integers_are_seeds(tiny):
    assert tiny(PROMPT, seed=np.int64(1), **FEW).tobytes() == tiny(PROMPT, seed=1, **FEW).tobytes()
    assert tiny(PROMPT, seed=torch.tensor(1), **FEW).tobytes() == tiny(PROMPT, seed=1, **FEW).tobytes()


def test_a_pipeline_is_shown_in_one_line(tiny):
    said = "Pipeline(flux-tiny-dev: 2,366,272 parameters in the transformer, torch.float32, cpu)"
    assert repr(tiny) == said
    assert repr(tiny.text) == "TextEncoders(T5: 32 tokens, CLIP: 32 tokens, on cpu)"


def test_a_pipeline_is_cast_and_moved_as_a_module_is():
    pipe = fl.load("flux-tiny-dev")
    small = {"num_steps": 1, "height": 32, "width": 32, "progress": False}
    usual = pixels(pipe(PROMPT, **small))
    assert pipe.to(torch.bfloat16) is pipe
    parts = (pipe.model, pipe.autoencoder, pipe.text.t5, pipe.text.clip)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}
    assert pipe.dtype is torch.bfloat16
    assert 0 < abs(pixels(pipe(PROMPT, **small)) - usual).mean() < 8
    pipe.to("meta")
    assert {p.device.type for part in parts for p in part.parameters()} == {"meta"}
    assert str(pipe.device) == str(pipe.text.device) == "meta"
    assert pipe.to(device="meta", dtype=torch.float32).dtype is torch.float32
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}


@pytest.mark.usefixtures("as_users_run_it")
def test_nothing_is_encoded_before_all_arguments_are_looked_at(monkeypatch):
    pipe = fl.load("flux-tiny-fill-dev")
    monkeypatch.setattr(pipe.autoencoder, "encode", lambda _: pytest.fail("the VAE ran"))
    shown = {"image": Image.new("RGB", (128, 128)), "mask": Image.new("L", (128, 128), 255), "progress": False}
    with pytest.raises(ValueError, match="prompt is None; give text"):
        pipe(None, **shown)
    with pytest.raises(ValueError, match=r"negative_prompt is '.ud800'; give text"):
        pipe("a", negative_prompt="\ud800", true_cfg=2.0, **shown)


def test_a_pipeline_on_meta_is_not_painted_with():
    with pytest.raises(ValueError, match="this pipeline is on meta, which has shapes and no numbers to paint with"):
        fl.load("flux-tiny-dev", device="meta")("a", num_steps=3, progress=False)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("where", [torch.float8_e4m3fn, torch.int8, "bfloat16", "no such"])
def test_a_pipeline_goes_only_where_it_can_be_loaded(where):
    pipe = fl.load("flux-tiny-dev")
    before = pipe.model.img_in.weight.clone()
    with pytest.raises(ValueError, match=r"dtype is torch|device is '"):
        pipe.to(where)
    assert torch.equal(pipe.model.img_in.weight, before)
    with pytest.raises(ValueError, match="device is 'None', which cannot be used here"):
        fl.load("flux-tiny-dev", device=None)


@pytest.mark.usefixtures("as_users_run_it")
def test_true_cfg_is_a_number_whoever_gives_it(tiny):
    inputs = tiny.prepare(["a"], [0], 64, 64)
    for wrong in ("2", float("nan"), None):
        with pytest.raises(ValueError, match=r"true_cfg is .*; it must be at least 1"):
            fl.denoise(tiny.model, inputs, [1.0, 0.0], inputs, wrong, progress=False)
    some = fl.denoise(tiny.model, inputs, [1.0, 0.0], inputs, Fraction(5, 2), progress=False)
    assert torch.equal(some, fl.denoise(tiny.model, inputs, [1.0, 0.0], inputs, 2.5, progress=False))


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_called_and_numbers_beyond_all_are_refused_before_any_work(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny.text), "__call__", lambda *_: pytest.fail("the text was encoded"))
    for options, message in (
        ({"callback": 3}, "callback is 3; give a function"),
        ({"true_cfg": 10**400}, "true_cfg is 1000"),
        ({"guidance": 10**400}, "guidance is 1000"),
        ({"strength": 10**400, "image": Image.new("RGB", (64, 64))}, "strength is 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny("a", progress=False, **options)
    inputs = fl.example_inputs("flux-tiny-dev", 64, 64)
    with pytest.raises(ValueError, match="callback is 3"):
        fl.denoise(tiny.model, inputs, [1, 0], callback=3)
