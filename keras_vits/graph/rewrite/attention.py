"""Attention as one operation, for targets that have it: passes that a target asks for, which `rewrite` does not make.

They make `attention` nodes: (q, k, v, bias or None) -> softmax(q k' + bias) v, or (qkv, bias or None) with the heads of
q, k and v in a row, (B,3*heads,N,d) -> (B,heads,N,d).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_vits.graph.ir import Graph, Node, Value, constant, make_node
from keras_vits.graph.rewrite import rewrite


class NodeList(list[Node]):
    """Nodes of a Graph in the making; `layer` is the address that new ones get."""

    layer = ""

    def new(self, op: str, *inputs: Value | None, **attrs: Any) -> Value:
        self.append(make_node(op, inputs, attrs, self.layer))
        return self[-1].output

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        return x if x.shape == tuple(shape) else self.new("reshape", x, shape=tuple(shape))


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

    nodes, absorbed = NodeList(), set()
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


def _swapped(nodes: NodeList, x: Value) -> Value:
    *outer, m, n = range(len(x.shape))
    return nodes.new("transpose", x, perm=(*outer, n, m))


def join_projections(graph: Graph, fused: bool) -> Graph:
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

    nodes = NodeList()
    for node in graph.nodes:
        dense = list(map(projection, node.inputs[:3])) if node.op == "attention" else [None]
        if all(dense) and len({(d.inputs[0], x.shape) for d, x in zip(dense, node.inputs, strict=False)}) == 1:
            if fused or len(dense[0].output.shape) == 3:
                nodes.layer = dense[0].layer
                node = dataclasses.replace(node, inputs=(_joint(nodes, dense, node.output.shape), node.inputs[3]))
        nodes.append(node)
    return rewrite(dataclasses.replace(graph, nodes=list(nodes)))


def _joint(nodes: NodeList, dense: Sequence[Node], shape: tuple[int, ...]) -> Value:
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
