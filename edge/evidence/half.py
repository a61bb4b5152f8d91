"""A file in half precision, as phones' GPUs compute it: operation by operation, and what each loses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from keras_vits._util.progress import progress

from ..artifact import Artifact
from ..records import HalfCheck, HalfStep, sqnr_db
from ..targets import _protocol as targets
from ..targets._batches import join, split
from ..targets._steps import Step, half

Accumulator = Literal["float32", "float16"]
SUSPECTS = 10  # operations that lose most, whose effect on the outputs is measured
ACCUMULATORS: tuple[Accumulator, ...] = get_args(Accumulator)


class HalfRunner:
    """Runs a file operation by operation, in float32 and in half precision side by side.

    Inputs, weights and every result are rounded to half precision; what is integer in the file stays so. Numbers from
    65520 on become infinite, those below 3e-8 become 0.

    Args:
        artifact: of a format that can be taken apart: LiteRT or ONNX.
        accumulator: `"float32"`, or `"float16"` where sums (dense layers, convolutions, products of matrices, means,
            poolings) are rounded after every four terms, too, as the fastest mode of mobile GPUs does.

    Raises:
        ValueError: another format or accumulator.
    """

    def __init__(self, artifact: Artifact, accumulator: Accumulator = "float32") -> None:
        taken_apart = targets.target(artifact.format).traits.steps
        if taken_apart is None:
            can = [name for name in targets.names() if targets.target(name).traits.steps]
            raise ValueError(
                f"{artifact.path.name} cannot be run operation by operation: precision='float16' is for files of "
                f"{' and '.join(can)}."
            )
        if accumulator not in ACCUMULATORS:
            raise ValueError(f"accumulator must be 'float32' or 'float16'; received {accumulator!r}.")
        self.artifact, self.accumulator = artifact, accumulator
        self.file = taken_apart(artifact)
        last = {name: i for i, step in enumerate(self.file.steps) for name in step.inputs}
        self.done = [[n for n in step.inputs if last[n] == i and n not in self.file.constants and n not in
                      self.file.outputs] for i, step in enumerate(self.file.steps)]  # fmt: skip
        self.exact = {name for step in self.file.steps if step.exact for name in step.outputs}
        self.rounded = {name: half(array) for name, array in self.file.constants.items()}
        self.sums = [_Sums() for _ in self.file.steps]
        self.first: list[np.ndarray] = []  # arrays of the first batch

    def predict(
        self, inputs: np.ndarray | Mapping[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(outputs in half precision, outputs in float32) by name, for any number N of examples; see `Runner.predict`.
        Adds to what `check` tells."""
        name = self.artifact.path.name
        count, batches = split(inputs, self.artifact.inputs, self.file.dtypes, self.file.batch, name)
        found: tuple[list[list[np.ndarray]], list[list[np.ndarray]]] = ([], [])
        self.first = self.first or batches[0]
        for arrays in progress(batches, f"Running {name} in half precision", len(batches)):
            for results, made in zip(found, self._run(arrays), strict=True):
                results.append(made)
        names = self.artifact.output_names
        halves, singles = (join(names, count, self.file.batch, results) for results in found)
        by_name = lambda y: y if isinstance(y, dict) else {names[0]: y}
        return by_name(halves), by_name(singles)

    def check(self) -> HalfCheck:
        """What each operation lost, over all examples so far, and what those that lost most cost the outputs."""
        counted = [i for i, sums in enumerate(self.sums) if sums.results]
        readers: dict[str, list[int]] = {}
        for i, step in enumerate(self.file.steps):
            for name in step.inputs:
                readers.setdefault(name, []).append(i)

        def suspicion(i: int) -> float:
            """Decibels: what it loses itself; if additions alone read it, its error against the size of their sums."""
            of = [r for name in self.file.steps[i].outputs for r in readers.get(name, ())]
            sums, last = self.sums[i], not of or any(name in self.file.outputs for name in self.file.steps[i].outputs)
            if not sums.counts["results"]:
                return math.inf
            if last or not all(self.file.steps[r].adds and self.sums[r].results for r in of):
                return sums.own_db
            return sqnr_db(min(self.sums[r].mean_square for r in of), sums.own / sums.counts["results"])

        effects = self._effects(sorted(counted, key=suspicion)[:SUSPECTS])
        return HalfCheck(
            accumulator=self.accumulator,
            steps=tuple(self.sums[i].step(self.file.steps[i], effects.get(i)) for i in counted),
        )

    def _effects(self, suspects: Sequence[int]) -> dict[int, float]:
        """Number of an operation -> decibels of the outputs for the first batch, if it alone is in half precision."""
        if not suspects:
            return {}
        steps, values, before = self.file.steps, self._given(self.first), {}
        for i, step in enumerate(steps):
            if i in suspects:
                before[i] = dict(values)
            self._put(values, i, step.run([values[name] for name in step.inputs]))
        expected, effects = [values[name] for name in self.file.outputs], {}
        while before:
            which, values = before.popitem()
            for i, step in enumerate(steps[which:], which):
                inputs = [values[name] for name in step.inputs]
                self._put(values, i, self._half(step, self._halved(step, inputs)) if i == which else step.run(inputs))
            effects[which] = _worst_db(expected, [values[name] for name in self.file.outputs])
        return effects

    def _run(self, arrays: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        single = self._given(arrays)
        halves = {**self.rounded, **{name: half(a) for name, a in zip(self.file.inputs, arrays, strict=True)}}
        for i, (step, sums) in enumerate(zip(self.file.steps, self.sums, strict=True)):
            inputs = [single[name] for name in step.inputs]
            exact = step.run(inputs)
            halved = self._halved(step, inputs)
            own = self._half(step, halved)
            whole = self._half(step, [halves[name] for name in step.inputs])
            fits = all(np.isfinite(y).all() for x, y in zip(inputs, halved, strict=True) if np.isfinite(x).all())
            for y, alone, after in zip(exact, own, whole, strict=True):
                sums.add(y, alone, after, fits)
            self._put(single, i, exact)
            self._put(halves, i, whole)
        outputs = self.file.outputs
        return [halves[name] for name in outputs], [single[name] for name in outputs]

    def _given(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Name -> what is known before the first operation."""
        return {**self.file.constants, **dict(zip(self.file.inputs, arrays, strict=True))}

    def _put(self, values: dict[str, np.ndarray], i: int, made: Sequence[np.ndarray]) -> None:
        """Enters what operation i has made, and drops what no later one reads."""
        values.update(zip(self.file.steps[i].outputs, made, strict=True))
        for name in self.done[i]:
            values.pop(name, None)

    def _halved(self, step: Step, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """An operation's inputs in half precision, but for what belongs to the arithmetic of integers."""
        return [x if name in self.exact else half(x) for name, x in zip(step.inputs, inputs, strict=True)]

    def _half(self, step: Step, inputs: list[np.ndarray]) -> list[np.ndarray]:
        with np.errstate(all="ignore"):
            if step.exact:
                return step.run(inputs)
            summed = step.summed(inputs) if step.summed and self.accumulator == "float16" else None
            return [half(y) for y in summed or step.run(inputs)]


class _Sums:
    """Of one operation, over all examples; `own`, `fitting` and the counts over those with inputs in half precision's
    range."""

    def __init__(self) -> None:
        self.results = 0
        self.counts: Counter[str] = Counter()
        self.largest = self.signal = self.fitting = self.own = self.whole = 0.0

    def add(self, exact: np.ndarray, own: np.ndarray, whole: np.ndarray, fits: bool) -> None:
        """`fits`: whether the inputs are in half precision's range; where not, what made them has overflowed."""
        if exact.dtype.kind != "f":
            return
        self.results += exact.size
        finite = np.isfinite(exact)
        y = exact[finite].astype(np.float64)
        signal = float(np.square(y).sum())
        self.largest = max(self.largest, float(np.abs(y).max(initial=0)))
        self.signal += signal
        self.whole += _noise(y, whole[finite])
        if fits:
            lost, gone = finite & ~np.isfinite(own), (exact != 0) & (own == 0)
            self.counts.update(results=exact.size, overflowing=int(lost.sum()), vanishing=int(gone.sum()))
            self.fitting += signal
            self.own += _noise(y, own[finite])

    @property
    def mean_square(self) -> float:
        return self.signal / max(1, self.results)

    @property
    def own_db(self) -> float:
        return sqnr_db(self.fitting, self.own) if self.counts["results"] else math.nan

    def step(self, step: Step, output_db: float | None) -> HalfStep:
        count = max(1, self.counts["results"])
        return HalfStep(
            layer=step.name,
            operation=step.operation,
            largest=self.largest,
            overflowing=self.counts["overflowing"] / count,
            vanishing=self.counts["vanishing"] / count,
            own_db=self.own_db,
            sqnr_db=sqnr_db(self.signal, self.whole),
            output_db=output_db,
        )


def _noise(exact: np.ndarray, found: np.ndarray) -> float:
    """Sum of the squares of what differs; infinite where that is no number."""
    with np.errstate(all="ignore"):
        noise = float(np.square(found.astype(np.float64) - exact).sum())
    return noise if math.isfinite(noise) else math.inf


def _worst_db(expected: list[np.ndarray], found: list[np.ndarray]) -> float:
    """The least signal-to-noise ratio of the outputs."""
    signals = (float(np.square(y, dtype=np.float64).sum()) for y in expected)
    return min(sqnr_db(signal, _noise(y, x)) for signal, y, x in zip(signals, expected, found, strict=True))
