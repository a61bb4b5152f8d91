"""LiteRT: Graph -> .tflite written with ai-edge-litert's own schema, quantized by ai-edge-quantizer, run by the
interpreter.

The file has a static batch, a signature with named inputs and outputs, fused activations, and only operations that one
XNNPACK partition holds. Neither TensorFlow nor PyTorch is needed.
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import math
import pathlib
import warnings

import numpy as np

from keras_vits._util import files
from keras_vits.graph.ir import Node, constant, histogram, make_node
from keras_vits.graph.ops import same_padding
from keras_vits.graph.rewrite import rewrite, with_head, with_layout, with_pixels
from keras_vits.specs import of_model, read_outputs
from keras_vits.version import __version__

from ... import artifact as artifacts
from ...quantize.calibration import batches
from ...quantize.recipes import check_calibrated, checked_recipe
from .._protocol import Target, Traits
from .metadata import add_labels, metadata
from .quantization import FEW_CHANNELS, Choice, Preparation

EXTRA = 'pip install "keras-vits[litert]"'


def export(
    model,
    folder,
    *,
    batch=1,
    image_size=None,
    layout="nhwc",
    uint8_input=False,
    head="logits",
    top_k=5,
    features=(),
    signatures=None,
    kinds=None,
    author="",
    license="",
    version="",
    name=None,
):
    """Writes a model as a float32 .tflite file.

    Args:
        model: a `VisionModel`, or any functional `keras.Model` of one image input.
        folder: where `<name>_float32.tflite` and its .json go; made if it is missing.
        batch: B, static.
        image_size: pixels, or (height, width), of the file's images, if not the model's own; see `VisionModel.resized`.
        layout: of the file's images, `"nhwc"` or, with one transposition in the graph, `"nchw"`: (B,C,H,W).
        uint8_input: the file takes camera pixels (B,H,W,C) 0 to 255, RGB; the model's preprocessing is in the graph.
        head: `"logits"`, `"softmax"` (probabilities) or `"top_k"` (probabilities and class numbers, descending).
        top_k: how many classes `"top_k"` returns.
        features: layers whose outputs the file gives, too, by name (or number of the block) as `model.features` takes
            them.
        signatures: name -> outputs of a call by this name, e.g. `{"classify": ["logits"], "embed": ["pool"]}`: the
            outputs of the head and names of `features`. By default one, `"serving_default"`, with all outputs.
        kinds: name -> kind of output, of a foreign model whose graph does not tell it; see `specs.read_outputs`.
        author, license, version: texts for the file's metadata, beside name, labels and normalisation.
        name: of the file and the artifact; the model's name by default.

    Returns:
        An `Artifact`. Class names, when the model has them, lie in the file's metadata as `labels.txt`.

    Raises:
        ValueError: an operation without a translation (named with its layer), an unknown head, layout, layer or output,
            an image size that the weights do not fit, or a folder that cannot be written. Nothing is half-written.
    """
    import keras

    from keras_vits.graph.trace import trace

    _schema()
    name = name or model.name
    if image_size is not None:
        if not hasattr(model, "resized"):
            raise ValueError(f"image_size needs a VisionModel; received {type(model).__name__}: build it at that size.")
        model = model.resized(image_size)
    preprocessing = getattr(model, "preprocessing", None)
    taps = {layer: model.get_layer(layer).output for layer in _layer_names(model, features)}
    graph = trace(
        keras.Model(model.inputs, [*keras.tree.flatten(model.output), *taps.values()], name=name) if taps else model,
        batch,
    )
    traced = len(graph.nodes)
    inputs, specs = of_model(
        model, dataclasses.replace(graph, outputs=graph.outputs[: len(graph.outputs) - len(taps)]), kinds
    )
    tapped = dataclasses.replace(graph, outputs=graph.outputs[len(specs) :])
    specs += read_outputs(tapped, list(taps))
    if uint8_input:
        if preprocessing is None:
            raise ValueError(
                "uint8_input=True needs model.preprocessing, which this model does not have. Export float32 input."
            )
        graph = with_pixels(graph, preprocessing)
    graph, specs = with_head(graph, specs, head, top_k)
    graph = rewrite(with_layout(graph, layout))
    inputs = tuple(
        dataclasses.replace(spec, dtype=value.dtype, layout=layout if spec.is_image else spec.layout)
        for spec, value in zip(inputs, graph.inputs, strict=True)
    )
    class_names = next((spec.class_names for spec in specs if spec.class_names), ())
    outputs = tuple(spec.name for spec in specs)
    about = metadata(name, inputs[0], preprocessing, outputs, class_names, author, license, version)
    content = write(graph, outputs, about, signatures)
    path = pathlib.Path(folder) / f"{name}_float32.tflite"
    with files.alone(path.parent):
        runtime = _save(path, content, class_names)
        tools = {
            "keras_vits": __version__,
            "keras": keras.__version__,
            "backend": keras.backend.backend(),
            "litert_runtime": runtime,
        }
        return artifacts.make(
            path,
            format="litert",
            recipe="float32",
            model=name,
            inputs=inputs,
            outputs=specs,
            tools=tools,
            operations=(traced, len(graph.nodes)),
            trained_for=dataclasses.asdict(model.trained_for) if getattr(model, "trained_for", None) else {},
        )


def _layer_names(model, features):
    """Names of the layers that `features` means, each once."""
    if features and not hasattr(model, "features"):
        known = {layer.name for layer in model.layers}
        if unknown := [str(name) for name in features if name not in known]:
            raise ValueError(f"{model.name} has no layer {', '.join(unknown)}; it has: {', '.join(sorted(known))}.")
        return dict.fromkeys(features)
    return dict.fromkeys(model._name(key) for key in features)


def quantize(artifact, recipe, calibration=None, folder=None, *, float_layers=()):
    """Quantizes a float32 .tflite file.

    Args:
        artifact: what `export` returned.
        recipe: name of one of `recipes.RECIPES`, such as `"dynamic_int8"` or `"static_int8"`.
        calibration: images as the file takes them: an array (N,H,W,C), a data set that yields batches of images or
            (images, labels), or a folder of pictures. Some tens of real images are enough; all are held in memory. A
            static recipe needs them, unless `edge.qat` made the model for it and so chose the ranges; every integer one
            gets nearer to the float file with them.
        folder: where the new file goes; beside the float one by default.
        float_layers: names of layers, or of what they lie in (`"block_3"`), that stay in float.

    Returns:
        The `Artifact` of `<model>_<recipe>.tflite`, with `_float<n>` in its name where n layers were named.

    Raises:
        ValueError: an unknown recipe or layer, an artifact that is not a float32 .tflite file, or calibration that is
            missing, empty, of another shape, or not finite.
    """
    recipe = checked_recipe(recipe, "litert")
    if artifact.format != "litert" or artifact.recipe != "float32":
        raise ValueError(
            f"Only a float32 LiteRT artifact can be quantized; received {artifact.format} {artifact.recipe}."
        )
    choice = None
    if calibration is None and artifact.trained_for.get("recipe") == recipe.name:
        choice = Choice(**artifact.trained_for)
    if choice is None:
        check_calibrated(recipe, calibration)
    _import("ai_edge_quantizer.quantizer")
    images = None
    if calibration is not None:
        images = list(batches(calibration, artifact.input, artifact.preprocessing, "reading images"))
    prepared = Preparation(artifact.path.read_bytes(), recipe, images, of_bytes, float_layers, choice=choice)
    content = prepared.quantized()
    mixed = f"_float{len(float_layers)}" if float_layers else ""
    path = pathlib.Path(folder or artifact.path.parent) / f"{artifact.model}_{recipe.name}{mixed}.tflite"
    with files.alone(path.parent):
        runtime = _save(path, content, artifact.class_names)
        tools = {
            **artifact.tools,
            "litert_runtime": runtime,
            "ai_edge_quantizer": importlib.metadata.version("ai-edge-quantizer"),
        }
        return artifacts.remake(artifact, path, recipe=recipe.name, tools=tools, trained_for={})


def of_bytes(content, keep=False):
    """An interpreter of a file's bytes; `keep`: one that keeps every tensor, and runs slowly."""
    options = dict(experimental_op_resolver_type=_without_delegates(), experimental_preserve_all_tensors=True)
    with warnings.catch_warnings(action="ignore"):  # "preserve_all_tensors is for debugging": it is what it is for
        interpreter = interpreter_class()[0](model_content=content, num_threads=2, **(options if keep else {}))
    interpreter.allocate_tensors()
    return interpreter


