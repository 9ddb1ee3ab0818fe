"""What fluxlab.speed puts on: the same pictures, each taken off again, alone and together."""

import copy
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
import torchao
from PIL import Image
from torch._dynamo.testing import CompileCounter

import fluxlab as fl
from fluxlab.pipeline.schedule import schedule
from fluxlab.weights.find import data_folder

PROMPTS = ["a small red circle left of a large blue square on a white background", "a large star on a navy background"]
CANNY = data_folder() / "flux-tiny/flux-tiny-canny-dev-lora.safetensors"
PUT = {
    "quantize": fl.speed.quantize,
    "compile": lambda pipe: fl.speed.compile(pipe, backend="eager"),
    "modulation_ahead": fl.speed.modulation_ahead,
    "cache_steps": lambda pipe: fl.speed.cache_steps(pipe, 0.3),
}


@pytest.fixture
def pipe():
    """One of its own: a test that fails must not leave anything on."""
    return fl.load("flux-tiny-dev")


def painted(pipe, prompt=PROMPTS[0], **options):
    found = pipe(prompt, **{"seed": 3, "num_steps": 8, "progress": False} | options)
    return np.stack([np.asarray(each).astype(int) for each in (found if isinstance(found, list) else [found])])


def far(a, b):
    return np.abs(a - b).max()


WAYS = {
    "one": {},
    "several prompts": {"prompt": PROMPTS, "seed": [3, 4]},
    "a batch": {"seed": [3, 4, 5]},
    "true CFG": {"true_cfg": 2.0, "negative_prompt": "a ring"},
    "image to image": {"image": Image.new("RGB", (128, 128), "red"), "strength": 0.6},
    "another size": {"height": 128, "width": 192},
}


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_modulation_ahead_paints_the_same(pipe, way, release):
    plain = painted(pipe, **WAYS[way])
    live = []
    pipe.model.time_in.register_forward_hook(lambda *_: live.append(1))
    with fl.speed.modulation_ahead(pipe, release):
        assert far(painted(pipe, **WAYS[way]), plain) <= 1
        painted(pipe, PROMPTS[1])  # another prompt is another loop
        assert far(painted(pipe, **WAYS[way]), plain) <= 1
    loops = 3 + 2 * (way == "true CFG")
    assert len(live) == loops  # once a loop and prompt, in no step
    assert far(painted(pipe, **WAYS[way]), plain) == 0


def test_a_quarter_of_the_weights_leaves_memory(pipe):
    held = sum(p.numel() for p in pipe.model.parameters() if not p.is_meta)
    modulation = {row["kind"]: row["parameters"] for row in fl.parameter_table("flux-tiny-dev", "kind")}["modulation"]
    with fl.speed.modulation_ahead(pipe, release=True):
        assert sum(p.numel() for p in pipe.model.parameters() if not p.is_meta) == held - modulation
        painted(pipe)
        assert sum(p.numel() for p in pipe.model.parameters() if not p.is_meta) == held - modulation
    assert not any(p.is_meta for p in pipe.model.parameters())


def test_a_forward_that_was_not_prepared_runs_as_ever(pipe):
    inputs = pipe.prepare(PROMPTS, [0, 1], 128, 128)
    inputs.timesteps = torch.tensor([0.3, 0.7])
    with torch.no_grad():
        plain = pipe.model(**inputs.kwargs())
        with fl.speed.modulation_ahead(pipe):
            fl.denoise(pipe.model, inputs, schedule(4, 64), progress=False)
            assert torch.equal(pipe.model(**inputs.kwargs()), plain)  # two times at once
            inputs.timesteps = torch.tensor([0.123, 0.123])
            apart = pipe.model(**inputs.kwargs())  # a time of no step
            with pytest.raises(ValueError, match="txt has shape"):
                pipe.model(**inputs.kwargs() | {"txt": inputs.txt[:, :, :5]})
        assert torch.equal(apart, pipe.model(**inputs.kwargs()))


def test_what_ahead_computes_is_the_forwards_own(pipe):
    """Shifts, scales and gates, captured with and without; and what is not made is said."""
    names = ["vec", "pe", "*_mod.*1", "*.modulation.gate", "final_layer.shift", "velocity"]
    inputs = pipe.prepare([PROMPTS[0]], [0], 128, 128)
    times = schedule(3, 64)
    with fl.capture(pipe.model, names) as plain:
        fl.denoise(pipe.model, inputs, times, progress=False)
    with fl.speed.modulation_ahead(pipe):
        with fl.capture(pipe.model, names) as ahead:
            fl.denoise(pipe.model, inputs, times, progress=False)
        with (
            pytest.raises(ValueError, match="lin was made outside the model's forward"),
            fl.capture(pipe.model, "*.img_mod.lin"),
        ):
            fl.denoise(pipe.model, inputs, times, progress=False)
        with pytest.raises(ValueError, match="vector_in was made outside"), fl.capture(pipe.model, "vector_in"):
            fl.denoise(pipe.model, inputs, times, progress=False)
    for name in plain:
        for forward in range(3):
            assert torch.allclose(ahead.stack(name)[forward], plain.stack(name)[forward], atol=2e-4), name


