"""Rules for any operation: constants, equal nodes, what changes nothing, and one spelling of arithmetic."""

import numpy as np

from keras_vits.graph.ir import Node, Value, constant
from keras_vits.graph.ops import definition

from ._sweep import Sweep, is_constant


def fold_constants(sweep: Sweep, node: Node) -> Value | None:
    entry = definition(node.op)
    constants = node.inputs and all(v is None or is_constant(v) for v in node.inputs)
    if constants and entry.evaluate and len(node.outputs) == 1:
        data = entry(*(None if v is None else v.data for v in node.inputs), **node.attrs)
        return constant(data, node.output.name)


def share_equal(sweep: Sweep, node: Node) -> Value | None:
    """Two nodes with the same inputs and attributes are one."""
    key = (node.op, tuple(map(id, node.inputs)), repr(node.attrs))
    if key in sweep.seen and len(node.outputs) == 1:
        return sweep.seen[key]
    sweep.seen[key] = node.output


def drop_identity(sweep: Sweep, node: Node) -> Value | None:
    x, shape = node.inputs[0], node.output.shape
    if x is None or x.shape != shape or x.dtype != node.output.dtype:
        return None
    if definition(node.op).keeps_same:
        return x
    if node.op == "transpose" and node.attrs["perm"] == tuple(range(len(shape))):
        return x
    if node.op in ("add", "mul") and is_constant(node.inputs[1]) and np.all(node.inputs[1].data == (node.op == "mul")):
        return x


def constant_second(sweep: Sweep, node: Node) -> Value | None:
    """add and mul: the constant operand goes second."""
    a, b = node.inputs
    if is_constant(a) and not is_constant(b):
        return sweep.new(node.op, b, a, name=node.output.name)


def subtract_constant(sweep: Sweep, node: Node) -> Value | None:
    x, c = node.inputs
    if is_constant(c) and c.dtype == "float32":
        return sweep.new("add", x, constant(-c.data, c.name))


def divide_by_constant(sweep: Sweep, node: Node) -> Value | None:
    x, c = node.inputs
    if is_constant(c) and c.dtype == "float32":
        return sweep.new("mul", x, constant(1 / c.data, c.name))


def negate(sweep: Sweep, node: Node) -> Value | None:
    if node.output.dtype == "float32":
        return sweep.new("mul", node.inputs[0], constant(-1.0, f"{node.output.name}/minus_one"))


POWERS = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt"}


def name_power(sweep: Sweep, node: Node) -> Value | None:
    """x to the power of 2, 0.5, -0.5, 1 and -1 -> the operation that has a name."""
    x, exponent = node.inputs
    if x.dtype != "float32" or not is_constant(exponent) or exponent.data.size != 1 or x.shape != node.output.shape:
        return None
    power = float(exponent.data.reshape(-1)[0])
    if power == 1:
        return x
    if power == -1:
        return sweep.new("div", constant(1.0, f"{node.output.name}/one"), x, name=node.output.name)
    return sweep.new(POWERS[power], x, name=node.output.name) if power in POWERS else None
