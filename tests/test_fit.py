"""`model.fit` learns from every kind of data set, in float32 and mixed precision, on the current backend."""

import families
import keras
import numpy as np
import pytest

CLASSES = 5


def examples(model, count=40):
    """Images whose mean colour tells their class: (images (count,H,W,C), labels (count,))."""
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, count).astype("int32")
    colours = random.normal(0, 2, (CLASSES, model.input_shape[-1]))
    images = colours[labels][:, None, None] + random.normal(0, 0.3, (count, *model.input_shape[1:]))
    return images.astype("float32"), labels


class Sequence(keras.utils.PyDataset):
    """Batches of 8."""

    def __init__(self, images, labels):
        super().__init__()
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images) // 8

    def __getitem__(self, i):
        return self.images[8 * i : 8 * i + 8], self.labels[8 * i : 8 * i + 8]


def as_arrays(images, labels):
    return dict(x=images, y=labels, batch_size=8)


def as_tf_data(images, labels):
    tf = pytest.importorskip("tensorflow")
    return dict(x=tf.data.Dataset.from_tensor_slices((images, labels)).batch(8))


def as_data_loader(images, labels):
    torch = pytest.importorskip("torch")
    pairs = torch.utils.data.TensorDataset(torch.from_numpy(images), torch.from_numpy(labels).long())
    return dict(x=torch.utils.data.DataLoader(pairs, batch_size=8, shuffle=True))


def as_pydataset(images, labels):
    return dict(x=Sequence(images, labels))


class UntilLearned(keras.callbacks.Callback):
    """Ends the training as soon as the loss of an epoch is under 0.7 of the first epoch's."""

    def on_train_begin(self, logs=None):
        self.losses = []

    def on_epoch_end(self, epoch, logs):
        self.losses.append(logs["loss"])
        self.model.stop_training = not np.isfinite(logs["loss"]) or self.learned

    @property
    def learned(self):
        return self.losses[-1] < 0.7 * self.losses[0]


def learns(model, data, optimizer):
    # TensorFlow traces the first step twice when it makes variables: the metric and the optimizer have theirs before.
    metrics = [keras.metrics.SparseCategoricalAccuracy()]
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=metrics)
    optimizer.build(model.trainable_variables)
    until = UntilLearned()
    model.fit(**data, epochs=30, verbose=0, callbacks=[until])
    assert until.learned, until.losses


DATA = {f.__name__: f for f in (as_arrays, as_tf_data, as_data_loader, as_pydataset)}


@pytest.mark.parametrize("name", families.once_but(DATA, "as_tf_data", "as_data_loader", "as_pydataset"))
def test_every_data_set(name):
    model = families.FAMILIES[0].create()
    learns(model, DATA[name](*examples(model)), keras.optimizers.AdamW(3e-3))


# Those on every backend and ViT, which test_finetune.py trains in mixed precision, have all kinds of layers; XLA takes
# up to a quarter of a minute for each of the others, too.
@pytest.mark.parametrize("family", families.everywhere("mobilevit_v2", "efficientvit"))
def test_every_family(family):
    model = family.create(dtype="mixed_bfloat16", drop_path=0.1)
    before = {v.path: keras.ops.convert_to_numpy(v) for v in model.trainable_weights}
    learns(model, as_arrays(*examples(model)), keras.optimizers.SGD(0.02, 0.9))  # AdamW takes TensorFlow twice as long
    still = [v.path for v in model.trainable_weights if np.array_equal(before[v.path], keras.ops.convert_to_numpy(v))]
    assert not still, "these weights did not train"
