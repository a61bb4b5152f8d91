"""The table of handlers, and how a function gets into it."""

from __future__ import annotations

import typing
from collections.abc import Callable

import numpy as np

if typing.TYPE_CHECKING:
    from keras_vits.graph.ir import Node, Value

    from ..writer import Writer

Handler = Callable[["Writer", "Node"], None]

HANDLERS: dict[str, Handler] = {}  # operation -> what writes it


def handles(*operations: str) -> Callable[[Handler], Handler]:
    """Registers a function that writes nodes of these operations."""

    def register(function: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(operations, function))
        return function

    return register


def given(node: Node, i: int = 0) -> Value:
    """The i-th input of a node, one that is never absent."""
    value = node.inputs[i]
    if value is None:
        raise RuntimeError(f"{node.op} in layer {node.layer!r} lacks input {i}.")
    return value


def data(value: Value) -> np.ndarray:
    """The array of a weight."""
    if value.data is None:
        raise RuntimeError(f"{value.name!r} is computed, and a weight is a constant.")
    return value.data
