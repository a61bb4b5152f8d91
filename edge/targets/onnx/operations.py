"""How each primitive operation is written for ONNX.

(writer, node, *inputs, **attrs) -> result, or a list of them. A result is a variable in the Graph's order of axes, or
(variable, order).
"""

import math

import numpy as np

from .._forms import CHANNELS_FIRST, UnsupportedError, identity, regroup, turned
from .._half import mean_scale

WRITERS = {}


def writes(*ops):
    """Registers a function that writes these operations."""

    def register(function):
        for op in ops:
            WRITERS[op] = function
        return function

    return register


# ---------------------------------------------------------------- elementwise

UNARY = dict(
    abs="Abs", neg="Neg", exp="Exp", log="Log", sqrt="Sqrt", sin="Sin", cos="Cos", tanh="Tanh", erf="Erf",
    floor="Floor", ceil="Ceil", round="Round", sign="Sign", logical_not="Not", sigmoid="Sigmoid", relu="Relu",
    softplus="Softplus", hard_swish="HardSwish",
)  # fmt: skip
BINARY = dict(add="Add", sub="Sub", mul="Mul", div="Div", maximum="Max", minimum="Min", pow="Pow")
COMPARISONS = dict(
    equal="Equal", greater="Greater", greater_equal="GreaterOrEqual", less="Less", less_equal="LessOrEqual",
    logical_and="And", logical_or="Or",
)  # fmt: skip


@writes(*UNARY)
def write_unary(w, node, x):
    x, order = w.at_hand(x)
    return w.emit(UNARY[node.op], x), order


@writes(*BINARY)
def write_binary(w, node, a, b):
    operands, order = w.broadcast([a, b], len(node.output.shape))
    return w.emit(BINARY[node.op], *operands), order


@writes(*COMPARISONS)
def write_comparison(w, node, a, b):
    operands, order = w.broadcast([a, b], len(node.output.shape))
    return w.emit(COMPARISONS[node.op], *operands, dtype="bool"), order


@writes("not_equal")
def write_not_equal(w, node, a, b):
    operands, order = w.broadcast([a, b], len(node.output.shape))
    return w.emit("Not", w.emit("Equal", *operands, dtype="bool")), order


@writes("floor_div")
def write_floor_div(w, node, a, b):
    """floor(a / b); of integers, whose division truncates, (a - a mod b) / b."""
    (a, b), order = w.broadcast([a, b], len(node.output.shape))
    if node.output.dtype == "float32":
        return w.emit("Floor", w.emit("Div", a, b)), order
    return w.emit("Div", w.emit("Sub", a, w.emit("Mod", a, b)), b), order


@writes("mod")
def write_mod(w, node, a, b):
    """With the sign of b, as ONNX has it for integers; of floats it has C's, with the sign of a."""
    (a, b), order = w.broadcast([a, b], len(node.output.shape))
    if node.output.dtype != "float32":
        return w.emit("Mod", a, b), order
    return w.emit("Mod", w.emit("Add", w.emit("Mod", a, b, fmod=1), b), b, fmod=1), order


@writes("where")
def write_where(w, node, condition, a, b):
    (condition, a, b), order = w.broadcast([condition, a, b], len(node.output.shape))
    return w.emit("Where", condition, a, b, dtype=w.types[w.cast(a)]), order


@writes("rsqrt")
def write_rsqrt(w, node, x):
    x, order = w.at_hand(x)
    return w.emit("Reciprocal", w.emit("Sqrt", x)), order


@writes("square")
def write_square(w, node, x):
    x, order = w.at_hand(x)
    return w.emit("Mul", x, x), order


@writes("relu6")
def write_relu6(w, node, x):
    x, order = w.at_hand(x)
    return w.emit("Clip", x, w.number(0, "zero"), w.number(6, "six")), order


@writes("silu")
def write_silu(w, node, x):
    x, order = w.at_hand(x)
    return w.emit("Mul", x, w.emit("Sigmoid", x)), order


@writes("hard_sigmoid")
def write_hard_sigmoid(w, node, x):
    x, order = w.at_hand(x)
    return w.emit("HardSigmoid", x, alpha=1 / 6, beta=0.5), order


@writes("gelu")
def write_gelu(w, node, x, approximate=False):
    x, order = w.at_hand(x)
    return w.emit("Gelu", x, approximate="tanh" if approximate else "none"), order


