"""How much a model computes."""

import keras

from keras_vits.graph.ir import Node
from keras_vits.graph.ops import definition
from keras_vits.graph.trace import trace


def count_macs(model: keras.Model) -> int:
    """Multiply-adds of one image's forward pass, as fvcore and timm count them.

    Counted are convolutions, dense layers, attention's two matrix products and every other matrix product; elementwise
    work, normalisation and pooling are not. The weights' values are not read, nor need they exist.

    Args:
        model: a built `keras.Model` made by the functional API, of a fixed image size; every `VisionModel` is.

    Returns:
        The number, an integer; divided by 1e9 it is a paper's "GMACs", or "GFLOPs" in many.

    Raises:
        ValueError: the model has no functional inputs, an axis of unknown size, or an operation that
            the tracer does not know (named with its layer).
    """
    return sum(map(_macs, trace(model, weightless=True).nodes))


def _macs(node: Node) -> int:
    """Multiply-adds of one node; 0 of what is not counted."""
    count = definition(node.op).macs
    shapes = [None if value is None else value.shape for value in node.inputs]
    return 0 if count is None else count(shapes, node.output.shape, node.attrs)
