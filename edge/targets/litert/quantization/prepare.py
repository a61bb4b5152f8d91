"""A float file and its calibration images, ready to be quantized in more than one way: the steps in their order."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Literal, get_args

import numpy as np

from ....quantize import numerics as q
from ....quantize.recipes import Recipe
from ..flatbuffer import ARRANGING, File, Layer, Operator
from ..runtime import of_bytes, outputs
from . import WORTH
from .ai_edge import entry, written
from .attention import attention_operators
from .observe import Activation, observe
from .plan import plan
from .ranges import Ranges, activation_ranges, of_limits, set_wide, silu_operators, widen
from .smooth import smooth
from .weights import finish_weights

Step = Literal["smooth", "range", "round", "correct"]
STEPS: tuple[Step, ...] = get_args(Step)
COMPARED = 32  # batches, at most, on which the ways to choose ranges are compared
READING = (*ARRANGING, "SPACE_TO_DEPTH", "PAD", "REVERSE_V2")  # between pixels and the first layer


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the calibration images decide about a file's activations, by the names of tensors.

    Attributes:
        recipe: name of the static recipe.
        ranges: tensor -> (low, high) that its 8 or 16 bits stand for.
        wide: outputs of layers whose activations have 16 bits.
        operators: outputs of the other operators that compute in integers: of attention, and of SiLU.
        mean: of pixels 0 to 1, for each channel (C): what the model is given as 0.
    """

    recipe: str
    ranges: dict[str, tuple[float, float]]
    wide: tuple[str, ...]
    operators: tuple[str, ...]
    mean: tuple[float, ...]

    def applied(self, file: File, layers: Sequence[Layer]) -> tuple[Ranges, list[Operator]]:
        """(ranges, operators) of `Preparation._activations` for a file; sets the layers whose activations have 16 bits.

        A file that takes pixels has the mean in the bias of its first layer: there it is put as the rounded weights see
        it, as in the model.

        Raises:
            ValueError: the file has a layer that is not among them.
        """
        ranges = {name: of_limits(*limits) for name, limits in self.ranges.items()}
        for layer in layers:
            if layer.activation_bits and not {file.name(layer.x), file.name(layer.y)} <= self.ranges.keys():
                raise ValueError(
                    f"Layer {layer.name!r} was not there when ranges were chosen for this file: it was exported in "
                    "another form than the model was fine-tuned in. Pass calibration images."
                )
            if layer.output in self.wide:
                set_wide(layer)
            source = file.maker(file.source(layer.x, READING)[0])
            if source is not None and file.builtin(source) == "DEQUANTIZE":
                ranges[file.name(layer.x)] = of_limits(0, 1)
                weight = file.get(layer.weight)
                lost = weight - q.round_weight(weight, q.weight_scale(weight, layer.bits), layer.bits)
                error = lost.reshape(len(weight), -1, len(self.mean)).sum(1) @ np.float32(self.mean)
                file.add_bias(layer, error)
        return ranges, [op for op in file.main.operators if file.name(op.outputs[0]) in self.operators]