@pytest.mark.parametrize("name", ["vec", "timesteps"])
def test_a_patch_that_ahead_would_ignore_is_refused(pipe, name):
    with fl.speed.modulation_ahead(pipe):
        with fl.patch(pipe.model, name, lambda tensor: tensor.clone()):
            painted(pipe, num_steps=1)
        with (
            pytest.raises(ValueError, match=f"{name} was changed, and modulation_ahead computed ahead"),
            fl.patch(pipe.model, name, lambda tensor: tensor / 2),
        ):
            painted(pipe, num_steps=1)
    assert "time_in" not in vars(pipe.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipe: setattr(pipe, "files", None), "release needs the file"),
        (lambda pipe: pipe.model.double_blocks[0].img_mod.lin.weight.add_(1), "is not what its file says"),
    ],
)
def test_release_without_the_file_is_refused(pipe, change, message):
    change(pipe)
    with pytest.raises(ValueError, match=message):
        fl.speed.modulation_ahead(pipe, release=True)
    assert not pipe.speedups


def test_release_beside_others(pipe):
    with fl.speed.quantize(pipe), pytest.raises(ValueError, match=r"is not what its file says, as .* or in int8"):
        fl.speed.modulation_ahead(pipe, release=True)
    assert not pipe.speedups
    edges = Image.new("RGB", (128, 128))
    with pipe.add_lora({CANNY: 1.0}):  # it widens img_in
        plain = painted(pipe, control=edges)
        with fl.speed.modulation_ahead(pipe, release=True):
            assert far(painted(pipe, control=edges), plain) <= 1


@pytest.mark.usefixtures("as_users_run_it")
def test_nothing_stays_behind(pipe):
    before = {name: {*vars(module)} for name, module in pipe.model.named_modules()}
    for put in PUT.values():
        with put(pipe):
            painted(pipe, num_steps=2)
    assert {name: {*vars(module)} for name, module in pipe.model.named_modules()} == before


def test_release_of_what_is_on_the_disk_is_refused():
    pipe = fl.load("flux-tiny-dev", low_memory=True)
    plain = painted(pipe)
    with pytest.raises(ValueError, match="on the disk already"):
        fl.speed.modulation_ahead(pipe, release=True)
    with fl.speed.modulation_ahead(pipe):
        assert far(painted(pipe), plain) <= 1
    with pytest.raises(ValueError, match="weights are not in memory"):
        fl.speed.quantize(pipe)


@pytest.mark.parametrize("way", WAYS)
def test_a_threshold_of_nothing_skips_nothing(pipe, way):
    plain = painted(pipe, **WAYS[way])
    with fl.speed.cache_steps(pipe, 0) as cached:
        assert far(painted(pipe, **WAYS[way]), plain) == 0
    assert cached.skipped == 0


@pytest.mark.parametrize("way", WAYS)
def test_skipped_steps_are_counted_and_run_one_block(pipe, way):
    plain = painted(pipe, num_steps=20, **WAYS[way])
    runs = {"first": 0, "other": 0, "last": 0}

    def count(name, module):
        inner = module.attend if name != "last" else module.branches

        def counted(*args):
            runs[name] += 1
            return inner(*args)

        setattr(module, "attend" if name != "last" else "branches", counted)

    for name, module in zip(runs, (*pipe.model.double_blocks, pipe.model.single_blocks[-1]), strict=True):
        count(name, module)
    with fl.speed.cache_steps(pipe, 0.1) as cached:
        found = painted(pipe, num_steps=20, **WAYS[way])
        assert 0 < cached.skipped < cached.forwards == runs["first"]
        assert runs["other"] == runs["last"] == cached.forwards - cached.skipped
        assert 0 < np.abs(found - plain).mean() < 3  # nearly the same picture
        info = pipe(PROMPTS[0], num_steps=20, progress=False).info["speed"]
        assert info == f"cache_steps(0.1): {cached.skipped} of 20 forwards skipped"
    assert far(painted(pipe, num_steps=20, **WAYS[way]), plain) == 0


