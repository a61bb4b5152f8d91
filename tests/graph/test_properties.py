"""Properties of random graphs, keys, subscripts, windows and weight tables; the examples are always the same."""

import functools
import re

import hypothesis
import keras
import numpy as np
from hypothesis import strategies as st
from keras import ops

from keras_vits.checkpoints.assign import _pattern, _row
from keras_vits.edge import trace
from keras_vits.graph.ir import Builder
from keras_vits.graph.ops import OPS
from keras_vits.graph.rewrite import rewrite

few = functools.partial(hypothesis.settings, derandomize=True, deadline=None, database=None)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


# ---------------------------------------------------------------- rewriting

SMOOTH = [name for name, op in OPS.items()
          if op.elementwise and name in ("abs", "neg", "sin", "cos", "tanh", "erf", "sigmoid", "relu", "relu6", "silu",
                                         "softplus", "hard_sigmoid", "hard_swish")]  # fmt: skip
ARITHMETIC = [name for name in ("add", "sub", "mul", "maximum", "minimum") if OPS[name].elementwise]
REDUCTIONS = [name for name, op in OPS.items() if op.reduces and name != "prod"]


@st.composite
def graphs(draw):
    """Graphs of up to ten operations on tensors of one to four axes of up to six entries."""
    b = Builder()
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=2, max_size=4)))
    values = [b.input("x", shape)]
    for i in range(draw(st.integers(2, 10))):
        b.layer = f"layer_{i}"
        x = draw(st.sampled_from(values[-3:]))
        made = draw(st.sampled_from(STEPS))(draw, b, x, i)
        if made is not None and max(map(abs, made.shape), default=1) <= 200:
            values.append(made)
    b.graph.outputs = list({v: None for v in [values[-1], draw(st.sampled_from(values))]})
    return b.graph


def unary(draw, b, x, i):
    return b(draw(st.sampled_from(SMOOTH)), x)


def with_constant(draw, b, x, i):
    op = draw(st.sampled_from([*ARITHMETIC, "div"]))
    sizes = [draw(st.sampled_from([1, n])) for n in x.shape][draw(st.integers(0, len(x.shape))) :]
    c = b.constant(np.abs(random(*sizes, seed=i)) + np.float32(0.5))
    return b(op, c, x) if op != "div" and draw(st.booleans()) else b(op, x, c)


def with_itself(draw, b, x, i):
    return b(draw(st.sampled_from(ARITHMETIC)), x, b("tanh", x))


def reduction(draw, b, x, i):
    axes = tuple(sorted(draw(st.sets(st.integers(0, len(x.shape) - 1), min_size=1))))
    return b(draw(st.sampled_from(REDUCTIONS)), x, axes=axes, keepdims=draw(st.booleans()) or len(axes) == len(x.shape))


def transpose(draw, b, x, i):
    return b("transpose", x, perm=tuple(draw(st.permutations(range(len(x.shape))))))


def reshape(draw, b, x, i):
    n, shape = int(np.prod(x.shape)), []
    for _ in range(draw(st.integers(0, 3))):
        d = draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
        shape.append(d)
        n //= d
    return b("reshape", x, shape=(*shape, n))


def slices(draw, b, x, i):
    begin = tuple(draw(st.integers(0, n - 1)) for n in x.shape)
    end = tuple(draw(st.integers(a + 1, n)) for a, n in zip(begin, x.shape, strict=True))
    return b("slice", x, begin=begin, end=end, strides=tuple(draw(st.integers(1, 2)) for _ in x.shape))


def one_slice(draw, b, x, i):
    axis = draw(st.integers(0, len(x.shape) - 1))
    at = draw(st.integers(0, x.shape[axis] - 1))
    begin = tuple(at if j == axis else 0 for j in range(len(x.shape)))
    end = tuple(at + 1 if j == axis else n for j, n in enumerate(x.shape))
    return b("slice", x, begin=begin, end=end, strides=(1,) * len(x.shape))


def joined(draw, b, x, i):
    return b("concat", x, b("abs", x), axis=draw(st.integers(0, len(x.shape) - 1)))


def tiled(draw, b, x, i):
    return b("tile", x, reps=tuple(draw(st.integers(1, 2)) for _ in x.shape))


def reverse(draw, b, x, i):
    return b("reverse", x, axes=tuple(sorted(draw(st.sets(st.integers(0, len(x.shape) - 1), min_size=1)))))


