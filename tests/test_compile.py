"""`compile` of a model of logits: the default loss, losses and metrics by name, and what a file keeps."""

import warnings

import families
import keras
import numpy as np
import pytest

import keras_vits
from keras_vits import compiling, edge, heads, specs
from keras_vits.models import _registry as registry
from keras_vits.training import data

FAMILY = families.FAMILIES[0]
LABELS = np.arange(4)
SHARES = np.eye(5, dtype="float32")[LABELS]


@pytest.fixture(autouse=True)
def no_other_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", compiling.LogitsWarning)
        yield


@pytest.fixture(scope="module")
def model():
    return FAMILY.create()


def logs(model, labels):
    images = families.images(model, 4)
    return model.evaluate(images, labels, verbose=0, return_dict=True), model(images)


def close(found, loss, labels, logits):
    expected = float(keras.ops.convert_to_numpy(keras.ops.mean(loss(labels, logits))))
    assert found == pytest.approx(expected, rel=1e-4)


def softmax(loss):
    return lambda labels, logits: loss(labels, keras.ops.softmax(logits))


def sigmoid(loss):
    return lambda labels, logits: loss(labels, keras.ops.sigmoid(logits))


SPARSE = softmax(keras.losses.sparse_categorical_crossentropy)


def test_the_default_fits_the_head(model):
    model.compile("adamw")
    found, logits = logs(model, LABELS)
    close(found["loss"], SPARSE, LABELS, logits)
    answers = keras.ops.convert_to_numpy(logits).argmax(-1)
    assert found["accuracy"] == pytest.approx((answers == LABELS).mean())


def test_one_class_has_a_threshold_of_zero():
    model = FAMILY.create(num_classes=1)
    labels = np.array([[0], [1], [1], [1]], "float32")
    head, images = model.get_layer("head"), families.images(model, 4)
    head.bias.assign(head.bias + 0.3 - keras.ops.mean(model(images)))  # logits between 0 and 0.5, all of the answer 1
    for compiled in ({}, dict(loss="binary_crossentropy", metrics=["accuracy"]), dict(loss="ce", metrics=("acc",))):
        model.compile("sgd", **compiled)
        found, logits = logs(model, labels)
        logits = keras.ops.convert_to_numpy(logits)
        close(found["loss"], sigmoid(keras.losses.binary_crossentropy), labels, logits)
        assert found.get("accuracy", found.get("acc")) == ((logits > 0) == labels).mean()
        assert (logits > 0).all() and (logits < 0.5).all()


def test_features_have_no_loss():
    model = FAMILY.create(num_classes=0)
    model.compile("sgd")
    assert model.get_compile_config()["loss"] is None and not model.get_compile_config()["metrics"]
    model.compile("sgd", "mse")
    assert model.get_compile_config()["loss"] == "mse"


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "logits"),
        (dict(num_classes=1), "binary_logit"),
        (dict(num_classes=0), "features"),
        (dict(distill_token=True), "logits"),
        (dict(distill_token=True, num_classes=0), "features"),
    ],
)
def test_the_head_says_what_the_output_is(options, kind):
    model = FAMILY.create(**options)
    head = model.head(model.cfg)
    assert isinstance(head, heads.Head)
    (spec,) = model.output_specs
    assert (spec.kind, spec.shape) == (kind, (1, *model.output_shape[1:])) and len(spec.shape) == 2


def test_a_family_with_another_head_is_asked_everywhere(monkeypatch):
    """Two outputs with losses of their own: what a detector's or a segmenter's head says."""

    class Two(heads.Classifier):
        def __call__(self, features):
            boxes = keras.layers.Dense(4, name="boxes")(features)
            return {"logits": super().__call__(features), "boxes": keras.ops.expand_dims(boxes, 1)}

        def specs(self, shapes, class_names):
            boxes = specs.OutputSpec(name="boxes", kind="boxes", shape=shapes["boxes"])
            return (*super().specs(shapes["logits"], class_names), boxes)

        def loss(self):
            return {"logits": super().loss(), "boxes": "mse"}

        def metrics(self):
            return {"logits": super().metrics()}

    monkeypatch.setattr(registry.lookup(FAMILY.variant)[0], "head", classmethod(lambda cls, cfg: Two(cfg.num_classes)))
    model = FAMILY.create()
    assert [(spec.name, spec.kind, spec.shape) for spec in model.output_specs] == [
        ("logits", "logits", (1, 5)),
        ("boxes", "boxes", (1, 1, 4)),
    ]
    model.compile("adamw")
    labels = {"logits": LABELS, "boxes": np.zeros((4, 1, 4), "float32")}
    found = model.evaluate(families.images(model, 4), labels, verbose=0, return_dict=True)
    assert {"loss", "logits_loss", "boxes_loss", "logits_accuracy"} <= set(found)


