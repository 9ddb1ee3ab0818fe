"""A model larger than the memory: a layer's weights come when it runs, and go when it has run. Opened in chapter 15."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fluxlab.files import Tensors


def refuse(said: str, *_: Any) -> None:
    """A ``ValueError`` in place of what a module would do."""
    raise ValueError(said)


def stream(module: nn.Module, tensors: Tensors, device: torch.device | str = "cpu") -> Callable[[], None]:
    """Keep a module's parameters on the meta device, and give each layer its own from ``tensors`` while it runs.

    On a CPU, weights that need no change stay mapped to their file, and others take the memory of one layer. To a GPU
    the next layer's are on their way while one computes: two layers' memory. Threads share what is there. A copy of
    the module, other weights, and layers that are put in and have none are refused. What is returned ends it, and
    leaves the parameters on the meta device.
    """
    hooks: list[RemovableHandle] = []
    device = torch.device(device)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    pool = ThreadPoolExecutor(1) if side else None
    names: dict[nn.Module, dict[str, str]] = {}  # of a layer's parameters: in the layer, and in the module
    coming: dict[nn.Module, Future[dict[str, Tensor]]] = {}
    after: dict[nn.Module | None, nn.Module] = {}  # what ran after what, the last time
    last: nn.Module | None = None
    locks: dict[nn.Module, Lock] = {}
    using: Counter[nn.Module] = Counter()  # forwards, of several threads

    def read(layer: nn.Module) -> dict[str, Tensor]:
        with torch.cuda.stream(side) if side else nullcontext():
            found = {name: tensors[path].to(device) for name, path in names[layer].items()}
        if side:
            side.synchronize()
        return found

    def come(layer: nn.Module, _: Any) -> None:
        nonlocal last
        with locks[layer]:
            waiting = coming.pop(layer, None)
            for name, tensor in (waiting.result() if waiting else {} if using[layer] else read(layer)).items():
                if side:  # its memory is not another's before it is used
                    tensor.record_stream(torch.cuda.current_stream(device))
                setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
            using[layer] += 1
        after[last] = layer
        last = layer
        following = after.get(layer)
        if pool and following is not None and following not in coming:
            coming[following] = pool.submit(read, following)

    def leave(layer: nn.Module, *_: Any) -> None:
        with locks[layer]:
            using[layer] = max(0, using[layer] - 1)
            if not using[layer]:
                go(layer)

    def go(layer: nn.Module) -> None:
        for name, path in names[layer].items():
            setattr(layer, name, nn.Parameter(tensors.entries[path], requires_grad=False))

    def refuse_weights(_: nn.Module, tensors: Any, *__: Any) -> None:
        if tensors:
            raise ValueError("weights that stay in their file take no others in their place; use fl.load_weights")

    def refuse_layers(*_: Any) -> None:
        others = [layer for layer in module.modules() if layer not in names]
        if other := [type(each).__name__ for each in others if any(p.is_meta for p in each.parameters(recurse=False))]:
            said = f"a {other[0]} was put into a model whose weights stay in their file"
            raise ValueError(f"{said}, where it has none of its own; load the model with low_memory=False")

    def stop() -> None:
        for hook in hooks:
            hook.remove()
        for layer in module.modules():
            for name in ("streamed", "__reduce_ex__", "stop_streaming"):
                vars(layer).pop(name, None)

    copied = partial(refuse, "a model whose weights stay in their file cannot be copied or pickled: load it again")
    vars(module)["stop_streaming"] = stop
    hooks.append(module.register_load_state_dict_pre_hook(refuse_weights))
    hooks.append(module.register_forward_pre_hook(refuse_layers))
    for path, layer in module.named_modules():
        vars(layer).update(streamed=True, __reduce_ex__=copied)
        names[layer] = {name: f"{path}.{name}".lstrip(".") for name, _ in layer.named_parameters(recurse=False)}
        if names[layer]:
            locks[layer] = Lock()
            go(layer)
            hooks.append(layer.register_forward_pre_hook(come))
            hooks.append(layer.register_forward_hook(leave, always_call=True))

    return stop
