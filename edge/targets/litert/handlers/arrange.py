"""Operations that move numbers: shapes, slices, paddings, resizing."""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence

import numpy as np

from keras_vits.graph.ops import DTYPES

from .. import xnnpack
from ._registry import given, handles

if typing.TYPE_CHECKING:
    from keras_vits.graph.ir import Node

    from ..writer import Writer

BY_CONSTANT = {  # operation -> TFLite's operator, its options, and the attribute that is its second input
    "transpose": ("TRANSPOSE", "Transpose", "perm"),
    "reverse": ("REVERSE_V2", "ReverseV2", "axes"),
}


@handles(*BY_CONSTANT)
def by_constant(w: Writer, node: Node) -> None:
    code, options, attr = BY_CONSTANT[node.op]
    inputs = [w.value(node.inputs[0]), w.constant(node.attrs[attr], name=attr)]
    w.emit(code, inputs, [w.value(node.output)], options)


@handles("reshape")
def reshape(w: Writer, node: Node) -> None:
    shape = node.attrs["shape"]
    inputs = [w.value(node.inputs[0]), w.constant(shape, name="shape")]
    w.emit("RESHAPE", inputs, [w.value(node.output)], "Reshape", newShape=list(shape))


@handles("concat")
def concat(w: Writer, node: Node) -> None:
    joined(w, [(w.value(v), v.shape) for v in node.inputs if v is not None], node.attrs["axis"], w.value(node.output))


def joined(w: Writer, parts: Sequence[tuple[int, Sequence[int]]], axis: int, out: int) -> None:
    """Tensors, with their shapes, joined to a given one, as few at a time as XNNPACK does."""
    dtype = {number: name for name, number in w.S.TensorType.__dict__.items()}[w.tensors[out].type].lower()
    while len(parts) > xnnpack.JOINED:
        groups = [parts[i : i + xnnpack.JOINED] for i in range(0, len(parts), xnnpack.JOINED)]
        parts = []
        for group in groups:
            x, shape = group[0]
            if len(group) > 1:
                shape = [sum(s[axis] for _, s in group) if i == axis else n for i, n in enumerate(shape)]
                x = w.tensor(shape, f"{w.layer}/joined".lstrip("/"), dtype)
                w.emit("CONCATENATION", [tensor for tensor, _ in group], [x], "Concatenation", axis=axis)
            parts.append((x, shape))
    w.emit("CONCATENATION", [tensor for tensor, _ in parts], [out], "Concatenation", axis=axis)


@handles("slice")
def slice_(w: Writer, node: Node) -> None:
    a, x, out = node.attrs, w.value(node.inputs[0]), [w.value(node.output)]
    if all(s == 1 for s in a["strides"]):
        inputs = [x, w.constant(a["begin"], name="begin"), w.constant(node.output.shape, name="size")]
        w.emit("SLICE", inputs, out, "Slice")
    elif len(a["strides"]) == 4 and a["strides"][0] == a["strides"][3] == 1 and node.output.dtype == "float32":
        _every_other(w, node)
    else:
        inputs = [x, *(w.constant(a[k], name=k) for k in ("begin", "end", "strides"))]
        w.emit("STRIDED_SLICE", inputs, out, "StridedSlice")


def _every_other(w: Writer, node: Node) -> None:
    """Of a map's rows and columns: XNNPACK has no strided slices, and a depthwise 1 x 1 of ones is one."""
    a, x, dtype = node.attrs, w.value(node.inputs[0]), node.output.dtype
    sizes = [end - begin for begin, end in zip(a["begin"], a["end"], strict=True)]
    if sizes != list(given(node).shape):
        x = w.step("SLICE", [x, w.constant(a["begin"]), w.constant(sizes)], sizes, "part", "Slice", dtype=dtype)
    channels, (_, down, right, _) = sizes[3], a["strides"]
    ones = w.constant(np.ones((1, 1, 1, channels)), np.float32, "ones")
    zeros = w.constant(np.zeros(channels), np.float32, "zeros")
    strides = dict(strideH=down, strideW=right, dilationHFactor=1, dilationWFactor=1)
    options = dict(padding=w.S.Padding.VALID, depthMultiplier=1, **strides)
    w.emit("DEPTHWISE_CONV_2D", [x, ones, zeros], [w.value(node.output)], "DepthwiseConv2D", **options)


