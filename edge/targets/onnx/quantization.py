"""Integers in an .onnx file: written by ONNX Runtime's quantizer, with ranges of activations that we choose.

Dense layers and convolutions are quantized; LayerNorm, softmax, GELU, attention's products and the sums of residual
branches stay in float. Weights are symmetric, with a scale for each output channel.
"""

import contextlib
import dataclasses
import logging
import pathlib
import tempfile

import numpy as np

from ... import artifact as artifacts
from ... import quantization as q
from ...artifact import Artifact
from ...calibration import batches
from ...progress import progress
from ...recipes import check_calibrated, checked_recipe
from .runtime import onnxruntime, save, session, versions
from .writer import onnx

DENSE = ("MatMul", "Gemm")
COMPARED = 32  # batches, at most, on which the ways to choose ranges are compared
ROWS = 1024  # of a tensor's tokens or pixels, over all images, in the sample that scales are chosen on
# A scale is put in where a layer's outputs have less signal than this over the noise that 8 bits add there, and where
# it takes away half of it.
ENOUGH_DB, WORTH = 35.0, 0.5


def quantize(
    artifact: Artifact,
    recipe: str,
    calibration=None,
    folder: str | pathlib.Path | None = None,
    *,
    float_layers: tuple[str, ...] = (),
) -> Artifact:
    """Quantizes a float32 .onnx file.

    Args:
        artifact: what `export` returned.
        recipe: `"dynamic_int8"`, 8-bit weights and dynamically quantized inputs of dense layers; or `"static_int8"`,
            8-bit weights and activations in dense layers and convolutions.
        calibration: images as the file takes them, for `"static_int8"`: an array (N,H,W,C), a data set that yields
            batches of images or (images, labels), or a folder of pictures. Some tens of real images are enough; all are
            held in memory.
        folder: where the new file goes; beside the float one by default.
        float_layers: names of layers, or of what they lie in (`"block_3"`), that stay in float.

    Returns:
        The `Artifact` of `<model>_<recipe>.onnx`, with `_float<n>` in its name where n layers were named.

    Raises:
        ValueError: an unknown recipe or layer, an artifact that is not a float32 .onnx file, or calibration that is
            missing, empty, of another shape, or not finite.
        ImportError: onnx or onnxruntime is not installed.
    """
    recipe = checked_recipe(recipe, "onnx")
    if recipe.name == "float16":
        raise ValueError("float16 is a precision that an ONNX file is exported with: onnx.export(precision='float16').")
    if artifact.format != "onnx" or artifact.recipe != "float32":
        raise ValueError(
            f"Only a float32 ONNX artifact can be quantized; received {artifact.format} {artifact.recipe}."
        )
    check_calibrated(recipe, calibration)
    onnxruntime()
    model = onnx().load(str(artifact.path))
    left_out = _nodes_of(model, float_layers)
    if recipe.needs_calibration:
        images = list(batches(calibration, artifact.input, artifact.preprocessing, "reading images"))
        model = _static(model, images, artifact.input.name, left_out)
    else:
        model = _dynamic(model, left_out)
    mixed = f"_float{len(float_layers)}" if float_layers else ""
    path = pathlib.Path(folder or artifact.path.parent) / f"{artifact.model}_{recipe.name}{mixed}.onnx"
    with artifacts.alone(path.parent):
        save(path, model)
        return artifacts.remake(artifact, path, recipe=recipe.name, tools={**artifact.tools, **versions()})


def _nodes_of(model, layers):
    """Names of the nodes that lie in these layers."""
    inside = lambda node, layer: node.name.startswith(f"{layer}/")
    for layer in layers:
        if not any(inside(node, layer) for node in model.graph.node):
            raise ValueError(f"The file has no layer {layer!r}: name a layer of the model, or what it lies in.")
    return [node.name for node in model.graph.node if any(inside(node, layer) for layer in layers)]


