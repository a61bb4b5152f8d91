"""One class, softmax inside, features, several inputs and outputs, labels, sizes of other types: what a file's specs
say is what it does, in every format (edge 5 to 9, 12, 16, 23)."""

import functools

import keras
import numpy as np
import pytest

import keras_vits
from keras_vits import edge
from keras_vits.edge import coreml, litert
from keras_vits.edge.headers import litert_labels as labels
from keras_vits.preprocess import Preprocessing

pytestmark = pytest.mark.once

TINY = dict(image_size=32, patch_size=8, width=32, depth=1, heads=2, mlp_hidden=64)
FORMATS = {"litert": edge.litert, "onnx": edge.onnx, "coreml": coreml}
each_format = pytest.mark.parametrize("format", FORMATS)


@functools.cache  # of those that a test does not change
def vit(num_classes):
    return made(num_classes)


def made(num_classes):
    model = keras_vits.create("vit_tiny_patch16_224", num_classes=num_classes, **TINY)
    random = np.random.default_rng(0)
    model.set_weights([w + random.normal(0, 0.1, w.shape).astype("float32") for w in model.get_weights()])
    return model


def random(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype("float32")


def load(artifact):
    return edge.targets._protocol.target(artifact.format).load(artifact)


def exported(format, model, folder, **options):
    if format == "coreml":
        options.setdefault("precision", "float32")
    return FORMATS[format].export(model, folder, **options)


def small(*outputs, inputs=1, shape=(8, 8, 3), names=("left", "right")):
    """A functional model that is not ours: outputs are functions of the flattened pixels of all inputs."""
    images = [keras.Input(shape, name=name) for name in names[:inputs]]
    x = keras.layers.Flatten()(images[0] if inputs == 1 else keras.layers.Concatenate()(images))
    found = [output(x) for output in outputs]
    return keras.Model(images if inputs > 1 else images[0], found if len(found) > 1 else found[0], name="small")


# ---------------------------------------------------------------- one class (edge 5)


@pytest.fixture(scope="module")
def yes_or_no():
    """A model of one class whose answers lie on both sides of its threshold, and pictures."""
    model = made(1)
    x = random(24, 32, 32, 3)
    logits = model.predict(x, verbose=0)
    kernel, bias = model.get_layer("head").get_weights()
    model.get_layer("head").set_weights([kernel, bias - np.median(logits)])
    return model, x


@each_format
def test_one_class_is_a_sigmoid(format, yes_or_no, tmp_path):
    model, x = yes_or_no
    expected = 1 / (1 + np.exp(-model.predict(x, verbose=0)))
    artifact = exported(format, model, tmp_path, head="softmax")
    np.testing.assert_allclose(load(artifact).predict(x), expected, atol=1e-4)
    assert artifact.outputs[0].kind == "probabilities" and artifact.outputs[0].applied == "sigmoid"


def test_one_class_is_predicted_with_its_own_probability(yes_or_no):
    model, _ = yes_or_no
    pixels = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    found = keras_vits.predict(model, list(pixels))
    logits = model.predict(np.stack([model.preprocessing(p) for p in pixels]), verbose=0)[:, 0]
    np.testing.assert_allclose([one[0].probability for one in found], 1 / (1 + np.exp(-logits)), rtol=1e-5)
    assert all(len(one) == 1 for one in found)


def test_agreement_of_one_class_is_at_its_threshold(yes_or_no, tmp_path):
    model, x = yes_or_no
    artifact = edge.litert.export(model, tmp_path)
    logits = model.predict(x, verbose=0)
    wrong = logits.copy()
    wrong[::8] *= -1
    check = edge.verify(artifact, wrong, x, (wrong[:, 0] > 0).astype(int))
    assert check.top1_agreement == 21 / 24 == check.top1 and check.reference_top1 == 1
    assert edge.verify(artifact, model, x).top1_agreement == 1


def test_the_budget_of_one_class_is_kept(yes_or_no, tmp_path):
    model, x = yes_or_no
    truth = (model.predict(x, verbose=0)[:, 0] > 0).astype(int)
    with pytest.raises(ValueError, match="max_drop is a loss in percent, from 0 to below 100; received 100"):
        edge.quantize_to(model, 100, dataset=(x, truth), folder=tmp_path)
    with pytest.raises(ValueError, match=r"max_drop=95 is all that the model has, a top-1 of 88\.9%"):
        edge.quantize_to(model, 95, dataset=(x, np.where(np.arange(24) % 12 == 11, 1 - truth, truth)), folder=tmp_path)


@pytest.mark.parametrize("metric", ["top1", "agreement"])
def test_a_candidate_that_flips_answers_of_one_class_misses_the_budget(metric, yes_or_no, tmp_path, monkeypatch):
    """Every eighth picture on the other side of the threshold, as a file whose numbers are a little off gives it."""
    model, x = yes_or_no
    x = np.tile(x, (2, 1, 1, 1))  # the first 12 calibrate, and 36 are measured on
    logits = model.predict(x, verbose=0)[12:, 0]
    shift = np.sort(logits[logits > 0])[:8].mean().item()  # an answer or more of each picture that is there twice
    truth = (model.predict(x, verbose=0)[:, 0] > 0).astype(int)
    off = keras.models.clone_model(model)
    off.set_weights(model.get_weights())
    kernel, bias = off.get_layer("head").get_weights()
    off.get_layer("head").set_weights([kernel, bias - shift])
    flipped = np.mean((logits > 0) != (logits > shift))
    assert 0.05 < flipped < 0.3

    def quantize(f32, recipe, calibration, folder, *, float_layers=(), overwrite=False):
        return edge.litert.export(off, folder, name="off", overwrite=overwrite)

    monkeypatch.setattr(edge.quantize_to.__globals__["litert"], "quantize", quantize)
    options = dict(metric=metric, dataset=(x, truth), folder=tmp_path, recipes=("float16",))
    with pytest.raises(ValueError, match=rf"No file loses at most .* % \({metric}\); the best, off_.*loses") as refused:
        edge.quantize_to(model, 100 * flipped - 1, **options)
    assert f"loses {100 * flipped:.3g} %" in str(refused.value)
    short = functools.partial(edge.benchmark, min_runs=1, min_seconds=0, warmup_seconds=0)
    monkeypatch.setitem(edge.quantize_to.__globals__, "benchmark", short)
    assert edge.quantize_to(model, 100 * flipped + 1, **options).tried[0].drop == pytest.approx(100 * flipped)


def test_a_picture_of_one_class_has_no_labels_in_core_ml(yes_or_no, tmp_path):
    model, _ = yes_or_no
    model = keras.models.clone_model(model)
    model.class_names = ["cat"]
    artifact = coreml.export(model, tmp_path, image_input=True, precision="float32")
    assert artifact.outputs[0].applied == "sigmoid"
    found = load(artifact).predict(np.zeros((2, 32, 32, 3), np.uint8))
    assert found.shape == (2, 1) and (found < 1).all()
    with pytest.raises(ValueError, match="single class, of which there is no top 5: head='softmax'"):
        edge.litert.export(model, tmp_path, head="top_k")


# ---------------------------------------------------------------- softmax inside (edge 6)


@each_format
def test_a_softmax_inside_stays_the_only_one(format, tmp_path):
    model = small(keras.layers.Dense(3, activation="softmax", name="classes"))
    model.class_names = ["a", "b", "c"]
    x = random(6, 8, 8, 3)
    expected = model.predict(x, verbose=0)
    plain = exported(format, model, tmp_path, name="plain")
    artifact = exported(format, model, tmp_path, head="softmax")
    for one in (plain, artifact):
        np.testing.assert_allclose(load(one).predict(x), expected, atol=1e-4)
        check = edge.verify(one, model, x)
        assert check.top1_agreement == 1 and check.max_abs_error < 1e-4
        assert one.outputs[0].kind == "probabilities" and one.outputs[0].applied == ""


def test_the_classifier_of_pictures_has_no_second_softmax(tmp_path):
    model = small(keras.layers.Dense(3, activation="softmax", name="classes"))
    model.class_names, model.preprocessing = ["a", "b", "c"], Preprocessing(image_size=(8, 8))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    expected = model.predict(model.preprocessing.normalize(pixels), verbose=0)
    artifact = coreml.export(model, tmp_path, image_input=True, precision="float32")
    np.testing.assert_allclose(load(artifact).predict(pixels), expected, atol=1e-4)


@pytest.mark.parametrize("activation", ["sigmoid", "hidden"])
def test_a_probability_for_each_of_several_classes_is_no_softmax(activation, tmp_path):
    """Neighbours: several sigmoids, and a softmax whose answer a reshape follows."""
    if activation == "sigmoid":
        model = small(keras.layers.Dense(4, activation="sigmoid", name="tags"))
        model.class_names = list("abcd")
        with pytest.raises(ValueError, match="'tags' is of the kind 'multilabel', which cannot have head='softmax'"):
            edge.litert.export(model, tmp_path, head="softmax")
        artifact = edge.litert.export(model, tmp_path)
        assert artifact.outputs[0].class_names == tuple("abcd") and artifact.classification is None
        assert edge.verify(artifact, model, random(4, 8, 8, 3)).top1_agreement is None
        assert labels(artifact.path) == tuple("abcd")
    else:
        model = small(lambda x: keras.layers.Reshape((4,))(keras.layers.Softmax()(keras.layers.Dense(4)(x))))
        assert edge.litert.export(model, tmp_path, head="softmax").outputs[0].applied == ""


def dense(units, activation, seed=0):
    return keras.layers.Dense(units, activation=activation, kernel_initializer=keras.initializers.RandomNormal(1, seed))


def soft(x, seed=0, units=3):
    return dense(units, "softmax", seed)(x)


def answer(x, seed=0):
    return dense(1, "sigmoid", seed)(x)


def renormalised(p):
    return p / (keras.ops.sum(p, axis=-1, keepdims=True) + 1e-7)


STILL_PROBABILITIES = {
    "average": lambda x: keras.layers.Average()([soft(x, 0), soft(x, 1)]),
    "average of three in a list": lambda x: keras.ops.mean(keras.ops.stack([soft(x, i) for i in range(3)], 1), axis=1),
    "clip": lambda x: keras.ops.clip(soft(x), 1e-7, 1.0),
    "clip at both ends": lambda x: keras.ops.clip(soft(x), 1e-6, 1 - 1e-6),
    "maximum": lambda x: keras.ops.maximum(soft(x), 1e-7),
    "reshape": lambda x: keras.layers.Reshape((3,))(keras.layers.Reshape((1, 3))(soft(x))),
    "cast": lambda x: keras.ops.cast(keras.ops.cast(soft(x), "float16"), "float32"),
    "mixture": lambda x: 0.7 * soft(x, 0) + soft(x, 1) * 0.3,
    "mixture, divided": lambda x: (soft(x, 0) + 2 * soft(x, 1) + soft(x, 2)) / 4,
    "smoothed": lambda x: soft(x) * 0.9 + 0.1 / 3,
    "with an epsilon": lambda x: soft(x) + 1e-8,
    "with a prior": lambda x: (soft(x) + np.float32([0.5, 0.3, 0.2])) / 2,
    "geometric mean": lambda x: renormalised(keras.ops.sqrt(soft(x, 0) * soft(x, 1))),
    "by hand": lambda x: renormalised(keras.ops.exp(dense(3, None)(x))),
    "exponential of a logarithm": lambda x: keras.ops.exp(keras.ops.log_softmax(dense(3, None)(x), axis=-1)),
    "other order": lambda x: keras.ops.take(soft(x), np.int32([2, 0, 1]), axis=-1),
    "average of places": lambda x: keras.layers.GlobalAveragePooling2D()(soft(keras.layers.Reshape((8, 8, 3))(x))),
    "yes or no": lambda x: both(answer(x)),
}


def both(p):
    return keras.ops.concatenate([1 - p, p], axis=-1)


def traced(output):
    """The spec of a small model's one output, read from its graph."""
    return edge.targets._prepare.prepare(small(output)).outputs[0]


@pytest.mark.parametrize("name", STILL_PROBABILITIES)
def test_what_keeps_probabilities_what_they_are_gets_no_softmax(name):
    assert traced(STILL_PROBABILITIES[name]).kind == "probabilities"


@pytest.mark.parametrize("name", ["average", "clip", "mixture"])
def test_an_average_of_softmaxes_is_compared_as_it_is(name, tmp_path):
    model = small(STILL_PROBABILITIES[name])
    model.class_names = ["a", "b", "c"]
    x = random(6, 8, 8, 3)
    artifact = edge.litert.export(model, tmp_path, head="softmax")
    np.testing.assert_allclose(load(artifact).predict(x), model.predict(x, verbose=0), atol=1e-5)
    check = edge.verify(artifact, model, x)
    assert check.top1_agreement == 1 and check.max_abs_error < 1e-5 and artifact.outputs[0].applied == ""


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (lambda x: keras.layers.Average()([answer(x, 0), answer(x, 1)]), "probabilities"),
        (lambda x: 1 - answer(x), "probabilities"),
        (lambda x: keras.ops.clip(answer(x), 1e-7, 1.0), "probabilities"),
        (lambda x: soft(x, units=2)[:, 1:], "probabilities"),
        (lambda x: (dense(4, "sigmoid", 0)(x) + dense(4, "sigmoid", 1)(x)) / 2, "multilabel"),
    ],
)
def test_a_mixture_of_sigmoids_is_a_probability(output, kind):
    assert traced(output).kind == kind


