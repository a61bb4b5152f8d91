"""Rewriting: exact, and each rule does what it says."""

import numpy as np
import pytest
from families import FAMILIES, images

from keras_vits.edge import trace
from keras_vits.graph.ir import Builder
from keras_vits.graph.rewrite import rewrite, with_head, with_pixels
from keras_vits.preprocess import Preprocessing
from keras_vits.specs import OutputSpec, classification

pytestmark = pytest.mark.once  # it knows Graphs alone, which are the same on every backend

family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
RANDOM = np.random.default_rng(0)
CONV = dict(strides=(1, 1), pads=((0, 0), (0, 0)), dilation=(1, 1))


def random(*shape):
    return RANDOM.normal(size=shape).astype("float32")


def check(build, output, expected, bound=1e-5):
    """The rewritten graph computes the same and has the expected operations; returns it."""
    build.graph.outputs = list(output) if isinstance(output, (list, tuple)) else [output]
    x = [random(*v.shape) for v in build.graph.inputs]
    before = build.graph(*x)
    names = [v.name for node in build.graph.nodes for v in node.outputs]
    after = rewrite(build.graph)
    assert names == [v.name for node in build.graph.nodes for v in node.outputs], "the given graph was changed"
    for a, b in zip(before, after(*x), strict=True):
        assert np.abs(a - b).max() <= bound * np.abs(a).max()
    assert after.histogram() == expected
    return after


def test_distilled_model_ends_in_one_dense_layer_of_two_tokens():
    model = FAMILIES[0].create(distill_token=True)
    graph, x = trace(model), images(model, 1)
    after = rewrite(graph)
    expected = graph(x)[0]
    assert np.abs(after(x)[0] - expected).max() <= 1e-5 * np.abs(expected).max()
    assert [node.op for node in after.nodes[-3:]] == ["layer_norm", "reshape", "dense"]
    assert after.nodes[-3].output.shape == (1, 2, 24)


@pytest.mark.parametrize("keys_last", [False, True])
def test_a_bias_of_the_keys_goes(keys_last):
    """It adds the same number to all scores of a query; one that differs from key to key stays, and so do others."""
    b = Builder()
    x = b.input("x", (2, 7, 6))
    heads = lambda v, perm: b("transpose", b("reshape", v, shape=(2, 7, 3, 4)), perm=perm)
    q, k, v = (b("dense", x, b.constant(random(12, 6)), b.constant(10 * random(12), name)) for name in "qkv")
    k = heads(k, (0, 2, 3, 1) if keys_last else (0, 2, 1, 3))
    scores = b("matmul", heads(q, (0, 2, 1, 3)), k, transpose_b=not keys_last)
    y = b("matmul", b("softmax", scores, axis=3), heads(v, (0, 2, 1, 3)))
    after = check(b, y, dict(dense=3, reshape=3, transpose=3, matmul=2, softmax=1))
    assert {c.name for c in after.constants() if len(c.shape) == 1} == {"q", "v"}

    b = Builder()
    x, queries = b.input("x", (2, 4, 3)), b.input("queries", (2, 5, 6))
    k = b("reshape", b("dense", x, b.constant(random(12, 3)), b.constant(random(12), "k")), shape=(2, 8, 6))
    y = b("softmax", b("matmul", queries, k, transpose_b=True), axis=2)
    after = check(b, y, dict(dense=1, reshape=1, matmul=1, softmax=1))
    assert {c.name for c in after.constants() if len(c.shape) == 1} == {"k"}


@family
def test_families_keep_their_outputs(family):
    graph = trace(family.create())
    x = images(family.create(), 1)
    after = rewrite(graph)
    expected = graph(x)[0]
    assert np.abs(after(x)[0] - expected).max() <= 1e-5 * np.abs(expected).max()
    roots = after.histogram().get("rsqrt", 0)  # each is computed in six steps more, for half precision
    assert len(after.nodes) < len(graph.nodes) + 6 * roots
    assert len({v.name for node in after.nodes for v in node.outputs}) == sum(len(n.outputs) for n in after.nodes)
    assert "neg" not in after.histogram()
    assert all(node.inputs[1].data is None for node in after.nodes if node.op in ("sub", "div"))


