"""What the bits of activations stand for, which layers get more of them, and where SiLU is computed in integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from keras_vits.graph.ops import sigmoid

from ....quantize import numerics as q
from ....quantize.recipes import WIDE
from .. import xnnpack
from ..flatbuffer import File, Layer, Operator
from .noise import layer_noise
from .observe import Activation

GATED = 1.25  # noise that sigmoid in 8 bits may make of that of the rounding before and after x * sigmoid(x)


@dataclasses.dataclass(frozen=True, eq=False)
class Range:
    """(low, high) that a tensor's integers stand for: float32 (1,1), or (O,1,...) of a weight."""

    low: np.ndarray
    high: np.ndarray

    @property
    def width(self) -> np.ndarray:
        return self.high - self.low

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """x in the 256 values of this range."""
        return q.fake_quantize(x, self.low, self.high)

    def widened(self, product: np.ndarray) -> Range:
        """Of a product's outputs, wide enough for XNNPACK.

        Args:
            product: 255 times the scale of the input times that of the weight.
        """
        wider = np.maximum(1, product / (self.width + 1e-9) / xnnpack.RESCALED)
        return Range(self.low * wider, self.high * wider)

    def around_zero(self) -> Range:
        """In which zero is the integer zero, as XNNPACK wants it of the second operand of a product."""
        step = max(float(-self.low.min()), float(self.high.max())) / 127
        return of_limits(-128 * step, 127 * step)


Ranges = dict[str, Range]  # by the names of tensors


def of_limits(low: float, high: float) -> Range:
    """A `Range` of a whole tensor."""
    return Range(np.float32([[low]]), np.float32([[high]]))


def activation_ranges(file: File, layers: Sequence[Layer], seen: Mapping[int, Activation], method: q.Method) -> Ranges:
    """Ranges of the inputs and outputs of layers whose activations have fixed ones.

    Args:
        file: the float file.
        layers: of `plan`.
        seen: tensor -> `Activation`.
        method: to choose the range of 8 bits by; 16 bits hold all values.
    """
    ranges: Ranges = {}
    for layer in layers:
        for tensor in (layer.x, layer.y) if layer.activation_bits else ():
            limits = seen[tensor].histogram.range(method if layer.activation_bits == 8 else "minmax")
            ranges.setdefault(file.name(tensor), of_limits(*limits))
    for layer in layers:
        if layer.activation_bits == 8:
            x, y = file.name(layer.x), file.name(layer.y)
            ranges[y] = ranges[y].widened(np.abs(file.get(layer.weight)).max() / 127 * ranges[x].width)
    return ranges


def widen(file: File, layers: Sequence[Layer], seen: Mapping[int, Activation], below_db: float) -> None:
    """16 bits for the activations of layers whose outputs would have less signal over the noise of 8 bits, and of those
    that read what attention gives: tokens are alike there, and so would be their errors."""
    for layer in layers:
        if layer.activation_bits == 8:
            much = layer_noise(file, layer, seen) * 10 ** (below_db / 10) > seen[layer.y].signal
            if much or layer.attended:
                set_wide(layer)


def set_wide(layer: Layer) -> None:
    """Gives a layer's activations 16 bits."""
    layer.config = dataclasses.replace(layer.settings, activations=WIDE)


def silu_operators(
    file: File, layers: Sequence[Layer], seen: Mapping[int, Activation], ranges: Ranges
) -> list[Operator]:
    """Those of x * sigmoid(x), and of a PAD, between two layers of 8-bit activations: they round its ends anyway.

    Where that adds much to the noise of the ends, none: sigmoid has steps of 1 / 256 and ends at 255 / 256. `ranges`
    gets those of the tensors in between.
    """

    def noise(layer: Layer, end: int, integers: bool) -> float:
        y = seen[layer.y].rows
        x = ranges[file.name(layer.y)].rounded(y)
        gate = np.minimum(np.round(256 * sigmoid(x)), 255) / 256 if integers else sigmoid(x)
        return np.square(ranges[file.name(end)].rounded(x * gate) - y * sigmoid(y)).mean()

    eight = [layer for layer in layers if layer.activation_bits == 8]
    rounded, operators = {layer.x for layer in eight}, []
    for layer in eight:
        readers = sorted(file.readers(layer.y), key=file.builtin)
        if [file.builtin(op) for op in readers] != ["LOGISTIC", "MUL"] or file.is_output(layer.y):
            continue
        gate, product = (int(op.outputs[0]) for op in readers)
        end, after = product, file.readers(product)
        if [file.builtin(op) for op in after] == ["PAD"]:
            readers, end = [*readers, *after], int(after[0].outputs[0])
        ends = all(any(op is g.operator for g in eight) for op in file.readers(end)) and not file.is_output(end)
        silu = set(readers[1].inputs) == {layer.y, gate} and len(file.readers(gate)) == 1
        if end in rounded and ends and silu and noise(layer, end, True) < GATED * noise(layer, end, False):
            ranges[file.name(gate)] = of_limits(0, 1)
            ranges[file.name(product)] = ranges[file.name(end)]
            operators += readers
    return operators
