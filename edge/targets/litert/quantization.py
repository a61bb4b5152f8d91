"""What makes a quantized .tflite file keep its answers: the float file is prepared before it is quantized.

ai-edge-quantizer writes the file. It is given a float file whose numbers are already right for it, and the ranges of
activations and weights: nothing is left for it to decide. Without calibration images it decides as it does by itself.
"""

import contextlib
import dataclasses
import functools
import io
import math
import re
import warnings

import numpy as np

from keras_vits._util.progress import progress
from keras_vits.graph.ops import sigmoid, softmax

from ...quantize import numerics as q
from ...quantize.recipes import AS_THEY_COME, WIDE, exactly

ROWS = 1024  # of a tensor's tokens or pixels, over all images, in the sample that scales are chosen on
# A scale costs a multiplication. It is put in where a layer's outputs have less signal than this over the noise that
# 8 bits add there and where it takes away half of it, if all scales together take away half of the whole file's noise.
# Attention is computed in 8 bits where its outputs have as much, and a range leaves out values that were seen where
# that takes away half of the whole file's noise.
ENOUGH_DB, WORTH = 35.0, 0.5
RESCALED = 128  # scale of input times weight over that of the output: XNNPACK refuses 256, and its refusal may crash
GATED = 1.25  # noise that sigmoid in 8 bits may make of that of the rounding before and after x * sigmoid(x)
COMPARED = 32  # batches, at most, on which the ways to choose ranges are compared
LINEAR = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")
ARRANGING = ("RESHAPE", "TRANSPOSE")
FEW_WEIGHTS, MANY_ROWS = 1024, 1024  # of a layer that is faster in float than with ranges found for each row
FEW_CHANNELS = 4  # of an image: less than the 8 that XNNPACK pads each pixel to in int8
STEPS = ("smooth", "range", "round", "correct")


@dataclasses.dataclass(eq=False)
class Layer:
    """A dense layer or convolution of a file, and how it is to be quantized.

    Attributes:
        kind: one of `LINEAR`.
        name: of its weight's layer, as everywhere in this package.
        output: name of its output tensor, by which a recipe finds it.
        operator: the file's operator; `x`, `weight`, `bias` and `y` are its tensors (-1: no bias).
        config: the recipe's settings for it, or `None` to leave it in float.
        attended: whether it reads what an attention gives.
    """

    kind: str
    name: str
    output: str
    operator: object
    config: dict | None = None
    attended: bool = False

    x = property(lambda self: int(self.operator.inputs[0]))
    weight = property(lambda self: int(self.operator.inputs[1]))
    bias = property(lambda self: int(self.operator.inputs[2]) if len(self.operator.inputs) > 2 else -1)
    y = property(lambda self: int(self.operator.outputs[0]))

    @property
    def bits(self):
        return self.config["op_config"]["weight_tensor_config"]["num_bits"]

    @property
    def activation_bits(self):
        """Of a static recipe; `None` where activations are quantized as they come, or stay in float."""
        return self.config["op_config"].get("activation_tensor_config", {}).get("num_bits")

    @property
    def dynamic(self):
        """Whether each row of its inputs gets a range of its own when the file runs."""
        return self.activation_bits is None and not self.config["op_config"]["explicit_dequantize"]


@dataclasses.dataclass(eq=False)
class Attention:
    """softmax(q k') v of a file, by its operators: two products of matrices with a softmax between them."""

    scores: object
    softmax: object
    product: object

    q = property(lambda self: int(self.scores.inputs[0]))
    k = property(lambda self: int(self.scores.inputs[1]))
    s = property(lambda self: int(self.scores.outputs[0]))
    p = property(lambda self: int(self.softmax.outputs[0]))
    v = property(lambda self: int(self.product.inputs[1]))
    y = property(lambda self: int(self.product.outputs[0]))


