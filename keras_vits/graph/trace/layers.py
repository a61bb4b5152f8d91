"""Layers whose own call does not go through keras.ops."""

from typing import Any

import keras
import numpy as np

from ._tracer import Tracer, translates_layer


@translates_layer("Rescaling")
def rescaling(t: Tracer, layer: keras.layers.Rescaling, x: Any, **_: Any) -> Any:
    scaled = t.build("mul", t.floats(x), t.value(np.asarray(layer.scale, np.float32)))
    return t.wrap(t.build("add", scaled, t.value(np.asarray(layer.offset, np.float32))))