def _save(path, content, class_names):
    """Writes the file whole, after an interpreter has accepted it; returns the runtime's name and version."""
    with files.writing(path) as temporary:
        temporary.write_bytes(content)
        add_labels(temporary, class_names)
        _, runtime = _interpreter(temporary, experimental_op_resolver_type=_without_delegates())
        return runtime


def _interpreter(path, **options):
    """(interpreter with its tensors, "package version" of the runtime); a `ValueError` for a file it cannot run."""
    path = pathlib.Path(path)
    head = b""
    if path.is_file():
        with open(path, "rb") as file:
            head = file.read(8)
    if head[4:] != b"TFL3":
        raise ValueError(f"{path} is not a .tflite file: {'it does not start like one' if head else 'no such file'}.")
    cls, runtime = interpreter_class()
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # "preserve_all_tensors is for debugging": it is what calibration needs
            interpreter = cls(model_path=str(path), **options)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ValueError(
            f"{path} cannot be run: the file is truncated or damaged ({reason}). Export it again."
        ) from None
    return interpreter, runtime


def _without_delegates():
    return _import("ai_edge_litert.interpreter").OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES


def _import(name):
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ImportError(
            f"{name.split('.')[0]} is needed to write and quantize .tflite files ({e}): {EXTRA}"
        ) from None


