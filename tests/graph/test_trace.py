"""The tracer: the Graph equals the model, is the same on every backend, and leaves Keras and the model as they were."""

import threading

import keras
import numpy as np
import pytest
from families import FAMILIES, everywhere, images, signature
from keras import layers, ops

from keras_vits._util import keras_private
from keras_vits.edge import trace
from keras_vits.graph.ops import OPS
from keras_vits.graph.trace._tracer import OPERATIONS

# test_backends.py has that the graphs are the same on every backend; so the others need no backend more than once.
family = pytest.mark.parametrize("family", everywhere("vit", "mobilevit_v2"))
TINY = 1e-5  # of the output's scale: the bound between Graph and model


def close(found, expected, bound=TINY):
    return np.abs(found - expected).max() <= bound * np.abs(expected).max()


def predict(model, x):
    return model.predict(x, verbose=0)


@family
def test_graph_equals_model(family):
    model = family.create()
    x = images(model, 2)
    assert close(trace(model, batch=2)(x)[0], predict(model, x))


@family
def test_graph_is_static_and_flat(family):
    graph = trace(family.create())
    values = [v for node in graph.nodes for v in node.outputs]
    assert all(isinstance(d, int) and d > 0 for v in values for d in v.shape)
    assert max(len(v.shape) for v in values) <= 4
    assert all(node.op in OPS for node in graph.nodes)
    assert len({v.name for v in values}) == len(values)


@family
def test_nodes_carry_our_layer_names(family):
    model = family.create()
    known = {layer.name for layer in model.layers}
    tops = {node.layer.split("/")[0] for node in trace(model).nodes}
    assert tops <= known and {"stem", "head"} <= tops


@family
def test_model_and_keras_are_untouched(family):
    from keras.src.layers import layer
    from keras.src.ops.operation import Operation

    model = family.create()
    hooks = Operation.symbolic_call, layer.Layer.symbolic_call, layer.Node, keras.src.backend.numpy.add
    weights = [np.array(w) for w in model.get_weights()]
    nodes = {path: len(part._inbound_nodes) for path, part in ((p.path, p) for p in model._flatten_layers())}
    config = repr(model.get_config())
    trace(model)
    assert hooks == (Operation.symbolic_call, layer.Layer.symbolic_call, layer.Node, keras.src.backend.numpy.add)
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))
    assert nodes == {part.path: len(part._inbound_nodes) for part in model._flatten_layers()}
    assert config == repr(model.get_config())


def test_hooks_are_restored_after_an_error():
    from keras.src.ops.operation import Operation

    before = Operation.symbolic_call
    x = keras.Input((4,))
    with pytest.raises(ValueError, match="no translation"):
        trace(keras.Model(x, ops.cumsum(x, axis=1)))
    assert Operation.symbolic_call is before