def dense(draw, b, x, i):
    width = draw(st.integers(1, 6))
    bias = b.constant(random(width, seed=i)) if draw(st.booleans()) else None
    return b("dense", x, b.constant(random(width, x.shape[-1], seed=i + 50)), bias) if len(x.shape) > 1 else None


def norm(draw, b, x, i):
    n = x.shape[-1]
    gains = [b.constant(random(n, seed=i)) if draw(st.booleans()) else None for _ in range(2)]
    return b("layer_norm", x, *gains, axes=(len(x.shape) - 1,), epsilon=1e-2)


def softmax(draw, b, x, i):
    return b("softmax", x, axis=draw(st.integers(0, len(x.shape) - 1)))


def product(draw, b, x, i):
    return b("matmul", x, b("transpose", x, perm=(*range(len(x.shape) - 2), len(x.shape) - 1, len(x.shape) - 2))) if (
        len(x.shape) > 1
    ) else None  # fmt: skip


def padded(draw, b, x, i):
    pads = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in x.shape)
    return b("pad", x, pads=pads, mode="constant", value=draw(st.sampled_from([0.0, 0.5])))


def convolution(draw, b, x, i):
    if len(x.shape) != 4 or min(x.shape[1:3]) < 2:
        return None
    kernel = b.constant(random(2, 2, x.shape[3], 3, seed=i))
    pads = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in "hw")
    strides = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    if draw(st.booleans()):
        return b("conv2d", x, kernel, None, strides=strides, pads=pads, dilation=(1, 1), groups=1)
    kernel = b.constant(random(2, 2, x.shape[3], 2, seed=i))
    return b("depthwise_conv2d", x, kernel, None, strides=strides, pads=pads, dilation=(1, 1))


def pooling(draw, b, x, i):
    if len(x.shape) != 4:
        return None
    size = tuple(draw(st.integers(1, n)) for n in x.shape[1:3])
    op = draw(st.sampled_from(["max_pool2d", "avg_pool2d"]))
    return b(op, x, size=size, strides=(draw(st.integers(1, 2)),) * 2, pads=((0, 0), (0, 0)))


STEPS = [
    *(unary, with_constant, with_constant, with_itself, reduction, transpose, transpose, reshape, slices, one_slice),
    *(joined, tiled, reverse, dense, dense, norm, softmax, product, padded, convolution, pooling),
]


@few(max_examples=120)
@hypothesis.given(graphs())
def test_rewriting_keeps_what_a_graph_computes(graph):
    x = random(*graph.inputs[0].shape, seed=1)
    after = rewrite(graph.check())
    exact = in_double(graph, x)
    for found, expected in zip(after(x), exact, strict=True):
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 2e-4 * max(1, np.abs(expected).max())


def in_double(graph, x):
    """The graph's outputs computed in double precision, so that the rounding of float32 is not in doubt."""
    found = {graph.inputs[0]: x.astype(np.float64)}
    for node in graph.nodes:
        given = [v and (v.data.astype(np.float64) if v.data is not None else found[v]) for v in node.inputs]
        found[node.output] = OPS[node.op].evaluate(*given, **node.attrs)
    return [found[v] for v in graph.outputs]


# ---------------------------------------------------------------- Keras' operations

INPUT = (3, 5, 4)


@functools.cache
def image():
    return random(1, *INPUT, seed=3)


def traced(function):
    x = keras.Input(batch_shape=(1, *INPUT))
    return trace(keras.Model(x, function(x)))(image())[0]


keys = st.lists(
    st.one_of(
        st.just(Ellipsis),
        st.none(),
        st.integers(-3, 2),
        st.builds(slice, *[st.one_of(st.none(), st.integers(-6, 6))] * 2, st.sampled_from([None, 1, 2, 3])),
    ),
    max_size=5,
)


@few(max_examples=60)
@hypothesis.given(keys)
def test_a_key_reads_what_numpy_reads(key):
    key = (slice(None), *key)  # of the batch
    hypothesis.assume(sum(k is Ellipsis for k in key) <= 1)
    try:
        expected = image()[key]
    except IndexError:
        hypothesis.reject()
    hypothesis.assume(expected.size)
    assert np.array_equal(traced(lambda x: x[key]), expected)


