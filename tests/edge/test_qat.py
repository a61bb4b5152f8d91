"""Quantization-aware fine-tuning: the model rounds as its file does, trains through it, and wins back what was lost."""

import dataclasses
import itertools

import families
import keras
import numpy as np
import pytest
from families import FAMILIES, randomize

import keras_vits
from keras_vits import edge
from keras_vits.edge import litert, qat
from keras_vits.edge.quantize.recipes import RECIPES
from keras_vits.edge.targets.litert.flatbuffer import File
from keras_vits.edge.targets.litert.runtime import outputs
from keras_vits.edge.tune.qat import RoundedDense, Rounding
from keras_vits.training import data, fit

pytestmark = pytest.mark.filterwarnings("ignore:The calibration images")


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def numpy(x):
    return keras.ops.convert_to_numpy(x)


def small_vit(**changes):
    sizes = dict(image_size=32, patch_size=8, width=32, depth=2, heads=2, mlp_hidden=48, num_classes=5)
    return keras_vits.create("vit_tiny_patch16_224", **{**sizes, **changes})


def sqnr_db(found, expected):
    return 10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum())


def file_weights(artifact, float32):
    """Layer -> its weights in a quantized file, as the numbers that the integers stand for: a list of (O,I).

    The q, k and v of a joint projection come in any order.
    """
    interpreter = litert.of_bytes(artifact.path.read_bytes(), keep=True)
    tensors = {t["name"]: t for t in interpreter.get_tensor_details()}
    file, found = File(float32.path.read_bytes()), {}
    for name in sorted(file.name(layer.weight) for layer in file.layers()):  # kernel, kernel_1, kernel_2 are q, k, v
        scales = tensors[name]["quantization_parameters"]["scales"]
        steps = interpreter.get_tensor(tensors[name]["index"]).astype("float32")
        weights = steps * scales.reshape(-1, *[1] * (steps.ndim - 1))
        found.setdefault(name.rpartition("/")[0], []).append(weights.reshape(len(weights), -1))
    return found


def test_weights_are_the_files(tmp_path):
    model = qat(randomize(small_vit()), "weight_int4")
    float32 = edge.litert.export(model, tmp_path)
    expected = file_weights(litert.quantize(float32, "weight_int4"), float32)
    found = {}
    for layer in model._flatten_layers():
        if hasattr(layer, "rounding"):
            weights = np.moveaxis(numpy(layer.rounding.weights(layer.kernel)), -1, 0)
            found[layer.kernel.path.removesuffix("/kernel")] = weights.reshape(len(weights), -1)
    for name in ("block_0", "block_1"):
        found[f"{name}/attention/qkv"][:32] *= 0.25  # attention's scale, in the file's weights of the queries
        assert model.get_layer(name).mlp.fc1.rounding.gain is model.get_layer(name).norm2.gamma
    assert set(found) == set(expected) and len(found) == 10
    for name, weights in found.items():
        orders = (np.concatenate(parts) for parts in itertools.permutations(expected[name]))
        # the same integers; XLA's division gives the last bit of some scales otherwise
        assert any(np.allclose(weights, file, rtol=3e-7, atol=0) for file in orders), name
        assert len(np.unique(weights[0])) <= (255 if name == "stem" else 15)


# Where convolutions have 8-bit activations, an error of the last bit makes some round the other way, and those more: a
# file of these answers with 30 to 50 dB of its own answers to images that are 1.000001 times as bright.
STEADY = ("vit_tiny_patch16_224", "mixer_s32_224", "gmlp_ti16_224")


BOTH = ("vit_tiny_patch16_224", "mobilevitv2_050")
EVERYWHERE = (("vit_tiny_patch16_224", "weight_int4"), ("mobilevitv2_050", "weight_int8"))  # the others once
CASES = [
    pytest.param(
        f, recipe, marks=() if (f.variant, recipe) in EVERYWHERE else pytest.mark.once, id=f"{f.variant}-{recipe}"
    )
    for f in FAMILIES
    for recipe in ("weight_int4", "weight_int8")[: 2 if f.variant in BOTH else 1]
]


