"""All modulations of a loop before it begins: what steers the blocks depends on time and prompt, not on the picture."""

from collections.abc import Callable, Sequence
from functools import partial
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
from fluxlab.speed.handle import Handle
from fluxlab.weights.load import weights_of
from fluxlab.weights.stream import stream


def modulation_ahead(pipe: Pipeline, release: bool = False) -> Handle:
    """Compute all modulations of a schedule in one product a layer, before the loop; and once what a prompt fixes.

    ``denoise`` tells the model its times and its prompts before the first step. From them come, for each step, the
    vector that steers and all shifts, scales and gates; and once ``txt_in``'s tokens and the rotation. The forward
    knows no step: it is found by its time, among the loops prepared for this prompt, which have the same ``txt``,
    ``y``, ids and guidance. What was not prepared, as several times at once, runs as ever. Values differ by rounding,
    since a product of many rows may sum in another order.

    What is not computed in the forward cannot be captured there, and ``capture`` says so: ``time_in``,
    ``guidance_in``, ``vector_in``, ``txt_in`` and the ``lin`` of modulations. Their shifts, scales and gates can.

    Args:
        pipe: whose transformer.
        release: whether the weights of the modulations, 27 % of FLUX.1 [dev], leave memory: they stay in their file
            and are read layer by layer for each prompt, once for all its steps.

    Raises:
        ValueError: ``release`` for a pipeline that ``fl.load`` did not read from a file, whose weights are on the disk
            already, or are not the file's any more, as after a LoRA was merged.
    """
    handle = Handle(pipe, "modulation_ahead", "modulation_ahead")
    model = pipe.model
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Modulation)]
    layers.append(model.final_layer.adaLN_modulation)
    if release:
        _release(handle, pipe, layers)
    state = _State(model, layers)
    for whole in (on for on in pipe.speedups if on.kind == "compile whole"):
        state.rest = torch.compile(state.tokens, **whole.options)
    handle.put(model, state.forward)
    for module in layers:
        handle.put(module, state.modulation(module))
    model.loop_begins = state.begin  # type: ignore[assignment]
    handle.later(lambda: delattr(model, "loop_begins"))
    return handle.on()


class _Loop:
    """What is fixed for one prompt of a loop: its vectors and modulations, a row for each step and picture."""

    def __init__(self, model: Any, inputs: FluxInputs, times: Sequence[float], layers: list[Any]) -> None:
        self.inputs, self.batch = inputs, len(inputs.img)
        steps = torch.tensor(times[:-1], dtype=torch.float32)
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

    def fits(self, **given: Tensor | None) -> bool:
        """Whether a forward is of this loop."""
        for name, tensor in given.items():
            own = getattr(self.inputs, name)
            if own is tensor:
                continue
            if own is None or tensor is None or own.shape != tensor.shape or not torch.equal(own, tensor):
                return False
        return True


def _product(model: Any, layer: Any, steer: Tensor) -> Tensor:
    """A modulation's Linear; where its block is divided among processes, once it has been gathered."""
    sharded = [block for block in (*model.double_blocks, *model.single_blocks) if hasattr(block, "unshard")]
    owner = next((block for block in sharded if layer in set(block.children())), None)
    if owner is not None:
        owner.unshard()
    product: Tensor = (layer.lin if isinstance(layer, Modulation) else layer[1])(steer)
    if owner is not None:
        owner.reshard()
    return product