def _schema():
    return _import("ai_edge_litert.schema_py_generated")


# ---------------------------------------------------------------- running


def load(artifact, threads=2):
    """A `Runner` of an artifact."""
    return Runner(artifact.path, threads, artifact.inputs, artifact.output_names)


def interpreter_class():
    """The LiteRT interpreter class and its "package version": ai_edge_litert, else tflite_runtime, else TensorFlow."""
    for module, package in (
        ("ai_edge_litert", "ai-edge-litert"),
        ("tflite_runtime", "tflite-runtime"),
        ("tensorflow.lite", "tensorflow"),
    ):
        try:
            cls = importlib.import_module(
                f"{module}.interpreter" if module != "tensorflow.lite" else "tensorflow"
            ).__dict__
            cls = cls["Interpreter"] if "Interpreter" in cls else cls["lite"].Interpreter
            return cls, f"{module} {importlib.metadata.version(package)}"
        except (ImportError, KeyError):
            continue
    raise ImportError(f"No LiteRT interpreter is installed: {EXTRA}")


class Runner:
    """Runs a .tflite file on the host with XNNPACK.

    Args:
        path: of the file.
        threads: for the interpreter.
        inputs: the artifact's `InputSpec`s; without them, arrays are taken as the file takes them.
        outputs: names of the outputs in the file's order; `output_{i}` by default.

    Attributes:
        runtime: name and version of the package that runs it.
        verified_by: what a check by this runner rests on.

    Raises:
        ValueError: the file is not a .tflite file, is truncated, or holds an operation that the runtime lacks.
    """

    def __init__(self, path, threads=2, inputs=(), outputs=()):
        self.interpreter, self.runtime = _interpreter(path, num_threads=threads)
        self.verified_by = self.runtime
        self.inputs = self.interpreter.get_input_details()
        self.specs = inputs
        count = len(self.interpreter.get_output_details())
        self.outputs = tuple(outputs) or tuple(f"output_{i}" for i in range(count))
        signatures = self.interpreter.get_signature_list()
        self.signature = next(iter(signatures), None)

    def run(self, *arrays):
        """One invocation: arrays of the file's shapes and dtypes -> list of outputs in the file's order."""
        for detail, array in zip(self.inputs, arrays, strict=True):
            self.interpreter.set_tensor(detail["index"], array)
        self.interpreter.invoke()
        return [self.interpreter.get_tensor(o["index"]) for o in self.interpreter.get_output_details()]

    def predict(self, inputs):
        """Runs any number N of examples, padding the last batch with zeros.

        Args:
            inputs: the array (N,...) of the one input, images as (N,H,W,C), or name -> array.

        Returns:
            The array (N,...) of the one output, or name -> array where the file has several.
        """
        count, batches = self.batches(inputs)
        parts = zip(*(self.run(*arrays) for arrays in batches), strict=True)
        return self.named([np.concatenate(part)[:count] for part in parts])

    def batches(self, inputs):
        """N, and the arrays of each invocation as the file takes them, the last one padded with zeros."""
        if not isinstance(inputs, dict):
            arrays = [inputs]
        else:
            arrays = [inputs[spec.name] for spec in self.specs]
        arrays = [np.asarray(x, detail["dtype"]) for x, detail in zip(arrays, self.inputs, strict=True)]
        count, batch = len(arrays[0]), int(self.inputs[0]["shape"][0])
        arrays = [np.concatenate([x, np.zeros((-count % batch, *x.shape[1:]), x.dtype)]) for x in arrays]
        stored = [spec.as_stored for spec in self.specs] or [np.asarray] * len(arrays)
        starts = range(0, len(arrays[0]), batch)
        return count, [[f(x[i : i + batch]) for f, x in zip(stored, arrays, strict=True)] for i in starts]

    def named(self, arrays):
        """The array of the one output, or name -> array."""
        return arrays[0] if len(arrays) == 1 else dict(zip(self.outputs, arrays, strict=True))

    def partitions(self):
        """Number of XNNPACK partitions; 1 means that the whole file runs on it."""
        return sum(op["op_name"] == "DELEGATE" for op in self.interpreter._get_ops_details())

    def histogram(self):
        """Number of operations in the file by name, most frequent first."""
        names = (op["op_name"] for op in self.interpreter._get_ops_details())
        return histogram(name for name in names if name != "DELEGATE")


# ---------------------------------------------------------------- writing

