"""Heads: what makes a task's output of a backbone's features, and says what that output is.

A family gives features (`VisionModel.backbone`), and a head the outputs, their specs, and the loss and metrics that fit
them. Whoever compiles, predicts, exports or verifies asks the head, so that a new kind of output is one class here.
"""

from typing import Any, Protocol, runtime_checkable

import keras

from keras_vits.heads.classify import Classifier, PooledFeatures
from keras_vits.specs import OutputSpec

__all__ = ["Classifier", "Head", "PooledFeatures"]


@runtime_checkable
class Head(Protocol):
    """What a model needs to know of its head. Several outputs are a dictionary, whose keys name them.

    The kinds of outputs are `keras_vits.specs.KINDS`: boxes and masks are among them.
    """

    def __call__(self, features: keras.KerasTensor) -> Any:
        """The model's symbolic output, or a dictionary of them, from a backbone's features."""
        ...

    def specs(self, shapes: Any, class_names: tuple[str, ...]) -> tuple[OutputSpec, ...]:
        """An `OutputSpec` for each output, from the output's shape, or the dictionary of them, with a batch of 1."""
        ...

    def loss(self) -> Any:
        """The loss that fits the outputs, as `keras.Model.compile` takes it; `None` for outputs without one."""
        ...

    def metrics(self) -> list[Any]:
        """Metrics that fit the outputs and that loss."""
        ...

    def fitting_loss(self, loss: Any) -> Any:
        """A loss that a user gave, in the form that fits the outputs."""
        ...

    def fitting_metrics(self, metrics: Any) -> Any:
        """Metrics that a user gave, in the form that fits the outputs."""
        ...
