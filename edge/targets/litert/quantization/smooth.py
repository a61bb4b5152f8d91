"""Outlier channels of activations go into the weights, which is exact in float: SmoothQuant, arXiv 2211.10438."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ....quantize import numerics as q
from ..flatbuffer import File, Layer
from . import ENOUGH_DB, WORTH
from .noise import input_noise
from .observe import Activation


def smooth(file: File, layers: Sequence[Layer], seen: Mapping[int, Activation]) -> bool:
    """Moves outlier channels of inputs and outputs into the weights where it helps.

    Args:
        file: the float file, which is changed.
        layers: of `plan`.
        seen: tensor -> `Activation`.

    Returns:
        Whether anything was moved.
    """
    changed = False
    groups: dict[int, list[Layer]] = {}  # input tensor -> the layers that read it
    for layer in layers:
        if layer.activation_bits == 8 or layer.dynamic:
            groups.setdefault(layer.x, []).append(layer)
    rounding = {}  # output of a layer -> noise that its own 8 bits make there; what its inputs and weights make
    for layer in layers:
        ones = [np.ones(seen[tensor].rows.shape[1], np.float32) for tensor in (layer.x, layer.y)]
        own = q.output_noise(seen[layer.y].rows, ones[1]) if layer.activation_bits == 8 else 0.0
        rounding[layer.y] = own, input_noise(file, layer, seen, ones[0])
    for tensor, group in groups.items():
        if any(file.is_grouped(layer) or file.is_shared(layer) for layer in group):
            continue
        rows, weights = seen[tensor].rows, [file.by_input(layer) for layer in group]
        outputs = sum(rounding[layer.y][0] for layer in group)

        def noise(scale: np.ndarray, group: list[Layer] = group, outputs: float = outputs) -> float:
            return outputs + sum(input_noise(file, layer, seen, scale) for layer in group)

        largest = np.max([np.abs(w).reshape(-1, w.shape[-1]).max(0) for w in weights], axis=0)
        signal = sum(seen[layer.y].signal for layer in group)
        scale = _best(noise, q.input_scales(rows, largest), signal)
        if scale is None:
            continue
        changed = True
        for layer in group:
            rounding[layer.y] = rounding[layer.y][0], input_noise(file, layer, seen, scale)
        if (source := _source(file, tensor, group)) is not None:
            file.scale_outputs(source, 1 / scale)
        else:
            file.multiply(tensor, 1 / scale, [layer.operator for layer in group])
        for layer in group:
            weight = file.get(layer.weight)
            file.set(layer.weight, weight * np.repeat(scale, weight.shape[-1] // len(scale)))
    for layer in layers:
        if layer.activation_bits != 8 or layer.y in groups or file.is_output(layer.y) or not file.scales(layer):
            continue
        rows, inputs = seen[layer.y].rows, rounding[layer.y][1]
        own = lambda scale, rows=rows, inputs=inputs: inputs + q.output_noise(rows, scale)
        scale = _best(own, q.output_scales(rows), seen[layer.y].signal)
        if scale is not None:
            changed = True
            file.scale_outputs(layer, 1 / scale)
            file.multiply(layer.y, scale, file.readers(layer.y))
    return changed


def _best(noise: Callable[[np.ndarray], float], candidates: Sequence[np.ndarray], signal: float) -> np.ndarray | None:
    """The candidate that leaves the least noise; `None` if leaving all as it is is good enough, or comes near.

    Args:
        noise: scale -> mean square of all noise in the outputs of layers.
        candidates: scales.
        signal: mean square of these outputs.
    """
    found = [noise(scale) for scale in candidates]
    best, before = int(np.argmin(found)), noise(np.ones_like(candidates[0]))
    good = signal > 10 ** (ENOUGH_DB / 10) * before
    return None if good or found[best] > WORTH * before else candidates[best]


def _source(file: File, tensor: int, group: Sequence[Layer]) -> Layer | None:
    """The layer that computes a tensor which the group alone reads, and that can be scaled in its stead, or `None`."""
    source = next((layer for layer in file.layers() if layer.y == tensor), None)
    if source is None or file.is_output(tensor) or len(file.readers(tensor)) != len(group) or not file.scales(source):
        return None
    return source
