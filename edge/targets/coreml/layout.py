"""Graph -> Graph for Core ML: attention as one operation, tokens in the order of a feature map, and the layout of the
Neural Engine.

All make `attention` nodes, which no other target knows: (q, k, v, bias or None) -> softmax(q k' + bias) v, or
(qkv, bias or None) with the heads of q, k and v in a row, (B,3*heads,N,d) -> (B,heads,N,d).

Reference  https://machinelearning.apple.com/research/neural-engine-transformers: tensors of four axes with the channels
           second, convolutions in place of dense layers, heads one by one, few transposes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits.graph.ir import Graph, Node, Value, constant, make_node
from keras_vits.graph.rewrite import rewrite


class _Nodes(list[Node]):
    """Nodes of a Graph in the making; `layer` is the address that new ones get."""

    layer = ""

    def new(self, op: str, *inputs: Value | None, **attrs: Any) -> Value:
        self.append(make_node(op, inputs, attrs, self.layer))
        return self[-1].output

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        return x if x.shape == tuple(shape) else self.new("reshape", x, shape=tuple(shape))


# ---------------------------------------------------------------- attention


def fuse_attention(graph: Graph, scaled: bool = False) -> Graph:
    """The Graph with softmax(c q k' + bias) v (..., N,d) as one node, where c is a number and the bias a constant.

    Args:
        graph: a Graph from `rewrite`.
        scaled: whether the node divides by sqrt(d) itself, as Core ML's does. What it does not do of c goes into q.
    """
    made, uses = graph.producers(), graph.consumers()

    def inner(value: Value, op: str) -> Node | None:
        """The node that computes the value, if it is of this op and nothing else reads the value."""
        node = made.get(value)
        return node if node and node.op == op and len(uses[value]) == 1 and value not in graph.outputs else None

    def without(op: str, value: Value) -> tuple[Value, Value | None]:
        """The operand and the constant of an addition or multiplication, or the value and None."""
        node = inner(value, op)
        return node.inputs if node and node.inputs[1].data is not None else (value, None)

    nodes, absorbed = _Nodes(), set()
    for node in graph.nodes:
        nodes.layer = node.layer
        softmax = node.op == "matmul" and inner(node.inputs[0], "softmax")
        scores, bias = without("add", softmax.inputs[0]) if softmax else (None, None)
        added, (scores, c) = scores, without("mul", scores)
        product = inner(scores, "matmul")
        if product and (c is None or c.data.size == 1) and _is_attention(product, bias, softmax, node):
            (q, k), v = product.inputs, node.inputs[1]
            k = k if product.attrs.get("transpose_b") else _swapped(nodes, k)
            v = _swapped(nodes, v) if node.attrs.get("transpose_b") else v
            factor = (1.0 if c is None else c.data.item()) * (math.sqrt(q.shape[-1]) if scaled else 1.0)
            if not math.isclose(factor, 1, rel_tol=1e-6):
                q = nodes.new("mul", q, constant(np.float32(factor), f"{node.layer}/scale"))
            absorbed |= {scores, added, softmax.inputs[0], softmax.output}
            node = Node("attention", (q, k, v, bias), node.outputs, {}, node.layer)
        nodes.append(node)
    return rewrite(dataclasses.replace(graph, nodes=[n for n in nodes if n.output not in absorbed]))


def _is_attention(product: Node, bias: Value | None, softmax: Node, node: Node) -> bool:
    """Whether nothing is transposed or broadcast that attention has not."""
    values, shape = (*product.inputs, node.inputs[1]), softmax.output.shape
    return (
        not product.attrs.get("transpose_a")
        and not node.attrs.get("transpose_a")
        and softmax.attrs["axis"] == len(shape) - 1
        and len(shape) in (3, 4)
        and product.output.shape == shape
        and (bias is None or bias.shape[-1:] == shape[-1:])
        and len({v.shape[:-2] for v in values}) == 1
        and all(v.data is None for v in values)
    )


def _swapped(nodes: _Nodes, x: Value) -> Value:
    *outer, m, n = range(len(x.shape))
    return nodes.new("transpose", x, perm=(*outer, n, m))


def _join_projections(graph: Graph, fused: bool) -> Graph:
    """Three dense layers that make the queries, keys and values of one attention become one, where their heads must be
    moved: those of tokens in the order of a map need not, but for the fused operation."""
    made, uses = graph.producers(), graph.consumers()

    def before(value: Value, op: str) -> Node | None:
        """The node that computes the value, if it is of this op and nothing else reads the value."""
        node = made.get(value)
        return node if node and node.op == op and len(uses[value]) == 1 and value not in graph.outputs else None

    def projection(heads: Value) -> Node | None:
        """The dense layer whose outputs, cut into heads, are these (B,heads,N,d)."""
        moved = before(heads, "transpose")
        cut = moved and moved.attrs["perm"] == (0, 2, 1, 3) and before(moved.inputs[0], "reshape")
        dense = cut and before(cut.inputs[0], "dense")
        if dense and dense.output.shape[-1] == heads.shape[1] * heads.shape[3]:
            return dense if all(v is None or v.data is not None for v in dense.inputs[1:]) else None

    nodes = _Nodes()
    for node in graph.nodes:
        dense = list(map(projection, node.inputs[:3])) if node.op == "attention" else [None]
        if all(dense) and len({(d.inputs[0], x.shape) for d, x in zip(dense, node.inputs, strict=False)}) == 1:
            if fused or len(dense[0].output.shape) == 3:
                nodes.layer = dense[0].layer
                node = dataclasses.replace(node, inputs=(_joint(nodes, dense, node.output.shape), node.inputs[3]))
        nodes.append(node)
    return rewrite(dataclasses.replace(graph, nodes=list(nodes)))


def _joint(nodes: _Nodes, dense: Sequence[Node], shape: tuple[int, ...]) -> Value:
    """Heads (B,3*heads,N,d) of queries, keys and values from one dense layer. A power of two that moves from the keys
    to the queries, which is exact, makes their weights alike, so that they share a palette or a scale well."""
    batch, heads, tokens, size = shape
    q, k = (float(np.square(d.inputs[1].data, dtype=np.float64).sum()) for d in dense[:2])
    factor = np.float32(2.0 ** round(math.log2(k / q) / 4) if q and k else 1)

    def joint(i: int) -> Value:
        """Weights (i = 1) or biases (2) of all three."""
        parts = [np.zeros(heads * size, np.float32) if d.inputs[i] is None else d.inputs[i].data for d in dense]
        whole = np.concatenate([part * f for part, f in zip(parts, (factor, 1 / factor, np.float32(1)), strict=True)])
        return constant(whole, next(d.inputs[i].name for d in dense if d.inputs[i]))

    bias = joint(2) if any(d.inputs[2] for d in dense) else None
    y = nodes.new("dense", dense[0].inputs[0], joint(1), bias)
    return nodes.new("transpose", nodes.reshape(y, (batch, tokens, 3 * heads, size)), perm=(0, 2, 1, 3))


def _join_heads(graph: Graph) -> Graph:
    """Attention of (B,heads,N,d) becomes attention of (B,N,D) that knows its number of heads: D = heads * d."""
    nodes = _Nodes()
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


def _joined(nodes: _Nodes, node: Node) -> Node:
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

ELEMENTWISE = frozenset(
    "add sub mul div maximum minimum pow floor_div mod equal not_equal greater greater_equal less less_equal "
    "logical_and logical_or logical_not where abs neg exp log sqrt rsqrt square sin cos tanh erf floor ceil round sign "
    "sigmoid relu relu6 silu softplus hard_sigmoid hard_swish gelu elu leaky_relu clip cast dequantize".split()
)
ALONG = frozenset("softmax layer_norm mean sum max min prod concat slice pad tile reverse transpose".split())
ON_MAPS = frozenset("conv2d depthwise_conv2d max_pool2d avg_pool2d space_to_depth depth_to_space resize".split())
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
    return _join_projections(graph, fused)


def _tokens_of_maps(graph: Graph) -> set[Value]:
    """Values (B,N,D) between one operation on feature maps and another."""
    after: set[Value | None] = set()
    before: set[Value | None] = set()
    for node in graph.nodes:
        if node.op in ON_MAPS or after.intersection(node.inputs):
            after.update(node.outputs)
    for node in reversed(graph.nodes):
        if node.op in ON_MAPS or before.intersection(node.outputs):
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
        self.graph, self.chosen, self.nodes = graph, chosen, _Nodes()
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
        rank, four = len(y.shape), self.four(*node.inputs, *node.outputs)
        if node.op in ELEMENTWISE and four:
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
        elif node.op in ALONG and four and len(x.shape) in (2, 3) and node.attrs.get("perm", (0,))[0] == 0:
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
