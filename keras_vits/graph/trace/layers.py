"""Layers that are not traced through their own call: it does not go through keras.ops, or has five dimensions."""

import math
from typing import Any

import keras
import numpy as np

from ._tracer import Tracer, translates_layer


@translates_layer("Rescaling")
def rescaling(t: Tracer, layer: keras.layers.Rescaling, x: Any, **_: Any) -> Any:
    scaled = t.build("mul", t.floats(x), t.value(np.asarray(layer.scale, np.float32)))
    return t.wrap(t.build("add", scaled, t.value(np.asarray(layer.offset, np.float32))))


@translates_layer("GroupNormalization")
def group_normalization(t: Tracer, layer: keras.layers.GroupNormalization, x: Any, **_: Any) -> Any:
    """The norm of (B,...,C) over (B,places,groups,C/groups), its gains and offsets over (B,...,C)."""
    value = t.floats(x)
    shape = value.shape
    if layer.axis % len(shape) != len(shape) - 1:
        return layer.call(x)
    (batch, *places, c), groups = shape, layer.groups
    grouped = t.reshape(value, (batch, math.prod(places), groups, c // groups))
    y = t.build("layer_norm", grouped, None, None, axes=(1, 3), epsilon=float(layer.epsilon))
    y = t.reshape(y, shape)
    y = t.build("mul", y, t.floats(layer.gamma)) if layer.scale else y
    return t.wrap(t.build("add", y, t.floats(layer.beta)) if layer.center else y)