def test_a_cached_loop_remembers_no_other(pipe):
    """The same loop twice in a row, and again after others: bit for bit, and counted anew."""
    with fl.speed.cache_steps(pipe, 0.2) as cached:
        once, counts = painted(pipe), (cached.forwards, cached.skipped)
        assert far(painted(pipe), once) == 0
        assert (cached.forwards, cached.skipped) == counts
        painted(pipe, PROMPTS[1])
        painted(pipe, height=64, width=64)
        assert far(painted(pipe), once) == 0


def test_a_loop_from_a_picture_begins_anew():
    pipe, picture = fl.load("flux-tiny-schnell"), Image.new("RGB", (128, 128), "navy")
    with fl.speed.cache_steps(pipe, 1e9) as cache:
        pipe(PROMPTS[1], num_steps=1, progress=False)
        pipe(PROMPTS[1], image=picture, strength=0.5, num_steps=4, progress=False)  # begins after the other ended
    assert (cache.forwards, cache.skipped) == (2, 1)


def test_skipping_by_hand(pipe):
    """With a huge threshold only the first forward runs whole; the second adds what the others did in it."""
    model, inputs = pipe.model, pipe.prepare([PROMPTS[0]], [0], 128, 128)
    second = inputs.img + 0.01
    with torch.no_grad(), fl.capture(model, ["double_blocks.0.*.output", "single_blocks.3.output"]) as tape:
        model(**inputs.kwargs())
    with torch.no_grad(), fl.capture(model, ["double_blocks.0.*.output", "vec"]) as tape2:
        model(**inputs.kwargs() | {"img": second, "timesteps": torch.tensor([0.9])})
    first = [torch.cat([each[f"double_blocks.0.{s}.output"] for s in ("txt", "img")], 1) for each in (tape, tape2)]
    with torch.no_grad():
        x = first[1] + tape["single_blocks.3.output"] - first[0]
        by_hand = model.final_layer(x[:, 32:], tape2["vec"])
        with fl.speed.cache_steps(pipe, 1e9):
            model(**inputs.kwargs())
            found = model(**inputs.kwargs() | {"img": second, "timesteps": torch.tensor([0.9])})
    assert torch.allclose(found, by_hand, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int8 dynamic"])
def test_quantized_weights_are_small_and_paint_nearly_the_same(pipe, kind, capfd):
    plain = painted(pipe, num_steps=20)
    ends = (pipe.model.img_in, pipe.model.final_layer.linear)
    linears = [m for m in pipe.model.modules() if isinstance(m, torch.nn.Linear) and m not in ends]
    numbers = sum(m.weight.numel() for m in linears)
    with fl.speed.quantize(pipe, kind):
        found = painted(pipe, num_steps=20)
        assert far(found, plain) > 0
        assert np.abs(found - plain).mean() < 3
        stored = sum(sum(t.nbytes for t in _stored(m.weight)) for m in linears)
        assert stored < 1.04 * numbers  # a byte each, and a scale a row
    assert far(painted(pipe, num_steps=20), plain) == 0
    assert not capfd.readouterr().err


def test_weights_that_were_quantized_come_back_in_the_dtype_that_the_pipeline_has_now():
    pipe = fl.load("flux-tiny-dev")
    handle = fl.speed.quantize(pipe, "int8")
    pipe.to(torch.bfloat16)
    handle.undo()
    assert {p.dtype for p in pipe.model.parameters()} == {torch.bfloat16}
    assert far(painted(pipe), painted(fl.load("flux-tiny-dev", dtype=torch.bfloat16))) == 0


def _stored(weight):
    names, _ = weight.__tensor_flatten__()
    return [getattr(weight, name) for name in names]


@pytest.mark.parametrize(
    ("kind", "message"), [("int4", "kind is 'int4'; there are 'int8'"), ("fp8", "fp8 needs a GPU")]
)
def test_what_there_is_not_is_refused(pipe, kind, message):
    with pytest.raises(ValueError, match=message):
        fl.speed.quantize(pipe, kind)
    assert not pipe.speedups


@pytest.mark.usefixtures("as_users_run_it")
def test_compiling_is_for_another_size_alone(pipe):
    """One program for each kind of block; none for another prompt, seed or step; one more for all other sizes."""
    torch.compiler.reset()
    counter = CompileCounter()
    plain = painted(pipe), painted(pipe, height=96, width=96)
    with fl.speed.compile(pipe, backend=counter):
        assert far(painted(pipe), plain[0]) == 0
        once = counter.frame_count
        assert once == 2
        painted(pipe, PROMPTS[1], seed=9, num_steps=3)
        assert counter.frame_count == once
        assert far(painted(pipe, height=96, width=96), plain[1]) <= 1
        variable = counter.frame_count
        assert once < variable <= 2 * once + 1  # PyTorch may take the double block twice
        painted(pipe, height=96, width=160)
        assert counter.frame_count == variable
    assert far(painted(pipe), plain[0]) == 0
    assert counter.frame_count == variable


@pytest.mark.usefixtures("as_users_run_it")
def test_capture_on_a_compiled_model_sees_all(pipe):
    torch.compiler.reset()
    with fl.capture(pipe.model, "double_blocks.1.*") as plain:
        painted(pipe, num_steps=2)
    with fl.speed.compile(pipe, backend="eager"):
        painted(pipe, num_steps=2)
        with fl.capture(pipe.model, "double_blocks.1.*") as found:
            painted(pipe, num_steps=2)
    assert [*found] == [*plain]
    assert all(torch.equal(found.stack(name), plain.stack(name)) for name in plain)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("together", [c for n in (2, 3, 4) for c in combinations(PUT, n)], ids="+".join)
def test_they_go_together(pipe, together):
    torch.compiler.reset()
    plain = painted(pipe)
    alone = plain
    handles = []
    for name in together:
        handles.append(PUT[name](pipe))
        if name in ("quantize", "cache_steps"):
            alone = None  # other pictures, if only a little
    found = painted(pipe)
    assert np.abs(found - plain).mean() < 3
    if alone is not None:
        assert far(found, plain) <= 1
    if "cache_steps" in together:
        assert handles[-1].skipped > 0
    for handle in reversed(handles):
        handle.undo()
    assert far(painted(pipe), plain) == 0
    assert not pipe.speedups


@pytest.mark.parametrize(
    ("first", "second"), [(a, b) for a, b in permutations(PUT, 2) if [*PUT].index(a) > [*PUT].index(b)]
)
def test_another_order_is_refused(pipe, first, second):
    with PUT[first](pipe):
        with pytest.raises(ValueError, match=f"{first} is on this pipeline already, and {second} comes before it"):
            PUT[second](pipe)
        assert len(pipe.speedups) == 1


@pytest.mark.parametrize("name", PUT)
def test_twice_is_refused_and_so_is_undoing_in_another_order(pipe, name):
    handle = PUT[name](pipe)
    with pytest.raises(ValueError, match="undo that first"):
        PUT[name](pipe)
    if name != "cache_steps":
        last = PUT["cache_steps"](pipe)
        with pytest.raises(ValueError, match=f"cache_steps was put on after {name}; undo that first"):
            handle.undo()
        last.undo()
    handle.undo()
    with pytest.raises(ValueError, match="is off already"):
        handle.undo()


@pytest.mark.parametrize("name", ["compile", "modulation_ahead", "cache_steps"])
def test_a_copy_that_would_run_the_originals_weights_is_refused(pipe, name):
    inputs = pipe.prepare([PROMPTS[0]], [0], 128, 128)
    with PUT[name](pipe), PUT["cache_steps"](pipe) if name != "cache_steps" else nullcontext():
        for run in (copy.deepcopy, lambda model: fl.compare(model, model, inputs), lambda _: copy.deepcopy(pipe)):
            with pytest.raises(ValueError, match="with a speed-up on cannot be copied or pickled: undo it first"):
                run(pipe.model)
        with pytest.raises(ValueError, match="with a speed-up on cannot be copied or pickled: undo it first"):
            copy.deepcopy(pipe.model.double_blocks[0])
        with fl.capture(pipe.model, ["vec", "velocity"]) as tape:
            pipe.model(**inputs.kwargs())
        assert fl.compare(pipe.model, tape, inputs).first is None  # one beside a tape is not copied
    changed = copy.deepcopy(pipe.model)
    changed.double_blocks[1].img_mlp[0].bias.data += 1
    assert fl.compare(pipe.model, changed, inputs).first == "double_blocks.1.img_mlp.0"


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("name", ["compile", "cache_steps"])
def test_a_model_compiled_whole_goes_with_quantize_and_ahead(pipe, name):
    torch.compiler.reset()
    plain = painted(pipe)
    with fl.speed.quantize(pipe), fl.speed.compile(pipe, whole=True, backend="eager"):
        assert np.abs(painted(pipe) - plain).mean() < 3
    counter = CompileCounter()
    with fl.speed.compile(pipe, whole=True, backend=counter), fl.speed.modulation_ahead(pipe):
        assert far(painted(pipe), plain) <= 1
        assert counter.frame_count == 1
        assert far(painted(pipe, num_steps=3), painted(pipe, num_steps=3)) == 0
        assert counter.frame_count == 1
    with fl.speed.compile(pipe, whole=True, backend="eager"):
        assert far(painted(pipe), plain) == 0
        with pytest.raises(ValueError, match="undo that first"):
            PUT[name](pipe)


@pytest.mark.parametrize("threshold", [-1, float("nan"), float("inf"), "0.1"])
@pytest.mark.usefixtures("as_users_run_it")
def test_no_such_threshold(pipe, threshold):
    with pytest.raises(ValueError, match="threshold is"):
        fl.speed.cache_steps(pipe, threshold)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("name", PUT)
def test_a_model_is_no_pipeline(pipe, name):
    with pytest.raises(ValueError, match=r"pipe is a Flux; give the pipeline that fl\.load makes"):
        PUT[name](pipe.model)


def test_sharding_one_process_is_refused(pipe):
    with pytest.raises(ValueError, match="this is one process; start several: torchrun"):
        fl.speed.shard(pipe)


def test_sharding_what_is_on_the_disk_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="weights are not in memory: low_memory has them come one by one; load with"):
        fl.speed.shard(fl.load("flux-tiny-dev", low_memory=True))