@pytest.mark.parametrize(
    "output",
    [
        lambda x: keras.layers.Add()([soft(x, 0), soft(x, 1)]),  # the mass is 2
        lambda x: 2 * soft(x),
        lambda x: soft(x) - 0.1,
        lambda x: dense(3, None)(soft(x)),
        lambda x: keras.ops.log(soft(x)),
        lambda x: soft(x) * np.float32([1, 0.5, 1]),
        lambda x: keras.ops.clip(soft(x), 0.3, 0.7),
        lambda x: keras.ops.clip(dense(3, None)(x), 0.0, 1.0),
        lambda x: keras.ops.softmax(keras.layers.Reshape((2, 3))(dense(6, None)(x)), axis=1)[:, 0] * 0.5,
    ],
)
def test_what_is_no_longer_a_probability_is_not_taken_for_one(output):
    model = small(output)
    model.class_names = ["a", "b", "c"]
    assert edge.targets._prepare.prepare(model).outputs[0].kind == "logits"


# ---------------------------------------------------------------- features (edge 7)


@pytest.mark.parametrize("head", ["softmax", "top_k"])
@each_format
def test_features_have_no_classes(format, head, tmp_path):
    if (format, head) == ("coreml", "top_k"):
        pytest.skip("Core ML has no top_k")
    with pytest.raises(ValueError, match=f"is of the kind 'features', which cannot have head='{head}'"):
        exported(format, vit(0), tmp_path, head=head)
    assert not list(tmp_path.iterdir())


