"""One way to train a classifier: AdamW, warm-up and cosine decay, label smoothing, a checkpoint after every epoch."""

import contextlib
import dataclasses
import math
import os
import pathlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_vits import saving
from keras_vits._util.files import sweep, writing
from keras_vits._util.keras_private import save_model
from keras_vits._util.limits import number, whole
from keras_vits.models._base import VisionModel
from keras_vits.training._record import Record, read_record, record_of, write_record
from keras_vits.training.data import Augmentation, Batches, Pictures
from keras_vits.training.groups import adamw, parameter_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """The result of a training.

    Attributes:
        epochs: how many were run, earlier runs included. A callback that puts back the weights of an earlier epoch does
            not change it.
        top1: fraction of the held-out pictures that the model classifies right, with the weights that it has now.
        history: metric name -> one value per epoch of this run.
        seconds: wall-clock time of this run.
    """

    epochs: int
    top1: float
    history: dict[str, list[float]]
    seconds: float


def fit(
    model: VisionModel,
    train: Pictures,
    validation: Pictures,
    *,
    epochs: int = 30,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    warmup: float = 0.1,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    label_smoothing: float = 0.1,
    augmentation: Augmentation | None = None,
    checkpoint: str | pathlib.Path | None = None,
    resume: bool = False,
    seed: int = 0,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> Fit:
    """Trains a model in place with `model.fit`, and names its classes.

    Args:
        model: a `VisionModel` for the pictures' size and number of classes.
        train: the `Pictures` to fit on.
        validation: the held-out `Pictures`, of the same classes and preprocessing.
        epochs: passes over `train`, counted from the very first run.
        batch_size: pictures in a step.
        learning_rate: peak learning rate of AdamW, reached after the warm-up; it then falls to 0 along a cosine.
        warmup: fraction of all steps in which the learning rate grows from 0.
        weight_decay: weight decay of AdamW, on kernels only.
        layer_decay: ratio of a layer's learning rate to the next layer's, see `parameter_groups`; about 0.75 for
            fine-tuning.
        label_smoothing: how much of a label's probability is spread over all classes.
        augmentation: an `Augmentation`; the light default of that class when `None`.
        checkpoint: a `.keras` file that holds model and optimizer after each epoch, or `None`. It is written whole or
            not at all, so an interrupt (Ctrl-C) leaves the last finished epoch's.
        resume: whether to continue from `checkpoint`, with the same pictures, batch size and seed as before; `epochs`
            and the learning rate may be others. If all epochs were run already, the model is only evaluated.
        seed: seed of the order of the pictures and of the augmentation.
        callbacks: further Keras callbacks.

    Returns:
        A `Fit`.

    Raises:
        ValueError: an impossible argument; the model does not fit the pictures or has nothing that trains; nothing to
            resume from, or what was trained differently; or the loss is no longer a number.
    """
    epochs, batch_size, seed = whole("epochs", epochs), whole("batch_size", batch_size), whole("seed", seed, 0, 2**63)
    learning_rate = number("learning_rate", learning_rate, 0, math.inf, "a positive number", open_low=True)
    warmup = number("warmup", warmup, 0, 1, "a fraction of all steps in [0, 1)")
    label_smoothing = number("label_smoothing", label_smoothing, 0, 1, "a fraction in [0, 1)")
    _check(model, train)
    _check_held_out(train, validation)
    steps = math.ceil(len(train) / batch_size)
    groups = parameter_groups(model, layer_decay=layer_decay, weight_decay=weight_decay)
    model.preprocessing, model.class_names = train.preprocessing, train.class_names
    model.compile(
        optimizer=adamw(groups, learning_rate, schedule=_schedule(steps * epochs, warmup), clipnorm=1.0),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=label_smoothing),
        metrics=[keras.metrics.CategoricalAccuracy(name="top1")],
    )
    model.optimizer.build(model.trainable_variables)
    augmentation = augmentation or Augmentation()
    settings = dict(batch_size=batch_size, seed=seed, layer_decay=float(layer_decay), weight_decay=float(weight_decay))
    record = None
    if checkpoint is not None or resume:
        record = record_of(train, validation, settings={**settings, **dataclasses.asdict(augmentation)})
    if checkpoint is not None and pathlib.Path(checkpoint).parent.is_dir():
        sweep(pathlib.Path(checkpoint).parent)  # a run that goes on may have nothing to write
    done = _resume(model, checkpoint, record) if resume else 0
    batches = Batches(train, batch_size, augmentation=augmentation, shuffle=True, seed=seed, epoch=done)
    held_out = Batches(validation, batch_size)
    started = time.perf_counter()
    with contextlib.closing(_bar(model, (epochs - done) * steps)) as bar:
        history = model.fit(
            batches,
            epochs=epochs,
            initial_epoch=done,
            validation_data=held_out,
            callbacks=[_AfterEpoch(checkpoint, record, bar), *callbacks],
            shuffle=False,
            verbose=0,
        ).history
    run = len(history.get("loss", ()))
    if run and all(isinstance(callback, Say) for callback in callbacks):
        top1 = history["val_top1"][-1]
    else:  # another callback may have changed the weights after the last epoch
        top1 = model.evaluate(held_out, verbose=0, return_dict=True)["top1"]
    return Fit(epochs=done + run, top1=top1, history=history, seconds=time.perf_counter() - started)


