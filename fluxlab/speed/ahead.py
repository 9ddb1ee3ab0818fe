"""All modulations of a loop before it begins: what steers the blocks depends on time and prompt, not on the picture."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxlab.files import Tensors
from fluxlab.model.embeddings import timestep_embedding
from fluxlab.model.modulation import Modulation, ModulationOut
from fluxlab.model.observe import observers
from fluxlab.pipeline.inputs import FluxInputs
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.speed.handle import Handle, same
from fluxlab.weights.load import opened
from fluxlab.weights.stream import stream


def modulation_ahead(pipe: Pipeline, release: bool = False) -> Handle:
    """Compute all modulations of a schedule in one product a layer, before the loop; and once what a prompt fixes.

    ``denoise`` tells the model its times and its prompts before the first step. From them come, for each step, the
    vector that steers and all shifts, scales and gates; and once ``txt_in``'s tokens and the rotation. The forward
    knows no step: it is found by its time, among the loops prepared for this prompt, which have the same ``txt``,
    ``y``, ids and guidance. What was not prepared, as several times at once, runs as ever, and so does what is to have
    gradients, and the rest of a loop in which a LoRA changed or weights were loaded. Values differ by rounding,
    since a product of many rows may sum in another order.

    What is not computed in the forward cannot be captured there, and ``capture`` says so: ``time_in``,
    ``guidance_in``, ``vector_in``, ``txt_in`` and the ``lin`` of modulations. Their shifts, scales and gates can. To
    ``patch`` what the modulations were computed from, ``timesteps`` or ``vec``, is an error.

    Args:
        pipe: whose transformer.
        release: whether the weights of the modulations, 27 % of FLUX.1 [dev], leave memory: they stay in their file
            and are read layer by layer for each prompt, once for all its steps.

    Raises:
        ValueError: ``release`` for a pipeline that ``fl.load`` did not read from a file, whose weights are on the disk
            already, or are not the file's any more, as after a LoRA was merged, or in int8.
    """
    handle = Handle(pipe, "modulation_ahead")
    model = pipe.model
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Modulation)]
    layers.append(model.final_layer.adaLN_modulation)
    if release:
        _release(handle, pipe, layers)
    state = _State(model, layers)
    handle.put(model, state.forward)
    handle.put(model, state.begin, "loop_begins")
    handle.put(model, state.forget, "weights_change")
    for module in layers:
        handle.put(module, state.modulation(module))
        handle.later(partial(vars(module).pop, "ready", None))
    return handle.on()


class _Loop:
    """What is fixed for one prompt of a loop: its vectors and modulations, a row for each step and picture."""

    def __init__(self, model: Any, inputs: FluxInputs, times: Sequence[float], layers: list[Any]) -> None:
        self.inputs, self.batch = inputs, len(inputs.img)
        steps = torch.tensor(times[:-1], dtype=torch.float32, device="cpu")
        self.rows = {t: i * self.batch for i, t in enumerate(steps.tolist())}
        number = len(steps)
        each = steps.to(inputs.timesteps.device).repeat_interleave(self.batch)
        vec = model.time_in(timestep_embedding(each).to(inputs.img))
        if model.guidance_in is not None and inputs.guidance is not None:
            vec = vec + model.guidance_in(timestep_embedding(inputs.guidance).to(inputs.img)).repeat(number, 1)
        self.vec = vec + model.vector_in(inputs.y).repeat(number, 1)
        steer = F.silu(self.vec)
        self.table = torch.cat([_product(model, layer, steer) for layer in layers], dim=1)
        self.txt = model.txt_in(inputs.txt)
        self.pe = model.pe_embedder(torch.cat((inputs.txt_ids, inputs.img_ids), dim=1)).to(inputs.img.device)

    def fits(self, inputs: FluxInputs) -> bool:
        """Whether a forward belongs to this loop."""
        fixed = ("txt", "y", "guidance", "img_ids", "txt_ids")
        return all(same(getattr(self.inputs, name), getattr(inputs, name)) for name in fixed)


def _linear(layer: Any) -> nn.Linear:
    return layer.lin if isinstance(layer, Modulation) else layer[1]


def _product(model: Any, layer: Any, steer: Tensor) -> Tensor:
    """A modulation's Linear; where its block is divided among processes, once it has been gathered."""
    sharded = [block for block in (*model.double_blocks, *model.single_blocks) if hasattr(block, "unshard")]
    owner = next((block for block in sharded if layer in set(block.children())), None)
    if owner is not None:
        owner.unshard()
    product = _linear(layer)(steer)
    if owner is not None:
        owner.reshard()
    return product


def _unchanged(name: str, given: Tensor, known: Tensor) -> None:
    """A ``ValueError`` where somebody patched what the answers were computed from: the patch would be ignored."""
    looked_at = not torch.compiler.is_compiling() and observers.get()
    if looked_at and not torch.allclose(given, known, rtol=0, atol=0, equal_nan=True):
        raise ValueError(f"{name} was changed, and modulation_ahead computed ahead what follows from it; undo it first")


