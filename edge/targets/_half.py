"""What a writer does so that a phone, which computes in half precision, gets the numbers of float32."""

from __future__ import annotations

import math

from keras_vits.graph.ir import Node
from keras_vits.graph.ops import definition
from keras_vits.graph.rewrite.rules_half import added, sum_scale

HALF_MAX = 65504.0


def mean_scale(node: Node) -> float:
    """What a mean's or an average pooling's entries are multiplied by before, and its result divided by behind.

    A mean of n entries adds them first, and their sum passes 65504 long before they do; see `sum_scale`. 1 for an
    operation that is no mean.
    """
    if node.op == "mean":
        return sum_scale(added(node))
    if node.op == "avg_pool2d":
        return sum_scale(math.prod(node.attrs["size"]))
    return 1.0


def risk(node: Node) -> str:
    """How a node's numbers may leave the range of half precision; "": they do not. A product of a value with itself is
    a square."""
    itself = node.op == "mul" and node.inputs[0] is node.inputs[1]
    return definition("square" if itself else node.op).half_risk
