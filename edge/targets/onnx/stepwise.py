"""The nodes of an .onnx file, each as a model of its own that ONNX Runtime runs; see `_steps`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ...artifact import Artifact
from .._steps import Arrays, Step, Steps, half, half_convolution, half_matmul, half_sum, windows
from .runtime import session
from .writer import onnx

Sums = Callable[[Mapping[str, Any], Sequence[np.ndarray | None]], np.ndarray]  # (attributes, inputs) -> result


def steps(artifact: Artifact) -> Steps:
    """Every node of the file."""
    package = onnx()
    model = package.load(str(artifact.path))
    arrays = {tensor.name: package.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:  # a constant may be a node, too
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            arrays[node.output[0]] = package.numpy_helper.to_array(node.attribute[0].t)
    scales = _scales(model.graph.node, arrays)
    constants = {name: np.asarray(a, np.float32) for name, a in arrays.items() if a.dtype.kind == "f"}
    constants = {name: array for name, array in constants.items() if name not in scales}
    baked = {name: a for name, a in arrays.items() if name not in constants}
    declared = {
        value.name: package.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    } | {name: array.dtype for name, array in arrays.items()}
    found = []
    for node in model.graph.node:
        if node.output[0] in arrays:
            continue
        reads = tuple(dict.fromkeys(name for name in node.input if name and name not in baked))
        found.append(
            Step(
                name=node.name or node.output[0],
                operation=node.op_type,
                inputs=reads,
                outputs=tuple(name for name in node.output if name),
                run=_runner(model, node, reads, baked, declared),
                summed=_summed(node, reads, baked),
                adds=node.op_type in ("Add", "Sub", "Max", "Min"),
                exact=any(name in scales for name in node.output),
            )
        )
    inputs = [value for value in model.graph.input if value.name not in arrays]
    dtype = package.helper.tensor_dtype_to_np_dtype
    return Steps(
        steps=tuple(found),
        inputs=tuple(value.name for value in inputs),
        dtypes=tuple(dtype(value.type.tensor_type.elem_type) for value in inputs),
        batch=inputs[0].type.tensor_type.shape.dim[0].dim_value,
        outputs=tuple(value.name for value in model.graph.output),
        constants=constants,
    )


def _scales(nodes: Sequence[Any], constants: Collection[str]) -> set[str]:
    """Names of the tensors that belong to the arithmetic of integers: scales of quantized tensors, products of them,
    and sums of integers that a product with a scale is about to make numbers of."""
    scales = {node.input[1] for node in nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    scales |= {node.output[1] for node in nodes if node.op_type == "DynamicQuantizeLinear"}
    sums = {name for node in nodes if node.op_type in ("MatMulInteger", "ConvInteger") for name in node.output}
    sums |= {node.output[0] for node in nodes if node.op_type == "Cast" and node.input[0] in sums}
    for node in nodes:
        if node.op_type == "Mul" and any(name in scales for name in node.input):
            others = [name for name in node.input if name not in scales]
            if all(name in constants for name in others):
                scales.update((*others, node.output[0]))
    return scales | sums


def _runner(
    model: Any, node: Any, reads: Sequence[str], baked: Mapping[str, np.ndarray], declared: Mapping[str, np.dtype[Any]]
) -> Callable[[Arrays], list[np.ndarray]]:
    """What runs the node alone. Tensors that are `declared` in half precision are float32 outside of it."""
    package = onnx()

    def dtype(name: str, array: np.ndarray) -> np.dtype[Any]:
        return np.dtype(np.float16) if declared.get(name) == np.float16 else array.dtype

    @functools.cache
    def opened(signature: tuple[tuple[np.dtype[Any], tuple[int, ...]], ...]) -> Any:
        kinds = package.helper.np_dtype_to_tensor_dtype
        inputs = [
            package.helper.make_tensor_value_info(name, kinds(kind), shape)
            for name, (kind, shape) in zip(reads, signature, strict=True)
        ]
        outputs = [package.helper.make_empty_tensor_value_info(name) for name in node.output if name]
        fixed = [package.numpy_helper.from_array(baked[n], n) for n in dict.fromkeys(node.input) if n in baked]
        graph = package.helper.make_graph([node], "step", inputs, outputs, fixed)
        alone = package.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        # One thread: those of hundreds of sessions wait for work in a loop, and take the processor from each other.
        return session(package.shape_inference.infer_shapes(alone).SerializeToString(), threads=1)

    def run(arrays: Arrays) -> list[np.ndarray]:
        given = [np.asarray(a, dtype(name, a)) for name, a in zip(reads, arrays, strict=True)]
        made = opened(tuple((a.dtype, a.shape) for a in given))
        found = made.run(None, dict(zip(reads, given, strict=True)))
        return [a.astype(np.float32) if a.dtype == np.float16 else a for a in found]

    return run


# ---------------------------------------------------------------- sums in half precision


def _summed(
    node: Any, reads: Sequence[str], baked: Mapping[str, np.ndarray]
) -> Callable[[Arrays], list[np.ndarray]] | None:
    """See `Step.summed`."""
    sums = SUMS.get(node.op_type)
    if sums is None:
        return None
    attributes = {a.name: onnx().helper.get_attribute_value(a) for a in node.attribute}

    def run(arrays: Arrays) -> list[np.ndarray]:
        if any(array.dtype.kind != "f" for array in arrays):
            return []  # of integers: no sum of floats
        known = {**baked, **dict(zip(reads, arrays, strict=True))}
        return [sums(attributes, [known.get(name) for name in node.input])]

    return run


def _given(inputs: Sequence[np.ndarray | None], place: int) -> np.ndarray | None:
    return inputs[place] if place < len(inputs) else None


def _needed(inputs: Sequence[np.ndarray | None], place: int) -> np.ndarray:
    found = _given(inputs, place)
    assert found is not None
    return found


def _product(attributes: Mapping[str, Any], inputs: Sequence[np.ndarray | None]) -> np.ndarray:
    return half_matmul(_needed(inputs, 0), _needed(inputs, 1))


def _gemm(attributes: Mapping[str, Any], inputs: Sequence[np.ndarray | None]) -> np.ndarray:
    a, b, bias = _needed(inputs, 0), _needed(inputs, 1), _given(inputs, 2)
    a, b = (a.T if attributes.get("transA") else a), (b.T if attributes.get("transB") else b)
    y = half_matmul(a, b) * np.float32(attributes.get("alpha", 1.0))
    return y if bias is None else half(y + bias * np.float32(attributes.get("beta", 1.0)))


def _window(attributes: Mapping[str, Any], x: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Windows (B,h,w,kh,kw,C) of an image (B,C,H,W)."""
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    strides, dilation = attributes.get("strides", (1, 1)), attributes.get("dilations", (1, 1))
    return windows(np.moveaxis(x, 1, -1), size, strides, ((top, bottom), (left, right)), dilation)