@pytest.mark.parametrize(("family", "recipe"), CASES)
def test_outputs_are_the_files(family, recipe, tmp_path):
    plain = family.create()
    x = families.images(plain, 4)
    model = qat(plain, recipe)
    float32 = litert.export(model, tmp_path)
    found = model.predict(x, verbose=0)
    file = litert.load(litert.quantize(float32, recipe)).predict(x)
    assert sqnr_db(found, file) > (100 if family.variant in STEADY else 50 if recipe == "weight_int8" else 0)
    assert sqnr_db(found, file) > sqnr_db(plain.predict(x, verbose=0), file) + 8  # which tells that it rounds
    assert litert.load(float32).predict(x) == pytest.approx(plain.predict(x, verbose=0), abs=1e-3)


def images_of(model, count):
    return families.images(model, count, seed=2)


@pytest.mark.parametrize("recipe", families.once_but(("static_int8", "static_int8_int16"), "static_int8"))
def test_a_static_recipe_rounds_the_inputs_too(recipe, tmp_path):
    plain = randomize(small_vit())
    x = images_of(plain, 16)
    model = qat(plain, recipe, calibration=x)
    fixed = {layer.path: layer.rounding.inputs for layer in model._flatten_layers() if hasattr(layer, "rounding")}
    each = {path for path, inputs in fixed.items() if inputs == "each"}
    assert {path.split("/", 1)[-1] for path in each} == (
        {"head", "attention/out"} if recipe == "static_int8" else {"head"}
    )
    wide = {name.rpartition("/")[0] for name in model.trained_for.wide}
    assert bool(wide) == (recipe == "static_int8_int16")
    assert all(low < 0 < high for low, high in (fixed[path] for path in fixed.keys() - each - wide))
    file = litert.load(litert.quantize(litert.export(model, tmp_path), recipe)).predict(x)
    found, before = model.predict(x, verbose=0), plain.predict(x, verbose=0)
    assert sqnr_db(found, before) < 45 and sqnr_db(found, file) > 25


def reference(artifact, x):
    """Logits by LiteRT's reference kernels, which round the last bit otherwise than XNNPACK here and there."""
    (found,) = outputs(litert.of_bytes(artifact.path.read_bytes(), keep=True), [(image[None],) for image in x])
    return found


@pytest.mark.parametrize("family", families.everywhere("vit"))
def test_outputs_are_a_static_files(family, tmp_path):
    """As near to the file as LiteRT's own two sets of kernels are to each other."""
    plain = family.create()
    x = images_of(plain, 16)
    model = qat(plain, "static_int8", calibration=x)
    float32 = litert.export(model, tmp_path)
    quantized = litert.quantize(edge.artifact.load(float32.path), "static_int8")
    assert not quantized.trained_for
    file, found = litert.load(quantized).predict(x), model.predict(x, verbose=0)
    assert sqnr_db(found, file) > sqnr_db(reference(quantized, x), file) - 3
    assert sqnr_db(found, plain.predict(x, verbose=0)) < 50
    assert edge.verify(quantized, against=model, images=x).partitions == 1


@pytest.mark.parametrize("changes", [dict(qk_norm=True), dict(layer_scale=0.5), dict(qkv_bias=False)], ids=str)
@pytest.mark.once
def test_every_attention_is_the_static_files(changes, tmp_path):
    plain = randomize(small_vit(**changes))
    x = images_of(plain, 16)
    model = qat(plain, "static_int8", calibration=x)
    quantized = litert.quantize(litert.export(model, tmp_path), "static_int8")
    file, before = litert.load(quantized).predict(x), plain.predict(x, verbose=0)
    assert sqnr_db(model.predict(x, verbose=0), file) > max(30, sqnr_db(before, file) + 1)
    attentions = [layer.attending for layer in model._flatten_layers() if hasattr(layer, "attending")]
    assert len(attentions) == 2 and all(a.shares[0] == 0 < a.shares[1] <= 1 for a in attentions)


