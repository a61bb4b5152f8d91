"""Rules for what moves entries: reshapes and transposes merge, numbers and slices move up."""

import math
from collections.abc import Callable, Sequence

from keras_vits.graph.ir import Node, Value
from keras_vits.graph.ops import having

from ._sweep import Sweep, is_constant

ARRANGED = having("arrangement")  # of one input: a scalar factor may be applied before or after


def merge_reshapes(sweep: Sweep, node: Node) -> Value | None:
    if inner := sweep.made_by(node.inputs[0], "reshape"):
        return sweep.new("reshape", inner.inputs[0], shape=node.attrs["shape"])


def merge_transposes(sweep: Sweep, node: Node) -> Value | None:
    if inner := sweep.made_by(node.inputs[0], "transpose"):
        return sweep.new("transpose", inner.inputs[0], perm=tuple(inner.attrs["perm"][p] for p in node.attrs["perm"]))


def reverse_parts(sweep: Sweep, node: Node) -> Value | None:
    """A reverse of entries that are joined one by one, as a recurrent layer's outputs are, joins them the other way."""
    joined = sweep.made_by(node.inputs[0], "concat")
    if joined is None or node.attrs["axes"] != (joined.attrs["axis"],):
        return None
    if all(part.shape[joined.attrs["axis"]] == 1 for part in joined.inputs):
        return sweep.new("concat", *joined.inputs[::-1], axis=joined.attrs["axis"])


def merge_repeats(sweep: Sweep, node: Node) -> Value | None:
    """Nearest upsampling of the height by a whole number, and then of the width, is one of both."""
    inner = sweep.made_by(node.inputs[0], "resize")
    if inner is None or any(step.attrs["mode"] != "nearest" for step in (inner, node)):
        return None
    given, between, size = inner.inputs[0].shape[1:3], inner.attrs["size"], node.attrs["size"]
    if not any(m % n or k % m for n, m, k in zip(given, between, size, strict=True)):
        return sweep.new("resize", inner.inputs[0], size=size, mode="nearest")


def transpose_of_ones(sweep: Sweep, node: Node) -> Value | None:
    """A transpose that moves nothing but axes of size 1 is a reshape."""
    shape = node.inputs[0].shape
    moved = [p for p in node.attrs["perm"] if shape[p] > 1]
    if moved == sorted(moved):
        return sweep.new("reshape", node.inputs[0], shape=node.output.shape)


def fewer_axes(sweep: Sweep, node: Node) -> Value | None:
    """Axes that stay neighbours in a transpose of five axes and more are one axis: windows are cut with four."""
    x, perm = node.inputs[0], node.attrs["perm"]
    long = [axis for axis, n in enumerate(x.shape) if n > 1]
    runs: list[list[int]] = []
    for axis in (p for p in perm if p in long):
        if runs and long.index(axis) == long.index(runs[-1][-1]) + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    if len(perm) <= 4 or len(runs) == len(perm):
        return None
    order = sorted(runs)
    merged = sweep.new("reshape", x, shape=tuple(math.prod(x.shape[axis] for axis in run) for run in order))
    moved = sweep.new("transpose", merged, perm=tuple(order.index(run) for run in runs))
    return sweep.new("reshape", moved, shape=node.output.shape)


def hoist_scalar(sweep: Sweep, node: Node) -> Value | None:
    """mul(arrange(x), number) -> arrange(mul(x, number)), on its way into the weights."""
    x, c = node.inputs
    inner = sweep.made_by(x, *ARRANGED)
    if (
        inner is None
        or len(inner.inputs) != 1
        or not is_constant(c)
        or c.data.size != 1
        or len(c.shape) > len(inner.inputs[0].shape)
        or not sweep.single_use(x)
        or (inner.op == "slice" and inner.output.shape[:-1] != inner.inputs[0].shape[:-1])  # slices move up themselves
    ):
        return None
    return sweep.new(inner.op, sweep.new("mul", inner.inputs[0], c), **inner.attrs)


