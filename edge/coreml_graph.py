"""Graph -> Graph for Core ML: attention as one operation, and the layout of the Neural Engine.

Both make `attention` nodes, which no other target knows: (q, k, v, bias or None) -> softmax(q k' + bias) v.

Reference  https://machinelearning.apple.com/research/neural-engine-transformers: tensors of four axes with the channels
           second, convolutions in place of dense layers, heads one by one, few transposes.
"""

import dataclasses
import math

import numpy as np

from .graph import Graph, Node, Value, constant, make_node
from .rewrite import rewrite


class _Nodes(list):
    """Nodes of a Graph in the making; `layer` is the address that new ones get."""

    layer = ""

    def new(self, op, *inputs, **attrs):
        self.append(make_node(op, inputs, attrs, self.layer))
        return self[-1].output

    def reshape(self, x, shape):
        return x if x.shape == tuple(shape) else self.new("reshape", x, shape=tuple(shape))


# ---------------------------------------------------------------- attention


def fuse_attention(graph, scaled=False):
    """The Graph with softmax(c q k' + bias) v (..., N,d) as one node, where c is a number and the bias a constant.

    Args:
        graph: a Graph from `rewrite`.
        scaled: whether the node divides by sqrt(d) itself, as Core ML's does. What it does not do of c goes into q.
    """
    made, uses = graph.producers(), graph.consumers()

    def inner(value, op):
        """The node that computes the value, if it is of this op and nothing else reads the value."""
        node = made.get(value)
        return node if node and node.op == op and len(uses[value]) == 1 and value not in graph.outputs else None

    def without(op, value):
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


def _is_attention(product, bias, softmax, node):
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


def _swapped(nodes, x):
    *outer, m, n = range(len(x.shape))
    return nodes.new("transpose", x, perm=(*outer, n, m))


def _join_heads(graph):
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


def _joined(nodes, node):
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
SPREAD = dict(begin=0, end=1, strides=1, reps=1, pads=(0, 0))  # attributes with one entry for each axis


def neural_engine(graph):
    """The Graph with attention by heads, and every tensor (B,N,D) or (B,D) as (B,1,N,D), which the writer keeps in the
    order (B,D,1,N).

    Args:
        graph: a Graph from `rewrite`.
    """
    return rewrite(_Lift(_join_heads(fuse_attention(graph))).run())


def _wide(entries, fill=1):
    """Entries of two or three axes as entries of four: the new axes stand after the first."""
    return (entries[0], *(fill,) * (4 - len(entries)), *entries[1:]) if len(entries) in (2, 3) else tuple(entries)


class _Lift:
    """Rebuilds a Graph with tensors of two and three axes as tensors of four."""

    def __init__(self, graph):
        self.graph, self.nodes = graph, _Nodes()
        self.values, self.narrowed = {}, {}  # Value of the given Graph -> its likes of four axes, of its own
        self.new, self.reshape = self.nodes.new, self.nodes.reshape

    def run(self):
        for value in self.graph.inputs:
            self.values[value] = self.reshape(value, _wide(value.shape))
        for node in self.graph.nodes:
            self.nodes.layer = node.layer
            self.write(node)
        outputs = [self.narrow(value) for value in self.graph.outputs]
        return Graph(self.graph.inputs, outputs, list(self.nodes), self.graph.name)

    def narrow(self, value):
        """The Value with the shape that it has in the given Graph."""
        if value is None or value.data is not None:
            return value
        if value not in self.narrowed:
            self.narrowed[value] = self.reshape(self.values[value], value.shape)
        return self.narrowed[value]

    def operand(self, value, rank):
        """The Value for an operation on tensors that had this rank, which aligns shapes at the last axis."""
        if value is None or (value.data is not None and len(value.shape) < rank):
            return value
        if value.data is not None:
            return constant(value.data.reshape(_wide(value.shape)), value.name)
        if len(value.shape) == rank:
            return self.values[value]
        return self.reshape(self.values[value], (1,) * (4 - len(value.shape)) + value.shape)

    def write(self, node):
        x, y = node.inputs[0], node.output
        rank, four = len(y.shape), lambda *values: all(len(v.shape) <= 4 for v in values if v is not None)
        if node.op in ELEMENTWISE and four(*node.inputs, y):
            inputs = [self.operand(v, rank) for v in node.inputs]
            self.values[y] = self.new(node.op, *inputs, **node.attrs)
        elif node.op == "reshape":
            self.values[y] = self.reshape(self.values[x], _wide(y.shape))
        elif node.op == "dense" and node.inputs[1].data is not None and four(x):
            self.values[y] = self.new("dense", self.values[x], *node.inputs[1:])
        elif node.op == "matmul" and rank == len(x.shape) == len(node.inputs[1].shape) == 3:
            self.values[y] = self.new("matmul", *(self.operand(v, 3) for v in node.inputs), **node.attrs)
        elif node.op == "attention":
            self.values[y] = Value(y.name, _wide(y.shape))
            inputs = (*(self.values[v] for v in node.inputs[:3]), node.inputs[3])
            self.nodes.append(dataclasses.replace(node, inputs=inputs, outputs=(self.values[y],)))
        elif node.op in ALONG and len(x.shape) in (2, 3) and node.attrs.get("perm", (0,))[0] == 0:
            inputs = [self.operand(v, len(x.shape)) for v in node.inputs]
            made = self.new(node.op, *inputs, **self.attributes(node.attrs, len(x.shape)))
            self.values[y] = self.reshape(made, _wide(y.shape))
        else:
            outputs = tuple(Value(v.name, v.shape, v.dtype) for v in node.outputs)
            inputs = tuple(map(self.narrow, node.inputs))
            self.nodes.append(dataclasses.replace(node, inputs=inputs, outputs=outputs))
            for old, v in zip(node.outputs, outputs, strict=True):
                self.values[old] = self.reshape(v, _wide(v.shape))

    @staticmethod
    def attributes(attrs, rank):
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
