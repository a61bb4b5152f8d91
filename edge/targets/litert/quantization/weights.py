"""GPTQ rounding of weights, which minimises the layer's output error, and biases that compensate its mean."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ....quantize import numerics as q
from ....quantize.recipes import Operation
from ..flatbuffer import File, Layer
from .observe import Activation
from .plan import is_rounded
from .ranges import Range, Ranges


def finish_weights(file: File, layer: Layer, x: Activation, ranges: Ranges, steps: Collection[str]) -> None:
    """Rounds weights by GPTQ, or else subtracts from the bias what rounding adds to the mean output.

    The mean: bias correction, arXiv 1906.04721.

    Args:
        file: the float file, which is changed.
        layer: of it.
        x: its inputs.
        ranges: of activations; gets that of weights which are rounded here.
        steps: `"round"` and `"correct"`, or one of them, or none.
    """
    depthwise, weight = layer.kind is Operation.DEPTHWISE, file.get(layer.weight)
    weight = np.moveaxis(weight, -1, 0) if depthwise else weight  # (O,...,I), or (O,1,height,width)
    if "round" in steps and x.hessian is not None and is_rounded(file, layer):
        flat, scale = q.gptq(weight.reshape(len(weight), -1), *x.compensation, layer.bits)
        rounded, scale = flat.reshape(weight.shape), scale.reshape(-1, *[1] * (weight.ndim - 1))
        most = scale * (2 ** (layer.bits - 1) - 1)
        ranges[file.name(layer.weight)] = Range(-most, most)
        file.set(layer.weight, rounded)
        if layer.bits == 8:
            return  # its mean output is nearly right already, and more would be right on these images alone
    else:
        rounded = q.round_weight(weight, q.weight_scale(weight, layer.bits), layer.bits)
    if "correct" not in steps or file.is_grouped(layer):
        return
    shift = np.zeros_like(x.mean)  # of the inputs' mean, by their own quantization
    if layer.activation_bits == 8:
        shift = (x.rows - ranges[file.name(layer.x)].rounded(x.rows)).mean(0)
    if depthwise:
        sums = [w.reshape(len(w), -1).sum(1) for w in (weight - rounded, rounded)]
        repeat = len(weight) // len(x.mean)
        error = sums[0] * np.repeat(x.mean, repeat) + sums[1] * np.repeat(shift, repeat)
    else:
        sums = [w.sum(tuple(range(1, w.ndim - 1))) for w in (weight - rounded, rounded)]
        error = sums[0] @ x.mean + sums[1] @ shift
    file.add_bias(layer, error)
