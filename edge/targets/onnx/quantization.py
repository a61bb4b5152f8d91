"""Integers in an .onnx file: written by ONNX Runtime's quantizer, with ranges of activations that we choose.

Dense layers and convolutions are quantized; LayerNorm, softmax, GELU, attention's products and the sums of residual
branches stay in float. Weights are symmetric, with a scale for each output channel, and unsigned like the activations:
on x86 without VNNI a sum of two products of an unsigned and a signed byte overflows 16 bits. On such a processor ViT-Ti
has 33 dB with unsigned weights and 28 with signed ones (dynamically quantized 35 and 23), and takes as long.
"""

import collections
import contextlib
import logging
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits._util.progress import progress
from keras_vits._util.scratch import redirected

from ... import artifact as artifacts
from ...artifact import Artifact
from ...quantize import numerics as q
from ...quantize.calibration import batches
from ...quantize.recipes import check_calibrated, checked_recipe
from .runtime import onnxruntime, save, session, versions
from .writer import add_shapes, onnx

DENSE = ("MatMul", "Gemm")
DECIDING = ("Reshape", "Flatten", "Squeeze", "Transpose", "Softmax", "Sigmoid")  # between logits and what a file gives
COMPARED = 32  # batches, at most, on which the ways to choose ranges are compared


def quantize(
    artifact: Artifact,
    recipe: str,
    calibration: Any = None,
    folder: str | pathlib.Path | None = None,
    *,
    float_layers: Sequence[str] = (),
    overwrite: bool = False,
) -> Artifact:
    """Quantizes a float32 .onnx file.

    Args:
        artifact: what `export` returned.
        recipe: `"dynamic_int8"`, 8-bit weights and dynamically quantized inputs of dense layers; or `"static_int8"`,
            8-bit weights and activations in dense layers and convolutions.
        calibration: images as the file takes them, for `"static_int8"`: an array (N,H,W,C), a data set that yields
            batches of images or (images, labels), a function that returns one, or a folder of pictures; of a file with
            several inputs, name -> array. Some tens of real images are enough; all are held in memory, but no more than
            1,000 of what may have no end.
        folder: where the new file goes; beside the float one by default.
        float_layers: names of layers, or of what they lie in (`"block_3"`), that stay in float.
        overwrite: whether another file of this name may be replaced; one of the same bytes is written anew.

    Returns:
        The `Artifact` of `<model>_<recipe>.onnx`, with `_float<n>` in its name where n layers were named.

    Raises:
        ValueError: an unknown recipe or layer, an artifact that is not a float32 .onnx file or not the file that was
            written, calibration that is missing, empty, of another shape, or not finite, or a name that another file
            has.
        ImportError: onnx or onnxruntime is not installed.
    """
    chosen = checked_recipe(recipe, "onnx")
    if chosen.name == "float16":
        raise ValueError("float16 is a precision that an ONNX file is exported with: onnx.export(precision='float16').")
    if artifact.format != "onnx" or artifact.recipe != "float32":
        raise ValueError(
            f"Only a float32 ONNX artifact can be quantized; received {artifact.format} {artifact.recipe}."
        )
    check_calibrated(chosen, calibration)
    onnxruntime()
    artifacts.check(artifact)
    float_layers = tuple(dict.fromkeys(float_layers))
    model = onnx().load(str(artifact.path))
    left_out = _nodes_of(model, float_layers)
    if chosen.needs_calibration:
        names = [spec.name for spec in artifact.inputs]
        arrays = batches(calibration, artifact.inputs, "reading images")
        images = [dict(zip(names, batch, strict=True)) for batch in arrays]
        model = _static(model, images, left_out)
    else:
        model = _dynamic(model, left_out)
    add_shapes(model)
    name = artifacts.file_name(artifact.model, chosen.name, ".onnx", float_layers)
    with artifacts.writing(folder or artifact.path.parent, name, overwrite=overwrite) as draft:
        save(draft.temporary, model)
        tools = {**artifact.tools, **versions()}
        draft.describe(**artifacts.like(artifact, recipe=chosen.name, tools=tools))
    return draft.artifact