def test_features_have_no_top1(tmp_path):
    model, x = vit(0), random(4, 32, 32, 3)
    artifact = edge.litert.export(model, tmp_path)
    check = edge.verify(artifact, model, x)
    assert check.top1_agreement is None and check.sqnr_db > 90
    with pytest.raises(ValueError, match=r"Labels need a file that classifies images.*gives features \(features\)"):
        edge.verify(artifact, model, x, np.zeros(4, int))
    with pytest.raises(ValueError, match="metric='agreement' is for a model that classifies"):
        edge.quantize_to(model, 1, metric="agreement", dataset=x, folder=tmp_path)
    with pytest.raises(ValueError, match="so it predicts no classes"):
        keras_vits.predict(model, np.zeros((32, 32, 3), np.uint8))


@pytest.mark.parametrize("wrong", [0, -1, True, 2.5, "3", None])
def test_top_k_counts(wrong, tmp_path):
    with pytest.raises(ValueError, match="top_k must be"):
        edge.litert.export(vit(5), tmp_path, head="top_k", top_k=wrong)
    with pytest.raises(ValueError, match="top_k must be"):
        keras_vits.predict(vit(5), np.zeros((32, 32, 3), np.uint8), top_k=wrong)


# ---------------------------------------------------------------- several inputs (edge 8)


