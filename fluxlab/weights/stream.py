"""A model larger than the memory: a layer's weights come when it runs, and go when it has run. Opened in chapter 15."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fluxlab.files import Tensors


def stream(module: nn.Module, tensors: Tensors, device: torch.device | str = "cpu") -> Callable[[], None]:
    """Keep a module's parameters on the meta device, and give each layer its own from ``tensors`` while it runs.

    On a CPU, weights that need no change stay mapped to their file, and others take the memory of one layer. To a GPU
    the next layer's are on their way while one computes: two layers' memory. It serves one forward at a time, and a
    copy of the module is refused. What is returned ends it, and leaves the parameters on the meta device.
    """
    hooks: list[RemovableHandle] = []
    device = torch.device(device)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    pool = ThreadPoolExecutor(1) if side else None
    names: dict[nn.Module, dict[str, str]] = {}  # of a layer's parameters: in the layer, and in the module
    coming: dict[nn.Module, Future[dict[str, Tensor]]] = {}
    after: dict[nn.Module | None, nn.Module] = {}  # what ran after what, the last time
    last: nn.Module | None = None

    def read(layer: nn.Module) -> dict[str, Tensor]:
        with torch.cuda.stream(side) if side else nullcontext():
            found = {name: tensors[path].to(device) for name, path in names[layer].items()}
        if side:
            side.synchronize()
        return found

    def come(layer: nn.Module, _: Any) -> None:
        nonlocal last
        waiting = coming.pop(layer, None)
        for name, tensor in (waiting.result() if waiting else read(layer)).items():
            if side:
                tensor.record_stream(torch.cuda.current_stream(device))  # its memory is not another's before it is used
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        after[last] = layer
        last = layer
        following = after.get(layer)
        if pool and following is not None and following not in coming:
            coming[following] = pool.submit(read, following)

    def go(layer: nn.Module, *_: Any) -> None:
        for name, path in names[layer].items():
            setattr(layer, name, nn.Parameter(tensors.entries[path], requires_grad=False))

    def refuse_a_copy(_: int) -> None:
        raise ValueError("a model whose weights stay in their file cannot be copied or pickled: load it again")

    def stop() -> None:
        for hook in hooks:
            hook.remove()
        for layer in module.modules():
            vars(layer).pop("streamed", None)
        for name in ("__reduce_ex__", "stop_streaming"):
            vars(module).pop(name, None)

    vars(module).update(__reduce_ex__=refuse_a_copy, stop_streaming=stop)
    for path, layer in module.named_modules():
        vars(layer)["streamed"] = True
        names[layer] = {name: f"{path}.{name}".lstrip(".") for name, _ in layer.named_parameters(recurse=False)}
        if names[layer]:
            go(layer)
            hooks.append(layer.register_forward_pre_hook(come))
            hooks.append(layer.register_forward_hook(go, always_call=True))

    return stop