def whole_again(sweep: Sweep, node: Node) -> Value | None:
    """concat(x[:, 0], x[:, 1], ...) of vectors, all of x in order -> reshape(x)."""
    source, at = None, 0
    for part in node.inputs:
        flat = sweep.made_by(part, "reshape")
        piece = sweep.made_by(flat.inputs[0], "slice") if flat else sweep.made_by(part, "slice")
        if piece is None or any(s != 1 for s in piece.attrs["strides"]):
            return None
        x, begin, end = piece.inputs[0], piece.attrs["begin"], piece.attrs["end"]
        source = source or x
        whole = all(b == 0 and e == n for i, (b, e, n) in enumerate(zip(begin, end, x.shape, strict=True)) if i != 1)
        vector = (x.shape[0], math.prod(piece.output.shape[1:]))
        if x is not source or not whole or begin[1] != at or part.shape != vector:
            return None
        at = end[1]
    if node.attrs["axis"] == 1 and at == source.shape[1] and len(node.output.shape) == 2:
        return sweep.new("reshape", source, shape=node.output.shape)


def slice_early(sweep: Sweep, node: Node) -> Value | None:
    """slice(f(x)) -> f(slice(x)) along one axis, when the slice alone reads f(x): what is not read is not computed.

    A class token makes the last block work on one token, but for its keys and values.
    """
    value, a = node.inputs[0], node.attrs
    inner = sweep.made_by(value, *SLICED)
    sliced = [i for i, n in enumerate(node.output.shape) if n != value.shape[i]]
    if inner is None or len(sliced) != 1 or a["strides"][sliced[0]] != 1 or not sweep.single_use(value):
        return None
    axis = sliced[0]
    if axis == len(value.shape) - 1:  # of a dense layer's outputs: split_dense, with scalars moving before the slice
        return None
    axes = SLICED[inner.op](inner, axis)  # of every input; None: the input stays whole
    if axes is None:
        return None
    begin, end = a["begin"][axis], a["end"][axis]

    def part(x: Value | None, axis: int | None) -> Value | None:
        if axis is None:
            return x
        whole = [(0, n) for n in x.shape]
        whole[axis] = (begin, end)
        return sweep.new("slice", x, begin=tuple(b for b, _ in whole), end=tuple(e for _, e in whole),
                         strides=(1,) * len(whole))  # fmt: skip

    sweep.layer = inner.layer
    attrs = dict(inner.attrs)
    if inner.op == "reshape":
        attrs["shape"] = node.output.shape
    inputs = [part(x, axis) for x, axis in zip(inner.inputs, axes, strict=True)]
    return sweep.new(inner.op, *inputs, name=value.name, **attrs)


def _elementwise_axes(node: Node, axis: int) -> list[int | None] | None:
    """The same axis, counted from the last, of every input that is not broadcast along it; of floats only: pixels are
    read before they are cut, since XNNPACK slices floats."""
    if any(x is not None and x.dtype != "float32" for x in (*node.inputs, node.output)):
        return None
    back = axis - len(node.output.shape)
    size = node.output.shape[axis]
    return [None if x is None or len(x.shape) < -back or x.shape[back] != size else len(x.shape) + back
            for x in node.inputs]  # fmt: skip


def _matmul_axes(node: Node, axis: int) -> list[int | None] | None:
    """Rows of the first matrix, or matrices of both."""
    a, _ = node.inputs
    if axis == len(node.output.shape) - 2:
        return [len(a.shape) - (1 if node.attrs.get("transpose_a") else 2), None]
    return _elementwise_axes(node, axis)


def _reshape_axes(node: Node, axis: int) -> list[int | None] | None:
    """The axis of the input with as many entries, and as many before it."""
    given, shape = node.inputs[0].shape, node.output.shape
    for i, n in enumerate(given):
        if n == shape[axis] and math.prod(given[:i]) == math.prod(shape[:axis]):
            return [i]


SLICED: dict[
    str, Callable[[Node, int], Sequence[int | None] | None]
] = {  # (node, sliced axis of the output) -> axis to slice in each input, or None if it cannot be done
    **dict.fromkeys(having("elementwise"), _elementwise_axes),
    "layer_norm": lambda node, axis: None if axis in node.attrs["axes"] else _elementwise_axes(node, axis),
    "softmax": lambda node, axis: None if axis == node.attrs["axis"] else [axis],
    "dense": lambda node, axis: None if axis == len(node.output.shape) - 1 else [axis, None, None],
    "matmul": _matmul_axes,
    "transpose": lambda node, axis: [node.attrs["perm"][axis]],
    "reshape": _reshape_axes,
}