LIMIT = 2**31 - 2**27  # bytes of constants beyond which they go behind the flatbuffer, whose own limit is 2 GiB


def write(graph, outputs=(), metadata_content=None, signatures=None):
    """A Graph as the bytes (a memoryview) of a .tflite file.

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
    writer = _Writer(graph)
    for node in graph.nodes:
        writer.layer = node.layer
        WRITERS[node.op](writer, node)
    return writer.finish(outputs, signatures, metadata_content)


class _Writer:
    def __init__(self, graph):
        self.S = _schema()
        self.graph = graph
        self.layer = ""
        self.tensors, self.operators, self.buffers, self.codes = [], [], [self.S.BufferT()], {}
        self.index = {}  # Value -> tensor
        self.names = {}  # name -> how many tensors have asked for it
        self.shared = {}  # content of a small constant -> tensor
        self.uses = graph.consumers()
        self.fused = set()
        for value in graph.inputs:
            self.value(value)

    # ---- tensors

    def tensor(self, shape, name, dtype="float32", data=None):
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

    def value(self, value):
        """The tensor of a Graph value; -1 for an absent optional input."""
        if value is None:
            return -1
        if value not in self.index:
            self.index[value] = self.tensor(value.shape, value.name, value.dtype, value.data)
        return self.index[value]

    def constant(self, data, dtype=np.int32, name="constant"):
        data = np.asarray(data, dtype)
        key = (data.tobytes(), data.shape, data.dtype.name)
        if key not in self.shared:
            self.shared[key] = self.tensor(data.shape, f"{self.layer}/{name}".lstrip("/"), data.dtype.name, data)
        return self.shared[key]

    def weight(self, value, data, form):
        """A weight in the layout that LiteRT wants; one tensor for each Value."""
        key = (value, form)
        if key not in self.index:
            self.index[key] = self.tensor(data.shape, value.name, value.dtype, data)
        return self.index[key]

    # ---- operators

    def emit(self, code, inputs, outputs, options=None, **fields):
        """Appends an operator; `options` names its options table, `fields` sets it."""
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

    def step(self, code, inputs, shape, name, options=None, **fields):
        """An operator whose result is an intermediate of the node; returns its tensor."""
        out = self.tensor(shape, f"{self.layer}/{name}".lstrip("/"))
        self.emit(code, inputs, [out], options, **fields)
        return out

    def activation(self, node):
        """(output tensor, fused activation): a relu or relu6 that alone reads the node's output is fused into it."""
        S, readers = self.S, self.uses.get(node.output, ())
        if len(readers) == 1 and readers[0].op in ("relu", "relu6") and node.output not in self.graph.outputs:
            self.fused.add(readers[0])
            kind = S.ActivationFunctionType.RELU if readers[0].op == "relu" else S.ActivationFunctionType.RELU6
            return self.value(readers[0].output), kind
        return self.value(node.output), S.ActivationFunctionType.NONE

    def padded(self, x, shape, pads, attrs, size):
        """(tensor, padding mode) for explicit pads: VALID, SAME, or an explicit PAD and VALID."""
        S = self.S
        if not any(map(any, pads)):
            return x, S.Padding.VALID
        if pads == same_padding(shape[1:3], size, attrs["strides"], attrs.get("dilation", (1, 1))):
            return x, S.Padding.SAME
        paddings = self.constant([(0, 0), *pads, (0, 0)], name="pads")
        wide = (shape[0], *(n + sum(p) for n, p in zip(shape[1:3], pads, strict=True)), shape[3])
        return self.step("PAD", [x, paddings], wide, "pad", "Pad"), S.Padding.VALID

    def unsupported(self, node, why):
        raise ValueError(f"Layer {node.layer!r} uses {node.op}, which a .tflite file cannot hold: {why}.")

    # ---- the file

    def finish(self, outputs, signatures, metadata_content):
        S, model, main = self.S, self.S.ModelT(), self.S.SubGraphT()
        main.name, main.tensors, main.operators = b"main", self.tensors, self.operators
        main.inputs = np.array([self.index[v] for v in self.graph.inputs], np.int32)
        main.outputs = np.array([self.value(v) for v in self.graph.outputs], np.int32)
        model.version, model.description = 3, f"keras_vits {__version__}".encode()
        model.subgraphs, model.buffers = [main], self.buffers
        model.operatorCodes = [c for _, c in self.codes.values()]

        def entry(name, index):
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
        return self.pack(model)

    def pack(self, model):
        flatbuffers = _import("flatbuffers")

        def packed(size):
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

    def __init__(self, S, data):
        self.S, self.data = S, data
        self.offset = self.size = 0  # of data behind the flatbuffer

    def copy(self, memory, at):
        np.frombuffer(memory, self.data.dtype, self.data.size, at).reshape(self.data.shape)[...] = self.data

    def Pack(self, builder):  # noqa: N802 - the schema calls it so
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