def test_quantizing_that_fails_changes_nothing(pipe, monkeypatch):
    real, plain = torchao.quantization.quantize_, painted(pipe, num_steps=2)

    def fails(model, config, chosen):
        real(model.double_blocks, config)
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(torchao.quantization, "quantize_", fails)
    with pytest.raises(torch.OutOfMemoryError):
        fl.speed.quantize(pipe)
    assert not pipe.speedups
    assert far(painted(pipe, num_steps=2), plain) == 0


def torchrun(folder, *arguments, number=2, module=("-m", "fluxlab")):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *module, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )


def test_two_processes_paint_the_same_picture(pipe, tmp_path):
    arguments = ["generate", PROMPTS[0], "--steps", "4", "--output", str(tmp_path / "x.png")]
    ran = torchrun(tmp_path, *arguments)
    assert ran.returncode == 0, ran.stderr
    assert far(np.asarray(Image.open(tmp_path / "x.png")).astype(int)[None], painted(pipe, seed=0, num_steps=4)) <= 1
    assert Image.open(tmp_path / "x.png").info["speed"] == "shard over 2 processes"
    assert ran.stdout.count("128 x 128 pixels") == 1


SCRIPT = """
import os, sys
import numpy as np, torch
import fluxlab as fl
from PIL import Image
pipe = fl.load("flux-tiny-dev", lora={{{lora!r}: 1.0}})
edges = Image.new("RGB", (128, 128))
def paint():
    return np.asarray(pipe({prompt!r}, control=edges, num_steps=8, seed=3, progress=False)).astype(int)
plain, held = paint(), sum(p.numel() for p in pipe.model.parameters())
blocks = sum(p.numel() for b in (*pipe.model.double_blocks, *pipe.model.single_blocks) for p in b.parameters())
def raises(do, words):
    try:
        do()
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)
def half():
    own = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in pipe.model.parameters())
    assert abs(own - (held - blocks / 2)) < 0.01 * held, (own, held, blocks)
def fresh():
    return pipe.add_lora({{{lora!r}: 1.0}})
def narrow():
    return np.asarray(pipe({prompt!r}, num_steps=2, seed=3, progress=False)).astype(int)
pipe.lora.merge()
raises(lambda: fl.speed.shard(pipe), "a LoRA is merged into the weights")
pipe.lora.undo()
base = narrow()
with fresh(), fl.speed.shard(pipe):
    assert pipe.model.config.in_channels == 128
assert pipe.model.config.in_channels == 64 and not pipe.loras
assert abs(narrow() - base).max() == 0
pipe.lora = fresh()
handle = fl.speed.shard(pipe)
half()
assert abs(paint() - plain).max() <= 1
half()  # what a block got from the other process is dropped after it
raises(lambda: pipe.to(torch.bfloat16), "the weights are divided among processes")
raises(lambda: fl.load_weights(pipe.model, pipe.files.transformer), "the weights are divided among processes")
raises(lambda: pipe.lora.merge(), "keep the LoRA apart")
with fl.speed.modulation_ahead(pipe), fl.speed.cache_steps(pipe, 0.3) as cached:
    assert abs(paint() - plain).mean() < 3 and cached.skipped
half()
handle.undo()
assert abs(paint() - plain).max() == 0
assert [pipe.lora] == pipe.loras and pipe.lora.on
pipe.lora.undo()
assert pipe.model.config.in_channels == 64
before = np.asarray(pipe({prompt!r}, num_steps=2, seed=3, progress=False)).astype(int)
fl.speed.shard(pipe).undo()
assert abs(np.asarray(pipe({prompt!r}, num_steps=2, seed=3, progress=False)).astype(int) - before).max() == 0
assert pipe.text.t5.shared.weight is pipe.text.t5.encoder.embed_tokens.weight
print("fine")
"""


