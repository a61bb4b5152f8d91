"""Reductions: sums, extremes, the largest's place, pooling."""

from __future__ import annotations

import typing

import numpy as np

from keras_vits.graph.ops import same_padding

from ..._half import mean_scale
from ._registry import given, handles
from .arrange import bordered

if typing.TYPE_CHECKING:
    from keras_vits.graph.ir import Node

    from ..writer import Writer

REDUCTIONS = {"mean": "MEAN", "sum": "SUM", "max": "REDUCE_MAX", "min": "REDUCE_MIN", "prod": "REDUCE_PROD"}


@handles(*REDUCTIONS)
def reduction(w: Writer, node: Node) -> None:
    x, axes, keep = w.value(node.inputs[0]), w.constant(node.attrs["axes"], name="axes"), node.attrs["keepdims"]
    scale = mean_scale(node)
    if scale == 1:
        w.emit(REDUCTIONS[node.op], [x, axes], [w.value(node.output)], "Reducer", keepDims=keep)
        return
    x = w.step("MUL", [x, w.constant(scale, np.float32, "scale")], given(node).shape, "scaled", "Mul")
    y = w.step("MEAN", [x, axes], node.output.shape, "mean", "Reducer", keepDims=keep)
    w.emit("MUL", [y, w.constant(1 / scale, np.float32, "scale")], [w.value(node.output)], "Mul")


@handles("argmax")
def argmax(w: Writer, node: Node) -> None:
    inputs = [w.value(node.inputs[0]), w.constant(node.attrs["axis"], name="axis")]
    w.emit("ARG_MAX", inputs, [w.value(node.output)], "ArgMax", outputType=w.S.TensorType.INT32)


@handles("top_k")
def top_k(w: Writer, node: Node) -> None:
    inputs = [w.value(node.inputs[0]), w.constant(node.attrs["k"], name="k")]
    w.emit("TOPK_V2", inputs, [w.value(v) for v in node.outputs], "TopKV2")


@handles("max_pool2d")
def max_pool2d(w: Writer, node: Node) -> None:
    """Padded in another way than "same", the image gets copies of its border, which are in every window that reads
    the padding anyway: XNNPACK pads with zeros only, and a lowest number would make a quantized file's range."""
    x, shape, padding = w.value(node.inputs[0]), list(given(node).shape), _padding(w, node)
    if padding is None:
        for axis, pads in enumerate(node.attrs["pads"], 1):
            x = bordered(w, x, shape, axis, pads, node.output.dtype)
        padding = w.S.Padding.VALID
    _pool(w, node, "MAX_POOL_2D", x, w.value(node.output), padding)


@handles("avg_pool2d")
def avg_pool2d(w: Writer, node: Node) -> None:
    padding = _padding(w, node)
    if padding is None:
        w.unsupported(node, "an average over a window that is padded in its own way")
    x, scale = w.value(node.inputs[0]), mean_scale(node)
    if scale == 1:
        _pool(w, node, "AVERAGE_POOL_2D", x, w.value(node.output), padding)
        return
    x = w.step("MUL", [x, w.constant(scale, np.float32, "scale")], given(node).shape, "scaled", "Mul")
    y = w.tensor(node.output.shape, f"{w.layer}/average".lstrip("/"))
    _pool(w, node, "AVERAGE_POOL_2D", x, y, padding)
    w.emit("MUL", [y, w.constant(1 / scale, np.float32, "scale")], [w.value(node.output)], "Mul")


def _padding(w: Writer, node: Node) -> int | None:
    """TFLite's mode for a pooling's pads; `None` where it has none."""
    a, source = node.attrs, given(node)
    if not any(map(any, a["pads"])):
        return w.S.Padding.VALID
    same = same_padding(source.shape[1:3], a["size"], a["strides"], (1, 1))
    return w.S.Padding.SAME if a["pads"] == same else None


def _pool(w: Writer, node: Node, code: str, x: int, y: int, padding: int) -> None:
    (height, width), (down, right) = node.attrs["size"], node.attrs["strides"]
    window = dict(filterHeight=height, filterWidth=width, strideH=down, strideW=right)
    w.emit(code, [x], [y], "Pool2D", padding=padding, **window)
