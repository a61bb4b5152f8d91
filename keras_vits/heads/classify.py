"""Classification: logits of K classes, or the pooled features of a model without a head."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras

from keras_vits import compiling
from keras_vits.layers import _names as names
from keras_vits.specs import OutputSpec, classification


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Features (B,D) -> logits (B,K), in float32 under every dtype policy.

    Attributes:
        num_classes: K, at least 1; a single class is a yes or no.
        layer: (K, name=, dtype=) -> the layer from the features to the logits: one dense layer by default.
    """

    num_classes: int
    layer: Callable[..., keras.Layer] = keras.layers.Dense

    def __call__(self, features: keras.KerasTensor) -> keras.KerasTensor:
        """The logits (B,K)."""
        return self.layer(self.num_classes, dtype="float32", name=names.HEAD)(features)

    def specs(self, shapes: tuple[int, ...], class_names: tuple[str, ...]) -> tuple[OutputSpec, ...]:
        """Logits, or a binary logit of a single class."""
        return (classification("logits", self.num_classes, class_names, shapes),)

    def loss(self) -> keras.losses.Loss:
        """Cross-entropy from logits: sparse of several classes, binary of one."""
        return compiling.default_loss(self.num_classes)

    def metrics(self) -> list[str]:
        """The accuracy."""
        return ["accuracy"]

    def fitting_loss(self, loss: Any) -> Any:
        """See `compiling.loss_of_logits`."""
        return compiling.loss_of_logits(loss)

    def fitting_metrics(self, metrics: Any) -> Any:
        """See `compiling.metrics_of_logits`."""
        return compiling.metrics_of_logits(metrics, self.num_classes)


@dataclasses.dataclass(frozen=True)
class PooledFeatures:
    """Features (B,D) as they are: the output of a model without a head, which no loss fits by itself.

    Attributes:
        layer: () -> a layer that makes one vector of several, where a backbone's features are (B,n,D).
    """

    layer: Callable[[], keras.Layer] | None = None

    def __call__(self, features: keras.KerasTensor) -> keras.KerasTensor:
        """The features (B,D)."""
        return self.layer()(features) if self.layer else features

    def specs(self, shapes: tuple[int, ...], class_names: tuple[str, ...]) -> tuple[OutputSpec, ...]:
        """One output of the kind `"features"`."""
        return (OutputSpec(name="features", kind="features", shape=shapes),)

    def loss(self) -> None:
        """None."""
        return None

    def metrics(self) -> list[Any]:
        """None."""
        return []

    def fitting_loss(self, loss: Any) -> Any:
        """The loss as it is."""
        return loss

    def fitting_metrics(self, metrics: Any) -> Any:
        """The metrics as they are."""
        return metrics