@contextlib.contextmanager
def _quietly():
    """The quantizer logs a warning for every model that its own preprocessing has not seen."""
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _dynamic(model, left_out):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _quietly():
        path = pathlib.Path(folder) / "dynamic.onnx"
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=list(DENSE),
            per_channel=True,
            weight_type=QuantType.QUInt8,  # signed ones overflow 16 bits on x86 without VNNI: 13 dB instead of 39
            nodes_to_exclude=left_out,
            extra_options={"MatMulConstBOnly": True},
        )
        return onnx().load(str(path))


def _static(model, images, name, left_out):
    """The model with the scales and ranges, of those that are tried, that change its outputs least.

    Scales cost a multiplication each, and are taken where they halve the noise of the whole file.
    """
    if not _layers(model, left_out):
        raise ValueError("No dense layer or convolution is left to quantize: name fewer float_layers.")
    few = images[:COMPARED]
    expected = _outputs(model, few, name)

    def best(candidate):
        """(noise, quantized model) of the ranges that fit best."""
        layers = _layers(candidate, left_out)
        histograms = _observed(candidate, layers, images, name)[0]
        found = []
        for method in q.METHODS:
            ranges = {tensor: histogram.range(method) for tensor, histogram in histograms.items()}
            quantized = _with_ranges(candidate, ranges, [layer.node.name for layer in layers])
            outputs = zip(expected, _outputs(quantized, few, name), strict=True)
            found.append((sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in outputs), quantized))
        return min(found, key=lambda pair: pair[0])

    noise, found = best(model)
    scaled = _smoothed(model, _observed(model, _layers(model, left_out), images, name)[1], left_out)
    if scaled is not None:
        other, smooth = best(scaled)
        found = smooth if other < WORTH * noise else found
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """A dense layer or convolution of a file: its node, and its weights (O,...,I), input channels last.

    Of a depthwise convolution I is the channels, and each input has weights of its own.
    """

    node: object
    weight: np.ndarray
    depthwise: bool = False

    @property
    def axis(self):
        """Where the channels of its inputs and outputs are."""
        return 1 if self.node.op_type == "Conv" else -1


def _layers(model, left_out):
    """Those to quantize, in the order of the file. A convolution in groups that is not depthwise stays in float."""
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type not in (*DENSE, "Conv") or node.name in left_out or node.input[1] not in arrays:
            continue
        weight = onnx().numpy_helper.to_array(arrays[node.input[1]])
        if node.op_type == "Conv":
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            depthwise = groups > 1 and weight.shape[:2] == (groups, 1)
            moved = weight.transpose(1, 2, 3, 0) if depthwise else weight.transpose(0, 2, 3, 1)
            found += [_Layer(node, moved, depthwise)] if depthwise or groups == 1 else []
        else:
            found.append(_Layer(node, weight.T if node.op_type == "MatMul" else weight))
    return found


def _outputs(model, images, name):
    """All float outputs of all batches, in a list of arrays."""
    run = session(model.SerializeToString()).run
    return [y for x in images for y in run(None, {name: x}) if y.dtype == np.float32]


