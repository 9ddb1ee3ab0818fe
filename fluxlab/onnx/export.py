"""FLUX as ONNX files: to look at, without weights, or to run, with them. Opened in chapter 13."""

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fluxlab.arguments import cast, is_finite, whole
from fluxlab.config import VERSION, Variant, variant
from fluxlab.extras import importing, quiet
from fluxlab.files import Tensors, at, check_plain, describe_difference, replacing
from fluxlab.weights.find import Files, find_files
from fluxlab.weights.load import autoencoder_config, empty_encoder, load_weights, opened

Part = Literal["transformer", "double_block", "single_block", "encoder", "decoder", "t5", "clip"]
PARTS: tuple[Part, ...] = get_args(Part)
GRAPHS: dict[str, tuple[str, Part]] = {  # those in exported/, without weights, to open in Netron
    "flux-dev.onnx": ("flux-dev", "transformer"),
    "flux-schnell.onnx": ("flux-schnell", "transformer"),
    "flux-fill-dev.onnx": ("flux-fill-dev", "transformer"),
    "flux-canny-dev.onnx": ("flux-canny-dev", "transformer"),
    "flux-kontext-dev.onnx": ("flux-kontext-dev", "transformer"),
    "flux-dev-double-block.onnx": ("flux-dev", "double_block"),
    "flux-dev-single-block.onnx": ("flux-dev", "single_block"),
    "vae-encoder.onnx": ("flux-dev", "encoder"),
    "vae-decoder.onnx": ("flux-dev", "decoder"),
}
_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_VAE = ("encoder", "decoder")
_EMBED = 0.25e9  # bytes of weights that are kept inside the file: a message is held twice while it is written
_ALIGN = 4096  # bytes: a weight in a file of its own starts at a multiple, so that it can be mapped


