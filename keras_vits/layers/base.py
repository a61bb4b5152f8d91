"""The base of layers that keep their input's shape."""

from typing import Any

from keras import layers

Shape = tuple[int | Any, ...]  # a batch of any size is None; no layer computes with it, so no type checker asks


class SameShape(layers.Layer):
    """A layer whose output has its input's shape.

    Saying so spares Keras from running the layer once, symbolically, to find out: a model is created many times faster.
    """

    def compute_output_shape(self, shape: Shape) -> Shape:
        return shape