def test_bias_and_batch_norm_go_into_the_weights():
    b = Builder()
    x = b.input("x", (1, 6, 6, 3))
    y = b("conv2d", x, b.constant(random(3, 3, 3, 4)), None, groups=1, **CONV)
    y = b("add", b("mul", b("add", y, b.constant(random(1, 1, 1, 4))), b.constant(random(4))), b.constant(random(4)))
    y = b("depthwise_conv2d", y, b.constant(random(3, 3, 4, 2)), None, **CONV)
    y = b("add", b("mul", y, b.constant(random(8))), b.constant(random(8)))
    y = b("sub", b("div", b("dense", y, b.constant(random(5, 8)), None), b.constant(random(5))), b.constant(random(5)))
    check(b, y, {"conv2d": 1, "dense": 1, "depthwise_conv2d": 1})


def test_scales_and_offsets_cross_a_concat_into_the_weights():
    b = Builder()
    x = b.input("x", (1, 6, 6, 3))
    local = b("conv2d", x, b.constant(random(3, 3, 3, 4)), b.constant(random(4)), groups=1, **CONV)
    plain = b("conv2d", x, b.constant(random(3, 3, 3, 2)), None, groups=1, **CONV)
    y = b("add", b("mul", b("concat", local, plain, axis=3), b.constant(random(6))), b.constant(random(1, 1, 1, 6)))
    check(b, y, {"conv2d": 2, "concat": 1})


def test_a_concat_of_something_else_keeps_its_scale():
    b = Builder()
    x = b.input("x", (1, 6, 6, 3))
    local = b("conv2d", b("abs", x), b.constant(random(1, 1, 3, 4)), None, groups=1, **CONV)
    check(b, b("mul", b("concat", local, x, axis=3), b.constant(random(7))),
          {"abs": 1, "conv2d": 1, "concat": 1, "mul": 1})  # fmt: skip


@pytest.mark.parametrize("biases", [0, 1, 2])
def test_two_heads_become_one(biases):
    b = Builder()
    x = b("softmax", b.input("x", (2, 2, 8)), axis=2)
    tokens = [b("reshape", b("slice", x, begin=(0, i, 0), end=(2, i + 1, 8), strides=(1, 1, 1)), shape=(2, 8))
              for i in (0, 1)]  # fmt: skip
    heads = [b("dense", t, b.constant(random(5, 8)), b.constant(random(5)) if i < biases else None)
             for i, t in enumerate(tokens)]  # fmt: skip
    y = b("div", b("add", *heads), b.constant(np.float32(2)))
    check(b, y, {"dense": 1, "reshape": 1, "softmax": 1})


@pytest.mark.parametrize("pool", ["max_pool2d", "avg_pool2d"])
def test_a_pooling_of_single_pixels_is_a_convolution_of_ones(pool):
    b = Builder()
    x = b.input("x", (1, 6, 6, 3))
    sparse = b(pool, x, size=(1, 1), strides=(2, 2), pads=((0, 0), (0, 0)))
    wide = b(pool, x, size=(2, 2), strides=(2, 2), pads=((0, 0), (0, 0)))
    check(b, b("add", sparse, wide), {"add": 1, "depthwise_conv2d": 1, pool: 1})


def test_equal_chains_that_later_rules_shorten_are_shared():
    b = Builder()
    x = b.input("x", (2, 3, 4))
    chain = lambda: b("reshape", b("reshape", b("abs", x), shape=(6, 4)), shape=(2, 12))
    check(b, b("add", chain(), chain()), {"abs": 1, "add": 1, "reshape": 1})


def test_a_value_read_twice_is_not_folded_away():
    b = Builder()
    x = b.input("x", (1, 4))
    y = b("dense", x, b.constant(random(4, 4)), None)
    check(b, b("add", b("mul", y, b.constant(random(4))), y), {"add": 1, "dense": 1, "mul": 1})