VERSIONS = {
    "FULLY_CONNECTED": 5,
    "GELU": 1,
    "BATCH_MATMUL": 1,
    "RESIZE_BILINEAR": 3,
    "RESIZE_NEAREST_NEIGHBOR": 3,
    "DEQUANTIZE": 1,
}


# ---- one function for each primitive: (writer, node) -> None

WRITERS = {}


def writes(*ops):
    def register(function):
        for op in ops:
            WRITERS[op] = function
        return function

    return register


def _simple(code, options=None, **fields):
    def write_node(w, node):
        w.emit(code, [w.value(v) for v in node.inputs], [w.value(node.output)], options, **fields)

    return write_node


WRITERS.update(
    maximum=_simple("MAXIMUM", "MaximumMinimum"),
    minimum=_simple("MINIMUM", "MaximumMinimum"),
    pow=_simple("POW", "Pow"),
    floor_div=_simple("FLOOR_DIV", "FloorDiv"),
    mod=_simple("FLOOR_MOD", "FloorMod"),
    equal=_simple("EQUAL", "Equal"),
    not_equal=_simple("NOT_EQUAL", "NotEqual"),
    greater=_simple("GREATER", "Greater"),
    greater_equal=_simple("GREATER_EQUAL", "GreaterEqual"),
    less=_simple("LESS", "Less"),
    less_equal=_simple("LESS_EQUAL", "LessEqual"),
    logical_and=_simple("LOGICAL_AND", "LogicalAnd"),
    logical_or=_simple("LOGICAL_OR", "LogicalOr"),
    logical_not=_simple("LOGICAL_NOT", "LogicalNot"),
    where=_simple("SELECT_V2", "SelectV2"),
    abs=_simple("ABS", "Abs"),
    neg=_simple("NEG", "Neg"),
    exp=_simple("EXP", "Exp"),
    log=_simple("LOG"),
    sqrt=_simple("SQRT"),
    rsqrt=_simple("RSQRT"),
    square=_simple("SQUARE", "Square"),
    sin=_simple("SIN"),
    cos=_simple("COS", "Cos"),
    tanh=_simple("TANH"),
    floor=_simple("FLOOR"),
    ceil=_simple("CEIL"),
    round=_simple("ROUND"),
    sign=_simple("SIGN", "Sign"),
    sigmoid=_simple("LOGISTIC"),
    hard_swish=_simple("HARD_SWISH", "HardSwish"),
)


@writes("add", "sub", "mul", "div")
def _(w, node):
    out, activation = w.activation(node)
    options = node.op.capitalize()
    w.emit(node.op.upper(), [w.value(v) for v in node.inputs], [out], options, fusedActivationFunction=activation)


@writes("relu", "relu6")
def _(w, node):
    if node not in w.fused:
        _simple(node.op.upper())(w, node)


@writes("gelu")
def _(w, node):
    _simple("GELU", "Gelu", approximate=node.attrs["approximate"])(w, node)


@writes("leaky_relu")
def _(w, node):
    _simple("LEAKY_RELU", "LeakyRelu", alpha=node.attrs["alpha"])(w, node)


@writes("elu")
def _(w, node):
    if node.attrs["alpha"] != 1.0:
        w.unsupported(node, "ELU has alpha 1 there")
    _simple("ELU")(w, node)


@writes("erf")
def _(w, node):
    w.unsupported(node, "it has no error function; use keras.activations.gelu for a GELU")


@writes("silu")
def _(w, node):
    x = w.value(node.inputs[0])
    gate = w.step("LOGISTIC", [x], node.output.shape, "sigmoid")
    w.emit("MUL", [x, gate], [w.value(node.output)], "Mul")


@writes("hard_sigmoid")
def _(w, node):  # relu6(x + 3) / 6
    x, three, sixth = w.value(node.inputs[0]), w.constant(3.0, np.float32), w.constant(1 / 6, np.float32)
    y = w.step(
        "ADD", [x, three], node.output.shape, "shift", "Add", fusedActivationFunction=w.S.ActivationFunctionType.RELU6
    )
    w.emit("MUL", [y, sixth], [w.value(node.output)], "Mul")


@writes("softplus")
def _(w, node):  # relu(x) + log(1 + exp(-|x|))
    x, shape = w.value(node.inputs[0]), node.output.shape
    y = w.step("NEG", [w.step("ABS", [x], shape, "abs", "Abs")], shape, "neg", "Neg")
    y = w.step("ADD", [w.step("EXP", [y], shape, "exp", "Exp"), w.constant(1.0, np.float32)], shape, "add", "Add")
    y = w.step("LOG", [y], shape, "log")
    w.emit("ADD", [w.step("RELU", [x], shape, "relu"), y], [w.value(node.output)], "Add")