def set_seed(seed: int) -> None:
    """Seeds the weights of the models that are built next. Keras draws every layer's seed from Python's generator;
    `keras.utils.set_random_seed` would import TensorFlow for it wherever it is installed."""
    random.seed(seed)


def checkpoint_path(folder: str | os.PathLike[str], name: str) -> pathlib.Path:
    """Where the command line keeps the last epoch of a training."""
    return pathlib.Path(folder) / f"{name}.checkpoint.keras"


class Say(keras.callbacks.Callback):
    """Calls `say` with one line of text after each of the `epochs` epochs."""

    def __init__(self, say: Callable[[str], object], epochs: int) -> None:
        super().__init__()
        self.say, self.epochs = say, epochs

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.say(
            f"  epoch {epoch + 1:2}/{self.epochs}  loss {logs['loss']:.3f}  "
            f"top-1 {logs['val_top1']:.1%} of the held-out pictures"
        )


def _schedule(steps: int, warmup: float) -> Callable[[float], Any]:
    """Peak learning rate -> schedule: a linear warm-up, then a cosine down to 0."""
    warm = round(warmup * steps)
    return lambda peak: keras.optimizers.schedules.CosineDecay(0.0, steps - warm, warmup_target=peak, warmup_steps=warm)


def _check_held_out(train: Pictures, validation: Pictures) -> None:
    for name, pictures in (("train", train), ("validation", validation)):
        if not len(pictures):
            raise ValueError(f"{name} holds no pictures: give at least one.")
    if train.class_names != validation.class_names:
        raise ValueError(
            f"train has the classes {', '.join(train.class_names[:9])} and validation "
            f"{', '.join(validation.class_names[:9])}: both need the same, in one order."
        )
    if train.preprocessing != validation.preprocessing:
        raise ValueError("train and validation have another preprocessing: read both with model.preprocessing.")


def _check(model: Any, train: Pictures) -> None:
    size, channels = model.input_shape[1:3], model.input_shape[3]
    if len(train.preprocessing.mean) != channels:
        raise ValueError(
            f"The pictures have {len(train.preprocessing.mean)} channels and {model.name} takes {channels}: "
            f"create it with in_channels={len(train.preprocessing.mean)}."
        )
    if tuple(train.preprocessing.image_size) != size:
        raise ValueError(
            f"The pictures are read at {train.preprocessing.image_size} pixels and {model.name} takes {size}: "
            "load them with model.preprocessing."
        )
    if model.cfg.num_classes != len(train.class_names):
        raise ValueError(
            f"The pictures have {len(train.class_names)} classes and {model.name} has {model.cfg.num_classes}: "
            f"create it with num_classes={len(train.class_names)}."
        )


def _resume(model: Any, checkpoint: str | pathlib.Path | None, record: Record | None) -> int:
    """Puts weights and optimizer of the checkpoint into the compiled model; returns the number of finished epochs."""
    if checkpoint is None or not pathlib.Path(checkpoint).is_file():
        raise ValueError(f"There is no checkpoint to resume from; received {checkpoint}. Train without resume first.")
    saved = saving.load(checkpoint)
    if type(saved) is not type(model) or saved.cfg != model.cfg or saved.class_names != model.class_names:
        raise ValueError(
            f"{checkpoint} holds another model than {model.name}, other hyper-parameters or other classes: resume with "
            "what the training was started with, or train without resume."
        )
    if [v.path for v in saved.trainable_variables] != [v.path for v in model.trainable_variables]:
        raise ValueError(
            f"{checkpoint} has other frozen layers than {model.name}, or held LoRA adapters, which cannot resume: "
            "freeze the layers that were frozen when the training was started, or train without resume."
        )
    if getattr(saved, "optimizer", None) is None:
        raise ValueError(f"{checkpoint} has no optimizer state: resume from a checkpoint that a training wrote.")
    started = read_record(checkpoint)
    if differences := started.differences(record):
        raise ValueError(
            f"{checkpoint} was trained with another {', another '.join(differences)}: resume with what the training "
            "was started with, or train without resume."
        )
    ours, theirs = _state(model), _state(saved)
    if [tuple(v.shape) for v in ours] != [tuple(v.shape) for v in theirs]:
        raise ValueError(
            f"{checkpoint} has another optimizer, or was trained in another precision than {model.name}: create the "
            "model with the dtype that it had, or train without resume."
        )
    for variable, value in zip(ours, theirs, strict=True):
        variable.assign(value)
    return started.epochs


def _state(model: Any) -> list[Any]:
    return [*model.variables, *model.optimizer.variables]


def _bar(model: Any, steps: int) -> Any:
    from keras_vits._util.progress import progress

    return progress(range(steps), f"Training {model.name}", steps)


class _AfterEpoch(keras.callbacks.Callback):
    """Moves the bar at each step; after each epoch, stops at a loss that is not finite, saves model and optimizer."""

    def __init__(self, checkpoint: str | pathlib.Path | None, record: Record | None, bar: Any) -> None:
        super().__init__()
        self.checkpoint, self.record, self.bar = checkpoint, record, bar

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        next(self.bar)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if not math.isfinite(logs["loss"]):
            kept = f" {self.checkpoint} keeps the epoch before." if self.checkpoint and epoch else ""
            raise ValueError(f"The loss became {logs['loss']} in epoch {epoch + 1}: try a lower learning rate.{kept}")
        if self.checkpoint:
            with writing(self.checkpoint) as temporary:
                save_model(self.model, temporary)
                write_record(temporary, self.record, epochs=epoch + 1)
