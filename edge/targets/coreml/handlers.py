"""How each operation of a Graph becomes MIL: elementwise, along axes, arrangement. See handlers_matrix.py for the rest.

A handler is (writer, node, *inputs, **attrs) -> result, or a list of results, one for each output of the node. A result
is a MIL variable in the Graph's order of axes, or (variable, order).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_vits.graph.ir import Node, Value

from .._forms import CHANNELS_FIRST, Order, UnsupportedError, Variable, identity, regroup
from .._half import mean_scale

if TYPE_CHECKING:
    from .writer import Writer

Result = tuple[Variable, Order]
Handler = Callable[..., Any]

HANDLERS: dict[str, Handler] = {}  # op of a Graph -> what writes it


def writes(*ops: str) -> Callable[[Handler], Handler]:
    """Registers a function as the handler of these operations."""

    def register(function: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(ops, function))
        return function

    return register


# ---------------------------------------------------------------- elementwise


@writes(
    "abs", "exp", "sqrt", "square", "sin", "cos", "tanh", "erf", "floor", "ceil", "round", "sign", "logical_not",
    "sigmoid", "relu", "relu6", "silu", "softplus",
)  # fmt: skip
def unary(w: Writer, node: Node, x: Value) -> Result:
    variable, order = w.at_hand(x)
    return w.emit(node.op, x=variable), order


@writes("log")
def log(w: Writer, node: Node, x: Value) -> Result:
    variable, order = w.at_hand(x)
    return w.emit("log", x=variable, epsilon=np.float32(1e-45)), order


@writes("rsqrt")
def rsqrt(w: Writer, node: Node, x: Value) -> Result:
    variable, order = w.at_hand(x)
    return w.emit("rsqrt", x=variable, epsilon=np.float32(1e-38)), order


@writes("hard_sigmoid")
def hard_sigmoid(w: Writer, node: Node, x: Value) -> Result:
    variable, order = w.at_hand(x)
    return _sigmoid_hard(w, variable), order


@writes("hard_swish")
def hard_swish(w: Writer, node: Node, x: Value) -> Result:
    variable, order = w.at_hand(x)
    return w.emit("mul", x=variable, y=_sigmoid_hard(w, variable)), order


def _sigmoid_hard(w: Writer, variable: Variable) -> Variable:
    return w.emit("sigmoid_hard", x=variable, alpha=np.float32(1 / 6), beta=np.float32(0.5))


@writes("neg")
def neg(w: Writer, node: Node, x: Value) -> Result:
    variable, order = w.at_hand(x)
    return w.emit("mul", x=variable, y=np.int32(-1) if node.output.dtype == "int32" else np.float32(-1)), order


@writes("gelu")
def gelu(w: Writer, node: Node, x: Value, approximate: bool = False) -> Result:
    variable, order = w.at_hand(x)
    return w.emit("gelu", x=variable, mode="TANH_APPROXIMATION" if approximate else "EXACT"), order


@writes("elu", "leaky_relu")
def with_slope(w: Writer, node: Node, x: Value, alpha: float) -> Result:
    variable, order = w.at_hand(x)
    return w.emit(node.op, x=variable, alpha=np.float32(alpha)), order


@writes("clip")
def clip(w: Writer, node: Node, x: Value, low: float, high: float) -> Result:
    variable, order = w.at_hand(x)
    return w.emit("clip", x=variable, alpha=np.float32(low), beta=np.float32(high)), order


@writes("cast")
def cast(w: Writer, node: Node, x: Value, dtype: str) -> Result:
    if dtype == "uint8":
        raise UnsupportedError("it has no uint8 tensors")
    variable, order = w.at_hand(x)
    return w.emit("cast", x=variable, dtype={"float32": "fp32", "int32": "int32", "bool": "bool"}[dtype]), order


@writes("dequantize")
def dequantize(w: Writer, node: Node, x: Value, scale: float, zero_point: int) -> Result:
    variable, order = w.at_hand(x)
    centred = w.emit("sub", x=w.emit("cast", x=variable, dtype="fp32"), y=np.float32(zero_point))
    return w.emit("mul", x=centred, y=np.float32(scale)), order


@writes(
    "add", "sub", "mul", "div", "maximum", "minimum", "pow", "floor_div", "mod", "equal", "not_equal", "greater",
    "greater_equal", "less", "less_equal", "logical_and", "logical_or",
)  # fmt: skip
def binary(w: Writer, node: Node, a: Value, b: Value) -> Result:
    (x, y), order = w.broadcast([a, b], len(node.output.shape))
    return w.emit("real_div" if node.op == "div" else node.op, x=x, y=y), order


@writes("where")
def where(w: Writer, node: Node, condition: Value, a: Value, b: Value) -> Result:
    (cond, x, y), order = w.broadcast([condition, a, b], len(node.output.shape))
    return w.emit("select", cond=cond, a=x, b=y), order


# ---------------------------------------------------------------- along axes


@writes("softmax")
def softmax(w: Writer, node: Node, x: Value, axis: int) -> Result:
    variable, order = w.at_hand(x)
    return w.emit("softmax", x=variable, axis=order.index(axis)), order


@writes("layer_norm")
def layer_norm(
    w: Writer, node: Node, x: Value, gamma: Value | None, beta: Value | None, axes: Sequence[int], epsilon: float
) -> Result:
    rank, own = len(x.shape), {}
    variable, order = w.at_hand(x) if w.ane or CHANNELS_FIRST in w.held(x) else (w.form(x), identity(rank))
    places = sorted(order.index(axis) for axis in axes)
    if places[-1] - places[0] >= len(places):  # MIL's normalised axes are neighbours
        order = (*(axis for axis in order if axis not in axes), *axes)
        variable = w.form(x, order)
    whole = tuple(n if i in axes else 1 for i, n in enumerate(x.shape))
    wide = [None if v is None else v.data.reshape((1,) * (rank - len(v.shape)) + v.shape) for v in (gamma, beta)]
    wide = [None if v is None else v.transpose(order) for v in wide]
    arranged = tuple(whole[axis] for axis in order)
    if all(v is None or v.shape == arranged for v in wide):  # MIL's own have the shape of the normalised axes
        inside = [x.shape[axis] for axis in order if axis in axes]
        own = {k: v.reshape(inside) for k, v in zip(("gamma", "beta"), wide, strict=True) if v is not None}
        if "beta" in own:  # coremltools wants both
            own.setdefault("gamma", np.ones(inside, np.float32))
        wide = [None, None]
    inner = sorted(order.index(axis) for axis in axes)
    y = w.emit("layer_norm", x=variable, axes=inner, epsilon=np.float32(epsilon), **own)
    y = y if wide[0] is None else w.emit("mul", x=y, y=wide[0])
    return y if wide[1] is None else w.emit("add", x=y, y=wide[1]), order


@writes("mean", "sum", "max", "min", "prod")
def reduction(w: Writer, node: Node, x: Value, axes: Sequence[int], keepdims: bool) -> Result:
    variable, order = w.at_hand(x)
    inner = sorted(order.index(axis) for axis in axes)
    kept = [axis for axis in order if keepdims or axis not in axes]
    scale = np.float32(mean_scale(node))
    if scale == 1:
        y = w.emit(f"reduce_{node.op}", x=variable, axes=inner, keep_dims=bool(keepdims))
    else:
        y = w.emit("reduce_mean", x=w.emit("mul", x=variable, y=scale), axes=inner, keep_dims=True)
        y = w.emit("mul", x=y, y=1 / scale)
        y = y if keepdims else w.emit("squeeze", x=y, axes=inner)
    return y, tuple(sorted(kept).index(axis) for axis in kept)


@writes("argmax")
def argmax(w: Writer, node: Node, x: Value, axis: int) -> Variable:
    return w.emit("reduce_argmax", x=w.form(x), axis=axis, keep_dims=False)


@writes("top_k")
def top_k(w: Writer, node: Node, x: Value, k: int) -> list[Variable]:
    return list(w.emit("topk", x=w.form(x), k=k, axis=len(x.shape) - 1, ascending=False))


# ---------------------------------------------------------------- arrangement


@writes("reshape")
def reshape(w: Writer, node: Node, x: Value, shape: Sequence[int]) -> tuple[Variable, Order | None]:
    """In a form at hand that allows it; otherwise it waits for the form that is asked for."""
    for order, variable in w.held(x).items():
        if made := regroup(x.shape, shape, order):
            return w.emit("reshape", x=variable, shape=[shape[axis] for axis in made]), made
    w.reshaped[node.output] = x
    return None, None


@writes("transpose")
def transpose(w: Writer, node: Node, x: Value, perm: Sequence[int]) -> Result:
    """Every form of the input is one of the output: its axis p is the output's axis perm.index(p)."""
    variable, order = w.at_hand(x)
    return variable, tuple(perm.index(axis) for axis in order)


