"""Half precision: what phones' GPUs compute of a file, and that our files keep 40 dB in it."""

import keras
import numpy as np
import pytest
from families import FAMILIES, images
from keras import layers, ops

import keras_vits
from keras_vits import edge
from keras_vits._util import keras_private
from keras_vits.edge.evidence.half import ACCUMULATORS, HalfRunner
from keras_vits.edge.records import sqnr_db
from keras_vits.edge.targets import _steps
from keras_vits.edge.targets.coreml.mlprogram import Program
from keras_vits.graph.rewrite import rewrite
from keras_vits.layers.linear_attention import ATTENTIONS

pytestmark = pytest.mark.once
SIZES = np.float32([1, 4, 16])  # times the size of normal activations
KEPT = 40.0  # dB
TINY = dict(width=32, depth=2, heads=2, mlp_hidden=64, image_size=32, patch_size=8, num_classes=5)


def settled(model):
    """Gives every batch normalisation the statistics of what it is given, as training does."""
    norms = [n for n in keras_private.flatten_layers(model) if isinstance(n, layers.BatchNormalization)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    if norms:
        model(ops.convert_to_tensor(images(model, 64)), training=True)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def decibels(expected, found):
    """Of each image's outputs."""
    error = found.astype("float64") - expected
    return [sqnr_db(float(np.square(y).sum()), float(np.square(e).sum())) for y, e in zip(expected, error, strict=True)]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    model = settled(request.param.create())
    x = np.concatenate([size * images(model, 1) for size in SIZES])
    return model, x, model.predict(x, verbose=0)


@pytest.mark.parametrize("target", ["litert", "onnx"])
def test_every_family_keeps_its_numbers_on_a_phones_gpu(family, target, tmp_path):
    model, x, expected = family
    runner = HalfRunner(getattr(edge, target).export(model, tmp_path))
    (found,), (single,) = (outputs.values() for outputs in runner.predict(x))
    np.testing.assert_allclose(single, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert min(decibels(expected, found)) >= KEPT, decibels(expected, found)


def test_every_family_keeps_its_numbers_in_core_mls_half_precision(family, tmp_path):
    model, x, expected = family
    artifact = edge.coreml.export(model, tmp_path)
    found = edge.coreml.load(artifact).predict(x)
    assert min(decibels(expected, found)) >= KEPT, decibels(expected, found)
    assert artifact.float32_layers == ()  # every norm and linear attention is rescaled
    assert Program(artifact.path).operations["cast"] == len(artifact.inputs) + len(artifact.outputs)


# ---------------------------------------------------------------- what overflowed


SCALED = ("cross_covariance", "kernel", "relu_linear")


@pytest.mark.parametrize(
    ("attention", "size"),
    [*((name, 1) for name in ATTENTIONS), *((name, size) for name in SCALED for size in (10, 30))],
)
def test_linear_attention_holds_large_queries_keys_and_values(attention, size, tmp_path):
    """The others take a softmax of what is `size` or size^2 times as large: scores of 256 and more are rounded to 0.25,
    which changes their exponential by 13 %, whatever the order of the operations."""
    model = keras_vits.create("vit_tiny_patch16_224", **{**TINY, "depth": 1}, attention=attention)
    for block in model.layers:
        if hasattr(block, "attention"):
            block.attention.qkv.kernel.assign(block.attention.qkv.kernel * size)
    x = images(model, 2)
    for artifact in (edge.litert.export(model, tmp_path), edge.coreml.export(model, tmp_path)):
        options = {"precision": "float16"} if artifact.format == "litert" else {}
        found = edge.verify(artifact, model, x, **options)
        assert found.sqnr_db >= KEPT, found.half and found.half.worst()


def global_response(x):
    length = ops.norm(x, axis=(1, 2), keepdims=True)
    return x * (length / (ops.mean(length, axis=-1, keepdims=True) + 1e-6))


NORMS = {
    "RMS": lambda x: layers.RMSNormalization()(x),
    "RMS with mean": lambda x: layers.LayerNormalization(epsilon=1e-6)(x),
    "unit": lambda x: layers.UnitNormalization()(x),
    "normalize": lambda x: ops.normalize(x, axis=1),
    "group": lambda x: layers.GroupNormalization(4)(x),
    "ours": lambda x: keras_vits.layers.GroupNorm(4)(x),
    "global response": global_response,
    "by hand": lambda x: x / ops.sqrt(ops.mean(x * x, axis=-1, keepdims=True) + 1e-5),
    "by hand, largest": lambda x: x * ops.rsqrt(ops.maximum(ops.sum(ops.square(x), axis=(1, 2), keepdims=True), 1e-12)),
    "length": lambda x: ops.sqrt(ops.sum(ops.square(x), axis=-1)),
    "mean": lambda x: ops.mean(x, axis=(1, 2)),
    "pooling": lambda x: layers.AveragePooling2D(8)(x),
}


@pytest.mark.parametrize("size", [1e-4, 1.0, 400.0])
@pytest.mark.parametrize("name", NORMS)
def test_norms_and_means_hold_large_and_small_numbers(name, size, tmp_path):
    given = keras.Input((8, 8, 16))
    model = keras.Model(given, NORMS[name](given))
    x = (size * np.random.default_rng(0).normal(1, 1, size=(2, 8, 8, 16))).astype("float32")
    for artifact in (edge.litert.export(model, tmp_path), edge.coreml.export(model, tmp_path)):
        options = {"precision": "float16"} if artifact.format == "litert" else {}
        assert edge.verify(artifact, model, x, **options).sqnr_db >= KEPT, artifact.format


def response_with_powers(x):
    length = ops.sum(x**2, axis=(1, 2), keepdims=True) ** 0.5
    return x * (length / (ops.mean(length, axis=-1, keepdims=True) + 1e-6))


def deviation_with_powers(x):
    centred = x - ops.mean(x, axis=-1, keepdims=True)
    return centred * (ops.mean(ops.power(centred, 2), axis=-1, keepdims=True) + 1e-6) ** -0.5


ALL = (1, 2, 3)
WRITTEN = {
    "RMS with powers": lambda x: x / (ops.mean(x**2, axis=-1, keepdims=True) + 1e-6) ** 0.5,
    "norm with powers": deviation_with_powers,
    "response with powers": response_with_powers,
    "RMS of a sum": lambda x: x / ops.sqrt(ops.sum(ops.square(x), axis=-1, keepdims=True) / 16 + 1e-6),
    "RMS of a sum, unbiased": lambda x: x * ops.rsqrt(ops.sum(x * x, axis=ALL, keepdims=True) / 1023 + 1e-6),
    "sum, times": lambda x: ops.sum(x, axis=ALL, keepdims=True) * (1 / 1024),
    "sum, divided": lambda x: ops.sum(x, axis=ALL) / 900,
    "unit sum": lambda x: x / (ops.sum(ops.abs(x), axis=ALL, keepdims=True) + 1e-6),
    "unit sum, at least": lambda x: x / ops.maximum(ops.sum(ops.abs(x), axis=(1, 2), keepdims=True), 1e-12),
    "shares": lambda x: ops.abs(x) / ops.sum(ops.abs(x), axis=ALL, keepdims=True),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_norms_and_means_that_are_written_in_other_words_hold_large_and_small_numbers(name, tmp_path):
    given = keras.Input((8, 8, 16))
    model = keras.Model(given, WRITTEN[name](given))
    sizes = np.float32([1e-3, 1, 400]).reshape(-1, 1, 1, 1)
    x = sizes * np.random.default_rng(0).normal(1, 1, size=(3, 8, 8, 16)).astype("float32")
    expected = model.predict(x, verbose=0)
    for target in (edge.litert, edge.onnx):
        (found,), _ = (outputs.values() for outputs in HalfRunner(target.export(model, tmp_path)).predict(x))
        assert min(decibels(expected, found)) >= KEPT, (target, decibels(expected, found))
    artifact = edge.coreml.export(model, tmp_path)
    found = edge.coreml.load(artifact).predict(x)
    assert min(decibels(expected, found)) >= KEPT and artifact.float32_layers == ()


def test_rows_of_zeros_stay_zeros(tmp_path):
    """An epsilon that half precision does not have keeps 0 / 0 away all the same."""
    given = keras.Input((64,))
    model = keras.Model(given, given / (ops.sum(ops.abs(given), axis=-1, keepdims=True) + 1e-12))
    x = np.float32(np.arange(128).reshape(2, 64) * [[1], [0]])
    for artifact in (edge.litert.export(model, tmp_path), edge.coreml.export(model, tmp_path)):
        options = {"precision": "float16"} if artifact.format == "litert" else {}
        assert edge.verify(artifact, model, x, **options).sqnr_db >= KEPT


def test_what_is_divided_by_its_sum_keeps_every_bit_in_float32():
    given = keras.Input((8, 8, 16))
    graph = edge.trace(keras.Model(given, WRITTEN["unit sum"](given)))
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 16)).astype("float32")
    simpler = rewrite(graph)
    np.testing.assert_array_equal(simpler(x)[0], graph(x)[0])
    assert "mul" in simpler.histogram() and rewrite(simpler).histogram() == simpler.histogram()


@pytest.mark.parametrize(
    ("power", "ops_left"),
    [(2, ["square"]), (0.5, ["sqrt"]), (-0.5, ["rsqrt"]), (1, []), (-1, ["div"]), (3, ["pow"]), (1.5, ["pow"])],
)
def test_powers_that_have_a_name_are_what_they_are_named(power, ops_left):
    given = keras.Input((4, 6))
    graph = edge.trace(keras.Model(given, ops.relu(ops.power(ops.relu(given), power))))
    simpler = rewrite(graph)
    assert [node.op for node in simpler.nodes if node.op != "relu"] == ops_left
    x = np.random.default_rng(0).uniform(0.5, 2, (1, 4, 6)).astype("float32")
    np.testing.assert_allclose(simpler(x)[0], graph(x)[0], rtol=1e-6)


def test_a_rewritten_root_is_not_rewritten_again():
    given = keras.Input((4, 6))
    graph = rewrite(edge.trace(keras.Model(given, layers.RMSNormalization()(given))))
    assert graph.histogram()["max"] == 1
    assert rewrite(graph).histogram() == graph.histogram()


# ---------------------------------------------------------------- what no rescaling helps


def by_hand_gelu(x):
    return 0.5 * x * (1 + ops.tanh(0.79788456 * (x + 0.044715 * x**3)))


DISTRUSTED = {  # name -> (what is computed, of which numbers)
    "square": (lambda x: ops.square(x) / 1e4, 300.0),
    "product with itself": (lambda x: x * x * 1e-4, 300.0),
    "small square": (lambda x: ops.square(x) * 1e6, 1e-4),
    "exponential": (lambda x: ops.exp(x) / 1e4, 12.0),
    "small exponential": (lambda x: ops.exp(-x - 20.0) * 1e8, 1.0),
    "cube": (by_hand_gelu, 50.0),
    "product": (lambda x: ops.prod(x, axis=-1) ** 0.125, 100.0),
    "variance": (lambda x: ops.var(x, axis=-1) / 1e4, 1000.0),
    "sum": (lambda x: ops.log(ops.sum(ops.abs(ops.repeat(x, 64, axis=-1)), axis=-1)), 1000.0),
    "arranged": (lambda x: ops.transpose(ops.reshape(ops.square(x), (-1, 2, 4)), (0, 2, 1)) / 1e4, 300.0),
    "large constant": (lambda x: (x + 1e5) / 1e3, 300.0),
}


@pytest.mark.parametrize("name", DISTRUSTED)
def test_what_half_precision_may_not_hold_stays_in_float32_in_core_ml(name, tmp_path):
    """And the layer before and behind it, in half precision, does not."""
    function, size = DISTRUSTED[name]
    given = keras.Input((8,))
    model = keras.Model(given, layers.Lambda(function, name="own")(layers.Activation("relu", name="before")(given)))
    x = (size * np.random.default_rng(0).uniform(0.8, 1.2, (3, 8))).astype("float32")
    artifact = edge.coreml.export(model, tmp_path)
    assert {layer.split("/")[0] for layer in artifact.float32_layers} == {"own"}
    assert edge.artifact.load(artifact.path) == artifact
    assert edge.verify(artifact, model, x).sqnr_db >= KEPT


def test_behind_what_is_in_float32_a_core_ml_file_is_in_half_precision_again(tmp_path):
    given = keras.Input((8,))
    y = layers.Lambda(ops.square, name="squares")(given)
    for i in range(3):
        y = layers.Dense(16, activation="relu", name=f"dense_{i}")(y)
    artifact = edge.coreml.export(keras.Model(given, y), tmp_path)
    assert artifact.float32_layers == ("squares", "dense_0")
    assert edge.coreml.export(keras.Model(given, y), tmp_path, precision="float32").float32_layers == ()
    compressed = edge.coreml.quantize(artifact, "int8")
    assert compressed.float32_layers == artifact.float32_layers
    found = edge.coreml.load(compressed).predict(np.ones((2, 8), "float32"))
    assert np.isfinite(found).all()


TRUSTED = {
    "softmax by hand": lambda x: (
        ops.exp(x - ops.max(x, -1, keepdims=True))
        / ops.sum(ops.exp(x - ops.max(x, -1, keepdims=True)), -1, keepdims=True)
    ),
    "log-softmax": lambda x: ops.log_softmax(x),
    "few entries": lambda x: ops.sum(x, axis=-1),
    "weights": lambda x: ops.sum(ops.repeat(x, 4, axis=-1) * np.full(32, 1 / 32, "float32"), axis=-1),
    "bounded": lambda x: ops.sum(ops.sigmoid(ops.repeat(x, 4, axis=-1)), axis=-1),
}


@pytest.mark.parametrize("name", TRUSTED)
def test_what_half_precision_holds_stays_in_it(name, tmp_path):
    given = keras.Input((8,))
    model = keras.Model(given, TRUSTED[name](given))
    x = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    artifact = edge.coreml.export(model, tmp_path)
    assert artifact.float32_layers == () and edge.verify(artifact, model, x).sqnr_db >= KEPT


# ---------------------------------------------------------------- the check itself


def test_what_overflows_and_vanishes_is_named(tmp_path):
    given = keras.Input((8,))
    squares = layers.Lambda(ops.square, name="squares")(given)
    small = layers.Lambda(lambda x: ops.exp(-x - 20.0), name="small")(given)
    model = keras.Model(given, [layers.Lambda(lambda x: x / 1e4, name="less")(squares), small])
    x = np.float32([[300.0, 1, 2, 3, 4, 5, 6, 7]])
    for target in (edge.litert, edge.onnx):
        found = edge.verify(target.export(model, tmp_path), precision="float16", images=x)
        assert [step.layer.split("/")[0] for step in found.half.overflows] == ["squares"]
        assert found.half.overflows[0].overflowing == 1 / 8 and found.half.overflows[0].largest == 90_000
        assert "small" in {step.layer.split("/")[0] for step in found.half.vanishes}
        assert found.half.worst(1)[0].output_db == -np.inf and found.sqnr_db == -np.inf


def test_sums_in_half_precision_lose_more(tmp_path):
    """What is added to 2,048 is rounded to whole numbers."""
    model = keras.Sequential([keras.Input((4096,)), layers.Dense(3, use_bias=False, kernel_initializer="ones")])
    model = keras.Model(model.inputs, model.outputs)
    artifact = edge.litert.export(model, tmp_path)
    x = np.random.default_rng(0).uniform(size=(2, 4096)).astype("float32")
    single, half = (edge.verify(artifact, model, x, precision="float16", accumulator=a) for a in ACCUMULATORS)
    assert single.sqnr_db > 60 > half.sqnr_db and single.half.accumulator == "float32"
    assert half.half.steps[0].operation == "FULLY_CONNECTED"


@pytest.mark.parametrize("recipe", ["float16", "dynamic_int8", "weight_int4"])
def test_a_quantized_file_is_run_with_the_weights_it_has(recipe, tmp_path):
    model = keras_vits.create("vit_tiny_patch16_224", **TINY)
    x = images(model, 2)
    f32 = edge.litert.export(model, tmp_path)
    artifact = edge.litert.quantize(f32, recipe)
    expected = edge.verify(artifact, model, x).sqnr_db
    assert abs(edge.verify(artifact, model, x, precision="float16").sqnr_db - expected) < (
        20 if recipe == "float16" else 3
    )


@pytest.mark.parametrize("op", ["dense", "conv", "grouped", "depthwise", "average", "mean"])
@pytest.mark.parametrize("target", ["litert", "onnx"])
def test_sums_in_half_precision_are_those_of_the_operation(op, target, tmp_path):
    """Where sums are exact in half precision, small whole numbers, both ways of adding agree to the bit."""
    given = keras.Input((6, 6, 8))
    made = {
        "dense": lambda: layers.Dense(3),
        "conv": lambda: layers.Conv2D(4, 3, strides=2, padding="same", activation="relu"),
        "grouped": lambda: layers.Conv2D(4, 3, groups=2, dilation_rate=2),
        "depthwise": lambda: layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2),
        "average": lambda: layers.AveragePooling2D(2, padding="same"),
        "mean": lambda: layers.GlobalAveragePooling2D(),
    }[op]()
    model = keras.Model(given, made(given))
    random = np.random.default_rng(0)
    model.set_weights([random.integers(-2, 3, w.shape).astype("float32") for w in model.get_weights()])
    x = random.integers(-2, 3, (2, 6, 6, 8)).astype("float32")
    runner = HalfRunner(getattr(edge, target).export(model, tmp_path), "float16")
    assert any(step.summed for step in runner.file.steps)
    (found,), (single,) = (outputs.values() for outputs in runner.predict(x))
    np.testing.assert_array_equal(found, _steps.half(single))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "bfloat16"}, "precision must be 'float32' or 'float16'"),
        ({"precision": "float16", "accumulator": "int8"}, "accumulator must be 'float32' or 'float16'"),
        ({"accumulator": "float16"}, "belongs to precision='float16'"),
        ({"precision": "float16", "device": "arm64"}, "runs on this machine"),
        ({}, "verify needs the model, or its outputs"),
    ],
)
def test_impossible_options_are_told(options, said, tmp_path):
    model = keras_vits.create("vit_tiny_patch16_224", **TINY)
    artifact = edge.litert.export(model, tmp_path)
    with pytest.raises(ValueError, match=said):
        edge.verify(artifact, images=images(model, 1), **options)


def test_a_core_ml_file_cannot_be_taken_apart(tmp_path):
    model = keras_vits.create("vit_tiny_patch16_224", **TINY)
    with pytest.raises(ValueError, match="precision='float16' is for files of litert and onnx"):
        edge.verify(edge.coreml.export(model, tmp_path), model, images(model, 1), precision="float16")
