"""Graph -> onnx.ModelProto: static shapes, opset 20, nodes named after our layers, convolutions channels first.

Opset 20 is the first with GELU as one operation (LayerNormalization is there since 17), and the last that the Core ML
delegate of ONNX Runtime accepts operations of. Its CPU, web and mobile packages run it since version 1.17.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits.graph.ir import Graph
from keras_vits.graph.ops import definition
from keras_vits.graph.rewrite.attention import fuse_attention, join_projections
from keras_vits.version import __version__

from .._forms import Forms, UnsupportedError, identity
from .._half import HALF_MAX, risk
from .._types import lowered
from .operations import WRITERS

OPSET = 20
IR_VERSION = 9  # of onnx 1.15, which brought opset 20
LIMIT = 2**31 - 2**20  # bytes of a file: protobuf's own limit is 2 GiB
SMALL = 64  # elements: a constant that shape inference may have to read
EXTRA = 'pip install -e ".[onnx]"'

# Beside what leaves the range of half precision, single has what comes near the poles of a function or counts.
# LayerNormalization is in single inside (its stash_type), softmax subtracts the largest first.
SINGLE = frozenset("log sqrt rsqrt dequantize floor_div mod argmax top_k".split())

NUMBER = ("float32", "int32")
ANY = ("float32", "int32", "uint8", "bool")
TYPES = {  # of the tensors that ONNX Runtime's CPU has kernels for; float32 where nothing is said
    **dict.fromkeys("add sub mul div maximum minimum pow floor_div mod abs neg sign clip".split(), NUMBER),
    **dict.fromkeys("sum mean max min prod argmax top_k".split(), NUMBER),
    **dict.fromkeys("greater greater_equal less less_equal".split(), NUMBER),
    **dict.fromkeys("equal not_equal".split(), ("float32", "int32", "bool")),
    **dict.fromkeys("logical_and logical_or logical_not".split(), ("bool",)),
    **dict.fromkeys("reshape transpose concat slice tile reverse gather cast".split(), ANY),
    "pad": ANY,
    "where": ("float32", "int32", "uint8"),
    "square": NUMBER,
    "matmul": NUMBER,
    "dequantize": ("uint8", "int32"),
}


def onnx():
    """The onnx package."""
    try:
        import onnx as package
        import onnx.shape_inference
    except ImportError as e:
        raise ImportError(f"onnx is needed to write .onnx files ({e}): {EXTRA}") from None
    return package


def write(
    graph: Graph, outputs: Sequence[str] = (), *, precision: str = "float32", metadata: Mapping[str, str] | None = None
) -> Any:
    """A Graph as an ONNX model, not yet saved. Knows no Keras.

    Args:
        graph: a Graph from `rewrite`: constants are folded.
        outputs: names of the outputs; `output_{i}` where none is given.
        precision: `"float32"`, or `"float16"` for weights and computation in half precision. Inputs and outputs are
            float32 in either, and so is what half precision may overflow in (see `SINGLE` and `_half.risk`).
        metadata: key -> text, for the file's `metadata_props`.

    Returns:
        An `onnx.ModelProto` in which every tensor has a static shape. In half precision its `metadata_props` have the
        layers that are computed in float32 (`float32_layers`, a list in JSON), if there are any.

    Raises:
        ValueError: an operation, or a type of one, that ONNX or ONNX Runtime lacks, named with its layer; or a file
            larger than 2 GiB.
    """
    graph.check()
    outputs = [*outputs, *(f"output_{i}" for i in range(len(outputs), len(graph.outputs)))]
    size = sum(v.data.nbytes for v in graph.constants()) // (2 if precision == "float16" else 1)
    if size > LIMIT:
        raise ValueError(
            f"An ONNX file holds at most 2 GiB; the weights of {graph.name!r} have {size / 2**30:.1f} GiB: export it "
            "with precision='float16', or for LiteRT."
        )
    graph = join_projections(fuse_attention(graph), fused=False)  # heads of q, k and v are moved at once
    return _Writer(graph, precision == "float16").model(outputs, metadata or {})


class _Writer(Forms):
    """Writes a Graph's nodes; a variable is the name of an ONNX tensor."""

    def __init__(self, graph: Graph, half: bool):
        super().__init__()
        self.onnx = onnx()
        T = self.onnx.TensorProto
        self.kinds = {"float32": T.FLOAT, "int32": T.INT32, "uint8": T.UINT8, "bool": T.BOOL, "float16": T.FLOAT16}
        self.graph, self.half = graph, half
        self.nodes, self.initializers = [], {}  # name -> array
        self.types = {}  # variable -> "float32", "float16", ...
        self.literals = {}  # content -> name of an initializer
        self.casts = {}  # (variable, dtype) -> variable
        self.taken = {}
        self.renamed = set()  # names of outputs that nodes have got
        self.layer, self.precision = "", "float32"
        self.distrusted = {}  # layer -> None: those that are in float32 in a file of half precision

    # ---- names and constants

    def unique(self, name):
        count = self.taken[name] = self.taken.get(name, -1) + 1
        return f"{name}_{count}" if count else name

    def constant(self, array, name="constant"):
        """An initializer; small equal ones are one."""
        array = np.asarray(array, order="C")  # a scalar stays one
        key = (array.tobytes(), array.shape, array.dtype.name) if array.size <= SMALL else None
        if key not in self.literals:
            name = self.unique(f"{self.layer}/{name}".lstrip("/"))
            self.initializers[name], self.types[name] = array, array.dtype.name
            if key is None:
                return name
            self.literals[key] = name
        return self.literals[key]

    def integers(self, numbers, name):
        """An initializer of int64, as shapes and axes are."""
        return self.constant(np.array(numbers, np.int64), name)

    def number(self, x, name):
        """A scalar of the precision at hand."""
        return self.constant(np.array(x, self.precision), name)

    def literal(self, value, array):
        """The initializer of a constant Value; floats are of the precision at hand."""
        dtype = self.precision if value.dtype == "float32" else value.dtype
        known = self.literals.setdefault((value, array.shape, dtype), [])
        name = next((name for name, other in known if np.array_equal(array, other)), None)
        if name is None:
            name = self.unique(value.name)
            self.initializers[name], self.types[name] = np.asarray(array, dtype, order="C"), dtype
            known.append((name, array))
        return name

    # ---- nodes

    def emit(self, op, *inputs, name=None, dtype=None, count=1, **attributes):
        """Appends a node, named after the present layer; float inputs are cast to the precision at hand.

        Args:
            op: ONNX's name.
            *inputs: variables; `""` for an absent one.
            name: of what it computes; the operation's by default.
            dtype: of the outputs; by default that of the first input.
            count: of the outputs.
            **attributes: of the node.

        Returns:
            The output's variable, or a list of them.
        """
        inputs = [self.cast(v) for v in inputs]
        return self.append(op, inputs, name or op, dtype or self.types[inputs[0]], count, attributes)

    def append(self, op, inputs, name, dtype, count=1, attributes=None):
        name = self.unique(f"{self.layer}/{name}".lstrip("/"))
        names = [name, *(f"{name}/output_{i}" for i in range(1, count))]
        self.nodes.append(self.onnx.helper.make_node(op, inputs, names, name=name, **(attributes or {})))
        self.types.update(dict.fromkeys(names, dtype))
        return name if count == 1 else names

    def cast(self, variable):
        """A float variable in the precision at hand, another one as it is."""
        if variable == "" or self.types[variable] not in ("float32", "float16"):
            return variable
        return self.as_type(variable, self.precision)

    def as_type(self, variable, dtype):
        if self.types[variable] == dtype:
            return variable
        key = (variable, dtype)
        if key not in self.casts:
            self.casts[key] = self.append(
                "Cast", [variable], f"to_{dtype}", dtype, attributes=dict(to=self.kinds[dtype])
            )
        return self.casts[key]

    def emit_reshape(self, variable, shape):
        return self.append("Reshape", [variable, self.integers(shape, "shape")], "Reshape", self.types[variable])

    def emit_transpose(self, variable, perm):
        return self.append(
            "Transpose", [variable], "Transpose", self.types[variable], attributes=dict(perm=[int(p) for p in perm])
        )

    # ---- the file

    def model(self, outputs, metadata):
        helper = self.onnx.helper
        inputs = []
        for value in self.graph.inputs:
            name = self.unique(value.name)
            self.types[name] = value.dtype
            self.forms[value] = {identity(len(value.shape)): name}
            inputs.append(helper.make_tensor_value_info(name, self.kinds[value.dtype], value.shape))
        for name in outputs:
            self.taken.setdefault(name, 0)
        for node in self.graph.nodes:
            self.write(node)
        self.layer = ""
        found = [self.output(value, name) for value, name in zip(self.graph.outputs, outputs, strict=True)]
        graph = helper.make_graph(self.nodes, self.graph.name, inputs, found)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="keras_vits",
            producer_version=__version__,
        )
        single = {"float32_layers": json.dumps(list(self.distrusted))} if self.distrusted else {}
        helper.set_model_props(model, {**metadata, **single})
        tensor = self.onnx.numpy_helper.from_array
        model.graph.initializer.extend(tensor(array, name) for name, array in self.initializers.items())
        add_shapes(model)
        return model

    def write(self, node):
        self.layer = node.layer
        if node.op not in WRITERS:
            raise ValueError(f"ONNX has no operation for {node.op!r} in layer {node.layer!r}.")
        try:
            for part in lowered(node, TYPES):
                self.precision = self.precision_of(part)
                if self.half and self.precision == "float32" and any(v.dtype == "float32" for v in part.outputs):
                    self.distrusted[node.layer] = None
                self.keep(part.outputs, WRITERS[part.op](self, part, *part.inputs, **part.attrs))
        except UnsupportedError as e:
            raise ValueError(f"{node.op!r} in layer {node.layer!r} cannot be written for ONNX: {e}.") from None

    def precision_of(self, node):
        """What the floats of this node are computed in."""
        if not self.half or risk(node) or node.op in SINGLE:
            return "float32"
        for value in node.inputs:
            if value is not None and value.data is not None and value.dtype == "float32" and value.data.size:
                if np.abs(value.data[np.isfinite(value.data)]).max(initial=0) > HALF_MAX:
                    return "float32"
        op = definition(node.op)
        if op.elementwise or op.arrangement or op.chooses:  # what single precision holds may not fit into half
            for value in node.inputs:
                if value is not None and value.data is None and self.dtype(value) == "float32":
                    return "float32"
        if node.op == "layer_norm" and self.dtype(node.inputs[0]) == "float32":
            return "float32"
        return "float16"

    def dtype(self, value):
        """Of the form at hand of a Value."""
        while not self.forms[value]:
            value = self.reshaped[value]
        return self.types[next(iter(self.forms[value].values()))]

    def output(self, value, name):
        """The file's output; the node that computes it gives it this name where it can."""
        if value.data is not None:
            self.precision = "float32"
        variable = self.form(value)
        if value.dtype == "float32":
            variable = self.as_type(variable, "float32")
        made = next((n for n in self.nodes if variable in n.output), None)
        if made is None or variable in self.renamed:
            self.nodes.append(self.onnx.helper.make_node("Identity", [variable], [name], name=name))
        else:
            self.renamed.add(name)
            for node in self.nodes:
                for names in (node.input, node.output):
                    names[:] = [name if n == variable else n for n in names]
            for forms in self.forms.values():
                forms.update({order: name for order, v in forms.items() if v == variable})
            self.casts.update({key: name for key, v in self.casts.items() if v == variable})
        self.types[name] = value.dtype
        return self.onnx.helper.make_tensor_value_info(name, self.kinds[value.dtype], value.shape)


def add_shapes(model):
    """Gives every tensor of a model its static shape, found without the weights, which protobuf would copy."""
    package = onnx()
    graph = package.helper.make_graph(model.graph.node, model.graph.name, model.graph.input, model.graph.output)
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims) <= SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(package.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    light = package.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    found = package.shape_inference.infer_shapes(light, check_type=True, strict_mode=True, data_prop=True)
    del model.graph.value_info[:]
    model.graph.value_info.extend(found.graph.value_info)