def test_each_process_holds_half_and_it_comes_off_again(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(prompt=PROMPTS[0], lora=str(CANNY)))
    ran = torchrun(tmp_path, module=["script.py"])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("fine") == 2


def test_a_process_that_dies_ends_the_run(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os\nimport fluxlab as fl\nfrom fluxlab.cli import app\n"
        "if os.environ['RANK'] == '1':\n    fl.Pipeline.decode = lambda *_: os._exit(3)\n"
        f"app(['generate', {PROMPTS[0]!r}, '--output', 'x.png', '--steps', '2'])\n"
    )
    ran = torchrun(tmp_path, module=["script.py"])
    assert ran.returncode != 0
    assert "exitcode  : 3" in ran.stderr
    assert "another process of this run ended" in ran.stderr or "SIGTERM" in ran.stderr


@pytest.mark.parametrize("name", ["modulation_ahead", "cache_steps"])
def test_threads_share_a_pipeline(pipe, name):
    plain = [painted(pipe, prompt) for prompt in PROMPTS]
    put = PUT[name] if name == "modulation_ahead" else lambda pipe: fl.speed.cache_steps(pipe, 0.0)
    with put(pipe), ThreadPoolExecutor(2) as pool:
        for found, right in zip(pool.map(lambda prompt: painted(pipe, prompt), PROMPTS * 2), plain * 2, strict=True):
            assert far(found, right) <= 1