@handles("pad")
def pad(w: Writer, node: Node) -> None:
    a, x, out = node.attrs, w.value(node.inputs[0]), [w.value(node.output)]
    pads = w.constant(a["pads"], name="pads")
    if a["mode"] == "constant" and a["value"] == 0:
        w.emit("PAD", [x, pads], out, "Pad")
    elif a["mode"] == "constant":
        w.emit("PADV2", [x, pads, w.constant(a["value"], DTYPES[node.output.dtype])], out, "PadV2")
    elif a["mode"] == "reflect":
        w.emit("MIRROR_PAD", [x, pads], out, "MirrorPad", mode=w.S.MirrorPadMode.REFLECT)
    else:
        shape, dtype = list(given(node).shape), node.output.dtype
        for axis, around in enumerate(a["pads"]):
            x = bordered(w, x, shape, axis, around, dtype)
        w.emit("RESHAPE", [x, w.constant(shape, name="shape")], out, "Reshape", newShape=shape)


def bordered(w: Writer, x: int, shape: list[int], axis: int, pads: Sequence[int], dtype: str) -> int:
    """The tensor with its first entry along an axis before it, and its last one behind it, as often as `pads` says;
    its shape is brought up to date."""
    border = [1 if i == axis else n for i, n in enumerate(shape)]

    def at(place: int) -> int:
        begin = [place if i == axis else 0 for i in range(len(shape))]
        return w.step("SLICE", [x, w.constant(begin), w.constant(border)], border, "border", "Slice", dtype=dtype)

    before, behind = (
        [(at(place), border)] * n if n else [] for place, n in zip((0, shape[axis] - 1), pads, strict=True)
    )
    if not (before or behind):
        return x
    parts = [*before, (x, tuple(shape)), *behind]
    shape[axis] += sum(pads)
    out = w.tensor(shape, f"{w.layer}/framed".lstrip("/"), dtype)
    joined(w, parts, axis, out)
    return out


@handles("gather")
def gather(w: Writer, node: Node) -> None:
    w.emit_node(node, "GATHER", "Gather", axis=node.attrs["axis"])


@handles("space_to_depth")
def space_to_depth(w: Writer, node: Node) -> None:
    w.emit_node(node, "SPACE_TO_DEPTH", "SpaceToDepth", blockSize=node.attrs["block"])


@handles("depth_to_space")
def depth_to_space(w: Writer, node: Node) -> None:
    w.emit_node(node, "DEPTH_TO_SPACE", "DepthToSpace", blockSize=node.attrs["block"])


@handles("resize")
def resize(w: Writer, node: Node) -> None:
    """Nearest upsampling by whole numbers is copies joined and reshaped: XNNPACK has no nearest resizing."""
    (_, h, w_, _), (high, wide) = given(node).shape, node.attrs["size"]
    if node.attrs["mode"] == "nearest" and not (high % h or wide % w_):
        _repeated(w, node, high // h, wide // w_)
        return
    bilinear = node.attrs["mode"] == "bilinear"
    code = "RESIZE_BILINEAR" if bilinear else "RESIZE_NEAREST_NEIGHBOR"
    options = "ResizeBilinear" if bilinear else "ResizeNearestNeighbor"
    inputs = [w.value(node.inputs[0]), w.constant(node.attrs["size"], name="size")]
    w.emit(code, inputs, [w.value(node.output)], options, halfPixelCenters=True, alignCorners=False)


def _repeated(w: Writer, node: Node, down: int, right: int) -> None:
    """Each row `down` times, and each column `right` times."""
    b, h, wide, c = given(node).shape
    dtype = node.output.dtype
    x = _copies(w, w.value(node.inputs[0]), (b * h, 1, wide * c), down, dtype)
    x = _copies(w, x, (b * h * down * wide, 1, c), right, dtype)
    shape = node.output.shape
    w.emit("RESHAPE", [x, w.constant(shape, name="shape")], [w.value(node.output)], "Reshape", newShape=list(shape))


def _copies(w: Writer, x: int, shape: tuple[int, int, int], count: int, dtype: str) -> int:
    """(n,1,m) -> (n,count,m)"""
    if count == 1:
        return x
    x = w.step("RESHAPE", [x, w.constant(shape)], shape, "rows", "Reshape", dtype=dtype, newShape=list(shape))
    out = w.tensor((shape[0], count, shape[2]), f"{w.layer}/copies".lstrip("/"), dtype)
    joined(w, [(x, shape)] * count, 1, out)
    return out


@handles("tile")
def tile(w: Writer, node: Node) -> None:
    """Copies joined, too."""
    shape, reps, dtype = list(given(node).shape), node.attrs["reps"], node.output.dtype
    x = w.value(node.inputs[0])
    for axis, count in enumerate(reps):
        x = _copies(w, x, (math.prod(shape[:axis]), 1, math.prod(shape[axis:])), count, dtype)
        shape[axis] *= count
    w.emit("RESHAPE", [x, w.constant(shape, name="shape")], [w.value(node.output)], "Reshape", newShape=shape)