def test_two_threads_trace_while_a_third_builds_models():
    models = [f.create() for f in FAMILIES[:2]]
    expected = [signature(trace(m)) for m in models]
    found, built, errors = [None] * len(models), [], []

    def run(i):
        try:
            for _ in range(3):
                found[i] = signature(trace(models[i]))
        except Exception as e:
            errors.append(e)

    def build():
        try:
            for i in range(6):
                x = keras.Input((8,))
                built.append(keras.Model(x, layers.Dense(3, name=f"dense_{i}")(ops.add(x, 1.0))))
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(models))] + [threading.Thread(target=build)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    assert found == expected
    assert all(m(np.ones((2, 8), "float32")).shape == (2, 3) for m in built)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_weights_of_a_mixed_precision_model_keep_their_precision(policy):
    model = FAMILIES[0].create(dtype=policy)
    full = type(model).from_config({**model.get_config(), "dtype": "float32"})
    full.set_weights(model.get_weights())
    x = images(model, 1)
    graph = trace(model)
    assert {v.dtype for node in graph.nodes for v in node.outputs} == {"float32"}
    assert close(graph(x)[0], predict(full, x))


def test_unknown_keras_is_named(monkeypatch):
    import keras.src.layers.layer as module

    model = FAMILIES[0].create()
    monkeypatch.delattr(module, "Node")
    with pytest.raises(ImportError, match=r"keras\.src\.layers\.layer\.Node"):
        trace(model)


def test_every_hook_exists():
    keras_private.check()


def test_what_cannot_be_traced_is_said():
    with pytest.raises(ValueError, match="functional inputs"):
        trace(keras.Sequential([layers.Dense(2)]))
    with pytest.raises(ValueError, match="unknown size"):
        x = keras.Input((None, None, 3))
        trace(keras.Model(x, layers.Conv2D(4, 3)(x)))
    with pytest.raises(ValueError, match="batch"):
        trace(FAMILIES[0].create(), batch=0)


# ---- single operations: the Graph's evaluator against the backend's own result

X, Y = (4, 6, 3), (4, 6, 3)
CASES = {
    "add": lambda x: x + 1.5,
    "subtract": lambda x: 2.0 - x,
    "divide": lambda x: x / 3.0,
    "power": lambda x: ops.abs(x) ** 1.5,
    "maximum": lambda x: ops.maximum(x, 0.1),
    "minimum": lambda x: ops.minimum(x, 0.1),
    "exp": ops.exp,
    "abs": ops.abs,
    "sqrt": lambda x: ops.sqrt(ops.abs(x)),
    "rsqrt": lambda x: ops.rsqrt(ops.abs(x) + 1.0),
    "square": ops.square,
    "log": lambda x: ops.log(ops.abs(x) + 1.0),
    "log1p": lambda x: ops.log1p(ops.abs(x)),
    "sin": ops.sin,
    "cos": ops.cos,
    "tanh": ops.tanh,
    "erf": ops.erf,
    "floor": ops.floor,
    "ceil": ops.ceil,
    "round": ops.round,
    "sign": ops.sign,
    "negative": ops.negative,
    "reciprocal": lambda x: ops.reciprocal(ops.abs(x) + 1.0),
    "sigmoid": ops.sigmoid,
    "relu": ops.relu,
    "relu6": lambda x: ops.relu6(4 * x),
    "silu": ops.silu,
    "softplus": ops.softplus,
    "hard_sigmoid": lambda x: ops.hard_sigmoid(3 * x),
    "hard_silu": lambda x: ops.hard_silu(3 * x),
    "gelu_tanh": lambda x: ops.gelu(x, approximate=True),
    "gelu_erf": lambda x: ops.gelu(x, approximate=False),
    "elu": ops.elu,
    "leaky_relu": ops.leaky_relu,
    "clip": lambda x: ops.clip(x, -0.5, 0.5),
    "softmax": lambda x: ops.softmax(x, axis=2),
    "softmax_all": lambda x: ops.softmax(x, axis=-1),
    "mean": lambda x: ops.mean(x, axis=(1, 2)),
    "sum": lambda x: ops.sum(x, axis=-1, keepdims=True),
    "max": lambda x: ops.max(x, axis=1),
    "min": lambda x: ops.min(x, axis=2),
    "prod": lambda x: ops.prod(x, axis=3),
    "var": lambda x: ops.var(x, axis=(1, 2), keepdims=True),
    "std": lambda x: ops.std(x, axis=-1),
    "norm": lambda x: ops.norm(x, axis=(1, 2)),
    "normalize": lambda x: ops.normalize(x, axis=-1),
    "layer_norm": lambda x: ops.layer_normalization(x, axis=-1, epsilon=1e-6),
    "rms_norm": lambda x: ops.rms_normalization(x, np.full(3, 1.5, "float32"), axis=-1, epsilon=1e-6),
    "reshape": lambda x: ops.reshape(x, (-1, 24, 3)),
    "transpose": lambda x: ops.transpose(x, (0, 3, 1, 2)),
    "swapaxes": lambda x: ops.swapaxes(x, 1, 3),
    "moveaxis": lambda x: ops.moveaxis(x, 3, 1),
    "expand_squeeze": lambda x: ops.squeeze(ops.expand_dims(x, 1) * 2.0, 1),
    "flip": lambda x: ops.flip(x, axis=2),
    "tile": lambda x: ops.tile(x, (1, 2, 1, 1)),
    "repeat": lambda x: ops.repeat(x, 2, axis=2),
    "broadcast": lambda x: ops.broadcast_to(x[:, :1], (1, 4, 6, 3)) + x,
    "roll": lambda x: ops.roll(x, 2, axis=2),
    "concatenate": lambda x: ops.concatenate([x, 2 * x], axis=-1),
    "stack": lambda x: ops.stack([x[..., 0], x[..., 1]], 1),
    "split": lambda x: ops.split(x, 3, axis=-1)[1],
    "unstack": lambda x: ops.unstack(x, axis=3)[2],
    "getitem": lambda x: x[:, 1:, ::2, None, -1],
    "ellipsis": lambda x: x[..., 1:],
    "take": lambda x: ops.take(x, [2, 0, -1], axis=2),
    "pad": lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0))),
    "reflect": lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), "reflect"),
    "where": lambda x: ops.where(x > 0, x, 0.1),
    "logical": lambda x: ops.cast(ops.logical_and(x > 0, x < 1), "float32"),
    "argmax": lambda x: ops.cast(ops.argmax(x, axis=-1), "float32"),
    "top_k": lambda x: ops.top_k(x, 2)[0],
    "einsum_dense": lambda x: ops.einsum("bhwc,cd->bdhw", x, np.arange(6, dtype="float32").reshape(3, 2)),
    "einsum_batch": lambda x: ops.einsum("bhwc,bhvc->bhwv", x, x),
    "matmul": lambda x: ops.matmul(x, ops.transpose(x, (0, 1, 3, 2))),
    "space_to_depth": lambda x: ops.space_to_depth(x, 2),
    "depth_to_space": lambda x: ops.depth_to_space(ops.tile(x, (1, 1, 1, 4)), 2),
    "resize": lambda x: ops.image.resize(x, (8, 9), interpolation="bilinear"),
    "nearest": lambda x: ops.image.resize(x, (8, 12), interpolation="nearest"),
    "max_pool": lambda x: ops.max_pool(x, 3, 2, "same"),
    "average_pool": lambda x: ops.average_pool(x, 3, 1, "same"),
    "attention": lambda x: ops.dot_product_attention(x, 2 * x, x + 1.0),
    "masked": lambda x: ops.dot_product_attention(x, x, x, mask=np.tril(np.ones((1, 1, 4, 4), bool))),
}
LAYERS = {
    "dense": lambda: layers.Dense(5),
    "einsum_dense": lambda: layers.EinsumDense("bhwc,cde->bhwde", (None, None, 2, 4), bias_axes="de"),
    "conv": lambda: layers.Conv2D(5, 3, strides=2, padding="same"),
    "dilated": lambda: layers.Conv2D(4, 2, dilation_rate=2),
    "grouped": lambda: layers.Conv2D(6, 3, groups=3, padding="same"),
    "depthwise": lambda: layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2),
    "separable": lambda: layers.SeparableConv2D(5, 3, padding="same"),
    "batch_norm": lambda: layers.BatchNormalization(),
    "layer_norm_axes": lambda: layers.LayerNormalization(axis=(1, 2, 3)),
    "group_norm": lambda: layers.GroupNormalization(groups=1),
    "mha": lambda: keras.Sequential([layers.Reshape((24, 3)), Attend()]),
    "rescaling": lambda: layers.Rescaling([1.0, 2.0, 3.0], 0.5),
    "upsampling": lambda: layers.UpSampling2D(2, interpolation="bilinear"),
    "dropout": lambda: layers.Dropout(0.5),
    "spatial_dropout": lambda: layers.SpatialDropout2D(0.5),
    "global_pool": lambda: layers.GlobalAveragePooling2D(),
}