@pytest.fixture(scope="module")
def two_images():
    """Two image inputs with preprocessings of their own, of which the second must not vanish."""
    model = small(keras.layers.Dense(3, name="scores"), inputs=2)
    model.preprocessing = {
        "left": Preprocessing(image_size=(8, 8), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)),
        "right": Preprocessing(image_size=(8, 8), mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5)),
    }
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 8, 3), dtype=np.uint8)
    given = {name: x for name, x in zip(("left", "right"), pixels, strict=True)}
    normal = {name: model.preprocessing[name].normalize(x) for name, x in given.items()}
    return model, given, normal


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("format", ["litert", "onnx"])
def test_two_images_keep_their_own(format, pixels, layout, two_images, tmp_path):
    model, given, normal = two_images
    artifact = FORMATS[format].export(model, tmp_path, layout=layout, uint8_input=pixels)
    assert [(s.name, s.dtype, s.layout) for s in artifact.inputs] == [
        (name, "uint8" if pixels else "float32", layout) for name in ("left", "right")
    ]
    assert [s.preprocessing["mean"][0] for s in artifact.inputs] == [0.4, 0.1]
    check = edge.verify(artifact, model, given if pixels else normal)
    assert check.max_abs_error < 1e-4
    swapped = {"left": (given if pixels else normal)["right"], "right": (given if pixels else normal)["left"]}
    assert not np.allclose(load(artifact).predict(swapped), load(artifact).predict(given if pixels else normal))