class _State:
    def __init__(self, model: Any, layers: list[Any]) -> None:
        self.model, self.layers, self.plain = model, layers, model.forward
        self.loops: list[_Loop] = []
        self.rest = self.tokens
        self.active = False
        self.now = torch.empty(0)  # the row of the step that runs, at one place, so that compiled blocks find it

    @torch.no_grad()
    def begin(self, loops: Sequence[FluxInputs], times: Sequence[float]) -> None:
        self.loops = [_Loop(self.model, inputs, times, self.layers) for inputs in loops]
        table, batch = self.loops[0].table, self.loops[0].batch
        if self.now.shape != (batch, table.shape[1]) or (self.now.dtype, self.now.device) != (
            table.dtype,
            table.device,
        ):
            self.now = table.new_empty(batch, table.shape[1])
            widths = [(layer.lin if isinstance(layer, Modulation) else layer[1]).out_features for layer in self.layers]
            for module, part in zip(self.layers, self.now.split(widths, dim=1), strict=True):
                parts = part[:, None, :].chunk(getattr(module, "multiplier", 1), dim=-1)
                steers = tuple(ModulationOut(*parts[i : i + 3]) for i in range(0, len(parts), 3) if len(parts) > 1)
                module.ready = steers or part

    def modulation(self, module: Any) -> Any:
        plain = module.forward

        def forward(vec: Tensor) -> Any:
            if not self.active:
                return plain(vec)
            if torch.compiler.is_compiling() or not observers.get() or not isinstance(module, Modulation):
                return module.ready
            outs: Any = module.ready
            parts = [part for out in outs for part in out]
            seen = [module.see(name, part) for name, part in zip(module.names, parts, strict=True)]
            return tuple(ModulationOut(*seen[i : i + 3]) for i in range(0, len(seen), 3))

        return forward

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        model = self.model
        fixed = {"txt": txt, "y": y, "guidance": guidance, "img_ids": img_ids, "txt_ids": txt_ids}
        loop = next((each for each in self.loops if each.fits(**fixed)), None)
        at = set(timesteps.tolist())
        row = loop.rows.get(at.pop()) if loop and len(at) == 1 else None
        if loop is None or row is None or img.shape != loop.inputs.img.shape:
            return self.plain(img, img_ids, txt, txt_ids, timesteps, y, guidance)
        rows = slice(row, row + loop.batch)
        self.now.copy_(loop.table[rows])
        self.active = True
        try:
            img, _ = model.see("img", img), model.see("timesteps", timesteps)
            return self.rest(img, loop.txt, model.see("vec", loop.vec[rows]), model.see("pe", loop.pe))
        finally:
            self.active = False

    def tokens(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        """The rest of the forward."""
        model = self.model
        img = model.img_in(img)
        for block in model.double_blocks:
            img, txt = block(img, txt, vec, pe)
        x = torch.cat((txt, img), dim=1)
        for block in model.single_blocks:
            x = block(x, vec, pe)
        return model.see("velocity", model.final_layer(x[:, txt.shape[1] :], vec))


def _release(handle: Handle, pipe: Pipeline, layers: list[Any]) -> None:
    """The modulations' weights from their file, layer by layer."""
    model = pipe.model
    if pipe.files is None:
        raise ValueError("release needs the file that the weights are in; load the pipeline with fl.load")
    paths = {name: module for name, module in model.named_modules() if module in layers}
    own = [f"{path}.{name}" for path, module in paths.items() for name, _ in module.named_parameters()]
    held = dict(model.named_parameters())
    if any(held[name].is_meta for name in own):
        raise ValueError("the weights are on the disk already, as low_memory has them; leave release out")
    tensors = weights_of(model, pipe.files.transformer, pipe.dtype)
    if changed := [name for name in own if not torch.equal(tensors[name], held[name].cpu())]:
        raise ValueError(f"{changed[0]} is not what its file says, as after a LoRA was merged; undo that first")

    for path, module in paths.items():
        part: Tensors = tensors.renamed({name: f"{path}.{name}" for name in module.state_dict()})
        handle.later(partial(_restore, module, stream(module, part, pipe.device), part, pipe.device))


def _restore(module: nn.Module, stop: Callable[[], None], tensors: Tensors, device: torch.device | str) -> None:
    stop()
    module.load_state_dict({name: tensors[name].to(device) for name in module.state_dict()}, assign=True)
    module.requires_grad_(False)
