"""Whole numbers and booleans in the types that a format's runtime computes: exact casts, or other operations.

A Graph has Keras' types. A runtime has kernels for some of them only, and others refuse the file or end the process. So
each target lists, by operation, the types that were tried (a test tries them again), and `lowered` computes the others
by what is in that list, exactly, or says that nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits.graph.ir import Node, Value, constant, make_node
from keras_vits.graph.ops import DTYPES, definition

from ._forms import UnsupportedError

Takes = Mapping[str, Sequence[str]]  # operation -> types of what it computes with; FLOAT where nothing is said
FLOAT = ("float32",)
WIDER = {"bool": ("int32", "float32"), "uint8": ("int32", "float32")}  # types that hold all numbers of a type


def lowered(node: Node, takes: Takes) -> list[Node]:
    """The nodes that compute what a node does, with the same outputs, of types that a runtime takes.

    Args:
        node: of a Graph.
        takes: the types that the runtime has kernels for.

    Raises:
        UnsupportedError: there are none that compute it exactly.
    """
    dtype = computed_in(node)
    taken = takes.get(node.op, FLOAT)
    if dtype is None or dtype in taken:
        return [node]
    if dtype == "int32" and (steps := _INSTEAD.get(node.op)):
        made = steps(node)
        if made is not None:
            return [part for step in made for part in lowered(step, takes)]
    for wider in WIDER.get(dtype, ()):
        op = definition(node.op)
        if wider == "float32" and not (op.arrangement or op.chooses or _is_compared(node)):
            continue
        if {dtype, wider} <= set(takes["cast"]) and (wider in taken or (wider == "int32" and node.op in _INSTEAD)):
            try:
                return _within(node, wider, takes)
            except UnsupportedError:
                continue
    raise UnsupportedError(
        f"its runtime computes it of {' and '.join(taken)}, not of {dtype}; cast its inputs to float32"
    )


def computed_in(node: Node) -> str | None:
    """The type of what a node computes with: of the two values that a `where` chooses from, of what `gather` reads."""
    values = node.inputs[1:] if node.op == "where" else node.inputs[:1] if node.op == "gather" else node.inputs
    return next((value.dtype for value in values if value is not None), None)


def _is_compared(node: Node) -> bool:
    return definition(node.op).elementwise and node.output.dtype == "bool"


def _within(node: Node, dtype: str, takes: Takes) -> list[Node]:
    """A node between casts of its inputs to a wider type and of its outputs from it."""
    casts: list[Node] = []

    def cast(value: Value | None, i: int) -> Value | None:
        if value is None or (node.op == "where" and i == 0) or (node.op == "gather" and i == 1):
            return value
        if value.data is not None:
            return constant(value.data.astype(DTYPES[dtype]), value.name)
        casts.append(make_node("cast", (value,), {"dtype": dtype}, node.layer))
        return casts[-1].output

    inner = make_node(node.op, [cast(value, i) for i, value in enumerate(node.inputs)], node.attrs, node.layer)
    back: list[Node] = []
    outputs = list(inner.outputs)
    for i, (made, wanted) in enumerate(zip(inner.outputs, node.outputs, strict=True)):
        if made.dtype == wanted.dtype:
            outputs[i] = wanted
        else:
            back.append(Node("cast", (made,), (wanted,), {"dtype": wanted.dtype}, node.layer))
    inner = Node(node.op, inner.inputs, tuple(outputs), node.attrs, node.layer)
    return [*casts, *lowered(inner, takes), *back]


# ---------------------------------------------------------------- whole numbers by other operations


class _Steps:
    """Nodes in a row; the last one gives the outputs of the node that they are in place of."""

    def __init__(self, node: Node) -> None:
        self.node, self.made = node, []

    def __call__(self, op: str, *inputs: Value | int | None, **attrs: Any) -> Value:
        values = [constant(np.int32(x), "number") if isinstance(x, int) else x for x in inputs]
        self.made.append(make_node(op, values, attrs, self.node.layer))
        return self.made[-1].output

    def done(self) -> list[Node]:
        last = self.made[-1]
        return [*self.made[:-1], Node(last.op, last.inputs, self.node.outputs, last.attrs, last.layer)]


def _square(node: Node) -> list[Node]:
    steps = _Steps(node)
    steps("mul", node.inputs[0], node.inputs[0])
    return steps.done()


def _relu(node: Node) -> list[Node]:
    steps = _Steps(node)
    steps("maximum", node.inputs[0], 0)
    return steps.done()


def _between(low: int | None = None, high: int | None = None) -> Callable[[Node], list[Node]]:
    def between(node: Node) -> list[Node]:
        steps = _Steps(node)
        bounds = (int(node.attrs["low"]), int(node.attrs["high"])) if low is None or high is None else (low, high)
        steps("minimum", steps("maximum", node.inputs[0], bounds[0]), bounds[1])
        return steps.done()

    return between


def _abs(node: Node) -> list[Node]:
    steps = _Steps(node)
    steps("maximum", node.inputs[0], steps("sub", 0, node.inputs[0]))
    return steps.done()


def _neg(node: Node) -> list[Node]:
    steps = _Steps(node)
    steps("sub", 0, node.inputs[0])
    return steps.done()


def _pow(node: Node) -> list[Node] | None:
    """Products, by one small exponent."""
    exponent = node.inputs[1]
    if exponent is None or exponent.data is None or exponent.data.size != 1 or not 1 <= int(exponent.data.item()) <= 8:
        return None
    steps = _Steps(node)
    y = node.inputs[0]
    for _ in range(int(exponent.data.item()) - 1):
        y = steps("mul", y, node.inputs[0])
    if not steps.made:
        steps("mul", y, 1)
    return steps.done() if steps.made[-1].output.shape == node.output.shape else None


_INSTEAD: dict[str, Callable[[Node], list[Node] | None]] = {
    "square": _square,
    "relu": _relu,
    "relu6": _between(0, 6),
    "clip": _between(),
    "sign": _between(-1, 1),
    "abs": _abs,
    "neg": _neg,
    "pow": _pow,
}
