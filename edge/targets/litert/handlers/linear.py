"""Products: dense layers, convolutions, products of matrices."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_vits.graph.ir import Node, constant, make_node

from .. import xnnpack
from ._registry import data, given, handles
from .arrange import space_to_depth

if typing.TYPE_CHECKING:
    from ..writer import Writer


@handles("matmul")
def matmul(w: Writer, node: Node) -> None:
    adjoint = dict(adjX=node.attrs.get("transpose_a", False), adjY=node.attrs.get("transpose_b", False))
    w.emit_node(node, "BATCH_MATMUL", "BatchMatMul", **adjoint)


@handles("dense")
def dense(w: Writer, node: Node) -> None:
    x, weight, bias = node.inputs
    out, activation = w.activation(node)
    inputs = [w.value(x), w.value(weight), w.value(bias)]
    w.emit("FULLY_CONNECTED", inputs, [out], "FullyConnected", keepNumDims=True, fusedActivationFunction=activation)


@handles("conv2d")
def conv2d(w: Writer, node: Node) -> None:
    """A convolution that cuts an image into patches is space-to-depth and one product of matrices."""
    image, kernel, bias = given(node), given(node, 1), node.inputs[2]
    height, width, channels, filters = kernel.shape
    cuts = dict(strides=(height, width), pads=((0, 0), (0, 0)), dilation=(1, 1), groups=1)
    if (
        node.attrs == cuts
        and channels <= xnnpack.FEW_CHANNELS
        and height == width > 1
        and not any(n % height for n in image.shape[1:3])
    ):
        patches = make_node("space_to_depth", (image,), dict(block=height), node.layer)
        space_to_depth(w, patches)
        kernel = constant(data(kernel).reshape(1, 1, -1, filters), kernel.name)
        attrs = {**cuts, "strides": (1, 1)}
        node = Node(node.op, (patches.output, kernel, bias), node.outputs, attrs, node.layer)
    _convolution(w, node, "CONV_2D", "Conv2D", lambda k: k.transpose(3, 0, 1, 2))


@handles("depthwise_conv2d")
def depthwise_conv2d(w: Writer, node: Node) -> None:
    layout = lambda k: k.reshape(1, *k.shape[:2], -1)
    multiplier = given(node, 1).shape[3]
    _convolution(w, node, "DEPTHWISE_CONV_2D", "DepthwiseConv2D", layout, depthMultiplier=multiplier)


def _convolution(
    w: Writer, node: Node, code: str, options: str, layout: Callable[[np.ndarray], np.ndarray], **fields: Any
) -> None:
    value, kernel, bias, a = given(node), given(node, 1), node.inputs[2], node.attrs
    x, padding = w.padded(w.value(value), value.shape, a["pads"], a, kernel.shape[:2])
    out, activation = w.activation(node)
    shift = w.value(bias) if bias is not None else w.constant(np.zeros(node.output.shape[-1]), np.float32, "bias")
    weight = w.weight(kernel, layout(data(kernel)), code)
    (down, right), (high, wide) = a["strides"], a["dilation"]
    strides = dict(strideH=down, strideW=right, dilationHFactor=high, dilationWFactor=wide)
    w.emit(
        code,
        [x, weight, shift],
        [out],
        options,
        padding=padding,
        fusedActivationFunction=activation,
        **strides,
        **fields,
    )
