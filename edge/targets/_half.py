"""What a writer does so that a phone, which computes in half precision, gets the numbers of float32."""

from __future__ import annotations

import math

from keras_vits.graph.ir import Node

MANY = 16  # entries, from which on the sum within a mean is kept small


def mean_scale(node: Node) -> float:
    """What a mean's or an average pooling's entries are multiplied by before, and its result divided by behind.

    A mean of n entries adds them first, and their sum passes 65504 long before they do. A power of two, so that nothing
    is rounded: about 1 / sqrt(n), so that neither the sum overflows nor small entries vanish. 1 for few entries, and
    for an operation that is no mean.
    """
    source = node.inputs[0]
    assert source is not None
    if node.op == "mean":
        count = math.prod(source.shape[axis] for axis in node.attrs["axes"])
    elif node.op == "avg_pool2d":
        count = math.prod(node.attrs["size"])
    else:
        return 1.0
    return 1.0 if count < MANY else 2.0 ** -round(math.log2(count) / 2)
