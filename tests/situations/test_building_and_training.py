"""What users build, save, load and train: models in models, odd arguments, resumed and stopped trainings."""

import dataclasses
import json
import resource
import zipfile

import families
import keras
import numpy as np
import pytest

import keras_vits
from keras_vits import layers as ours
from keras_vits._util import keras_private, limits
from keras_vits.models import _registry as registry
from keras_vits.models.vit import PrefixTokens
from keras_vits.training import adamw, data, fit, parameter_groups

TINY = dict(image_size=16, patch_size=4, width=24, depth=2, heads=2, mlp_hidden=48, num_classes=10)
FAMILIES = {family.name: family for family in families.FAMILIES}


def create(seed=0, **overrides):
    fit.set_seed(seed)
    return keras_vits.create("vit_tiny_patch16_224", **{**TINY, **overrides})


def same(a, b):
    images = families.images(create())
    for x, y in zip(
        keras.tree.flatten(families.predict(a, images)), keras.tree.flatten(families.predict(b, images)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- saving and loading


def another_head(model):
    return keras.Model(model.input, keras.layers.Dense(3)(model.layers[-2].output))


def clone_with_weights(model):
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    return clone


def in_sequential(model):
    return keras.Sequential([keras.Input((16, 16, 3)), keras.layers.Rescaling(2.0), model, keras.layers.Dense(3)])


def two_in_one(model):
    image = keras.Input((16, 16, 3))
    return keras.Model(image, keras.layers.Average()([create(name="left")(image), create(name="right")(image)]))


@pytest.mark.once
@pytest.mark.parametrize(
    "make", [another_head, lambda m: m.features([0, -1]), clone_with_weights, in_sequential, two_in_one]
)
def test_what_is_made_of_a_model_loads_again(make, tmp_path):
    made = make(create())
    made.save(tmp_path / "made.keras")
    same(keras.models.load_model(tmp_path / "made.keras"), made)


@pytest.mark.once
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: ours.MultiHeadAttention(2), (4, 8)),
        (lambda: ours.Mlp(16), (4, 8)),
        (lambda: ours.TransformerBlock(2, 16, 1e-6), (4, 8)),
        (lambda: ours.ConvNorm(8, 3), (8, 8, 3)),
        (lambda: ours.LayerScale(0.1), (4, 8)),
        (lambda: ours.KernelAttention(2), (4, 8)),
        (lambda: PrefixTokens(registers=2), (4, 8)),
        (lambda: ours.PositionEmbedding(), (4, 8)),
    ],
)
def test_a_users_model_of_our_layers_loads_again(layer, shape, tmp_path):
    image = keras.Input(shape)
    model = keras.Model(image, layer()(image))
    model.save(tmp_path / "users.keras")
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype("float32")
    np.testing.assert_array_equal(
        families.predict(keras.models.load_model(tmp_path / "users.keras"), x), families.predict(model, x)
    )


@pytest.mark.parametrize("frozen", ["block_0/attention", "block_1/mlp/fc1", "stem"])
def test_a_frozen_part_stays_frozen(frozen, tmp_path):
    model = create(frozen=[frozen])
    trains = {v.path for v in model.trainable_variables}
    assert len(trains) < len(model.weights)
    model.save(tmp_path / "frozen.keras")
    for again in (keras_vits.load(tmp_path / "frozen.keras"), model.resized(32), model.reset_head(10)):
        assert {v.path for v in again.trainable_variables} == trains


# ---------------------------------------------------------------- impossible and absurd models


WRONG = {  # by a field's type: values that it cannot have
    int: [-1, 2.5, float("nan"), "3", None, True, 10**9, 10**400],
    float: [-1, float("nan"), float("inf"), "0.1", None, True],
    bool: [2, "yes", None],
    str: ["nonsense", 3, None],
    tuple: [3, "abc", None],
}
CONFIGS = {cls.Config: (name, cls) for name, (cls, _) in reversed(registry.variants().items())}


