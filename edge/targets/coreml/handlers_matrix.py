"""How the operations of a Graph that multiply matrices or slide windows become MIL; see handlers.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_vits.graph.ir import Node, Value

from .._forms import CHANNELS_FIRST, Variable, identity, turned
from .._half import mean_scale
from .handlers import Result, writes

if TYPE_CHECKING:
    from .writer import Writer

# ---------------------------------------------------------------- matrices


@writes("matmul")
def matmul(
    w: Writer, node: Node, a: Value, b: Value, transpose_a: bool = False, transpose_b: bool = False
) -> Result | Variable:
    if w.ane and len(a.shape) == len(b.shape) == 4 and a.data is None and b.data is None:
        if a.shape[2] == 1 and not (transpose_a or transpose_b):  # a weighted sum of b's rows needs no transpose
            weighted = w.emit("mul", x=w.form(b, CHANNELS_FIRST), y=w.form(a, (0, 2, 1, 3)))
            return w.emit("reduce_sum", x=weighted, axes=[3], keep_dims=True), CHANNELS_FIRST
        rows = lambda value, swap: w.form(value, (0, 2, 1, 3) if swap else CHANNELS_FIRST)
        return _product(w, rows(b, transpose_b), rows(a, transpose_a)), CHANNELS_FIRST
    (x, transpose_x), (y, transpose_y) = _matrix(w, a, transpose_a), _matrix(w, b, transpose_b)
    return w.emit("matmul", x=x, y=y, transpose_x=transpose_x, transpose_y=transpose_y)


def _matrix(w: Writer, value: Value, transposed: bool = False) -> tuple[Variable, bool]:
    """The variable of a Value with its last two axes in either order, and whether that makes it transposed."""
    rank = len(value.shape)
    if value.data is None and turned(rank) in w.forms[value] and identity(rank) not in w.forms[value]:
        return w.form(value, turned(rank)), not transposed
    return w.form(value), transposed


@writes("dense")
def dense(w: Writer, node: Node, x: Value, weight: Value, bias: Value | None) -> Result | Variable:
    if weight.data is None or (bias is not None and bias.data is None):
        y = w.emit("matmul", x=w.form(x), y=w.form(weight), transpose_x=False, transpose_y=True)
        return y if bias is None else w.emit("add", x=y, y=w.form(bias))
    added = {} if bias is None else {"bias": bias.data}
    forms = w.held(x)  # none of a reshape that waits
    if len(x.shape) == 4 and (w.ane or not forms or (CHANNELS_FIRST in forms and identity(4) not in forms)):
        kernel = weight.data[:, :, None, None]  # a 1 x 1 convolution does the same where x is
        return w.emit("conv", x=w.form(x, CHANNELS_FIRST), weight=kernel, pad_type="valid", **added), CHANNELS_FIRST
    return w.emit("linear", x=w.form(x), weight=weight.data, **added)


# ---------------------------------------------------------------- attention, which layout.py makes


@writes("attention")
def attention(w: Writer, node: Node, *inputs: Value | None, heads: int | None = None) -> Result | Variable:
    *qkv, bias = inputs
    if heads:
        return _by_heads(w, *qkv, bias, heads)
    if len(qkv) == 1:  # the heads of q, k and v in a row: moved at once
        operands = [(x, False) for x in w.emit("split", x=w.form(qkv[0]), num_splits=3, axis=1)]
    else:
        operands = [(w.form(x), False) if w.fused else _matrix(w, x) for x in qkv]
    (q, q_turned), (k, k_turned), (v, v_turned) = operands
    if w.fused:
        mask = {} if bias is None else {"attn_mask": bias.data}
        return w.emit("scaled_dot_product_attention", query=q, key=k, value=v, **mask)
    scores = w.emit("matmul", x=q, y=k, transpose_x=q_turned, transpose_y=not k_turned)
    if bias is not None:
        scores = w.emit("add", x=scores, y=bias.data)
    scores = w.emit("softmax", x=scores, axis=-1)
    if v_turned:  # then y is, too
        return w.emit("matmul", x=v, y=scores, transpose_y=True), turned(len(node.output.shape))
    return w.emit("matmul", x=scores, y=v)


def _by_heads(w: Writer, q: Value, k: Value, v: Value, bias: Value | None, heads: int) -> Result:
    """Head by head, with the keys second: scores (B,Nk,1,Nq) = k (B,Nk,1,d) q (B,d,1,Nq), y = v (B,d,1,Nk) scores."""
    queries, keys, values = w.form(q, CHANNELS_FIRST), w.form(k, (0, 2, 1, 3)), w.form(v, CHANNELS_FIRST)
    added = None
    if bias is not None:  # (1, heads, 1, Nk, Nq), whatever is absent or 1 at first
        added = bias.data.reshape((1,) * (4 - bias.data.ndim) + bias.shape)
        added = np.broadcast_to(added, (added.shape[0], heads, *added.shape[2:])).swapaxes(2, 3)[:, :, :, None]
    parts = []
    for i in range(heads):
        scores = _product(w, _part(w, keys, 3, i, heads), _part(w, queries, 1, i, heads))
        if added is not None:
            scores = w.emit("add", x=scores, y=np.ascontiguousarray(added[:, i]))
        parts.append(_product(w, _part(w, values, 1, i, heads), w.emit("softmax", x=scores, axis=1)))
    return parts[0] if heads == 1 else w.emit("concat", values=parts, axis=1), CHANNELS_FIRST


def _product(w: Writer, x: Variable, y: Variable) -> Variable:
    """(B,m,H,k) and (B,k,H,n) -> (B,m,H,n), matrices where the Neural Engine has them."""
    return w.emit("einsum", values=[x, y], equation="nchw,nwhu->nchu")


def _part(w: Writer, x: Variable, axis: int, i: int, count: int) -> Variable:
    """Part `i` of `count` equal ones along an axis of a MIL variable."""
    if count == 1:
        return x
    begin, end = [0] * len(x.shape), list(x.shape)
    begin[axis], end[axis] = i * x.shape[axis] // count, (i + 1) * x.shape[axis] // count
    return w.emit("slice_by_index", x=x, begin=begin, end=end)


# ---------------------------------------------------------------- windows

Pads = Sequence[Sequence[int]]  # ((top, bottom), (left, right))


def _padding(pads: Pads) -> dict[str, Any]:
    return {"pad_type": "custom", "pad": [*pads[0], *pads[1]]} if any(map(any, pads)) else {"pad_type": "valid"}


def _conv(
    w: Writer,
    x: Value,
    kernel: np.ndarray,
    bias: Value | None,
    strides: Sequence[int],
    pads: Pads,
    dilation: Sequence[int],
    groups: int,
) -> Result:
    """A convolution with a kernel (out, in / groups, height, width)."""
    added = {} if bias is None else {"bias": bias.data}
    y = w.emit(
        "conv", x=w.form(x, CHANNELS_FIRST), weight=np.ascontiguousarray(kernel), strides=list(strides),
        dilations=list(dilation), groups=groups, **_padding(pads), **added,
    )  # fmt: skip
    return y, CHANNELS_FIRST


@writes("conv2d")
def conv2d(
    w: Writer,
    node: Node,
    x: Value,
    kernel: Value,
    bias: Value | None,
    strides: Sequence[int],
    pads: Pads,
    dilation: Sequence[int],
    groups: int,
) -> Result:
    return _conv(w, x, kernel.data.transpose(3, 2, 0, 1), bias, strides, pads, dilation, groups)


@writes("depthwise_conv2d")
def depthwise_conv2d(
    w: Writer,
    node: Node,
    x: Value,
    kernel: Value,
    bias: Value | None,
    strides: Sequence[int],
    pads: Pads,
    dilation: Sequence[int],
) -> Result:
    height, width, channels, multiplier = kernel.shape
    turned_kernel = kernel.data.transpose(2, 3, 0, 1).reshape(channels * multiplier, 1, height, width)
    return _conv(w, x, turned_kernel, bias, strides, pads, dilation, channels)


@writes("max_pool2d", "avg_pool2d")
def pool2d(w: Writer, node: Node, x: Value, size: Sequence[int], strides: Sequence[int], pads: Pads) -> Result:
    average = {} if node.op == "max_pool2d" else {"exclude_padding_from_average": True}
    variable, scale = w.form(x, CHANNELS_FIRST), np.float32(mean_scale(node))
    variable = variable if scale == 1 else w.emit("mul", x=variable, y=scale)
    y = w.emit(
        node.op.removesuffix("2d"), x=variable, kernel_sizes=list(size), strides=list(strides),
        **_padding(pads), **average,
    )  # fmt: skip
    return y if scale == 1 else w.emit("mul", x=y, y=1 / scale), CHANNELS_FIRST
