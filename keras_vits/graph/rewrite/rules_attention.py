"""Rules for products of matrices and the softmax between them."""

import numpy as np

from keras_vits.graph.ir import Node, Value
from keras_vits.graph.ops import definition

from ._sweep import Sweep


def read_transposed(sweep: Sweep, node: Node) -> Value | None:
    """matmul(transpose(a), b) -> matmul of a, read the other way, when products alone read what is transposed."""
    operands, flags = list(node.inputs), {}
    for i, flag in enumerate(("transpose_a", "transpose_b")):
        before, rank = sweep.made_by(operands[i], "transpose"), len(operands[i].shape)
        if before and before.attrs["perm"] == (*range(rank - 2), rank - 1, rank - 2):
            if sweep.read_by_linear(operands[i], "matmul"):
                operands[i], flags[flag] = before.inputs[0], not node.attrs.get(flag, False)
    if flags:
        return sweep.new("matmul", *operands, name=node.output.name, **{**node.attrs, **flags})


def drop_key_bias(sweep: Sweep, node: Node) -> Value | None:
    """softmax(q (k + b)') -> softmax(q k'): a bias of the keys adds the same number to all scores of a query."""
    scores = sweep.made_by(node.inputs[0], "matmul")
    last = len(node.output.shape) - 1
    if scores is None or node.attrs["axis"] != last or not sweep.single_use(scores.output):
        return None
    value, steps = scores.inputs[1], []
    while (step := sweep.made_by(value, "reshape", "transpose")) and sweep.single_use(value):
        steps.append(step)
        value = step.inputs[0]
    linear = sweep.made_by(value, "dense")
    if linear is None or linear.inputs[2] is None or not sweep.single_use(value):
        return None
    channels = np.broadcast_to(np.arange(value.shape[-1]), value.shape)
    for step in reversed(steps):
        channels = definition(step.op)(channels, **step.attrs)
    if np.ptp(channels, axis=last - 1 if scores.attrs.get("transpose_b") else last).any():  # not one key, one row
        return None
    sweep.layer = linear.layer
    value = sweep.new("dense", *linear.inputs[:2], None, name=linear.output.name)
    for step in (*reversed(steps), scores, node):
        sweep.layer = step.layer
        inputs = (scores.inputs[0], value) if step is scores else (value,)
        value = sweep.new(step.op, *inputs, name=step.output.name, **step.attrs)
    return value
