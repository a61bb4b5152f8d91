"""Normalisation and gains of channels."""

from typing import Any

from keras import initializers, ops

from keras_vits.layers.base import SameShape, Shape


class GroupNorm(SameShape):
    """(B,H,W,C) -> (B,H,W,C): zero mean and unit variance of each group of channels, then an affine map.

    Group normalisation (arXiv 1803.08494), equation 7, in tensors of at most 4 dimensions: those of
    `keras.layers.GroupNormalization` have 5, which no phone's GPU takes. One group is a layer normalisation over all of
    the map.

    Args:
        groups: number of groups; must divide C.
        epsilon: added to the variance.
    """

    def __init__(self, groups: int = 32, epsilon: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.groups, self.epsilon = groups, epsilon

    def build(self, shape: Shape) -> None:
        if shape[-1] % self.groups:
            raise ValueError(f"groups must divide the channels; received groups={self.groups}, channels={shape[-1]}.")
        self.gamma = self.add_weight(shape=shape[-1:], initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=shape[-1:], initializer="zeros", name="beta")

    def call(self, x: Any) -> Any:
        return self.normalized(x) * self.gamma + self.beta

    def normalized(self, x: Any) -> Any:
        """Zero mean and unit variance of each group."""
        if self.groups == 1:
            return ops.layer_normalization(x, axis=[1, 2, 3], epsilon=self.epsilon)
        height, width, channels = x.shape[1:]
        y = ops.reshape(ops.cast(x, "float32"), (-1, height * width, self.groups, channels // self.groups))
        y = y - ops.mean(y, axis=(1, 3), keepdims=True)
        y = y * ops.rsqrt(ops.mean(ops.square(y), axis=(1, 3), keepdims=True) + self.epsilon)
        return ops.cast(ops.reshape(y, (-1, height, width, channels)), x.dtype)


class LayerScale(SameShape):
    """(..., D) -> (..., D): a learned gain of each channel. CaiT (arXiv 2103.17239), equation 8.

    Args:
        initial: what the gains begin with.
    """

    def __init__(self, initial: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.initial = initial

    def build(self, shape: Shape) -> None:
        self.scale = self.add_weight(shape=shape[-1:], initializer=initializers.Constant(self.initial), name="scale")

    def call(self, x: Any) -> Any:
        return x * self.scale
