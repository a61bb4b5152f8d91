"""The table of operations is complete, types follow Keras' promotion, and a broken graph is named."""

import contextlib
import inspect
import itertools
import pathlib
import re
import sys

import keras
import numpy as np
import pytest
from keras import ops

import keras_vits
from keras_vits.edge import trace
from keras_vits.edge.targets import coreml, litert
from keras_vits.edge.targets.litert.gpu import BUILTINS, FORBIDDEN
from keras_vits.edge.targets.onnx import operations
from keras_vits.graph.ir import Builder, Graph, Node, Value, make_node
from keras_vits.graph.ops import DTYPES, FUSED, OPS, having, promote
from keras_vits.graph.rewrite import RULES, rewrite
from keras_vits.graph.trace import _tracer

# What each group of operations takes, beside x (2,4,6,8): the case that every operation needs.
IMAGE = (2, 4, 6, 8)
WINDOW = dict(strides=(1, 1), pads=((0, 0), (0, 0)))
AXES = dict(axes=(1, 3), keepdims=True)
ATTRS = {
    "elu": dict(alpha=0.5),
    "leaky_relu": dict(alpha=0.5),
    "clip": dict(low=2, high=100),
    "cast": dict(dtype="int32"),
    "dequantize": dict(scale=0.5, zero_point=3),
    "softmax": dict(axis=2),
    "layer_norm": dict(axes=(3,), epsilon=1e-5),
    **dict.fromkeys(having("reduces"), AXES),
    "argmax": dict(axis=1),
    "top_k": dict(k=3),
    "reshape": dict(shape=(8, 48)),
    "transpose": dict(perm=(0, 3, 1, 2)),
    "concat": dict(axis=1),
    "slice": dict(begin=(0, 1, 0, 0), end=(2, 4, 6, 8), strides=(1, 2, 1, 3)),
    "pad": dict(pads=((0, 0), (1, 0), (0, 2), (0, 0)), mode="reflect", value=0.0),
    "tile": dict(reps=(1, 2, 1, 3)),
    "reverse": dict(axes=(1, 2)),
    "gather": dict(axis=2),
    "space_to_depth": dict(block=2),
    "depth_to_space": dict(block=2),
    "resize": dict(size=(7, 9), mode="bilinear"),
    "conv2d": dict(**WINDOW, dilation=(1, 1), groups=2),
    "depthwise_conv2d": dict(**WINDOW, dilation=(1, 1)),
    "max_pool2d": dict(**WINDOW, size=(2, 3)),
    "avg_pool2d": dict(**WINDOW, size=(2, 3)),
    "matmul": dict(transpose_b=True),
}
OTHERS = {  # shapes behind x
    "where": [(4, 1, 8), IMAGE],
    "layer_norm": [(8,), (8,)],
    "concat": [IMAGE],
    "gather": [(3, 2)],
    "matmul": [IMAGE],
    "dense": [(5, 8), (5,)],
    "conv2d": [(3, 2, 4, 6), (6,)],
    "depthwise_conv2d": [(3, 2, 8, 2), (16,)],
}


def shapes_of(op):
    """Shapes of the inputs."""
    arity = sum(p.kind is p.POSITIONAL_OR_KEYWORD and name in "ab" for name, p in
                inspect.signature(OPS[op].infer).parameters.items())  # fmt: skip
    return [IMAGE, *OTHERS.get(op, [(6, 1)] if arity == 2 else [])]


def accepted(op, shapes):
    """Every (types of inputs, types of outputs) that the operation's entry accepts, for inputs of these shapes."""
    found = {}
    for given in itertools.product(DTYPES, repeat=len(shapes)):
        with contextlib.suppress(ValueError):
            found[given] = OPS[op].types(given, ATTRS.get(op, {}))
    return found


def filled(random, shape, dtype, most):
    """Random numbers: float32 about 3, bool, uint8 up to the largest, int32 in [0, most), which are indices, too."""
    if dtype == "float32":
        return (random.normal(size=shape) + 3).astype(dtype)
    return random.integers(0, {"bool": 2, "uint8": 256}.get(dtype, most), shape).astype(dtype)


