"""Graph: a static list of primitive operations with shapes, constants and our layer names, and a numpy evaluator of it.

The tracer makes one from a Keras model on any backend, `rewrite` simplifies it, and every target is written from it.
The evaluator tells which of those steps broke when a number is off. Images and feature maps are channels last
throughout.
"""

import collections
import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from keras_vits.graph.ops import DTYPES, Shape, definition


def histogram(names: Iterable[str]) -> dict[str, int]:
    """How often each name occurs, most frequent first."""
    return dict(sorted(collections.Counter(names).items(), key=lambda item: (-item[1], item[0])))


@dataclasses.dataclass(eq=False)
class Value:
    """A tensor: an input, a node's output, or a constant (then `data` holds it). Compared by identity."""

    name: str
    shape: Shape
    dtype: str = "float32"
    data: np.ndarray | None = None

    def __repr__(self) -> str:
        return f"{self.name}:{self.dtype}[{','.join(map(str, self.shape))}]{'=const' if self.data is not None else ''}"


@dataclasses.dataclass(eq=False)
class Node:
    """One primitive operation. An optional input that is absent (a bias, say) is `None` in `inputs`."""

    op: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    attrs: dict[str, Any]
    layer: str = ""  # path of the Keras layer it came from, e.g. "block_0/attention/qkv"

    @property
    def output(self) -> Value:
        return self.outputs[0]

    def __repr__(self) -> str:
        return f"{self.output} = {self.op}({', '.join(map(repr, self.inputs))}, {self.attrs}) in {self.layer!r}"