@pytest.mark.once
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_hyperparameter_of_every_family_is_checked(config):
    import typing

    name, _ = CONFIGS[config]
    for field, kind in typing.get_type_hints(config).items():
        for value in WRONG.get(kind, WRONG[tuple]):
            with pytest.raises(ValueError, match=field) as error:
                keras_vits.create(name, **{field: value})
            assert "\n" not in str(error.value), error.value
        if typing.get_origin(kind) is tuple and field != "image_size":
            entry = typing.get_args(kind)[0]
            given = registry.lookup(name)[1].get(field, getattr(config, field, None))
            for value in WRONG[entry]:
                with pytest.raises(ValueError, match=field):
                    keras_vits.create(name, **{field: (value, *given[1:])})
            with pytest.raises(ValueError, match=field):
                keras_vits.create(name, **{field: given * 300})


@pytest.mark.once
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(depth=-1), "depth must be a positive integer; received -1"),
        (dict(depth=0), "depth must be a positive integer; received 0"),
        (dict(depth=10**6), "at most 1,000 blocks; received depth=1000000"),
        (dict(epsilon=-1), "epsilon is a small positive number"),
        (dict(epsilon=0), "epsilon is a small positive number"),
        (dict(heads=0), "heads must be a positive integer; received 0"),
        (dict(heads=5), "heads must divide width; received heads=5, width=24"),
        (dict(patch_size=0), "patch_size must be a positive integer"),
        (dict(dropout=2.0), r"dropout is a probability in \[0, 1\); received 2.0"),
        (dict(num_classes=-1), r"num_classes must be 0 \(no head\) or a positive integer; received -1"),
        (dict(num_classes=10**9), "num_classes .* at most 10,000,000; received 1000000000"),
        (dict(width=10**8), "width must be a positive integer and at most 10,000,000"),
        (dict(width=10**7, heads=1), "parameters, and the limit is 10,000,000,000"),
        (dict(image_size=10**6), "image_size .* more than the 67,108,864 pixels"),
        (dict(image_size=(10**6, 16)), "image_size .* multiples of|parameters|pixels"),
        (dict(image_size=(16, 16, 3)), "image_size must be pixels or"),
        (dict(activation="gellu"), "activation is the name of one of keras.activations"),
        (dict(attention="flash"), "attention must be one of softmax"),
        (dict(wdith=3), "no hyper-parameter wdith"),
    ],
    ids=str,
)
def test_an_impossible_or_absurd_model_is_refused_in_a_sentence(given, words):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if given.get("image_size") == (10**6, 16):
        given = {**given, "mlp_hidden": 10**7, "width": 1000, "heads": 1}
    with pytest.raises(ValueError, match=words) as error:
        create(**given)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


@pytest.mark.once
@pytest.mark.parametrize(
    "number", [np.int64(16), np.int32(16), 16.0, np.float32(16), [16, 16], np.array([16, 16])], ids=repr
)
def test_an_integer_may_be_of_any_type(number):
    model = create(image_size=number, depth=np.int64(1), heads=2.0, num_classes=np.uint8(7))
    assert model.cfg.image_size == (16, 16) and type(model.cfg.image_size[0]) is int
    assert json.loads(json.dumps(model.get_config()))["num_classes"] == 7
    assert model.output_shape == (None, 7)


@pytest.mark.once
@pytest.mark.parametrize(
    "changes", [dict(num_classes=10**9), dict(image_size=10**6), dict(depth=10**6), dict(width=10**7, heads=1)], ids=str
)
def test_a_file_of_absurd_sizes_is_refused_before_memory_is_asked_for(changes, tmp_path):
    path = tmp_path / "vit.keras"
    create().save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    config["config"].update(changes)
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"vit\.keras cannot be read") as error:
        keras_vits.load(path)
    assert next(iter(changes)) in str(error.value) or "parameters" in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000


