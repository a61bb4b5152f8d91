"""Expressions with a variable, a tensor or an array to the left of the image: each backend has a way of its own."""

import keras
import numpy as np
from keras import layers, ops


def image(dtype="float32", size=8):
    return keras.Input((size, size, 3), dtype=dtype, name="image")


class Left(layers.Layer):
    """A function of a weight's variable, its tensor, the same in numpy, and the image."""

    def __init__(self, function):
        super().__init__(name="left")
        self.function = function

    def build(self, shape):
        self.gain = self.add_weight(shape=(3,), initializer=keras.initializers.Constant(0.5), name="gain")

    def call(self, x):
        return self.function(self.gain, ops.exp(self.gain), np.float32([1, 2, 3]), x)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, "float32")


LEFT = {
    "tensor * x": lambda v, t, n, x: t * x,
    "tensor + x": lambda v, t, n, x: t + x,
    "tensor - x": lambda v, t, n, x: t - x,
    "tensor / x": lambda v, t, n, x: t / (x + 1),
    "tensor // x": lambda v, t, n, x: t // (x + 1),
    "tensor % x": lambda v, t, n, x: t % (x + 1),
    "tensor ** x": lambda v, t, n, x: t**x,
    "tensor @ x": lambda v, t, n, x: ops.reshape(t, (1, 3)) @ ops.transpose(x, (0, 1, 3, 2)),
    "tensor > x": lambda v, t, n, x: ops.cast(t > 2 * x, "float32"),
    "tensor <= x": lambda v, t, n, x: ops.cast(t <= 2 * x, "float32"),
    "x == tensor": lambda v, t, n, x: ops.cast(x == t, "float32"),
    "x == number": lambda v, t, n, x: ops.where(ops.round(x) == 1, x, -x),
    "tensor == x": lambda v, t, n, x: ops.where(t == ops.round(x) * t, x, -x),
    "tensor != x": lambda v, t, n, x: ops.cast(t != x, "float32"),
    "scalar of a tensor": lambda v, t, n, x: t[0] * x,
    "one minus variable": lambda v, t, n, x: (1 - v) * x,
    "variable * x": lambda v, t, n, x: v * x,
    "variable - x": lambda v, t, n, x: v - x,
    "variable > x": lambda v, t, n, x: ops.cast(v > x, "float32"),
    "minus a variable": lambda v, t, n, x: -v * ops.relu(-x),
    "numpy * x": lambda v, t, n, x: n * x,
    "numpy - x": lambda v, t, n, x: n - x,
    "numpy / x": lambda v, t, n, x: n / (x + 1),
    "numpy > x": lambda v, t, n, x: ops.cast(n > 2 * x, "float32"),
    "numpy's number": lambda v, t, n, x: np.float32(2.5) * x,
    "maximum of a tensor": lambda v, t, n, x: ops.maximum(t, x),
    "where of a tensor": lambda v, t, n, x: ops.where(t > 1, x, t),
}


def left(name):
    keras.utils.clear_session()
    x = image()
    return keras.Model(x, Left(LEFT[name])(x))
