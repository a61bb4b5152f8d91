"""The operations of a .tflite file, each as a file of its own that the interpreter runs; see `_steps`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from keras_vits.graph.ops import same_padding

from ...artifact import Artifact
from .._steps import Arrays, Step, Steps, half, half_convolution, half_matmul, half_sum, windows
from .flatbuffer import File, Operator
from .runtime import alone

NUMPY = {"FLOAT32": np.float32, "FLOAT16": np.float16, "UINT8": np.uint8, "INT8": np.int8, "INT32": np.int32,
         "INT16": np.int16, "INT64": np.int64, "BOOL": np.bool_}  # fmt: skip


def steps(artifact: Artifact) -> Steps:
    """Every operation of the file.

    Weights that a dynamically quantized or weight-only layer holds as integers are dequantized: a GPU, which computes
    in floats, does that once.

    Raises:
        ValueError: a file of several subgraphs.
    """
    file = File(artifact.path.read_bytes())
    if len(file.model.subgraphs) != 1:
        raise ValueError(f"{artifact.path.name} has {len(file.model.subgraphs)} subgraphs: this works for one.")
    types = {v: k for k, v in vars(file.S.TensorType).items() if isinstance(v, int)}
    kind = lambda tensor: types[file.main.tensors[tensor].type]
    computed = {int(i) for i in file.main.inputs} | {int(i) for op in file.main.operators for i in op.outputs}
    constants: dict[str, np.ndarray] = {}
    found = []
    for operator in file.main.operators:
        reads, replaced = [], {}
        floating = kind(int(operator.inputs[0])) in ("FLOAT32", "FLOAT16") and file.builtin(operator) != "DEQUANTIZE"
        for tensor in dict.fromkeys(int(i) for i in operator.inputs if i >= 0):
            if tensor in computed:
                reads.append(tensor)
            elif kind(tensor) == "FLOAT32" or (floating and _is_quantized(file, tensor)):
                reads.append(tensor)
                replaced[tensor] = True
                constants.setdefault(file.name(tensor), _floats(file, tensor, kind(tensor)))
        found.append(
            Step(
                name=file.name(int(operator.outputs[0])),
                operation=file.builtin(operator),
                inputs=tuple(map(file.name, reads)),
                outputs=tuple(file.name(int(i)) for i in operator.outputs),
                run=_runner(file, operator, reads, set(replaced)),
                summed=_summed(file, operator, reads),
                adds=file.builtin(operator) in ("ADD", "SUB", "MAXIMUM", "MINIMUM"),
            )
        )
    return Steps(
        steps=tuple(found),
        inputs=tuple(file.name(int(i)) for i in file.main.inputs),
        dtypes=tuple(NUMPY[kind(int(i))] for i in file.main.inputs),
        batch=file.shape(int(file.main.inputs[0]))[0],
        outputs=tuple(file.name(int(i)) for i in file.main.outputs),
        constants=constants,
    )


def _is_quantized(file: File, tensor: int) -> bool:
    found = file.main.tensors[tensor].quantization
    return found is not None and found.scale is not None and len(found.scale) > 0


def _floats(file: File, tensor: int, kind: str) -> np.ndarray:
    """A constant as float32."""
    data, shape = np.asarray(file.model.buffers[file.main.tensors[tensor].buffer].data, np.uint8), file.shape(tensor)
    if kind == "FLOAT32":
        return data.view(np.float32).reshape(shape)
    if kind == "INT4":
        both = np.stack([data << 4, data & 0xF0], -1).view(np.int8) >> 4  # the lower half of a byte is first
        integers = both.reshape(-1)[: int(np.prod(shape))].reshape(shape)
    else:
        integers = data.view(NUMPY[kind]).reshape(shape)
    found = file.main.tensors[tensor].quantization
    wide = [-1 if i == found.quantizedDimension and len(found.scale) > 1 else 1 for i in range(len(shape))]
    scale, zero = (np.asarray(v, np.float32).reshape(wide) for v in (found.scale, found.zeroPoint))
    return (integers.astype(np.float32) - zero) * scale


def _runner(file: File, operator: Operator, reads: list[int], floats: set[int]) -> Callable[[Arrays], list[np.ndarray]]:
    """What runs the operator alone. `floats` are constants that it is given."""

    @functools.cache
    def interpreter() -> Any:
        S = file.S
        used = list(dict.fromkeys(int(i) for i in (*operator.inputs, *operator.outputs) if i >= 0))
        model, main, empty = S.ModelT(), S.SubGraphT(), S.BufferT()
        model.version, model.subgraphs, model.buffers = 3, [main], [empty]
        model.operatorCodes = [file.model.operatorCodes[operator.opcodeIndex]]
        main.tensors = []
        for tensor in used:
            made = copy.copy(file.main.tensors[tensor])
            data = file.model.buffers[made.buffer].data
            made.buffer, made.isVariable = 0, False
            if tensor in floats:
                made.type, made.quantization = S.TensorType.FLOAT32, None
            elif tensor not in reads and data is not None and len(data):
                made.buffer = len(model.buffers)
                model.buffers.append(S.BufferT())
                model.buffers[-1].data = data
            main.tensors.append(made)
        alone_op = copy.copy(operator)
        alone_op.opcodeIndex = 0
        alone_op.inputs = [used.index(int(i)) if i >= 0 else -1 for i in operator.inputs]
        alone_op.outputs = [used.index(int(i)) for i in operator.outputs]
        main.operators = [alone_op]
        main.inputs, main.outputs = [used.index(i) for i in reads], list(alone_op.outputs)
        return alone(bytes(file.tools.convert_object_to_bytearray(model)))

    def run(arrays: Arrays) -> list[np.ndarray]:
        made = interpreter()
        for detail, array in zip(made.get_input_details(), arrays, strict=True):
            made.set_tensor(detail["index"], np.asarray(array, detail["dtype"], order="C"))
        made.invoke()
        return [made.get_tensor(detail["index"]) for detail in made.get_output_details()]

    return run


# ---------------------------------------------------------------- sums in half precision

Sums = Callable[[Any, Mapping[int, np.ndarray]], np.ndarray]  # (options, place among the inputs -> array) -> result


def _summed(file: File, operator: Operator, reads: list[int]) -> Callable[[Arrays], list[np.ndarray]] | None:
    """See `Step.summed`."""
    sums = SUMS.get(file.builtin(operator))
    if sums is None:
        return None
    places = {place: int(i) for place, i in enumerate(operator.inputs) if i >= 0}

    def run(arrays: Arrays) -> list[np.ndarray]:
        known = dict(zip(reads, arrays, strict=True))
        if any(array.dtype.kind != "f" for array in arrays):
            return []  # of integers: no sum of floats
        given = {}
        for place, tensor in places.items():
            if tensor in known:
                given[place] = known[tensor]
            else:
                data = np.asarray(file.model.buffers[file.main.tensors[tensor].buffer].data, np.uint8)
                given[place] = data.view(np.int32)
        y = sums(operator.builtinOptions, given).reshape(file.shape(int(operator.outputs[0])))
        fused = getattr(operator.builtinOptions, "fusedActivationFunction", 0)
        high = {0: None, 1: np.inf, 3: 6.0}.get(fused, None)
        return [y if high is None else np.clip(y, 0, high)]

    return run


def _biased(y: np.ndarray, given: Mapping[int, np.ndarray]) -> np.ndarray:
    return half(y + given[2]) if 2 in given else y


def _dense(options: Any, given: Mapping[int, np.ndarray]) -> np.ndarray:
    x, weight = given[0], given[1]
    return _biased(half_matmul(x.reshape(-1, weight.shape[1]), weight.T), given)


def _pads(options: Any, x: np.ndarray, size: tuple[int, int], dilation: tuple[int, int]) -> Any:
    strides = (options.strideH, options.strideW)
    return same_padding(x.shape[1:3], size, strides, dilation) if options.padding == 0 else ((0, 0), (0, 0))


def _convolution(options: Any, given: Mapping[int, np.ndarray]) -> np.ndarray:
    x, weight = given[0], given[1]  # (O,kh,kw,C/groups)
    size, dilation = weight.shape[1:3], (options.dilationHFactor, options.dilationWFactor)
    columns = windows(x, size, (options.strideH, options.strideW), _pads(options, x, size, dilation), dilation)
    return _biased(half_convolution(columns, weight.transpose(1, 2, 3, 0), x.shape[3] // weight.shape[3]), given)


def _depthwise(options: Any, given: Mapping[int, np.ndarray]) -> np.ndarray:
    x, weight = given[0], given[1]  # (1,kh,kw,C*multiplier)
    size, dilation = weight.shape[1:3], (options.dilationHFactor, options.dilationWFactor)
    columns = windows(x, size, (options.strideH, options.strideW), _pads(options, x, size, dilation), dilation)
    many = weight.shape[3] // x.shape[3]
    products = np.repeat(columns, many, axis=-1) * weight[0]
    return _biased(half_sum(products, (3, 4), False), given)


def _product(options: Any, given: Mapping[int, np.ndarray]) -> np.ndarray:
    a, b = (
        np.swapaxes(given[i], -1, -2) if turned else given[i] for i, turned in enumerate((options.adjX, options.adjY))
    )
    return half_matmul(a, b)


def _total(options: Any, given: Mapping[int, np.ndarray]) -> np.ndarray:
    return half_sum(given[0], [int(i) for i in given[1]], bool(options.keepDims))


def _mean(options: Any, given: Mapping[int, np.ndarray]) -> np.ndarray:
    total = _total(options, given)
    return total * np.float32(total.size / given[0].size)


def _average(options: Any, given: Mapping[int, np.ndarray]) -> np.ndarray:
    x, size, strides = given[0], (options.filterHeight, options.filterWidth), (options.strideH, options.strideW)
    pads = _pads(options, x, size, (1, 1))
    inside = windows(np.ones((1, *x.shape[1:3], 1), np.float32), size, strides, pads).sum((3, 4))
    return half_sum(windows(x, size, strides, pads), (3, 4), False) / inside


SUMS: dict[str, Sums] = {
    "FULLY_CONNECTED": _dense,
    "CONV_2D": _convolution,
    "DEPTHWISE_CONV_2D": _depthwise,
    "BATCH_MATMUL": _product,
    "SUM": _total,
    "MEAN": _mean,
    "AVERAGE_POOL_2D": _average,
}
