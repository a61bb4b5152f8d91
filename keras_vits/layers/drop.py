"""Stochastic depth."""

from keras import layers


class DropPath(layers.Dropout):
    """(B, ...) -> (B, ...): drops a residual branch for a whole sample in training. Stochastic depth, arXiv 1603.09382.

    Args:
        rate: probability that a sample loses the branch; survivors are scaled by 1 / (1 - rate).
    """

    def __init__(self, rate, **kwargs):
        super().__init__(rate, **kwargs)

    def build(self, shape):
        self.noise_shape = (None, *(1 for _ in shape[1:]))

    def get_config(self):
        return {"rate": self.rate, "name": self.name, "dtype": self.dtype_policy.name, "trainable": self.trainable}


def drop_path_rates(last, depth):
    """`depth` probabilities growing linearly from 0 to `last`."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]