@pytest.mark.parametrize("how", ["arrays", "dictionaries", "tuples", "labels", "function"])
@pytest.mark.parametrize("format", ["litert", "onnx"])
def test_static_int8_is_calibrated_with_every_input(format, how, two_images, tmp_path):
    model, _, normal = two_images
    artifact = FORMATS[format].export(model, tmp_path)
    halves = [{name: x[i : i + 4] for name, x in normal.items()} for i in (0, 4)]
    source = {
        "arrays": normal,
        "dictionaries": halves,
        "tuples": [(h["left"], h["right"]) for h in halves],
        "labels": [(h, np.zeros(4)) for h in halves],
        "function": lambda: ([h["left"], h["right"]] for h in halves),
    }[how]
    quantized = FORMATS[format].quantize(artifact, "static_int8", source)
    check = edge.verify(quantized, model, normal)
    assert check.sqnr_db > 25 and [s.name for s in quantized.inputs] == ["left", "right"]


def test_a_missing_input_is_named(two_images, tmp_path):
    model, _, normal = two_images
    artifact = edge.litert.export(model, tmp_path)
    with pytest.raises(ValueError, match="Calibration needs the input right; received left"):
        edge.litert.quantize(artifact, "static_int8", {"left": normal["left"]})
    with pytest.raises(ValueError, match=r"several inputs: calibrate it with name -> array.*of left, right"):
        edge.litert.quantize(artifact, "static_int8", normal["left"])
    for wrong, message in [
        ({"left": normal["left"]}, "takes left, right; received left"),
        (normal["left"], "takes several inputs, left, right"),
        ({**normal, "right": normal["right"][:3]}, "same number in each input; received 8, 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            edge.verify(artifact, model, wrong)
    with pytest.raises(ValueError, match="quantize_to is for a model of one input; small has 2"):
        edge.quantize_to(model, 1, metric="sqnr", dataset=normal["left"], folder=tmp_path)
    assert {row.layer for row in edge.sensitivity(artifact, normal, "weight_int8").rows} == {"scores"}


def test_core_ml_calibrates_every_input(two_images, tmp_path):
    model, _, normal = two_images
    half = coreml.export(model, tmp_path)
    check = edge.verify(coreml.quantize(half, "int8_int8", normal), model, normal)
    assert check.sqnr_db > 20


# ---------------------------------------------------------------- several outputs (edge 9)


@pytest.fixture(scope="module")
def detector():
    image = keras.Input((8, 8, 3), name="image")
    x = keras.layers.Dense(8, activation="relu")(keras.layers.Flatten()(image))
    boxes = 100 * keras.layers.Reshape((2, 4))(keras.layers.Dense(8)(x))
    return keras.Model(image, {"scores": keras.layers.Dense(3, name="class_head")(x), "boxes": boxes})


@each_format
def test_outputs_keep_their_names(format, detector, tmp_path):
    x = random(5, 8, 8, 3)
    expected = detector.predict(x, verbose=0)
    artifact = exported(format, detector, tmp_path, kinds={"scores": "logits", "boxes": "boxes"}, head="softmax")
    assert set(artifact.output_names) == {"boxes", "probabilities"}
    found = load(artifact).predict(x)
    np.testing.assert_allclose(found["boxes"], expected["boxes"], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found["probabilities"].sum(-1), 1, atol=1e-4)
    check = edge.verify(artifact, detector, x)
    assert check.top1_agreement == 1 and {o.name: o.kind for o in check.outputs} == {
        "boxes": "boxes",
        "probabilities": "probabilities",
    }


def test_each_output_counts_in_a_quantized_file(detector, tmp_path):
    """A tiny output beside a large one: its error is seen, and named."""
    x = random(8, 8, 8, 3)
    artifact = edge.litert.export(detector, tmp_path)
    quantized = edge.litert.quantize(artifact, "static_int8", x)
    check = edge.verify(quantized, detector, x)
    assert check.sqnr_db == min(o.sqnr_db for o in check.outputs) > 15
    assert edge.verify(artifact, {k: v for k, v in detector.predict(x, verbose=0).items()}, x).sqnr_db > 80
    with pytest.raises(ValueError, match="gives boxes, scores; received scores"):
        edge.verify(artifact, {"scores": np.zeros((8, 3))}, x)


@pytest.mark.parametrize("format", ["litert", "onnx"])
def test_a_model_of_features_is_compared_block_by_block(format, tmp_path):
    model = vit(5).features([0, "norm"])
    x = random(3, 32, 32, 3)
    artifact = FORMATS[format].export(model, tmp_path, name="features")
    check = edge.verify(artifact, model, x)
    assert [o.name for o in check.outputs] == ["block_0", "norm"] and check.sqnr_db > 80


# ---------------------------------------------------------------- the head is known by what it computes (edge 12)


@pytest.mark.parametrize("kind", ["dense", "conv", "two heads", "scaled"])
def test_logits_stay_fine_whatever_their_layer_is_called(kind, tmp_path):
    """256 values for all logits would make ties of close classes."""
    image = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(16, 3, strides=2, activation="relu", name="body")(image)
    pooled = keras.layers.GlobalAveragePooling2D(keepdims=kind == "conv")(x)
    if kind == "conv":
        y = keras.layers.Flatten()(keras.layers.Conv2D(200, 1, name="last")(pooled))
    elif kind == "two heads":
        y = (keras.layers.Dense(200, name="one")(pooled) + keras.layers.Dense(200, name="other")(pooled)) / 2
    elif kind == "scaled":
        y = keras.layers.Dense(200, name="last")(pooled) * np.linspace(1, 2, 200).astype("float32")
    else:
        y = keras.layers.Dense(200, name="classifier_of_mine")(pooled)
    model = keras.Model(image, keras.layers.Softmax()(y))
    x = random(32, 8, 8, 3)
    for target in (edge.litert, edge.onnx):
        artifact = target.quantize(target.export(model, tmp_path), "static_int8", x)
        found = load(artifact).predict(x)
        assert len(np.unique(found)) > 0.9 * found.size, target.__name__
    if kind in ("dense", "conv"):
        model = keras.Model(image, y)  # of which float16 has more values than of probabilities
        found = load(coreml.quantize(coreml.export(model, tmp_path), "int8_int8", x)).predict(x)
        assert len(np.unique(found)) > 600


# ---------------------------------------------------------------- labels (edge 16)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a\nb", "c", "d"], r"A class name is one line of text; the name of class 0 is 'a\\nb'"),
        (["a", "b\x85c", "d"], "the name of class 1"),
        (["a", "", "d"], "the name of class 1 is ''"),
        ({1: "a", 2: "b", 3: "c"}, "has the keys 0 to 2, the class numbers; received 1, 2, 3"),
        ({"a": 0, "b": 1, "c": 2}, "has the keys 0 to 2, the class numbers; received 'a', 'b', 'c'"),
    ],
)
def test_names_that_would_shift_are_refused(names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        vit(3).class_names = names
    model = small(keras.layers.Dense(3))
    model.class_names = names
    with pytest.raises(ValueError, match=message):
        edge.litert.export(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [{0: "cat", 2: "cow", 1: "dog"}, np.array(["cat", "dog", "cow"])])
def test_names_from_a_dictionary_or_an_array(names, tmp_path):
    model, foreign = made(3), small(keras.layers.Dense(3))
    model.class_names = foreign.class_names = names
    for one in (model, foreign):
        artifact = edge.litert.export(one, tmp_path)
        assert artifact.class_names == labels(artifact.path) == ("cat", "dog", "cow")


@pytest.mark.parametrize("count", [2, 4])
@each_format
def test_too_few_or_too_many_names(format, count, tmp_path):
    model = small(keras.layers.Dense(3, name="scores"))
    model.class_names = [f"class {i}" for i in range(count)]
    with pytest.raises(ValueError, match=rf"There are {count} class names, and no output has so many classes: scores"):
        exported(format, model, tmp_path)


def test_labels_belong_to_the_output_that_tells_classes(tmp_path):
    image = keras.Input((8, 8, 3), name="image")
    x = keras.layers.Flatten()(image)
    model = keras.Model(image, [keras.layers.Dense(5, name="vector")(x), keras.layers.Dense(3, name="species")(x)])
    model.class_names = ["é", " b ", "c,d"]
    artifact = edge.litert.export(model, tmp_path)
    assert [s.class_names for s in artifact.outputs] == [(), ("é", " b ", "c,d")]
    assert labels(artifact.path) == ("é", " b ", "c,d")
    content = artifact.path.read_bytes()
    assert content.index(b"labels.txt") > 0


# ---------------------------------------------------------------- sizes of other types, nothing at all (edge 23)


@pytest.mark.parametrize("number", [np.int64, np.uint8, float])
def test_numbers_of_other_types(number, tmp_path):
    model = keras_vits.create("vit_tiny_patch16_224", **{**TINY, "image_size": number(32)}, num_classes=np.int64(3))
    assert model.cfg.image_size == (32, 32) and type(model.cfg.num_classes) is int
    model.save(tmp_path / "model.keras")
    artifact = edge.litert.export(
        model, tmp_path, batch=number(2), image_size=number(64), head="top_k", top_k=number(2)
    )
    assert artifact.input.shape == (2, 64, 64, 3) and artifact.outputs[0].shape == (2, 2)


@pytest.mark.parametrize("wrong", [0, -2, 1.5, "2", True, None])
def test_a_batch_that_is_none(wrong, tmp_path):
    with pytest.raises(ValueError, match="batch must be"):
        edge.litert.export(vit(3), tmp_path, batch=wrong)
    with pytest.raises(ValueError, match="image_size must be pixels"):
        vit(3).resized(wrong if wrong is not None else "x")


@each_format
def test_predicting_nothing_or_something_else(format, tmp_path):
    model, x = vit(3), random(2, 32, 32, 3)
    runner = load(exported(format, model, tmp_path))
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    for wrong, message in [
        (x[:0], "takes one example or more"),
        (x[0], r"takes images \(N, 32, 32, 3\); received \(32, 32, 3\)"),
        (x.transpose(0, 3, 1, 2), r"takes images \(N, 32, 32, 3\); received \(2, 3, 32, 32\)"),
        (pixels, "takes normalised float32 images; received uint8 pixels"),
        ({"picture": x}, "takes image; received picture"),
        (np.where(np.arange(2)[:, None, None, None] == 1, np.nan, x), "image 1 holds NaN or infinity"),
        (x.astype(object), "takes numbers in 'image'; received object"),
    ]:
        with pytest.raises(ValueError, match=message):
            runner.predict(wrong)


def test_a_core_ml_classifier_of_a_batch_gives_probabilities(tmp_path):
    model, x = made(3), random(5, 32, 32, 3)
    model.class_names = ["a", "b", "c"]
    artifact = coreml.export(model, tmp_path, batch=4, head="softmax", precision="float32")
    assert "classify" not in load(artifact).histogram() and edge.verify(artifact, model, x).top1_agreement == 1


def test_another_size_is_not_compared(tmp_path):
    model = vit(3)
    artifact = edge.litert.export(model, tmp_path, image_size=48)
    with pytest.raises(ValueError, match=r"takes \(48, 48, 3\) for each example, and the model \(32, 32, 3\)"):
        edge.verify(artifact, model, random(2, 48, 48, 3))
    assert edge.verify(artifact, model.resized(48), random(2, 48, 48, 3)).top1_agreement == 1
    with pytest.raises(ValueError, match=r"compared with a keras\.Model, or with a model's outputs; received Artifact"):
        edge.verify(artifact, artifact, random(2, 48, 48, 3))


def test_integers_as_images_stay_what_they_are(tmp_path):
    """A model that takes uint8 by itself: nothing is normalised a second time."""
    image = keras.Input((8, 8, 3), dtype="uint8", name="image")
    x = keras.layers.Flatten()(keras.ops.cast(image, "float32") / 255)
    model = keras.Model(image, keras.layers.Dense(3)(x))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    artifact = edge.litert.export(model, tmp_path)
    assert edge.verify(artifact, model, pixels).max_abs_error < 1e-4
    with pytest.raises(ValueError, match=r"takes pixels 0 to 255 \(uint8\); received float32 from -"):
        litert.load(artifact).predict(random(2, 8, 8, 3))


# ---------------------------------------------------------------- names


@each_format
def test_a_name_of_ones_own_is_that_of_every_file(format, tmp_path):
    artifact = exported(format, vit(3), tmp_path, name="mine")
    recipe, suffix = {"litert": "float16", "onnx": "dynamic_int8", "coreml": "int8"}[format], artifact.path.suffix
    assert artifact.model == "mine" and artifact.path.name == f"mine_float32{suffix}"
    assert FORMATS[format].quantize(artifact, recipe).path.name == f"mine_{recipe}{suffix}"