class Attend(layers.Layer):
    """Keras' own multi-head attention of a sequence with itself."""

    def __init__(self):
        super().__init__()
        self.attention = layers.MultiHeadAttention(2, 4)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)


@pytest.mark.parametrize("name", CASES)
def test_operation(name):
    image = keras.Input((4, 6, 3))
    model = keras.Model(image, CASES[name](image) if name != "broadcast" else _Call(CASES[name])(image))
    x = np.random.default_rng(0).normal(size=(1, 4, 6, 3)).astype("float32")
    expected = predict(model, x)
    found = trace(model)(x)[0]
    assert found.shape == expected.shape and close(found, expected)


class _Call(layers.Layer):
    """A function with a fixed batch as a layer, so that only the traced batch meets it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    random = np.random.default_rng(0)
    image = keras.Input((4, 6, 3))
    model = keras.Model(image, LAYERS[name]()(image))
    for variable in model.weights:
        if "seed" not in variable.path:
            variable.assign(random.uniform(0.5, 1.5, tuple(variable.shape)).astype("float32"))
    x = random.normal(size=(2, 4, 6, 3)).astype("float32")
    assert close(trace(model, batch=2)(x)[0], predict(model, x))


def test_shared_weights_are_one_constant():
    image = keras.Input((4, 6, 3))
    shared = layers.Dense(3, use_bias=False)
    graph = trace(keras.Model(image, shared(shared(image))))
    assert len(graph.constants()) == 1 and graph.histogram() == {"dense": 2}


def test_an_operation_that_is_not_in_the_table_names_its_layer():
    class Odd(layers.Layer):
        def call(self, x):
            return ops.cumsum(x, axis=1)

    x = keras.Input((4,))
    assert "Cumsum" not in OPERATIONS
    with pytest.raises(ValueError, match=r"Cumsum in layer 'odd_one'"):
        trace(keras.Model(x, Odd(name="odd_one")(x)))


@pytest.mark.once
@pytest.mark.parametrize("name", ["MobileNetV3Small", "ConvNeXtTiny"])
def test_models_that_keras_ships(name):
    model = getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), classes=7)
    x = np.random.default_rng(0).uniform(0, 255, (1, 64, 64, 3)).astype("float32")
    assert close(trace(model)(x)[0], predict(model, x))
