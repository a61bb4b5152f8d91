"""One pass of rules over a graph, and what rules ask of Values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits.graph.ir import Graph, Node, Value, make_node
from keras_vits.graph.ops import definition, having

LINEAR = having("is_linear")  # (x, weight, bias): a bias or a scale of the output folds into these


class Sweep:
    """One pass over a graph. Rules read `made_by` and `single_use` and create nodes with `new`.

    Args:
        graph: changed in place.
        everywhere: rules for every node.
        rules: operation -> rules for its nodes.
    """

    def __init__(self, graph: Graph, everywhere: Sequence["Rule"], rules: Mapping[str, Sequence["Rule"]]) -> None:
        self.graph, self.everywhere, self.rules = graph, everywhere, rules
        self.uses = graph.consumers()
        self.made: dict[Value, Node] = {}  # of this sweep
        self.nodes: list[Node] = []
        self.seen: dict[Any, Value] = {}  # what a node computes, in words -> its output
        self.layer = ""  # of the node at hand: the address that new nodes get

    def run(self) -> bool:
        """Whether a rule changed anything."""
        instead, changed = {}, False
        for node in self.graph.nodes:
            inputs = tuple(instead.get(v, v) for v in node.inputs)
            if inputs != node.inputs:
                node = Node(node.op, inputs, node.outputs, node.attrs, node.layer)
            self.layer = node.layer
            for rule in (*self.everywhere, *self.rules.get(node.op, ())):
                result = rule(self, node)
                if result is not None:
                    instead[node.output] = instead.get(result, result)  # an equal node's may be replaced itself
                    changed = True
                    break
            else:
                self.append(node)
        self.graph.outputs = [instead.get(v, v) for v in self.graph.outputs]
        live, kept = set(self.graph.outputs), []
        for node in reversed(self.nodes):
            if live.intersection(node.outputs):
                kept.append(node)
                live.update(v for v in node.inputs if v is not None)
        self.graph.nodes = kept[::-1]
        return changed

    def append(self, node: Node) -> Node:
        self.nodes.append(node)
        for value in node.outputs:
            self.made[value] = node
        return node

    def new(self, op: str, *inputs: Value | None, name: str | None = None, **attrs: Any) -> Value:
        """Appends a node in the present layer, and returns its output."""
        value = self.append(make_node(op, inputs, attrs, self.layer)).output
        value.name = name or value.name
        return value

    def made_by(self, value: Value | None, *ops: str) -> Node | None:
        """The node of one of these ops that computes the value, or None."""
        node = self.made.get(value)
        return node if node is not None and node.op in ops else None

    def single_use(self, value: Value) -> bool:
        """Whether nothing but the node at hand reads the value (a value made in this sweep: not known, so no)."""
        return len(self.uses.get(value, ())) == 1 and value not in self.graph.outputs

    def read_by_linear(self, value: Value, *ops: str) -> bool:
        """Whether dense layers and convolutions (or the ops given) alone read the value: each can take it in."""
        readers = self.uses.get(value, ())
        return (
            bool(readers)
            and value not in self.graph.outputs
            and all(r.op in ops if ops else definition(r.op).is_linear for r in readers)
        )


Rule = Callable[[Sweep, Node], Value | None]  # -> the Value to use instead of the node's output, or None


def is_constant(value: Value | None) -> bool:
    """Whether it is a Value whose data are known."""
    return value is not None and value.data is not None


def last_axis(value: Value) -> np.ndarray | None:
    """A constant's data as one number, or one for each entry of the last axis; None if it varies along another."""
    if value.data is None or value.dtype != "float32" or value.data.size != (value.shape[-1] if value.shape else 1):
        return None
    return value.data.reshape(-1)
