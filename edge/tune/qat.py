"""Quantization-aware fine-tuning: a model that trains with the rounding errors which its phone file will have.

In the forward pass each dense layer and convolution computes as in the file: its kernel is rounded to the recipe's
integers, on the same grid and with the same ties, after the gains of the norm before it have been folded in as
`rewrite` folds them, and its inputs are rounded as the runtime rounds them. A static recipe's file rounds the outputs,
too, attention's operands and results, and the gate of SiLU. The backward pass sees no rounding (straight-through
estimator, arXiv 1308.3432). Variables are the float ones, under the same paths: what is saved or exported is the plain
model, and quantizing that gives the file that was trained for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import keras
import numpy as np
from keras import layers, ops

from keras_vits._util.keras_private import flatten_layers
from keras_vits.graph.ir import Graph, Node, Value
from keras_vits.graph.rewrite import is_constant, rewrite
from keras_vits.graph.trace import trace
from keras_vits.layers.attention import MultiHeadAttention
from keras_vits.models._base import VisionModel
from keras_vits.specs import InputSpec

from ..quantize.calibration import batches
from ..quantize.recipes import Operation, check_calibrated, checked_recipe
from ..targets import litert
from ..targets.litert.flatbuffer import File, Layer
from ..targets.litert.quantization.plan import plan
from ..targets.litert.quantization.prepare import Choice, Preparation

Limits = tuple[Any, Any]  # (low, high) of 8 bits: numbers, or arrays (O)

SMALLEST_GAIN = 1e-6  # of a norm, to divide by
HOPS = 3  # layers of the model, at most, that are one in the file: a convolution, its norm and a scale


def qat(model: VisionModel, recipe: str, calibration: Any = None) -> VisionModel:
    """A copy of a model to fine-tune for a recipe, in a few epochs at a tenth of the usual learning rate.

    It computes what the quantized file will, in training and out of it, and is otherwise the same: `fit` trains it,
    `save` writes the plain model, `litert.export` a float32 file. `litert.quantize` that one with the same recipe and
    without calibration images: with them it would round in another way.

    Args:
        model: a `VisionModel`, usually a trained one; it stays as it is, and adapters are merged in the copy.
        recipe: name of a LiteRT recipe of integers, such as `"weight_int4"`.
        calibration: images as `litert.quantize` takes them, for a static recipe alone: the ranges of activations are
            chosen on them and stay, in this model and in what is exported of it. Call `qat` again to choose them anew.

    Returns:
        A `VisionModel` of the same class and configuration, from images (B,H,W,C) to logits (B,K). It is not compiled.
        Models made from it (`load_model`, `reset_head`, `resized`) are plain.

    Raises:
        ValueError: not a `VisionModel`, an unknown recipe or one without integers, or calibration that is missing,
            empty or of another shape.
    """
    chosen = checked_recipe(recipe, "litert")
    if not chosen.is_integer:
        raise ValueError(f"Recipe {recipe!r} rounds no layer to integers: choose 'weight_int4', for example.")
    check_calibrated(chosen, calibration)
    if not isinstance(model, VisionModel):
        raise ValueError(f"Only a VisionModel can be fine-tuned for a recipe; received {type(model).__name__}.")
    model = model.merge_lora()
    traced = trace(model)
    written = rewrite(traced)
    content = bytes(litert.write(written))
    file, limits = File(content), {}
    named = {layer.path: layer for layer in flatten_layers(model)}
    planned = plan(file, chosen)
    if chosen.needs_calibration:
        image = traced.inputs[0]
        fields = dataclasses.asdict(model.preprocessing)
        spec = InputSpec(name=image.name, shape=image.shape, dtype=image.dtype, preprocessing=fields)
        images = list(batches(calibration, [spec], "reading images"))
        prepared = Preparation(content, chosen, images, steps=())
        model.trained_for = prepared.chosen("mse", np.resize(model.preprocessing.mean, image.shape[-1]).tolist())
        limits = model.trained_for.ranges
        model.trained_for.applied(file, planned)  # tells the layers whose activations have 16 bits
        _round_activations(named, traced, file, planned, model.trained_for, images[0][0])
    gains, kinds = _gains(model, traced, written), cast(Any, tuple(ROUNDED))
    for found in planned:  # a projection that was split has the same settings in each part
        layer: Any = named.get(found.name)
        if isinstance(layer, kinds) and not hasattr(layer, "rounding"):
            inputs = "each" if found.dynamic else limits[file.name(found.x)] if found.activation_bits == 8 else None
            pixels = file.shape(found.weight)[1:3]
            patches = (
                isinstance(layer, keras.layers.Conv2D) and found.kind is Operation.CONV and pixels != layer.kernel_size
            )
            layer.rounding = Rounding(found.bits, inputs, *gains.get(found.name, (None, None)), patches)
            _become(layer, *_rounded(type(layer)))
    return model


def _round_activations(
    layers: Mapping[str, Any],
    traced: Graph,
    file: File,
    planned: Sequence[Layer],
    choice: Choice,
    image: np.ndarray,
) -> None:
    """Lets layers round their outputs, attention its operands and results, and SiLU its gate, as the file does.

    Args:
        layers: path -> layer of the model.
        traced: its `Graph`, not rewritten.
        file, planned: the `File` and the layers of it that are quantized.
        choice: a `Choice`.
        image: a batch as the file takes it.
    """
    for name in choice.operators:
        layer = layers.get(name.rpartition("/")[0])
        if layer is not None and getattr(layer, "act", None) is keras.activations.silu:
            layer.act = rounded_silu
    made = {layer.y: layer for layer in planned if layer.activation_bits == 8}
    for attention in file.attentions():
        sources = [file.source(tensor)[0] for tensor in (attention.q, attention.k, attention.v)]
        maker = made.get(sources[2])
        layer = maker and layers.get(maker.name.rpartition("/")[0])
        if not isinstance(layer, MultiHeadAttention):
            continue
        operands: list[tuple[float, float] | None]
        operands = [choice.ranges.get(file.name(source)) if source in made else None for source in sources]
        inside: list[tuple[float, float] | None] = [None] * 3
        if file.name(attention.y) in choice.operators:
            operands = [choice.ranges[file.name(tensor)] for tensor in (attention.q, attention.k, attention.v)]
            inside = [choice.ranges[file.name(tensor)] for tensor in (attention.s, attention.p, attention.y)]
        (q, k, v), (scores, shares, outputs) = operands, inside
        unbiased = sources[1] in made and made[sources[1]].bias < 0
        layer.attending = Attending(q, k, v, scores, shares, outputs, unbiased)
        _become(layer, RoundedAttention, type(layer))
        for source in () if layer.qk_norm else sources:  # after a norm they are not what the projection gives
            made.pop(source, None)
    for path, limits in _outputs(layers, traced, file, made.values(), choice, image).items():
        layer = layers[path]
        layer.outputs = limits
        _become(layer, RoundedOutputs, type(layer))


def _outputs(
    layers: Mapping[str, Any], traced: Graph, file: File, made: Iterable[Layer], choice: Choice, image: np.ndarray
) -> dict[str, Limits]:
    """Path of a layer -> (low, high) of its outputs, numbers or arrays (O): where the model has what the file rounds.

    That is not always what the file's layer is named after: a norm or a scale that comes next is in its weights. Equal
    values on an image tell.
    """
    runner = litert.of_bytes(bytes(file.bytes()), keep=True)
    model: dict[str, np.ndarray] = {}
    runner.set_tensor(runner.get_input_details()[0]["index"], image)
    runner.invoke()
    traced(image, trace=model)
    ends, readers = {node.layer: node.output for node in traced.nodes}, traced.consumers()
    found: dict[str, Limits] = {}
    parts: dict[str, list[tuple[np.ndarray, tuple[float, float]]]] = {}
    for layer in made:
        parts.setdefault(layer.name, []).append((runner.get_tensor(layer.y), choice.ranges[file.name(layer.y)]))
    for name, rounded in parts.items():
        path: str | None = name
        place = None
        for _ in range(HOPS):
            if path is None or path not in ends:
                break
            limits = _limits(model[ends[path].name], rounded)
            place = (path, limits) if limits is not None and path in layers else place
            following = {node.layer for node in readers.get(ends[path], ())}
            path = following.pop() if len(following) == 1 else None
        found |= [place] if place else []
    return found


def _limits(y: np.ndarray, parts: Iterable[tuple[np.ndarray, tuple[float, float]]]) -> Limits | None:
    """(low, high) of the values y (...,O) of a layer, from those of the file's tensors that make it up, or `None`."""
    y = y.reshape(-1, y.shape[-1])
    low, high = np.full((2, y.shape[-1]), np.nan, np.float32)
    for part, limits in parts:
        part = part.reshape(-1, part.shape[-1])
        width, slack = part.shape[-1], 1e-3 * np.abs(part).max()
        starts = range(y.shape[-1] - width + 1) if len(part) == len(y) else ()
        at = next((i for i in starts if np.abs(y[:, i : i + width] - part).max() <= slack), None)
        if at is None:
            return None
        low[at : at + width], high[at : at + width] = limits
    return None if np.isnan(low).any() else (low, high)


