"""Graph: a static list of primitive operations with shapes, constants and our layer names, and a numpy evaluator of it.

The tracer makes one from a Keras model on any backend, `rewrite` simplifies it, and every target is written from it.
The evaluator tells which of those steps broke when a number is off. Images and feature maps are channels last
throughout.
"""

import collections
import dataclasses

import numpy as np

from keras_vits.graph.ops import DTYPES, OPS


def histogram(names):
    """How often each name occurs, most frequent first."""
    return dict(sorted(collections.Counter(names).items(), key=lambda item: (-item[1], item[0])))


@dataclasses.dataclass(eq=False)
class Value:
    """A tensor: an input, a node's output, or a constant (then `data` holds it). Compared by identity."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    data: np.ndarray | None = None

    def __repr__(self):
        return f"{self.name}:{self.dtype}[{','.join(map(str, self.shape))}]{'=const' if self.data is not None else ''}"


@dataclasses.dataclass(eq=False)
class Node:
    """One primitive operation. An optional input that is absent (a bias, say) is `None` in `inputs`."""

    op: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    attrs: dict
    layer: str = ""  # path of the Keras layer it came from, e.g. "block_0/attention/qkv"

    @property
    def output(self):
        return self.outputs[0]

    def __repr__(self):
        return f"{self.output} = {self.op}({', '.join(map(repr, self.inputs))}, {self.attrs}) in {self.layer!r}"


@dataclasses.dataclass(eq=False)
class Graph:
    """Nodes in the order of execution. Names of values are unique."""

    inputs: list[Value]
    outputs: list[Value]
    nodes: list[Node]
    name: str = "main"

    def histogram(self):
        """Number of nodes by op name, most frequent first."""
        return histogram(node.op for node in self.nodes)

    def producers(self):
        """Value -> the node that computes it."""
        return {value: node for node in self.nodes for value in node.outputs}

    def consumers(self):
        """Value -> the nodes that read it, one entry for each reading."""
        found = {}
        for node in self.nodes:
            for value in node.inputs:
                if value is not None:
                    found.setdefault(value, []).append(node)
        return found

    def constants(self):
        """Constants in the order of first use, each once."""
        seen = {
            value: None for node in self.nodes for value in node.inputs if value is not None and value.data is not None
        }
        return list(seen)

    def __call__(self, *inputs, trace=None):
        """Evaluates the graph with numpy in float32.

        Args:
            *inputs: one array for each input of the graph, of its shape and dtype.
            trace: a dict that receives every intermediate value by name, or `None`.

        Returns:
            A list of arrays, one for each output.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(f"The graph takes {len(self.inputs)} inputs; received {len(inputs)}.")
        found = {}
        for value, array in zip(self.inputs, inputs, strict=True):
            array = np.asarray(array)
            if array.shape != value.shape:
                raise ValueError(f"Input {value.name!r} has shape {value.shape}; received {array.shape}.")
            found[value] = array.astype(DTYPES[value.dtype])
        last = {value: i for i, node in enumerate(self.nodes) for value in node.inputs}
        keep = set(self.outputs)
        for i, node in enumerate(self.nodes):
            arguments = [None if v is None else v.data if v.data is not None else found[v] for v in node.inputs]
            results = OPS[node.op].evaluate(*arguments, **node.attrs)
            for value, result in zip(
                node.outputs, results if isinstance(results, (list, tuple)) else [results], strict=True
            ):
                if result.shape != value.shape:
                    raise ValueError(
                        f"{node.op} in layer {node.layer!r} gave shape {result.shape}, declared {value.shape}."
                    )
                found[value] = result.astype(DTYPES[value.dtype], copy=False)
                if trace is not None:
                    trace[value.name] = found[value]
            for value in node.inputs:
                if last.get(value) == i and value not in keep:
                    found.pop(value, None)
        return [value.data if value.data is not None else found[value] for value in self.outputs]


class Builder:
    """Makes nodes with inferred shapes and unique names; `layer` is the address that new nodes get.

    `build(op, *inputs, **attrs)` appends a node and returns its output Value, or a tuple of them.
    """

    def __init__(self, name="main"):
        self.graph = Graph([], [], [], name)
        self.layer = ""
        self._taken = {}
        self._constants = {}

    def unique(self, name):
        count = self._taken.get(name, 0)
        self._taken[name] = count + 1
        return f"{name}_{count}" if count else name

    def input(self, name, shape, dtype="float32"):
        value = Value(self.unique(name), tuple(shape), dtype)
        self.graph.inputs.append(value)
        return value

    def constant(self, array, name="constant", key=None):
        """A constant; the same `key` (any hashable) gives the same Value again."""
        if key is not None and key in self._constants:
            return self._constants[key]
        value = constant(array, self.unique(f"{self.layer}/{name}".lstrip("/")))
        if key is not None:
            self._constants[key] = value
        return value

    def __call__(self, op, *inputs, **attrs):
        node = make_node(op, inputs, attrs, self.layer)
        for value in node.outputs:
            value.name = self.unique(value.name)
        self.graph.nodes.append(node)
        return node.output if len(node.outputs) == 1 else node.outputs


def constant(array, name):
    """A constant Value; floats become float32 and integers int32. The array is not copied."""
    array = np.asarray(array)
    dtype = (
        array.dtype
        if array.dtype in (np.bool_, np.uint8)
        else np.dtype(np.int32 if array.dtype.kind in "iu" else np.float32)
    )
    return Value(name, array.shape, dtype.name, array.astype(dtype, copy=False))


def make_node(op, inputs, attrs, layer=""):
    """A node with new output Values of inferred shape and dtype, named after the layer and op."""
    if op not in OPS:
        raise ValueError(f"No primitive op {op!r}.")
    shapes = [None if v is None else v.shape for v in inputs]
    dtype = OPS[op].dtype or next((v.dtype for v in inputs if v is not None), "float32")
    if op == "where":
        dtype = inputs[1].dtype
    elif op == "cast":
        dtype = attrs["dtype"]
    try:
        inferred = OPS[op].infer(*shapes, **attrs)
    except (ValueError, IndexError) as e:
        raise ValueError(f"{op} in layer {layer!r} does not fit shapes {shapes} with {attrs}: {e}") from None
    several = inferred if isinstance(inferred, list) else [inferred]
    dtypes = ["float32", "int32"] if op == "top_k" else [dtype] * len(several)
    name = f"{layer}/{op}".lstrip("/")
    return Node(
        op,
        tuple(inputs),
        tuple(Value(name, tuple(int(d) for d in s), t) for s, t in zip(several, dtypes, strict=True)),
        attrs,
        layer,
    )
