"""Core ML files: the writer against the Graph's own evaluator by operation; models end to end; compression."""

import dataclasses
import json
import math
import pathlib
import sys
import types

import keras
import numpy as np
import pytest
from families import FAMILIES, everywhere, images, randomize

import keras_vits
from keras_vits._util import files
from keras_vits.edge import artifact as artifacts
from keras_vits.edge import coreml, verify
from keras_vits.edge.targets import _forms as forms
from keras_vits.edge.targets.coreml import common, mlprogram, runtime, writer
from keras_vits.edge.targets.coreml.handlers import HANDLERS
from keras_vits.graph.ir import Builder
from keras_vits.graph.ops import OPS
from keras_vits.graph.rewrite import rewrite
from keras_vits.graph.trace import trace
from keras_vits.preprocess import Preprocessing


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def program(graph, folder, **options):
    """The Graph written, saved and read back."""
    path = folder / "graph.mlpackage"
    coreml.write(graph, **{"precision": "float32", **options}).save(str(path))
    return mlprogram.Program(path)


def difference(graph, folder, *arrays, **options):
    """Largest difference between the file and the Graph, as a part of the outputs' scale."""
    found = program(graph, folder, **options)(
        {v.name: a[None] for v, a in zip(graph.inputs, arrays, strict=True)}
    ).values()
    worst = 0.0
    for y, expected in zip(found, graph(*arrays), strict=True):
        y, expected = y[0].astype(np.float64), expected.astype(np.float64)
        assert y.shape == expected.shape
        worst = max(worst, np.abs(y - expected).max() / max(np.abs(expected).max(), 1e-6))
    return worst


# ---------------------------------------------------------------- every operation of the Graph

CONV = dict(strides=(2, 1), pads=((1, 0), (2, 1)), dilation=(1, 2))
ELEMENTWISE = (
    "abs neg exp square sin cos tanh erf floor ceil round sign sigmoid relu relu6 silu softplus hard_sigmoid hard_swish"
).split()
COMPARE = "equal not_equal greater greater_equal less less_equal".split()
constant = lambda g, *shape, seed=5: g.constant(random(*shape, seed=seed))
flag = lambda g, x: g("greater", x, g.constant(0.0))
positive = lambda g, x: g("add", g("abs", x), g.constant(0.1))

CASES = {  # op -> functions (builder, x (2,6,4,5)) -> Value(s)
    **{op: [lambda g, x, op=op: g(op, x)] for op in ELEMENTWISE},
    **{op: [lambda g, x, op=op: g(op, positive(g, x))] for op in ("log", "sqrt", "rsqrt")},
    **{
        op: [
            lambda g, x, op=op: g(op, x, constant(g, 5)),
            lambda g, x, op=op: g(op, x, constant(g, 6, 1, 1)),
            lambda g, x, op=op: g(op, g.constant(0.5), x),
            lambda g, x, op=op: g(op, x, g("mean", x, axes=(1, 2), keepdims=True)),
            lambda g, x, op=op: g(
                op, g("slice", g("reshape", x, shape=(48, 5)), begin=(0, 0), end=(4, 5), strides=(1, 1)), x
            ),
        ]
        for op in ("add", "sub", "mul", "maximum", "minimum")
    },
    **{op: [lambda g, x, op=op: g(op, x, g.constant(np.abs(random(5)) + 0.5))] for op in ("div", "floor_div", "mod")},
    "pow": [
        lambda g, x: g("pow", positive(g, x), g.constant(1.7)),
        lambda g, x: g("pow", positive(g, x), constant(g, 6, 1, 5)),
    ],
    **{
        op: [lambda g, x, op=op: g("cast", g(op, g("round", x), g.constant(np.round(random(4, 1)))), dtype="float32")]
        for op in COMPARE
    },
    **{
        op: [lambda g, x, op=op: g(op, flag(g, x), g("less", x, g.constant(0.7)))]
        for op in ("logical_and", "logical_or")
    },
    "logical_not": [lambda g, x: g("logical_not", flag(g, x))],
    "where": [
        lambda g, x: g("where", flag(g, x), x, constant(g, 4, 1)),
        lambda g, x: g("where", flag(g, x), g.constant(-3.0), x),
    ],
    "gelu": [lambda g, x: g("gelu", x), lambda g, x: g("gelu", x, approximate=True)],
    "elu": [lambda g, x: g("elu", x, alpha=0.7)],
    "leaky_relu": [lambda g, x: g("leaky_relu", x, alpha=0.1)],
    "clip": [lambda g, x: g("clip", x, low=-0.3, high=0.8)],
    "cast": [
        lambda g, x: g("cast", g("mul", x, g.constant(3.0)), dtype="int32"),
        lambda g, x: g("cast", flag(g, x), dtype="float32"),
    ],
    "dequantize": [
        lambda g, x: g("dequantize", g("cast", g("mul", x, g.constant(9.0)), dtype="int32"), scale=0.3, zero_point=2)
    ],
    "softmax": [lambda g, x: g("softmax", x, axis=3), lambda g, x: g("softmax", x, axis=1)],
    "layer_norm": [
        lambda g, x: g("layer_norm", x, constant(g, 5), constant(g, 5, seed=6), axes=(3,), epsilon=1e-3),
        lambda g, x: g("layer_norm", x, None, constant(g, 5), axes=(3,), epsilon=1e-3),
        lambda g, x: g("layer_norm", x, None, None, axes=(1, 2, 3), epsilon=1e-3),
        lambda g, x: g("layer_norm", x, constant(g, 5), constant(g, 5, seed=6), axes=(1, 2, 3), epsilon=1e-3),
        lambda g, x: g("layer_norm", x, constant(g, 6, 4, 1), None, axes=(1, 2), epsilon=1e-3),
    ],
    **{
        op: [
            lambda g, x, op=op: g(op, x, axes=(1, 2), keepdims=True),
            lambda g, x, op=op: g(op, x, axes=(0, 3), keepdims=False),
        ]
        for op in ("mean", "sum", "max", "min", "prod")
    },
    "argmax": [lambda g, x: g("argmax", x, axis=2)],
    "top_k": [lambda g, x: g("top_k", x, k=3)],
    "reshape": [
        lambda g, x: g("reshape", x, shape=(2, 24, 5)),
        lambda g, x: g("mul", g("reshape", x, shape=(2, 3, 2, 20)), g("reshape", x, shape=(2, 3, 2, 20))),
        lambda g, x: g("transpose", g("reshape", x, shape=(48, 5)), perm=(1, 0)),
        lambda g, x: g("reshape", g("mean", x, axes=(1, 2), keepdims=True), shape=(2, 5)),
    ],
    "transpose": [
        lambda g, x: g("transpose", x, perm=(0, 2, 3, 1)),
        lambda g, x: g("matmul", x, g("transpose", x, perm=(0, 1, 3, 2))),
        lambda g, x: g("reshape", g("transpose", x, perm=(2, 0, 1, 3)), shape=(8, 30)),
    ],
    "concat": [lambda g, x: g("concat", x, constant(g, 2, 6, 1, 5), x, axis=2), lambda g, x: g("concat", x, x, axis=0)],
    "slice": [lambda g, x: g("slice", x, begin=(0, 1, 0, 1), end=(2, 6, 4, 4), strides=(1, 2, 3, 1))],
    "pad": [
        lambda g, x: g("pad", x, pads=((0, 0), (1, 2), (0, 1), (2, 0)), mode="constant", value=0.5),
        lambda g, x: g("pad", x, pads=((0, 0), (1, 2), (0, 1), (0, 0)), mode="reflect", value=0.0),
        lambda g, x: g("pad", x, pads=((0, 0), (1, 2), (0, 1), (0, 0)), mode="edge", value=0.0),
    ],
    "tile": [lambda g, x: g("tile", x, reps=(1, 2, 1, 3))],
    "reverse": [lambda g, x: g("reverse", x, axes=(1, 3))],
    "gather": [
        lambda g, x: g("gather", x, g.constant(np.int32([3, 0, 3])), axis=2),
        lambda g, x: g("gather", x, g.constant(np.int32([[1, 2], [0, 3]])), axis=3),
    ],
    "space_to_depth": [lambda g, x: g("space_to_depth", x, block=2)],
    "depth_to_space": [lambda g, x: g("depth_to_space", g("concat", x, x, x, x, axis=3), block=2)],
    "resize": [
        lambda g, x: g("resize", x, size=(9, 2), mode="bilinear"),
        lambda g, x: g("resize", x, size=(12, 12), mode="nearest"),
        lambda g, x: g("resize", x, size=(7, 3), mode="nearest"),
    ],
    "matmul": [
        lambda g, x: g("matmul", x, x, transpose_b=True),
        lambda g, x: g("matmul", x, x, transpose_a=True),
        lambda g, x: g("matmul", constant(g, 6, 3, 4), x),
        lambda g, x: g("matmul", g("transpose", x, perm=(0, 2, 1, 3)), g("transpose", x, perm=(0, 2, 3, 1))),
    ],
    "dense": [
        lambda g, x: g("dense", x, constant(g, 7, 5), constant(g, 7)),
        lambda g, x: g("dense", x, constant(g, 7, 5), None),
    ],
    "conv2d": [
        lambda g, x: g("conv2d", x, constant(g, 3, 2, 5, 7), constant(g, 7), groups=1, **CONV),
        lambda g, x: g("conv2d", g("concat", x, x, axis=3), constant(g, 3, 2, 5, 8), None, groups=2, **CONV),
    ],
    "depthwise_conv2d": [
        lambda g, x: g("depthwise_conv2d", x, constant(g, 3, 2, 5, 1), constant(g, 5), **CONV),
        lambda g, x: g("depthwise_conv2d", x, constant(g, 3, 2, 5, 2), None, **CONV),
    ],
    **{
        op: [lambda g, x, op=op: g(op, x, size=(3, 2), strides=(2, 1), pads=((1, 1), (0, 1)))]
        for op in ("max_pool2d", "avg_pool2d")
    },
}