@pytest.mark.once
@pytest.mark.parametrize("below_db", [37.0, 200.0])  # the second: all of them
def test_activations_of_16_bits_are_not_rounded(below_db, tmp_path, monkeypatch):
    recipe = dataclasses.replace(RECIPES["static_int8_int16"], wide_below_db=below_db)
    monkeypatch.setitem(RECIPES, recipe.name, recipe)
    plain = randomize(small_vit())
    x = images_of(plain, 16)
    model = qat(plain, recipe.name, calibration=x)
    inputs = {layer.path: layer.rounding.inputs for layer in model._flatten_layers() if hasattr(layer, "rounding")}
    wide = {name.rpartition("/")[0] for name in model.trained_for.wide}
    assert {"block_0/attention/out", "block_1/attention/out"} <= wide < inputs.keys()
    assert all((inputs[path] is None) == (path in wide) for path in inputs)
    quantized = litert.quantize(litert.export(model, tmp_path), recipe.name)
    file = litert.load(quantized).predict(x)
    assert sqnr_db(model.predict(x, verbose=0), file) > (
        55 if below_db > 100 else sqnr_db(reference(quantized, x), file) - 3
    )


@pytest.mark.once
def test_what_it_was_trained_for_is_in_every_form_of_the_file(tmp_path):
    plain = randomize(small_vit())
    pixels = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 3), dtype="uint8").repeat(8, 1).repeat(8, 2)
    x = plain.preprocessing.normalize(pixels)
    model = qat(plain, "static_int8", calibration=x)
    expected = model.predict(x, verbose=0)
    for i, form in enumerate((dict(batch=2), dict(layout="nchw"), dict(features=["pool"]), dict(uint8_input=True))):
        float32 = litert.export(model, tmp_path, name=f"form{i}", **form)
        quantized = litert.quantize(float32, "static_int8")
        found = litert.load(quantized).predict(pixels if "uint8_input" in form else x)
        found = found["logits"] if isinstance(found, dict) else found
        assert sqnr_db(found, expected) > 28, form  # what takes pixels does not round them
    with pytest.raises(ValueError, match="needs calibration"):
        litert.quantize(float32, "static_int8_int16")
    with pytest.raises(ValueError, match="another form"):
        changed = {**float32.trained_for, "ranges": {}}
        litert.quantize(
            edge.artifact.make(float32.path, **edge.artifact.like(float32, trained_for=changed)), "static_int8"
        )


def test_gradients_pass_the_rounding():
    """y = x w: the gradient of w is x, and the gradient of what comes before is the rounded w."""
    x, kernel = random(6, 8), random(8, 3, seed=1)
    gain, shift = keras.Variable(random(8, seed=2)), keras.Variable(random(8, seed=3))
    for rounding in (Rounding(4), Rounding(8, "each"), Rounding(4, None, gain, shift), Rounding(8, (-5.0, 5.0))):
        first, layer = keras.layers.Dense(8, use_bias=False), RoundedDense(3)
        model = keras.Sequential([keras.Input((8,)), first, layer])
        layer.rounding = rounding
        first.kernel.assign(np.eye(8))
        layer.kernel.assign(kernel)
        weights = numpy(rounding.weights(layer.kernel))
        if rounding.gain is not None:
            weights = weights / numpy(gain)[:, None]
        assert not np.array_equal(weights, kernel)
        model.compile(keras.optimizers.SGD(1.0), lambda _, y: keras.ops.sum(y, -1) * 6, run_eagerly=False)
        model.train_on_batch(x, np.zeros((6, 3)))
        inputs = x if rounding.inputs is None else numpy(keras.ops.convert_to_tensor(x))
        slack = 0 if rounding.inputs is None else np.abs(x).max() / 127 * 6
        np.testing.assert_allclose(kernel - numpy(layer.kernel), np.tile(inputs.sum(0)[:, None], 3), atol=slack + 1e-4)
        np.testing.assert_allclose(np.eye(8) - numpy(first.kernel), np.outer(x.sum(0), weights.sum(1)), atol=1e-3)