@writes("elu")
def write_elu(w, node, x, alpha):
    x, order = w.at_hand(x)
    return w.emit("Elu", x, alpha=float(alpha)), order


@writes("leaky_relu")
def write_leaky_relu(w, node, x, alpha):
    x, order = w.at_hand(x)
    return w.emit("LeakyRelu", x, alpha=float(alpha)), order


@writes("clip")
def write_clip(w, node, x, low, high):
    dtype = x.dtype if x.dtype != "float32" else w.precision
    x, order = w.at_hand(x)
    return w.emit("Clip", x, w.constant(np.array(low, dtype), "low"), w.constant(np.array(high, dtype), "high")), order


@writes("cast")
def write_cast(w, node, x, dtype):
    x, order = w.at_hand(x)
    dtype = w.precision if dtype == "float32" else dtype
    return w.emit("Cast", x, dtype=dtype, to=w.kinds[dtype]), order


@writes("dequantize")
def write_dequantize(w, node, x, scale, zero_point):
    dtype = x.dtype
    x, order = w.at_hand(x)
    scale = w.constant(np.array(scale, np.float32), "scale")
    if dtype == "int32":
        if zero_point:
            raise UnsupportedError("integers of 32 bits have no zero point there")
        return w.emit("DequantizeLinear", x, scale, dtype="float32"), order
    return w.emit("DequantizeLinear", x, scale, w.constant(np.array(zero_point, dtype), "zero"), dtype="float32"), order


# ---------------------------------------------------------------- along axes


@writes("softmax")
def write_softmax(w, node, x, axis):
    x, order = w.at_hand(x)
    return w.emit("Softmax", x, axis=order.index(axis)), order


@writes("layer_norm")
def write_layer_norm(w, node, x, gamma, beta, axes, epsilon):
    """Over the last axes as LayerNormalization, which has gains and offsets for each of their entries.

    Over a whole map with gains for each channel it is InstanceNormalization of one channel.
    """
    rank = len(x.shape)
    _, order = w.at_hand(x)
    inside = rank - len(axes)
    if not set(order[inside:]) == set(axes):
        order = (*(i for i in range(rank) if i not in axes), *axes)
    variable, shape = w.form(x, order), [x.shape[axis] for axis in order]
    wide = [v and v.data.reshape((1,) * (rank - len(v.shape)) + v.shape).transpose(order) for v in (gamma, beta)]
    whole = (*(1,) * inside, *shape[inside:])
    if all(v is None or v.shape == whole for v in wide) and (gamma or math.prod(whole) == max(whole)):
        scale = np.ones(shape[inside:], np.float32) if wide[0] is None else wide[0].reshape(shape[inside:])
        inputs = [variable, w.constant(scale.astype(w.precision), "gain")]
        if beta:
            inputs.append(w.literal(beta, wide[1].reshape(shape[inside:])))
        return w.emit("LayerNormalization", *inputs, axis=inside, epsilon=float(epsilon)), order
    precision, w.precision = w.precision, "float32"  # InstanceNormalization has no stash_type
    flat = w.emit_reshape(variable, (math.prod(shape[:inside]), 1, math.prod(shape[inside:])))
    ones, zeros = (w.constant(np.full(1, n, np.float32), name) for n, name in ((1, "gain"), (0, "offset")))
    y = w.emit_reshape(w.emit("InstanceNormalization", flat, ones, zeros, epsilon=float(epsilon)), shape)
    w.precision = precision
    y = y if gamma is None else w.emit("Mul", y, w.literal(gamma, wide[0]))
    return y if beta is None else w.emit("Add", y, w.literal(beta, wide[1])), order


REDUCTIONS = dict(mean="ReduceMean", sum="ReduceSum", max="ReduceMax", min="ReduceMin", prod="ReduceProd")


@writes(*REDUCTIONS)
def write_reduction(w, node, x, axes, keepdims):
    x, order = w.at_hand(x)
    where = w.integers(sorted(order.index(axis) for axis in axes), "axes")
    y = w.emit(REDUCTIONS[node.op], x, where, keepdims=int(keepdims))
    kept = [axis for axis in order if keepdims or axis not in axes]
    return y, tuple(sorted(kept).index(axis) for axis in kept)