def _nodes_of(model: Any, layers: Sequence[str]) -> list[str]:
    """Names of the nodes that lie in these layers."""
    inside = lambda node, layer: node.name.startswith(f"{layer}/")
    for layer in layers:
        if not any(inside(node, layer) for node in model.graph.node):
            raise ValueError(f"The file has no layer {layer!r}: name a layer of the model, or what it lies in.")
    return [node.name for node in model.graph.node if any(inside(node, layer) for layer in layers)]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The quantizer logs a warning for every model that its own preprocessing has not seen."""
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _dynamic(model: Any, left_out: Sequence[str]) -> Any:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with redirected("onnxruntime.quantization.quant_utils") as folder, _quietly():
        path = folder / "dynamic.onnx"
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=list(DENSE),
            per_channel=True,
            weight_type=QuantType.QUInt8,
            nodes_to_exclude=left_out,
            extra_options={"MatMulConstBOnly": True},
        )
        quantized = onnx().load(str(path))
    shutil.rmtree(folder, ignore_errors=True)
    return quantized


def _static(model: Any, images: Sequence[Mapping[str, np.ndarray]], left_out: Sequence[str]) -> Any:
    """The model with the ranges, of those that the methods choose, that change its outputs least."""
    model, few = _as_gemm(model), images[:COMPARED]
    nodes = _layers(model, left_out)
    if not nodes:
        raise ValueError("No dense layer or convolution is left to quantize: name fewer float_layers.")
    histograms = _observed(model, nodes, images)
    expected = _outputs(model, few)
    found = []
    for method in q.METHODS:
        ranges = {tensor: histogram.range(method) for tensor, histogram in histograms.items()}
        quantized = _with_ranges(model, ranges, [node.name for node in nodes])
        pairs = zip(expected, _outputs(quantized, few), strict=True)
        squared = lambda x: float(np.square(x, dtype=np.float64).sum())
        found.append((sum(squared(a - b) / max(squared(a), 1e-30) for a, b in pairs), quantized))
    return min(found, key=lambda pair: pair[0])[1]


def _as_gemm(model: Any) -> Any:
    """The model with MatMul and Add of tokens as one Gemm of rows.

    ONNX Runtime makes the same of it before it looks for what has integers, and then computes it in float.
    """
    model, source = onnx().ModelProto(), model
    model.CopyFrom(source)
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
    readers = collections.Counter(name for node in model.graph.node for name in node.input)
    readers.update(value.name for value in model.graph.output)
    made = {node.output[0]: node for node in model.graph.node}
    make, dropped, nodes = onnx().helper.make_node, set(), []
    for node in model.graph.node:
        product = made.get(node.input[0]) if node.op_type == "Add" else None
        if product is not None and product.op_type == "MatMul" and readers[product.output[0]] == 1:
            (x, weight), bias = product.input, node.input[1]
            if weights.get(bias) == weights.get(weight, ())[1:]:
                dropped.add(product.output[0])
                name, ends = product.name, (("rows", (-1, weights[weight][0])), ("shape", shapes[node.output[0]]))
                sizes = [_constant(model, f"{name}/{end}", np.array(shape, np.int64)) for end, shape in ends]
                nodes += [
                    make("Reshape", [x, sizes[0]], [f"{name}/in"], name=f"{name}/in"),
                    make("Gemm", [f"{name}/in", weight, bias], [f"{name}/out"], name=name),
                    make("Reshape", [f"{name}/out", sizes[1]], [node.output[0]], name=node.name),
                ]
                continue
        nodes.append(node)
    nodes = [node for node in nodes if node.output[0] not in dropped]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _layers(model: Any, left_out: Sequence[str]) -> list[Any]:
    """Nodes of the dense layers and convolutions to quantize, in the order of the file.

    A convolution that gives the logits stays in float: its outputs would be rounded to 256 values, which makes ties of
    close classes. A dense layer's outputs are not rounded.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    deciding = set()
    for output in model.graph.output:
        name = output.name if len(output.type.tensor_type.shape.dim) == 2 else ""
        while name in made and made[name].op_type in DECIDING:
            name = made[name].input[0]
        deciding.add(name)
    kinds = (*DENSE, "Conv")
    nodes = [node for node in model.graph.node if node.op_type in kinds and node.input[1] in weights]
    return [
        node
        for node in nodes
        if node.name not in left_out and not (node.op_type == "Conv" and node.output[0] in deciding)
    ]


def _outputs(model: Any, images: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    """Every float output of all batches, each in one array."""
    run = session(model.SerializeToString()).run
    found = zip(*(run(None, dict(inputs)) for inputs in images), strict=True)
    return [np.concatenate(parts) for parts in found if parts[0].dtype == np.float32]


def _observed(model: Any, nodes: Sequence[Any], images: Sequence[Mapping[str, np.ndarray]]) -> dict[str, q.Histogram]:
    """Tensor -> `Histogram` over all images, of the nodes' inputs and outputs."""
    tensors = dict.fromkeys(tensor for node in nodes for tensor in (node.input[0], node.output[0]))
    wide = onnx().ModelProto()
    wide.CopyFrom(model)
    given = {value.name for value in (*model.graph.input, *model.graph.output)}
    make = onnx().helper.make_tensor_value_info
    wide.graph.output.extend(make(t, onnx().TensorProto.FLOAT, None) for t in tensors if t not in given)
    run = session(wide.SerializeToString()).run
    read = {value.name for value in model.graph.input}
    asked = [t for t in tensors if t not in read]
    histograms = {t: q.Histogram() for t in tensors}
    for inputs in progress(images, "Calibrating"):
        for tensor, y in zip(asked, run(asked, dict(inputs)), strict=True):
            histograms[tensor].add(y)
        for name in read & set(tensors):
            histograms[name].add(inputs[name])
    return histograms


def _constant(model: Any, name: str, array: np.ndarray) -> str:
    model.graph.initializer.append(onnx().numpy_helper.from_array(array, name))
    return name


def _with_ranges(model: Any, ranges: Mapping[str, tuple[float, float]], nodes: Sequence[str]) -> Any:
    """The model with these nodes quantized, activations to these ranges.

    A convolution's outputs are quantized, too, as its integer kernel wants; those of a dense layer stay in float.
    """
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import TensorsData

    copy = onnx().ModelProto()
    copy.CopyFrom(model)
    limits = {t: (np.float32(low), np.float32(high)) for t, (low, high) in ranges.items()}
    with redirected("onnxruntime.quantization.quant_utils") as folder, _quietly():
        quantizer = QDQQuantizer(
            copy,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QUInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, limits),
            nodes_to_quantize=nodes,
            nodes_to_exclude=[],
            op_types_to_quantize=[*DENSE, "Conv"],
            extra_options={"OpTypesToExcludeOutputQuantization": list(DENSE), "WeightSymmetric": True},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    shutil.rmtree(folder, ignore_errors=True)
    return quantizer.model.model