def _convolution(attributes: Mapping[str, Any], inputs: Sequence[np.ndarray | None]) -> np.ndarray:
    x, kernel, bias = _needed(inputs, 0), _needed(inputs, 1), _given(inputs, 2)  # (O,C/groups,kh,kw)
    columns = _window(attributes, x, kernel.shape[2:])
    y = half_convolution(columns, kernel.transpose(2, 3, 1, 0), attributes.get("group", 1))
    return np.moveaxis(y if bias is None else half(y + bias), -1, 1)


def _axes(attributes: Mapping[str, Any], inputs: Sequence[np.ndarray | None]) -> list[int]:
    axes = _given(inputs, 1)
    return list(range(_needed(inputs, 0).ndim)) if axes is None else [int(i) for i in axes]


def _total(attributes: Mapping[str, Any], inputs: Sequence[np.ndarray | None]) -> np.ndarray:
    return half_sum(_needed(inputs, 0), _axes(attributes, inputs), bool(attributes.get("keepdims", 1)))


def _mean(attributes: Mapping[str, Any], inputs: Sequence[np.ndarray | None]) -> np.ndarray:
    total = _total(attributes, inputs)
    return total * np.float32(total.size / _needed(inputs, 0).size)


def _average(attributes: Mapping[str, Any], inputs: Sequence[np.ndarray | None]) -> np.ndarray:
    x, size = _needed(inputs, 0), attributes["kernel_shape"]
    padding = attributes.get("count_include_pad")
    inside = float(np.prod(size)) if padding else _window(attributes, np.ones_like(x), size).sum((3, 4))
    return np.moveaxis(half_sum(_window(attributes, x, size), (3, 4), False) / inside, -1, 1)


def _average_all(attributes: Mapping[str, Any], inputs: Sequence[np.ndarray | None]) -> np.ndarray:
    x = _needed(inputs, 0)
    return half_sum(x, (2, 3), True) / np.float32(x.shape[2] * x.shape[3])


SUMS: dict[str, Sums] = {
    "MatMul": _product,
    "Gemm": _gemm,
    "Conv": _convolution,
    "ReduceSum": _total,
    "ReduceMean": _mean,
    "AveragePool": _average,
    "GlobalAveragePool": _average_all,
}