@dataclasses.dataclass(eq=False)
class Graph:
    """Nodes in the order of execution. Names of values are unique."""

    inputs: list[Value]
    outputs: list[Value]
    nodes: list[Node]
    name: str = "main"

    def histogram(self) -> dict[str, int]:
        """Number of nodes by op name, most frequent first."""
        return histogram(node.op for node in self.nodes)

    def producers(self) -> dict[Value, Node]:
        """Value -> the node that computes it."""
        return {value: node for node in self.nodes for value in node.outputs}

    def consumers(self) -> dict[Value, list[Node]]:
        """Value -> the nodes that read it, one entry for each reading."""
        found: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in node.inputs:
                if value is not None:
                    found.setdefault(value, []).append(node)
        return found

    def constants(self) -> list[Value]:
        """Constants in the order of first use, each once."""
        seen = {
            value: None for node in self.nodes for value in node.inputs if value is not None and value.data is not None
        }
        return list(seen)

    def check(self, unique_names: bool = True, inferred: set[Node] | None = None) -> "Graph":
        """The Graph itself, if it is whole: every operation is in the table, its inputs are computed before it, given
        or constant, shapes and types are what the table infers, every Value is computed once, and names are unique.

        `trace`, every sweep of `rewrite` and every writer of a file ask this, so that a rule's mistake is found where
        it was made and no broken graph becomes a file.

        Args:
            unique_names: whether names of Values must differ; within `rewrite` they need not.
            inferred: nodes whose outputs were compared with the table before; those of this graph are added. Nodes do
                not change once they are made, and inferring takes most of the time: with it all checks of `rewrite`
                together take 5 % of the time that tracing and rewriting vit_tiny take, without it 20 %.

        Raises:
            ValueError: the first fault, with the node and its layer.
        """
        inferred = set() if inferred is None else inferred
        known = set(self.inputs)
        if len(known) < len(self.inputs):
            raise ValueError(f"A value is listed twice among the inputs {self.inputs}: a value is given once.")
        for node in self.nodes:
            for value in node.inputs:
                if value is not None and value not in known:
                    _check_constant(value, _address(node))
                    known.add(value)
            if node not in inferred:
                _check_outputs(node)
                inferred.add(node)
            for value in node.outputs:
                if value in known:
                    raise ValueError(f"{_address(node)} computes {value.name!r} again: a value is computed once.")
                known.add(value)
        for value in self.outputs:
            if value not in known:
                _check_constant(value, "The list of outputs")
                known.add(value)
        if unique_names and len({value.name for value in known}) < len(known):
            name, count = max(collections.Counter(value.name for value in known).items(), key=lambda item: item[1])
            layers = {n.layer for n in self.nodes for v in (*n.inputs, *n.outputs) if v is not None and v.name == name}
            raise ValueError(
                f"{count} values are named {name!r}, in the layers {sorted(layers)}: names must be unique."
            )
        return self

    def __call__(self, *inputs: np.ndarray, trace: dict[str, np.ndarray] | None = None) -> list[np.ndarray]:
        """Evaluates the graph with numpy in float32.

        Args:
            *inputs: one array for each input of the graph, of its shape and dtype.
            trace: a dict that receives every intermediate value by name, or `None`.

        Returns:
            A list of arrays, one for each output.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(f"The graph takes {len(self.inputs)} inputs; received {len(inputs)}.")
        found: dict[Value, np.ndarray] = {}
        for value, array in zip(self.inputs, inputs, strict=True):
            array = np.asarray(array)
            if array.shape != value.shape:
                raise ValueError(f"Input {value.name!r} has shape {value.shape}; received {array.shape}.")
            found[value] = array.astype(DTYPES[value.dtype])
        last = {value: i for i, node in enumerate(self.nodes) for value in node.inputs}
        keep = set(self.outputs)
        for i, node in enumerate(self.nodes):
            arguments = [None if v is None else v.data if v.data is not None else found[v] for v in node.inputs]
            entry = definition(node.op)
            if entry.evaluate is None:
                raise ValueError(
                    f"{node.op} in layer {node.layer!r} is one target's own operation: evaluate the graph before that "
                    "target's layout."
                )
            results = entry(*arguments, **node.attrs)
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
            for used in node.inputs:
                if used is not None and last.get(used) == i and used not in keep:
                    found.pop(used, None)
        return [value.data if value.data is not None else found[value] for value in self.outputs]


class Builder:
    """Makes nodes with inferred shapes and unique names; `layer` is the address that new nodes get.

    `build(op, *inputs, **attrs)` appends a node and returns its output Value, or a tuple of them.
    """

    def __init__(self, name: str = "main") -> None:
        self.graph = Graph([], [], [], name)
        self.layer = ""
        self._taken: dict[str, int] = {}
        self._constants: dict[Hashable, Value] = {}

    def unique(self, name: str) -> str:
        count = self._taken.get(name, 0)
        self._taken[name] = count + 1
        return f"{name}_{count}" if count else name

    def input(self, name: str, shape: Sequence[int], dtype: str = "float32") -> Value:
        value = Value(self.unique(name), tuple(shape), dtype)
        self.graph.inputs.append(value)
        return value

    def constant(self, array: Any, name: str = "constant", key: Hashable = None) -> Value:
        """A constant; the same `key` (any hashable) gives the same Value again."""
        if key is not None and key in self._constants:
            return self._constants[key]
        value = constant(array, self.unique(f"{self.layer}/{name}".lstrip("/")))
        if key is not None:
            self._constants[key] = value
        return value

    def __call__(self, op: str, *inputs: Value | None, **attrs: Any) -> Any:
        node = make_node(op, inputs, attrs, self.layer)
        for value in node.outputs:
            value.name = self.unique(value.name)
        self.graph.nodes.append(node)
        return node.output if len(node.outputs) == 1 else node.outputs


def constant(array: Any, name: str) -> Value:
    """A constant Value; floats become float32 and integers int32. The array is not copied."""
    array = np.asarray(array)
    dtype = (
        array.dtype
        if array.dtype in (np.bool_, np.uint8)
        else np.dtype(np.int32 if array.dtype.kind in "iu" else np.float32)
    )
    return Value(name, array.shape, dtype.name, array.astype(dtype, copy=False))


def _infer(op: str, inputs: Sequence[Value | None], attrs: dict[str, Any], layer: str) -> list[tuple[Shape, str]]:
    """(shape, dtype) of each output, by the table of operations."""
    entry = definition(op)
    shapes = [None if v is None else v.shape for v in inputs]
    try:
        inferred = entry.infer(*shapes, **attrs)
    except (ValueError, IndexError, TypeError) as e:
        raise ValueError(f"{op} in layer {layer!r} does not fit shapes {shapes} with {attrs}: {e}") from None
    try:
        dtypes = entry.types([None if v is None else v.dtype for v in inputs], attrs)
    except ValueError as e:
        raise ValueError(f"{op} in layer {layer!r} does not fit the types of its inputs {list(inputs)}: {e}") from None
    several = inferred if isinstance(inferred, list) else [inferred]
    return [(tuple(int(d) for d in shape), dtype) for shape, dtype in zip(several, dtypes, strict=True)]


def _address(node: Node) -> str:
    return f"{node.op} in layer {node.layer!r}"


def _check_constant(value: Value, reader: str) -> None:
    """Raises a ValueError if a value that nothing computes is no constant whose data are as it says."""
    if value.data is None:
        raise ValueError(f"{reader} reads {value.name!r}, which nothing before it computes.")
    if value.data.shape != value.shape or value.data.dtype != DTYPES.get(value.dtype):
        raise ValueError(
            f"{reader} reads the constant {value!r}, whose data are {value.data.dtype} of shape {value.data.shape}."
        )


def _check_outputs(node: Node) -> None:
    """Raises a ValueError if a node's outputs are not of the shapes and types that its inputs give."""
    expected = _infer(node.op, node.inputs, node.attrs, node.layer)
    declared = [(value.shape, value.dtype) for value in node.outputs]
    if expected != declared:
        raise ValueError(f"{_address(node)} gives {expected}, but its outputs are declared as {declared}.")


def make_node(op: str, inputs: Sequence[Value | None], attrs: dict[str, Any], layer: str = "") -> Node:
    """A node with new output Values of inferred shape and dtype, named after the layer and op."""
    name = f"{layer}/{op}".lstrip("/")
    outputs = tuple(Value(name, shape, dtype) for shape, dtype in _infer(op, inputs, attrs, layer))
    return Node(op, tuple(inputs), outputs, attrs, layer)
