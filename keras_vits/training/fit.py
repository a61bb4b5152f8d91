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
from keras_vits.models._base import VisionModel
from keras_vits.training.data import Augmentation, Batches, Pictures
from keras_vits.training.groups import adamw, parameter_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """The result of a training.

    Attributes:
        epochs: how many the model has seen, earlier runs included.
        top1: fraction of the held-out pictures that are classified right after the last epoch.
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
        validation: the held-out `Pictures`.
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
        resume: whether to continue from `checkpoint`, with the same pictures and batch size. If that has seen all
            epochs already, the model is only evaluated.
        seed: seed of the order of the pictures and of the augmentation.
        callbacks: further Keras callbacks.

    Returns:
        A `Fit`.

    Raises:
        ValueError: the model does not fit the pictures or has nothing that trains; nothing to resume from; or the loss
            is no longer a number.
    """
    _check(model, train)
    steps = math.ceil(len(train) / batch_size)
    groups = parameter_groups(model, layer_decay=layer_decay, weight_decay=weight_decay)
    model.preprocessing, model.class_names = train.preprocessing, train.class_names
    model.compile(
        optimizer=adamw(groups, learning_rate, schedule=_schedule(steps * epochs, warmup), clipnorm=1.0),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=label_smoothing),
        metrics=[keras.metrics.CategoricalAccuracy(name="top1")],
    )
    model.optimizer.build(model.trainable_variables)
    done = _resume(model, checkpoint, steps) if resume else 0
    batches = Batches(
        train, batch_size, augmentation=augmentation or Augmentation(), shuffle=True, seed=seed, epoch=done
    )
    held_out = Batches(validation, batch_size)
    started = time.perf_counter()
    with contextlib.closing(_bar(model, (epochs - done) * steps)) as bar:
        history = model.fit(
            batches,
            epochs=epochs,
            initial_epoch=done,
            validation_data=held_out,
            callbacks=[_AfterEpoch(checkpoint, bar), *callbacks],
            shuffle=False,
            verbose=0,
        ).history
    top1 = history["val_top1"][-1] if history else model.evaluate(held_out, verbose=0, return_dict=True)["top1"]
    return Fit(epochs=max(done, epochs), top1=top1, history=history, seconds=time.perf_counter() - started)


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


def _resume(model: Any, checkpoint: str | pathlib.Path | None, steps: int) -> int:
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
    done, rest = divmod(int(keras.ops.convert_to_numpy(saved.optimizer.iterations)), steps)
    if rest:
        raise ValueError(
            f"{checkpoint} was trained with another number of pictures or batch size: it does not end at an epoch of "
            f"{steps} steps. Resume with the batch size and the data that it was started with."
        )
    for ours, theirs in zip(_state(model), _state(saved), strict=True):
        ours.assign(theirs)
    return done


def _state(model: Any) -> list[Any]:
    return [*model.variables, *model.optimizer.variables]


def _bar(model: Any, steps: int) -> Any:
    from keras_vits._util.progress import progress

    return progress(range(steps), f"Training {model.name}", steps)


class _AfterEpoch(keras.callbacks.Callback):
    """Moves the bar at each step; after each epoch, stops at a loss that is not finite, saves model and optimizer."""

    def __init__(self, checkpoint: str | pathlib.Path | None, bar: Any) -> None:
        super().__init__()
        self.checkpoint, self.bar = checkpoint, bar

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        next(self.bar)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        from keras_vits._util.files import writing

        if not math.isfinite(logs["loss"]):
            kept = f" {self.checkpoint} keeps the epoch before." if self.checkpoint and epoch else ""
            raise ValueError(f"The loss became {logs['loss']} in epoch {epoch + 1}: try a lower learning rate.{kept}")
        if self.checkpoint:
            with writing(self.checkpoint) as temporary:
                self.model.save(temporary)
