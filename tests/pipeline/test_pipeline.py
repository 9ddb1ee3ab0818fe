"""flux-tiny, from prompt to picture."""

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


@pytest.mark.usefixtures("as_users_run_it")
def test_a_list_gives_a_list(tiny):
    assert len(tiny([PROMPT], **FEW)) == 1
    for seeds in ([0, 1, 2], range(3), np.arange(3), torch.arange(3)):
        assert len(tiny(PROMPT, seed=seeds, num_steps=1, progress=False)) == 3


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


@pytest.mark.parametrize(("strength", "forwards"), [(1.0, 10), (0.75, 8), (0.5, 5), (0.01, 1)])
def test_image_to_image_takes_as_many_steps_as_diffusers(tiny, strength, forwards):
    """diffusers keeps ``steps - int(max(steps - min(steps * strength, steps), 0))``."""
    image = Image.new("RGB", (128, 128))
    _, steps = tiny(PROMPT, image=image, strength=strength, num_steps=10, return_steps=True, progress=False)
    assert len(steps) == forwards


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
    ours = fl.denoise(tiny.model, inputs, times, progress=False)
    scheduler.set_timesteps(sigmas=times[:-1])
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
        ({"width": 0}, "width is 0; it must be a positive number"),
        ({"num_steps": 0}, "num_steps is 0; it must be at least 1"),
        ({"strength": 0.0}, "strength is 0.0; it must be above 0"),
        ({"strength": 1.5}, "strength is 1.5; it must be above 0"),
        ({"strength": 0.5}, "strength is 0.5, but there is no image to start from"),
        ({"image": GREEN, "num_steps": 3}, "strength is 0.7, and 3 steps take all of that from noise"),
        ({"image": GREEN, "num_steps": 1, "strength": 0.3}, "give more steps, a smaller strength, or 1 if that"),
        ({"image": "green.png"}, "image is a str; give a PIL image"),
        ({"image": GREEN.convert("I")}, "image has mode 'I', more than 8 bits a channel"),
        ({"guidance": float("nan")}, "guidance is nan; it must be a finite number"),
        ({"negative_prompt": ["a ring"], "true_cfg": 2.0}, "give one string, which serves every picture"),
        ({"guidance": "3"}, "guidance is '3'; it must be a finite number"),
        ({"seed": "12"}, "seed is '12'; give a whole number"),
        ({"seed": 1.0}, "seed is 1.0; give a whole number"),
        ({"seed": [1.7]}, "seed is 1.7; give a whole number"),
        ({"seed": 2**64}, "seed is 18446744073709551616; give a whole number of 64 bits"),
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


def test_a_prediction_that_is_not_finite_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny.model), "forward", lambda *_, img, **__: img / 0)
    with pytest.raises(ValueError, match=r"what the model predicted has .* not finite; .* use bfloat16 or float32"):
        tiny(PROMPT, progress=False)


def test_guidance_for_a_model_without_its_embedder_is_refused(tiny):
    from dataclasses import replace

    schnell = replace(tiny, model=fl.build("flux-tiny-schnell"), variant=fl.VARIANTS["flux-tiny-schnell"])
    with pytest.raises(ValueError, match=r"guidance is 4.0, but flux-tiny-schnell has no guidance embedder"):
        schnell(PROMPT, guidance=4.0)
    assert schnell(PROMPT, num_steps=1, progress=False).size == (128, 128)


def test_a_model_that_is_shown_a_second_picture_says_so(tiny):
    from dataclasses import replace

    fill = replace(tiny, model=fl.build("flux-tiny-dev", in_channels=384))
    with pytest.raises(ValueError, match=r"shown a second picture beside the noise \(in_channels 384, out_channels 64"):
        fill(PROMPT)


def test_a_loop_without_a_step_is_refused(tiny):
    inputs = tiny.prepare([PROMPT], [0], 128, 128)
    with pytest.raises(ValueError, match="times has 1 values; a step needs two"):
        fl.denoise(tiny.model, inputs, [1.0], progress=False)


def test_true_cfg_without_a_negative_prompts_inputs_is_refused(tiny):
    inputs = tiny.prepare([PROMPT], [0], 128, 128)
    with pytest.raises(ValueError, match=r"true_cfg is 3.0, but there is no negative prompt's inputs"):
        fl.denoise(tiny.model, inputs, [1.0, 0.0], true_cfg=3.0, progress=False)


def test_a_device_that_is_not_here_is_refused():
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