CROSSENTROPIES = [
    (name, labels, loss)
    for names, labels, loss in [
        ("sparse_categorical_crossentropy SparseCategoricalCrossentropy crossentropy ce", LABELS, SPARSE),
        (
            "categorical_crossentropy CategoricalCrossentropy ce",
            SHARES,
            softmax(keras.losses.categorical_crossentropy),
        ),
        (
            "categorical_focal_crossentropy CategoricalFocalCrossentropy",
            SHARES,
            softmax(keras.losses.categorical_focal_crossentropy),
        ),
        ("binary_crossentropy BinaryCrossentropy bce BCE", SHARES, sigmoid(keras.losses.binary_crossentropy)),
        (
            "binary_focal_crossentropy BinaryFocalCrossentropy",
            SHARES,
            sigmoid(keras.losses.binary_focal_crossentropy),
        ),
    ]
    for name in names.split()
]


@pytest.mark.once
@pytest.mark.parametrize(("name", "labels", "loss"), CROSSENTROPIES)
def test_a_cross_entropy_by_name_takes_logits(model, name, labels, loss):
    for given in (name, [name], getattr(keras.losses, name, name)):  # the function, or the class
        model.compile("sgd", given)
        found, logits = logs(model, labels)
        close(found["loss"], loss, labels, logits)
        assert "accuracy" not in found, "a given loss may not fit any accuracy"


@pytest.mark.once
def test_metrics_by_name_take_logits(model):
    names = ["accuracy", "binary_accuracy", "AUC", "Precision", "TruePositives", "categorical_crossentropy", "mse"]
    model.compile("sgd", "mse", metrics=[*names, "categorical_focal_crossentropy"], weighted_metrics=["BinaryAccuracy"])
    found, logits = logs(model, SHARES)
    logits = keras.ops.convert_to_numpy(logits)
    positive = logits > 0
    assert {*names, "categorical_focal_crossentropy", "BinaryAccuracy"} <= set(found)
    assert found["binary_accuracy"] == found["BinaryAccuracy"] == pytest.approx((positive == SHARES).mean())
    assert found["Precision"] == pytest.approx(SHARES[positive].mean())
    assert found["TruePositives"] == SHARES[positive].sum()
    close(found["categorical_crossentropy"], softmax(keras.losses.categorical_crossentropy), SHARES, logits)
    focal = softmax(keras.losses.categorical_focal_crossentropy)
    close(found["categorical_focal_crossentropy"], focal, SHARES, logits)
    assert found["mse"] == pytest.approx(((logits - SHARES) ** 2).mean(), rel=1e-5)
    auc = keras.metrics.AUC(from_logits=True)
    auc.update_state(SHARES, logits)
    assert found["AUC"] == pytest.approx(float(auc.result()), abs=1e-6)


@pytest.mark.once
def test_objects_stay_and_those_of_probabilities_are_warned_of(model):
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    model.compile("sgd", loss, metrics=[keras.metrics.CategoricalAccuracy(name="top1")])
    assert model.loss is loss
    for loss, metrics, words in [
        (keras.losses.CategoricalCrossentropy(), None, "CategoricalCrossentropy takes probabilities: give it from_log"),
        ("kl_divergence", None, "KLDivergence takes probabilities and has no form for logits"),
        ("ce", [keras.metrics.AUC()], r"AUC takes probabilities: give it from_logits=True"),
        ("ce", ["KLDivergence"], "has no form for logits"),
    ]:
        with pytest.warns(compiling.LogitsWarning, match=words) as caught:
            model.compile("sgd", loss, metrics=metrics)
        assert len([w for w in caught if w.category is compiling.LogitsWarning]) == 1
        assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "compiled",
    [
        {},
        dict(loss="ce", metrics=["accuracy", "Precision"]),
        dict(loss=keras.losses.CategoricalCrossentropy(label_smoothing=0.1)),
        dict(loss=None, metrics=None),
    ],
    ids=["default", "names", "probabilities", "none"],
)
def test_a_file_keeps_what_was_compiled(compiled, tmp_path):
    model = FAMILY.create()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", compiling.LogitsWarning)
        model.compile("adamw", **compiled)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")  # without a warning
    assert again.get_compile_config() == model.get_compile_config()
    if not compiled:
        assert logs(again, LABELS)[0] == pytest.approx(logs(model, LABELS)[0], rel=1e-5)


@pytest.mark.once
def test_models_made_of_a_model_compile_like_it():
    model = FAMILY.create()
    for made in (edge.qat(model, "weight_int8"), model.reset_head(3), model.merge_lora()):
        made.compile("adamw")
        assert made.loss.from_logits
    model.enable_lora(2)
    model.compile("adamw")
    assert model.loss.from_logits


def test_the_readmes_chain_learns_digits():
    """85 % of digits by writers it has never seen, from `compile("adamw")` and `fit` alone."""
    shape = dict(image_size=16, patch_size=4, width=64, depth=1, heads=4, mlp_hidden=128, num_classes=10)
    model = keras_vits.create("vit_tiny_patch16_224", **shape)
    digits = data.load("digits", model.preprocessing)
    model.compile("adamw")
    model.fit(digits.train.images(), digits.train.labels, batch_size=64, epochs=20, verbose=0)
    held_out = digits.validation
    assert model.evaluate(held_out.images(), held_out.labels, verbose=0, return_dict=True)["accuracy"] >= 0.85
