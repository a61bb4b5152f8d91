"""Graph -> the bytes of a .tflite file: tensors, operators and signatures, packed with ai-edge-litert's own schema.

What becomes of each operation is in `handlers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from keras_vits.graph.ir import Graph, Node, Value
from keras_vits.graph.ops import same_padding
from keras_vits.version import __version__

from .._forms import UnsupportedError
from .._types import lowered
from .handlers import HANDLERS
from .packages import require, schema

LIMIT = 2**31 - 2**27  # bytes of constants beyond which they go behind the flatbuffer, whose own limit is 2 GiB
NUMBER = ("float32", "int32")
ANY = ("float32", "int32", "uint8", "bool")
TYPES = {  # of the tensors that LiteRT's interpreter has kernels for, with XNNPACK and without; float32 otherwise
    **dict.fromkeys("add sub mul maximum minimum pow floor_div mod neg sign".split(), NUMBER),
    **dict.fromkeys("sum max min prod argmax top_k".split(), NUMBER),
    **dict.fromkeys("equal not_equal greater greater_equal less less_equal".split(), NUMBER),
    **dict.fromkeys("logical_and logical_or logical_not".split(), ("bool",)),
    **dict.fromkeys("reshape transpose concat slice tile reverse gather cast where".split(), ANY),
    **dict.fromkeys("pad space_to_depth depth_to_space".split(), NUMBER),
    "dequantize": ("uint8",),
}
VERSIONS = {"FULLY_CONNECTED": 5, "RESIZE_BILINEAR": 3, "RESIZE_NEAREST_NEIGHBOR": 3}  # of operators; of others 1


def write(
    graph: Graph,
    outputs: Sequence[str] = (),
    metadata_content: bytes | None = None,
    signatures: Mapping[str, Sequence[str]] | None = None,
) -> memoryview:
    """A Graph as the bytes of a .tflite file.

    Args:
        graph: a rewritten Graph.
        outputs: names of the outputs in the signatures; `output_{i}` where none is given.
        metadata_content: the bytes of the file's TFLITE_METADATA, or `None`.
        signatures: name -> names of its outputs; one with all of them by default.

    Raises:
        ValueError: an operation that LiteRT has no builtin for, named with its layer, or an output that is not there.
    """
    graph.check()
    outputs = [*outputs, *(f"output_{i}" for i in range(len(outputs), len(graph.outputs)))]
    signatures = signatures or {"serving_default": outputs}
    for signature, names in signatures.items():
        if isinstance(names, str) or not names or not set(names) <= set(outputs):
            raise ValueError(
                f"Signature {signature!r} must be a list of outputs, of {', '.join(outputs)}; received {names!r}."
            )
    writer = Writer(graph)
    for node in graph.nodes:
        writer.write(node)
    return writer.finish(outputs, signatures, metadata_content)


class Writer:
    """A file in the making. A tensor is its number.

    Args:
        graph: that is written.

    Attributes:
        S: the schema.
        fused: nodes that are part of the operator before them.
    """

    def __init__(self, graph: Graph) -> None:
        self.S: ModuleType = schema()
        self.graph = graph
        self.layer = ""
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.buffers: list[Any] = [self.S.BufferT()]
        self.codes: dict[str, tuple[int, Any]] = {}
        self.index: dict[Any, int] = {}  # Value, or (Value, layout) -> tensor
        self.names: dict[str, int] = {}  # name -> how many tensors have asked for it
        self.shared: dict[tuple[bytes, tuple[int, ...], str], int] = {}  # content of a small constant -> tensor
        self.uses = graph.consumers()
        self.fused: set[Node] = set()
        for value in graph.inputs:
            self.value(value)

    def write(self, node: Node) -> None:
        """Appends the operators that a node becomes."""
        self.layer = node.layer
        try:
            parts = lowered(node, TYPES)
        except UnsupportedError as e:
            self.unsupported(node, str(e))
        for part in parts:
            HANDLERS[part.op](self, part)

    # ---- tensors

    def tensor(self, shape: Sequence[int], name: str, dtype: str = "float32", data: np.ndarray | None = None) -> int:
        """A new tensor."""
        S, t = self.S, self.S.TensorT()
        t.shape = np.array(shape, np.int32)
        t.type = getattr(S.TensorType, dtype.upper())
        count = self.names[name] = self.names.get(name, 0) + 1
        t.name, t.buffer = (name if count == 1 else f"{name}_{count}").encode(), 0  # the quantizer needs unique names
        if data is not None:
            self.buffers.append(_Constant(S, data))
            t.buffer = len(self.buffers) - 1
        self.tensors.append(t)
        return len(self.tensors) - 1

    def value(self, value: Value | None) -> int:
        """The tensor of a Graph value; -1 for an absent optional input."""
        if value is None:
            return -1
        if value not in self.index:
            self.index[value] = self.tensor(value.shape, value.name, value.dtype, value.data)
        return self.index[value]

    def constant(self, data: Any, dtype: Any = np.int32, name: str = "constant") -> int:
        """The tensor of a small constant; equal ones are one tensor."""
        data = np.asarray(data, dtype)
        key = (data.tobytes(), data.shape, data.dtype.name)
        if key not in self.shared:
            self.shared[key] = self.tensor(data.shape, f"{self.layer}/{name}".lstrip("/"), data.dtype.name, data)
        return self.shared[key]

    def weight(self, value: Value, data: np.ndarray, form: str) -> int:
        """A weight in the layout that LiteRT wants; one tensor for each Value."""
        key = (value, form)
        if key not in self.index:
            self.index[key] = self.tensor(data.shape, value.name, value.dtype, data)
        return self.index[key]

    # ---- operators

    def emit(
        self, code: str, inputs: Sequence[int], outputs: Sequence[int], options: str | None = None, **fields: Any
    ) -> None:
        """Appends an operator.

        Args:
            code: TFLite's name of the operation.
            inputs, outputs: tensors.
            options: name of its table of options, without "Options".
            **fields: of that table.
        """
        S, o = self.S, self.S.OperatorT()
        version = VERSIONS.get(code, 1)
        if code not in self.codes:
            c = S.OperatorCodeT()
            c.builtinCode = getattr(S.BuiltinOperator, code)
            c.deprecatedBuiltinCode, c.version = min(c.builtinCode, 127), version
            self.codes[code] = (len(self.codes), c)
        o.opcodeIndex = self.codes[code][0]
        o.inputs, o.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        if options:
            o.builtinOptionsType = getattr(S.BuiltinOptions, f"{options}Options")
            o.builtinOptions = getattr(S, f"{options}OptionsT")()
            for field, x in fields.items():
                setattr(o.builtinOptions, field, x)
        self.operators.append(o)

    def emit_node(self, node: Node, code: str, options: str | None = None, **fields: Any) -> None:
        """Appends the one operator that a node is."""
        self.emit(code, [self.value(v) for v in node.inputs], [self.value(v) for v in node.outputs], options, **fields)

    def step(
        self,
        code: str,
        inputs: Sequence[int],
        shape: Sequence[int],
        name: str,
        options: str | None = None,
        *,
        dtype: str = "float32",
        **fields: Any,
    ) -> int:
        """An operator whose result is an intermediate of the node; returns its tensor."""
        out = self.tensor(shape, f"{self.layer}/{name}".lstrip("/"), dtype)
        self.emit(code, inputs, [out], options, **fields)
        return out

    def activation(self, node: Node) -> tuple[int, int]:
        """(output tensor, fused activation): a relu or relu6 that alone reads the node's output is fused into it."""
        S, readers = self.S, self.uses.get(node.output, ())
        alone = len(readers) == 1 and node.output.dtype == "float32" and node.output not in self.graph.outputs
        if alone and readers[0].op in ("relu", "relu6"):
            self.fused.add(readers[0])
            kind = S.ActivationFunctionType.RELU if readers[0].op == "relu" else S.ActivationFunctionType.RELU6
            return self.value(readers[0].output), kind
        return self.value(node.output), S.ActivationFunctionType.NONE

    def padded(
        self,
        x: int,
        shape: Sequence[int],
        pads: Sequence[tuple[int, int]],
        attrs: Mapping[str, Any],
        size: Sequence[int],
    ) -> tuple[int, int]:
        """(tensor, padding mode) for explicit pads: VALID, SAME, or an explicit PAD and VALID."""
        S = self.S
        if not any(map(any, pads)):
            return x, S.Padding.VALID
        if pads == same_padding(shape[1:3], size, attrs["strides"], attrs.get("dilation", (1, 1))):
            return x, S.Padding.SAME
        paddings = self.constant([(0, 0), *pads, (0, 0)], name="pads")
        wide = (shape[0], *(n + sum(p) for n, p in zip(shape[1:3], pads, strict=True)), shape[3])
        return self.step("PAD", [x, paddings], wide, "pad", "Pad"), S.Padding.VALID

    def unsupported(self, node: Node, why: str) -> NoReturn:
        """Raises the `ValueError` that names a node which no .tflite file can hold."""
        raise ValueError(f"Layer {node.layer!r} uses {node.op}, which a .tflite file cannot hold: {why}.")

    # ---- the file

    def finish(
        self, outputs: Sequence[str], signatures: Mapping[str, Sequence[str]], metadata_content: bytes | None
    ) -> memoryview:
        """The bytes of the file; see `write`."""
        S, model, main = self.S, self.S.ModelT(), self.S.SubGraphT()
        main.name, main.tensors, main.operators = b"main", self.tensors, self.operators
        main.inputs = np.array([self.index[v] for v in self.graph.inputs], np.int32)
        main.outputs = np.array([self.value(v) for v in self.graph.outputs], np.int32)
        model.version, model.description = 3, f"keras_vits {__version__}".encode()
        model.subgraphs, model.buffers = [main], self.buffers
        model.operatorCodes = [c for _, c in self.codes.values()]

        def entry(name: str, index: int) -> Any:
            t = S.TensorMapT()
            t.name, t.tensorIndex = name.encode(), int(index)
            return t

        places = dict(zip(outputs, main.outputs, strict=True))
        model.signatureDefs = []
        for key, names in signatures.items():
            signature = S.SignatureDefT()
            signature.signatureKey, signature.subgraphIndex = key.encode(), 0
            signature.inputs = [entry(v.name, i) for v, i in zip(self.graph.inputs, main.inputs, strict=True)]
            signature.outputs = [entry(n, places[n]) for n in names]
            model.signatureDefs.append(signature)
        if metadata_content:
            found = S.MetadataT()
            self.buffers.append(_Constant(S, np.frombuffer(metadata_content, np.uint8)))
            found.name, found.buffer = b"TFLITE_METADATA", len(self.buffers) - 1
            model.metadata = [found]
        return self._packed(model)

    def _packed(self, model: Any) -> memoryview:
        flatbuffers = require("flatbuffers")

        def packed(size: int) -> memoryview:
            builder = flatbuffers.Builder(0)
            builder.Bytes, builder.head = memoryview(np.zeros(size, np.uint8)), size  # numpy asks for huge pages
            builder.Finish(model.Pack(builder), b"TFL3")
            return builder.Bytes[builder.Head() :]

        constants = [b for b in self.buffers if isinstance(b, _Constant)]
        size = sum(c.data.nbytes + 64 for c in constants)
        tables = 1024 * (len(self.tensors) + len(self.operators)) + 4096
        if size < LIMIT:
            return packed(size + tables)
        # Constants go behind the flatbuffer, at offsets first written as 2 and, its length known, truly.
        outside = [c for c in constants if c.data.nbytes > 1024]
        for c in outside:
            c.offset, c.size = 2, c.data.nbytes
        at = len(packed(1024 * len(constants) + tables))
        for c in outside:
            at += -at % 16
            c.offset = at
            at += c.size
        content = memoryview(np.zeros(at, np.uint8))
        head = packed(1024 * len(constants) + tables)
        content[: len(head)] = head
        for c in outside:
            c.copy(content, c.offset)
        return content


class _Constant:
    """A buffer of the file (the schema's BufferT) with an array of any layout, which is copied once, in C order."""

    def __init__(self, S: ModuleType, data: np.ndarray) -> None:
        self.S, self.data = S, data
        self.offset = self.size = 0  # of data behind the flatbuffer

    def copy(self, memory: Any, at: int) -> None:
        np.frombuffer(memory, self.data.dtype, self.data.size, at).reshape(self.data.shape)[...] = self.data

    def Pack(self, builder: Any) -> int:  # noqa: N802 - the schema calls it so
        S, vector = self.S, None
        if not self.offset:
            builder.StartVector(1, self.data.nbytes, 16)  # the schema's alignment
            builder.head -= self.data.nbytes
            self.copy(builder.Bytes, builder.head)
            builder.vectorNumElems = self.data.nbytes
            vector = builder.EndVector()
        S.BufferStart(builder)
        if vector is not None:
            S.BufferAddData(builder, vector)
        S.BufferAddOffset(builder, self.offset)
        S.BufferAddSize(builder, self.size)
        return S.BufferEnd(builder)