def test_input_normalisation_goes_into_an_unpadded_convolution():
    b = Builder()
    x = b.input("x", (1, 6, 6, 3))
    y = b("add", b("mul", b("reverse", x, axes=(3,)), b.constant(random(3))), b.constant(random(3)))
    check(b, b("conv2d", y, b.constant(random(2, 2, 3, 4)), None, groups=1, **CONV), {"conv2d": 1})


def test_an_offset_stays_before_a_padded_convolution():
    b = Builder()
    x = b.input("x", (1, 6, 6, 3))
    y = b("add", b("mul", x, b.constant(random(3))), b.constant(random(3)))
    padded = {**CONV, "pads": ((1, 1), (1, 1))}
    check(
        b, b("conv2d", y, b.constant(random(3, 3, 3, 4)), None, groups=1, **padded), {"add": 1, "conv2d": 1, "mul": 1}
    )


def test_joint_projection_splits_and_takes_the_attention_scale():
    b = Builder()
    x = b.input("x", (1, 6, 8))
    qkv = b("add", b("dense", x, b.constant(random(24, 8)), None), b.constant(random(24)))
    part = lambda i: b("slice", qkv, begin=(0, 0, 8 * i), end=(1, 6, 8 * i + 8), strides=(1, 1, 1))
    heads = lambda v: b("transpose", b("reshape", v, shape=(1, 6, 2, 4)), perm=(0, 2, 1, 3))
    q, k, v = (heads(part(i)) for i in range(3))
    scores = b("softmax", b("matmul", b("mul", q, b.constant(0.5)), k, transpose_b=True), axis=3)
    y = b("matmul", scores, v)
    check(b, y, {"dense": 3, "reshape": 3, "transpose": 3, "matmul": 2, "softmax": 1})


def test_overlapping_slices_do_not_split_a_dense():
    b = Builder()
    y = b("dense", b.input("x", (2, 8)), b.constant(random(6, 8)), None)
    parts = [b("slice", y, begin=(0, i), end=(2, i + 4), strides=(1, 1)) for i in (0, 2)]
    check(b, parts, {"slice": 2, "dense": 1})


def test_only_the_class_token_is_computed_after_the_last_keys_and_values():
    """A pre-norm block of 8 tokens of which the first is read: two products see all tokens, the rest only one."""
    b = Builder()
    dense = lambda x, n: b("dense", x, b.constant(random(n, x.shape[-1])), b.constant(random(n)))
    norm = lambda x: b("layer_norm", x, b.constant(random(8)), b.constant(random(8)), axes=(2,), epsilon=1e-6)
    x = b.input("x", (1, 8, 8))
    qkv = dense(norm(x), 24)
    part = lambda i: b("slice", qkv, begin=(0, 0, 8 * i), end=(1, 8, 8 * i + 8), strides=(1, 1, 1))
    heads = lambda i: b("transpose", b("reshape", part(i), shape=(1, 8, 2, 4)), perm=(0, 2, 1, 3))
    scores = b("softmax", b("matmul", heads(0), heads(1), transpose_b=True), axis=3)
    y = b("reshape", b("transpose", b("matmul", scores, heads(2)), perm=(0, 2, 1, 3)), shape=(1, 8, 8))
    x = b("add", x, dense(y, 8))
    x = b("add", x, dense(b("gelu", dense(norm(x), 16), approximate=False), 8))
    y = b("reshape", b("slice", norm(x), begin=(0, 0, 0), end=(1, 1, 8), strides=(1, 1, 1)), shape=(1, 8))
    build = b.graph
    build.outputs = [y]
    given = random(1, 8, 8)
    after = rewrite(build)
    assert np.abs(after(given)[0] - build(given)[0]).max() <= 1e-5 * np.abs(build(given)[0]).max()
    assert sorted(node.output.shape[1] for node in after.nodes if node.op == "dense") == [1, 1, 1, 1, 8, 8]