def _gains(
    model: VisionModel, traced: Graph, written: Graph
) -> dict[str, tuple[keras.Variable, keras.Variable | None]]:
    """Layer -> (gain, shift or None), variables (I) of the norm before it that `rewrite` folds into its weights."""
    variables = {v.path: v for v in model.weights}
    kept = {constant.name for constant in written.constants()}
    made: dict[Value | None, Node] = {value: node for node in traced.nodes for value in node.outputs}

    def variable(value: Value) -> keras.Variable | None:
        """The one that a constant holds, by name or, where it got another shape, by the layer and its data."""
        if value.name in variables:
            return variables[value.name]
        layer, data = value.name.rpartition("/")[0], cast(np.ndarray, value.data).reshape(-1)
        own = [v for v in model.weights if v.path.rpartition("/")[0] == layer and math.prod(v.shape) == data.size]
        return next((v for v in own if (ops.convert_to_numpy(v).reshape(-1) == data).all()), None)

    def split(node: Node | None, op: str) -> tuple[Node | None, Value | None]:
        """(what computes the other operand, constant) of such an operation with one; (node, None) of any other."""
        for x, c in (node.inputs, node.inputs[::-1]) if node is not None and node.op == op else ():
            if is_constant(c):
                return made.get(x), c
        return node, None

    found = {}
    for node in traced.nodes:
        if node.op not in ("dense", "conv2d"):
            continue
        before = made.get(node.inputs[0])
        while before is not None and before.op in ("reshape", "slice"):
            before = made.get(before.inputs[0])
        before, shift = split(before, "add")
        if before is not None and before.op == "layer_norm":
            gain, shift = before.inputs[1:]
        else:
            before, gain = split(before, "mul")
        if gain is not None and gain.name not in kept and (scale := variable(gain)) is not None:
            path = cast(Value, node.inputs[1]).name.removesuffix("/kernel")
            found[path] = scale, None if shift is None else variable(shift)
    return found


