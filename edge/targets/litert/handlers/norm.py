"""Operations whose result depends on a whole row: softmax and layer normalisation."""

from __future__ import annotations

import math
import typing

import numpy as np

from keras_vits.graph.rewrite.rules_half import SMALLEST

from ._registry import handles

if typing.TYPE_CHECKING:
    from keras_vits.graph.ir import Node

    from ..writer import Writer


@handles("softmax")
def softmax(w: Writer, node: Node) -> None:
    """Over the last axis, which is all that the operator knows; another axis is made the last one."""
    x, out, shape, axis = w.value(node.inputs[0]), w.value(node.output), node.output.shape, node.attrs["axis"]
    if math.prod(shape[axis + 1 :]) == 1:
        if axis == len(shape) - 1:
            w.emit("SOFTMAX", [x], [out], "Softmax", beta=1.0)
            return
        rows = shape[: axis + 1]
        x = w.step("RESHAPE", [x, w.constant(rows)], rows, "rows", "Reshape", newShape=list(rows))
        x = w.step("SOFTMAX", [x], rows, "softmax", "Softmax", beta=1.0)
        w.emit("RESHAPE", [x, w.constant(shape)], [out], "Reshape", newShape=list(shape))
        return
    perm = [i for i in range(len(shape)) if i != axis] + [axis]
    moved = [shape[p] for p in perm]
    x = w.step("TRANSPOSE", [x, w.constant(perm)], moved, "rows", "Transpose")
    x = w.step("SOFTMAX", [x], moved, "softmax", "Softmax", beta=1.0)
    w.emit("TRANSPOSE", [x, w.constant(np.argsort(perm))], [out], "Transpose")


@handles("layer_norm")
def layer_norm(w: Writer, node: Node) -> None:
    """y * rsqrt(mean(y^2) + epsilon / m^2), where y = (x - mean) / m and m = max x - min x: a phone's GPU computes in
    half precision, in which the square of 256 overflows and that of 0.0001 is zero."""
    value, gamma, beta = node.inputs
    x, shape, axes = w.value(value), node.output.shape, w.constant(node.attrs["axes"], name="axes")
    row = [1 if i in node.attrs["axes"] else n for i, n in enumerate(shape)]
    mean = w.step("MEAN", [x, axes], row, "mean", "Reducer", keepDims=True)
    largest = w.step("REDUCE_MAX", [x, axes], row, "largest", "Reducer", keepDims=True)
    least = w.step("REDUCE_MIN", [x, axes], row, "least", "Reducer", keepDims=True)
    root = math.sqrt(node.attrs["epsilon"])
    smallest = w.constant(max(SMALLEST, root), np.float32, "smallest")  # so that epsilon / m^2 is at most 1
    spread = w.step("SUB", [largest, least], row, "range", "Sub")
    spread = w.step("MAXIMUM", [spread, smallest], row, "spread", "MaximumMinimum")
    centred = w.step("SUB", [x, mean], shape, "centred", "Sub")
    centred = w.step("DIV", [centred, spread], shape, "scaled", "Div")
    square = w.step("MUL", [centred, centred], shape, "square", "Mul")
    variance = w.step("MEAN", [square, axes], row, "variance", "Reducer", keepDims=True)
    epsilon = w.step("DIV", [w.constant(root, np.float32, "epsilon"), spread], row, "root", "Div")
    epsilon = w.step("MUL", [epsilon, epsilon], row, "shift", "Mul")
    shifted = w.step("ADD", [variance, epsilon], row, "shifted", "Add")
    steps = [("MUL", w.step("RSQRT", [shifted], row, "rsqrt"))]
    steps += [("MUL", w.value(gamma))] if gamma is not None else []
    steps += [("ADD", w.value(beta))] if beta is not None else []
    y = centred
    for code, by in steps[:-1]:
        y = w.step(code, [y, by], shape, code.lower(), code.capitalize())
    code, by = steps[-1]
    w.emit(code, [y, by], [w.value(node.output)], code.capitalize())