def test_nothing_is_skipped_while_something_is_changed(pipe):
    seen = []
    with fl.speed.cache_steps(pipe, 0.3) as cache:
        painted(pipe)
        assert cache.skipped
        with fl.patch(pipe.model, "double_blocks.1.img.output", lambda tensor: seen.append(1) or tensor + 0):
            painted(pipe)
        assert (cache.skipped, len(seen)) == (0, cache.forwards)
        looking = fl.capture(pipe.model, "double_blocks.1.img.output", forwards=[0, 5])
        with pytest.raises(ValueError, match="forwards has 5, which made nothing"), looking:
            painted(pipe, num_steps=20)
        assert cache.skipped


def test_a_negative_prompt_that_is_the_prompt_is_counted(pipe):
    with fl.speed.cache_steps(pipe, 0.0) as cache:
        plain = painted(pipe, "", true_cfg=2.0)
        assert (cache.forwards, cache.skipped) == (16, 0)
    with fl.speed.cache_steps(pipe, 0.3) as cache:
        assert np.abs(painted(pipe, "", true_cfg=2.0) - plain).mean() < 6
        assert cache.forwards == 16
        assert 0 < cache.skipped < 16


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("name", ["modulation_ahead", "cache_steps"])
def test_what_is_missing_is_said_by_the_model(pipe, name):
    given = pipe.prepare([PROMPTS[0]], [0], 128, 128).kwargs() | {"timesteps": None}
    with PUT[name](pipe), pytest.raises(ValueError, match="timesteps is None; give a tensor"):
        pipe.model(**given)


def test_weights_that_were_loaded_meanwhile_stay(pipe):
    """What comes off gives back no weight that is not its own any more."""
    other = data_folder() / "flux-tiny/flux-tiny-kontext-dev.safetensors"
    expected = painted(pipe_of(other))
    for put in (fl.speed.quantize, lambda pipe: fl.speed.modulation_ahead(pipe, release=True)):
        pipe = fl.load("flux-tiny-dev")
        with put(pipe):
            fl.load_weights(pipe.model, other, dtype=torch.float32)
        assert far(painted(pipe), expected) < 1e-9


def pipe_of(file):
    pipe = fl.load("flux-tiny-dev")
    fl.load_weights(pipe.model, file, dtype=torch.float32)
    return pipe


