"""A numpy evaluator of a saved Core ML ML Program, for checks off a Mac.

It reads a .mlpackage from its own bytes (Manifest.json, the protobuf, weights/weight.bin) and computes every operation
from its documented definition, rounded to the type that the file declares: a float16 program is rounded operation by
operation, compressed weights are decoded as the file says. It shows what the file says, not what Apple's hardware makes
of it.

Reference  https://apple.github.io/coremltools/docs-guides (MIL ops), coremltools' `mlmodel/format/MIL.proto` and
           `mlmodel/src/MILBlob/Blob/StorageFormat.hpp` (the weight file).
"""

import importlib
import importlib.abc
import inspect
import json
import logging
import math
import pathlib
import sys
import threading

import numpy as np

from keras_vits.graph.ir import histogram
from keras_vits.graph.ops import erf, sigmoid

# ---------------------------------------------------------------- coremltools without the frameworks it looks for

_import = threading.Lock()


class _Hidden(importlib.abc.MetaPathFinder):
    """Makes packages that are not imported yet look absent."""

    NAMES = (
        "tensorflow",
        "torch",
        "torchvision",
        "torchaudio",
        "torchao",
        "executorch",
        "transformers",
        "xgboost",
        "sklearn",
    )

    def __init__(self):
        self.names = {name for name in self.NAMES if name not in sys.modules}
        self.thread = threading.get_ident()

    def find_spec(self, name, path=None, target=None):
        if name in self.names and threading.get_ident() == self.thread:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def coremltools():
    """The coremltools package, imported in half a second: it imports TensorFlow, PyTorch and more where it finds them
    (9 s), none of which is needed here. What is imported already stays visible to it, and nothing is hidden afterwards.

    Raises:
        ImportError: coremltools is not installed.
    """
    with _import:
        if sys.modules.get("coremltools"):
            return sys.modules["coremltools"]
        logging.getLogger("coremltools").setLevel(logging.ERROR)
        hidden = _Hidden()
        sys.meta_path.insert(0, hidden)
        try:
            return importlib.import_module("coremltools")
        except ImportError as e:
            raise ImportError('Core ML files need coremltools: pip install "keras-vits[coreml]"') from e
        finally:
            sys.meta_path.remove(hidden)


# ---------------------------------------------------------------- reading

TYPES = {  # MIL.proto DataType -> name, numpy type once decoded, bits in the file
    1: ("bool", np.bool_, 8), 2: ("string", object, 0), 10: ("fp16", np.float16, 16), 11: ("fp32", np.float32, 32),
    21: ("int8", np.int8, 8), 22: ("int16", np.int16, 16), 23: ("int32", np.int32, 32), 25: ("int4", np.int8, 4),
    31: ("uint8", np.uint8, 8), 32: ("uint16", np.uint16, 16),
    33: ("uint32", np.uint32, 32), 35: ("uint4", np.uint8, 4), 36: ("uint2", np.uint8, 2),
    37: ("uint1", np.uint8, 1), 38: ("uint6", np.uint8, 6), 39: ("uint3", np.uint8, 3),
}  # fmt: skip
NUMPY = {name: dtype for name, dtype, _ in TYPES.values()}