@writes("clip")
def _(w, node):
    low, high = (w.constant(node.attrs[k], np.float32, k) for k in ("low", "high"))
    y = w.step("MAXIMUM", [w.value(node.inputs[0]), low], node.output.shape, "low", "MaximumMinimum")
    w.emit("MINIMUM", [y, high], [w.value(node.output)], "MaximumMinimum")


@writes("cast")
def _(w, node):
    T = w.S.TensorType
    dtypes = dict(
        inDataType=getattr(T, node.inputs[0].dtype.upper()), outDataType=getattr(T, node.output.dtype.upper())
    )
    _simple("CAST", "Cast", **dtypes)(w, node)


@writes("dequantize")
def _(w, node):
    q = w.tensors[w.value(node.inputs[0])]
    q.quantization = w.S.QuantizationParametersT()
    q.quantization.scale = np.array([node.attrs["scale"]], np.float32)
    q.quantization.zeroPoint = np.array([node.attrs["zero_point"]], np.int64)
    _simple("DEQUANTIZE", "Dequantize")(w, node)


@writes("softmax")
def _(w, node):
    x, out, shape, axis = w.value(node.inputs[0]), w.value(node.output), node.output.shape, node.attrs["axis"]
    if math.prod(shape[axis + 1 :]) == 1:
        if axis == len(shape) - 1:
            w.emit("SOFTMAX", [x], [out], "Softmax", beta=1.0)
            return
        x = w.step(
            "RESHAPE",
            [x, w.constant(shape[: axis + 1])],
            shape[: axis + 1],
            "rows",
            "Reshape",
            newShape=list(shape[: axis + 1]),
        )
        x = w.step("SOFTMAX", [x], shape[: axis + 1], "softmax", "Softmax", beta=1.0)
        w.emit("RESHAPE", [x, w.constant(shape)], [out], "Reshape", newShape=list(shape))
        return
    perm = [i for i in range(len(shape)) if i != axis] + [axis]
    moved = [shape[p] for p in perm]
    x = w.step("TRANSPOSE", [x, w.constant(perm)], moved, "rows", "Transpose")
    x = w.step("SOFTMAX", [x], moved, "softmax", "Softmax", beta=1.0)
    w.emit("TRANSPOSE", [x, w.constant(np.argsort(perm))], [out], "Transpose")


SMALLEST_SPREAD = 1e-4  # of a row, from its least to its largest number: one that half precision can divide by


@writes("layer_norm")
def _(w, node):
    """y * rsqrt(mean(y^2) + epsilon / m^2), where y = (x - mean) / m and m = max x - min x: a phone's GPU computes in
    half precision, in which the square of 256 overflows and that of 0.0001 is zero."""
    value, gamma, beta = node.inputs
    x, shape, axes = w.value(value), value.shape, w.constant(node.attrs["axes"], name="axes")
    row = [1 if i in node.attrs["axes"] else n for i, n in enumerate(shape)]
    mean = w.step("MEAN", [x, axes], row, "mean", "Reducer", keepDims=True)
    largest = w.step("REDUCE_MAX", [x, axes], row, "largest", "Reducer", keepDims=True)
    least = w.step("REDUCE_MIN", [x, axes], row, "least", "Reducer", keepDims=True)
    root = math.sqrt(node.attrs["epsilon"])
    smallest = w.constant(max(SMALLEST_SPREAD, root), np.float32, "smallest")  # so that epsilon / m^2 is at most 1
    spread = w.step("SUB", [largest, least], row, "range", "Sub")
    spread = w.step("MAXIMUM", [spread, smallest], row, "spread", "MaximumMinimum")
    centred = w.step("SUB", [x, mean], shape, "centred", "Sub")
    centred = w.step("DIV", [centred, spread], shape, "scaled", "Div")
    square = w.step("MUL", [centred, centred], shape, "square", "Mul")
    variance = w.step("MEAN", [square, axes], row, "variance", "Reducer", keepDims=True)
    epsilon = w.step("DIV", [w.constant(root, np.float32, "epsilon"), spread], row, "root", "Div")
    epsilon = w.step("MUL", [epsilon, epsilon], row, "shift", "Mul")
    shifted = w.step("ADD", [variance, epsilon], row, "shifted", "Add")
    steps = [("MUL", w.step("RSQRT", [shifted], row, "rsqrt"))]
    steps += [("MUL", w.value(gamma))] if gamma is not None else []
    steps += [("ADD", w.value(beta))] if beta is not None else []
    y = centred
    for code, by in steps[:-1]:
        y = w.step(code, [y, by], shape, code.lower(), code.capitalize())
    code, by = steps[-1]
    w.emit(code, [y, by], [w.value(node.output)], code.capitalize())


