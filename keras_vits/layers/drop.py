"""Stochastic depth."""

from typing import Any

from keras import layers

from keras_vits.layers.base import Shape


class DropPath(layers.Dropout):
    """(B, ...) -> (B, ...): drops a residual branch for a whole sample in training. Stochastic depth, arXiv 1603.09382.

    Args:
        rate: probability that a sample loses the branch; survivors are scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float, **kwargs: Any) -> None:
        super().__init__(rate, **kwargs)

    def build(self, shape: Shape) -> None:
        self.noise_shape = (None, *(1 for _ in shape[1:]))

    def get_config(self) -> dict[str, Any]:
        return {"rate": self.rate, "name": self.name, "dtype": self.dtype_policy.name, "trainable": self.trainable}


def drop_path_rates(last: float, depth: int) -> list[float]:
    """`depth` probabilities growing linearly from 0 to `last`."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]