@writes("concat")
def concat(w: Writer, node: Node, *xs: Value, axis: int) -> Result:
    order = w.common_order(xs, len(node.output.shape))
    return w.emit("concat", values=[w.form(x, order) for x in xs], axis=order.index(axis)), order


@writes("slice")
def slice_(w: Writer, node: Node, x: Value, begin: Sequence[int], end: Sequence[int], strides: Sequence[int]) -> Result:
    variable, order = w.at_hand(x)
    begin, end, stride = ([numbers[axis] for axis in order] for numbers in (begin, end, strides))
    return w.emit("slice_by_index", x=variable, begin=begin, end=end, stride=stride), order


@writes("pad")
def pad(w: Writer, node: Node, x: Value, pads: Sequence[Sequence[int]], mode: str, value: float) -> Result:
    rank = len(x.shape)
    order = w.at_hand(x)[1] if mode == "constant" else CHANNELS_FIRST if rank == 4 else identity(rank)
    pads = [pads[axis] for axis in order]
    if mode != "constant":  # of the last two axes only
        if any(map(any, pads[:-2])):
            raise UnsupportedError(f"{mode} padding is of height and width only")
        pads = pads[-2:]
    flat = [n for pair in pads for n in pair]
    kind = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}[mode]
    return w.emit("pad", x=w.form(x, order), pad=flat, mode=kind, constant_val=np.float32(value)), order


