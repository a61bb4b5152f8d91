"""Graph -> Graph for Core ML: attention as one operation, tokens in the order of a feature map, and the layout of the
Neural Engine.

All make the `attention` nodes of `keras_vits.graph.rewrite.attention`.

Reference  https://machinelearning.apple.com/research/neural-engine-transformers: tensors of four axes with the channels
           second, convolutions in place of dense layers, heads one by one, few transposes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from keras_vits.graph.ir import Graph, Node, Value, constant
from keras_vits.graph.ops import definition
from keras_vits.graph.rewrite import rewrite
from keras_vits.graph.rewrite.attention import NodeList, fuse_attention, join_projections

# ---------------------------------------------------------------- attention


def _join_heads(graph: Graph) -> Graph:
    """Attention of (B,heads,N,d) becomes attention of (B,N,D) that knows its number of heads: D = heads * d."""
    nodes = NodeList()
    for node in graph.nodes:
        nodes.layer = node.layer
        if node.op == "attention" and len(node.output.shape) == 4:
            node = _joined(nodes, node)
        elif node.op == "attention":
            *qkv, bias = node.inputs
            if bias and len(bias.shape) == 3:  # (B,N,N): one head
                bias = constant(bias.data[:, None], bias.name)
            node = dataclasses.replace(node, inputs=(*qkv, bias), attrs=dict(heads=1))
        nodes.append(node)
    return rewrite(dataclasses.replace(graph, nodes=list(nodes)))


def _joined(nodes: NodeList, node: Node) -> Node:
    batch, heads, tokens, size = node.output.shape
    join = lambda x: nodes.reshape(
        nodes.new("transpose", x, perm=(0, 2, 1, 3)), (batch, x.shape[2], heads * x.shape[3])
    )
    inputs = [join(x) for x in node.inputs[:3]]
    y = Value(f"{node.output.name}/joined", (batch, tokens, heads * size))
    nodes.append(Node("attention", (*inputs, node.inputs[3]), (y,), dict(heads=heads), node.layer))
    y = nodes.reshape(y, (batch, tokens, heads, size))
    return Node("transpose", (y,), node.outputs, dict(perm=(0, 2, 1, 3)), node.layer)


# ---------------------------------------------------------------- four axes

SPREAD = dict(begin=0, end=1, strides=1, reps=1, pads=(0, 0))  # attributes with one entry for each axis


def default_layout(graph: Graph, fused: bool) -> Graph:
    """The Graph with attention as one node and little to transpose: tokens that are cut from a feature map and become
    one again have four axes (B,1,N,D), which the writer keeps in the order of the map, (B,D,1,N); of other tokens the
    heads of queries, keys and values are moved at once.

    Args:
        graph: a Graph from `rewrite`.
        fused: whether Core ML has attention as an operation, which divides by sqrt(d) and takes heads (B,heads,N,d) in
            this order of axes only.
    """
    graph = fuse_attention(graph, scaled=fused)
    if tokens := _tokens_of_maps(graph):
        graph = rewrite(_Lift(graph, tokens).run())
    return join_projections(graph, fused)


def _tokens_of_maps(graph: Graph) -> set[Value]:
    """Values (B,N,D) between one operation on feature maps and another."""
    after: set[Value | None] = set()
    before: set[Value | None] = set()
    for node in graph.nodes:
        if definition(node.op).on_maps or after.intersection(node.inputs):
            after.update(node.outputs)
    for node in reversed(graph.nodes):
        if definition(node.op).on_maps or before.intersection(node.outputs):
            before.update(node.inputs)
    return {value for value in after & before if value is not None and len(value.shape) == 3}


def neural_engine(graph: Graph) -> Graph:
    """The Graph with attention by heads, and every tensor (B,N,D) or (B,D) as (B,1,N,D), which the writer keeps in the
    order (B,D,1,N).

    Args:
        graph: a Graph from `rewrite`.
    """
    return rewrite(_Lift(_join_heads(fuse_attention(graph))).run())


def _wide(entries: Sequence[Any], fill: Any = 1) -> tuple[Any, ...]:
    """Entries of two or three axes as entries of four: the new axes stand after the first."""
    return (entries[0], *(fill,) * (4 - len(entries)), *entries[1:]) if len(entries) in (2, 3) else tuple(entries)


class _Lift:
    """Rebuilds a Graph with tensors of two and three axes as tensors of four: with all of them, or the given ones."""

    def __init__(self, graph: Graph, chosen: Collection[Value] | None = None) -> None:
        self.graph, self.chosen, self.nodes = graph, chosen, NodeList()
        self.values: dict[Value, Value] = {}  # Value of the given Graph -> its like of four axes
        self.narrowed: dict[Value, Value] = {}  # Value of the given Graph -> its like of its own axes
        self.new, self.reshape = self.nodes.new, self.nodes.reshape

    def run(self) -> Graph:
        for value in self.graph.inputs:
            self.values[value] = self.reshape(value, self.wide(value))
        for node in self.graph.nodes:
            self.nodes.layer = node.layer
            self.write(node)
        outputs = [self.narrow(value) for value in self.graph.outputs]
        return Graph(self.graph.inputs, outputs, list(self.nodes), self.graph.name)

    def wide(self, value: Value) -> tuple[int, ...]:
        """The shape that the Value gets."""
        return _wide(value.shape) if self.chosen is None or value in self.chosen else value.shape

    def four(self, *values: Value | None) -> bool:
        """Whether all of them get four axes, or are constants that can."""
        free = lambda v: v.data is not None or self.chosen is None or v in self.chosen
        return all(v is None or len(v.shape) == 4 or (len(v.shape) < 4 and free(v)) for v in values)

    def narrow(self, value: Value | None) -> Value | None:
        """The Value with the shape that it has in the given Graph."""
        if value is None or value.data is not None:
            return value
        if value not in self.narrowed:
            self.narrowed[value] = self.reshape(self.values[value], value.shape)
        return self.narrowed[value]

    def operand(self, value: Value | None, rank: int) -> Value | None:
        """The Value for an operation on tensors that had this rank, which aligns shapes at the last axis."""
        if value is None or (value.data is not None and len(value.shape) < rank):
            return value
        if value.data is not None:
            return constant(value.data.reshape(_wide(value.shape)), value.name)
        if len(value.shape) == rank:
            return self.values[value]
        return self.reshape(self.values[value], (1,) * (4 - len(value.shape)) + value.shape)

    def write(self, node: Node) -> None:
        x, y = node.inputs[0], node.output
        rank, four, traits = len(y.shape), self.four(*node.inputs, *node.outputs), definition(node.op)
        if traits.elementwise and four:
            inputs = [self.operand(v, rank) for v in node.inputs]
            self.values[y] = self.new(node.op, *inputs, **node.attrs)
        elif node.op == "reshape":
            self.values[y] = self.reshape(self.values[x], self.wide(y))
        elif node.op == "dense" and node.inputs[1].data is not None and four:
            self.values[y] = self.new("dense", self.values[x], *node.inputs[1:])
        elif node.op == "matmul" and four and rank == len(x.shape) == len(node.inputs[1].shape) == 3:
            self.values[y] = self.new("matmul", *(self.operand(v, 3) for v in node.inputs), **node.attrs)
        elif node.op == "attention" and (rank == 4 or "heads" in node.attrs):
            self.values[y] = Value(y.name, self.wide(y))
            inputs = (*(self.values[v] for v in node.inputs[:3]), node.inputs[3])
            self.nodes.append(dataclasses.replace(node, inputs=inputs, outputs=(self.values[y],)))
        elif traits.takes_axes and four and len(x.shape) in (2, 3) and node.attrs.get("perm", (0,))[0] == 0:
            inputs = [self.operand(v, len(x.shape)) for v in node.inputs]
            made = self.new(node.op, *inputs, **self.attributes(node.attrs, len(x.shape)))
            self.values[y] = self.reshape(made, self.wide(y))
        else:
            outputs = tuple(Value(v.name, v.shape, v.dtype) for v in node.outputs)
            inputs = tuple(map(self.narrow, node.inputs))
            self.nodes.append(dataclasses.replace(node, inputs=inputs, outputs=outputs))
            for old, v in zip(node.outputs, outputs, strict=True):
                self.values[old] = self.reshape(v, self.wide(old))

    @staticmethod
    def attributes(attrs: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """Those of an operation along axes, for four axes."""
        move = lambda axis: axis if axis == 0 else axis + 4 - rank
        new = {key: _wide(value, SPREAD[key]) if key in SPREAD else value for key, value in attrs.items()}
        for key in ("axes", "axis"):
            if key in new:
                new[key] = move(new[key]) if key == "axis" else tuple(map(move, new[key]))
        if "perm" in new:
            new["perm"] = (0, *range(1, 5 - rank), *(axis + 4 - rank for axis in attrs["perm"][1:]))
        if "keepdims" in new:
            new["keepdims"] = True
        return new
