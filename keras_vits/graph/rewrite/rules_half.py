"""Rules that keep roots of sums of squares within half precision, in which phones' GPUs compute.

There the square of 256 overflows and that of 0.0002 vanishes. A root does not change when its entries are divided by
their largest and the result is multiplied by it again: in float32 the same but for rounding, in half precision right
for entries from 3e-8 to 65504. It is how norms are computed, whatever their layer is called: RMS, group, instance, L2,
unit and global response normalisation. A LayerNorm is one operation in a graph; its writers see to the same.
"""

import math

import numpy as np

from keras_vits.graph.ir import Node, Value, constant

from ._sweep import Sweep

SMALLEST = 1e-4  # that entries are divided by: 1 / SMALLEST fits into half precision
LEAST_SQUARE = 1e-7  # the least mean of squares whose inverse root does not overflow


def scale_root(sweep: Sweep, node: Node) -> Value | None:
    """sqrt(s) and rsqrt(s), where s is a sum or mean of squares of `a`, plus epsilon or at least epsilon: with a / m in
    place of `a`, where m is the largest |a|."""
    total, epsilon = node.inputs[0], 0.0
    outer = sweep.made_by(total, "add", "maximum")
    if outer is not None:
        for value, other in (outer.inputs, outer.inputs[::-1]):
            if other.data is not None and other.data.size == 1 and other.data.reshape(-1)[0] >= 0:
                total, epsilon = value, float(other.data.reshape(-1)[0])
    reduced = sweep.made_by(total, "mean", "sum")
    squares = reduced and sweep.made_by(reduced.inputs[0], "square", "mul")
    if not squares or any(operand is not squares.inputs[0] for operand in squares.inputs):
        return None
    a, axes = squares.inputs[0], reduced.attrs["axes"]
    if a.dtype != "float32" or math.prod(a.shape[i] for i in axes) == 1 or _is_scaled(sweep, a):
        return None
    root = math.sqrt(epsilon)
    number = lambda x, name: constant(np.float32(x), f"{node.output.name}/{name}")
    largest = sweep.new("max", sweep.new("abs", a), axes=axes, keepdims=True)
    largest = sweep.new("maximum", largest, number(max(SMALLEST, root), "smallest"))
    total = sweep.new("square", sweep.new("div", a, largest))
    total = sweep.new(reduced.op, total, **reduced.attrs)
    if total.shape != largest.shape:
        largest = sweep.new("reshape", largest, shape=total.shape)
    if outer is not None and root:
        shift = sweep.new("square", sweep.new("div", number(root, "root"), largest))
        total = sweep.new(outer.op, total, shift)
        if root < SMALLEST * math.sqrt(LEAST_SQUARE):  # in half precision the shift itself is 0
            total = sweep.new("maximum", total, number(LEAST_SQUARE, "least"))
    result = sweep.new(node.op, total)
    return sweep.new("div" if node.op == "rsqrt" else "mul", result, largest, name=node.output.name)


def _is_scaled(sweep: Sweep, a: Value) -> bool:
    """Whether `scale_root` made it: x / max(|x|)."""
    quotient = sweep.made_by(a, "div")
    bound = quotient and sweep.made_by(quotient.inputs[1], "maximum")
    largest = bound and sweep.made_by(bound.inputs[0], "max")
    magnitude = largest and sweep.made_by(largest.inputs[0], "abs")
    return bool(magnitude) and magnitude.inputs[0] is quotient.inputs[0]
