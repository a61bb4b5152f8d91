"""The order of axes of what a writer has written, for formats whose convolutions are channels first.

A Graph is channels last. So a Value is written in whichever order of axes its operation produces, its other forms are
made when an operation asks for one, and an operation that does not care takes the form at hand: a `transpose` of the
Graph writes nothing, and few transposes are left in the file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits.graph.ir import Value

Order = tuple[int, ...]  # form `order` of a Value holds the Value's axis order[i] as its axis i
Variable = Any  # what a format names or holds a tensor by

CHANNELS_FIRST: Order = (0, 3, 1, 2)


def identity(rank: int) -> Order:
    """The order of a Graph's own axes."""
    return tuple(range(rank))


def turned(rank: int) -> Order:
    """The order of axes of matrices that are held transposed."""
    *outer, m, n = identity(rank)
    return (*outer, n, m)


class UnsupportedError(Exception):
    """What of an operation a format lacks; the writer says it with the operation, its layer and the format."""


class Forms:
    """Keeps each Value's forms: order of axes -> variable of the file. A writer derives from it."""

    def __init__(self) -> None:
        self.forms: dict[Value, dict[Order, Variable]] = {}
        self.reshaped: dict[Value, Value] = {}  # Value -> what it is a reshape of, when none of its forms is made yet

    # ---- what a format does in its own way

    def emit_reshape(self, variable: Variable, shape: Sequence[int]) -> Variable:
        """A variable of this shape, with the same elements in the same order."""
        raise NotImplementedError

    def emit_transpose(self, variable: Variable, perm: Sequence[int]) -> Variable:
        """A variable whose axis `i` is axis `perm[i]` of the given one."""
        raise NotImplementedError

    def literal(self, value: Value, array: np.ndarray) -> Variable:
        """What the format takes as the operand for a constant Value, rearranged to this array."""
        return array

    # ---- forms

    def keep(self, values: Sequence[Value], results: Any) -> None:
        """Keeps what a handler gave for a node's outputs: for one, or a list, of them, a variable in the Graph's order
        or (variable, order); (None, None) for a reshape that waits to be told its order."""
        for value, result in zip(values, results if isinstance(results, list) else [results], strict=True):
            variable, order = result if isinstance(result, tuple) else (result, identity(len(value.shape)))
            self.forms[value] = {} if order is None else {order: variable}

    def held(self, value: Value) -> Mapping[Order, Variable]:
        """The forms of a Value that exist; of a constant, the one of the Graph."""
        if value.data is not None:
            return {identity(len(value.shape)): self.literal(value, value.data)}
        return self.forms[value]

    def at_hand(self, value: Value) -> tuple[Variable, Order]:
        """(variable, order): the form that was made first."""
        if not self.held(value):
            self.form(value)
        order, variable = next(iter(self.held(value).items()))
        return variable, order

    def form(self, value: Value, order: Order | None = None) -> Variable:
        """The Value with its axes in this order, the Graph's own by default."""
        order = order or identity(len(value.shape))
        shape = [value.shape[axis] for axis in order]
        if value.data is not None:
            return self.literal(value, np.ascontiguousarray(value.data.transpose(order)).reshape(shape))
        forms = self.forms[value]
        if order in forms:
            return forms[order]
        if not forms:  # a reshape that waited to be told its order of axes
            source = self.reshaped[value]
            if before := regroup(value.shape, source.shape, order):
                forms[order] = self.emit_reshape(self.form(source, before), shape)
                return forms[order]
            forms[identity(len(value.shape))] = self.emit_reshape(self.form(source), list(value.shape))
            if order in forms:
                return forms[order]
        same = next((o for o in forms if same_memory(o, order, value.shape)), None)
        if same:
            forms[order] = self.emit_reshape(forms[same], shape)
        else:
            variable, known = self.at_hand(value)
            forms[order] = self.emit_transpose(variable, [known.index(axis) for axis in order])
        return forms[order]

    def common_order(self, values: Sequence[Value], rank: int) -> Order:
        """The order in which the fewest elements of these Values must be moved; of equals, that of the newest Value."""
        values = [v for v in reversed(self.forms) if v in values and len(v.shape) == rank]
        orders = [order for v in values for order in self.forms[v]] or [identity(rank)]
        return min(orders, key=lambda order: sum(math.prod(v.shape) for v in values if order not in self.forms[v]))

    def broadcast(self, values: Sequence[Value], rank: int) -> tuple[list[Variable], Order]:
        """Operands for numpy's broadcasting to `rank` axes, and the order of axes they are in."""
        order = self.common_order(values, rank)
        operands: list[Variable] = []
        for v in values:
            shape = (1,) * (rank - len(v.shape)) + v.shape
            if v.data is not None:
                number = v.data.size == 1 and any(len(other.shape) == rank for other in values if other is not v)
                array = v.data.reshape(()) if number else np.ascontiguousarray(v.data.reshape(shape).transpose(order))
                operands.append(self.literal(v, array))
            elif len(v.shape) == rank:
                operands.append(self.form(v, order))
            elif order != identity(rank) and sum(n > 1 for n in shape) > 1:
                operands.append(self.emit_transpose(self.emit_reshape(self.form(v), list(shape)), list(order)))
            else:
                operands.append(self.emit_reshape(self.form(v), [shape[axis] for axis in order]))
        return operands, order


def same_memory(a: Order, b: Order, shape: Sequence[int]) -> bool:
    """Whether two orders differ only in where axes of size 1 stand."""
    long = lambda order: [axis for axis in order if shape[axis] != 1]
    return long(a) == long(b)


def regroup(old: Sequence[int], new: Sequence[int], order: Order) -> Order | None:
    """The order of axes that a form of a tensor of shape `old` has once the tensor is reshaped to `new`, or None if it
    cannot be reshaped in that form: axes that merge or split must be neighbours in it."""
    groups: list[tuple[range, range]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        a, b = i + 1, j + 1
        while math.prod(old[i:a]) != math.prod(new[j:b]):
            if math.prod(old[i:a]) < math.prod(new[j:b]):
                a += 1
            else:
                b += 1
        groups.append((range(i, a), range(j, b)))
        i, j = a, b
    if not groups:
        return None
    merged, made = groups[-1]  # with the axes of size 1 that are left over
    groups[-1] = (range(merged.start, len(old)), range(made.start, len(new)))
    sequence = [axis for axis in order if old[axis] != 1]
    placed = []
    for merged, made in groups:
        long = [axis for axis in merged if old[axis] != 1]
        at = [sequence.index(axis) for axis in long]
        if at != list(range(at[0], at[0] + len(at)) if at else []):
            return None
        placed.append((order.index(long[0] if long else merged[0]), made))
    return tuple(itertools.chain.from_iterable(made for _, made in sorted(placed, key=lambda p: p[0])))
