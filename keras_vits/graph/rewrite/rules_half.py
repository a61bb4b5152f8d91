"""Rules that keep roots of sums of squares, and other sums, within half precision, in which phones' GPUs compute.

There the square of 256 overflows and that of 0.0002 vanishes. A root does not change when its entries are divided by
their largest and the result is multiplied by it again: in float32 the same but for rounding, in half precision right
for entries from 3e-8 to 65504. It is how norms are computed, whatever their layer is called: RMS, group, instance, L2,
unit and global response normalisation. A LayerNorm is one operation in a graph; its writers see to the same.

A sum of many entries overflows long before they do. Times a number it is a mean, which the writers keep small; what is
divided by its sum is multiplied by a power of two before, which changes no bit in float32.
"""

import math

import numpy as np

from keras_vits.graph.ir import Node, Value, constant

from ._sweep import Sweep, is_constant

SMALLEST = 1e-4  # that entries are divided by: 1 / SMALLEST fits into half precision
LEAST_SQUARE = 1e-7  # the least mean of squares whose inverse root does not overflow
LEAST_HALF = 2.0**-24  # the smallest number of half precision
NEAR = (1e-2, 1e2)  # factors of a mean of squares that neither overflow nor vanish behind it
MANY = 16  # entries, from which on a sum is kept small


def sum_scale(count: int) -> float:
    """What `count` entries are multiplied by before they are added, where their sum is wanted up to that factor.

    A power of two, so that nothing is rounded: about 1 / sqrt(count), so that neither the sum overflows nor small
    entries vanish. 1 for few entries.
    """
    return 1.0 if count < MANY else 2.0 ** -round(math.log2(count) / 2)


def scale_root(sweep: Sweep, node: Node) -> Value | None:
    """sqrt(s) and rsqrt(s), where s is a sum or mean of squares of `a`, or a number times it, plus epsilon or at least
    epsilon: with a / m in place of `a`, where m is the largest |a|."""
    outer, total, epsilon = _bounded_below(sweep, node.inputs[0])
    factor = sweep.made_by(total, "mul")
    if factor is not None and (c := _number(factor.inputs[1])) is not None and NEAR[0] <= c <= NEAR[1]:
        total = factor.inputs[0]
    else:
        factor = None
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
    if factor is not None:
        total = sweep.new("mul", total, factor.inputs[1])
    if total.shape != largest.shape:
        largest = sweep.new("reshape", largest, shape=total.shape)
    if outer is not None and root:
        shift = sweep.new("square", sweep.new("div", number(root, "root"), largest))
        total = sweep.new(outer.op, total, shift)
        if root < SMALLEST * math.sqrt(LEAST_SQUARE):  # in half precision the shift itself is 0
            total = sweep.new("maximum", total, number(LEAST_SQUARE, "least"))
    result = sweep.new(node.op, total)
    return sweep.new("div" if node.op == "rsqrt" else "mul", result, largest, name=node.output.name)


def mean_of_sum(sweep: Sweep, node: Node) -> Value | None:
    """sum(x) * c -> mean(x) * (c n), where n entries are added; the mean alone where c is 1 / n."""
    total, c = node.inputs
    summed, number = sweep.made_by(total, "sum"), _number(c)
    if summed is None or number is None or total.dtype != "float32" or node.output.shape != total.shape:
        return None
    count = added(summed)
    if count < MANY or not sweep.single_use(total):
        return None
    mean, factor = sweep.new("mean", summed.inputs[0], **summed.attrs), number * count
    if abs(factor - 1) < 2**-22:  # c is 1 / n in float32
        return mean
    return sweep.new("mul", mean, constant(np.full(c.shape, factor, np.float32), c.name), name=node.output.name)


def scale_total(sweep: Sweep, node: Node) -> Value | None:
    """x / (sum(|x|) + epsilon) -> s x / (sum(s |x|) + s epsilon) with a power of two s, and likewise x / sum(x)."""
    x, divisor = node.inputs
    outer, total, epsilon = _bounded_below(sweep, divisor)
    summed = sweep.made_by(total, "sum")
    if summed is None or x.dtype != "float32" or node.output.shape != x.shape:
        return None
    entries = summed.inputs[0]
    magnitude = sweep.made_by(entries, "abs")
    scale = sum_scale(added(summed))
    if scale == 1 or not (entries is x or (magnitude is not None and magnitude.inputs[0] is x)):
        return None
    number = lambda value, name: constant(np.float32(value), f"{node.output.name}/{name}")
    total = sweep.new("sum", sweep.new("mul", entries, number(scale, "scale")), **summed.attrs)
    if outer is not None:
        total = sweep.new(outer.op, total, number(scale * epsilon, "epsilon"))
        if 0 < scale * epsilon < LEAST_HALF:  # in half precision it is 0, and a row of zeros 0 / 0
            total = sweep.new("maximum", total, number(LEAST_HALF, "least"))
    return sweep.new("mul", sweep.new("div", x, total), number(scale, "scale"), name=node.output.name)


def _bounded_below(sweep: Sweep, value: Value) -> tuple[Node | None, Value, float]:
    """The addition of a number or the maximum with one that a value is, what it is of, and the number, not negative."""
    outer = sweep.made_by(value, "add", "maximum")
    if outer is not None:
        for inner, other in (outer.inputs, outer.inputs[::-1]):
            number = _number(other)
            if number is not None and number >= 0:
                return outer, inner, number
    return None, value, 0.0


def _number(value: Value | None) -> float | None:
    """The one number that a constant holds."""
    if value is None or not is_constant(value) or value.data.size != 1:
        return None
    return float(value.data.reshape(-1)[0])


def added(reduction: Node) -> int:
    """How many entries become one."""
    source = reduction.inputs[0]
    return math.prod(source.shape[axis] for axis in reduction.attrs["axes"]) if source is not None else 1


def _is_scaled(sweep: Sweep, a: Value) -> bool:
    """Whether `scale_root` made it: x / max(|x|)."""
    quotient = sweep.made_by(a, "div")
    bound = quotient and sweep.made_by(quotient.inputs[1], "maximum")
    largest = bound and sweep.made_by(bound.inputs[0], "max")
    magnitude = largest and sweep.made_by(largest.inputs[0], "abs")
    return bool(magnitude) and magnitude.inputs[0] is quotient.inputs[0]