class _State:
    """The loops that are prepared, and the step that runs."""

    def __init__(self, model: Any, layers: list[Any]) -> None:
        self.model, self.layers, self.plain = model, layers, model.forward
        self.loops: list[_Loop] = []
        self.active, self.lock = False, RLock()  # what is ready is of one forward at a time
        self.vec = torch.empty(0)  # of the step that runs
        self.now = torch.empty(0)  # the row of the step that runs, at one place, so that compiled blocks find it

    def forget(self) -> None:
        """What was computed with other weights: the rest of a loop runs as ever."""
        with self.lock:
            self.loops = []

    @torch.no_grad()
    @torch.inference_mode(False)  # the rows outlive such a block
    def begin(self, loops: Sequence[FluxInputs], times: Sequence[float]) -> None:
        with self.lock:
            first = [
                torch.full((len(each.img),), times[0], dtype=torch.float32, device=each.img.device) for each in loops
            ]
            loops = [replace(each, timesteps=t) for each, t in zip(loops, first, strict=True)]
            for inputs in loops:
                self.model._check(**vars(inputs))
            self.loops = [_Loop(self.model, inputs, times, self.layers) for inputs in loops]
            row = self.loops[0].table[: self.loops[0].batch]
            if (self.now.shape, self.now.dtype, self.now.device) != (row.shape, row.dtype, row.device):
                self.now = torch.empty_like(row)
                widths = [_linear(layer).out_features for layer in self.layers]
                for layer, part in zip(self.layers, self.now.split(widths, dim=1), strict=True):
                    cut = isinstance(layer, Modulation)
                    layer.ready = part[:, None, :].chunk(layer.multiplier, dim=-1) if cut else part

    def modulation(self, layer: Any) -> Any:
        plain = layer.forward

        def forward(vec: Tensor) -> Any:
            if not self.active:
                return plain(vec)
            _unchanged("vec", vec, self.vec)
            ready: Any = layer.ready
            if not isinstance(layer, Modulation):
                return ready
            seen = [layer.see(name, part) for name, part in zip(layer.names, ready, strict=True)]
            return tuple(ModulationOut(*seen[i : i + 3]) for i in range(0, len(seen), 3))

        return forward

    def forward(self, *args: Any, **given: Any) -> Tensor:
        """The model's own, with functions that know the answer in place of the parts that were computed ahead."""
        inputs = FluxInputs(*args, **given)
        learns = torch.is_grad_enabled() and any(
            each.requires_grad for each in (*self.model.parameters(), *inputs.kwargs().values()) if each is not None
        )
        with self.lock:
            loop = None if learns else next((each for each in self.loops if each.fits(inputs)), None)
            at = set(inputs.timesteps.tolist() if inputs.timesteps is not None else ())
            row = loop.rows.get(at.pop()) if loop and len(at) == 1 else None
            known: dict[str, Any] = {}
            if loop is not None and row is not None and inputs.img.shape == loop.inputs.img.shape:
                vec, text, pe = loop.vec[row : row + loop.batch], loop.txt, loop.pe
                self.now.copy_(loop.table[row : row + loop.batch])
                self.vec = vec

                def time_in(embedded: Tensor) -> Tensor:
                    _unchanged("timesteps", embedded, timestep_embedding(inputs.timesteps).to(embedded))
                    return vec

                known = {"time_in": time_in, "guidance_in": None, "vector_in": lambda _: 0}
                known |= {"txt_in": lambda _: text, "pe_embedder": lambda _: pe}
            own = {name: part for name, part in vars(self.model).items() if name in known}  # None, where it has no part
            try:
                vars(self.model).update(known)  # found before the modules of these names
                self.active = bool(known)
                return self.plain(*args, **given)
            finally:
                self.active = False
                for name in known:
                    del vars(self.model)[name]
                vars(self.model).update(own)


def _release(handle: Handle, pipe: Pipeline, layers: list[Any]) -> None:
    """The modulations' weights from their file, layer by layer."""
    model: Any = pipe.model
    if pipe.files is None:
        raise ValueError("release needs the file that the weights are in; load the pipeline with fl.load")
    paths = {name: module for name, module in model.named_modules() if module in layers}
    own = [f"{path}.{name}" for path, module in paths.items() for name, _ in module.named_parameters()]
    held = dict(model.named_parameters())
    if any(held[name].is_meta for name in own):
        raise ValueError("the weights are on the disk already, as low_memory has them; leave release out")
    tensors = opened(pipe.files.transformer, pipe.variant.transformer, "official", pipe.dtype)
    plain = [name for name in own if type(held[name]) is nn.Parameter]  # as torchao's are not
    if changed := [name for name in own if name not in plain or not torch.equal(tensors[name], held[name].cpu())]:
        raise ValueError(
            f"{changed[0]} is not what its file says, as after a LoRA was merged, or in int8; undo that first"
        )
    handle.later(model.register_load_state_dict_pre_hook(_refuse_others).remove)
    for path, module in paths.items():
        part: Tensors = tensors.renamed({name: f"{path}.{name}" for name in module.state_dict()})
        handle.later(partial(_restore, module, stream(module, part, pipe.device), part, pipe.device))


def _refuse_others(model: nn.Module, tensors: Any, *_: object) -> None:
    """A ``ValueError`` where modulations stay in their file: before the layers ahead of them have the new weights."""
    if tensors and any("stop_streaming" in vars(layer) for layer in model.modules()):
        raise ValueError("the modulations' weights stay in their file and take no others; use fl.load_weights")


def _restore(module: nn.Module, stop: Callable[[], None], tensors: Tensors, device: torch.device | str) -> None:
    if vars(module).get("stop_streaming") is not stop:  # other weights were loaded since
        return
    stop()
    module.load_state_dict({name: tensors[name].to(device) for name in module.state_dict()}, assign=True)
    module.requires_grad_(False)
