"""The fit loop: it learns, keeps what it learned, and goes on from there as if nothing had happened."""

import keras
import numpy as np
import pytest

import keras_vits
from keras_vits.edge import keras_file
from keras_vits.training import data, fit

TINY = dict(image_size=16, patch_size=4, width=24, depth=1, heads=2, mlp_hidden=48, num_classes=10)


def create(seed=0, **overrides):
    fit.set_seed(seed)
    return keras_vits.create("vit_tiny_patch16_224", **{**TINY, **overrides})


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", create().preprocessing, limit=160)


def test_a_seed_gives_the_same_weights():
    for a, b in zip(create(3).get_weights(), create(3).get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(create(3).get_weights(), create(4).get_weights(), strict=True))


class Interrupt(keras.callbacks.Callback):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch, self.now = epoch, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.now, batch) == (self.epoch, 1):
            raise KeyboardInterrupt


@pytest.mark.once  # every backend learns in test_fit.py and test_compile.py
def test_it_learns(digits):
    model = create()
    said = []
    found = fit.fit(
        model,
        digits.train,
        digits.validation,
        epochs=25,
        batch_size=16,
        learning_rate=3e-3,
        augmentation=data.Augmentation(shift=0, rotation=0, zoom=0),
        callbacks=[fit.Say(said.append, 25)],
    )
    assert found.epochs == len(said) == len(found.history["loss"]) == 25
    assert found.history["top1"][0] < 0.4 and found.history["top1"][-1] > 0.8
    assert found.top1 > 0.3  # eight standard deviations above chance
    answers = model.predict(digits.validation.images(), verbose=0).argmax(-1)
    assert found.top1 == pytest.approx((answers == digits.validation.labels).mean(), abs=1e-6)
    assert model.class_names == list("0123456789") and model.preprocessing == digits.train.preprocessing


def test_resumed_training_ends_where_an_uninterrupted_one_does(digits, tmp_path):
    checkpoint = tmp_path / "vit.checkpoint.keras"
    run = dict(epochs=4, batch_size=40, checkpoint=checkpoint)
    whole = create()
    expected = fit.fit(whole, digits.train, digits.validation, **run)
    checkpoint.unlink()

    with pytest.raises(KeyboardInterrupt):
        fit.fit(create(), digits.train, digits.validation, callbacks=[Interrupt(2)], **run)
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.name]
    kept = keras_vits.load(checkpoint)
    assert int(keras.ops.convert_to_numpy(kept.optimizer.iterations)) == 2 * 4

    resumed = create(seed=1)  # its own weights do not matter
    found = fit.fit(resumed, digits.train, digits.validation, resume=True, **run)
    assert found.epochs == 4 and len(found.history["loss"]) == 2
    np.testing.assert_allclose(found.history["loss"], expected.history["loss"][2:], rtol=1e-4)
    for ours, theirs in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)

    again = fit.fit(create(seed=1), digits.train, digits.validation, resume=True, **run)  # nothing is left to do
    assert again.epochs == 4 and again.history == {} and again.top1 == pytest.approx(found.top1, abs=1e-6)


@pytest.mark.once  # what becomes of files
def test_a_failed_save_leaves_the_old_checkpoint(digits, tmp_path, monkeypatch):
    checkpoint = tmp_path / "vit.checkpoint.keras"
    run = dict(epochs=2, batch_size=80, checkpoint=checkpoint)
    save, calls = fit.save_model, []

    def full_disk(model, path):
        calls.append(path)
        save(model, path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(fit, "save_model", full_disk)
    with pytest.raises(ValueError, match="No space left on device"):
        fit.fit(create(), digits.train, digits.validation, **run)
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.name]
    assert int(keras.ops.convert_to_numpy(keras_vits.load(checkpoint).optimizer.iterations)) == 2


def test_weight_decay_spares_biases_norms_and_embeddings(digits):
    model = create()
    fit.fit(model, digits.train, digits.validation, epochs=1, batch_size=160)
    decaying = [v for o in model.optimizer.optimizers if o.weight_decay for v in o._trainable_variables]
    decayed = {variable.path.rsplit("/", 1)[-1] for variable in decaying}
    assert decayed == {"kernel"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (dict(num_classes=7), "10 classes and vit_tiny_patch16_224 has 7"),
        (dict(in_channels=4), "3 channels and vit_tiny_patch16_224 takes 4"),
        (dict(image_size=32), "load them with model.preprocessing"),
    ],
)
def test_pictures_that_do_not_fit_the_model(digits, overrides, words):
    with pytest.raises(ValueError, match=words):
        fit.fit(create(**overrides), digits.train, digits.validation)


@pytest.mark.once  # files and numbers are compared, no arrays of a backend
def test_impossible_resumes(digits, tmp_path):
    train, validation, path = digits.train, digits.validation, tmp_path / "vit.checkpoint.keras"
    run = dict(epochs=2, checkpoint=path, resume=True)
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        fit.fit(create(), train, validation, **run)
    fit.fit(create(), train, validation, epochs=1, batch_size=50, checkpoint=path)
    with pytest.raises(ValueError, match=r"another batch size \(50, now 32\)"):
        fit.fit(create(), train, validation, batch_size=32, **run)
    with pytest.raises(ValueError, match="holds another model"):
        fit.fit(create(depth=2), train, validation, batch_size=50, **run)
    with pytest.raises(ValueError, match="has no optimizer state"):
        trained = keras_file.export(keras_vits.load(path), tmp_path).path
        fit.fit(create(), train, validation, batch_size=50, **{**run, "checkpoint": trained})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="truncated or not a"):
        fit.fit(create(), train, validation, batch_size=50, **run)


def test_a_loss_that_is_no_number_stops(digits, tmp_path):
    run = dict(epochs=2, learning_rate=1e30, checkpoint=tmp_path / "vit.keras")
    with pytest.raises(ValueError, match="try a lower learning rate"):
        fit.fit(create(), digits.train, digits.validation, **run)
    assert not list(tmp_path.iterdir())


def test_a_keras_file_is_an_artifact(tmp_path):
    from keras_vits.edge import artifact, verify

    model = create()
    model.class_names = list("abcdefghij")
    written = keras_file.export(model, tmp_path)
    assert written == artifact.load(written.path) and written.path == tmp_path / "vit_tiny_patch16_224.keras"
    assert getattr(keras_vits.load(written.path), "optimizer", None) is None
    images = np.random.default_rng(0).normal(size=(5, 16, 16, 3)).astype("float32")
    check = verify(written, against=model, images=images, labels=np.arange(5))
    assert check.top1_agreement == 1 and check.max_abs_error < 1e-5 and check.partitions is None


@pytest.mark.parametrize("make", ["missing", "text", "truncated", "foreign"])
def test_files_that_are_no_keras_file_of_ours(tmp_path, make):
    path = tmp_path / "model.keras"
    if make == "text":
        path.write_text("no zip file")
    elif make == "truncated":
        path.write_bytes(keras_file.export(create(), tmp_path).path.read_bytes()[:5000])
    elif make == "foreign":
        keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(path)
    with pytest.raises(ValueError, match=r"No such file|truncated|not a model of keras_vits") as error:
        keras_vits.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