@writes("argmax")
def write_argmax(w, node, x, axis):
    y = w.emit("ArgMax", w.form(x), axis=axis, keepdims=0, dtype="int64")
    return w.emit("Cast", y, dtype="int32", to=w.kinds["int32"])


@writes("top_k")
def write_top_k(w, node, x, k):
    values, indices = w.emit("TopK", w.form(x), w.integers([k], "k"), axis=len(x.shape) - 1, count=2)
    w.types[indices] = "int64"
    return [values, w.emit("Cast", indices, dtype="int32", to=w.kinds["int32"])]


# ---------------------------------------------------------------- arrangement


@writes("reshape")
def write_reshape(w, node, x, shape):
    """In a form at hand that allows it; otherwise it waits for the form that is asked for."""
    for order, variable in w.held(x).items():
        if made := regroup(x.shape, shape, order):
            return w.emit_reshape(variable, [shape[axis] for axis in made]), made
    w.reshaped[node.output] = x
    return None, None


@writes("transpose")
def write_transpose(w, node, x, perm):
    """Every form of the input is one of the output: its axis p is the output's axis perm.index(p)."""
    variable, order = w.at_hand(x)
    return variable, tuple(perm.index(axis) for axis in order)


@writes("concat")
def write_concat(w, node, *xs, axis):
    order = w.common_order(xs, len(node.output.shape))
    return w.emit("Concat", *(w.form(x, order) for x in xs), axis=order.index(axis)), order


def cut(w, x, begin, end, axes, steps=None):
    """A variable's entries from `begin` to `end` along these axes."""
    inputs = [w.integers(n, name) for n, name in ((begin, "begin"), (end, "end"), (axes, "axes"))]
    return w.emit("Slice", x, *inputs, *([w.integers(steps, "steps")] if steps else ()))


@writes("slice")
def write_slice(w, node, x, begin, end, strides):
    variable, order = w.at_hand(x)
    used = [i for i, n in enumerate(x.shape) if (begin[i], end[i], strides[i]) != (0, n, 1)]
    arranged = sorted(used, key=order.index)
    numbers = [[n[axis] for axis in arranged] for n in (begin, end, strides)]
    return cut(w, variable, *numbers[:2], [order.index(axis) for axis in arranged], numbers[2]), order


@writes("pad")
def write_pad(w, node, x, pads, mode, value):
    dtype = x.dtype if x.dtype != "float32" else w.precision
    x, order = w.at_hand(x)
    flat = [pads[axis][side] for side in (0, 1) for axis in order]
    by = [w.constant(np.array(value, dtype), "value")] if mode == "constant" else []
    return w.emit("Pad", x, w.integers(flat, "pads"), *by, mode=mode), order


@writes("tile")
def write_tile(w, node, x, reps):
    x, order = w.at_hand(x)
    return w.emit("Tile", x, w.integers([reps[axis] for axis in order], "reps")), order


@writes("reverse")
def write_reverse(w, node, x, axes):
    x, order = w.at_hand(x)
    count = len(axes)
    where = sorted(order.index(axis) for axis in axes)
    return cut(w, x, [-1] * count, [np.iinfo(np.int64).min] * count, where, [-1] * count), order


@writes("gather")
def write_gather(w, node, x, indices, axis):
    return w.emit("Gather", w.form(x), w.form(indices), axis=axis)


@writes("space_to_depth")
def write_space_to_depth(w, node, x, block):
    return w.emit("SpaceToDepth", w.form(x, CHANNELS_FIRST), blocksize=block), CHANNELS_FIRST


@writes("depth_to_space")
def write_depth_to_space(w, node, x, block):
    return w.emit("DepthToSpace", w.form(x, CHANNELS_FIRST), blocksize=block, mode="DCR"), CHANNELS_FIRST


@writes("resize")
def write_resize(w, node, x, size, mode):
    """With half-pixel centres; the nearest pixel of a centre between two is the second."""
    how = dict(mode="nearest", nearest_mode="round_prefer_ceil") if mode == "nearest" else dict(mode="linear")
    sizes = w.integers([x.shape[0], x.shape[3], *size], "size")
    y = w.emit("Resize", w.form(x, CHANNELS_FIRST), "", "", sizes, coordinate_transformation_mode="half_pixel", **how)
    return y, CHANNELS_FIRST


# ---------------------------------------------------------------- matrix work and windows