@writes("tile")
def tile(w: Writer, node: Node, x: Value, reps: Sequence[int]) -> Result:
    variable, order = w.at_hand(x)
    return w.emit("tile", x=variable, reps=[reps[axis] for axis in order]), order


@writes("reverse")
def reverse(w: Writer, node: Node, x: Value, axes: Sequence[int]) -> Result:
    variable, order = w.at_hand(x)
    return w.emit("reverse", x=variable, axes=[order.index(axis) for axis in axes]), order


@writes("gather")
def gather(w: Writer, node: Node, x: Value, indices: Value, axis: int) -> Variable:
    return w.emit("gather", x=w.form(x), indices=w.form(indices), axis=axis)


@writes("space_to_depth", "depth_to_space")
def blocks(w: Writer, node: Node, x: Value, block: int) -> Result:
    return w.emit(node.op, x=w.form(x, CHANNELS_FIRST), block_size=block), CHANNELS_FIRST


@writes("resize")
def resize(w: Writer, node: Node, x: Value, size: tuple[int, int], mode: str) -> Result:
    height, width = size
    y = w.form(x, CHANNELS_FIRST)
    if mode == "bilinear":
        y = w.emit(
            "resize_bilinear", x=y, target_size_height=height, target_size_width=width, sampling_mode="UNALIGN_CORNERS"
        )
    elif height % x.shape[1] == 0 and width % x.shape[2] == 0:
        factors = dict(scale_factor_height=height // x.shape[1], scale_factor_width=width // x.shape[2])
        y = w.emit("upsample_nearest_neighbor", x=y, **factors)
    else:
        for axis, n, m in ((2, x.shape[1], height), (3, x.shape[2], width)):
            nearest = np.floor((np.arange(m) + 0.5) * (n / m)).astype(np.int32)
            y = w.emit("gather", x=y, indices=np.minimum(nearest, n - 1), axis=axis)
    return y, CHANNELS_FIRST