@pytest.mark.parametrize(
    ("op", "shapes", "attrs", "axis"),
    [
        ("add", [(2, 6, 4), (6, 1)], {}, 1),
        ("mul", [(6, 4), (5, 6, 4)], {}, 0),
        ("softmax", [(2, 6, 4)], dict(axis=2), 1),
        ("matmul", [(2, 4, 6), (2, 4, 8)], dict(transpose_a=True), 1),
        ("matmul", [(2, 5, 6, 4), (2, 5, 8, 4)], dict(transpose_b=True), 1),
        ("transpose", [(2, 6, 4)], dict(perm=(1, 2, 0)), 0),
        ("reshape", [(2, 6, 4)], dict(shape=(2, 6, 2, 2)), 1),
    ],
)
def test_a_slice_moves_up(op, shapes, attrs, axis):
    b = Builder()
    inputs = [b("mul", b.input(f"x{i}", shape), b.constant(2.0)) for i, shape in enumerate(shapes)]
    y = b(op, *inputs, **attrs)
    end = tuple(3 if i == axis else n for i, n in enumerate(y.shape))
    y = b("slice", y, begin=tuple(int(i == axis) for i in range(len(end))), end=end, strides=(1,) * len(end))
    b.graph.outputs = [y]
    x = [random(*shape) for shape in shapes]
    after = rewrite(b.graph)
    np.testing.assert_allclose(after(*x)[0], b.graph(*x)[0], rtol=1e-5, atol=1e-6)
    assert "slice" in [node.op for node in after.nodes[:-1]] and after.nodes[-1].op == op


@pytest.mark.parametrize(("op", "attrs"), [("softmax", dict(axis=1)), ("reshape", dict(shape=(4, 6)))])
def test_a_slice_stays_behind_what_mixes_its_axis(op, attrs):
    b = Builder()
    y = b(op, b.input("x", (2, 12)), **attrs)
    end = (y.shape[0], 3)
    check(b, b("slice", y, begin=(0, 1), end=end, strides=(1, 1)), {op: 1, "slice": 1})


def test_gains_and_offsets_of_a_norm_go_into_every_dense_that_reads_it():
    b = Builder()
    norm = b(
        "layer_norm", b.input("x", (1, 6, 8)), b.constant(random(8)), b.constant(random(8)), axes=(2,), epsilon=1e-6
    )
    after = check(
        b, [b("dense", norm, b.constant(random(3, 8)), None) for _ in range(2)], {"dense": 2, "layer_norm": 1}
    )
    assert after.nodes[0].inputs[1:] == (None, None)


def test_a_norm_that_is_read_otherwise_keeps_its_gains():
    b = Builder()
    norm = b(
        "layer_norm", b.input("x", (1, 6, 8)), b.constant(random(8)), b.constant(random(8)), axes=(2,), epsilon=1e-6
    )
    y = [b("dense", norm, b.constant(random(3, 8)), None), b("relu", norm)]
    assert check(b, y, {"dense": 1, "layer_norm": 1, "relu": 1}).nodes[0].inputs[1] is not None


def test_padding_merges_and_loses_what_no_window_reads():
    b = Builder()
    x = b("pad", b.input("x", (1, 8, 8, 3)), pads=((0, 0), (1, 1), (1, 1), (0, 0)), mode="constant", value=0.0)
    y = b(
        "conv2d",
        x,
        b.constant(random(3, 3, 3, 4)),
        None,
        strides=(2, 2),
        pads=((0, 0), (0, 0)),
        dilation=(1, 1),
        groups=1,
    )
    after = check(b, y, {"conv2d": 1})
    assert after.nodes[0].attrs["pads"] == ((1, 0), (1, 0))


def test_arrangement_merges():
    b = Builder()
    x = b.input("x", (1, 4, 6))
    y = b("transpose", b("transpose", x, perm=(0, 2, 1)), perm=(0, 2, 1))
    y = b("reshape", b("reshape", b("mul", y, b.constant(1.0)), shape=(4, 6)), shape=(6, 4))
    y = b("transpose", b("reshape", y, shape=(6, 1, 4)), perm=(1, 0, 2))
    check(b, y, {"reshape": 1})