@writes("mean", "sum", "max", "min", "prod")
def _(w, node):
    code = {"mean": "MEAN", "sum": "SUM", "max": "REDUCE_MAX", "min": "REDUCE_MIN", "prod": "REDUCE_PROD"}[node.op]
    inputs = [w.value(node.inputs[0]), w.constant(node.attrs["axes"], name="axes")]
    w.emit(code, inputs, [w.value(node.output)], "Reducer", keepDims=node.attrs["keepdims"])


@writes("argmax")
def _(w, node):
    axis = w.constant(node.attrs["axis"], name="axis")
    w.emit(
        "ARG_MAX", [w.value(node.inputs[0]), axis], [w.value(node.output)], "ArgMax", outputType=w.S.TensorType.INT32
    )


@writes("top_k")
def _(w, node):
    w.emit(
        "TOPK_V2",
        [w.value(node.inputs[0]), w.constant(node.attrs["k"], name="k")],
        [w.value(v) for v in node.outputs],
        "TopKV2",
    )


def _arranged(code, attr, options, dtype=np.int32):
    """An operator whose second input is the constant attribute."""

    def write_node(w, node):
        w.emit(
            code, [w.value(node.inputs[0]), w.constant(node.attrs[attr], dtype, attr)], [w.value(node.output)], options
        )

    return write_node


WRITERS.update(
    transpose=_arranged("TRANSPOSE", "perm", "Transpose"),
    tile=_arranged("TILE", "reps", "Tile"),
    reverse=_arranged("REVERSE_V2", "axes", "ReverseV2"),
)


@writes("reshape")
def _(w, node):
    shape = node.attrs["shape"]
    w.emit(
        "RESHAPE",
        [w.value(node.inputs[0]), w.constant(shape, name="shape")],
        [w.value(node.output)],
        "Reshape",
        newShape=list(shape),
    )


@writes("concat")
def _(w, node):
    _simple("CONCATENATION", "Concatenation", axis=node.attrs["axis"])(w, node)


@writes("slice")
def _(w, node):
    a, x, out = node.attrs, w.value(node.inputs[0]), [w.value(node.output)]
    if all(s == 1 for s in a["strides"]):
        w.emit(
            "SLICE", [x, w.constant(a["begin"], name="begin"), w.constant(node.output.shape, name="size")], out, "Slice"
        )
    else:
        w.emit(
            "STRIDED_SLICE", [x, *(w.constant(a[k], name=k) for k in ("begin", "end", "strides"))], out, "StridedSlice"
        )


@writes("pad")
def _(w, node):
    a, x, out = node.attrs, w.value(node.inputs[0]), [w.value(node.output)]
    pads = w.constant(a["pads"], name="pads")
    if a["mode"] == "constant" and a["value"] == 0:
        w.emit("PAD", [x, pads], out, "Pad")
    elif a["mode"] == "constant":
        w.emit("PADV2", [x, pads, w.constant(a["value"], np.float32)], out, "PadV2")
    elif a["mode"] == "reflect":
        w.emit("MIRROR_PAD", [x, pads], out, "MirrorPad", mode=w.S.MirrorPadMode.REFLECT)
    else:
        w.unsupported(node, "it cannot pad with the edge's value")


@writes("gather")
def _(w, node):
    _simple("GATHER", "Gather", axis=node.attrs["axis"])(w, node)


@writes("space_to_depth", "depth_to_space")
def _(w, node):
    options = {"space_to_depth": "SpaceToDepth", "depth_to_space": "DepthToSpace"}[node.op]
    _simple(node.op.upper(), options, blockSize=node.attrs["block"])(w, node)


@writes("resize")
def _(w, node):
    code, options = (
        ("RESIZE_BILINEAR", "ResizeBilinear")
        if node.attrs["mode"] == "bilinear"
        else ("RESIZE_NEAREST_NEIGHBOR", "ResizeNearestNeighbor")
    )
    size = w.constant(node.attrs["size"], name="size")
    w.emit(
        code,
        [w.value(node.inputs[0]), size],
        [w.value(node.output)],
        options,
        halfPixelCenters=True,
        alignCorners=False,
    )


@writes("matmul")
def _(w, node):
    adj = dict(adjX=node.attrs.get("transpose_a", False), adjY=node.attrs.get("transpose_b", False))
    _simple("BATCH_MATMUL", "BatchMatMul", **adj)(w, node)


@writes("dense")
def _(w, node):
    x, weight, bias = node.inputs
    out, activation = w.activation(node)
    inputs = [w.value(x), w.value(weight), w.value(bias)]
    w.emit("FULLY_CONNECTED", inputs, [out], "FullyConnected", keepNumDims=True, fusedActivationFunction=activation)


