"""LoRA on a model: kept apart from its weights, or merged into them, and taken off again. Opened in chapter 15.

A LoRA adds ``strength * alpha / rank * up(down(x))`` to what a Linear gives (Hu et al. 2021, arXiv:2106.09685).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fluxlab.arguments import is_number
from fluxlab.files import WeightsError, at
from fluxlab.weights.dialects import Change, read_lora


class Lora:
    """LoRA files on a model, at first kept apart from its weights. A context manager: ``undo`` when it is left.

    Where several that are on replace one norm's scale, the last that was put on counts. What wraps a layer's forward
    too, as accelerate's offloading, comes off after them, if it went on before.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], files: Mapping[Any, float], among: list[Lora] | None = None
    ) -> None:
        """Of modules by part, "transformer", "clip" and "t5"; and of files, each with its strength, usually 0 to 1.

        ``among``: a list that it stands in while it is on.

        Raises:
            WeightsError: a file cannot be read, or does not fit the modules, or widens a model that another widened;
                nothing is changed then.
            ValueError: a strength is no finite number, or a file is named twice.
        """
        if not isinstance(files, Mapping) or len({str(file) for file in files}) < len(files):
            raise ValueError(f"files is {files!r}; give each file once, with its strength, as {{'x.safetensors': 1}}")
        self.strengths = {str(file): _checked(file, strength) for file, strength in files.items()}
        self.merged = False
        self._modules: dict[str, Any] = {part: getattr(module, "_orig_mod", module) for part, module in modules.items()}
        self._model = self._modules["transformer"]
        self._among = [] if among is None else among
        self._changes: dict[Any, list[tuple[str, Change]]] = defaultdict(list)
        self._scales: dict[Any, Tensor] = {}  # of norms, which BFL's files replace
        self._before: list[Callable[[], None]] = []  # each gives one thing back
        self._set_to: list[tuple[Any, str, object]] = []
        for file in self.strengths:
            changes, scales = read_lora(at(file), self._modules)
            if self._scales.keys() & scales:
                raise WeightsError(f"{file}: replaces the scales of norms, as another of the files does; give one")
            self._scales |= scales
            for change in changes:  # which is its layer's from here on, wherever that moves
                self._changes[change.layer].append((file, replace(change, layer=None)))
        if self._columns() > self._model.img_in.in_features < self._model.config.in_channels:
            said = "another LoRA that is on widens img_in, as these do; take that off, or give all files at once"
            raise WeightsError(f"{', '.join(self.strengths)}: {said}")
        self._put()

    def _put(self) -> None:
        """Put all on, apart from the weights."""
        for layer, of_layer in self._changes.items():  # not in hooks: who looks at a layer's output sees the sum
            self._wrap(layer, partial(_sum, layer, of_layer, self.strengths))
        for norm, scale in self._scales.items():
            self._wrap(norm, partial(_with_scale, scale))
        self._widen()
        self._changed()

    def move(self, modules: Mapping[str, nn.Module]) -> None:
        """Take all off, and put them on other modules that have the same layers, apart from their weights."""
        self.undo()
        new: dict[Any, Any] = {}
        for part, module in modules.items():
            new |= {layer: module.get_submodule(name) for name, layer in self._modules[part].named_modules()}
        self._changes = {new.get(layer, layer): changes for layer, changes in self._changes.items()}
        self._scales = {new.get(norm, norm): scale for norm, scale in self._scales.items()}
        self._modules |= modules
        self._model = self._modules["transformer"]
        self._put()

    @property
    def on(self) -> bool:
        """Whether they are on the model, apart or merged."""
        return bool(self._before)

    def set_strength(self, file: str | Path, strength: float) -> None:
        """Change how much of a file is added. Scales of norms that it replaces are its own at any strength.

        Raises:
            ValueError: the strength is no finite number, there is no such file here, they were taken off, or weights
                were changed since.
        """
        if str(file) not in self.strengths:
            raise ValueError(f"{str(file)!r} is none of these LoRAs: {', '.join(self.strengths)}")
        if not self.on:
            raise ValueError("these LoRAs were taken off; merge() puts them on again")
        before, self.strengths[str(file)] = self.strengths[str(file)], _checked(file, strength)
        if self.merged:
            try:
                self.merge()
            except ValueError:
                self.strengths[str(file)] = before
                raise
        self._changed()

    def merge(self) -> None:
        """Add all to the weights, in float32 and rounded once.

        The weights from before are kept for ``undo``, which takes memory where they are not mapped to their file.

        Raises:
            WeightsError: weights are quantized, divided or not in memory; nothing is changed then.
            ValueError: weights were changed since.
        """
        for layer in self._changes:
            kind = type(layer.weight)
            if layer.weight.is_meta or kind is not nn.Parameter or not layer.weight.is_floating_point():
                said = f"a weight is a {kind.__name__}, {layer.weight.dtype} on {layer.weight.device}"
                raise WeightsError(f"{said}, which nothing can be added to; keep the LoRA apart")
        self.undo()
        try:
            self._add()
        except BaseException:  # such as too little memory
            self.undo()
            raise
        self.merged = True
        self._changed()

    def _add(self) -> None:
        """Put all into the weights."""
        for layer, changes in self._changes.items():
            extra = max(0, max(change.down.shape[1] for _, change in changes) - layer.in_features)
            weight = F.pad(layer.weight, (0, extra)).float()
            bias = None if layer.bias is None else layer.bias.float()
            for file, change in changes:
                by = self.strengths[file] * change.scale
                up, down = change.up.to(weight), change.down.to(weight)
                weight[:, : down.shape[1]].addmm_(up, down, alpha=by)
                if change.bias is not None:
                    bias = by * change.bias.to(weight) + (0 if bias is None else bias)
            self._set(layer, "in_features", layer.in_features + extra)
            self._set(layer, "bias", None if bias is None else _parameter(bias.to(layer.weight)))
            self._set(layer, "weight", _parameter(weight.to(layer.weight)))
        for norm, scale in self._scales.items():
            self._set(norm, "scale", _parameter(scale.to(norm.scale)))
        self._widen()
        changed = self._changes.keys() | self._scales.keys()
        for module in self._modules.values():
            if not changed.isdisjoint(module.modules()):
                hook = partial(_refuse_others, id(module))
                self._before.append(module.register_load_state_dict_pre_hook(hook).remove)

    def undo(self) -> None:
        """Take all off: the weights are again those from before, bit by bit.

        Raises:
            ValueError: weights were changed since; nothing is taken off then.
        """
        if any(getattr(owner, name) is not value for owner, name, value in self._set_to):
            raise ValueError("weights were changed after this LoRA was merged; take off first what was put on last")
        self._set_to.clear()
        while self._before:
            self._before.pop()()
        self.merged = False
        self._changed()

    def _changed(self) -> None:
        """Tell the list of those that are on, and what computes ahead from the weights."""
        if self.on != (self in self._among):
            (self._among.append if self.on else self._among.remove)(self)
        getattr(self._model, "weights_change", lambda: None)()

    def __enter__(self) -> Lora:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        files = ", ".join(f"{file} at {strength:g}" for file, strength in self.strengths.items())
        return f"Lora({files}: {len(self._changes)} layers, {'merged' if self.merged else 'apart'})"

    def _wrap(self, layer: Any, forward: Callable[..., Tensor]) -> None:
        own, on = vars(layer).get("forward"), [True]
        wrapped = partial(_forward, layer, own, on, forward)  # a copy of the layer gets a copy of it, about itself
        layer.forward = wrapped
        self._before.append(partial(_unwrap, layer, own, on, wrapped))

    def _widen(self) -> None:
        """A model that is shown edges or depth beside the noise takes them as more channels."""
        if (columns := self._columns()) > self._model.config.in_channels:
            self._set(self._model, "config", replace(self._model.config, in_channels=columns))

    def _columns(self) -> int:
        """How many channels a token has that ``img_in`` takes with these; 0 where they leave it alone."""
        return max((change.down.shape[1] for _, change in self._changes.get(self._model.img_in, ())), default=0)

    def _set(self, owner: Any, name: str, value: object) -> None:
        self._before.append(partial(_put_back, owner, name, getattr(owner, name)))  # likewise of a copy
        setattr(owner, name, value)
        self._set_to += [(owner, name, value)] if isinstance(value, nn.Parameter) else []