@pytest.mark.parametrize("op", OPS)
def test_every_operation_gives_what_its_entry_says(op):
    """Shapes and types of the table are those of its meaning for every type it accepts, and no result of whole numbers
    is too large for its type, but for arithmetic, which wraps around in Keras, too."""
    entry, attrs, shapes = OPS[op], ATTRS.get(op, {}), shapes_of(op)
    random = np.random.default_rng(0)
    found = accepted(op, shapes)
    assert found
    for dtypes, expected in found.items():
        arrays = [filled(random, shape, dtype, IMAGE[2]) for shape, dtype in zip(shapes, dtypes, strict=True)]
        b = Builder()
        made = b(op, *(b.input("x", s, t) for s, t in zip(shapes, dtypes, strict=True)), **attrs)
        b.graph.outputs = list(made) if isinstance(made, tuple) else [made]
        assert tuple(v.dtype for v in b.graph.outputs) == expected, dtypes
        outputs = b.graph.check()(*arrays)  # which compares shapes
        raw, exact = entry(*arrays, **attrs), entry(*(widened(a) for a in arrays), **attrs)
        for value, array, before, wide in zip(b.graph.outputs, outputs, listed(raw), listed(exact), strict=True):
            assert array.dtype == value.dtype, dtypes
            assert before.dtype.kind == array.dtype.kind, dtypes  # the meaning has the declared type, but for its width
            if not entry.elementwise and array.dtype.kind in "iu" and "float32" not in dtypes:
                np.testing.assert_array_equal(array, wide, err_msg=f"{op} of {dtypes}")
        if entry.chooses and not set(dtypes) & {"float32"}:
            floats = [a if a.dtype == bool else a.astype("float32") for a in arrays]
            for whole, single in zip(listed(raw), listed(entry(*floats, **attrs)), strict=True):
                np.testing.assert_array_equal(whole, single, err_msg=f"{op} of {dtypes}")
        if entry.macs is not None:
            assert entry.macs(shapes, made.shape, attrs) > 0


def widened(array):
    """The same whole numbers in a type that holds every sum of them."""
    return array.astype("int64") if array.dtype.kind in "iu" else array


def listed(found):
    return found if isinstance(found, list) else [found]


def test_traits_fit_each_other():
    for name, op in OPS.items():
        assert op.elementwise + op.arrangement + op.reduces + op.is_linear <= 1, name
        assert not op.commutative or op.elementwise, name
        assert not op.is_linear or op.macs, name
    assert set(RULES) <= set(OPS) and not set(FUSED) & set(OPS)


def test_every_operation_is_written_by_every_target_or_refused_by_name():
    assert set(OPS) == set(litert.HANDLERS)
    assert set(OPS) | set(FUSED) == set(coreml.handlers.HANDLERS) == set(operations.WRITERS)


def test_what_is_not_for_gpus_is_known_by_its_builtin():
    assert set(BUILTINS.values()) == set(having("gpu_unfriendly"))
    assert all(FORBIDDEN.values())


def test_every_translation_is_a_named_function():
    for table in (_tracer.OPERATIONS, _tracer.LAYERS):
        assert all(f.__name__ not in ("_", "<lambda>") for f in table.values())


def test_private_keras_is_named_in_one_file():
    private = re.compile(
        r"keras\.src|\._value\b(?! *\()|\._initializer\b|_deferred_initialize|_keras_history|_run_through_graph|"
        r"_standardize_inputs|global_state|AutocastScope|_outputs_struct|_inputs_struct|_flatten_layers|_inbound_nodes"
    )
    root = pathlib.Path(keras_vits.__file__).parent
    files = [*root.rglob("*.py"), *(root / "edge").rglob("*.py")]
    assert len(files) > 60
    for file in files:
        found = private.findall(re.sub(r"self\._value\(", "", file.read_text()))
        assert not found or file.name == "keras_private.py", f"{file}: {found}"


# ---------------------------------------------------------------- types; see test_types.py, too


def test_promotion_is_keras():
    for a in ("bool", "uint8", "int32", "float32"):
        for b in ("bool", "uint8", "int32", "float32"):
            assert promote(a, b) == keras.backend.result_type(a, b)


# ---------------------------------------------------------------- arguments