def export_onnx(
    name: str,
    path: str | Path,
    part: Part = "transformer",
    *,
    weights: bool | Mapping[str, Tensor] = False,
    source: str | Path | None = None,
    dtype: str = "float32",
    opset: int = 23,
    flat: bool = False,
    quantize: str | None = None,
) -> None:
    """Write a part of a model as an ONNX file.

    Each kind of block, and of part inside it, is one local function, called with its weights by their official names:
    the whole transformer of FLUX.1 is 70 nodes. Without weights the file has every name, dtype and shape, and
    says that the numbers are in a file beside it, ``{path}.weights``, which is not written; with weights it runs. Above
    250 MB they are written to that file, a tensor at a time. The text encoders are written by PyTorch's exporter, above
    1.5 GiB with their weights in ``{path}.data``.

    Args:
        name: of the variant.
        path: of the file to write.
        part: which part. The text encoders, t5 and clip, are not written as functions, and only with their weights.
        weights: whether to write the numbers too, from the variant's files; or the tensors themselves, by their names
            in the part's ``state_dict``, in which a LoRA is once it is merged.
        source: where the weights are, as ``fl.load`` takes it.
        dtype: of weights and features: float32, float16 or bfloat16, which onnxruntime runs on GPUs alone.
        opset: 23 or 24 has norms, rotation and attention as single operators; 17 to 22 spell them out. The text
            encoders are written from 18 on.
        flat: put the functions' nodes in their callers' places, for tools that know no functions. Quantizers need it:
            onnxruntime's, given functions, quantizes nothing and does not say so.
        quantize: "int8": the weights of products in 8 bits and products of integers, by onnxruntime's
            ``quantize_dynamic``; of a flat graph in opset 17, which it sets, and float32, with its numbers, below 2 GB.
            Not of the text encoders.

    Raises:
        ConfigError: no such variant.
        ValueError: no such part, dtype or opset; text encoders without weights, or quantized; a source and no weights;
            weights that do not fit, are not finite, or are too large for the dtype; a transformer without biases of q,
            k and v, or a VAE in bfloat16 below opset 22.
        WeightsError: weights that are asked for are not found.
        FileNotFoundError: there is no folder to write to.
        IsADirectoryError: ``path`` is a folder.
        FileExistsError: without weights, where those of another export lie beside.
        OSError: the file cannot be written.
    """
    chosen = variant(name)
    for given, said, known in ((part, "part", PARTS), (dtype, "dtype", tuple(_TORCH))):
        if given not in known:
            raise ValueError(f"{said} is {given!r}; it is one of {', '.join(known)}")
    whole("opset", opset, 17, 24)
    target = at(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: there is no folder {target.parent}")
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; give the path of a file in it")
    if not isinstance(weights, bool | Mapping):
        raise ValueError(f"weights is a {type(weights).__name__}; give True, False, or tensors by their names")
    if part in ("t5", "clip"):
        if weights is not True:
            raise ValueError(f"part {part!r} is traced from the encoder on disk; ask for weights=True")
        if opset < 18:
            said = "is traced by PyTorch's exporter, which writes 18 and later"
            raise ValueError(f"opset is {opset}; part {part!r} {said}")
        if quantize is not None:
            raise ValueError(f"quantize is {quantize!r}; the text encoders, such as {part!r}, are not quantized")
        return _write_text_encoder(chosen, part, find_files(chosen, source), _TORCH[dtype], opset, target)
    if quantize is not None:
        if quantize != "int8" or not weights or dtype != "float32":
            said = f"quantize is {quantize!r}, weights {'given' if weights else weights} and dtype {dtype!r}"
            raise ValueError(f"{said}; quantize='int8' goes with weights, and with dtype float32")
        flat, opset = True, 17
    vae = part in _VAE
    if dtype == "bfloat16" and vae and opset < 22:
        raise ValueError(f"dtype is 'bfloat16' and opset {opset}; ONNX's convolutions take it from 22 on")
    if source is not None and weights is not True:
        raise ValueError("source says where weights are, and none are read from it; ask for weights=True")
    file = None
    if weights is True or (chosen.embedded and vae):  # the VAE's file tells scale and shift
        of = "autoencoder" if vae else "transformer"
        alone = source is not None and at(source).is_file()
        file = at(source or "") if alone else getattr(find_files(chosen, source), of)
    model = _structure(chosen, part, file, dtype, opset)
    if quantize and (size := 4 * sum(math.prod(tensor.dims) for tensor in model.graph.initializer)) >= 2e9:
        said = f"the {part} of {name} has {size / 1e9:.0f} GB of numbers, where onnxruntime's quantizer takes 2"
        raise ValueError(f"quantize is {quantize!r}, and {said}; leave it out")
    read: Callable[[str], Tensor] | None = None  # a weight by its name in the graph
    if not isinstance(weights, bool):
        if vae and not any(name.startswith(f"{part}.") for name in weights):
            weights = {f"{part}.{name}": tensor for name, tensor in weights.items()}
        _check(weights, model)
        read = weights.__getitem__
    elif weights and file:
        read = _opened(chosen, part, file).__getitem__
    if flat:
        with importing():
            from onnx import inliner

            from fluxlab.onnx.shapes import annotate
        turned = _unturned(model := inliner.inline_local_functions(model))
        annotate(model)
        read = read and _turning(read, turned)
    if quantize is None:
        return _write(model, read, _TORCH[dtype], target, _EMBED)
    with importing():
        from onnxruntime.quantization import quantize_dynamic, shape_inference
    with replacing(target) as temporary:
        full, ready = temporary.with_name("full.onnx"), temporary.with_name("ready.onnx")
        _write(model, read, _TORCH[dtype], full, 2e9)  # onnxruntime looks for no file beside it
        with quiet():  # it recommends what is being done
            shape_inference.quant_pre_process(full, ready, skip_symbolic_shape=True)
            quantize_dynamic(ready, temporary)
    return None


def _structure(chosen: Variant, part: Part, file: Path | None, dtype: str, opset: int) -> Any:
    with importing():
        from onnx import TensorProto

        from fluxlab.onnx.autoencoder import autoencoder_graph
        from fluxlab.onnx.shapes import annotate
        from fluxlab.onnx.text import Writer
        from fluxlab.onnx.transformer import block_graph, transformer_graph

    writer = Writer(opset, TensorProto.DataType.Value({"float32": "FLOAT"}.get(dtype, dtype.upper())))
    if part in _VAE:
        config = autoencoder_config(chosen, file) if file else chosen.autoencoder
        return annotate(autoencoder_graph(writer, config, part, chosen.name))
    if part == "transformer":
        return annotate(transformer_graph(writer, chosen.transformer, chosen.name, chosen.shown == "reference"))
    return annotate(block_graph(writer, chosen.transformer, part, chosen.name))


def _opened(chosen: Variant, part: Part, file: Path) -> Tensors:
    """The weights of a part, by their names in the graph."""
    vae = part in _VAE
    tensors = opened(file, chosen.autoencoder if vae else chosen.transformer, "official", narrow=True)
    head = f"{part}." if vae else "" if part == "transformer" else f"{part}s.0."
    return tensors.renamed({n if vae else n.removeprefix(head): n for n in tensors if n.startswith(head)})


def _unturned(model: Any) -> set[str]:
    """Take out each Transpose between a weight and its product, as tools expect; the weights to be transposed."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    turns = [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in weights]
    names = {node.output[0]: node.input[0] for node in turns}
    for node in turns:
        weights[node.input[0]].dims[:] = weights[node.input[0]].dims[::-1]
        model.graph.node.remove(node)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    return set(names.values())


def _turning(read: Callable[[str], Tensor], turned: set[str]) -> Callable[[str], Tensor]:
    """What reads a weight, those of these names transposed."""
    return lambda name: read(name).T if name in turned else read(name)


def _check(weights: Mapping[str, Tensor], model: Any) -> None:
    """Their names and shapes have to be those of the graph."""
    wanted = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    if problems := describe_difference(wanted, weights):
        raise ValueError(f"weights do not fit the part: {problems}")
    for name, shape in wanted.items():
        check_plain(f"weights: {name}", tensor := weights[name])
        if not tensor.is_floating_point() or tuple(tensor.shape) != shape:
            found = f"is {tensor.dtype} and has shape {tuple(tensor.shape)}"
            raise ValueError(f"weights: {name} {found}, and the part takes floating of {shape}")


def _write(model: Any, read: Callable[[str], Tensor] | None, dtype: torch.dtype, target: Path, embed: float) -> None:
    """The graph, and its weights inside it or beside it; both are put in place only when they are whole."""
    tensors = model.graph.initializer
    sizes = [dtype.itemsize * math.prod(tensor.dims) for tensor in tensors]
    fits = sum(sizes) < embed
    if read and fits:
        for tensor in tensors:
            tensor.ClearField("data_location")
            tensor.raw_data = bytes(_bytes(tensor.name, read(tensor.name), dtype))
    else:
        beside, start = target.with_name(f"{target.name}.weights"), 0
        if not read and beside.exists():
            raise FileExistsError(f"{beside} has the numbers of another export, which this graph would take; remove it")
        for tensor, size in zip(tensors, sizes, strict=True):
            for key, value in (("location", beside.name), ("offset", start), ("length", size)):
                tensor.external_data.add(key=key, value=str(value))
            start += size + -size % _ALIGN
    with replacing(target) as graph:
        graph.write_bytes(model.SerializeToString())
        if read and not fits:
            with replacing(beside) as temporary, temporary.open("wb") as file:
                for tensor, size in zip(tensors, sizes, strict=True):
                    file.write(_bytes(tensor.name, read(tensor.name), dtype))
                    file.write(bytes(-size % _ALIGN))


def _bytes(name: str, tensor: Tensor, dtype: torch.dtype) -> memoryview:
    given = cast(f"weights: {name}", tensor.detach().cpu(), dtype)
    if not is_finite(given):
        raise ValueError(f"weights: {name} has values that are not finite")
    return given.contiguous().view(torch.uint8).numpy().data


def _write_text_encoder(
    chosen: Variant, part: Part, files: Files, dtype: torch.dtype, opset: int, target: Path
) -> None:
    """Traced by PyTorch's own exporter: the classes are transformers', and so are the names inside."""
    with importing():
        import onnxscript  # noqa: F401 (the exporter's own)
    source, length = (files.t5, chosen.t5_length) if part == "t5" else (files.clip, chosen.clip_length)
    encoder = load_weights(empty_encoder(part, source, chosen), source, dtype=dtype)
    ids = torch.ones(2, length, dtype=torch.int64)
    free = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("text_tokens", max=length)}}
    options: Any = {"opset_version": opset, "dynamo": True, "verbose": False}
    with quiet(), warnings.catch_warnings(action="ignore"):  # of what it has not installed, and of steps within
        program = torch.onnx.export(encoder, (ids,), input_names=["ids"], dynamic_shapes=free, **options)
    assert program is not None
    outputs = program.model.graph.outputs
    outputs[:] = outputs[-1:]  # T5's only one, and CLIP's pooled one
    outputs[0].name = "txt" if part == "t5" else "y"
    program.model.metadata_props.update({"name": part, "variant": chosen.name, "version": VERSION})
    with replacing(target) as temporary:
        program.save(str(temporary), external_data=False)
        data = temporary.with_name(f"{target.name}.data")  # large weights are put there whatever is asked for
        if data.exists():
            data.replace(target.with_name(data.name))
