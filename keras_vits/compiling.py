"""What `compile` makes of losses and metrics for a model whose outputs are logits, and what it takes by default.

Keras reads `"sparse_categorical_crossentropy"` as the loss of probabilities. On logits it fails to learn, and no error
says so. A loss or metric given by name is therefore taken in its form for logits here, and an object that its caller
configured stays as it is.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras

WITHOUT_LOGITS = (keras.losses.KLDivergence, keras.losses.Dice, keras.losses.Tversky, keras.metrics.KLDivergence)


class LogitsWarning(UserWarning):
    """A loss or metric takes the model's logits for probabilities."""


@keras.saving.register_keras_serializable("keras_vits")
def crossentropy_of_logits(labels: Any, logits: Any) -> Any:
    """Cross-entropy (B,) of logits (B,K): binary for K = 1, otherwise of class numbers (B,), (B,1) or shares (B,K)."""
    if logits.shape[-1] == 1:
        return keras.losses.binary_crossentropy(labels, logits, from_logits=True)
    if len(labels.shape) < len(logits.shape) or labels.shape[-1] == 1:
        return keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    return keras.losses.categorical_crossentropy(labels, logits, from_logits=True)


def default_loss(num_classes: int) -> keras.losses.Loss | None:
    """The loss that fits K logits and class numbers (B,) as labels; `None` for K = 0, which are features."""
    if num_classes > 1:
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return keras.losses.BinaryCrossentropy(from_logits=True) if num_classes else None


def loss_of_logits(loss: Any) -> Any:
    """A loss as `keras.Model.compile` takes it, or a list or dictionary of them, where names mean the form for logits.

    Warns with a `LogitsWarning`, once for all of them, of those that take probabilities.
    """
    return _converted(loss, lambda loss: _of_logits(loss, keras.losses, {}), keras.losses)


def metrics_of_logits(metrics: Any, num_classes: int) -> Any:
    """The same for metrics. A threshold is 0, the logit of the probability 0.5."""
    names = {}
    if num_classes == 1:  # for more, Keras chooses the one of the largest logit, by the labels' shape
        names = {name: keras.metrics.BinaryAccuracy for name in ("accuracy", "acc")}
    return _converted(metrics, lambda metric: _of_logits(metric, keras.metrics, names), keras.metrics)


def _converted(given: Any, convert: Callable[[Any], Any], module: Any) -> Any:
    """The same lists and dictionaries, with each loss or metric in them converted; one warning for all."""
    warned = []

    def visit(value: Any) -> Any:
        if isinstance(value, dict) and "class_name" not in value:  # with one it is an object's configuration
            return {key: visit(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(visit, value))
        converted = convert(value)
        if takes := _probabilities(converted, module):
            warned.append(takes)
        return converted

    result = visit(given)
    if warned:
        warnings.warn(
            f"The model's outputs are logits, and {', '.join(dict.fromkeys(warned))}.",
            LogitsWarning,
            stacklevel=_frames_to_caller(),
        )
    return result


def _of_logits(identifier: Any, module: Any, names: Mapping[str, Any]) -> Any:
    """A loss or metric, from its name, function or class in a module of Keras; an object stays."""
    if isinstance(identifier, dict):
        return module.deserialize(identifier)
    if module is keras.losses and isinstance(identifier, str) and identifier.lower() in ("crossentropy", "ce"):
        return crossentropy_of_logits
    cls = names.get(identifier) if isinstance(identifier, str) else None
    cls = cls or _class(identifier, module)
    if cls is None:
        if module is keras.metrics and _class(identifier, keras.losses):  # a loss that no class of metrics stands for
            loss = loss_of_logits(identifier)
            name = getattr(identifier, "__name__", identifier)
            return keras.metrics.MeanMetricWrapper(loss, name=name) if isinstance(loss, keras.losses.Loss) else loss
        return identifier
    parameters = inspect.signature(cls).parameters
    options: dict[str, Any] = {}
    if "from_logits" in parameters:
        options["from_logits"] = True
    elif "thresholds" in parameters and parameters["thresholds"].default is None:
        options["thresholds"] = 0.0  # None stands for 0.5
    elif "threshold" in parameters and parameters["threshold"].default == 0.5:
        options["threshold"] = 0.0
    if not options and not inspect.isclass(identifier):
        return identifier  # Keras knows what the name stands for
    if module is keras.metrics and isinstance(identifier, str):
        options["name"] = identifier  # in the logs, as Keras has it
    return cls(**options)


def _class(identifier: Any, module: Any) -> Any:
    """The class of a loss or metric that a name, a function or a class of Keras means; `None` for anything else."""
    classes = {name.lower(): cls for name, cls in vars(module).items() if inspect.isclass(cls)}
    if inspect.isclass(identifier):
        return identifier if identifier in classes.values() else None
    if isinstance(identifier, str):
        if identifier.lower() in classes:  # CamelCase
            return classes[identifier.lower()]
        try:
            identifier = module.get(identifier)
        except ValueError:
            return None  # compile says so
        if type(identifier) in classes.values():
            return type(identifier)
    name = getattr(identifier, "__name__", "")
    if not inspect.isfunction(identifier) or getattr(keras.losses, name, getattr(keras.metrics, name, None)) is not (
        identifier
    ):
        return None
    return classes.get(name.replace("_", ""))


def _probabilities(chosen: Any, module: Any) -> str:
    """What says that a loss or metric takes probabilities, and what to do; "" for one that takes logits."""
    cls = type(chosen) if isinstance(chosen, keras.losses.Loss | keras.metrics.Metric) else _class(chosen, module)
    if cls in WITHOUT_LOGITS:
        return f"{cls.__name__} takes probabilities and has no form for logits: take a cross-entropy"
    # the metric AUC keeps it under another name
    if getattr(chosen, "from_logits", getattr(chosen, "_from_logits", None)) is False:
        return f"{cls.__name__} takes probabilities: give it from_logits=True"
    return ""


def _frames_to_caller() -> int:
    """Number of frames from the one that asks to the first outside this package and Keras: the caller of `compile`."""
    frame, count = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("keras_vits", "keras"):
        frame, count = frame.f_back, count + 1
    return count
