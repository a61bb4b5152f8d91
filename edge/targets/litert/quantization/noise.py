"""The noise that rounding adds to a layer's outputs, predicted from what was seen of the layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ....quantize import numerics as q
from ....quantize.recipes import Operation
from ..flatbuffer import File, Layer
from .observe import Activation


def layer_noise(file: File, layer: Layer, seen: Mapping[int, Activation]) -> float:
    """Mean square that 8 bits add to a layer's outputs, summed over them."""
    inputs, outputs = (np.ones(seen[tensor].rows.shape[1], np.float32) for tensor in (layer.x, layer.y))
    return input_noise(file, layer, seen, inputs) + q.output_noise(seen[layer.y].rows, outputs)


def input_noise(file: File, layer: Layer, seen: Mapping[int, Activation], scale: np.ndarray) -> float:
    """The part of it that inputs and weights make when the inputs are divided by scale (I)."""
    if file.is_grouped(layer):
        return 0.0
    # A depthwise convolution's weights take the scale up exactly: each channel of them has a scale of its own.
    bits = None if layer.kind is Operation.DEPTHWISE else layer.bits
    return q.input_noise(seen[layer.x].rows, file.by_input(layer), scale, bits, layer.dynamic)