@writes("conv2d")
def _(w, node):
    """A convolution that cuts an image into patches is space-to-depth and one product of matrices."""
    image, kernel, bias = node.inputs
    height, width, channels, filters = kernel.shape
    cuts = dict(strides=(height, width), pads=((0, 0), (0, 0)), dilation=(1, 1), groups=1)
    if (
        node.attrs == cuts
        and channels <= FEW_CHANNELS
        and height == width > 1
        and not any(n % height for n in image.shape[1:3])
    ):
        patches = make_node("space_to_depth", (image,), dict(block=height), node.layer)
        WRITERS["space_to_depth"](w, patches)
        kernel = constant(kernel.data.reshape(1, 1, -1, filters), kernel.name)
        attrs = {**cuts, "strides": (1, 1)}
        node = Node(node.op, (patches.output, kernel, bias), node.outputs, attrs, node.layer)
    _convolution(w, node, "CONV_2D", "Conv2D", lambda k: k.transpose(3, 0, 1, 2))


@writes("depthwise_conv2d")
def _(w, node):
    multiplier = node.inputs[1].shape[3]
    _convolution(
        w,
        node,
        "DEPTHWISE_CONV_2D",
        "DepthwiseConv2D",
        lambda k: k.reshape(1, *k.shape[:2], -1),
        depthMultiplier=multiplier,
    )


def _convolution(w, node, code, options, layout, **fields):
    value, kernel, bias = node.inputs
    a = node.attrs
    x, padding = w.padded(w.value(value), value.shape, a["pads"], a, kernel.shape[:2])
    out, activation = w.activation(node)
    channels = node.output.shape[-1]
    if bias is None:
        bias = w.constant(np.zeros(channels), np.float32, "bias")
    else:
        bias = w.value(bias)
    weight = w.weight(kernel, layout(kernel.data), code)
    (sh, sw), (dh, dw) = a["strides"], a["dilation"]
    w.emit(
        code,
        [x, weight, bias],
        [out],
        options,
        padding=padding,
        strideH=sh,
        strideW=sw,
        dilationHFactor=dh,
        dilationWFactor=dw,
        fusedActivationFunction=activation,
        **fields,
    )


def _pool(code, value):
    def write_node(w, node):
        a, source = node.attrs, node.inputs[0]
        x = w.value(source)
        pads = a["pads"]
        if not any(map(any, pads)) or pads == same_padding(source.shape[1:3], a["size"], a["strides"], (1, 1)):
            padding = w.S.Padding.SAME if any(map(any, pads)) else w.S.Padding.VALID
        elif value is None:
            w.unsupported(node, "an average over a window that is padded in its own way")
        else:
            wide = (
                source.shape[0],
                *(n + sum(p) for n, p in zip(source.shape[1:3], pads, strict=True)),
                source.shape[3],
            )
            x = w.step(
                "PADV2", [x, w.constant([(0, 0), *pads, (0, 0)]), w.constant(value, np.float32)], wide, "pad", "PadV2"
            )
            padding = w.S.Padding.VALID
        (sh, sw), (kh, kw) = a["strides"], a["size"]
        w.emit(
            code,
            [x],
            [w.value(node.output)],
            "Pool2D",
            padding=padding,
            strideH=sh,
            strideW=sw,
            filterHeight=kh,
            filterWidth=kw,
        )

    return write_node


WRITERS.update(max_pool2d=_pool("MAX_POOL_2D", np.finfo(np.float32).min), avg_pool2d=_pool("AVERAGE_POOL_2D", None))


# ---------------------------------------------------------------- the target


def run(order):
    """See `Target.run`."""
    cls = importlib.import_module(order["interpreter"]).Interpreter

    def load():
        interpreter = cls(model_path=order["path"], num_threads=order["threads"])
        interpreter.allocate_tensors()
        inputs, outputs = (
            [d["index"] for d in f()] for f in (interpreter.get_input_details, interpreter.get_output_details)
        )

        def invoke(*arrays):
            for index, array in zip(inputs, arrays, strict=True):
                interpreter.set_tensor(index, array)
            interpreter.invoke()
            return [interpreter.get_tensor(i) for i in outputs]

        return invoke, order["runtime"]

    return load


def _order(artifact):
    interpreter, runtime = interpreter_class()
    return {"interpreter": interpreter.__module__, "runtime": runtime}


def _offenders(artifact):
    from . import gpu

    with contextlib.suppress(ImportError):  # a small board may have the interpreter alone
        return gpu.offenders(artifact.path)


TARGET = Target(
    name="litert",
    suffix=".tflite",
    export=export,
    quantize=quantize,
    load=load,
    run=run,
    traits=Traits(
        title="LiteRT",
        phone="Android",
        marker="o",
        sign="●",
        extra="litert",
        pixels="uint8",
        restarts=True,
        profiled=True,
        order=_order,
        partitions=Runner.partitions,
        offenders=_offenders,
    ),
)