def _forward(layer: Any, own: Any, on: list[bool], forward: Callable[..., Tensor], x: Tensor) -> Tensor:
    inner = own or partial(type(layer).forward, layer)
    return forward(inner, x) if on else inner(x)


def _unwrap(layer: Any, own: Any, on: list[bool], wrapped: Any) -> None:
    on.clear()
    if vars(layer).get("forward") is wrapped:  # else another wrapped it since, and goes on calling this one
        delattr(layer, "forward") if own is None else setattr(layer, "forward", own)


def _put_back(owner: Any, name: str, before: Any) -> None:
    now = getattr(owner, name)
    if isinstance(before, nn.Parameter) and not now.is_meta:
        before.data = before.data.to(now)  # the model may have been moved or cast since
    setattr(owner, name, before)


def _sum(
    layer: Any, changes: list[tuple[str, Change]], strengths: Mapping[str, float], inner: Any, x: Tensor
) -> Tensor:
    another = getattr(inner, "func", None) is _forward  # LoRA, which takes what is its own
    total = inner(x if another else x[..., : layer.in_features])
    for file, change in changes:
        if by := strengths[file] * change.scale:
            bias = None if change.bias is None else change.bias.to(x)
            down = F.linear(x[..., : change.down.shape[1]], change.down.to(x))
            total = total + by * F.linear(down, change.up.to(x), bias)
    return total


def _with_scale(scale: Tensor, inner: Any, x: Tensor) -> Tensor:
    """What an ``RMSNorm`` gives with another scale than its own, which may be elsewhere."""
    return F.rms_norm(x, scale.shape, scale.to(x), eps=1e-6)


def _refuse_others(of: int, module: nn.Module, *_: Any) -> None:
    """A ``ValueError``, as ``undo`` would put the weights from before in place of the new ones; not of a copy."""
    if id(module) == of:
        said = f"a LoRA is merged into this {type(module).__name__}"
        raise ValueError(f"{said}; undo() it before other weights are loaded")


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _checked(file: object, strength: float) -> float:
    if not is_number(strength):
        raise ValueError(f"strength of {file} is {strength!r}; give a finite number, such as 0.8")
    return float(strength)