def unpack(data, bits, count):
    """`count` unsigned numbers of `bits` bits each from bytes, least significant bit first."""
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=bits * count, bitorder="little").reshape(count, bits)
    return (flat << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


def decode(data, code, shape):
    """Bytes -> array of the type with this number; 4-bit integers are widened to 8 bits."""
    name, dtype, bits = TYPES[code]
    count = math.prod(shape)
    if bits >= 8:
        return np.frombuffer(data, dtype, count).reshape(shape)
    array = unpack(data, bits, count).reshape(shape)
    return ((array ^ 8).astype(np.int8) - np.int8(8)) if name == "int4" else array


class _Blobs:
    """A weight file: a 64-byte header (count, version 2), then records of 64 bytes that each point to their data."""

    def __init__(self, path):
        self.bytes = np.memmap(path, np.uint8, mode="r")
        if self.bytes.size < 64 or self.bytes[4:8].view(np.uint32)[0] != 2:
            raise ValueError("its weight file has no header of version 2")

    def __getitem__(self, offset):
        record = self.bytes[offset : offset + 64]
        if record.size < 64 or record[:4].view(np.uint32)[0] != 0xDEADBEEF:
            raise ValueError(f"its weight file has no record at byte {offset}")
        size, start = (int(n) for n in record[8:24].view(np.uint64))
        if start + size > self.bytes.size:
            raise ValueError(f"its weight file ends at byte {self.bytes.size}, before the weights at {start} do")
        return self.bytes[start : start + size].tobytes()


def _shape(tensor_type):
    return tuple(int(d.constant.size) for d in tensor_type.dimensions)


class Program:
    """A saved ML Program: `program({input: array}) -> {output: array}`, any number of images at once.

    Args:
        path: of the .mlpackage folder.

    Attributes:
        inputs: name -> (shape, type); the type of an image input is "rgb", "bgr" or "gray".
        outputs: names.
        operations: name of a MIL operation -> how often it occurs, constants left out, most frequent first.

    Raises:
        ValueError: the package is damaged or truncated, or holds an operation that has no definition here.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        proto = coremltools().proto
        from google.protobuf.message import DecodeError

        try:
            manifest = json.loads((self.path / "Manifest.json").read_text(encoding="utf-8"))
            model = self.path / "Data" / manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
            self.spec = proto.Model_pb2.Model.FromString(model.read_bytes())
            self._folder, self._files = model.parent, {}
            unknown = self._read()
        except (OSError, ValueError, LookupError, TypeError, DecodeError) as e:
            raise ValueError(f"{self.path} is not a complete .mlpackage ({e}): export the model again.") from None
        if unknown:
            raise ValueError(f"{self.path} cannot be evaluated: no reference definition of {', '.join(unknown)}.")

    def _read(self):
        """Finds inputs, outputs, constants and steps; returns the operations without a definition, if there are any."""
        if self.spec.WhichOneof("Type") != "mlProgram":
            raise ValueError("it holds no ML Program")
        function = self.spec.mlProgram.functions["main"]
        block = function.block_specializations[function.opset]
        colours = {10: "gray", 20: "rgb", 30: "bgr"}
        pictures = [i for i in self.spec.description.input if i.type.HasField("imageType")]
        orders = {i.name: colours[i.type.imageType.colorSpace] for i in pictures}
        kind = lambda i: orders.get(i.name, TYPES[i.type.tensorType.dataType][0])
        self.inputs = {i.name: (_shape(i.type.tensorType), kind(i)) for i in function.inputs}
        self.outputs = tuple(block.outputs)
        self.operations = histogram(op.type for op in block.operations if op.type != "const")
        if unknown := sorted(set(self.operations) - set(OPS) - {"classify"}):
            return unknown
        self._constants, self._steps, self._free = {}, [], {}
        for op in block.operations:
            if op.type == "const":
                self._constants[op.outputs[0].name] = self._value(op.attributes["val"])
            else:
                self._prepare(op)
        last = {name: i for i, (_, arguments, _) in enumerate(self._steps) for name in _names(arguments)}
        for name, i in last.items():  # a value goes after the last step that reads it
            if name not in self.outputs:
                self._free.setdefault(i, []).append(name)

    def _prepare(self, op):
        """An operation becomes a step, or a constant when it depends on no input."""
        arguments = {}
        for key, argument in op.inputs.items():
            found = [
                _Name(b.name) if b.WhichOneof("binding") == "name" else self._value(b.value) for b in argument.arguments
            ]
            found = [self._constants.get(v, v) if isinstance(v, _Name) else v for v in found]
            arguments[key] = found if key == "values" else found[0]
        if op.type.startswith("constexpr_"):  # those of iOS 16 keep their operands as attributes
            arguments |= {
                k: self._value(v) for k, v in op.attributes.items() if k in inspect.signature(OPS[op.type]).parameters
            }
        outputs = [(o.name, _shape(o.type.tensorType), o.type.tensorType.dataType) for o in op.outputs]
        if op.type == "classify" or _names(arguments):
            self._steps.append((op.type, arguments, outputs))
            return
        if not op.type.startswith("constexpr_"):
            arguments = {k: _lead(v) if k in TENSORS else v for k, v in arguments.items()}
        results = self._results(op.type, arguments)
        for (name, shape, code), result in zip(outputs, results, strict=True):
            self._constants[name] = _round(np.asarray(result).reshape(shape), code)

    def _value(self, value):
        """A literal of the file; floating-point ones as float32."""
        if value.type.WhichOneof("type") == "listType":
            return [self._value(v) for v in value.immediateValue.list.values]
        code, shape = value.type.tensorType.dataType, _shape(value.type.tensorType)
        if code not in TYPES:
            raise ValueError(f"it holds a constant of the unknown type {code}")
        if value.WhichOneof("value") == "blobFileValue":
            name = value.blobFileValue.fileName.replace("@model_path", str(self._folder))
            if name not in self._files:
                self._files[name] = _Blobs(name)
            array = decode(self._files[name][value.blobFileValue.offset], code, shape)
        else:
            kind = value.immediateValue.tensor.WhichOneof("value")
            values = getattr(value.immediateValue.tensor, kind).values
            if kind == "strings":
                return list(values) if shape else values[0]
            array = decode(values, code, shape) if kind == "bytes" else np.array(values, TYPES[code][1]).reshape(shape)
        return array.astype(np.float32) if array.dtype == np.float16 else array

    def _results(self, kind, arguments):
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            results = OPS[kind](**arguments)
        return results if isinstance(results, list) else [results]

    def __call__(self, inputs, trace=None):
        """Evaluates N images at once.

        Args:
            inputs: name -> array (N, *shape), where the shape is that of the file's input and has its own batch; for an
                image input, pixels 0 to 255 (N,H,W,3) in the order red, green, blue, or (N,H,W,1).
            trace: a dict that receives the inputs and every intermediate value by name, or `None`.

        Returns:
            Name -> array (N, *shape) of the output; for the outputs of a classifier, N labels and N dicts of
            probabilities.

        Raises:
            ValueError: a missing input or one of another shape.
        """
        values = {}
        for name, (shape, kind) in self.inputs.items():
            if name not in inputs:
                raise ValueError(f"{self.path.name} needs the input {name!r}; received {', '.join(inputs) or 'none'}.")
            array = np.asarray(inputs[name])
            if kind in ("rgb", "bgr", "gray"):
                array = np.moveaxis(array, -1, 1)[:, None, :: -1 if kind == "bgr" else 1]
            if array.shape[1:] != shape:
                raise ValueError(
                    f"Input {name!r} of {self.path.name} has shape {shape}; received {array.shape[1:]} for each image."
                )
            values[name] = array.astype(np.int32 if kind == "int32" else np.float32)
            if kind == "fp16":
                values[name] = _round(values[name], 10)
        if trace is not None:
            trace |= values
        count = len(next(iter(values.values())))
        for i, (kind, arguments, outputs) in enumerate(self._steps):
            find = lambda v: values[v] if isinstance(v, _Name) else v
            found = {k: [find(x) for x in v] if k == "values" else find(v) for k, v in arguments.items()}
            if kind == "classify":
                scores, labels = found["probabilities"].reshape(count, -1), found["classes"]
                values[outputs[0][0]] = [labels[j] for j in scores.argmax(-1)]
                values[outputs[1][0]] = [dict(zip(labels, row.tolist(), strict=True)) for row in scores]
                continue
            constant = {k for k, v in arguments.items() if k in TENSORS and not isinstance(v, _Name)}
            if kind in BROADCAST:
                found |= _aligned({k: v for k, v in found.items() if k in TENSORS}, constant)
            elif "values" in found:
                pairs = zip(found["values"], arguments["values"], strict=True)
                found["values"] = [
                    v if isinstance(a, _Name) else np.broadcast_to(v, (count, *v.shape)) for v, a in pairs
                ]
            elif constant:
                found |= {k: np.broadcast_to(found[k], (count, *found[k].shape)) for k in constant}
            for (name, shape, code), result in zip(outputs, self._results(kind, found), strict=True):
                if result.shape[1:] != shape:
                    raise ValueError(
                        f"{kind} gave {name} the shape {result.shape[1:]}; {self.path.name} declares {shape}."
                    )
                values[name] = _round(result, code)
                if trace is not None:
                    trace[name] = values[name]
            for name in self._free.get(i, ()):
                values.pop(name, None)
        return {name: values[name] for name in self.outputs}

    def ranges(self, batches):
        """Name of an input or of an intermediate value -> (lowest, highest) number that it takes over all batches.

        Args:
            batches: an iterable of dicts as `__call__` takes them.
        """
        found = {}
        for inputs in batches:
            values = {}
            self(inputs, trace=values)
            for name, array in values.items():
                if array.dtype == np.float32:
                    low, high = found.get(name, (np.inf, -np.inf))
                    found[name] = (min(low, float(array.min())), max(high, float(array.max())))
        return found


class _Name(str):
    """The name of a value that depends on the input."""


def _names(arguments):
    flat = (v for key, value in arguments.items() for v in (value if key == "values" else [value]))
    return {v for v in flat if isinstance(v, _Name)}


def _lead(value):
    return [v[None] for v in value] if isinstance(value, list) else value[None]


def _aligned(operands, constant):
    """Operands of unequal rank made ready for numpy: all but constants have the images as one more first axis."""
    rank = max(v.ndim - (k not in constant) for k, v in operands.items())
    wide = lambda v: v.reshape(v.shape[0], *(1,) * (rank + 1 - v.ndim), *v.shape[1:])
    return {k: v if k in constant else wide(v) for k, v in operands.items()}


def _round(array, code):
    """What a value of the declared type holds; float16 numbers stay in float32 arrays."""
    name, dtype, _ = TYPES[code]
    if name == "fp16":
        with np.errstate(over="ignore"):
            return array.astype(np.float16).astype(np.float32)
    return array.astype(dtype, copy=False)


# ---------------------------------------------------------------- operations
#
# Named and parametrised as in MIL. A tensor that depends on the input has one more axis in front, for the images;
# weights and other constants have the shape that the file declares.

TENSORS = {"x", "y", "values", "a", "b", "cond", "input", "indices", "query", "key", "value", "attn_mask"}


def _axis(axis):
    """A declared axis, behind the axis of the images."""
    return int(axis) + 1 if axis >= 0 else int(axis)


def _axes(axes, x):
    return tuple(range(1, x.ndim)) if axes is None else tuple(_axis(a) for a in axes)


def _batched(f):
    """Lets a function of (B, ...) take (N,B, ...)."""

    def call(x, **parameters):
        y = f(x.reshape(-1, *x.shape[2:]), **parameters)
        return y.reshape(*x.shape[:2], *y.shape[1:])

    return call


def _reduction(f):
    return lambda x, axes=None, keep_dims=False: f(x, axis=_axes(axes, x), keepdims=bool(keep_dims))


def _ints(numbers, default, rank):
    return [default] * rank if numbers is None else [int(n) for n in numbers]


def _padding(shape, size, strides, dilations, pad_type, pad):
    if pad_type == "custom":
        return [(int(a), int(b)) for a, b in np.reshape(pad, (-1, 2))]
    pads = []
    for n, k, s, d in zip(shape, size, strides, dilations, strict=True):
        total = 0 if pad_type == "valid" else max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        less = total // 2
        pads.append((total - less, less) if pad_type == "same_lower" else (less, total - less))
    return pads


def _windows(x, size, strides, dilations):
    """(B,C, space) -> (B,C, space of the output, size), a view."""
    n = len(size)
    span = [(k - 1) * d + 1 for k, d in zip(size, dilations, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(x, span, tuple(range(2, 2 + n)))
    return view[(..., *(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))]


def conv(x, weight, bias=None, strides=None, pad_type="valid", pad=None, dilations=None, groups=1):
    n, size, groups = weight.ndim - 2, weight.shape[2:], int(groups)
    strides, dilations = _ints(strides, 1, n), _ints(dilations, 1, n)
    pads = _padding(x.shape[2:], size, strides, dilations, pad_type, pad)
    windows = _windows(np.pad(x, [(0, 0), (0, 0), *pads]), size, strides, dilations)
    batch, channels, space = x.shape[0], x.shape[1], windows.shape[2 : 2 + n]
    out = weight.shape[0]
    if groups == channels:  # depthwise: one multiply-add of the whole image for each tap
        y = np.zeros((batch, groups, out // groups, *space), x.dtype)
        taps = weight.reshape(groups, out // groups, *(1,) * n, *size)
        for tap in np.ndindex(*size):
            y += windows[(..., *tap)][:, :, None] * taps[(..., *tap)]
    else:  # one matrix product for each image and group
        order = (0, 1, *range(2 + n, 2 + 2 * n), *range(2, 2 + n))
        columns = windows.transpose(order).reshape(batch, groups, -1, math.prod(space))
        y = weight.reshape(groups, out // groups, -1) @ columns
    y = y.reshape(batch, out, *space)
    return y if bias is None else y + bias.reshape(-1, *(1,) * n)


def _pool(kind):
    def pool(
        x, kernel_sizes, strides=None, pad_type="valid", pad=None, ceil_mode=False, exclude_padding_from_average=False
    ):
        if ceil_mode:
            raise ValueError("ceil_mode of pooling has no reference definition")
        n, size = len(kernel_sizes), _ints(kernel_sizes, 1, len(kernel_sizes))
        strides, dilations = _ints(strides, 1, n), [1] * n
        pads = [(0, 0), (0, 0), *_padding(x.shape[2:], size, strides, dilations, pad_type, pad)]
        window = tuple(range(-n, 0))
        if kind == "max":
            return _windows(np.pad(x, pads, constant_values=-np.inf), size, strides, dilations).max(window)
        total = _windows(np.pad(x, pads), size, strides, dilations).sum(window)
        if not exclude_padding_from_average:
            return total / math.prod(size)
        inside = np.pad(np.ones((1, 1, *x.shape[2:]), x.dtype), pads)
        return total / _windows(inside, size, strides, dilations).sum(window)

    return _batched(pool)


def linear(x, weight, bias=None):
    y = (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def matmul(x, y, transpose_x=False, transpose_y=False):
    return (np.swapaxes(x, -1, -2) if transpose_x else x) @ (np.swapaxes(y, -1, -2) if transpose_y else y)


def einsum(values, equation):
    x, y = values
    *outer, result = equation.replace(" ", "").replace("->", ",").split(",")
    return np.einsum(f"...{outer[0]},...{outer[1]}->...{result}", x, y, optimize=True)


def scaled_dot_product_attention(query, key, value, attn_mask=None):
    scores = query @ np.swapaxes(key, -1, -2) / np.float32(math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == np.bool_ else scores + attn_mask
    return softmax(scores) @ value


def softmax(x, axis=-1):
    e = np.exp(x - x.max(_axis(axis), keepdims=True))
    return e / e.sum(_axis(axis), keepdims=True)


def gelu(x, mode="EXACT"):
    if mode == "EXACT":
        return 0.5 * x * (1 + erf(x * np.float32(math.sqrt(0.5))))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))
    return x * sigmoid(np.float32(1.702) * x)


def _normalized(x, axes, epsilon):
    x = x - x.mean(axes, keepdims=True)
    return x / np.sqrt(np.square(x).mean(axes, keepdims=True) + epsilon)


def layer_norm(x, axes=None, gamma=None, beta=None, epsilon=1e-5):
    axes = tuple(a % x.ndim for a in _axes(axes, x))
    shape = [n if i in axes else 1 for i, n in enumerate(x.shape)]
    y = _normalized(x, axes, epsilon)
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def _channels(v, x):
    """A parameter for each channel of (B,C, space)."""
    return v.reshape(-1, *(1,) * (x.ndim - 2))


def instance_norm(x, gamma=None, beta=None, epsilon=1e-5):
    y = _normalized(x, tuple(range(2, x.ndim)), epsilon)
    y = y if gamma is None else y * _channels(gamma, x)
    return y if beta is None else y + _channels(beta, x)


def batch_norm(x, mean, variance, gamma=None, beta=None, epsilon=1e-5):
    y = (x - _channels(mean, x)) / np.sqrt(_channels(variance, x) + epsilon)
    y = y if gamma is None else y * _channels(gamma, x)
    return y if beta is None else y + _channels(beta, x)


def _resized(x, places):
    """Linear interpolation along the last two axes at the given fractional places, edges replicated."""
    for axis, at in zip((-2, -1), places, strict=True):
        n = x.shape[axis]
        at = np.clip(at, 0, n - 1)
        low = np.floor(at).astype(int)
        t = (at - low).astype(x.dtype).reshape(-1, *(1,) * (-1 - axis))
        x = np.take(x, low, axis) * (1 - t) + np.take(x, np.minimum(low + 1, n - 1), axis) * t
    return x


def _places(n, size, align_corners):
    if align_corners:
        return np.arange(size) * ((n - 1) / max(size - 1, 1))
    return (np.arange(size) + 0.5) * (n / size) - 0.5


def resize_bilinear(x, target_size_height, target_size_width, sampling_mode="DEFAULT"):
    if sampling_mode not in ("STRICT_ALIGN_CORNERS", "UNALIGN_CORNERS"):
        raise ValueError(f"resize_bilinear with sampling_mode {sampling_mode} has no reference definition")
    sizes = (int(target_size_height), int(target_size_width))
    return _resized(
        x, [_places(n, m, sampling_mode != "UNALIGN_CORNERS") for n, m in zip(x.shape[-2:], sizes, strict=True)]
    )


def upsample_bilinear(x, scale_factor_height=1, scale_factor_width=1, align_corners=True, half_pixel_centers=None):
    if half_pixel_centers is not None and bool(half_pixel_centers) == bool(align_corners):
        raise ValueError(
            "upsample_bilinear with neither aligned corners nor half-pixel centres has no reference definition"
        )
    sizes = [
        math.floor(n * float(s)) for n, s in zip(x.shape[-2:], (scale_factor_height, scale_factor_width), strict=True)
    ]
    return _resized(x, [_places(n, m, bool(align_corners)) for n, m in zip(x.shape[-2:], sizes, strict=True)])


def upsample_nearest_neighbor(x, scale_factor_height=1, scale_factor_width=1):
    if int(scale_factor_height) != scale_factor_height or int(scale_factor_width) != scale_factor_width:
        raise ValueError("upsample_nearest_neighbor by a fraction has no reference definition")
    return np.repeat(np.repeat(x, int(scale_factor_height), -2), int(scale_factor_width), -1)


def _depth_to_space(x, block_size):
    (b, c, h, w), k = x.shape, int(block_size)
    return x.reshape(b, k, k, c // k**2, h, w).transpose(0, 3, 4, 1, 5, 2).reshape(b, c // k**2, h * k, w * k)


def _space_to_depth(x, block_size):
    (b, c, h, w), k = x.shape, int(block_size)
    return x.reshape(b, c, h // k, k, w // k, k).transpose(0, 3, 5, 1, 2, 4).reshape(b, c * k**2, h // k, w // k)


def _pixel_shuffle(x, upscale_factor):
    (b, c, h, w), k = x.shape, int(upscale_factor)
    return x.reshape(b, c // k**2, k, k, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(b, c // k**2, h * k, w * k)


def reshape(x, shape):
    shape = [
        x.shape[i - len(shape)] if n == 0 else int(n) for i, n in enumerate(shape)
    ]  # 0 copies, counted from the end
    return x.reshape(x.shape[0], *shape)


def transpose(x, perm):
    return x.transpose(0, *(_axis(p) % x.ndim for p in perm))


def squeeze(x, axes=None):
    return np.squeeze(x, tuple(i for i in range(1, x.ndim) if x.shape[i] == 1) if axes is None else _axes(axes, x))


def slice_by_index(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    index = [slice(None)]
    masked = lambda mask, i: mask is not None and bool(mask[i])
    for i in range(x.ndim - 1):
        first = None if masked(begin_mask, i) else int(begin[i])
        last = None if masked(end_mask, i) else int(end[i])
        step = 1 if stride is None else int(stride[i])
        index.append(int(begin[i]) if masked(squeeze_mask, i) else slice(first, last, step))
    return x[tuple(index)]


def slice_by_size(x, begin, size):
    ends = [None if n == -1 else int(b) + int(n) for b, n in zip(begin, size, strict=True)]
    return x[(slice(None), *(slice(int(b), e) for b, e in zip(begin, ends, strict=True)))]


def pad(x, pad, mode="constant", constant_val=0.0):
    pads = [(int(a), int(b)) for a, b in np.reshape(pad, (-1, 2))]
    pads = [(0, 0)] * (x.ndim - len(pads)) + pads
    if mode == "constant":
        return np.pad(x, pads, constant_values=constant_val)
    return np.pad(x, pads, mode={"reflect": "reflect", "replicate": "edge"}[mode])


def concat(values, axis, interleave=False):
    if interleave:
        raise ValueError("an interleaved concat has no reference definition")
    return np.concatenate(values, _axis(axis))


def split(x, axis, num_splits=None, split_sizes=None):
    parts = int(num_splits) if split_sizes is None else np.cumsum(split_sizes)[:-1]
    return np.split(x, parts, _axis(axis))


def gather(x, indices, axis=0, batch_dims=0, validate_indices=False):
    if batch_dims:
        raise ValueError("gather with batch_dims has no reference definition")
    return np.stack([np.take(a, i, int(axis)) for a, i in zip(x, indices, strict=True)])


def topk(x, k=1, axis=-1, ascending=False, sort=True, return_indices=True, output_indices_dtype="int32"):
    order = np.argsort(x if ascending else -x, axis=_axis(axis), kind="stable")
    order = np.take(order, np.arange(int(k)), _axis(axis))
    values = np.take_along_axis(x, order, _axis(axis))
    return [values, order] if return_indices else [values]


def _position(f):
    def call(x, axis=-1, keep_dims=False, output_dtype="int32"):
        return f(x, axis=_axis(axis), keepdims=bool(keep_dims))

    return call


def _log_sum_exp(x, axis, keepdims):
    top = x.max(axis, keepdims=True)
    y = np.log(np.exp(x - top).sum(axis, keepdims=True)) + top
    return y if keepdims else np.squeeze(y, axis)


# ---- quantized values and compressed constants


def _along(v, x, axis):
    """A parameter, one for all or one for each index of an axis of x."""
    return v if axis is None or np.ndim(v) == 0 else v.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


def quantize(input, scale, output_dtype, zero_point=None, axis=None):
    axis = None if axis is None else _axis(axis)
    zero = 0 if zero_point is None else _along(zero_point, input, axis).astype(np.float32)
    limits = np.iinfo(NUMPY[output_dtype])
    return np.clip(np.round(input / _along(scale, input, axis)) + zero, limits.min, limits.max)


def dequantize(input, scale, zero_point=None, axis=None):
    axis = None if axis is None else _axis(axis)
    zero = 0 if zero_point is None else _along(zero_point, input, axis).astype(np.float32)
    return (input.astype(np.float32) - zero) * _along(scale, input, axis)


def constexpr_affine_dequantize(quantized_data, zero_point, scale, axis):
    q, axis = quantized_data.astype(np.float32), int(axis)
    return (q - _along(zero_point, q, axis).astype(np.float32)) * _along(scale, q, axis)


def constexpr_blockwise_shift_scale(data, scale, offset=None):
    def spread(v):
        for axis, n in enumerate(data.shape):
            v = np.repeat(v, n // v.shape[axis], axis)
        return v.astype(np.float32)

    return (data.astype(np.float32) - (0 if offset is None else spread(offset))) * spread(scale)


def constexpr_lut_to_dense(indices, lut, shape=None, vector_axis=None):
    if shape is not None:  # iOS 16: packed bits and one table
        shape = tuple(int(n) for n in shape)
        return lut[unpack(indices.tobytes(), int(math.log2(lut.size)), math.prod(shape))].reshape(shape)
    rank = indices.ndim  # from iOS 18: table (a table for each block of the axes, entries, length of an entry)
    block = np.ix_(*(np.arange(n) * g // n for n, g in zip(indices.shape, lut.shape[:rank], strict=True)))
    entries = lut[(*block, indices)]
    if entries.shape[-1] == 1:
        return entries[..., 0]
    axis = int(vector_axis) % rank
    shape = [n * lut.shape[-1] if i == axis else n for i, n in enumerate(indices.shape)]
    return np.moveaxis(entries, -1, axis + 1).reshape(shape)


def constexpr_sparse_to_dense(nonzero_data, mask, shape=None):
    if shape is not None:  # iOS 16: packed bits
        shape = tuple(int(n) for n in shape)
        mask = unpack(mask.tobytes(), 1, math.prod(shape)).reshape(shape)
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


BROADCAST = {  # operations whose operands broadcast against each other
    **dict(add=np.add, sub=np.subtract, mul=np.multiply, real_div=np.true_divide, floor_div=np.floor_divide, mod=np.mod,
           pow=np.power, maximum=np.maximum, minimum=np.minimum, equal=np.equal, not_equal=np.not_equal,
           greater=np.greater, greater_equal=np.greater_equal, less=np.less, less_equal=np.less_equal,
           logical_and=np.logical_and, logical_or=np.logical_or, logical_xor=np.logical_xor),
    "select": lambda cond, a, b: np.where(cond, a, b),
    "matmul": matmul,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}  # fmt: skip

UNARY = dict(
    abs=np.abs, exp=np.exp, exp2=np.exp2, sqrt=np.sqrt, square=np.square, sin=np.sin, cos=np.cos, tanh=np.tanh, erf=erf,
    sign=np.sign, floor=np.floor, ceil=np.ceil, round=np.rint, logical_not=np.logical_not, sigmoid=sigmoid,
    softmax=softmax, gelu=gelu, identity=lambda x: x, relu=lambda x: np.maximum(x, 0), relu6=lambda x: np.clip(x, 0, 6),
    silu=lambda x: x * sigmoid(x), softplus=lambda x: np.logaddexp(x, np.float32(0)),
    softsign=lambda x: x / (1 + np.abs(x)),
    elu=lambda x, alpha=1.0: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))),
    leaky_relu=lambda x, alpha=0.01: np.where(x >= 0, x, alpha * x),
    prelu=_batched(lambda x, alpha: np.where(x >= 0, x, _channels(alpha, x) * x)),
    sigmoid_hard=lambda x, alpha=0.2, beta=0.5: np.clip(alpha * x + beta, 0, 1),
    linear_activation=lambda x, alpha=1.0, beta=0.0: alpha * x + beta,
    log=lambda x, epsilon=1e-45: np.log(x + np.float32(epsilon)),
    rsqrt=lambda x, epsilon=1e-12: 1 / np.sqrt(x + np.float32(epsilon)),
    inverse=lambda x, epsilon=1e-4: 1 / (x + np.float32(epsilon)),
    clip=lambda x, alpha, beta: np.clip(x, alpha, beta),
    cast=lambda x, dtype: x if dtype in ("fp16", "fp32") and x.dtype == np.float32 else x.astype(NUMPY[dtype]),
)  # fmt: skip

OPS = {
    **{name: (lambda x, y, f=f: f(x, y)) if isinstance(f, np.ufunc) else f for name, f in BROADCAST.items()},
    **{name: (lambda x, f=f: f(x)) if isinstance(f, np.ufunc) else f for name, f in UNARY.items()},
    # ---- along axes
    **{f"reduce_{name}": _reduction(f) for name, f in dict(
        sum=np.sum, mean=np.mean, max=np.max, min=np.min, prod=np.prod, log_sum_exp=_log_sum_exp,
        sum_square=lambda x, axis, keepdims: np.square(x).sum(axis, keepdims=keepdims),
        l1_norm=lambda x, axis, keepdims: np.abs(x).sum(axis, keepdims=keepdims),
        l2_norm=lambda x, axis, keepdims: np.sqrt(np.square(x).sum(axis, keepdims=keepdims))).items()},
    "reduce_argmax": _position(np.argmax), "reduce_argmin": _position(np.argmin), "topk": topk,
    "layer_norm": layer_norm, "instance_norm": _batched(instance_norm), "batch_norm": _batched(batch_norm),
    # ---- matrix work and windows
    "conv": _batched(conv), "linear": linear, "einsum": einsum, "max_pool": _pool("max"), "avg_pool": _pool("avg"),
    "resize_bilinear": resize_bilinear, "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor, "depth_to_space": _batched(_depth_to_space),
    "space_to_depth": _batched(_space_to_depth), "pixel_shuffle": _batched(_pixel_shuffle),
    # ---- arrangement
    "reshape": reshape, "transpose": transpose, "concat": concat, "split": split, "pad": pad, "gather": gather,
    "slice_by_index": slice_by_index, "slice_by_size": slice_by_size,
    "stack": lambda values, axis: np.stack(values, _axis(axis)),
    "expand_dims": lambda x, axes: np.expand_dims(x, _axes(axes, x)),
    "squeeze": squeeze,
    "tile": lambda x, reps: np.tile(x, (1, *(int(r) for r in reps))),
    "reverse": lambda x, axes=None: np.flip(x, _axes(axes, x)),
    # ---- quantized values and compressed constants
    "quantize": quantize, "dequantize": dequantize, "constexpr_affine_dequantize": constexpr_affine_dequantize,
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
    "constexpr_sparse_to_dense": constexpr_sparse_to_dense,
    "constexpr_cast": lambda source_val, output_dtype: source_val.astype(NUMPY[output_dtype]),
}  # fmt: skip