def _observed(model, layers, images, name):
    """(tensor -> `Histogram`, tensor -> rows (R,C)) of the layers' inputs and outputs over all images."""
    axes = {tensor: layer.axis for layer in layers for tensor in (layer.node.input[0], layer.node.output[0])}
    wide = onnx().ModelProto()
    wide.CopyFrom(model)
    given = {value.name for value in (*model.graph.input, *model.graph.output)}
    make = onnx().helper.make_tensor_value_info
    wide.graph.output.extend(make(t, onnx().TensorProto.FLOAT, None) for t in axes if t not in given)
    run = session(wide.SerializeToString()).run
    asked = [t for t in axes if t != name]
    histograms, rows = {t: q.Histogram() for t in axes}, {t: [] for t in axes}
    random = np.random.default_rng(0)
    for x in progress(images, "Calibrating"):
        for tensor, y in [*zip(asked, run(asked, {name: x}), strict=True), *([(name, x)] if name in axes else [])]:
            histograms[tensor].add(y)
            channels = np.moveaxis(y, axes[tensor], -1).reshape(-1, y.shape[axes[tensor]])
            few = -(-ROWS // len(images))
            rows[tensor].append(channels if len(channels) <= few else channels[random.choice(len(channels), few)])
    return histograms, {tensor: np.concatenate(parts) for tensor, parts in rows.items()}


def _smoothed(model, rows, left_out):
    """The model with channels of like size where 8 bits lose much; `None` if nowhere.

    What an input channel is divided by, its weights are multiplied with; what the weights of an output channel are
    divided by, the output is multiplied with.
    """
    model, source = onnx().ModelProto(), model
    model.CopyFrom(source)
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    before, after = {}, {}  # name of a node -> nodes
    for layer in _layers(model, left_out):
        node, x, y = layer.node, rows[layer.node.input[0]], rows[layer.node.output[0]]
        signal = float(np.square(y).mean(0).sum())
        bits, weight = None if layer.depthwise else 8, layer.weight
        largest = np.abs(weight).reshape(-1, weight.shape[-1]).max(0)
        scale = _worth(signal, x, q.input_scales(x, largest), lambda s: q.input_noise(x, weight, s, bits))
        array = onnx().numpy_helper.to_array(arrays[node.input[1]])
        shape = (-1, 1, 1) if node.op_type == "Conv" else (-1,)
        if scale is not None:
            across = {"Conv": (1, -1, 1, 1), "MatMul": (-1, 1), "Gemm": (1, -1)}[node.op_type]
            array = array * scale.reshape((-1, 1, 1, 1) if layer.depthwise else across)
            before[node.name] = _multiplied(model, node.input[0], f"{node.name}/smooth", (1 / scale).reshape(shape))
            node.input[0] = f"{node.name}/smooth"
        if node.op_type == "Conv":  # whose outputs have 8 bits, too
            scale = _worth(signal, y, q.output_scales(y), lambda s: q.output_noise(y, s))
            if scale is not None:
                array = array / scale.reshape(-1, 1, 1, 1)
                if len(node.input) > 2:
                    bias = onnx().numpy_helper.to_array(arrays[node.input[2]]) / scale
                    node.input[2] = _constant(model, f"{node.name}/bias", bias)
                after[node.name] = _multiplied(model, f"{node.name}/even", node.output[0], scale.reshape(shape))
                node.output[0] = f"{node.name}/even"
        if node.name in before or node.name in after:
            node.input[1] = _constant(model, f"{node.name}/weight", array)
    if not before and not after:
        return None
    nodes = [m for n in model.graph.node for m in (before.get(n.name), n, after.get(n.name)) if m is not None]
    used = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in used]
    for field, values in ((model.graph.node, nodes), (model.graph.initializer, tensors)):
        values = list(values)
        del field[:]
        field.extend(values)
    return model


def _worth(signal, rows, scales, noise):
    """The scale with the least noise, if the noise is much and it takes away half; `None` otherwise."""
    plain = noise(np.ones(rows.shape[1], np.float32))
    if plain * 10 ** (ENOUGH_DB / 10) < signal:
        return None
    least, scale = min(((noise(s), s) for s in scales), key=lambda pair: pair[0])
    return scale if least < WORTH * plain else None


def _constant(model, name, array):
    model.graph.initializer.append(onnx().numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
    return name


def _multiplied(model, x, y, scale):
    """A node that computes y = x * scale."""
    factor = _constant(model, f"{y}/scale", scale)
    return onnx().helper.make_node("Mul", [x, factor], [y], name=f"{y}/Mul")


def _with_ranges(model, ranges, nodes):
    """The model with these nodes quantized, activations to these ranges.

    Activations and weights are signed, which ONNX Runtime's guide names as the first choice for x86 and ARM. A
    convolution's outputs are quantized, too, as its integer kernel wants; those of a dense layer stay in float.
    """
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import TensorsData

    copy = onnx().ModelProto()
    copy.CopyFrom(model)
    ranges = {t: (np.float32(low), np.float32(high)) for t, (low, high) in ranges.items()}
    with _quietly():
        quantizer = QDQQuantizer(
            copy,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
            nodes_to_quantize=nodes,
            nodes_to_exclude=[],
            op_types_to_quantize=[*DENSE, "Conv"],
            extra_options={"OpTypesToExcludeOutputQuantization": list(DENSE)},
        )
        quantizer.quantize_model()
    return quantizer.model.model
