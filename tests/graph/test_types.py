"""Types are Keras', number by number; and each operation of each type runs in every format, or is refused by name."""

import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops
from test_ops import ATTRS, IMAGE, accepted, filled, shapes_of

from keras_vits.edge import trace
from keras_vits.edge.targets import litert
from keras_vits.edge.targets._forms import UnsupportedError
from keras_vits.edge.targets._types import lowered
from keras_vits.edge.targets.coreml import writer as coreml
from keras_vits.edge.targets.coreml.mlprogram import Program
from keras_vits.edge.targets.onnx import writer as onnx
from keras_vits.graph.ir import Builder, Node, Value
from keras_vits.graph.ops import OPS, definition

SIGNED = ("uint8", "int32", "int8", "int16", "int64")
NUMBERS = (*SIGNED, "float16", "float32")
ALL = ("bool", *NUMBERS)
EXPRESSIONS = {  # name -> (types that Keras takes on every backend, expression of x (1,4,3))
    "an image divided": (ALL, lambda x: x / 255),
    "an image scaled": (ALL, lambda x: x * (1 / 255.0)),
    "an image centred": (ALL, lambda x: (x - 127.5) / 127.5),
    "a float added": (ALL, lambda x: x + 0.5),
    "a float at the left": (ALL, lambda x: 1.5 * x),
    "an integer added": (ALL, lambda x: x + 3),
    "an integer subtracted": (NUMBERS, lambda x: x - 3),
    "an integer at the left": (NUMBERS, lambda x: 5 - x),
    "added until it wraps": (SIGNED, lambda x: x * 100 + 100),
    "subtracted until it wraps": (SIGNED, lambda x: x * 2 - 120),
    "itself multiplied": (NUMBERS, lambda x: x * x * x),
    "a float tensor": (ALL, lambda x: ops.add(x, np.float32([0.5, 1.5, 2.5]))),
    "a byte tensor": (ALL, lambda x: ops.add(x, np.uint8([1, 200, 255]))),
    "a tensor of int32": (ALL, lambda x: ops.multiply(x, np.int32([1, -200, 300]))),
    "a tensor of bool": (ALL, lambda x: ops.multiply(x, np.array([True, False, True]))),
    "two types": (SIGNED, lambda x: ops.cast(x, "uint8") - ops.cast(x, "int8") * 2),
    "mean": (ALL, lambda x: ops.mean(x, axis=1)),
    "mean of a scaled image": (ALL, lambda x: ops.mean(ops.cast(x / 255.0, "float32"), axis=(1, 2))),
    "variance": (ALL, lambda x: ops.var(x, axis=1)),
    "deviation": (NUMBERS, lambda x: ops.std(x, axis=1)),
    "sum": (ALL, lambda x: ops.sum(x, axis=(1, 2))),
    "sum, wider": (ALL, lambda x: ops.sum(ops.concatenate([x] * 60, axis=1), axis=1)),
    "product": (ALL, lambda x: ops.prod(x, axis=1)),
    "largest": (ALL, lambda x: ops.max(x, axis=1)),
    "smallest": (ALL, lambda x: ops.min(x, axis=1)),
    "any": (ALL, lambda x: ops.any(x, axis=1)),
    "all": (ALL, lambda x: ops.all(x, axis=1)),
    "any of compared": (NUMBERS, lambda x: ops.any(x > 4, axis=1)),
    "sum of compared": (NUMBERS, lambda x: ops.sum(x > 2, axis=1)),
    "mean of compared": (NUMBERS, lambda x: ops.mean(x > 2, axis=1)),
    "maximum": (NUMBERS, lambda x: ops.maximum(x, 3.5)),
    "maximum of whole": (ALL, lambda x: ops.maximum(x, 3)),
    "minimum": (NUMBERS, lambda x: ops.minimum(x, np.int32([1, 2, 3]))),
    "compared": (NUMBERS, lambda x: x > 2.5),
    "compared with a number": (NUMBERS, lambda x: x >= 3),
    "compared with a negative": (("int32", "int64", "float32"), lambda x: x > -1),
    "equal": (ALL, lambda x: ops.equal(x, 1)),
    "not equal": (ALL, lambda x: ops.not_equal(x, np.float32([1, 2, 3]))),
    "chosen": (NUMBERS, lambda x: ops.where(x > 2, x, 0.5)),
    "chosen of whole": (NUMBERS, lambda x: ops.where(x > 2, x, 7)),
    "chosen of bools": (ALL, lambda x: ops.where(x > 2, x > 3, x < 1)),
    "root": (ALL, ops.sqrt),
    "exponential": (ALL, lambda x: ops.exp(x / 10)),
    "floor": (NUMBERS, ops.floor),
    "absolute": (ALL, ops.abs),
    "absolute of negative": (("int8", "int16", "int32", "int64", "float32"), lambda x: ops.abs(5 - x)),
    "negative": (NUMBERS, lambda x: -x),
    "sign": (("uint8", "int32", "float32"), ops.sign),
    "square": (NUMBERS, ops.square),
    "rounded": (NUMBERS, lambda x: ops.round(x * 1.3, 1)),
    "whole rounded": (SIGNED, ops.round),
    "relu": (NUMBERS, lambda x: ops.relu(x)),
    "relu6": (("float16", "float32"), ops.relu6),
    "power": (("int32", "uint8", "float32"), lambda x: x**2),
    "power of floats": (NUMBERS, lambda x: x**1.5),
    "joined": (ALL, lambda x: ops.concatenate([x, ops.cast(x, "float32") / 2], axis=-1)),
    "joined with bytes": (ALL, lambda x: ops.concatenate([x, ops.cast(x, "uint8")], axis=-1)),
    "joined with bools": (ALL, lambda x: ops.concatenate([x, ops.cast(x, "bool")], axis=-1)),
    "stacked": (ALL, lambda x: ops.stack([x, ops.cast(x, "int32")], axis=1)),
    "floor_divide": (NUMBERS, lambda x: x // 2),
    "floor_divide of floats": (NUMBERS, lambda x: x // 1.5),
    "floor_divide of negative": (("int32", "float32"), lambda x: (x - 5) // 2),
    "mod": (NUMBERS, lambda x: x % 3),
    "mod of negative": (("int32", "float32"), lambda x: (x - 5) % 3),
    "mod by a float": (NUMBERS, lambda x: x % 1.5),
    "matmul": (ALL, lambda x: ops.matmul(x, np.float32([[0.5], [1], [2]]))),
    "matmul of whole": (("int32", "float32"), lambda x: ops.matmul(x, np.int32([[1], [2], [-3]]))),
    "argmax kept": (NUMBERS, lambda x: ops.argmax(x, axis=1, keepdims=True)),
    "argmax of all": (NUMBERS, lambda x: ops.argmax(x)),
    "argmax used": (NUMBERS, lambda x: ops.argmax(x, axis=1) * 0.5),
    "clip": (NUMBERS, lambda x: ops.clip(x, 1, 6)),
    "clip of bools": (("bool",), lambda x: ops.clip(x, 0, 1)),
    "clip beyond the type": (("int32", "uint8", "float32"), lambda x: ops.clip(x, 2, 255)),
    "top_k": (("int32", "uint8", "float32"), lambda x: ops.top_k(x, 2)[0]),
    "taken": (("int32", "uint8", "int64"), lambda x: ops.take(np.arange(12.0, dtype="float32"), x)),
    "cast to bytes": (SIGNED, lambda x: ops.cast(x, "uint8") + 250),
    "cast to int8": (SIGNED, lambda x: ops.cast(x * 20, "int8")),
    "saturated": (NUMBERS, lambda x: ops.saturate_cast(x * 20, "int8") + 0),
    "padded": (NUMBERS, lambda x: ops.pad(x, ((0, 0), (1, 0), (0, 2)), constant_values=2)),
    "logical": (ALL, lambda x: ops.logical_xor(x, ops.logical_not(ops.roll(x, 1, axis=1)))),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_types_and_numbers_are_those_of_keras(name):
    dtypes, expression = EXPRESSIONS[name]
    for dtype in dtypes:
        if dtype == "int64" and keras.backend.backend() == "jax":
            continue  # which has int32 only
        x = np.arange(12).reshape(1, 4, 3).astype(dtype)
        given = keras.Input((4, 3), dtype=dtype)
        model = keras.Model(given, expression(given))
        try:
            expected = ops.convert_to_numpy(model(ops.convert_to_tensor(x)))
        except Exception:  # TensorFlow has no kernels for some, negative bytes for one
            assert keras.backend.backend() == "tensorflow"
            continue
        found = trace(model)(x)[0]
        kind = {"u": "i"}  # a byte's sum, for example, is int32 in a Graph, as is everything of another width
        assert kind.get(found.dtype.kind, found.dtype.kind) == kind.get(expected.dtype.kind, expected.dtype.kind), dtype
        bound = 2e-3 if dtype == "float16" or expected.dtype == "float16" else 1e-6  # a Graph has no float16
        np.testing.assert_allclose(found, expected, rtol=bound, atol=bound, err_msg=dtype)


@pytest.mark.parametrize(
    ("function", "dtype", "reason"),
    [
        (lambda x: x + 300, "uint8", "holds 0 to 255"),
        (lambda x: x + np.int64(2**40), "int32", "int32 is the widest"),
        (lambda x: x // 0, "int32", "divided by zero"),
        (lambda x: ops.power(x, x), "int32", "known exponents"),
        (lambda x: ops.round(x, -1), "int32", "to tens"),
    ],
)
def test_whole_numbers_that_no_type_holds_are_refused(function, dtype, reason):
    x = keras.Input((4, 3), dtype=dtype)
    with pytest.raises(ValueError, match=reason):
        trace(keras.Model(x, function(x)))


# ---------------------------------------------------------------- types that the runtimes take

PROGRAM = """
import json, pathlib, sys, warnings
import numpy as np
warnings.filterwarnings("ignore")
from ai_edge_litert.interpreter import Interpreter, OpResolverType
folder, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
resolver = OpResolverType.AUTO if kind == "xnnpack" else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
for path in sorted(folder.glob("*.tflite")):
    if (folder / f"{path.stem}.{kind}.npz").exists():
        continue
    (folder / f"{kind}.running").write_text(path.stem)
    found = Interpreter(model_path=str(path), experimental_op_resolver_type=resolver, num_threads=1)
    found.allocate_tensors()
    given = np.load(folder / f"{path.stem}.npz")
    for detail, name in zip(found.get_input_details(), given.files):
        found.set_tensor(detail["index"], given[name])
    found.invoke()
    outputs = [found.get_tensor(d["index"]) for d in found.get_output_details()]
    np.savez(folder / f"{path.stem}.{kind}.npz", *outputs)
"""


def single(op, dtypes):
    """A graph of one operation, with arrays for its inputs; weights are constants."""
    random, b = np.random.default_rng(0), Builder()
    b.layer = "the_layer"
    arrays, values = [], []
    for i, (shape, dtype) in enumerate(zip(shapes_of(op), dtypes, strict=True)):
        array = filled(random, shape, dtype, IMAGE[2])
        if op in ("floor_div", "mod", "pow") and i:  # not by zero, and powers that int32 holds
            array = (np.clip(array, 1, 3) if dtype != "float32" else array).astype(dtype)
        if op == "pow":
            array = np.abs(array).astype(dtype)
        if i and (definition(op).is_linear or op == "layer_norm"):
            values.append(b.constant(array, "weight"))
            continue
        arrays.append(array)
        values.append(b.input(f"x{i}", shape, dtype))
    made = b(op, *values, **{**ATTRS.get(op, {}), **LITERT.get(op, {})})
    b.graph.outputs = list(made) if isinstance(made, tuple) else [made]
    return b.graph.check(), arrays


def agrees(name, found, expected):
    """Whole numbers are equal, floats nearly."""
    for array, wanted in zip(found, expected, strict=True):
        assert array.dtype == wanted.dtype, name
        bound = 0 if wanted.dtype.kind != "f" else 2e-4
        np.testing.assert_allclose(array, wanted, rtol=bound, atol=bound, err_msg=name)


LITERT = {"elu": dict(alpha=1.0), "gelu": dict(approximate=True)}
WHOLE = {"matmul-int32-int32", "max_pool2d-int32", "dequantize-int32"}
LITERT_LACKS = {*WHOLE, "erf-float32"}
ONNX_LACKS = {*WHOLE - {"matmul-int32-int32"}, "space_to_depth-int32", "depth_to_space-int32"}
COREML_LACKS = {*ONNX_LACKS, "matmul-int32-int32", "pad-int32"} - {"dequantize-int32"}
SINGLES = [(op, dtypes) for op in OPS for dtypes in accepted(op, shapes_of(op))]


@pytest.mark.once
def test_litert_runs_every_operation_of_every_type_that_is_written(tmp_path):
    """With XNNPACK and without, in a process of its own: what a runtime has no kernel for may end it."""
    written, refused = {}, set()
    for op, dtypes in SINGLES:
        graph, arrays = single(op, dtypes)
        name = "-".join((op, *dtypes))
        try:
            content = litert.write(graph)
        except ValueError as e:
            assert op in str(e) and "the_layer" in str(e)
            refused.add(name)
            continue
        (tmp_path / f"{name}.tflite").write_bytes(content)
        np.savez(tmp_path / f"{name}.npz", *arrays)
        written[name] = graph(*arrays)
    failed = {}
    for kind in ("xnnpack", "plain"):
        for _ in range(len(written)):
            ran = subprocess.run(
                [sys.executable, "-c", PROGRAM, str(tmp_path), kind], capture_output=True, text=True, check=False
            )
            if ran.returncode == 0:
                break
            name = (tmp_path / f"{kind}.running").read_text()
            failed[name, kind] = ran.stderr.strip().splitlines()[-1:] or ran.returncode
            (tmp_path / f"{name}.tflite").unlink(missing_ok=True)
    assert not failed
    for name, expected in written.items():
        for kind in ("xnnpack", "plain"):
            found = np.load(tmp_path / f"{name}.{kind}.npz")
            agrees(f"{name} {kind}", [found[k] for k in found.files], expected)
    assert refused == LITERT_LACKS


@pytest.mark.once
def test_onnx_runtime_runs_every_operation_of_every_type_that_is_written():
    onnxruntime = pytest.importorskip("onnxruntime")
    refused = set()
    for op, dtypes in SINGLES:
        graph, arrays = single(op, dtypes)
        name = "-".join((op, *dtypes))
        try:
            content = onnx.write(graph).SerializeToString()
        except ValueError as e:
            assert op in str(e) and "the_layer" in str(e)
            refused.add(name)
            continue
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        inputs = {v.name: array for v, array in zip(graph.inputs, arrays, strict=True)}
        agrees(name, session.run(None, inputs), graph(*arrays))
    assert refused == ONNX_LACKS


def from_whole(graph, arrays):
    """The graph with int32 in place of its bool inputs, which a Core ML file cannot take."""
    for i, value in enumerate(graph.inputs):
        if value.dtype == "bool":
            given = Value(f"given_{i}", value.shape, "int32")
            graph.inputs[i], arrays[i] = given, arrays[i].astype("int32")
            graph.nodes.insert(0, Node("cast", (given,), (value,), {"dtype": "bool"}, "the_layer"))
    return graph, arrays


@pytest.mark.once
def test_core_ml_has_every_operation_of_every_type_that_is_written(tmp_path):
    """One program of all of them, which coremltools checks, evaluated by what MIL's operations mean."""
    pytest.importorskip("coremltools")
    refused, joined, arrays, names = set(), Builder("all").graph, [], []
    for op, dtypes in SINGLES:
        name = "-".join((op, *dtypes))
        if "uint8" in dtypes:
            continue  # no file has bytes
        graph, given = from_whole(*single(op, dtypes))
        try:
            for node in graph.nodes:
                lowered(node, coreml.TYPES)
        except UnsupportedError:
            refused.add(name)
            continue
        for i, value in enumerate((*graph.inputs, *(v for n in graph.nodes for v in n.outputs))):
            value.name = f"{name.replace('-', '_')}_{i}"
        joined.inputs += graph.inputs
        joined.nodes += graph.nodes
        joined.outputs += graph.outputs
        arrays += given
        names += [name] * len(graph.outputs)
    wanted = joined(*arrays)
    coreml.write(joined, precision="float32").save(str(tmp_path / "all.mlpackage"))
    inputs = {value.name: array[None] for value, array in zip(joined.inputs, arrays, strict=True)}
    found = Program(tmp_path / "all.mlpackage")(inputs)
    for value, name, expected in zip(joined.outputs, names, wanted, strict=True):
        agrees(name, [found[value.name][0].astype(expected.dtype)], [expected])
    assert refused == COREML_LACKS


@pytest.mark.once
@pytest.mark.parametrize(
    ("write", "said"), [(litert.write, "LiteRT|.tflite"), (onnx.write, "ONNX"), (coreml.write, "Core ML")]
)
def test_what_no_runtime_computes_is_refused_by_name(write, said):
    graph, _ = single("max_pool2d", ("int32",))
    with pytest.raises(ValueError, match="the_layer") as e:
        write(graph)
    assert "max_pool2d" in str(e.value) and re.search(said, str(e.value))
