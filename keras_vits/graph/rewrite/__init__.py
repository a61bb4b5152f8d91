"""Graph -> Graph: exact simplifications before a file is written, for every target at once.

Each rule looks at one node and what computes its inputs, and returns the Value to use instead. Rules run over the whole
graph until none applies. What they do: constants, biases, batch normalisation, scales and the input normalisation are
folded into the neighbouring dense layer or convolution, and so are a LayerNorm's gains and offsets; a joint
query-key-value projection becomes three, without a bias of the keys, which softmax takes away again, and the two heads
of a distilled model one; a slice moves up, so that what is not read is not computed; reshapes, transposes and paddings
merge; equal and dead nodes go.
"""

import itertools
import math

import numpy as np

from keras_vits.graph.ir import Graph, Node, Value, constant, make_node
from keras_vits.graph.ops import OPS

LINEAR = ("dense", "conv2d", "depthwise_conv2d")  # (x, weight, bias): a bias or a scale of the output folds into these
ARRANGE = ("reshape", "transpose", "slice")  # a scalar factor may be applied before or after
UNARY = ("relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "hard_swish", "hard_sigmoid", "exp", "square", "elu")
BINARY = ("add", "sub", "mul", "div", "maximum", "minimum")


def rewrite(graph):
    """A simpler Graph with the same inputs and outputs; the given one is not changed.

    Args:
        graph: what `trace` returned.

    Returns:
        A Graph whose results differ by float32 rounding alone.
    """
    graph = _copy(graph)
    while _Sweep(graph).run():
        pass
    _unique_names(graph)
    return graph


def with_pixels(graph, preprocessing):
    """The Graph with its image input as uint8 pixels 0 to 255, normalised inside: (x / 255 - mean) / std.

    Args:
        graph: a Graph with one float32 input (B,H,W,C).
        preprocessing: a `keras_vits.preprocess.Preprocessing`; pixels are RGB, whatever its colour order.
    """
    old = graph.inputs[0]
    channels = old.shape[-1]
    pixels = Value(old.name, old.shape, "uint8")
    nodes = []

    def append(op, *inputs, **attrs):
        nodes.append(make_node(op, inputs, attrs, old.name))
        return nodes[-1].output

    x = append("dequantize", pixels, scale=1 / 255, zero_point=0)
    if preprocessing.channel_order == "bgr":
        x = append("reverse", x, axes=(3,))
    x = append("add", x, constant(-_per_channel(preprocessing.mean, channels), f"{old.name}/mean"))
    x = append("mul", x, constant(1 / _per_channel(preprocessing.std, channels), f"{old.name}/std"))
    return with_input(graph, old, pixels, nodes)


def with_layout(graph, layout):
    """The Graph with images (B,H,W,C) as its input (`"nhwc"`) or (B,C,H,W) (`"nchw"`)."""
    if layout == "nhwc":
        return graph
    if layout != "nchw" or len(graph.inputs[0].shape) != 4:
        raise ValueError(f'layout must be "nhwc", or "nchw" for a model of images; received {layout!r}.')
    old = graph.inputs[0]
    image = Value(old.name, tuple(old.shape[i] for i in (0, 3, 1, 2)), old.dtype)
    read, nodes = image, []
    if old.dtype == "uint8":  # XNNPACK transposes floats: pixels are read first
        scale = next(n for n in graph.nodes if n.op == "dequantize" and n.inputs == (old,))
        nodes = [make_node("dequantize", (image,), scale.attrs, old.name)]
        read, old = nodes[0].output, scale.output
        graph = Graph(graph.inputs, graph.outputs, [n for n in graph.nodes if n is not scale], graph.name)
    nodes.append(make_node("transpose", (read,), dict(perm=(0, 2, 3, 1)), image.name))
    return with_input(graph, old, image, nodes)


def with_input(graph, old, new, nodes):
    """The Graph with another input, from which the nodes compute what the old one was."""
    swap = lambda values: [nodes[-1].output if v is old else v for v in values]
    nodes = [*nodes, *(Node(n.op, tuple(swap(n.inputs)), n.outputs, n.attrs, n.layer) for n in graph.nodes)]
    return Graph([new], swap(graph.outputs), nodes, graph.name)


def _per_channel(values, channels):
    """Mean or std for `channels` channels: repeated when the model's count is not the checkpoint's."""
    return np.resize(np.asarray(values, np.float32), channels)


def with_head(graph, outputs, head, k=5):
    """The Graph with a head behind its classification, and the specs of its outputs.

    Args:
        graph: to be given the head.
        outputs: its `OutputSpec`s.
        head: `"logits"`, `"softmax"` or `"top_k"`; see `OutputSpec.with_head`.
        k: how many classes `"top_k"` gives.

    Returns:
        (Graph, tuple of `OutputSpec`).

    Raises:
        ValueError: an unknown head, or a model without the one output that it can stand behind.
    """
    if head == "logits":
        return graph, tuple(outputs)
    found = [i for i, spec in enumerate(outputs) if spec.is_classification]
    at = found[0] if found else 0
    specs = outputs[at].with_head(head, k)  # which says what does not fit
    if len(found) > 1:
        names = ", ".join(outputs[i].name for i in found)
        raise ValueError(f"head={head!r} is for a model of one classification; this one has several: {names}.")
    value, nodes = graph.outputs[at], list(graph.nodes)

    def append(op, **attrs):
        nodes.append(make_node(op, (value,), attrs, op))
        return nodes[-1].outputs

    if outputs[at].kind == "logits":
        (value,) = append("softmax", axis=len(value.shape) - 1)
    elif outputs[at].kind == "binary_logit":
        (value,) = append("sigmoid")
    values = append("top_k", k=specs[0].shape[-1]) if head == "top_k" else (value,)
    around = lambda before, new: [*before[:at], *new, *before[at + 1 :]]
    return Graph(graph.inputs, around(graph.outputs, values), nodes, graph.name), tuple(around(outputs, specs))


def _copy(graph):
    """The same graph with Values of its own; constants share their data."""
    copies = {}

    def copy(v):
        if v is not None and v not in copies:
            copies[v] = Value(v.name, v.shape, v.dtype, v.data)
        return copies.get(v)

    every = lambda values: tuple(map(copy, values))
    inputs = list(every(graph.inputs))
    nodes = [Node(n.op, every(n.inputs), every(n.outputs), n.attrs, n.layer) for n in graph.nodes]
    return Graph(inputs, list(every(graph.outputs)), nodes, graph.name)


def _unique_names(graph):
    taken = {value.name for value in graph.inputs}
    for value in [*(v for node in graph.nodes for v in node.outputs), *graph.constants()]:
        name, count = value.name, 0
        while value.name in taken:
            count += 1
            value.name = f"{name}_{count}"
        taken.add(value.name)


class _Sweep:
    """One pass over a graph. Rules read `made_by` and `single_use` and create nodes with `new`."""

    def __init__(self, graph):
        self.graph = graph
        self.uses = graph.consumers()
        self.made = {}  # Value -> Node, of this sweep
        self.nodes = []
        self.seen = {}

    def run(self):
        instead, changed = {}, False
        for node in self.graph.nodes:
            inputs = tuple(instead.get(v, v) for v in node.inputs)
            if inputs != node.inputs:
                node = Node(node.op, inputs, node.outputs, node.attrs, node.layer)
            self.layer = node.layer
            for rule in (*EVERYWHERE, *RULES.get(node.op, ())):
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

    def append(self, node):
        self.nodes.append(node)
        for value in node.outputs:
            self.made[value] = node
        return node

    def new(self, op, *inputs, name=None, **attrs):
        """Appends a node in the present layer, and returns its output."""
        value = self.append(make_node(op, inputs, attrs, self.layer)).output
        value.name = name or value.name
        return value

    def made_by(self, value, *ops):
        """The node of one of these ops that computes the value, or None."""
        node = self.made.get(value)
        return node if node is not None and node.op in ops else None

    def single_use(self, value):
        """Whether nothing but the node at hand reads the value (a value made in this sweep: not known, so no)."""
        return len(self.uses.get(value, ())) == 1 and value not in self.graph.outputs

    def read_by_linear(self, value, *ops):
        """Whether dense layers and convolutions (or the ops given) alone read the value: each can take it in."""
        readers = self.uses.get(value, ())
        return bool(readers) and value not in self.graph.outputs and all(r.op in (ops or LINEAR) for r in readers)


# ---------------------------------------------------------------- rules: (sweep, node) -> Value to use instead, or None


def is_constant(value):
    return value is not None and value.data is not None


def last_axis(value):
    """A constant's data as one number, or one for each entry of the last axis; None if it varies along another."""
    if value.data is None or value.dtype != "float32" or value.data.size != (value.shape[-1] if value.shape else 1):
        return None
    return value.data.reshape(-1)


def fold_constants(sweep, node):
    if node.inputs and len(node.outputs) == 1 and all(v is None or is_constant(v) for v in node.inputs):
        data = OPS[node.op].evaluate(*(None if v is None else v.data for v in node.inputs), **node.attrs)
        return constant(data, node.output.name)


def share_equal(sweep, node):
    """Two nodes with the same inputs and attributes are one."""
    key = (node.op, tuple(map(id, node.inputs)), repr(node.attrs))
    if key in sweep.seen and len(node.outputs) == 1:
        return sweep.seen[key]
    sweep.seen[key] = node.output


def drop_identity(sweep, node):
    x, shape = node.inputs[0], node.output.shape
    if x is None or x.shape != shape or x.dtype != node.output.dtype:
        return None
    if node.op in ("reshape", "cast", "slice", "tile", "concat", "resize"):
        return x
    if node.op == "transpose" and node.attrs["perm"] == tuple(range(len(shape))):
        return x
    if node.op in ("add", "mul") and is_constant(node.inputs[1]) and np.all(node.inputs[1].data == (node.op == "mul")):
        return x


def constant_second(sweep, node):
    """add and mul: the constant operand goes second."""
    a, b = node.inputs
    if is_constant(a) and not is_constant(b):
        return sweep.new(node.op, b, a, name=node.output.name)


def subtract_constant(sweep, node):
    x, c = node.inputs
    if is_constant(c) and c.dtype == "float32":
        return sweep.new("add", x, constant(-c.data, c.name))


def divide_by_constant(sweep, node):
    x, c = node.inputs
    if is_constant(c) and c.dtype == "float32":
        return sweep.new("mul", x, constant(1 / c.data, c.name))


def negate(sweep, node):
    if node.output.dtype == "float32":
        return sweep.new("mul", node.inputs[0], constant(-1.0, f"{node.output.name}/minus_one"))


def merge_reshapes(sweep, node):
    if inner := sweep.made_by(node.inputs[0], "reshape"):
        return sweep.new("reshape", inner.inputs[0], shape=node.attrs["shape"])


def merge_transposes(sweep, node):
    if inner := sweep.made_by(node.inputs[0], "transpose"):
        return sweep.new("transpose", inner.inputs[0], perm=tuple(inner.attrs["perm"][p] for p in node.attrs["perm"]))


def read_transposed(sweep, node):
    """matmul(transpose(a), b) -> matmul of a, read the other way, when products alone read what is transposed."""
    operands, flags = list(node.inputs), {}
    for i, flag in enumerate(("transpose_a", "transpose_b")):
        before, rank = sweep.made_by(operands[i], "transpose"), len(operands[i].shape)
        if before and before.attrs["perm"] == (*range(rank - 2), rank - 1, rank - 2):
            if sweep.read_by_linear(operands[i], "matmul"):
                operands[i], flags[flag] = before.inputs[0], not node.attrs.get(flag, False)
    if flags:
        return sweep.new("matmul", *operands, name=node.output.name, **{**node.attrs, **flags})


def transpose_of_ones(sweep, node):
    """A transpose that moves nothing but axes of size 1 is a reshape."""
    shape = node.inputs[0].shape
    moved = [p for p in node.attrs["perm"] if shape[p] > 1]
    if moved == sorted(moved):
        return sweep.new("reshape", node.inputs[0], shape=node.output.shape)


def fold_after_linear(sweep, node):
    """add(linear(x), c) -> the bias; mul(linear(x), c) -> weight and bias."""
    linear = sweep.made_by(node.inputs[0], *LINEAR)
    c = None if linear is None or not is_constant(node.inputs[1]) else last_axis(node.inputs[1])
    if c is None or len(node.inputs[1].shape) > len(linear.output.shape) or not sweep.single_use(linear.output):
        return None
    x, weight, bias = linear.inputs
    size = linear.output.shape[-1]
    if c.size not in (1, size):
        return None
    c = np.broadcast_to(c, size)
    old = np.zeros(size, np.float32) if bias is None else bias.data
    if node.op == "mul":
        shape = {"dense": (-1, 1), "conv2d": (-1,), "depthwise_conv2d": weight.shape[2:]}[linear.op]
        weight = constant(weight.data * c.reshape(shape), weight.name)
        bias = bias and constant(old * c, bias.name)
    else:
        bias = constant(old + c, bias.name if bias else node.inputs[1].name)
    sweep.layer = linear.layer
    return sweep.new(linear.op, x, weight, bias, name=linear.output.name, **linear.attrs)


def fold_before_linear(sweep, node):
    """linear(mul(x, c)) -> weight; linear(add(x, c)) -> bias if no zeros are padded; conv(reverse(x)) -> kernel."""
    x, weight, bias = node.inputs
    before = sweep.made_by(x, "mul", "add", "reverse")
    if before is None or not sweep.read_by_linear(x) or not is_constant(weight) or node.attrs.get("groups", 1) != 1:
        return None
    axis = 1 if node.op == "dense" else 2  # of the weight: the input channels
    channels = weight.shape[axis]
    if before.op == "reverse":
        if before.attrs["axes"] != (len(x.shape) - 1,) or node.op != "conv2d":
            return None
        weight = constant(np.flip(weight.data, axis), weight.name)
        return sweep.new(node.op, before.inputs[0], weight, bias, name=node.output.name, **node.attrs)
    c = last_axis(before.inputs[1]) if is_constant(before.inputs[1]) else None
    if c is None or c.size not in (1, channels) or before.inputs[0].shape != x.shape:
        return None
    per_input = np.broadcast_to(c, channels).reshape([-1 if i == axis else 1 for i in range(weight.data.ndim)])
    if before.op == "mul":
        weight = constant(weight.data * per_input, weight.name)
    elif any(map(any, node.attrs.get("pads", ()))):
        return None
    else:
        shift = weight.data.astype(np.float64) * per_input
        shift = {
            "dense": lambda: shift.sum(1),
            "conv2d": lambda: shift.sum((0, 1, 2)),
            "depthwise_conv2d": lambda: shift.sum((0, 1)).reshape(-1),
        }[node.op]()
        bias = constant(shift + (0 if bias is None else bias.data), bias.name if bias else before.inputs[1].name)
    return sweep.new(node.op, before.inputs[0], weight, bias, name=node.output.name, **node.attrs)


def fold_norm(sweep, node):
    """dense(layer_norm(x, gamma, beta)) -> gains and offsets into weight and bias, when dense layers alone read it."""
    x, weight, bias = node.inputs
    norm = sweep.made_by(x, "layer_norm")
    if (
        norm is None
        or norm.inputs[1:] == (None, None)
        or not sweep.read_by_linear(x, "dense")
        or not is_constant(weight)
    ):
        return None
    size = weight.shape[1]
    gamma, beta = (None if v is None else last_axis(v) for v in norm.inputs[1:])
    if any(v is not None and f is None for v, f in zip(norm.inputs[1:], (gamma, beta), strict=True)):
        return None
    if beta is not None:
        shift = weight.data @ np.broadcast_to(beta, size)
        bias = constant(shift + (0 if bias is None else bias.data), bias.name if bias else norm.inputs[2].name)
    if gamma is not None:
        weight = constant(weight.data * gamma, weight.name)
    layer, sweep.layer = sweep.layer, norm.layer
    key = ("layer_norm", norm.inputs[0], repr(norm.attrs))  # every dense that read the norm reads the same plain one
    if key not in sweep.seen:
        sweep.seen[key] = sweep.new("layer_norm", norm.inputs[0], None, None, name=norm.output.name, **norm.attrs)
    sweep.layer = layer
    return sweep.new("dense", sweep.seen[key], weight, bias, name=node.output.name)


def hoist_scalar(sweep, node):
    """mul(arrange(x), number) -> arrange(mul(x, number)), on its way into the weights."""
    x, c = node.inputs
    inner = sweep.made_by(x, *ARRANGE)
    if (
        inner is None
        or not is_constant(c)
        or c.data.size != 1
        or len(c.shape) > len(inner.inputs[0].shape)
        or not sweep.single_use(x)
        or (inner.op == "slice" and inner.output.shape[:-1] != inner.inputs[0].shape[:-1])  # slices move up themselves
    ):
        return None
    return sweep.new(inner.op, sweep.new("mul", inner.inputs[0], c), **inner.attrs)


def fold_into_concat(sweep, node):
    """mul or add(concat(linear...), c) along the last axis -> each part's share of c, on its way into its weights."""
    x, c = node.inputs
    concat = sweep.made_by(x, "concat")
    if concat is None or not is_constant(c) or last_axis(c) is None or not sweep.single_use(x):
        return None
    axis = len(x.shape) - 1
    parts = concat.inputs
    if concat.attrs["axis"] != axis or len(c.shape) > len(x.shape):
        return None
    if not all(sweep.made_by(part, *LINEAR) and sweep.single_use(part) for part in parts):
        return None
    each = np.split(np.broadcast_to(last_axis(c), x.shape[-1]), np.cumsum([part.shape[-1] for part in parts])[:-1])
    shares = [sweep.new(node.op, part, constant(share, c.name)) for part, share in zip(parts, each, strict=True)]
    sweep.layer = concat.layer
    return sweep.new("concat", *shares, axis=axis, name=x.name)


def merge_heads(sweep, node):
    """add(dense(a), dense(b)) of vectors (B,K) -> one dense of both: the two heads of a distilled model are one."""
    dense = [sweep.made_by(x, "dense") for x in node.inputs]
    if None in dense or len(node.output.shape) != 2 or not all(sweep.single_use(x) for x in node.inputs):
        return None
    if len({x.shape for x in node.inputs}) > 1 or not all(is_constant(d.inputs[1]) for d in dense):
        return None
    (a, first, bias), (b, second, other) = (d.inputs for d in dense)
    if a.shape[:-1] != b.shape[:-1]:
        return None
    biases = [v.data for v in (bias, other) if v is not None]
    weight = constant(np.concatenate([first.data, second.data], axis=1), first.name)
    both = sweep.new("concat", a, b, axis=1)
    return sweep.new("dense", both, weight, constant(sum(biases), node.output.name) if biases else None)


def whole_again(sweep, node):
    """concat(x[:, 0], x[:, 1], ...) of vectors, all of x in order -> reshape(x)."""
    source, at = None, 0
    for part in node.inputs:
        flat = sweep.made_by(part, "reshape")
        piece = sweep.made_by(flat.inputs[0], "slice") if flat else sweep.made_by(part, "slice")
        if piece is None or any(s != 1 for s in piece.attrs["strides"]):
            return None
        x, begin, end = piece.inputs[0], piece.attrs["begin"], piece.attrs["end"]
        source = source or x
        whole = all(b == 0 and e == n for i, (b, e, n) in enumerate(zip(begin, end, x.shape, strict=True)) if i != 1)
        vector = (x.shape[0], math.prod(piece.output.shape[1:]))
        if x is not source or not whole or begin[1] != at or part.shape != vector:
            return None
        at = end[1]
    if node.attrs["axis"] == 1 and at == source.shape[1] and len(node.output.shape) == 2:
        return sweep.new("reshape", source, shape=node.output.shape)


def split_dense(sweep, node):
    """slice(dense(x)) along the last axis -> a dense with these rows, when disjoint slices alone read the dense."""
    linear = sweep.made_by(node.inputs[0], "dense")
    if linear is None or linear.output in sweep.graph.outputs or not (ranges := sweep.uses.get(linear.output)):
        return None
    spans = []
    for reader in ranges:
        if reader.op != "slice" or any(s != 1 for s in reader.attrs["strides"]):
            return None
        *outer, last = zip(reader.attrs["begin"], reader.attrs["end"], strict=True)
        if any(span != (0, n) for span, n in zip(outer, linear.output.shape, strict=False)):
            return None
        spans.append(last)
    spans.sort()
    if any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
        return None
    x, weight, bias = linear.inputs
    begin, end = node.attrs["begin"][-1], node.attrs["end"][-1]
    part = lambda v: v and constant(v.data[begin:end], v.name)
    sweep.layer = linear.layer
    return sweep.new("dense", x, part(weight), part(bias), name=linear.output.name)


def drop_key_bias(sweep, node):
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
        channels = OPS[step.op].evaluate(channels, **step.attrs)
    if np.ptp(channels, axis=last - 1 if scores.attrs.get("transpose_b") else last).any():  # not one key, one row
        return None
    sweep.layer = linear.layer
    value = sweep.new("dense", *linear.inputs[:2], None, name=linear.output.name)
    for step in (*reversed(steps), scores, node):
        sweep.layer = step.layer
        inputs = (scores.inputs[0], value) if step is scores else (value,)
        value = sweep.new(step.op, *inputs, name=step.output.name, **step.attrs)
    return value


def slice_early(sweep, node):
    """slice(f(x)) -> f(slice(x)) along one axis, when the slice alone reads f(x): what is not read is not computed.

    A class token makes the last block work on one token, but for its keys and values.
    """
    value, a = node.inputs[0], node.attrs
    inner = sweep.made_by(value, *SLICED)
    sliced = [i for i, n in enumerate(node.output.shape) if n != value.shape[i]]
    if inner is None or len(sliced) != 1 or a["strides"][sliced[0]] != 1 or not sweep.single_use(value):
        return None
    axis = sliced[0]
    if axis == len(value.shape) - 1:  # of a dense layer's outputs: split_dense, with scalars moving before the slice
        return None
    axes = SLICED[inner.op](inner, axis)  # of every input; None: the input stays whole
    if axes is None:
        return None
    begin, end = a["begin"][axis], a["end"][axis]

    def part(x, axis):
        if axis is None:
            return x
        whole = [(0, n) for n in x.shape]
        whole[axis] = (begin, end)
        return sweep.new("slice", x, begin=tuple(b for b, _ in whole), end=tuple(e for _, e in whole),
                         strides=(1,) * len(whole))  # fmt: skip

    sweep.layer = inner.layer
    attrs = dict(inner.attrs)
    if inner.op == "reshape":
        attrs["shape"] = node.output.shape
    inputs = [part(x, axis) for x, axis in zip(inner.inputs, axes, strict=True)]
    return sweep.new(inner.op, *inputs, name=value.name, **attrs)


def _elementwise_axes(node, axis):
    """The same axis, counted from the last, of every input that is not broadcast along it."""
    back = axis - len(node.output.shape)
    size = node.output.shape[axis]
    return [None if x is None or len(x.shape) < -back or x.shape[back] != size else len(x.shape) + back
            for x in node.inputs]  # fmt: skip


def _matmul_axes(node, axis):
    """Rows of the first matrix, or matrices of both."""
    a, _ = node.inputs
    if axis == len(node.output.shape) - 2:
        return [len(a.shape) - (1 if node.attrs.get("transpose_a") else 2), None]
    return _elementwise_axes(node, axis)


def _reshape_axes(node, axis):
    """The axis of the input with as many entries, and as many before it."""
    given, shape = node.inputs[0].shape, node.output.shape
    for i, n in enumerate(given):
        if n == shape[axis] and math.prod(given[:i]) == math.prod(shape[:axis]):
            return [i]


SLICED = {  # (node, sliced axis of the output) -> axis to slice in each input, or None if it cannot be done
    **dict.fromkeys((*UNARY, *BINARY), _elementwise_axes),
    "layer_norm": lambda node, axis: None if axis in node.attrs["axes"] else _elementwise_axes(node, axis),
    "softmax": lambda node, axis: None if axis == node.attrs["axis"] else [axis],
    "dense": lambda node, axis: None if axis == len(node.output.shape) - 1 else [axis, None, None],
    "matmul": _matmul_axes,
    "transpose": lambda node, axis: [node.attrs["perm"][axis]],
    "reshape": _reshape_axes,
}


def fold_padding(sweep, node):
    """conv(pad(x)) with zeros around height and width -> the convolution's own padding, without what it never reads."""
    pad = sweep.made_by(node.inputs[0], "pad")
    pads = node.attrs["pads"]
    x, weight, bias = node.inputs
    if (
        pad
        and pad.attrs["mode"] == "constant"
        and pad.attrs["value"] == 0
        and not any(map(any, (pad.attrs["pads"][0], pad.attrs["pads"][3])))
    ):
        x = pad.inputs[0]
        pads = tuple((a + c, b + d) for (a, b), (c, d) in zip(pads, pad.attrs["pads"][1:3], strict=True))
    pads = tuple(
        (a, min(b, max(0, (out - 1) * s + (k - 1) * d + 1 - n - a)))
        for (a, b), out, n, k, s, d in zip(
            pads,
            node.output.shape[1:3],
            x.shape[1:3],
            weight.shape[:2],
            node.attrs["strides"],
            node.attrs["dilation"],
            strict=True,
        )
    )
    if pads != node.attrs["pads"] or x is not node.inputs[0]:
        return sweep.new(node.op, x, weight, bias, name=node.output.name, **{**node.attrs, "pads": pads})


def pool_of_one(sweep, node):
    """A pooling of single pixels, as in ResNetV2's shortcuts, takes every other pixel: a depthwise 1 x 1 of ones."""
    a, channels = node.attrs, node.output.shape[-1]
    if tuple(a["size"]) != (1, 1) or any(map(any, a["pads"])):
        return None
    ones = constant(np.ones((1, 1, channels, 1), np.float32), f"{node.output.name}/ones")
    where = dict(strides=a["strides"], pads=((0, 0), (0, 0)), dilation=(1, 1))
    return sweep.new("depthwise_conv2d", node.inputs[0], ones, None, name=node.output.name, **where)


EVERYWHERE = (fold_constants, share_equal, drop_identity)
RULES = {
    "add": (constant_second, fold_after_linear, fold_into_concat, merge_heads),
    "mul": (constant_second, fold_after_linear, fold_into_concat, hoist_scalar),
    "sub": (subtract_constant,),
    "div": (divide_by_constant,),
    "neg": (negate,),
    "reshape": (merge_reshapes,),
    "concat": (whole_again,),
    "transpose": (transpose_of_ones, merge_transposes),
    "slice": (split_dense, slice_early),
    "matmul": (read_transposed,),
    "softmax": (drop_key_bias,),
    "dense": (fold_before_linear, fold_norm),
    "max_pool2d": (pool_of_one,),
    "avg_pool2d": (pool_of_one,),
    "conv2d": (fold_padding, fold_before_linear),
    "depthwise_conv2d": (fold_padding, fold_before_linear),
}