# ---------------------------------------------------------------- what the file computes


@dataclasses.dataclass(frozen=True, eq=False)
class Rounding:
    """How a layer computes in the file.

    Attributes:
        bits: of a weight.
        inputs: what the 8 bits of its inputs range over: `"each"` token, pixel or patch (the whole image, for any other
            kernel of more than one pixel), a fixed (low, high), or `None` where they stay in float.
        gain: variable (I) of the norm before the layer whose gains the file has in its weights, or `None`.
        shift: the same of the norm's offsets, which the file has in its bias.
        patches: whether the file cuts images into patches first, and then has a product of matrices.
    """

    bits: int
    inputs: str | tuple[float, float] | None = None
    gain: keras.Variable | None = None
    shift: keras.Variable | None = None
    patches: bool = False

    def __call__(
        self,
        linear: Callable[[Any, Any], Any],
        x: Any,
        kernel: Any,
        axes: Sequence[int] | None = None,
        windows: bool = False,
    ) -> Any:
        """linear(x, kernel) with both rounded.

        Args:
            linear: (x, kernel) -> y, linear in both.
            x: (B,...,I).
            kernel: (...,I,O), or (height,width,I,multiplier) of a depthwise convolution.
            axes: of the kernel that one scale holds for; all but the last by default.
            windows: whether an output needs more, or less, than each pixel: XNNPACK makes a matrix product of the rest.
        """
        dtype, x, offset = x.dtype, ops.cast(x, "float32"), self.offset(kernel, axes)
        if self.gain is not None:
            x = (x if self.shift is None else x - _fixed(self.shift)) / self._gain()
        x = self._rounded(x, tuple(range(1, len(x.shape))) if windows else -1)
        y = linear(ops.cast(x, dtype), ops.cast(self.weights(kernel, axes), dtype))
        return y if offset is None else y + ops.cast(offset, dtype)

    def offset(self, kernel: Any, axes: Sequence[int] | None = None) -> Any:
        """What the norm's offsets add to the outputs (O), or `None`."""
        if self.shift is None:
            return None
        return ops.sum(ops.cast(kernel, "float32") * _fixed(self.shift)[:, None], axes or _inputs(kernel))

    def weights(self, kernel: Any, axes: Sequence[int] | None = None) -> Any:
        """The kernel as the file has it, gains of the norm included."""
        kernel, axes = ops.cast(kernel, "float32"), axes or _inputs(kernel)
        if self.gain is not None:
            kernel = kernel * self._gain()[:, None]
        return straight_through(round_weight(kernel, self.bits, axes), kernel)

    def _gain(self) -> Any:
        gain = _fixed(self.gain)
        return ops.where(ops.abs(gain) < SMALLEST_GAIN, SMALLEST_GAIN, gain)

    def _rounded(self, x: Any, axes: int | Sequence[int]) -> Any:
        if self.inputs is None:
            return x
        if self.inputs != "each":
            return within(x, cast(Limits, self.inputs))
        low, high = (f(ops.stop_gradient(x), axes, keepdims=True) for f in (ops.min, ops.max))
        return straight_through(fake_quantize(x, low, high), x)