@writes("matmul")
def write_matmul(w, node, a, b, transpose_a=False, transpose_b=False):
    return w.emit("MatMul", _matrix(w, a, transpose_a), _matrix(w, b, transpose_b))


def _matrix(w, value, transposed):
    return w.form(value, turned(len(value.shape)) if transposed else None)


@writes("attention")
def write_attention(w, node, *inputs):
    """softmax(q k' + bias) v; the heads of q, k and v may stand in a row, moved at once."""
    *inputs, bias = inputs
    if len(inputs) == 1:
        q, k, v = w.emit("Split", w.form(inputs[0]), axis=1, num_outputs=3, count=3)
        k = w.emit_transpose(k, turned(4))
    else:
        q, k, v = inputs
        q, k, v = w.form(q), w.form(k, turned(len(k.shape))), w.form(v)
    scores = w.emit("MatMul", q, k, name="scores")
    if bias is not None:
        scores = w.emit("Add", scores, w.form(bias), name="bias")
    return w.emit("MatMul", w.emit("Softmax", scores, axis=-1), v)


@writes("dense")
def write_dense(w, node, x, weight, bias):
    """Vectors by Gemm, tokens by MatMul and Add, a feature map that is channels first by a convolution of 1 x 1."""
    forms = w.held(x)  # none of a reshape that waits
    first = not forms or (CHANNELS_FIRST in forms and identity(4) not in forms)
    if len(x.shape) == 4 and weight.data is not None and first:
        kernel = w.literal(weight, weight.data[:, :, None, None])
        inputs = [w.form(x, CHANNELS_FIRST), kernel, *([] if bias is None else [w.form(bias)])]
        return w.emit("Conv", *inputs, kernel_shape=[1, 1]), CHANNELS_FIRST
    if len(x.shape) == 2:
        return w.emit("Gemm", w.form(x), w.form(weight), *([] if bias is None else [w.form(bias)]), transB=1)
    y = w.emit("MatMul", w.form(x), w.form(weight, (1, 0)))
    return y if bias is None else w.emit("Add", y, w.form(bias), name="bias")


def convolution(w, x, kernel, bias, strides, pads, dilation, groups):
    """A convolution with a kernel (out,in/groups,height,width)."""
    where = dict(strides=list(strides), pads=window(pads), dilations=list(dilation), group=groups)
    inputs = [w.form(x, CHANNELS_FIRST), kernel, *([] if bias is None else [w.form(bias)])]
    return w.emit("Conv", *inputs, kernel_shape=list(w.initializers[kernel].shape[2:]), **where), CHANNELS_FIRST


def window(pads):
    """((top, bottom), (left, right)) as ONNX has them."""
    return [pads[0][0], pads[1][0], pads[0][1], pads[1][1]]


@writes("conv2d")
def write_conv2d(w, node, x, kernel, bias, strides, pads, dilation, groups):
    if kernel.data is None:
        raise UnsupportedError("its kernel is computed, not a weight")
    return convolution(w, x, w.form(kernel, (3, 2, 0, 1)), bias, strides, pads, dilation, groups)


@writes("depthwise_conv2d")
def write_depthwise_conv2d(w, node, x, kernel, bias, strides, pads, dilation):
    if kernel.data is None:
        raise UnsupportedError("its kernel is computed, not a weight")
    height, width, channels, multiplier = kernel.shape
    array = kernel.data.transpose(2, 3, 0, 1).reshape(channels * multiplier, 1, height, width)
    return convolution(w, x, w.literal(kernel, array), bias, strides, pads, dilation, channels)


@writes("max_pool2d")
def write_max_pool2d(w, node, x, size, strides, pads):
    y = w.emit("MaxPool", w.form(x, CHANNELS_FIRST), kernel_shape=list(size), strides=list(strides), pads=window(pads))
    return y, CHANNELS_FIRST


@writes("avg_pool2d")
def write_avg_pool2d(w, node, x, size, strides, pads):
    where = dict(kernel_shape=list(size), strides=list(strides), pads=window(pads), count_include_pad=0)
    y, scale = w.form(x, CHANNELS_FIRST), mean_scale(node) if w.precision == "float16" else 1.0
    y = y if scale == 1 else w.emit("Mul", y, w.number(scale, "scale"))
    y = w.emit("AveragePool", y, **where)
    return (y if scale == 1 else w.emit("Mul", y, w.number(1 / scale, "scale"))), CHANNELS_FIRST