@pytest.mark.once
def test_another_packages_file_is_refused_before_it_is_built(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.save(tmp_path / "other.keras")
    with zipfile.ZipFile(tmp_path / "other.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(b'"units": 1,', b'"units": 100000000000,'))
    with pytest.raises(ValueError, match="holds a Sequential, not a model of keras_vits"):
        keras_vits.load(tmp_path / "other.keras")


@pytest.mark.once
def test_channels_first_is_refused_in_a_sentence():
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(ValueError, match="set_image_data_format"):
            create()
    finally:
        keras.config.set_image_data_format("channels_last")


@pytest.mark.parametrize("family", [FAMILIES["vit"], FAMILIES["mobilevit"]], ids=lambda family: family.name)
def test_values_are_the_same_whenever_they_are_given(family):
    """The limit on parameters is asked before any value is there: seeds give what they gave."""
    fit.set_seed(3)
    at_once = keras_vits.create(family.variant, **family.tiny)
    fit.set_seed(3)
    with keras_private.values_later():
        later = keras_vits.create(family.variant, **family.tiny)
    assert not keras_private.has_value(later.weights[0])
    keras_private.initialize(later)
    for a, b in zip(at_once.weights, later.weights, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b))
    assert sum(int(np.prod(v.shape)) for v in at_once.weights) < limits.MAX_PARAMETERS


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", create().preprocessing, limit=40)


def run(model, digits, **options):
    return fit.fit(model, digits.train, digits.validation, **{"batch_size": 10, **options})


@pytest.mark.once
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(batch_size=0), "batch_size must be a positive integer; received 0"),
        (dict(batch_size=2.5), "batch_size must be a positive integer"),
        (dict(epochs=0), "epochs must be a positive integer; received 0"),
        (dict(epochs=-3), "epochs must be"),
        (dict(epochs=None), "epochs must be"),
        (dict(learning_rate=-1), "learning_rate is a positive number; received -1"),
        (dict(learning_rate=0), "learning_rate is a positive number"),
        (dict(learning_rate=float("nan")), "learning_rate is a positive number"),
        (dict(learning_rate=float("inf")), "learning_rate is a positive number"),
        (dict(label_smoothing=2), r"label_smoothing is a fraction in \[0, 1\)"),
        (dict(label_smoothing=-0.1), "label_smoothing is"),
        (dict(warmup=1.5), "warmup is a fraction"),
        (dict(warmup=-1), "warmup is a fraction"),
        (dict(weight_decay=-1), "weight_decay is a number that must not be negative"),
        (dict(layer_decay=0), "layer_decay is a factor"),
        (dict(layer_decay=1.5), "layer_decay is a factor"),
        (dict(seed=-1), "seed must be an integer of at least 0; received -1"),
    ],
    ids=str,
)
def test_an_impossible_argument_of_fit_is_refused_in_a_sentence(digits, wrong, words):
    model = create(depth=1)
    before = model.get_weights()
    with pytest.raises(ValueError, match=words) as error:
        run(model, digits, **wrong)
    assert "\n" not in str(error.value)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.once
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(labels=np.array([0, 99])), "labels are class numbers from 0 to 9, .* from 0 to 99"),
        (dict(labels=np.array([0, -1])), "from -1 to 0"),
        (dict(labels=np.array([0.0, 1.0])), "received float64"),
        (dict(labels=np.eye(2, dtype="int32")), r"of shape \(2, 2\)"),
        (dict(labels=np.array([1])), "each of the 2 pictures"),
    ],
    ids=str,
)
def test_labels_that_are_no_class_numbers_are_refused(digits, wrong, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(digits.train.take(2), **wrong)


@pytest.mark.once
@pytest.mark.parametrize("wrong", [dict(shift=-1), dict(zoom=1.0), dict(rotation=float("nan"))], ids=str)
def test_an_impossible_augmentation_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        data.Augmentation(**wrong)


@pytest.mark.once
@pytest.mark.parametrize("validation", [0, 1, -0.5, 2, float("nan"), "half"])
def test_an_impossible_fraction_to_hold_out_is_refused(validation, tmp_path):
    with pytest.raises(ValueError, match="validation is a fraction between 0 and 1"):
        data.load(tmp_path, create().preprocessing, validation=validation)


@pytest.mark.once
def test_held_out_pictures_of_other_classes_are_refused(digits):
    other = dataclasses.replace(digits.validation, class_names=tuple("abcdefghij"))
    with pytest.raises(ValueError, match="both need the same"):
        fit.fit(create(depth=1), digits.train, other, epochs=1)


def test_a_training_resumes_by_its_epochs_and_not_by_the_optimizers_steps(digits, tmp_path):
    """With a loss scale, which skips some; JAX has no half precision on a CPU, so there the steps are taken away."""
    dtype = "float32" if keras.backend.backend() == "jax" else "mixed_float16"
    path = tmp_path / "vit.checkpoint.keras"
    run(create(dtype=dtype, depth=1), digits, epochs=2, batch_size=20, checkpoint=path)
    with zipfile.ZipFile(path) as archive:
        record = archive.read("training.json")
    model = keras_vits.load(path)
    optimizer = model.optimizer
    if dtype == "mixed_float16":
        assert type(optimizer).__name__ == "LossScaleOptimizer"
        optimizer = optimizer.inner_optimizer
    for one in (optimizer, *optimizer.optimizers):
        one.iterations.assign(3)  # of 4
    model.save(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("training.json", record)
    found = run(create(dtype=dtype, depth=1), digits, epochs=3, batch_size=20, checkpoint=path, resume=True)
    assert found.epochs == 3 and len(found.history["loss"]) == 1


def other_pictures(given):
    train = dataclasses.replace(given.train, sources=np.flip(given.train.sources, 1).copy())
    return dataclasses.replace(given, train=train)


def other_labels(given):
    labels = given.train.labels.copy()
    labels[0] = (labels[0] + 1) % 10
    return dataclasses.replace(given, train=dataclasses.replace(given.train, labels=labels))


def fewer(given):
    return dataclasses.replace(given, train=given.train.take(30))


def other_held_out(given):
    return dataclasses.replace(given, validation=given.validation.take(20))


def other_mean(given):
    changed = dataclasses.replace(given.train.preprocessing, mean=(0.1, 0.2, 0.3))
    parts = {name: dataclasses.replace(getattr(given, name), preprocessing=changed) for name in ("train", "validation")}
    return dataclasses.replace(given, **parts)


@pytest.mark.once
def test_a_resumed_training_is_the_same_training(digits, tmp_path):
    path = tmp_path / "vit.checkpoint.keras"
    run(create(depth=1), digits, epochs=1, checkpoint=path)
    content = path.read_bytes()
    for change, options, words in [
        (None, dict(batch_size=20), r"another batch size \(10, now 20\)"),
        (None, dict(seed=1), r"another seed \(0, now 1\)"),
        (None, dict(augmentation=data.Augmentation(flip=True)), r"another flip \(False, now True\)"),
        (None, dict(layer_decay=0.5), r"another layer decay \(1\.0, now 0\.5\)"),
        (other_pictures, {}, "another set of training pictures:"),
        (other_labels, {}, "another set of training labels:"),
        (fewer, {}, r"another number of training pictures \(40, now 30\)"),
        (other_held_out, {}, r"another number of held-out pictures \(40, now 20\)"),
        (other_mean, {}, r"another mean \(0\.5x0\.5x0\.5, now 0\.1x0\.2x0\.3\)"),
        (other_mean, dict(batch_size=7), r"another batch size \(10, now 7\), another mean"),
    ]:
        changed = change(digits) if change else digits
        with pytest.raises(ValueError, match=words) as error:
            run(create(depth=1), changed, epochs=3, checkpoint=path, resume=True, **options)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert path.read_bytes() == content
    model = keras_vits.load(path)
    model.save(path)
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        run(create(depth=1), digits, epochs=3, checkpoint=path, resume=True)


@pytest.mark.once
def test_pictures_that_stay_in_their_files_have_a_fingerprint(tmp_path, monkeypatch):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / name / f"{i}.bmp")
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    load = lambda: data.load(tmp_path, create().preprocessing).train.fingerprint()
    before = load()
    assert before == load()
    (tmp_path / "a" / "1.bmp").rename(tmp_path / "a" / "9.bmp")
    assert before != load()


@pytest.mark.once
def test_pictures_that_were_replaced_by_others_of_equal_size_are_others(tmp_path, monkeypatch):
    """Those that stay in their files, of which as many as 256 are read for it."""
    from PIL import Image

    save = lambda i, value: Image.new("RGB", (16, 16), (value, 0, 0)).save(tmp_path / "ab"[i % 2] / f"{i:03}.bmp")
    for name in "ab":
        (tmp_path / name).mkdir()
    for i in range(60):
        save(i, i)
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    pictures = data.load(tmp_path, create().preprocessing).train
    before = pictures.fingerprint()
    size = pictures.sources[0].stat().st_size
    for i in range(60):
        save(i, 255 - i)
    assert pictures.sources[0].stat().st_size == size and before != pictures.fingerprint()
    for i in range(60):
        save(i, i)
    assert before == pictures.fingerprint()
    monkeypatch.setattr(data, "HASHED_FILES", 5)
    few, content = pictures.fingerprint(), pictures.sources[0].read_bytes()
    pictures.sources[0].write_bytes(content[:-1] + b"!")  # the first is always among them
    assert few != pictures.fingerprint() and len(pictures) > 5
    pictures.sources[0].write_bytes(content)
    read = []
    monkeypatch.setattr("builtins.open", lambda *a, _open=open, **k: read.append(a[0]) or _open(*a, **k))
    assert few == pictures.fingerprint() and len(read) == 5 == len(set(read))


@pytest.mark.once
def test_a_training_does_not_resume_on_replaced_pictures_of_equal_size(tmp_path, monkeypatch):
    from PIL import Image

    def write(value):
        for i in range(8):
            (tmp_path / "p" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (value + i, 0, 0)).save(tmp_path / "p" / "ab"[i % 2] / f"{i}.bmp")
        return data.load(tmp_path / "p", create(num_classes=2).preprocessing)

    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    path = tmp_path / "c.keras"
    run(create(num_classes=2, depth=1), write(0), epochs=1, checkpoint=path)
    with pytest.raises(ValueError, match="another set of training pictures"):
        run(create(num_classes=2, depth=1), write(100), epochs=2, checkpoint=path, resume=True)


class Stops(keras.callbacks.EarlyStopping):
    """Ends after the second epoch and puts back what the first one gave."""

    def __init__(self):
        super().__init__(monitor="val_loss", patience=0, restore_best_weights=True, mode="max", min_delta=1e9)


def test_the_result_of_a_stopped_training_is_of_the_model_that_is_returned(digits):
    model = create(depth=1)
    found = run(model, digits, epochs=12, learning_rate=1e-2, callbacks=[Stops()])
    assert found.epochs == len(found.history["loss"]) < 12
    answers = families.predict(model, digits.validation.images()).argmax(-1)
    assert found.top1 == pytest.approx((answers == digits.validation.labels).mean(), abs=1e-6)


# ---------------------------------------------------------------- optimizers


@pytest.mark.once
def test_parameter_groups_of_a_model_in_a_sequential_are_those_of_the_model():
    model = create()
    outer = keras.Sequential(
        [keras.Input((16, 16, 3)), keras.layers.Rescaling(2.0), model, keras.layers.Dense(3, name="last")]
    )
    inner = {path: group for group in parameter_groups(model, layer_decay=0.5) for path in group.paths}
    for group in parameter_groups(outer, layer_decay=0.5):
        for path in group.paths:
            expected = inner.get(path)
            assert (group.lr_scale, group.weight_decay) == (
                (expected.lr_scale, expected.weight_decay) if expected else (1.0, 0.05 if "kernel" in path else 0.0)
            )
    optimizer = adamw(parameter_groups(outer, layer_decay=0.5), 1e-3)
    outer.compile(optimizer, "mse")
    optimizer.build(outer.trainable_variables)
    assert sum(len(one._trainable_variables) for one in optimizer.optimizers) == len(outer.trainable_variables)


@pytest.mark.once
def test_parameter_groups_of_a_functional_model_and_of_two_models():
    image = keras.Input((16, 16, 3))
    outer = keras.Model(image, keras.layers.Dense(2)(create(num_classes=0)(image)))
    scales = {path: group.lr_scale for group in parameter_groups(outer, layer_decay=0.5) for path in group.paths}
    assert scales["stem/kernel"] == 0.5**3 and max(scales.values()) == 1
    with pytest.raises(ValueError, match="two variables called stem/kernel"):
        parameter_groups(two_in_one(None))


@pytest.mark.once
def test_two_models_of_one_variant_have_their_own_names():
    with pytest.raises(ValueError, match="unique"):
        image = keras.Input((16, 16, 3))
        keras.Model(image, keras.layers.Average()([create()(image), create()(image)]))
    assert [layer.name for layer in two_in_one(None).layers][1:3] == ["left", "right"]


@pytest.mark.once
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(pretrained="yes"), "pretrained is True or False"),
        (dict(weights="imagenet"), "weights='imagenet' names no checkpoint|published"),
        (dict(weights="/nowhere/at/all"), "No such file"),
    ],
    ids=str,
)
def test_weights_that_mean_no_checkpoint_are_answered(given, words):
    with pytest.raises(ValueError, match=words):
        keras_vits.create("vit_tiny_patch16_224", **given)