@dataclasses.dataclass(frozen=True, eq=False)
class Attending:
    """How attention computes in the file: (low, high) of 8 bits, or `None` for what stays in float.

    Attributes:
        q, k, v: of queries, keys and values.
        scores, shares, outputs: of the first product, of softmax and of the second product.
        unbiased: whether the file's keys lack their bias, which adds the same number to all scores of a query.
    """

    q: tuple[float, float] | None
    k: tuple[float, float] | None
    v: tuple[float, float] | None
    scores: tuple[float, float] | None
    shares: tuple[float, float] | None
    outputs: tuple[float, float] | None
    unbiased: bool

    def __call__(self, q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        """softmax(q k' / sqrt(d)) v.

        Args:
            q, k, v: (B,N,heads,d).
            bias: (3 heads d) of the projection that computes them.
        """
        heads, size = q.shape[2:]
        q = q * size**-0.5
        if bias is not None:
            k = k - ops.cast(ops.reshape(bias, (3, heads, size))[1], k.dtype)
        q, k, v = (
            ops.transpose(within(x, limits), (0, 2, 1, 3)) for x, limits in ((q, self.q), (k, self.k), (v, self.v))
        )
        scores = within(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))), self.scores)
        shares = within(ops.softmax(scores, -1), self.shares)
        return ops.transpose(within(ops.matmul(shares, v), self.outputs), (0, 2, 1, 3))


def _inputs(kernel: Any) -> tuple[int, ...]:
    """Its axes but the last."""
    return tuple(range(len(kernel.shape) - 1))


def _fixed(variable: Any) -> Any:
    """Its value (I), which gets no gradient: the norm, whose output has it too, does."""
    return ops.reshape(ops.stop_gradient(ops.cast(variable, "float32")), (-1,))


def straight_through(rounded: Any, x: Any) -> Any:
    """The value of the one, exactly, with the gradient of the other."""
    return ops.stop_gradient(rounded) + (x - ops.stop_gradient(x))


def within(x: Any, limits: Limits | None) -> Any:
    """x in the 256 values between fixed limits (low, high); as it is where they are `None`."""
    if limits is None:
        return x
    clipped = ops.clip(ops.cast(x, "float32"), *limits)
    return ops.cast(straight_through(fake_quantize(clipped, *limits), clipped), x.dtype)


def rounded_silu(x: Any) -> Any:
    """x sigmoid(x) with a sigmoid of 256 values, as the file has it between two layers; the layers round its ends."""
    if isinstance(x, keras.KerasTensor):
        return keras.activations.silu(x)
    gate = ops.sigmoid(x)
    return x * straight_through(ops.minimum(ops.round(gate * 256), 255) / 256, gate)


def round_weight(kernel: Any, bits: int, axes: Sequence[int]) -> Any:
    """`numerics.round_weight` of a Keras kernel: to the nearest, with one scale along the axes."""
    most = 2 ** (bits - 1)
    scale = ops.maximum(ops.max(ops.abs(kernel), axes, keepdims=True), 1e-9) / (most - 1)
    return ops.clip(ops.round(kernel / scale), -most + (bits >= 8), most - 1) * scale


