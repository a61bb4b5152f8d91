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
    found = edge.coreml.load(edge.coreml.export(model, tmp_path)).predict(x)
    assert min(decibels(expected, found)) >= KEPT, decibels(expected, found)


# ---------------------------------------------------------------- what overflowed


SCALED = ("cross_covariance", "kernel", "relu_linear")


@pytest.mark.parametrize(
    ("attention", "size"),
    [*((name, 1) for name in ATTENTIONS), *((name, size) for name in SCALED for size in (10, 30))],
)
def test_linear_attention_holds_large_queries_keys_and_values(attention, size, tmp_path):
    """The others take a softmax of what is `size` or size^2 times as large: scores of 256 and more are rounded to 0.25,
    which changes their exponential by 13 %, whatever the order of the operations."""
    model = keras_vits.create("vit_tiny_patch16_224", **TINY, attention=attention)
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


def test_a_rewritten_root_is_not_rewritten_again():
    given = keras.Input((4, 6))
    graph = rewrite(edge.trace(keras.Model(given, layers.RMSNormalization()(given))))
    assert graph.histogram()["max"] == 1
    assert rewrite(graph).histogram() == graph.histogram()


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