class File:
    """The operators and constants of a float .tflite file, to be read and changed.

    Args:
        content: bytes of the file.
    """

    def __init__(self, content):
        from ai_edge_litert import schema_py_generated as schema
        from ai_edge_litert.tools import flatbuffer_utils

        self.S, self.tools = schema, flatbuffer_utils
        self.model = flatbuffer_utils.read_model_from_bytearray(content)
        self.main = self.model.subgraphs[0]
        self.codes = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}

    def bytes(self):
        return self.tools.convert_object_to_bytearray(self.model)

    def builtin(self, operator):
        """TFLite's name of an operation."""
        return self.codes[self.model.operatorCodes[operator.opcodeIndex].builtinCode]

    def layers(self):
        """Every dense layer and convolution with constant float weights, as `Layer`s."""
        found = []
        for operator in self.main.operators:
            kind = self.builtin(operator)
            if kind in LINEAR and self._data(operator.inputs[1]) is not None:
                name = self.name(operator.inputs[1]).rpartition("/")[0]
                found.append(Layer(kind, name, self.name(operator.outputs[0]), operator))
        return found

    def attentions(self):
        """Every `Attention`."""
        found = []
        for operator in self.main.operators:
            if self.builtin(operator) != "SOFTMAX":
                continue
            s, p = int(operator.inputs[0]), int(operator.outputs[0])
            if any(len(self.readers(tensor)) != 1 or self.is_output(tensor) for tensor in (s, p)):
                continue
            scores, (product,) = self.maker(s), self.readers(p)
            products = scores is not None and self.builtin(scores) == self.builtin(product) == "BATCH_MATMUL"
            if products and product.inputs[0] == p != product.inputs[1]:
                found.append(Attention(scores, operator, product))
        return found

    def name(self, tensor):
        return self.main.tensors[tensor].name.decode()

    def maker(self, tensor):
        """The operator that computes a tensor, or `None`."""
        return next((op for op in self.main.operators if tensor in list(op.outputs)), None)

    def readers(self, tensor):
        return [op for op in self.main.operators if tensor in list(op.inputs)]

    def source(self, tensor, through=ARRANGING):
        """(the tensor of which this one is an arrangement, operators that arrange it, the last one first)."""
        steps = []
        while (operator := self.maker(tensor)) is not None and self.builtin(operator) in through:
            steps.append(operator)
            tensor = int(operator.inputs[0])
        return tensor, steps

    def arrangements(self, tensor):
        """Operators that arrange a tensor which nothing else reads, the first one first."""
        steps = []
        while len(readers := self.readers(tensor)) == 1 and not self.is_output(tensor):
            if self.builtin(readers[0]) not in ARRANGING:
                break
            steps += readers
            tensor = int(readers[0].outputs[0])
        return steps

    def is_output(self, tensor):
        return tensor in list(self.main.outputs)

    def _data(self, tensor):
        return self.model.buffers[self.main.tensors[tensor].buffer].data

    def get(self, tensor):
        """The array of a float32 constant."""
        return np.frombuffer(self._data(tensor), np.float32).reshape(self.main.tensors[tensor].shape)

    def set(self, tensor, array):
        tensor = self.main.tensors[tensor]
        if not tensor.buffer or sum(t.buffer == tensor.buffer for t in self.main.tensors) > 1:  # two may share one
            self.model.buffers.append(self.S.BufferT())
            tensor.buffer = len(self.model.buffers) - 1
        data = np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint8)
        self.model.buffers[tensor.buffer].data = data

    def set_bias(self, layer, array):
        """A bias of the layer's own: equal ones are one tensor in the file."""
        if layer.bias >= 0 and len(self.readers(layer.bias)) == 1:
            self.set(layer.bias, array)
        else:
            bias = self.tensor(f"{layer.output}/bias", array.shape, array)
            layer.operator.inputs = [*list(layer.operator.inputs)[:2], bias]

    def add_bias(self, layer, array):
        """Adds to a layer's bias, or gives it one."""
        self.set_bias(layer, array + (self.get(layer.bias) if layer.bias >= 0 else 0))

    def is_shared(self, layer):
        """Whether another operator reads the layer's weights too."""
        return len(self.readers(layer.weight)) > 1

    def is_grouped(self, layer):
        """Whether it is a convolution within groups of channels."""
        weight, x = (self.main.tensors[tensor].shape for tensor in (layer.weight, layer.x))
        return layer.kind == "CONV_2D" and weight[3] != x[3]

    def tensor(self, name, shape, array=None):
        """A new float32 tensor; its number."""
        tensor = self.S.TensorT()
        tensor.name, tensor.shape, tensor.type = name.encode(), list(shape), self.S.TensorType.FLOAT32
        tensor.buffer = 0
        self.main.tensors.append(tensor)
        if array is not None:
            self.set(len(self.main.tensors) - 1, array)
        return len(self.main.tensors) - 1

    def multiply(self, tensor, factors, readers):
        """Lets these operators read tensor * factors (C) instead of the tensor."""
        name, shape = self.name(tensor), self.main.tensors[tensor].shape
        by = self.tensor(f"{name}/factors", factors.shape, factors)
        result = self.tensor(f"{name}/scaled", shape)
        operator = self.S.OperatorT()
        operator.opcodeIndex = self._code("MUL")
        operator.inputs, operator.outputs = [tensor, by], [result]
        operator.builtinOptionsType, operator.builtinOptions = self.S.BuiltinOptions.MulOptions, self.S.MulOptionsT()
        for reader in readers:
            reader.inputs = [result if i == tensor else i for i in reader.inputs]
        first = min(i for i, op in enumerate(self.main.operators) if any(op is reader for reader in readers))
        self.main.operators.insert(first, operator)

    def _code(self, name):
        builtin = getattr(self.S.BuiltinOperator, name)
        for i, code in enumerate(self.model.operatorCodes):
            if code.builtinCode == builtin:
                return i
        code = self.S.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, builtin, 1
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1