def fake_quantize(x: Any, low: Any, high: Any) -> Any:
    """`numerics.fake_quantize`: to the nearest of 256 values from low to high, of which zero is one."""
    low, high = ops.minimum(low, 0.0), ops.maximum(high, 0.0)
    scale = ops.maximum((high - low) / 255, 1e-9)
    zero = ops.round(low / scale)
    return ops.clip(ops.round(x / scale), zero, zero + 255) * scale


# ---------------------------------------------------------------- layers; symbolic tensors (a trace's) see plain ones


class RoundedDense(layers.Dense):
    """(B,...,I) -> (B,...,O): a dense layer as the file computes it."""

    rounding: Rounding

    def call(self, x: Any, training: bool | None = None) -> Any:
        if isinstance(x, keras.KerasTensor):
            return super().call(x)
        return _finished(self, self.rounding(ops.matmul, x, self.kernel))


class RoundedOutputs:
    """A layer, or a norm or scale after it, whose outputs are 8 bits in the file; `outputs` are their limits."""

    outputs: Limits

    def call(self, *args: Any, **kwargs: Any) -> Any:
        y = super().call(*args, **kwargs)  # type: ignore[misc]  # of the layer that it is mixed into
        return y if isinstance(y, keras.KerasTensor) else within(y, self.outputs)


class RoundedAttention:
    """A `MultiHeadAttention` as the file computes it; `attending` says how."""

    attending: Attending
    qkv: Any  # of the layer that it is mixed into

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        if isinstance(q, keras.KerasTensor):
            return super().attend(q, k, v)  # type: ignore[misc]  # of the layer that it is mixed into
        return self.attending(q, k, v, _bias(self.qkv) if self.attending.unbiased else None)


class RoundedConv2D(layers.Conv2D):
    """(B,H,W,I) -> (B,H',W',O): a convolution as the file computes it."""

    rounding: Rounding

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        if isinstance(inputs, keras.KerasTensor):
            return super().convolution_op(inputs, kernel)
        if self.rounding.patches:
            patches = ops.space_to_depth(inputs, self.kernel_size[0])
            return self.rounding(ops.matmul, patches, ops.reshape(kernel, (-1, self.filters)))
        windows = (*self.kernel_size, *self.strides) != (1, 1, 1, 1)
        return self.rounding(super().convolution_op, inputs, kernel, windows=windows)


class RoundedDepthwiseConv2D(layers.DepthwiseConv2D):
    """(B,H,W,I) -> (B,H',W',O): a depthwise convolution as the file computes it."""

    rounding: Rounding

    def call(self, inputs: Any) -> Any:
        if isinstance(inputs, keras.KerasTensor):
            return super().call(inputs)

        def linear(x: Any, kernel: Any) -> Any:
            return ops.depthwise_conv(x, kernel, self.strides, self.padding, self.data_format, self.dilation_rate)

        return _finished(self, self.rounding(linear, inputs, self.kernel, axes=(0, 1)))


ROUNDED = {
    layers.Dense: RoundedDense,
    layers.Conv2D: RoundedConv2D,
    layers.DepthwiseConv2D: RoundedDepthwiseConv2D,
}


def _bias(layer: Any) -> Any:
    """All that a rounded dense layer adds to its product (O), or `None`."""
    parts = [layer.rounding.offset(layer.kernel), layer.bias]
    parts = [ops.cast(part, "float32") for part in parts if part is not None]
    return sum(parts) if parts else None


def _finished(layer: Any, y: Any) -> Any:
    y = y if layer.bias is None else y + layer.bias
    return y if layer.activation is None else layer.activation(y)


def _rounded(cls: type) -> tuple[type, ...]:
    """The classes of a layer that is rounded. One that prepares its kernel passes the prepared kernel on."""
    base = next(rounded for plain, rounded in ROUNDED.items() if issubclass(cls, plain))
    return (base,) if cls in ROUNDED else (cls, base)


def _become(layer: keras.Layer, *classes: type) -> None:
    """Gives a layer these classes under its own one's name: Keras finds variables in a file by names of classes."""
    layer.__class__ = type(type(layer).__name__, classes, {})
