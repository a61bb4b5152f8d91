"""What MIL operations mean, in numpy: elementwise, along axes, arrangement, and quantized numbers. See
evaluate_matrix.py for the rest.

Operations are named and parametrised as in MIL. A tensor that depends on the input has one more axis in front, for the
images; weights and other constants have the shape that the file declares.

Reference  https://apple.github.io/coremltools/docs-guides (MIL ops).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_vits.graph import ops as graph_ops

from .encoding import LARGEST, NUMPY, unpack

Array = np.ndarray
Operation = Callable[..., Any]  # (**operands and parameters) -> array, or a list of arrays

OPS: dict[str, Operation] = {}  # MIL operation -> what it means
BROADCAST: set[str] = set()  # operations whose operands broadcast against each other
TENSORS = {"x", "y", "values", "a", "b", "cond", "input", "indices", "query", "key", "value", "attn_mask"}


def defines(name: str, *, broadcasts: bool = False, batched: bool = False) -> Callable[[Operation], Operation]:
    """Registers a function as the meaning of a MIL operation.

    Args:
        name: of the operation.
        broadcasts: whether its operands broadcast against each other.
        batched: whether the function takes (B, ...), and is to take (N,B, ...).
    """

    def register(function: Operation) -> Operation:
        OPS[name] = _batched(function) if batched else function
        if broadcasts:
            BROADCAST.add(name)
        return function

    return register


def _batched(function: Operation) -> Operation:
    def call(x: Array, **parameters: Any) -> Array:
        y = function(x.reshape(-1, *x.shape[2:]), **parameters)
        return y.reshape(*x.shape[:2], *y.shape[1:])

    return call


def bounded(size: float) -> None:
    """A `ValueError` for a result of more elements than any program has: a damaged file asks for no memory."""
    if not 0 <= size <= LARGEST:
        raise ValueError(f"it asks for {size:.0f} elements")


def behind(axis: int) -> int:
    """A declared axis, behind the axis of the images."""
    return int(axis) + 1 if axis >= 0 else int(axis)


def axes_of(axes: Sequence[int] | None, x: Array) -> tuple[int, ...]:
    """Declared axes, behind the axis of the images; all of them by default."""
    return tuple(range(1, x.ndim)) if axes is None else tuple(behind(a) for a in axes)


# ---------------------------------------------------------------- elementwise


def _of_one(function: Callable[[Array], Array]) -> Operation:
    def call(x: Array) -> Array:
        return function(x)

    return call


def _of_two(function: Callable[[Array, Array], Array]) -> Operation:
    def call(x: Array, y: Array) -> Array:
        return function(x, y)

    return call


for _name, _function in dict(
    abs=np.abs, exp=np.exp, exp2=np.exp2, sqrt=np.sqrt, square=np.square, sin=np.sin, cos=np.cos, tanh=np.tanh,
    erf=graph_ops.erf, sign=np.sign, floor=np.floor, ceil=np.ceil, round=np.rint, logical_not=np.logical_not,
    sigmoid=graph_ops.sigmoid,
).items():  # fmt: skip
    defines(_name)(_of_one(_function))

for _name, _function in dict(
    add=np.add, sub=np.subtract, mul=np.multiply, real_div=np.true_divide, floor_div=np.floor_divide, mod=np.mod,
    pow=np.power, maximum=np.maximum, minimum=np.minimum, equal=np.equal, not_equal=np.not_equal, greater=np.greater,
    greater_equal=np.greater_equal, less=np.less, less_equal=np.less_equal, logical_and=np.logical_and,
    logical_or=np.logical_or, logical_xor=np.logical_xor,
).items():  # fmt: skip
    defines(_name, broadcasts=True)(_of_two(_function))


@defines("select", broadcasts=True)
def select(cond: Array, a: Array, b: Array) -> Array:
    return np.where(cond, a, b)


@defines("identity")
def identity(x: Array) -> Array:
    return x


@defines("relu")
def relu(x: Array) -> Array:
    return np.maximum(x, 0)


@defines("relu6")
def relu6(x: Array) -> Array:
    return np.clip(x, 0, 6)


@defines("silu")
def silu(x: Array) -> Array:
    return x * graph_ops.sigmoid(x)


@defines("softplus")
def softplus(x: Array) -> Array:
    return np.logaddexp(x, np.float32(0))


@defines("softsign")
def softsign(x: Array) -> Array:
    return x / (1 + np.abs(x))


@defines("gelu")
def gelu(x: Array, mode: str = "EXACT") -> Array:
    if mode == "EXACT":
        return 0.5 * x * (1 + graph_ops.erf(x * np.float32(math.sqrt(0.5))))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))
    return x * graph_ops.sigmoid(np.float32(1.702) * x)


@defines("elu")
def elu(x: Array, alpha: float = 1.0) -> Array:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


@defines("leaky_relu")
def leaky_relu(x: Array, alpha: float = 0.01) -> Array:
    return np.where(x >= 0, x, alpha * x)


@defines("prelu", batched=True)
def prelu(x: Array, alpha: Array) -> Array:
    return np.where(x >= 0, x, by_channel(alpha, x) * x)


@defines("sigmoid_hard")
def sigmoid_hard(x: Array, alpha: float = 0.2, beta: float = 0.5) -> Array:
    return np.clip(alpha * x + beta, 0, 1)


@defines("linear_activation")
def linear_activation(x: Array, alpha: float = 1.0, beta: float = 0.0) -> Array:
    return alpha * x + beta


@defines("log")
def log(x: Array, epsilon: float = 1e-45) -> Array:
    return np.log(x + np.float32(epsilon))


@defines("rsqrt")
def rsqrt(x: Array, epsilon: float = 1e-12) -> Array:
    return 1 / np.sqrt(x + np.float32(epsilon))


@defines("inverse")
def inverse(x: Array, epsilon: float = 1e-4) -> Array:
    return 1 / (x + np.float32(epsilon))


@defines("clip")
def clip(x: Array, alpha: float, beta: float) -> Array:
    return np.clip(x, alpha, beta)


@defines("cast")
def cast(x: Array, dtype: str) -> Array:
    return x if dtype in ("fp16", "fp32") and x.dtype == np.float32 else x.astype(NUMPY[dtype])


def by_channel(v: Array, x: Array) -> Array:
    """A parameter for each channel of (B,C, space)."""
    return v.reshape(-1, *(1,) * (x.ndim - 2))


# ---------------------------------------------------------------- along axes


def _reduction(function: Operation) -> Operation:
    def call(x: Array, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Array:
        return function(x, axis=axes_of(axes, x), keepdims=bool(keep_dims))

    return call


def _sum_square(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    return np.square(x).sum(axis, keepdims=keepdims)


def _l1_norm(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    return np.abs(x).sum(axis, keepdims=keepdims)


def _l2_norm(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    return np.sqrt(np.square(x).sum(axis, keepdims=keepdims))


def _log_sum_exp(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    top = x.max(axis, keepdims=True)
    y = np.log(np.exp(x - top).sum(axis, keepdims=True)) + top
    return y if keepdims else np.squeeze(y, axis)


for _name, _function in dict(
    sum=np.sum, mean=np.mean, max=np.max, min=np.min, prod=np.prod, log_sum_exp=_log_sum_exp, sum_square=_sum_square,
    l1_norm=_l1_norm, l2_norm=_l2_norm,
).items():  # fmt: skip
    defines(f"reduce_{_name}")(_reduction(_function))


@defines("reduce_argmax")
def reduce_argmax(x: Array, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Array:
    return np.argmax(x, axis=behind(axis), keepdims=bool(keep_dims))


@defines("reduce_argmin")
def reduce_argmin(x: Array, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Array:
    return np.argmin(x, axis=behind(axis), keepdims=bool(keep_dims))


@defines("softmax")
def softmax(x: Array, axis: int = -1) -> Array:
    e = np.exp(x - x.max(behind(axis), keepdims=True))
    return e / e.sum(behind(axis), keepdims=True)


@defines("topk")
def topk(
    x: Array,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> list[Array]:
    if not 0 < int(k) <= x.shape[behind(axis)]:
        raise ValueError(f"its k is {int(k)} of {x.shape[behind(axis)]} elements")
    order = np.argsort(x if ascending else -x, axis=behind(axis), kind="stable")
    order = np.take(order, np.arange(int(k)), behind(axis))
    values = np.take_along_axis(x, order, behind(axis))
    return [values, order] if return_indices else [values]


def _normalized(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    x = x - x.mean(axes, keepdims=True)
    return x / np.sqrt(np.square(x).mean(axes, keepdims=True) + epsilon)


@defines("layer_norm")
def layer_norm(
    x: Array,
    axes: Sequence[int] | None = None,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: float = 1e-5,
) -> Array:
    inner = tuple(a % x.ndim for a in axes_of(axes, x))
    shape = [n if i in inner else 1 for i, n in enumerate(x.shape)]
    y = _normalized(x, inner, epsilon)
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


@defines("instance_norm", batched=True)
def instance_norm(x: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5) -> Array:
    y = _normalized(x, tuple(range(2, x.ndim)), epsilon)
    y = y if gamma is None else y * by_channel(gamma, x)
    return y if beta is None else y + by_channel(beta, x)


@defines("batch_norm", batched=True)
def batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: float = 1e-5,
) -> Array:
    y = (x - by_channel(mean, x)) / np.sqrt(by_channel(variance, x) + epsilon)
    y = y if gamma is None else y * by_channel(gamma, x)
    return y if beta is None else y + by_channel(beta, x)


# ---------------------------------------------------------------- arrangement


@defines("reshape")
def reshape(x: Array, shape: Sequence[int]) -> Array:
    sizes = [x.shape[i - len(shape)] if n == 0 else int(n) for i, n in enumerate(shape)]  # 0 copies, from the end
    return x.reshape(x.shape[0], *sizes)


@defines("transpose")
def transpose(x: Array, perm: Sequence[int]) -> Array:
    return x.transpose(0, *(behind(p) % x.ndim for p in perm))


@defines("expand_dims")
def expand_dims(x: Array, axes: Sequence[int]) -> Array:
    return np.expand_dims(x, axes_of(axes, x))


@defines("squeeze")
def squeeze(x: Array, axes: Sequence[int] | None = None) -> Array:
    return np.squeeze(x, tuple(i for i in range(1, x.ndim) if x.shape[i] == 1) if axes is None else axes_of(axes, x))


@defines("slice_by_index")
def slice_by_index(
    x: Array,
    begin: Sequence[int],
    end: Sequence[int],
    stride: Sequence[int] | None = None,
    begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None,
    squeeze_mask: Sequence[bool] | None = None,
) -> Array:
    index: list[Any] = [slice(None)]
    masked = lambda mask, i: mask is not None and bool(mask[i])
    for i in range(x.ndim - 1):
        first = None if masked(begin_mask, i) else int(begin[i])
        last = None if masked(end_mask, i) else int(end[i])
        step = 1 if stride is None else int(stride[i])
        index.append(int(begin[i]) if masked(squeeze_mask, i) else slice(first, last, step))
    return x[tuple(index)]


@defines("slice_by_size")
def slice_by_size(x: Array, begin: Sequence[int], size: Sequence[int]) -> Array:
    ends = [None if n == -1 else int(b) + int(n) for b, n in zip(begin, size, strict=True)]
    return x[(slice(None), *(slice(int(b), e) for b, e in zip(begin, ends, strict=True)))]


@defines("pad")
def pad(x: Array, pad: Sequence[int], mode: str = "constant", constant_val: float = 0.0) -> Array:
    pads = [(int(a), int(b)) for a, b in np.reshape(pad, (-1, 2))]
    pads = [(0, 0)] * (x.ndim - len(pads)) + pads
    bounded(math.prod(float(n + a + b) for n, (a, b) in zip(x.shape, pads, strict=True)))
    if mode == "constant":
        return np.pad(x, pads, constant_values=constant_val)
    return np.pad(x, pads, mode="edge" if mode == "replicate" else "reflect")


@defines("concat")
def concat(values: Sequence[Array], axis: int, interleave: bool = False) -> Array:
    if interleave:
        raise ValueError("an interleaved concat has no reference definition")
    return np.concatenate(values, behind(axis))


@defines("stack")
def stack(values: Sequence[Array], axis: int) -> Array:
    return np.stack(values, behind(axis))


@defines("split")
def split(x: Array, axis: int, num_splits: int | None = None, split_sizes: Sequence[int] | None = None) -> list[Array]:
    if split_sizes is None and not 0 < int(num_splits or 0) <= x.shape[behind(axis)]:
        raise ValueError(f"it splits {x.shape[behind(axis)]} elements into {num_splits}")
    parts = int(num_splits) if split_sizes is None else np.cumsum(split_sizes)[:-1]
    return np.split(x, parts, behind(axis))


@defines("tile")
def tile(x: Array, reps: Sequence[int]) -> Array:
    bounded(math.prod(float(r) for r in reps) * x.size)
    return np.tile(x, (1, *(int(r) for r in reps)))


@defines("reverse")
def reverse(x: Array, axes: Sequence[int] | None = None) -> Array:
    return np.flip(x, axes_of(axes, x))


@defines("gather")
def gather(x: Array, indices: Array, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Array:
    if batch_dims:
        raise ValueError("gather with batch_dims has no reference definition")
    return np.stack([np.take(a, i, int(axis)) for a, i in zip(x, indices, strict=True)])


# ---------------------------------------------------------------- quantized values and compressed constants


def _along(v: Array, x: Array, axis: int | None) -> Array:
    """A parameter, one for all or one for each index of an axis of x."""
    return v if axis is None or np.ndim(v) == 0 else v.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


@defines("quantize")
def quantize(
    input: Array, scale: Array, output_dtype: str, zero_point: Array | None = None, axis: int | None = None
) -> Array:
    axis = None if axis is None else behind(axis)
    zero = 0 if zero_point is None else _along(zero_point, input, axis).astype(np.float32)
    limits = np.iinfo(NUMPY[output_dtype])
    return np.clip(np.round(input / _along(scale, input, axis)) + zero, limits.min, limits.max)


@defines("dequantize")
def dequantize(input: Array, scale: Array, zero_point: Array | None = None, axis: int | None = None) -> Array:
    axis = None if axis is None else behind(axis)
    zero = 0 if zero_point is None else _along(zero_point, input, axis).astype(np.float32)
    return (input.astype(np.float32) - zero) * _along(scale, input, axis)


@defines("constexpr_affine_dequantize")
def constexpr_affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: int) -> Array:
    q, axis = quantized_data.astype(np.float32), int(axis)
    return (q - _along(zero_point, q, axis).astype(np.float32)) * _along(scale, q, axis)


@defines("constexpr_blockwise_shift_scale")
def constexpr_blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    def spread(v: Array) -> Array:
        for axis, n in enumerate(data.shape):
            v = np.repeat(v, n // v.shape[axis], axis)
        return v.astype(np.float32)

    return (data.astype(np.float32) - (0 if offset is None else spread(offset))) * spread(scale)


@defines("constexpr_lut_to_dense")
def constexpr_lut_to_dense(
    indices: Array, lut: Array, shape: Sequence[int] | None = None, vector_axis: int | None = None
) -> Array:
    if shape is not None:  # iOS 16: packed bits and one table
        shape = tuple(int(n) for n in shape)
        return lut[unpack(indices.tobytes(), int(math.log2(lut.size)), math.prod(shape))].reshape(shape)
    rank = indices.ndim  # from iOS 18: table (a table for each block of the axes, entries, length of an entry)
    block = np.ix_(*(np.arange(n) * g // n for n, g in zip(indices.shape, lut.shape[:rank], strict=True)))
    entries = lut[(*block, indices)]
    if entries.shape[-1] == 1:
        return entries[..., 0]
    if vector_axis is None:
        raise ValueError("a table of vectors has no axis for them")
    axis = int(vector_axis) % rank
    shape = [n * lut.shape[-1] if i == axis else n for i, n in enumerate(indices.shape)]
    return np.moveaxis(entries, -1, axis + 1).reshape(shape)


@defines("constexpr_sparse_to_dense")
def constexpr_sparse_to_dense(nonzero_data: Array, mask: Array, shape: Sequence[int] | None = None) -> Array:
    if shape is not None:  # iOS 16: packed bits
        shape = tuple(int(n) for n in shape)
        mask = unpack(mask.tobytes(), 1, math.prod(shape)).reshape(shape)
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


@defines("constexpr_cast")
def constexpr_cast(source_val: Array, output_dtype: str) -> Array:
    return source_val.astype(NUMPY[output_dtype])