def test_a_lora_that_changes_in_a_loop_is_not_outlived(pipe, tmp_path):
    torch.manual_seed(0)
    strengths = [1.0, 1.0, 0.0, 0.5]
    down, up = torch.randn(2, 128) / 9, torch.randn(768, 2)
    name = "transformer.transformer_blocks.0.norm1.linear"
    fl.files.write_tensors({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "x.safetensors")
    lora = pipe.add_lora({tmp_path / "x.safetensors": 1.0})

    def paint():
        lora.set_strength(tmp_path / "x.safetensors", 1.0)
        told = lambda step: lora.set_strength(tmp_path / "x.safetensors", strengths[step.index])  # noqa: E731
        return painted(pipe, num_steps=4, callback=told)

    expected = paint()
    with fl.speed.modulation_ahead(pipe):
        assert far(paint(), expected) <= 1


def test_what_a_patch_made_is_not_added_again(pipe):
    inputs = pipe.prepare(PROMPTS[:1], [3], 128, 128)

    def run(patched):
        found = []
        for i, t in enumerate((1.0, 0.97, 0.94, 0.91)):
            own = inputs.kwargs() | {"timesteps": torch.tensor([t])}
            change = fl.patch(pipe.model, "single_blocks.*.output", torch.zeros_like)
            with torch.no_grad(), change if i == 1 and patched else nullcontext():
                found.append(pipe.model(**own))
        return found

    plain = run(False)
    with fl.speed.cache_steps(pipe, 0.3):
        after = run(True)[2:]
    for mine, theirs in zip(after, plain[2:], strict=True):
        assert (mine - theirs).norm() < 0.3 * theirs.norm()


def test_gradients_reach_through_what_was_prepared(pipe):
    inputs = pipe.prepare(PROMPTS[:1], [3], 128, 128)
    with fl.speed.modulation_ahead(pipe):
        painted(pipe)
        y = inputs.y.clone().requires_grad_()
        pipe.model(**inputs.kwargs() | {"y": y, "timesteps": torch.tensor([1.0])}).sum().backward()
    assert y.grad is not None
    assert y.grad.abs().max() > 0


def test_ahead_goes_on_after_inference_mode(pipe):
    expected = painted(pipe)
    with fl.speed.modulation_ahead(pipe):
        with torch.inference_mode():
            first = painted(pipe)
        assert np.abs(first - expected).max() <= 1
        assert np.abs(painted(pipe) - expected).max() <= 1


def test_an_error_takes_off_what_came_later_too(pipe):
    def fails():
        with fl.speed.quantize(pipe):
            fl.speed.cache_steps(pipe, 0.1)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fails()
    assert not pipe.speedups


@pytest.mark.parametrize("name", ["modulation_ahead", "cache_steps", "compile"])
def test_a_model_with_a_speedup_is_not_pickled(pipe, name):
    with PUT[name](pipe), pytest.raises(ValueError, match="cannot be copied or pickled: undo it first"):
        pickle.dumps(pipe.model)
    assert len(pickle.dumps(pipe.model)) > 1e6


def test_compiling_says_that_a_lora_is_to_be_merged(pipe):
    lora = pipe.add_lora({CANNY: 1.0})
    with pytest.warns(UserWarning, match="merge it before compiling"), fl.speed.compile(pipe, backend="eager"):
        pass
    lora.merge()
    with warnings.catch_warnings(action="error"), fl.speed.compile(pipe, backend="eager"):
        pass


def test_weights_loaded_in_a_loop_are_not_outlived(pipe):
    """Neither by what was computed ahead, nor by what was kept of the last forward."""
    other = data_folder() / "flux-tiny/flux-tiny-kontext-dev.safetensors"
    inputs = pipe.prepare(PROMPTS[:1], [3], 128, 128).kwargs() | {"timesteps": torch.tensor([1.0])}
    with torch.no_grad():
        expected = pipe_of(other).model(**inputs)
        for put in (fl.speed.modulation_ahead, lambda pipe: fl.speed.cache_steps(pipe, 9.0)):
            own = fl.load("flux-tiny-dev")
            with put(own):
                painted(own)
                own.model(**inputs)
                fl.load_weights(own.model, other, dtype=torch.float32)
                later = own.model(**inputs | {"timesteps": torch.tensor([0.999])})
                assert (own.model(**inputs) - expected).norm() < 1e-4 * expected.norm()
                assert (later - expected).norm() < 0.1 * expected.norm()


def test_loading_one_layer_leaves_the_others_streaming():
    low = fl.load("flux-tiny-dev", low_memory=True)
    expected = painted(low)
    block = low.model.double_blocks[0]
    block.load_state_dict({n: torch.zeros(p.shape) for n, p in block.state_dict().items()}, assign=True)
    assert far(painted(low), expected) < 1e-9
    with pytest.raises(ValueError, match="cannot be copied or pickled: load it again"):
        pickle.dumps(low.model)


def test_a_path_with_a_space_is_told_before_the_compiler_fails(pipe, monkeypatch):
    """Its linker takes the two halves for two files."""
    monkeypatch.setattr(torch, "__file__", "/home/me/flux lab/torch/__init__.py")
    with pytest.warns(UserWarning, match="flux lab.*its compiler may fail; install it elsewhere"):
        fl.speed.compile(pipe).undo()
    with warnings.catch_warnings(action="error"), fl.speed.compile(pipe, backend="eager"):
        pass


def test_what_is_on_the_disk_is_neither_compiled_nor_quantized():
    pipe = fl.load("flux-tiny-dev", low_memory=True)
    for put in (fl.speed.quantize, fl.speed.compile, lambda pipe: fl.speed.compile(pipe, whole=True)):
        with pytest.raises(ValueError, match="weights are not in memory: low_memory has them come one by one"):
            put(pipe)
    assert not pipe.speedups


def test_float64_is_not_quantized():
    pipe = fl.load("flux-tiny-dev", dtype=torch.float64)
    with pytest.raises(ValueError, match="the weights are float64, which torchao does not take"):
        fl.speed.quantize(pipe)


@pytest.mark.usefixtures("as_users_run_it")
def test_sharding_takes_minutes_above_0(pipe):
    for minutes in (0, -1, "10", float("nan")):
        with pytest.raises(ValueError, match=r"minutes is .*; give a number above 0"):
            fl.speed.shard(pipe, minutes)


def test_a_handle_that_is_off_is_not_put_on_again(pipe):
    handle = fl.speed.modulation_ahead(pipe)
    handle.undo()
    with pytest.raises(ValueError, match="modulation_ahead is off already; put it on anew"), handle:
        pass


@pytest.mark.usefixtures("as_users_run_it")
def test_a_threshold_of_numpy_is_a_number(pipe):
    with fl.speed.cache_steps(pipe, np.float32(0.3)) as cache:
        painted(pipe)
        assert cache.skipped


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: {"y": inputs.y[:, :5]}, "y has shape"),
        (lambda inputs: {"txt": inputs.txt.bfloat16()}, "txt is .*bfloat16"),
    ],
)
def test_a_loop_with_modulation_ahead_checks_its_inputs_as_one_without(pipe, change, message):
    inputs, times = pipe.prepare([PROMPTS[0]], [0], 64, 64, 3.5), schedule(2, 16)
    plain = fl.denoise(pipe.model, inputs, times, progress=False)
    bad = replace(inputs, **change(inputs))
    with pytest.raises(ValueError, match=message):
        fl.denoise(pipe.model, bad, times, progress=False)
    with fl.speed.modulation_ahead(pipe):
        with pytest.raises(ValueError, match=message):
            fl.denoise(pipe.model, bad, times, progress=False)
        found = fl.denoise(pipe.model, replace(inputs, timesteps=None), times, progress=False)
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_other_weights_under_a_release_are_refused_before_any_is_set(pipe):
    before = {name: tensor.clone() for name, tensor in pipe.model.state_dict().items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    with fl.speed.modulation_ahead(pipe, release=True):
        with pytest.raises(ValueError, match="modulations' weights stay in their file and take no others"):
            pipe.model.load_state_dict(zeros)
        found = pipe.model.state_dict()
        assert all(found[name].is_meta or torch.equal(found[name], tensor) for name, tensor in before.items())
    pipe.model.load_state_dict(zeros)


@pytest.mark.usefixtures("as_users_run_it")
def test_weights_loaded_into_a_compiled_model_are_heard_of():
    """torch.compile puts another module around it; the loop goes on with the new weights."""
    other = data_folder() / "flux-tiny/flux-tiny-kontext-dev.safetensors"

    def loaded(put):
        pipe = fl.load("flux-tiny-dev")
        pipe.model = torch.compile(pipe.model, backend="eager")

        def callback(step):
            if step.index == 2:
                fl.load_weights(pipe.model, other, dtype=torch.float32)

        with put(pipe):
            return painted(pipe, callback=callback)

    assert far(loaded(fl.speed.modulation_ahead), loaded(lambda _: nullcontext())) <= 1
    torch._dynamo.reset()


def test_modulation_ahead_whatever_torchs_default_dtype_is(pipe):
    pipe.to(torch.bfloat16)
    plain = painted(pipe)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with fl.speed.modulation_ahead(pipe):
            assert np.abs(painted(pipe) - plain).mean() < 3
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("release", [False, True])
def test_a_model_without_guidance_paints_again_and_after_it(release):
    pipe = fl.load("flux-tiny-schnell")
    options = {"num_steps": 2, "height": 64, "width": 64, "progress": False}
    plain = [pipe(words, **options).tobytes() for words in ("a red circle", "a blue star")]
    with fl.speed.modulation_ahead(pipe, release=release):
        for _ in range(2):
            pipe("a red circle", **options)
            pipe("a blue star", **options)
    assert [pipe(words, **options).tobytes() for words in ("a red circle", "a blue star")] == plain
