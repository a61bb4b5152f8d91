"""Reductions: sums, extremes, the largest's place, pooling."""

from __future__ import annotations

import typing

import numpy as np

from keras_vits.graph.ops import same_padding

from ._registry import given, handles

if typing.TYPE_CHECKING:
    from keras_vits.graph.ir import Node

    from ..writer import Writer

REDUCTIONS = {"mean": "MEAN", "sum": "SUM", "max": "REDUCE_MAX", "min": "REDUCE_MIN", "prod": "REDUCE_PROD"}


@handles(*REDUCTIONS)
def reduction(w: Writer, node: Node) -> None:
    inputs = [w.value(node.inputs[0]), w.constant(node.attrs["axes"], name="axes")]
    w.emit(REDUCTIONS[node.op], inputs, [w.value(node.output)], "Reducer", keepDims=node.attrs["keepdims"])


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
    """Padded in another way than "same", the image gets a frame that no maximum is in."""
    a, source = node.attrs, given(node)
    x, padding = w.value(source), _padding(w, node)
    if padding is None:
        frame = [(0, 0), *a["pads"], (0, 0)]
        wide = [n + sum(pads) for n, pads in zip(source.shape, frame, strict=True)]
        inputs = [x, w.constant(frame), w.constant(np.finfo(np.float32).min, np.float32)]
        x, padding = w.step("PADV2", inputs, wide, "pad", "PadV2"), w.S.Padding.VALID
    _pool(w, node, "MAX_POOL_2D", x, padding)


@handles("avg_pool2d")
def avg_pool2d(w: Writer, node: Node) -> None:
    padding = _padding(w, node)
    if padding is None:
        w.unsupported(node, "an average over a window that is padded in its own way")
    _pool(w, node, "AVERAGE_POOL_2D", w.value(node.inputs[0]), padding)


def _padding(w: Writer, node: Node) -> int | None:
    """TFLite's mode for a pooling's pads; `None` where it has none."""
    a, source = node.attrs, given(node)
    if not any(map(any, a["pads"])):
        return w.S.Padding.VALID
    same = same_padding(source.shape[1:3], a["size"], a["strides"], (1, 1))
    return w.S.Padding.SAME if a["pads"] == same else None


def _pool(w: Writer, node: Node, code: str, x: int, padding: int) -> None:
    (height, width), (down, right) = node.attrs["size"], node.attrs["strides"]
    window = dict(filterHeight=height, filterWidth=width, strideH=down, strideW=right)
    w.emit(code, [x], [w.value(node.output)], "Pool2D", padding=padding, **window)
