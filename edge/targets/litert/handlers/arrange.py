"""Operations that move numbers: shapes, slices, paddings, resizing."""

from __future__ import annotations

import typing

import numpy as np

from ._registry import handles

if typing.TYPE_CHECKING:
    from keras_vits.graph.ir import Node

    from ..writer import Writer

BY_CONSTANT = {  # operation -> TFLite's operator, its options, and the attribute that is its second input
    "transpose": ("TRANSPOSE", "Transpose", "perm"),
    "tile": ("TILE", "Tile", "reps"),
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
    w.emit_node(node, "CONCATENATION", "Concatenation", axis=node.attrs["axis"])


@handles("slice")
def slice_(w: Writer, node: Node) -> None:
    a, x, out = node.attrs, w.value(node.inputs[0]), [w.value(node.output)]
    if all(s == 1 for s in a["strides"]):
        inputs = [x, w.constant(a["begin"], name="begin"), w.constant(node.output.shape, name="size")]
        w.emit("SLICE", inputs, out, "Slice")
    else:
        inputs = [x, *(w.constant(a[k], name=k) for k in ("begin", "end", "strides"))]
        w.emit("STRIDED_SLICE", inputs, out, "StridedSlice")


@handles("pad")
def pad(w: Writer, node: Node) -> None:
    a, x, out = node.attrs, w.value(node.inputs[0]), [w.value(node.output)]
    pads = w.constant(a["pads"], name="pads")
    if a["mode"] == "constant" and a["value"] == 0:
        w.emit("PAD", [x, pads], out, "Pad")
    elif a["mode"] == "constant":
        w.emit("PADV2", [x, pads, w.constant(a["value"], np.float32)], out, "PadV2")
    elif a["mode"] == "reflect":
        w.emit("MIRROR_PAD", [x, pads], out, "MirrorPad", mode=w.S.MirrorPadMode.REFLECT)
    else:
        w.unsupported(node, "it cannot pad with the edge's value")


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
    bilinear = node.attrs["mode"] == "bilinear"
    code = "RESIZE_BILINEAR" if bilinear else "RESIZE_NEAREST_NEIGHBOR"
    options = "ResizeBilinear" if bilinear else "ResizeNearestNeighbor"
    inputs = [w.value(node.inputs[0]), w.constant(node.attrs["size"], name="size")]
    w.emit(code, inputs, [w.value(node.output)], options, halfPixelCenters=True, alignCorners=False)