@st.composite
def subscripts(draw):
    """Two terms and a result of letters a to e, of which the first term, (a,b,c,d), is the image's."""
    second = "".join(draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=4, unique=True)))
    known = sorted(set("abcd") | set(second))
    out = "".join(draw(st.lists(st.sampled_from(known), unique=True, min_size=1)))
    return f"abcd,{second}->{out}", second


@few(max_examples=40)
@hypothesis.given(subscripts(), st.booleans())
def test_einsum_is_numpys(given, symbolic):
    text, second = given
    size = dict(zip("abcde", (1, *INPUT, 2), strict=True))
    other = random(*(size[c] for c in second), seed=4)
    expected = np.einsum(text, image(), other)
    if symbolic:  # both operands are tensors of the graph
        found = traced(lambda x: ops.einsum(text, x, 0 * ops.sum(x) + other))
    else:
        found = traced(lambda x: ops.einsum(text, x, other))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def pooled(x, kind, size, strides, padding):
    """Pooling as its definition says it: padded places are not read."""
    h, w = x.shape[1:3]
    outs, starts = [], []
    for n, k, s in zip((h, w), size, strides, strict=True):
        out = -(-n // s) if padding == "same" else (n - k) // s + 1
        before = max((out - 1) * s + k - n, 0) // 2 if padding == "same" else 0
        outs.append(out)
        starts.append([i * s - before for i in range(out)])
    y = np.zeros((x.shape[0], *outs, x.shape[3]), x.dtype)
    for i, top in enumerate(starts[0]):
        for j, left in enumerate(starts[1]):
            part = x[:, max(top, 0) : top + size[0], max(left, 0) : left + size[1]]
            y[:, i, j] = part.max((1, 2)) if kind == "max" else part.mean((1, 2))
    return y


@few(max_examples=40)
@hypothesis.given(
    st.sampled_from(["max", "average"]),
    st.tuples(st.integers(1, 3), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from(["same", "valid"]),
)
def test_pooling_is_its_definition(kind, size, strides, padding):
    pool = ops.max_pool if kind == "max" else ops.average_pool
    if kind == "average" and padding == "same" and keras.backend.backend() == "torch":
        # Keras repeats the border there, where padding is unequal
        expected = ops.convert_to_numpy(pool(ops.convert_to_tensor(image()), size, strides, padding))
    else:
        expected = pooled(image(), kind, size, strides, padding)
    np.testing.assert_allclose(traced(lambda x: pool(x, size, strides, padding)), expected, rtol=1e-5, atol=1e-6)


@few(max_examples=10)
@hypothesis.given(st.sampled_from(["bilinear", "nearest"]), st.integers(1, 12), st.integers(1, 12))
def test_resampling_is_keras(mode, height, width):
    resize = lambda x: ops.image.resize(x, (height, width), interpolation=mode)
    expected = ops.convert_to_numpy(resize(ops.convert_to_tensor(image())))
    np.testing.assert_allclose(traced(resize), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- weight tables

words = st.sampled_from(["stem", "block", "norm", "mlp.fc", "head", "a+b", "qkv"])


@st.composite
def tables(draw):
    """Rows of a weight table: layers' paths, some with numbers."""
    rows = draw(st.lists(st.tuples(words, st.sampled_from(["", "_{i}", "_{i}_{j}"]), st.booleans()), min_size=1,
                         max_size=6, unique_by=lambda row: row[:2]))  # fmt: skip
    return {f"{word}{number}" + ("/inner" if deep else ""): word for word, number, deep in rows}


@few(max_examples=100)
@hypothesis.given(tables(), st.data())
def test_a_weight_belongs_to_one_row_with_its_numbers(table, data):
    row = data.draw(st.sampled_from(sorted(table)))
    numbers = {key: data.draw(st.integers(0, 120)) for key in re.findall(r"\{(\w)\}", row)}
    rest = data.draw(st.sampled_from(["", "kernel", "deep/bias"]))
    path = row.format(**numbers) + (f"/{rest}" if rest else "")
    assert _row(table, path) == (row, numbers, rest)
    assert sum(bool(_pattern(other, "/").match(path)) for other in table) == 1
    assert not any(_pattern(row, "/").match(path.replace(row.format(**numbers), row.format(**numbers) + "x", 1))
                   for row in [row])  # fmt: skip