ARGUMENTS = {  # expression of x (1,4,3) with an argument that is not the default one -> what a refusal says, or ""
    "max, initial": (lambda x: ops.max(x, axis=1, initial=0.5), ""),
    "min, initial": (lambda x: ops.min(x, axis=1, initial=-0.5), ""),
    "max, kept": (lambda x: ops.max(x, axis=1, keepdims=True), ""),
    "round to decimals": (lambda x: ops.round(x, 2), ""),
    "round to tens": (lambda x: ops.round(100 * x, -1), ""),
    "softmax over axes": (lambda x: ops.softmax(x, axis=(1, 2)), ""),
    "softmax over other axes": (lambda x: ops.softmax(x[:, None], axis=(1, 3)), ""),
    "softmax of one axis": (lambda x: ops.softmax(x, axis=(1,)), ""),
    "argmax of all": (lambda x: ops.argmax(x, axis=None), ""),
    "argmax of all, kept": (lambda x: ops.argmax(x, axis=None, keepdims=True), ""),
    "argmax, kept": (lambda x: ops.argmax(x, axis=1, keepdims=True), ""),
    "prod, dtype": (lambda x: ops.prod(x, axis=1, dtype="float32"), ""),
    "sum, kept": (lambda x: ops.sum(x, axis=(1, 2), keepdims=True), ""),
    "var, kept": (lambda x: ops.var(x, axis=1, keepdims=True), ""),
    "std of all": (lambda x: ops.std(x, axis=None), ""),
    "norm": (lambda x: ops.norm(x, axis=(1,), keepdims=True), ""),
    "norm, fro": (lambda x: ops.norm(x, ord="fro", axis=(1, 2)), ""),
    "norm, spectral": (lambda x: ops.norm(x, ord=2, axis=(1, 2)), "sum of squares"),
    "norm, nuclear": (lambda x: ops.norm(x, ord="nuc", axis=(1, 2)), "sum of squares"),
    "normalize of order 1": (lambda x: ops.normalize(x, order=1), "2-norm|no translation"),
    "clip by tensors": (lambda x: ops.clip(x, np.float32([0, -1, 0.5]), np.float32([1, 1, 0.6])), ""),
    "take of all": (lambda x: ops.take(x, [0, 3, 5]), ""),
    "take beyond": (lambda x: ops.take(x, [4], axis=1), "entries 4 to 4 of an axis of 4"),
    "entry beyond": (lambda x: x[:, 4], "entry 4 of an axis of 4"),
    "einsum of one": (lambda x: ops.einsum("bij->bji", x), "a,b->c"),
    "repeat by counts": (lambda x: ops.repeat(x, [1, 2, 1, 1], axis=1), "unequal counts"),
    "roll of all": (lambda x: ops.roll(x, 2), "without an axis"),
    "cumsum": (lambda x: ops.cumsum(x, axis=1), "no translation"),
    "gelu, exact": (lambda x: ops.gelu(x, approximate=False), ""),
    "elu, alpha": (lambda x: ops.elu(x, alpha=0.3), ""),
    "leaky relu, slope": (lambda x: ops.leaky_relu(x, negative_slope=0.3), ""),
    "pad with a value": (lambda x: ops.pad(x, ((0, 0), (1, 0), (0, 2)), constant_values=2.5), ""),
    "pad, symmetric": (lambda x: ops.pad(x, ((0, 0), (1, 0), (0, 2)), mode="symmetric"), "symmetric"),
    "causal attention": (
        lambda x: ops.dot_product_attention(*[x[:, None]] * 3, is_causal=True),
        "causal",
    ),
    "batch norm's axis": (
        lambda x: ops.batch_normalization(x, np.ones(4, "f"), np.full(4, 2, "f"), axis=1, epsilon=0.1),
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_not_ignored(name):
    function, refusal = ARGUMENTS[name]
    x = keras.Input((4, 3))
    given = np.random.default_rng(0).normal(size=(1, 4, 3)).astype("float32")
    try:
        model = keras.Model(x, function(x))
    except (ValueError, IndexError):
        return  # Keras refuses it itself
    if refusal:
        with pytest.raises(ValueError, match=rf"The operation \w+ in model .*({refusal})"):
            trace(model)
        return
    found = trace(model)(given)[0]
    try:
        expected = ops.convert_to_numpy(model(ops.convert_to_tensor(given)))
    except TypeError:  # this backend lacks it, as PyTorch a softmax over two axes
        assert keras.backend.backend() != "jax"
        return
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def classes():
    """Name -> class of each translated operation of Keras."""
    import keras.src.ops  # noqa: F401 - the modules that follow

    modules = [m for name, m in sys.modules.items() if name.startswith("keras.src.ops.") and "_test" not in name]
    found = {}
    for name in _tracer.OPERATIONS:
        held = {getattr(m, name) for m in modules if getattr(getattr(m, name, None), "__module__", "") == m.__name__}
        held = {c for c in held if isinstance(c, type)}
        assert len(held) <= 1, f"{name} is more than one class"
        if held:
            found[name] = held.pop()
    return found


def test_every_translation_is_of_an_operation_that_keras_has():
    unknown = set(_tracer.OPERATIONS) - set(classes())
    assert unknown <= {"Abs", "Amax", "Amin", "TrueDivide"}, unknown


@pytest.mark.parametrize("name", sorted(_tracer.OPERATIONS))
def test_every_argument_of_an_operation_is_translated_or_refused(name):
    """What an operation is made with is found under its name, where the tracer sees whether a translation reads it; and
    a translation takes all that Keras calls the operation with."""
    cls = classes().get(name)
    if cls is None:
        return
    source = "".join(inspect.getsource(c.__init__) for c in cls.__mro__ if "__init__" in vars(c) and c is not object)
    for argument in _tracer._arguments(cls):
        assert re.search(rf"self\.{argument}\b[^=\n]*=[^=]", source), f"{name} keeps {argument} under another name"
    called = list(inspect.signature(cls.call).parameters.values())[1:]
    taken = list(inspect.signature(_tracer.OPERATIONS[name]).parameters.values())[2:]
    assert sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in called) <= sum(
        p.kind is p.POSITIONAL_OR_KEYWORD for p in taken
    ) or any(p.kind is p.VAR_POSITIONAL for p in taken)
    allowed = any(p.kind is p.VAR_KEYWORD for p in called)
    assert allowed or not any(p.kind is p.VAR_KEYWORD for p in taken), f"{name} swallows arguments"


def test_an_argument_that_a_translation_does_not_read_is_refused(monkeypatch):
    def careless(t, o, x):
        return t.build("elu", t.floats(x), alpha=1.0)

    monkeypatch.setitem(_tracer.OPERATIONS, "Elu", careless)
    x = keras.Input((4,))
    assert trace(keras.Model(x, ops.elu(x))).histogram() == {"elu": 1}
    with pytest.raises(ValueError, match=r"Elu in model .* its argument alpha=0.5 has no translation"):
        trace(keras.Model(x, ops.elu(x, alpha=0.5)))


# ---------------------------------------------------------------- Graph.check


def chain():
    b = Builder()
    b.layer = "block_3/mlp"
    y = b("add", b("exp", b.input("x", (2, 3))), b.constant(np.ones(3, np.float32)))
    b.graph.outputs = [y]
    return b.graph


def broken_shape(graph):
    graph.nodes[0].outputs[0].shape = (3, 2)


def broken_type(graph):
    graph.nodes[1].outputs[0].dtype = "int32"


def twice(graph):
    graph.nodes.append(graph.nodes[0])


def disordered(graph):
    graph.nodes.reverse()


def same_names(graph):
    graph.nodes[1].outputs[0].name = graph.nodes[0].outputs[0].name


def unknown(graph):
    graph.nodes[0].op = "fft"


def mixed(graph):
    graph.inputs[0].dtype = "int32"


def lost(graph):
    graph.outputs.append(Value("nowhere", (2,)))


def other_data(graph):
    graph.nodes[1].inputs[1].data = np.ones((4,), np.float32)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (broken_shape, r"exp in layer 'block_3/mlp' gives .*declared"),
        (broken_type, r"add in layer 'block_3/mlp' gives .*declared"),
        (twice, r"exp in layer 'block_3/mlp' computes .* again"),
        (disordered, r"add in layer 'block_3/mlp' reads .*which nothing before it computes"),
        (same_names, r"2 values are named 'block_3/mlp/exp'"),
        (unknown, "No primitive op 'fft'"),
        (mixed, r"exp in layer 'block_3/mlp' does not fit the types"),
        (lost, "list of outputs reads 'nowhere'"),
        (other_data, r"add in layer 'block_3/mlp' reads the constant .*whose data are float32 of shape \(4,\)"),
    ],
)
def test_a_broken_graph_is_named(fault, said):
    graph = chain()
    assert graph.check() is graph
    fault(graph)
    with pytest.raises(ValueError, match=said):
        graph.check()


def test_a_rule_that_breaks_a_graph_is_found_and_no_file_is_written(monkeypatch):
    def wrong(sweep, node):
        if node.output.shape == (2, 3):
            made = sweep.append(Node("exp", node.inputs, (Value("wrong", (6,)),), {}, node.layer))
            return made.output

    monkeypatch.setitem(RULES, "exp", (wrong,))
    with pytest.raises(ValueError, match=r"in layer 'block_3/mlp'"):
        rewrite(chain())
    graph = chain()
    broken_shape(graph)
    with pytest.raises(ValueError, match=r"in layer 'block_3/mlp'"):
        litert.write(graph)


def test_types_are_checked_when_a_node_is_made():
    with pytest.raises(ValueError, match=r"add in layer 'head' does not fit the types of its inputs"):
        make_node("add", (Value("x", (2,)), Value("i", (2,), "int32")), {}, "head")
    with pytest.raises(ValueError, match="condition must be bool"):
        make_node("where", (Value("x", (2,)), Value("a", (2,)), Value("b", (2,))), {})
    assert isinstance(Graph([], [], []).check(), Graph)