# ---------------------------------------------------------------- which layer is quantized, and how


def plan(file, recipe, float_layers=()):
    """The file's layers that are to be quantized, each with the last of the recipe's entries that fits it.

    Args:
        file: a `File`.
        recipe: a `Recipe`.
        float_layers: names of layers, or of what they lie in (`"block_3"`), that stay in float.

    Raises:
        ValueError: a float layer that the file does not have.
    """
    layers = file.layers()
    for name in float_layers:
        if not any(within(layer.name, name) for layer in layers):
            known = ", ".join(dict.fromkeys(layer.name for layer in layers))
            raise ValueError(f"No layer {name!r} to leave in float. There are: {known}.")
    chosen, attended = [], {attention.y for attention in file.attentions()}
    for layer in layers:
        fits = [e for e in recipe.litert if e["operation"] == layer.kind and re.search(e["regex"], layer.output)]
        if fits and not any(within(layer.name, name) for name in float_layers):
            layer.config = _eight_bits_if_odd(file, layer, fits[-1])
            layer.attended = file.source(layer.x, (*ARRANGING, "MUL"))[0] in attended
            if recipe.attention and layer.attended and layer.kind == "FULLY_CONNECTED":
                layer.config = AS_THEY_COME
            if recipe.wide_below_db is not None or not _is_faster_in_float(file, layer):
                chosen.append(layer)
    return chosen


def within(layer, name):
    """Whether a layer is the named one, or lies in it."""
    return layer == name or layer.startswith(f"{name}/")


def _is_faster_in_float(file, layer):
    """Whether it is a convolution of an image after a PAD, or has few weights for many rows that are quantized as they
    come.

    XNNPACK takes a PAD into a float convolution. Before one of integers it copies the image, pixel by pixel, in more
    time than the float convolution needs. To find a row's range takes as long as a product with some hundred weights.
    """
    if layer.config["op_config"]["explicit_dequantize"]:
        return False
    before = file.maker(layer.x)
    padded = before is not None and file.builtin(before) == "PAD"
    if padded and layer.kind == "CONV_2D" and file.main.tensors[layer.x].shape[-1] <= FEW_CHANNELS:
        return True
    weights, rows = math.prod(file.main.tensors[layer.weight].shape), math.prod(file.main.tensors[layer.y].shape[:-1])
    return layer.dynamic and weights <= FEW_WEIGHTS and rows >= MANY_ROWS


def _eight_bits_if_odd(file, layer, config):
    """XNNPACK packs 4-bit weights in pairs: a dense layer with an odd number of inputs gets 8 bits."""
    weight = config["op_config"]["weight_tensor_config"]
    if weight["num_bits"] != 4 or file.main.tensors[layer.weight].shape[-1] % 2 == 0:
        return config
    return _changed(config, weight_tensor_config={**weight, "num_bits": 8})


def _changed(config, **fields):
    return {**config, "op_config": {**config["op_config"], **fields}}


# ---------------------------------------------------------------- what the float file computes on the images


@dataclasses.dataclass(eq=False)
class Activation:
    """What is known of a tensor (...,C) after all images: histogram, mean (C), a sample of rows, sum of x x^T (C,C);
    and the first whole one."""

    histogram: q.Histogram = dataclasses.field(default_factory=q.Histogram)
    samples: list = dataclasses.field(default_factory=list)
    total: np.ndarray | float = 0.0
    count: int = 0
    hessian: np.ndarray | None = None
    first: np.ndarray | None = None

    def add(self, x, rows, hessian=False, whole=False):
        if whole and self.first is None:
            self.first = x
        x = x.reshape(-1, x.shape[-1])
        self.histogram.add(x)
        self.total, self.count = self.total + x.sum(0, dtype=np.float64), self.count + len(x)
        keep = np.random.default_rng(self.count).permutation(len(x))[:rows]
        self.samples.append(x[np.sort(keep)])
        if hessian:
            self.hessian = x.T @ x + (0 if self.hessian is None else self.hessian)

    @functools.cached_property
    def rows(self):
        return np.concatenate(self.samples)

    @property
    def mean(self):
        return self.total / self.count

    @functools.cached_property
    def compensation(self):
        return q.compensation(self.hessian)