@pytest.mark.parametrize("flags", [{}, {"transpose_a": True}, {"transpose_b": True}])
def test_products_read_what_is_transposed_as_it_is(flags):
    """And a transpose that something else reads, too, or that moves other axes, stays."""
    b = Builder()
    q, k, v = (b.input(name, (1, 2, 6, 6)) for name in "qkv")
    swapped = [b("transpose", x, perm=(0, 1, 3, 2)) for x in (q, k)]
    check(b, b("matmul", *swapped, **flags), {"matmul": 1})
    check(b, [b("matmul", swapped[0], v), b("exp", swapped[0])], {"matmul": 1, "transpose": 1, "exp": 1})
    check(
        b, b("matmul", b("transpose", q, perm=(0, 2, 1, 3)), b.input("w", (1, 6, 6, 6))), {"matmul": 1, "transpose": 1}
    )


def test_constants_fold_and_equal_nodes_are_shared():
    b = Builder()
    x = b.input("x", (2, 3))
    table = b("mul", b("tile", b.constant(random(1, 3)), reps=(2, 1)), b.constant(2.0))
    y = b("add", b("exp", b("add", x, table)), b("exp", b("add", x, table)))
    b("sqrt", x)  # dead
    check(b, y, {"add": 2, "exp": 1})


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@family
def test_pixels_are_normalised_inside(family, order):
    model = family.create()
    preprocessing = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), channel_order=order)
    graph = trace(model)
    pixels = RANDOM.integers(0, 256, graph.inputs[0].shape, dtype=np.uint8)
    expected = graph(preprocessing.normalize(pixels))[0]
    found = rewrite(with_pixels(graph, graph.inputs[0], preprocessing))
    assert found.inputs[0].dtype == "uint8"
    assert np.abs(found(pixels)[0] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_heads():
    b = Builder()
    b.graph.outputs = [b("mul", b.input("x", (1, 6)), b.constant(2.0))]
    x, logits = random(1, 6), (classification("logits", 6, shape=(1, 6)),)
    graph, (spec,) = with_head(b.graph, logits, "softmax")
    probabilities = graph(x)[0]
    assert probabilities.sum() == pytest.approx(1, abs=1e-6)
    assert (spec.name, spec.kind, spec.applied) == ("probabilities", "probabilities", "softmax")
    graph, specs = with_head(b.graph, logits, "top_k", 3)
    scores, classes = graph(x)
    assert [(s.name, s.shape) for s in specs] == [("scores", (1, 3)), ("classes", (1, 3))]
    assert classes[0].tolist() == np.argsort(-x[0])[:3].tolist()
    assert np.array_equal(scores[0], probabilities[0][classes[0]])
    with pytest.raises(ValueError, match="head must be"):
        with_head(b.graph, logits, "sigmoid")


def test_a_head_fits_the_kind_of_output():
    b = Builder()
    b.graph.outputs = [b("mul", b.input("x", (1, 6)), b.constant(2.0))]
    x = random(1, 6)
    probabilities = OutputSpec(name="p", kind="probabilities", classes=6, shape=(1, 6))
    graph, _ = with_head(b.graph, (probabilities,), "softmax")
    assert np.array_equal(graph(x)[0], b.graph(x)[0])  # no second softmax
    features = OutputSpec(name="features", kind="features", shape=(1, 6))
    for head in ("softmax", "top_k"):
        with pytest.raises(ValueError, match=f"of the kind 'features', which cannot have head='{head}'"):
            with_head(b.graph, (features,), head)
    for k in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=f"top_k must be a positive integer; received {k}"):
            with_head(b.graph, (probabilities,), "top_k", k)
    one = Builder()
    one.graph.outputs = [one("mul", one.input("x", (1, 1)), one.constant(2.0))]
    graph, (spec,) = with_head(one.graph, (classification("logits", 1, shape=(1, 1)),), "softmax")
    assert graph(np.ones((1, 1)))[0] == pytest.approx(1 / (1 + np.exp(-2.0))) and spec.applied == "sigmoid"
    with pytest.raises(ValueError, match="single class"):
        with_head(one.graph, (classification("logits", 1, shape=(1, 1)),), "top_k")