class Preparation:
    """A float file and what it computes on the calibration images, ready to be quantized in more than one way.

    Args:
        content: bytes of the float file.
        recipe: how it is quantized.
        images: batches as the file takes them, an array for each input, or `None` without calibration.
        float_layers: names of layers, or of what they lie in (`"block_3"`), that stay in float.
        steps: which of `STEPS` are done: smoothing, a choice of ranges, rounding of weights, correction of biases.
        choice: a `Choice` that was made before, to be followed instead of `images`.

    Attributes:
        content: bytes of the float file, after smoothing.
        seen: tensor -> `Activation`, of that file; {} without calibration.

    Raises:
        ValueError: a float layer that the file does not have.
    """

    def __init__(
        self,
        content: bytes,
        recipe: Recipe,
        images: Sequence[Sequence[np.ndarray]] | None,
        float_layers: Sequence[str] = (),
        steps: Collection[Step] = STEPS,
        choice: Choice | None = None,
    ) -> None:
        self.content, self.recipe, self.seen = content, recipe, {}
        self.float_layers, self.steps, self.choice = tuple(float_layers), steps, choice
        self.images = images if recipe.is_integer else None
        file = File(content)
        layers = plan(file, recipe, self.float_layers)
        if self.images is None:
            return
        self.seen = self._observed(file, layers)
        if "smooth" in steps and smooth(file, layers, self.seen):
            added = len(file.main.operators) - len(File(content).main.operators)
            forms = [(content, self.seen), (bytes(file.bytes()), self._observed(file, layers))]
            errors = []
            for self.content, self.seen in forms:
                errors.append(self._error(self.quantized(method="minmax")))
            self.content, self.seen = forms[errors[1] < (WORTH if added else 1.0) * errors[0]]

    def layers(self) -> list[str]:
        """Names of the layers that are quantized, in the order of the file, each once."""
        return list(dict.fromkeys(layer.name for layer in plan(File(self.content), self.recipe, self.float_layers)))

    def quantized(self, only: str | None = None, method: q.Method | None = None) -> bytes:
        """Bytes of the quantized file.

        Args:
            only: the one layer to quantize; all of them by default.
            method: of `numerics.Histogram.range`; by default, for a static recipe, the one with which the file changes
                its outputs on the calibration images least, if that is by far: other images have other values.
        """
        if method is None and self.images is not None and self.recipe.needs_calibration and "range" in self.steps:
            contents = [self.quantized(only, method) for method in q.METHODS]  # of all values first
            errors = [self._error(content) for content in contents]
            best = int(np.argmin(errors))
            return contents[best if errors[best] < WORTH * errors[0] else 0]
        file = File(self.content)
        layers = [g for g in plan(file, self.recipe, self.float_layers) if only in (None, g.name)]
        if self.images is None and self.choice is None:
            return written(self.content, [entry(file, layer.settings, layer.operator) for layer in layers])
        if self.choice is not None:
            ranges, operators = self.choice.applied(file, layers)
        else:
            ranges, operators = self._activations(file, layers, method or "minmax")
            keys = {file.source(attention.k)[0] for attention in file.attentions()}  # a bias of theirs changes nothing
            for layer in layers:
                steps = [step for step in self.steps if step != "correct" or layer.y not in keys]
                finish_weights(file, layer, self.seen[layer.x], ranges, steps)
        entries = [entry(file, layer.settings, layer.operator) for layer in layers]
        if operators:  # which stand between layers of 8 bits
            eight = next(layer.settings for layer in layers if layer.activation_bits == 8)
            entries += [entry(file, eight, operator) for operator in operators]
        return written(bytes(file.bytes()), entries, ranges)

    def chosen(self, method: q.Method, mean: Sequence[float]) -> Choice:
        """The `Choice` of a static recipe with this method of `numerics.Histogram.range`, for pixels of a mean."""
        file = File(self.content)
        layers = plan(file, self.recipe, self.float_layers)
        ranges, operators = self._activations(file, layers, method)
        return Choice(
            recipe=self.recipe.name,
            ranges={name: (limits.low.item(), limits.high.item()) for name, limits in ranges.items()},
            wide=tuple(layer.output for layer in layers if layer.activation_bits == 16),
            operators=tuple(file.name(op.outputs[0]) for op in operators),
            mean=tuple(mean),
        )

    def _observed(self, file: File, layers: Sequence[Layer]) -> dict[int, Activation]:
        return observe(file, layers, self.images or (), file.attentions() if self.recipe.attention else ())

    def _activations(self, file: File, layers: Sequence[Layer], method: q.Method) -> tuple[Ranges, list[Operator]]:
        """(name of a tensor -> its range, operators beside the layers that compute in integers)."""
        if self.recipe.wide_below_db is not None:
            widen(file, layers, self.seen, self.recipe.wide_below_db)
        ranges = activation_ranges(file, layers, self.seen, method)
        operators = silu_operators(file, layers, self.seen, ranges)
        if self.recipe.attention:
            operators += attention_operators(file, layers, self.seen, ranges, method)
        return ranges, operators

    def _error(self, content: bytes) -> float:
        """What a quantized file changes of the outputs for the calibration images: squared, over theirs squared, summed
        over the outputs, whose units differ."""
        found = outputs(of_bytes(content), (self.images or ())[:COMPARED])
        pairs = zip(found, self._expected, strict=True)
        return sum(float(np.square(y - x).sum()) / max(float(np.square(x).sum()), 1e-30) for y, x in pairs)

    @functools.cached_property
    def _expected(self) -> list[np.ndarray]:
        """The float file's outputs for these images, which smoothing does not change."""
        return outputs(of_bytes(self.content), (self.images or ())[:COMPARED])