def observe(file, layers, images, interpreter, attentions=()):
    """Runs the float file on the images: tensor -> `Activation`, for every input and output of layers and attentions.

    Args:
        file: a `File`.
        layers: of `plan`.
        images: list of batches as the file takes them.
        interpreter: (bytes, keep) -> an interpreter.
        attentions: the file's.
    """
    runner = interpreter(bytes(file.bytes()), keep=True)
    image = runner.get_input_details()[0]["index"]
    found = {tensor: Activation() for layer in layers for tensor in (layer.x, layer.y)}
    rounded = {layer.x for layer in layers if _is_rounded(file, layer)}
    operands = {tensor for a in attentions for tensor in (a.q, a.k, a.v)}
    found |= {t: Activation() for a in attentions for t in (*operands, a.s, a.p, a.y) if t not in found}
    for batch in progress(images, "calibrating"):
        runner.set_tensor(image, batch)
        runner.invoke()
        for tensor, activation in found.items():
            activation.add(runner.get_tensor(tensor), -(-ROWS // len(images)), tensor in rounded, tensor in operands)
    return found


def _is_rounded(file, layer):
    """Whether its weights are rounded with a Hessian: where that brings more than activations of 8 bits then lose, in a
    product of matrices whose weights have 4 bits or whose inputs are quantized as they come."""
    shape = file.main.tensors[layer.weight].shape
    ones = layer.kind == "CONV_2D" and shape[1] == shape[2] == 1 and not file.is_grouped(layer)
    product = layer.kind == "FULLY_CONNECTED" or ones
    return product and (layer.bits == 4 or layer.dynamic) and not file.is_shared(layer)


# ---------------------------------------------------------------- the preparation


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the calibration images decide about a file's activations, by the names of tensors.

    Attributes:
        recipe: name of the static recipe.
        ranges: tensor -> (low, high) that its 8 or 16 bits stand for.
        wide: outputs of layers whose activations have 16 bits.
        operators: outputs of the other operators that compute in integers: of attention, and of SiLU.
        mean: of pixels 0 to 1, for each channel (C): what the model is given as 0.
    """

    recipe: str
    ranges: dict[str, tuple[float, float]]
    wide: tuple[str, ...]
    operators: tuple[str, ...]
    mean: tuple[float, ...]

    def applied(self, file, layers):
        """(ranges, operators) of `Preparation._activations` for a file; sets the layers whose activations have 16 bits.

        A file that takes pixels has the mean in the bias of its first layer: there it is put as the rounded weights see
        it, as in the model.

        Raises:
            ValueError: the file has a layer that is not among them.
        """
        ranges = {name: _range(*limits) for name, limits in self.ranges.items()}
        for layer in layers:
            if layer.activation_bits and not {file.name(layer.x), file.name(layer.y)} <= self.ranges.keys():
                raise ValueError(
                    f"Layer {layer.name!r} was not there when ranges were chosen for this file: it was exported in "
                    "another form than the model was fine-tuned in. Pass calibration images."
                )
            if layer.output in self.wide:
                layer.config = _changed(layer.config, activation_tensor_config=WIDE)
            source = file.maker(file.source(layer.x, (*ARRANGING, "SPACE_TO_DEPTH", "PAD", "REVERSE_V2"))[0])
            if source is not None and file.builtin(source) == "DEQUANTIZE":
                ranges[file.name(layer.x)] = _range(0, 1)
                weight = file.get(layer.weight)
                lost = weight - q.round_weight(weight, q.weight_scale(weight, layer.bits), layer.bits)
                error = lost.reshape(len(weight), -1, len(self.mean)).sum(1) @ np.float32(self.mean)
                file.add_bias(layer, error)
        return ranges, [op for op in file.main.operators if file.name(op.outputs[0]) in self.operators]


class Preparation:
    """A float file and what it computes on the calibration images, ready to be quantized in more than one way.

    Args:
        content: bytes of the float file.
        recipe: a `Recipe`.
        images: list of batches as the file takes them, or `None` without calibration.
        interpreter: (bytes, keep) -> an interpreter, of which `keep` says whether it keeps every tensor.
        float_layers: names of layers, or of what they lie in (`"block_3"`), that stay in float.
        steps: which of `STEPS` are done: smoothing, a choice of ranges, rounding of weights, correction of biases.
        choice: a `Choice` that was made before, to be followed instead of `images`.

    Raises:
        ValueError: a float layer that the file does not have.
    """

    def __init__(self, content, recipe, images, interpreter, float_layers=(), steps=STEPS, choice=None):
        self.content, self.recipe, self.interpreter = content, recipe, interpreter
        self.float_layers, self.steps, self.choice = tuple(float_layers), steps, choice
        self.images = images if recipe.is_integer else None
        file = File(content)
        layers = plan(file, recipe, self.float_layers)
        if self.images is None:
            return
        look = lambda: observe(file, layers, images, interpreter, file.attentions() if recipe.attention else ())
        self.seen = look()
        if "smooth" in steps and _smooth(file, layers, self.seen):
            added = len(file.main.operators) - len(File(content).main.operators)
            forms, errors = [(content, self.seen), (bytes(file.bytes()), look())], []
            for self.content, self.seen in forms:
                errors.append(self._error(self.quantized(method="minmax")))
            self.content, self.seen = forms[errors[1] < (WORTH if added else 1.0) * errors[0]]

    def layers(self):
        """Names of the layers that are quantized, in the order of the file, each once."""
        return list(dict.fromkeys(layer.name for layer in plan(File(self.content), self.recipe, self.float_layers)))

    def quantized(self, only=None, method=None):
        """Bytes of the quantized file.

        Args:
            only: the one layer to quantize; all of them by default.
            method: of `quantization.Histogram.range`; by default, for a static recipe, the one with which the file
                changes its outputs on the calibration images least, if that is by far: other images have other values.
        """
        if method is None and self.images is not None and self.recipe.needs_calibration and "range" in self.steps:
            contents = [self.quantized(only, method) for method in q.METHODS]  # of all values first
            errors = [self._error(content) for content in contents]
            best = int(np.argmin(errors))
            return contents[best if errors[best] < WORTH * errors[0] else 0]
        file = File(self.content)
        layers = [g for g in plan(file, self.recipe, self.float_layers) if only in (None, g.name)]
        if self.images is None and self.choice is None:
            return _written(self.content, [_entry(file, layer.config, layer.operator) for layer in layers])
        if self.choice is not None:
            ranges, operators = self.choice.applied(file, layers)
        else:
            ranges, operators = self._activations(file, layers, method or "minmax")
            keys = {file.source(attention.k)[0] for attention in file.attentions()}  # a bias of theirs changes nothing
            for layer in layers:
                steps = [step for step in self.steps if step != "correct" or layer.y not in keys]
                _finish_weights(file, layer, self.seen[layer.x], ranges, steps)
        eight = next((layer.config for layer in layers if layer.activation_bits == 8), None)
        entries = [_entry(file, layer.config, layer.operator) for layer in layers]
        return _written(bytes(file.bytes()), entries + [_entry(file, eight, op) for op in operators], ranges)

    def chosen(self, method, mean):
        """The `Choice` of a static recipe with this method of `quantization.Histogram.range`, for pixels of a mean."""
        file = File(self.content)
        layers = plan(file, self.recipe, self.float_layers)
        ranges, operators = self._activations(file, layers, method)
        return Choice(
            recipe=self.recipe.name,
            ranges={name: (limits["min"].item(), limits["max"].item()) for name, limits in ranges.items()},
            wide=tuple(layer.output for layer in layers if layer.activation_bits == 16),
            operators=tuple(file.name(op.outputs[0]) for op in operators),
            mean=tuple(mean),
        )

    def _activations(self, file, layers, method):
        """(name of a tensor -> its range, operators beside the layers that compute in integers)."""
        if self.recipe.wide_below_db is not None:
            _widen(file, layers, self.seen, self.recipe.wide_below_db)
        ranges = _activation_ranges(file, layers, self.seen, method)
        operators = _silu_operators(file, layers, self.seen, ranges)
        if self.recipe.attention:
            operators += _attention_operators(file, layers, self.seen, ranges, method)
        return ranges, operators

    def _error(self, content):
        """What a quantized file changes of the first output for the calibration images, squared."""
        found = outputs(self.interpreter(content), self.images[:COMPARED])
        return float(np.square(found - self._expected).sum())

    @functools.cached_property
    def _expected(self):
        """The float file's outputs for these images, which smoothing does not change."""
        return outputs(self.interpreter(self.content), self.images[:COMPARED])


def outputs(runner, images):
    """The first output of an interpreter for every batch, in one array."""
    image, output = runner.get_input_details()[0]["index"], runner.get_output_details()[0]["index"]
    found = []
    for batch in images:
        runner.set_tensor(image, batch)
        runner.invoke()
        found.append(runner.get_tensor(output).astype(np.float64))
    return np.concatenate(found)


def _written(content, entries, ranges=None):
    if not entries:
        return content
    from ai_edge_quantizer.quantizer import Quantizer

    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):  # it has bars of its own
        result = Quantizer(bytearray(content), entries).quantize(
            ranges, enable_progress_bar=False, enable_progress_report=False
        )
    return bytes(result.quantized_model)


def _entry(file, config, operator):
    """The settings for this operator alone, as ai-edge-quantizer takes them."""
    return {**config, "operation": file.builtin(operator), "regex": exactly(file.name(operator.outputs[0]))}


def _activation_ranges(file, layers, seen, method):
    """Tensor name -> smallest and largest value that its bits stand for, as ai-edge-quantizer takes them."""
    ranges = {}
    for layer in layers:
        for tensor in (layer.x, layer.y) if layer.activation_bits else ():
            low, high = seen[tensor].histogram.range(method if layer.activation_bits == 8 else "minmax")
            ranges.setdefault(file.name(tensor), _range(low, high))
    for layer in layers:
        if layer.activation_bits == 8:
            x, y = (ranges[file.name(tensor)] for tensor in (layer.x, layer.y))
            _widened(y, np.abs(file.get(layer.weight)).max() / 127 * (x["max"] - x["min"]))
    return ranges


def _range(low, high):
    """As ai-edge-quantizer takes it."""
    return {"min": np.float32([[low]]), "max": np.float32([[high]])}


def _widened(y, product):
    """The range of a product's outputs, wide enough for XNNPACK; `product`: 255 times scale of input times weight."""
    wider = np.maximum(1, product / (y["max"] - y["min"] + 1e-9) / RESCALED)
    y.update(min=y["min"] * wider, max=y["max"] * wider)


def _silu_operators(file, layers, seen, ranges):
    """Those of x * sigmoid(x), and of a PAD, between two layers of 8-bit activations: they round its ends anyway.

    Where that adds much to the noise of the ends, none: sigmoid has steps of 1 / 256 and ends at 255 / 256.
    """

    def noise(layer, end, integers):
        y, (low, high) = seen[layer.y].rows, ranges[file.name(layer.y)].values()
        x = q.fake_quantize(y, low, high)
        gate = np.minimum(np.round(256 * sigmoid(x)), 255) / 256 if integers else sigmoid(x)
        return np.square(q.fake_quantize(x * gate, *ranges[file.name(end)].values()) - y * sigmoid(y)).mean()

    eight = [layer for layer in layers if layer.activation_bits == 8]
    rounded, operators = {layer.x for layer in eight}, []
    for layer in eight:
        readers = sorted(file.readers(layer.y), key=file.builtin)
        if [file.builtin(op) for op in readers] != ["LOGISTIC", "MUL"] or file.is_output(layer.y):
            continue
        gate, product = (int(op.outputs[0]) for op in readers)
        end, after = product, file.readers(product)
        if [file.builtin(op) for op in after] == ["PAD"]:
            readers, end = [*readers, *after], int(after[0].outputs[0])
        ends = all(any(op is g.operator for g in eight) for op in file.readers(end)) and not file.is_output(end)
        silu = set(readers[1].inputs) == {layer.y, gate} and len(file.readers(gate)) == 1
        if end in rounded and ends and silu and noise(layer, end, True) < GATED * noise(layer, end, False):
            ranges[file.name(gate)] = _range(0, 1)
            ranges[file.name(product)] = ranges[file.name(end)]
            operators += readers
    return operators


def _attention_operators(file, layers, seen, ranges, method):
    """Attention's two products, and what arranges their operands, where its values come in 8 bits.

    Where that leaves little of its outputs' signal over the noise, none.
    """
    eight, found = {layer.y for layer in layers if layer.activation_bits == 8}, []
    for attention in file.attentions():
        operands = {tensor: file.source(tensor) for tensor in (attention.q, attention.k, attention.v)}
        sources = {source for source, _ in operands.values()}
        if operands[attention.v][0] not in eight or len(sources) < 3:
            continue
        new, operators = {}, [attention.scores, attention.product]  # tensor -> range, of those that are 8 bits then
        for tensor, (source, steps) in operands.items():
            if source not in eight:  # a norm of the queries, say: they are rounded where the product reads them
                source, steps = tensor, []
            limits = ranges[file.name(source)] if source in eight else _range(*seen[tensor].histogram.range(method))
            limits = limits if tensor == attention.q else _around_zero(limits)
            new |= dict.fromkeys((source, *(int(op.outputs[0]) for op in steps)), limits)
            operators += steps
        new[attention.p] = _range(0, seen[attention.p].histogram.range(method)[1])
        for y, a, b in ((attention.s, attention.q, attention.k), (attention.y, attention.p, attention.v)):
            new[y] = _range(*seen[y].histogram.range(method))
            _widened(new[y], (new[a]["max"] - new[a]["min"]) * new[b]["max"] / 127)
        after = file.arrangements(attention.y)
        new |= {int(op.outputs[0]): new[attention.y] for op in after}
        if _attention_db(attention, seen, new) >= ENOUGH_DB:
            ranges |= {file.name(tensor): limits for tensor, limits in new.items()}
            found += [*operators, *after]
    return found


def _around_zero(limits):
    """A range in which zero is the integer zero, as XNNPACK wants it of the second operand of a product."""
    step = max(float(-limits["min"].min()), float(limits["max"].max())) / 127
    return _range(-128 * step, 127 * step)


def _attention_db(attention, seen, ranges):
    """Signal over noise of an attention's outputs for the first images, with all that it reads and makes in 8 bits.

    Args:
        attention: an `Attention`.
        seen: tensor -> `Activation`.
        ranges: tensor -> range.
    """
    adjoint = lambda x, wanted: np.swapaxes(x, -1, -2) if wanted else x
    operands = attention.q, attention.k, attention.v

    def attend(rounded):
        scores, product = attention.scores.builtinOptions, attention.product.builtinOptions
        queries, keys, values = (rounded(tensor, seen[tensor].first) for tensor in operands)
        scores = rounded(attention.s, adjoint(queries, scores.adjX) @ adjoint(keys, scores.adjY))
        shares = rounded(attention.p, softmax(scores, -1))
        return rounded(attention.y, shares @ adjoint(values, product.adjY))

    exact = attend(lambda _, x: x)
    error = attend(lambda tensor, x: q.fake_quantize(x, *ranges[tensor].values())) - exact
    return 10 * np.log10(np.square(exact).sum() / max(np.square(error).sum(), 1e-30))


def _widen(file, layers, seen, below_db):
    """16 bits for the activations of layers whose outputs would have less signal over the noise of 8 bits, and of those
    that read what attention gives: tokens are alike there, and so would be their errors."""
    for layer in layers:
        if layer.activation_bits == 8:
            much = _noise(file, layer, seen) * 10 ** (below_db / 10) > _signal(seen[layer.y])
            if much or layer.attended:
                layer.config = _changed(layer.config, activation_tensor_config=WIDE)


def _noise(file, layer, seen):
    """Mean square that 8 bits add to a layer's outputs, summed over them."""
    inputs, outputs = (np.ones(seen[tensor].rows.shape[1], np.float32) for tensor in (layer.x, layer.y))
    return _input_noise(file, layer, seen, inputs) + q.output_noise(seen[layer.y].rows, outputs)


def _input_noise(file, layer, seen, scale):
    """The part of it that inputs and weights make when the inputs are divided by scale (I)."""
    if file.is_grouped(layer):
        return 0.0
    return q.input_noise(seen[layer.x].rows, _by_input(file, layer), scale, _rounded_bits(layer), layer.dynamic)


def _rounded_bits(layer):
    """Bits of a layer's weights for `input_noise`; `None` for depthwise ones, each channel of which has a scale."""
    return None if layer.kind == "DEPTHWISE_CONV_2D" else layer.bits


def _smooth(file, layers, seen):
    """Moves outlier channels of inputs and outputs into the weights where it helps; whether it did anywhere."""
    changed = False
    groups = {}  # input tensor -> the layers that read it
    for layer in layers:
        if layer.activation_bits == 8 or layer.dynamic:
            groups.setdefault(layer.x, []).append(layer)
    rounding = {}  # output of a layer -> noise that its own 8 bits make there; what its inputs and weights make
    for layer in layers:
        ones = [np.ones(seen[tensor].rows.shape[1], np.float32) for tensor in (layer.x, layer.y)]
        own = q.output_noise(seen[layer.y].rows, ones[1]) if layer.activation_bits == 8 else 0.0
        rounding[layer.y] = own, _input_noise(file, layer, seen, ones[0])
    for tensor, group in groups.items():
        if any(file.is_grouped(layer) or file.is_shared(layer) for layer in group):
            continue
        rows, weights = seen[tensor].rows, [_by_input(file, layer) for layer in group]
        outputs = sum(rounding[layer.y][0] for layer in group)

        def noise(scale, group=group, outputs=outputs):
            return outputs + sum(_input_noise(file, layer, seen, scale) for layer in group)

        largest = np.max([np.abs(w).reshape(-1, w.shape[-1]).max(0) for w in weights], axis=0)
        signal = sum(_signal(seen[layer.y]) for layer in group)
        scale = _best(noise, q.input_scales(rows, largest), signal)
        if scale is None:
            continue
        changed = True
        for layer in group:
            rounding[layer.y] = rounding[layer.y][0], _input_noise(file, layer, seen, scale)
        if (source := _source(file, tensor, group)) is not None:
            _scale_outputs(file, source, 1 / scale)
        else:
            file.multiply(tensor, 1 / scale, [layer.operator for layer in group])
        for layer in group:
            weight = file.get(layer.weight)
            file.set(layer.weight, weight * np.repeat(scale, weight.shape[-1] // len(scale)))
    for layer in layers:
        if layer.activation_bits != 8 or layer.y in groups or file.is_output(layer.y) or not _scales(file, layer):
            continue
        rows, inputs = seen[layer.y].rows, rounding[layer.y][1]
        noise = lambda scale, rows=rows, inputs=inputs: inputs + q.output_noise(rows, scale)
        scale = _best(noise, q.output_scales(rows), _signal(seen[layer.y]))
        if scale is not None:
            changed = True
            _scale_outputs(file, layer, 1 / scale)
            file.multiply(layer.y, scale, file.readers(layer.y))
    return changed


def _signal(activation):
    """Mean square of a layer's outputs, summed over them."""
    return float(np.square(activation.rows).mean(0).sum())


def _best(noise, candidates, signal):
    """The candidate that leaves the least noise; `None` if leaving all as it is is good enough, or comes near.

    Args:
        noise: scale -> mean square of all noise in the outputs of layers.
        candidates: scales.
        signal: mean square of these outputs.
    """
    found = [noise(scale) for scale in candidates]
    best, before = int(np.argmin(found)), noise(np.ones_like(candidates[0]))
    good = signal > 10 ** (ENOUGH_DB / 10) * before
    return None if good or found[best] > WORTH * before else candidates[best]


def _by_input(file, layer):
    """A layer's weights (O,...,I); of a depthwise convolution (multiplier,height,width,I)."""
    weight = file.get(layer.weight)
    if layer.kind != "DEPTHWISE_CONV_2D":
        return weight
    _, height, width, channels = weight.shape
    multiplier = layer.operator.builtinOptions.depthMultiplier
    return np.moveaxis(weight.reshape(height, width, channels // multiplier, multiplier), -1, 0)


def _scales(file, layer):
    """Whether scaling a layer's weights and bias scales its outputs: no activation but ReLU is fused into it."""
    return layer.operator.builtinOptions.fusedActivationFunction in (0, 1) and not file.is_shared(layer)


def _source(file, tensor, group):
    """The layer that computes a tensor which the group alone reads, and that can be scaled in its stead, or `None`."""
    source = next((layer for layer in file.layers() if layer.y == tensor), None)
    if source is None or file.is_output(tensor) or len(file.readers(tensor)) != len(group) or not _scales(file, source):
        return None
    return source


def _scale_outputs(file, layer, scale):
    weight = file.get(layer.weight)
    last = layer.kind == "DEPTHWISE_CONV_2D"
    file.set(layer.weight, weight * (scale if last else scale.reshape(-1, *[1] * (weight.ndim - 1))))
    if layer.bias >= 0:
        file.set_bias(layer, file.get(layer.bias) * scale)


def _finish_weights(file, layer, x, ranges, steps):
    """Rounds weights with regard to their inputs, or else puts what rounding adds to the mean output into the bias.

    The mean: bias correction, arXiv 1906.04721.
    """
    depthwise, weight = layer.kind == "DEPTHWISE_CONV_2D", file.get(layer.weight)
    weight = np.moveaxis(weight, -1, 0) if depthwise else weight  # (O,...,I), or (O,1,height,width)
    if "round" in steps and x.hessian is not None and _is_rounded(file, layer):
        flat, scale = q.gptq(weight.reshape(len(weight), -1), *x.compensation, layer.bits)
        rounded, scale = flat.reshape(weight.shape), scale.reshape(-1, *[1] * (weight.ndim - 1))
        most = scale * (2 ** (layer.bits - 1) - 1)
        ranges[file.name(layer.weight)] = {"min": -most, "max": most}
        file.set(layer.weight, rounded)
        if layer.bits == 8:
            return  # its mean output is nearly right already, and more would be right on these images alone
    else:
        rounded = q.round_weight(weight, q.weight_scale(weight, layer.bits), layer.bits)
    if "correct" not in steps or file.is_grouped(layer):
        return
    shift = np.zeros_like(x.mean)  # of the inputs' mean, by their own quantization
    if layer.activation_bits == 8:
        known = ranges[file.name(layer.x)]
        shift = (x.rows - q.fake_quantize(x.rows, known["min"], known["max"])).mean(0)
    if depthwise:
        sums = [w.reshape(len(w), -1).sum(1) for w in (weight - rounded, rounded)]
        repeat = len(weight) // len(x.mean)
        error = sums[0] * np.repeat(x.mean, repeat) + sums[1] * np.repeat(shift, repeat)
    else:
        sums = [w.sum(tuple(range(1, w.ndim - 1))) for w in (weight - rounded, rounded)]
        error = sums[0] @ x.mean + sums[1] @ shift
    file.add_bias(layer, error)