@pytest.mark.parametrize("recipe", families.once_but(("weight_int4", "static_int8"), "static_int8"))
def test_it_trains_with_fit_and_is_saved_as_the_plain_model(recipe, tmp_path):
    plain = small_vit()
    before = [numpy(w) for w in plain.weights]
    x, labels = images_of(plain, 32), np.arange(32) % 5
    model = qat(plain, recipe, calibration=x)
    assert type(model) is type(plain) and model.get_config() == plain.get_config()
    assert [w.path for w in model.weights] == [w.path for w in plain.weights]
    model.compile(keras.optimizers.Adam(3e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit(x, labels, batch_size=16, epochs=8, verbose=0).history["loss"]
    assert min(losses[4:]) < 0.7 * losses[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert not any(hasattr(layer, "rounding") for layer in loaded._flatten_layers())
    for a, b, old, now in zip(loaded.weights, model.weights, before, plain.weights, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b))
        np.testing.assert_array_equal(numpy(now), old)
    again = qat(loaded, "weight_int4" if recipe == "static_int8" else recipe)
    if recipe == "weight_int4":
        np.testing.assert_allclose(again.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize(
    ("model", "recipe", "says"),
    [
        (small_vit, "float16", "rounds no layer to integers"),
        (small_vit, "palette4", "There are"),
        (small_vit, "static_int8", "needs calibration"),
        (lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), "weight_int4", "Only a VisionModel"),
    ],
)
def test_mistakes_are_named(model, recipe, says):
    with pytest.raises(ValueError, match=says):
        qat(model(), recipe)


def stretch_values(model, factor=32):
    """Some channels of the values get smaller and their rows of the output projection larger: the same in float, but
    4 bits with these outliers leave nothing of the other rows."""
    attention, width = model.get_layer("block_0").attention, model.cfg.width
    by = np.ones(3 * width, "float32")
    by[2 * width :: 6] = 1 / factor
    for variable in (attention.qkv.kernel, attention.qkv.bias):
        variable.assign(numpy(variable) * by)
    attention.out.kernel.assign(numpy(attention.out.kernel) / by[2 * width :, None])


@pytest.mark.once
def test_digits_win_back_what_four_bits_lost(tmp_path):
    fit.set_seed(0)
    model = small_vit(image_size=16, patch_size=4, depth=1, mlp_hidden=64, num_classes=10)
    digits = data.load("digits", model.preprocessing)
    order = np.random.default_rng(0).permutation(len(digits.train.labels))
    x, labels = digits.train.images()[order], digits.train.labels[order]
    held_out = digits.validation.images()
    assert len(held_out) == 500

    def train(model, epochs, rate):
        schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * -(-len(x) // 64))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(schedule), loss)
        model.fit(x, labels, batch_size=64, epochs=epochs, shuffle=False, verbose=0)  # as every time, on any backend
        return model

    def top1(model):
        return np.mean(model.predict(held_out).argmax(-1) == digits.validation.labels)

    def quantized_top1(model):
        float32 = litert.export(model, tmp_path, batch=100, overwrite=True)
        return top1(litert.load(litert.quantize(float32, "weight_int4", overwrite=True)))

    stretch_values(train(model, 20, 1e-2))
    before, lost = top1(model), quantized_top1(model)
    assert before > 0.85 and lost < before - 0.1
    trained = quantized_top1(train(qat(model, "weight_int4"), 6, 3e-3))
    longer = quantized_top1(train(model, 6, 3e-3))  # as many steps without the rounding
    assert trained >= lost + (before - lost) / 2
    assert trained > longer + (before - lost) / 4