ones = lambda x, n: (n,) * (len(x.shape) - 1)  # an entry for every axis but one
NARROW = {  # op -> functions (builder, x (12,4,5) or (48,5)) -> Value
    **{op: [lambda g, x, op=op: g(op, x)] for op in ELEMENTWISE},
    **{
        op: [
            lambda g, x, op=op: g(op, x, constant(g, 5)),
            lambda g, x, op=op: g(op, x, constant(g, *x.shape)),
            lambda g, x, op=op: g(op, g("mean", x, axes=(0,), keepdims=False), x),
            lambda g, x, op=op: g(op, x, g("reshape", x, shape=(1,) * (4 - len(x.shape)) + x.shape)),
        ]
        for op in ("add", "sub", "mul", "maximum", "minimum")
    },
    "softmax": [lambda g, x: g("softmax", x, axis=0), lambda g, x: g("softmax", x, axis=len(x.shape) - 1)],
    "layer_norm": [
        lambda g, x: g("layer_norm", x, constant(g, 5), constant(g, 5, seed=6), axes=(len(x.shape) - 1,), epsilon=1e-3),
        lambda g, x: g("layer_norm", x, constant(g, *x.shape), None, axes=(len(x.shape) - 1,), epsilon=1e-3),
    ],
    **{
        op: [
            lambda g, x, op=op: g(op, x, axes=(len(x.shape) - 1,), keepdims=False),
            lambda g, x, op=op: g(op, x, axes=(0,), keepdims=False),
            lambda g, x, op=op: g(op, x, axes=(1,), keepdims=True),
        ]
        for op in ("mean", "sum", "max", "min")
    },
    "argmax": [lambda g, x: g("argmax", x, axis=1)],
    "reshape": [
        lambda g, x: g("reshape", x, shape=(x.shape[0] // 2, 2, 240 // x.shape[0])),
        lambda g, x: g("exp", g("reshape", x, shape=(240,))),
    ],
    "transpose": [lambda g, x: g("transpose", x, perm=tuple(range(len(x.shape)))[::-1])],
    "concat": [lambda g, x: g("concat", x, constant(g, *x.shape[:-1], 2), axis=len(x.shape) - 1)],
    "slice": [lambda g, x: g("slice", x, begin=(*ones(x, 1), 2), end=x.shape, strides=(*ones(x, 1), 2))],
    "pad": [lambda g, x: g("pad", x, pads=(*ones(x, (0, 0)), (1, 2)), mode="constant", value=0.5)],
    "tile": [lambda g, x: g("tile", x, reps=(*ones(x, 1), 3))],
    "reverse": [lambda g, x: g("reverse", x, axes=(0, 1))],
    "gather": [lambda g, x: g("gather", x, g.constant(np.int32([3, 0, 3])), axis=1)],
    "matmul": [lambda g, x: g("matmul", x, x, transpose_b=True), lambda g, x: g("matmul", x, constant(g, 5, 3))],
    "dense": [lambda g, x: g("dense", x, constant(g, 7, 5), constant(g, 7))],
}


@pytest.mark.once
def test_every_operation_has_a_case():
    assert set(CASES) == set(OPS) == set(HANDLERS) - {"attention"}


@pytest.mark.once
@pytest.mark.parametrize("layout", coreml.LAYOUTS)
@pytest.mark.parametrize("op", CASES)
def test_operation_equals_graph(op, layout, tmp_path):
    """All cases of an operation in one file; x in the Graph's order of axes, channels first, and in another order."""
    build = Builder("ops")
    for i, order in enumerate([(0, 1, 2, 3), (0, 3, 1, 2), (3, 1, 0, 2)]):
        stored = build.input(f"x{i}", tuple((2, 6, 4, 5)[axis] for axis in order))
        x = build("transpose", stored, perm=tuple(order.index(axis) for axis in range(4))) if i else stored
        for case in CASES[op]:
            results = case(build, x)
            build.graph.outputs += results if isinstance(results, tuple) else [results]
    if layout == "ane":  # and on three axes and two, of which it makes four
        for shape in ((12, 4, 5), (48, 5)):
            x = build("reshape", build.graph.inputs[0], shape=shape)
            build.graph.outputs += [case(build, x) for case in NARROW.get(op, ())]
    arrays = [random(*v.shape, seed=i) for i, v in enumerate(build.graph.inputs)]
    assert difference(build.graph, tmp_path, *arrays, layout=layout) <= 1e-5


@pytest.mark.once
def test_an_operation_that_core_ml_lacks_is_named():
    build = Builder()
    x = build.input("x", (1, 4, 4, 3))
    build.layer = "block_3/pad"
    build.graph.outputs = [build("pad", x, pads=((0, 0), (1, 1), (1, 1), (1, 1)), mode="reflect", value=0.0)]
    with pytest.raises(ValueError, match=r"'pad'.*'block_3/pad'"):
        coreml.write(build.graph)
    build = Builder()
    build.graph.outputs = [build("cast", build.input("pixels", (1, 4, 4, 3), "uint8"), dtype="float32")]
    with pytest.raises(ValueError, match=r"pixels.*image_input=True"):
        coreml.write(build.graph)


@pytest.mark.once
@pytest.mark.parametrize("seed", range(40))
def test_regroup(seed):
    """A form that regroup allows is reshaped as the tensor is; one that it forbids holds other numbers."""
    random_ = np.random.default_rng(seed)
    factors = random_.choice([1, 2, 3], 5)
    cut = lambda: np.split(factors, np.sort(random_.choice(np.arange(1, 5), random_.integers(1, 4), replace=False)))
    old, new = (tuple(int(np.prod(part)) for part in cut()) for _ in range(2))
    x = np.arange(math.prod(old)).reshape(old)
    for order in {tuple(random_.permutation(len(old))) for _ in range(6)}:
        made = forms.regroup(old, new, order)
        if made is not None:
            assert sorted(made) == list(range(len(new)))
            reshaped = x.transpose(order).reshape([new[axis] for axis in made])
            np.testing.assert_array_equal(reshaped, x.reshape(new).transpose(made))
    assert forms.regroup(old, new, tuple(range(len(old)))) is not None


# ---------------------------------------------------------------- models, end to end


@pytest.fixture(scope="module", params=everywhere("vit"))
def family(request):
    model = request.param.create()
    x = images(model, 3)
    return model, x, np.asarray(model.predict(x, verbose=0))


def among(*names):
    """Some of the families, once."""
    return pytest.mark.parametrize("family", everywhere(among=names), indirect=True)


def test_model_equals_file(family, tmp_path):
    check_file(*family, "float32", tmp_path)


@among("vit", "mobilevit", "mobilevit_v2")  # all of them are in test_half.py
def test_model_equals_file_in_half_precision(family, tmp_path):
    check_file(*family, "float16", tmp_path)


def check_file(model, x, expected, precision, tmp_path):
    """float32: to rounding. float16: each of the operations in a row adds at most a rounding of 2^-11 of the scale."""
    artifact = coreml.export(model, tmp_path, precision=precision)
    runner = coreml.load(artifact)
    found = runner.predict(x)
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert max(len(shape) for _, _, outputs in runner._program._steps for _, shape, _ in outputs) <= 5
    scale, steps = np.abs(expected).max(), sum(runner.histogram().values())
    error = np.abs(found - expected).max()
    if precision == "float32":
        assert error <= 1e-4 * scale
    else:
        assert 1e-6 * scale < error <= steps * 2**-11 * scale
    assert artifact.path == tmp_path / f"{model.name}_{precision}.mlpackage"
    assert (artifact.recipe, artifact.format, artifact.outputs[0].kind) == (precision, "coreml", "logits")
    assert (artifact.input,) == model.input_specs
    assert artifact.output_names == ("logits",) and plain(artifacts.load(artifact.path)) == plain(artifact)
    assert set(artifact.tools) == {"keras_vits", "keras", "backend", "coremltools"}
    assert artifact.tools["backend"] == keras.backend.backend()


@among("vit", "mixer", "mobilevit", "efficientvit")
def test_a_static_batch(family, tmp_path):
    """A file for two images at a time takes three."""
    model, x, expected = family
    artifact = coreml.export(model, tmp_path, precision="float32", batch=2)
    assert artifact.input.shape == (2, *x.shape[1:])
    found = coreml.load(artifact).predict(x)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def plain(artifact):
    """Its fields, with JSON's lists where Python has tuples."""
    return json.loads(json.dumps(dataclasses.asdict(artifact), default=str))


def logits(model, images):
    """Of the model on normalised images, without compiling it."""
    return trace(model, len(images))(np.asarray(images, np.float32))[0]


def create(name, **overrides):
    return next(f for f in FAMILIES if f.name == name).create(**overrides)


@pytest.mark.once
def test_vit_uses_fused_operations(tmp_path):
    depth = 2
    found = coreml.load(coreml.export(create("vit", depth=depth), tmp_path)).histogram()
    assert found["layer_norm"] == 2 * depth + 1
    assert found["gelu"] == found["softmax"] == depth
    # query, key and value in one, out, fc1, fc2; query, key and value apart in the last block, where one token asks
    assert found["linear"] == 4 * (depth - 1) + 6 + 1  # and the head
    assert found["split"] == depth - 1
    assert found["matmul"] == 2 * depth
    assert found["transpose"] == 2 * depth + 2  # heads, all three and back; key, value at the end; to the stem, from it
    assert not {"reduce_mean", "rsqrt", "erf", "exp", "gather", "real_div"} & set(found)


def close(found, expected, tolerance=1e-4):
    return found.shape == expected.shape and np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def rounding(runner):
    """What a float16 file may be off by, as a part of the outputs' scale: a rounding of 2^-11 in each operation."""
    return sum(runner.histogram().values()) * 2**-11


def system(artifact):
    """The oldest system that runs a file."""
    version = mlprogram.Program(artifact.path).spec.specificationVersion
    return next(t.name for t in common.coremltools().target if t.value == version and t.name.startswith("iOS"))


@pytest.mark.once
@pytest.mark.parametrize("target", [None, "iOS16", "iOS17", "iOS18"])
def test_targets(target, tmp_path):
    """From iOS 18 attention is one operation; what it divides by is in the weights of the queries."""
    model = create("vit")
    x = images(model, 2)
    artifact = coreml.export(model, tmp_path, precision="float32", target=target)
    runner = coreml.load(artifact)
    assert close(runner.predict(x), logits(model, x))
    assert system(artifact) == (target or "iOS15")
    found = runner.histogram()
    if target == "iOS18":
        assert found["scaled_dot_product_attention"] == 2 and not {"matmul", "softmax", "mul"} & set(found)
    else:
        assert found["softmax"] == 2 and found["matmul"] == 4


def attention(build, q, k, v, bias=None, scale=None, after=lambda y: y):
    """softmax(scale q k + bias) v, as other models write it too."""
    scores = build("matmul", q, k)
    scores = scores if scale is None else build("mul", scores, build.constant(scale))
    scores = scores if bias is None else build("add", scores, build.constant(bias))
    return build("matmul", after(build("softmax", scores, axis=len(scores.shape) - 1)), v)


@pytest.mark.once
@pytest.mark.parametrize("options", [dict(target="iOS18"), dict(layout="ane")], ids=["iOS18", "ane"])
def test_attention_is_found(options, tmp_path):
    """With a bias, a scale, several images, and on three axes; what only looks like it (the last two) stays."""
    build = Builder()

    def q_k_v(*outer):
        shapes = ((*outer, 5, 4), (*outer, 4, 7), (*outer, 7, 6))
        return [build.input(name, shape) for name, shape in zip("qkv", shapes, strict=True)]

    build.graph.outputs = [
        build("transpose", attention(build, *q_k_v(2, 3)), perm=(0, 2, 1, 3)),
        attention(build, *q_k_v(2, 3), bias=random(3, 5, 7), scale=0.2),
        attention(build, *q_k_v(2, 3), bias=random(2, 1, 5, 7)),
        attention(build, *q_k_v(6), scale=2.0),
        attention(build, *q_k_v(6), bias=random(6, 5, 7)),
        attention(build, *q_k_v(6), bias=random(5, 1)),
        attention(build, *q_k_v(2, 3), scale=0.3, after=lambda y: build("relu", y)),
    ]
    graph = rewrite(build.graph)
    arrays = [random(*x.shape, seed=i) for i, x in enumerate(graph.inputs)]
    assert difference(graph, tmp_path, *arrays, **options) <= 1e-5
    found = program(graph, tmp_path / "again", **options).operations
    if options.get("target"):
        assert found["scaled_dot_product_attention"] == 5 and found["matmul"] == 4
    else:
        assert found["einsum"] == 2 * (3 * 3 + 2) + 4 and "matmul" not in found
    assert "attention" not in graph.histogram()  # the given Graph is not changed


@among("vit", "vit_hybrid", "mobilevit", "mobilevit_v2", "efficientvit")
def test_fused_attention(family, tmp_path):
    model, x, expected = family
    runner = coreml.load(coreml.export(model, tmp_path, precision="float32", target="iOS18"))
    assert close(runner.predict(x), expected)
    found = runner.histogram()  # what is left beside it is not softmax(q k') v
    assert "softmax" not in found or "scaled_dot_product_attention" not in found


@pytest.mark.once
def test_neural_engine_layout(family, tmp_path):
    """Every tensor has four axes, every dense layer is a convolution, and the answers are the same."""
    model, x, expected = family
    runner = coreml.load(coreml.export(model, tmp_path, precision="float32", layout="ane"))
    assert close(runner.predict(x), expected)
    assert not {"linear", "matmul"} & set(runner.histogram())
    kinds = "conv einsum layer_norm gelu silu relu softmax add mul concat".split()
    shapes = [shape for kind, _, outputs in runner._program._steps if kind in kinds for _, shape, _ in outputs]
    assert {len(shape) for shape in shapes} == {4}


@pytest.mark.once
@pytest.mark.parametrize("name", ["vit", "mobilevit", "mobilevit_v2", "mobilevit_v3"])
def test_neural_engine_layout_in_float16(name, tmp_path):
    model = create(name)
    x = images(model, 2)
    runner = coreml.load(coreml.export(model, tmp_path, layout="ane"))
    assert close(runner.predict(x), logits(model, x), rounding(runner))


@pytest.mark.once
@pytest.mark.parametrize(
    "name, transposes",
    [("mobilevit_xxs", 1), ("mobilevitv2_050", 1 + 2 * 3), ("vit_tiny_patch16_224", 2 + 2 * 12)],
)
def test_transposes_of_a_full_size_model(name, transposes, tmp_path):
    """Written node by node, every convolution and fold would stand between two transposes, and every attention after
    three and before one. Left are, beside the image's: of a MobileViT none, two for each of nine fused attentions (iOS
    18) or one for the keys of each (Neural Engine); of a v2 two around each of three folds; of a ViT that of the stem's
    tokens and two for each attention."""
    graph = rewrite(trace(keras_vits.create(name)))
    after = lambda **options: program(graph, tmp_path / "-".join(options), **options).operations["transpose"]
    assert after() == transposes
    if name == "mobilevit_xxs":
        nodes = graph.histogram()
        channels_first = ("conv2d", "depthwise_conv2d", "space_to_depth", "depth_to_space")
        assert nodes["transpose"] + 2 * sum(nodes[op] for op in channels_first) > 110
        assert after(target="iOS18") == 1 + 2 * 9
        assert after(layout="ane") == 1 + 9


@pytest.mark.once
@pytest.mark.parametrize("target", ["iOS15", "iOS18"])
def test_tokens_between_convolutions(target, tmp_path):
    """They stay channels first, whatever becomes of them; what has no place among four axes does not."""
    build = Builder()
    x = build("conv2d", build.input("x", (2, 4, 6, 3)), constant(build, 1, 1, 3, 8), None, groups=1,
              strides=(1, 1), pads=((0, 0), (0, 0)), dilation=(1, 1))  # fmt: skip
    norm = lambda y: build("layer_norm", y, constant(build, 8), constant(build, 8, seed=6), axes=(2,), epsilon=1e-3)
    dense = lambda y, seed: build("dense", y, constant(build, 8, 8, seed=seed), constant(build, 8, seed=seed))
    heads = lambda y, *perm: build("transpose", build("reshape", y, shape=(2, 24, 2, 4)), perm=perm)
    tokens = build("reshape", x, shape=(2, 24, 8))
    y = norm(tokens)
    y = attention(build, heads(dense(y, 1), 0, 2, 1, 3), heads(dense(y, 2), 0, 2, 3, 1), heads(dense(y, 3), 0, 2, 1, 3),
                  bias=random(2, 24, 24), scale=0.3)  # fmt: skip
    y = build("reshape", build("transpose", y, perm=(0, 2, 1, 3)), shape=(2, 24, 8))
    tokens = build("add", tokens, dense(y, 4))
    y = norm(tokens)
    tokens = build("add", tokens, attention(build, y, build("transpose", y, perm=(0, 2, 1)), y, bias=random(2, 24, 24)))
    y = build("mul", tokens, build("mean", tokens, axes=(1,), keepdims=True))
    y = build("add", y, build("max", tokens, axes=(0,), keepdims=False))
    y = build("concat", build("slice", y, begin=(0, 3, 0), end=(2, 24, 8), strides=(1, 1, 1)), constant(build, 2, 3, 8),
              axis=1)  # fmt: skip
    y = build("reshape", build("add", y, constant(build, 24, 8)), shape=(2, 4, 6, 8))
    build.graph.outputs = [
        tokens,
        build("depthwise_conv2d", y, constant(build, 3, 3, 8, 1), None, strides=(1, 1), pads=((1, 1), (1, 1)),
              dilation=(1, 1)),
    ]  # fmt: skip
    graph = rewrite(build.graph)
    assert difference(graph, tmp_path, random(2, 4, 6, 3), target=target) <= 1e-5
    found = program(graph, tmp_path / "again", target=target).operations
    assert "linear" not in found and found["conv"] == (6 if target == "iOS15" else 4)


@pytest.mark.once
@pytest.mark.parametrize("target", ["iOS15", "iOS18"])
@pytest.mark.parametrize("biases", [(), (0, 2), (0, 1, 2)])
def test_queries_keys_and_values_in_one(biases, target, tmp_path):
    """With and without biases, as BEiT has none for the keys; the weights become of one size, and the answer stays."""
    build = Builder()
    x = build.input("x", (2, 7, 8))
    parts = []
    for i, scale in enumerate((1 / 8, 2, 1)):
        bias = constant(build, 8, seed=i) if i in biases else None
        y = build("dense", x, build.constant(scale * random(8, 8, seed=i)), bias)
        perm = (0, 2, 3, 1) if i == 1 else (0, 2, 1, 3)
        parts.append(build("transpose", build("reshape", y, shape=(2, 7, 2, 4)), perm=perm))
    build.graph.outputs = [attention(build, *parts)]
    graph = rewrite(build.graph)
    assert difference(graph, tmp_path, random(2, 7, 8), target=target) <= 1e-5
    package = program(graph, tmp_path / "again", target=target)
    assert package.operations["linear"] == package.operations["split"] == package.operations["transpose"] == 1
    (weight,) = [arguments["weight"] for kind, arguments, _ in package._steps if kind == "linear"]
    sizes = np.sqrt(np.square(weight.reshape(3, -1)).mean(1))
    assert 0.4 < sizes[0] / sizes[1] < 2.5


@pytest.mark.once
def test_metadata(tmp_path):
    about = dict(author="A. Nother", license="Apache-2.0", version="1.2", description="Tells leaves apart.")
    model = create("vit", width=64, mlp_hidden=128)
    artifact = coreml.export(model, tmp_path, compute_units="cpu_and_ne", **about)
    small = coreml.quantize(artifact, "int8")
    for file in (artifact, small):
        runner = coreml.load(file)
        found = runner._program.spec.description.metadata
        assert (found.author, found.license, found.versionString, found.shortDescription) == tuple(about.values())
        assert runner.compute_units == "cpu_and_ne" and coreml.load(file, "cpu_only").compute_units == "cpu_only"
    with pytest.raises(ValueError, match=r"compute_units must be one of all, cpu_only.*'gpu'"):
        coreml.load(artifact, "gpu")


@pytest.mark.once
@pytest.mark.parametrize("layout", coreml.LAYOUTS)
def test_several_outputs(layout, tmp_path):
    """Three images by a file for two: tokens of three axes and a pooled vector, named as in the Keras model."""
    model = create("vit").features([0, 1, "norm", "pool"])
    x = images(model, 3)
    artifact = coreml.export(model, tmp_path, precision="float32", batch=2, layout=layout)
    found = coreml.load(artifact).predict(x)
    assert len(found) == 4 and tuple(found) == artifact.output_names == tuple(model.output_names)
    for y, expected in zip(found.values(), trace(model, 3)(x), strict=True):
        assert close(y, expected)
    with pytest.raises(ValueError, match=r"'block_0' is of the kind 'tokens'.*softmax"):
        coreml.export(model, tmp_path, head="softmax")


@pytest.mark.once
@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs on macOS only")
@pytest.mark.parametrize("compute_units", coreml.COMPUTE_UNITS)
@pytest.mark.parametrize("options", [{}, dict(target="iOS18"), dict(layout="ane")], ids=["default", "iOS18", "ane"])
@pytest.mark.parametrize("name", ["vit", "mobilevit"])
def test_core_ml_equals_model(name, options, compute_units, tmp_path):
    """What Core ML itself makes of a file on each compute unit, within the rounding of float16 on the way."""
    model = create(name)
    x = images(model, 3)
    runner = coreml.load(coreml.export(model, tmp_path, compute_units=compute_units, **options))
    assert runner.verified_by == "Core ML on macOS"
    assert close(runner.predict(x), logits(model, x), rounding(runner))


class StandIn:
    """MLModel as coremltools documents it for a Mac: a picture or an array of the declared kind and size for one image
    in, arrays, or a label and a dict of probabilities, out. What it computes, the reference evaluator does."""

    def __init__(self, path, compute_units):
        self.program, self.compute_units = mlprogram.Program(pathlib.Path(path)), compute_units

    def predict(self, data):
        given = {}
        for feature in self.program.spec.description.input:
            value, kind = data[feature.name], feature.type.WhichOneof("Type")
            if kind == "imageType":
                declared = feature.type.imageType
                mode = "L" if declared.colorSpace == declared.GRAYSCALE else "RGB"
                assert (value.mode, value.size) == (mode, (declared.width, declared.height))
                value = np.asarray(value).reshape(declared.height, declared.width, -1)
            else:
                assert isinstance(value, np.ndarray) and list(value.shape) == list(feature.type.multiArrayType.shape)
            given[feature.name] = value[None]
        return {name: value[0] for name, value in self.program(given).items()}


@pytest.mark.once
@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML itself runs on this machine: test_core_ml_equals_model")
@pytest.mark.parametrize("kind", ["array", "picture", "classes", "several", "batch"])
def test_a_mac_is_asked_for_the_same_numbers(kind, tmp_path, monkeypatch):
    """On macOS MLModel.predict gives what is verified; here a stand-in for it, told by its documentation."""
    model = create("vit", class_names=list("abcde") if kind == "classes" else None)
    if kind == "several":
        model = model.features([0, "norm", "pool"])
    pictures = kind in ("picture", "classes")
    options = dict(image_input=True) if pictures else dict(batch=2) if kind == "batch" else {}
    artifact = coreml.export(model, tmp_path, compute_units="cpu_and_ne", precision="float32", **options)
    x = images(model, 3)
    if pictures:
        x = np.random.default_rng(0).integers(0, 256, x.shape, np.uint8)
    elsewhere = coreml.load(artifact).predict(x)
    monkeypatch.setattr(runtime, "sys", types.SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(common.coremltools().models, "MLModel", StandIn)
    runner = coreml.load(artifact)
    assert runner._model.compute_units.name == "CPU_AND_NE"
    found = runner.predict(x)
    if kind == "several":
        assert list(found) == list(elsewhere) == list(artifact.output_names)
        found, elsewhere = (np.concatenate([y.ravel() for y in by_name.values()]) for by_name in (found, elsewhere))
    else:
        check = verify(artifact, model, x)
        assert check.verified_by == "Core ML on macOS" and check.sqnr_db > 60
    np.testing.assert_allclose(found, elsewhere, atol=1e-5)


@pytest.mark.once
def test_batch_image_size_and_features(tmp_path):
    model = create("vit")
    artifact = coreml.export(
        model, tmp_path, precision="float32", batch=2, image_size=(32, 48), features=[0, "pool"], head="softmax"
    )
    assert artifact.input.shape == (2, 32, 48, 3)
    wide = model.resized((32, 48))
    x = images(wide, 4)
    logits, block, pool = wide.predict(x, verbose=0), *wide.features([0, "pool"]).predict(x, verbose=0)
    found = coreml.load(artifact).predict(x)
    assert list(found) == ["probabilities", "block_0", "pool"] == list(artifact.output_names)
    chances = keras.ops.convert_to_numpy(keras.ops.softmax(logits))
    assert all(close(y, expected) for y, expected in zip(found.values(), (chances, block, pool), strict=True))


@pytest.mark.once
def test_the_same_model_gives_the_same_program(tmp_path):
    """Byte for byte, the manifest's identifiers included."""
    model = create("vit")
    one, two = (coreml.export(model, tmp_path / name).path for name in ("one", "two"))
    assert files.sha256(one) == files.sha256(two)


@pytest.mark.once
def test_a_program_that_a_pass_breaks_is_not_written(monkeypatch, tmp_path):
    """coremltools' check of its program comes after the last pass, and only there."""
    common.coremltools()
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    def breaks(graph_pass, program):
        (function,) = program.functions.values()
        function.outputs[0]._child_ops.append(function.outputs[0].op)

    monkeypatch.setattr(type(PASS_REGISTRY["common::topological_reorder"]), "apply", breaks)
    with pytest.raises(Exception, match="should be consumed by op"):
        coreml.export(create("vit"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_errors(tmp_path):
    model = create("vit")
    for options, message in [
        (dict(precision="float8"), "float16, float32.*float8"),
        (dict(target="android"), "iOS16.*android"),
        (dict(layout="nchw"), "default, ane.*nchw"),
        (dict(compute_units="gpu"), "cpu_and_gpu.*'gpu'"),
        (dict(head="top_k"), "softmax.*top_k"),
        (dict(batch=2, image_input=True), "one picture.*batch 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            coreml.export(model, tmp_path, **options)
    with pytest.raises(ValueError, match="twice"):
        coreml.export(create("vit", class_names=list("aabcd")), tmp_path, head="softmax")
    image = keras.Input((8, 8, 3))
    with pytest.raises(ValueError, match="preprocessing"):
        coreml.export(keras.Model(image, keras.layers.Flatten()(image)), tmp_path, image_input=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot write"):
        coreml.export(model, tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.once
def test_nothing_is_left_when_the_disk_is_full(tmp_path, monkeypatch):
    model = create("vit")
    artifact = coreml.export(model, tmp_path)
    before = files.sha256(artifact.path)

    def save(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.coremltools().models.MLModel, "save", save)
    with pytest.raises(ValueError, match="No space left on device"):
        coreml.export(model, tmp_path)
    assert files.sha256(artifact.path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [artifact.path.name, artifact.path.name + ".json"]


# ---------------------------------------------------------------- pictures and classes

PREPROCESSINGS = {
    "equal": Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.25, 0.25, 0.25)),
    "unequal": Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "bgr": Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.9, 1.0, 1.1), channel_order="bgr"),
}


@pytest.mark.parametrize(
    "family_name, name", [("vit", "bgr"), ("vit", "equal"), ("vit", "unequal"), ("mobilevit", "bgr")]
)
@pytest.mark.once
def test_image_input_normalises_as_the_model_says(family_name, name, tmp_path):
    """Pixels in, with stems that pad (mobilevit) and that do not."""
    model = create(family_name, preprocessing=PREPROCESSINGS[name])
    prep = model.preprocessing
    pixels = np.random.default_rng(0).integers(0, 256, (3, *model.input_shape[1:]), np.uint8)
    planes = pixels[..., ::-1] if prep.channel_order == "bgr" else pixels
    expected = logits(model, (planes / 255 - prep.mean) / prep.std)
    artifact = coreml.export(model, tmp_path, precision="float32", image_input=True)
    assert artifact.input.dtype == "image" and artifact.outputs[0].kind == "logits"
    assert np.abs(coreml.load(artifact).predict(pixels) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.once
def test_a_grey_picture(tmp_path):
    model = create("vit", in_channels=1)
    artifact = coreml.export(model, tmp_path, precision="float32", image_input=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *model.input_shape[1:]), np.uint8)
    mean, std = model.preprocessing.mean[0], model.preprocessing.std[0]
    expected = logits(model, (pixels / 255 - mean) / std)
    assert np.abs(coreml.load(artifact).predict(pixels) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.once
def test_the_same_bytes_whatever_the_order_of_the_metadata(tmp_path):
    build = Builder()
    build.graph.outputs = [build("relu", build.input("x", (1, 4)))]
    entries, found = [(f"key {i}", str(i)) for i in range(40)], []
    for order in (entries, entries[::-1]):
        model = coreml.write(build.graph, precision="float32")
        model.user_defined_metadata.update(order)
        path = tmp_path / f"{len(found)}.mlpackage"
        writer.save(model, path)
        assert dict(mlprogram.Program(path).spec.description.metadata.userDefined).items() >= dict(entries).items()
        found.append(files.sha256(path))
    assert found[0] == found[1]


@pytest.mark.once  # what follows the Graph; that it is the model on every backend is in test_model_equals_file
def test_a_classifier(tmp_path):
    """A picture in, labelled probabilities out, also after compression; a softmax without labels is plain numbers."""
    names = ["zebra", "apple", "ünicode", "d", "e"]
    model = create("vit", class_names=names)
    pixels = np.random.default_rng(0).integers(0, 256, (4, *model.input_shape[1:]), np.uint8)
    prep = model.preprocessing
    scores = np.exp(logits(model, (pixels / 255 - prep.mean) / prep.std))
    expected = scores / scores.sum(-1, keepdims=True)
    artifact = coreml.export(model, tmp_path, precision="float32", image_input=True)
    assert artifact.outputs[0].kind == "probabilities" and artifact.class_names == tuple(names)
    np.testing.assert_allclose(coreml.load(artifact).predict(pixels), expected, atol=1e-5)
    package = mlprogram.Program(artifact.path)
    assert package({"image": pixels})["classLabel"] == [names[i] for i in expected.argmax(-1)]
    metadata = json.loads(package.spec.description.metadata.userDefined["com.github.keras-vits"])
    assert metadata["class_names"] == names and metadata["preprocessing"]["mean"] == list(prep.mean)
    small = coreml.load(coreml.quantize(artifact, "int8")).predict(pixels)
    np.testing.assert_allclose(small.sum(-1), 1, atol=1e-5)
    numbers = coreml.export(create("vit"), tmp_path, head="softmax", name="numbers")
    assert numbers.output_names == ("probabilities",) and numbers.path.name == "numbers_float16.mlpackage"
    np.testing.assert_allclose(coreml.load(numbers).predict(images(model)).sum(-1), 1, atol=2e-3)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


@pytest.mark.once
def test_a_single_class(tmp_path):
    """A sigmoid makes its probability, and the file is no classifier, since Core ML's has two labels or more."""
    model = create("vit", num_classes=1, class_names=["leaf"])
    x = images(model, 3)
    bare = coreml.export(model, tmp_path, precision="float32")
    assert (bare.outputs[0].kind, bare.outputs[0].name) == ("binary_logit", "logits")
    assert close(coreml.load(bare).predict(x), logits(model, x))
    assert verify(bare, model, x).top1_agreement == 1
    pixels = np.random.default_rng(0).integers(0, 256, x.shape, np.uint8)
    prep = model.preprocessing
    expected = sigmoid(logits(model, (pixels / 255 - prep.mean) / prep.std))
    artifact = coreml.export(model, tmp_path, precision="float32", image_input=True, name="picture")
    (spec,) = artifact.outputs
    assert (spec.kind, spec.applied, spec.classes, spec.class_names) == ("probabilities", "sigmoid", 1, ("leaf",))
    runner = coreml.load(artifact)
    assert runner.predict(pixels).shape == (3, 1) and "classify" not in runner.histogram()
    np.testing.assert_allclose(runner.predict(pixels), expected, atol=1e-5)
    assert verify(artifact, model, pixels).max_abs_error <= 1e-5


def mobilenet():
    model = keras.applications.MobileNetV2(weights=None, alpha=0.35, input_shape=(32, 32, 3), classes=4)
    return randomize(model)


def yes_or_no():
    image = keras.Input((8, 8, 3))
    return keras.Model(image, keras.layers.Dense(1, activation="sigmoid")(keras.layers.Flatten()(image)))


@pytest.mark.once
@pytest.mark.parametrize("build, last", [(mobilenet, "softmax"), (yes_or_no, "sigmoid")])
def test_probabilities_stay_as_they_are(build, last, tmp_path):
    """A model that ends in softmax or sigmoid gets no second one, whichever head is asked for."""
    model = build()
    x = random(3, *model.input_shape[1:])
    expected = logits(model, x)
    for head in (None, "logits", "softmax"):
        artifact = coreml.export(model, tmp_path, precision="float32", head=head, name=f"head_{head}")
        (spec,) = artifact.outputs
        assert (spec.kind, spec.applied, spec.classes) == ("probabilities", "", expected.shape[1])
        runner = coreml.load(artifact)
        assert runner.histogram()[last] == 1 and len({"softmax", "sigmoid"} & set(runner.histogram())) == 1
        assert close(runner.predict(x), expected)


@pytest.mark.once
def test_a_foreign_classifier(tmp_path):
    """Class names and a preprocessing given to a model that ends in softmax make it a classifier of pictures."""
    model = mobilenet()
    model.class_names, model.preprocessing = list("abcd"), Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    artifact = coreml.export(model, tmp_path, precision="float32", image_input=True)
    runner = coreml.load(artifact)
    assert runner.histogram()["softmax"] == runner.histogram()["classify"] == 1
    assert close(runner.predict(pixels), logits(model, (pixels / 255 - 0.5) / 0.5))


@pytest.mark.once
def test_two_images_at_a_time_are_no_classifier(tmp_path):
    """Core ML's classifier has one label: a batch of images gives plain probabilities."""
    model = create("vit", class_names=list("abcde"))
    artifact = coreml.export(model, tmp_path, precision="float32", head="softmax", batch=2)
    runner = coreml.load(artifact)
    assert "classify" not in runner.histogram() and artifact.class_names == tuple("abcde")
    found = runner.predict(images(model, 3))
    scores = np.exp(logits(model, images(model, 3)))
    np.testing.assert_allclose(found, scores / scores.sum(-1, keepdims=True), atol=1e-5)


# ---------------------------------------------------------------- several inputs


def with_a_place():
    """A picture, a place and a season in, classes and a vector out; MIL allows no hyphen in a name."""
    image, place = keras.Input((8, 8, 3), name="an-image"), keras.Input((2,), name="place")
    season = keras.Input((), name="season", dtype="int32")
    x = keras.layers.Conv2D(4, 3, activation="relu")(image)
    x = keras.layers.Concatenate()(
        [keras.layers.GlobalAveragePooling2D()(x), place, keras.layers.Embedding(4, 3)(season)]
    )
    return keras.Model([image, place, season], {"logits": keras.layers.Dense(5)(x), "vector": x}, name="placed")


@pytest.mark.once
@pytest.mark.parametrize("layout", coreml.LAYOUTS)
@pytest.mark.parametrize("pictures", [False, True])
def test_several_inputs(pictures, layout, tmp_path):
    model = with_a_place()
    given = {"an-image": random(3, 8, 8, 3), "place": random(3, 2, seed=1), "season": np.int32([3, 0, 2])}
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    mean, std = np.float32((0.4, 0.5, 0.6)), np.float32((0.2, 0.25, 0.3))
    model.preprocessing = Preprocessing(mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    if pictures:
        given["an-image"] = ((pixels / 255 - mean) / std).astype(np.float32)
    expected = dict(zip(("logits", "vector"), trace(model, 3)(*given.values()), strict=True))
    kinds = {"logits": "logits", "vector": "features"}
    artifact = coreml.export(model, tmp_path, precision="float32", layout=layout, kinds=kinds, image_input=pictures)
    assert [(s.name, s.shape, s.dtype) for s in artifact.inputs] == [
        ("an_image", (1, 8, 8, 3), "image" if pictures else "float32"),
        ("place", (1, 2), "float32"),
        ("season", (1,), "int32"),
    ]
    assert {s.name: s.kind for s in artifact.outputs} == kinds
    given = {name.replace("-", "_"): x for name, x in given.items()}
    if pictures:
        given["an_image"] = pixels
    runner = coreml.load(artifact)
    found = runner.predict(given)
    assert list(found) == list(expected) and all(close(found[name], expected[name]) for name in found)
    call, _ = coreml.run({"path": artifact.path})()
    again = call(*(given[spec.name] for spec in artifact.inputs))  # as the measuring process calls it
    assert all(np.array_equal(again[name], found[name]) for name in found)
    for wrong, message in [
        (given["an_image"], r"several inputs, an_image, place, season: pass a dictionary"),
        ({"an_image": given["an_image"]}, r"takes an_image, place, season; received an_image"),
        ({**given, "place": random(3, 4)}, r"'place' of shape \(N, 2\); received \(3, 4\)"),
        ({**given, "place": random(2, 2)}, r"same number in each input; received 3, 2, 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            runner.predict(wrong)
    with pytest.raises(
        ValueError, match=r"several inputs: calibrate it with name -> array.*of an_image, place, season"
    ):
        half = coreml.export(model, tmp_path, layout=layout, kinds=kinds, name="half")
        coreml.quantize(half, "int8_int8", given["an_image"])


@pytest.mark.once
def test_which_input_is_the_picture_must_be_clear(tmp_path):
    one, two = keras.Input((8, 8, 3), name="one"), keras.Input((8, 8, 3), name="two")
    model = keras.Model([one, two], keras.layers.Flatten()(keras.layers.Add()([one, two])))
    model.preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(ValueError, match=r"one input of images.*one \(1, 8, 8, 3\), two \(1, 8, 8, 3\)"):
        coreml.export(model, tmp_path, image_input=True)


# ---------------------------------------------------------------- compression


@pytest.fixture(scope="module")
def wide():
    """A ViT with weights large enough to be compressed."""
    model = create("vit", width=64, mlp_hidden=128, depth=1)
    return model, images(model, 8), logits(model, images(model, 8))


def large_weights(runner):
    """Of the linear layers and convolutions, decoded, in the order of execution."""
    found = [arguments["weight"] for kind, arguments, _ in runner._program._steps if kind in ("linear", "conv")]
    return [weight for weight in found if weight.size > 2048]


@pytest.mark.once
@pytest.mark.parametrize(
    "recipe, bits, weight_db", [("int8", 8, 38), ("palette8", 8, 43), ("palette6", 6, 31), ("palette4", 4, 19)]
)
def test_quantize(wide, recipe, bits, weight_db, tmp_path):
    """Signal to noise of every weight tensor. For a normal distribution b bits placed best give 6 b - 4.4 dB (Panter
    and Dite); 8 bits in equal steps up to 4 standard deviations give 10 log10(12 (127 / 4)^2) = 41 dB, to 5 39 dB."""
    model, x, expected = wide
    full = coreml.export(model, tmp_path)
    artifact = coreml.quantize(full, recipe)
    assert artifact.path == tmp_path / f"{model.name}_{recipe}.mlpackage" and full.path.is_dir()
    assert plain(artifacts.load(artifact.path)) == plain(artifact) and system(artifact) == "iOS16"
    same = lambda a: dataclasses.replace(a, path=None, recipe="", sha256="", size_bytes=0)
    assert same(artifact) == same(full)
    weights = lambda a: (a.path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert weights(artifact) <= weights(full) * (bits / 16 + 0.15)
    runner = coreml.load(artifact)
    before, after = large_weights(coreml.load(full)), large_weights(runner)
    assert len(before) == len(after) == 7  # stem, query, key, value, out, fc1, fc2
    for w, q in zip(before, after, strict=True):
        assert 10 * np.log10(np.square(w).sum() / np.square(w - q).sum()) > weight_db
    if bits == 8:
        noise = runner.predict(x) - expected
        assert 10 * np.log10(np.square(expected).sum() / np.square(noise).sum()) > 30


def db(signal, noise):
    return 10 * np.log10(np.square(signal).sum() / np.square(noise).sum())


@pytest.mark.once
def test_int4(wide, tmp_path):
    """Blocks of 32 where they fit. The largest of 32 normal numbers lies at 2.3 standard deviations or so, half of
    them beyond; 15 steps up to 2.2 give 10 log10(12 (7 / 2.2)^2) = 20.8 dB, up to 2.7 19 dB."""
    model, x, expected = wide
    full = coreml.export(model, tmp_path)
    artifact = coreml.quantize(full, "int4")
    assert system(full) == "iOS15" and system(artifact) == "iOS18"
    before, after = large_weights(coreml.load(full)), large_weights(coreml.load(artifact))
    stem, *dense = [db(w, w - q) for w, q in zip(before, after, strict=True)]
    assert stem > 38  # 3 channels are no block of 32: it has 8 bits
    assert len(dense) == 6 and all(19 < found < 21 for found in dense)
    assert verify(artifact, expected, x).sqnr_db > 10  # 19 dB of each of seven layers in a row
    weights = lambda a: (a.path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert weights(artifact) < 0.45 * weights(full)


@pytest.mark.once
@pytest.mark.parametrize("name, layout", [("vit", "default"), ("vit", "ane"), ("mobilevit", "default")])
def test_int8_int8(name, layout, wide, tmp_path):
    """Every dense layer and convolution reads 8 bits and has weights of 8 bits."""
    model = wide[0] if name == "vit" else create(name)
    x = images(model, 24)
    full = coreml.export(model, tmp_path, layout=layout)
    artifact = coreml.quantize(full, "int8_int8", x)
    assert system(artifact) == "iOS17" and artifact.recipe == "int8_int8"
    runner = coreml.load(artifact)
    steps = runner._program._steps
    made = {name: kind for kind, _, outputs in steps for name, *_ in outputs}
    kernels = [arguments for kind, arguments, _ in steps if kind in ("linear", "conv")]
    assert all(made[arguments["x"]] == "dequantize" for arguments in kernels)
    assert all(len(np.unique(row)) <= 255 for arguments in kernels for row in arguments["weight"])
    assert runner.histogram()["constexpr_affine_dequantize"] == len(kernels)
    assert verify(artifact, logits(model, x[:8]), x[:8]).sqnr_db > {"vit": 25, "mobilevit": 12}[name]


@pytest.mark.once
def test_ranges_are_those_of_all_calibration_images(wide, tmp_path):
    """A narrow last batch narrows nothing (apple/coremltools#2704): the order of the images does not matter."""
    model, x, _ = wide
    full = coreml.export(model, tmp_path)
    calibration = np.concatenate([x, x[:1] / 100])
    scales = []
    for order in (1, -1):
        steps = coreml.load(coreml.quantize(full, "int8_int8", calibration[::order]))._program._steps
        scales.append([float(arguments["scale"]) for kind, arguments, _ in steps if kind == "quantize"])
    assert scales[0] == scales[1]
    assert scales[0][0] == pytest.approx(np.abs(x).max() / 127, rel=2e-3)  # of the image itself, in float16
    ranges = mlprogram.Program(full.path).ranges({"image": image[None, None]} for image in calibration)
    assert ranges["image"] == (x.min(), x.max())


@pytest.mark.once
def test_calibration_of_a_classifier_of_pictures(tmp_path):
    """Pixels calibrate a file that takes pixels, and labels do not disturb (apple/coremltools#2253)."""
    model = create("vit", width=64, mlp_hidden=128, class_names=list("abcde"))
    pixels = np.random.default_rng(0).integers(0, 256, (9, *model.input_shape[1:]), np.uint8)
    full = coreml.export(model, tmp_path, image_input=True)
    small = coreml.quantize(full, "int8_int8", pixels)
    assert small.outputs[0].kind == "probabilities" and small.class_names == tuple("abcde")
    np.testing.assert_allclose(coreml.load(small).predict(pixels), coreml.load(full).predict(pixels), atol=0.05)


@pytest.mark.once
def test_quantize_errors(wide, tmp_path):
    full = coreml.export(wide[0], tmp_path)
    with pytest.raises(ValueError, match=r"int3.*palette8"):
        coreml.quantize(full, "int3")
    with pytest.raises(ValueError, match="precision"):
        coreml.quantize(full, "float16")
    with pytest.raises(ValueError, match="needs calibration"):
        coreml.quantize(full, "int8_int8")
    with pytest.raises(ValueError, match=r"\(N, 32, 32, 3\).*\(2, 8, 8, 3\)"):
        coreml.quantize(full, "int8_int8", np.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"float16 file.*float32"):
        coreml.quantize(coreml.export(wide[0], tmp_path, precision="float32"), "int8_int8", wide[1])
    with pytest.raises(ValueError, match=r"coreml\.export"):
        coreml.quantize(coreml.quantize(full, "int8"), "int8")
    weights = full.path / "Data/com.apple.CoreML/weights/weight.bin"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="export the model again"):
        coreml.quantize(full, "int8")
    with pytest.raises(ValueError, match="export the model again"):
        coreml.load(full)


@pytest.mark.once
def test_palettes_name_the_package_that_they_need(wide, tmp_path, monkeypatch):
    full = coreml.export(wide[0], tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r'scikit-learn: pip install -e "\.\[coreml\]"'):
        coreml.quantize(full, "palette4")
    other = coreml.quantize(full, "int8", folder=tmp_path / "small")  # which needs none
    assert other.path == tmp_path / "small" / f"{full.model}_int8.mlpackage"
    assert [p.name for p in tmp_path.glob("*palette*")] == []


@pytest.mark.once
def test_images_of_another_size_are_refused(wide, tmp_path):
    runner = coreml.load(coreml.export(wide[0], tmp_path))
    with pytest.raises(ValueError, match=r"\(N, 32, 32, 3\).*\(1, 16, 16, 3\)"):
        runner.predict(np.zeros((1, 16, 16, 3), np.float32))


@pytest.mark.once
def test_the_graph_is_written_without_keras(tmp_path):
    """A traced model and its Graph give the same file."""
    model = create("vit")
    graph = rewrite(trace(model))
    x = images(model, 1)
    assert difference(graph, tmp_path, x) <= 1e-5
