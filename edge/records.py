"""What is measured of an artifact: records, and what goes wrong on a device."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .artifact import Artifact

ROUNDS = 5  # turns, from which on their ratios have percentiles


class DeviceError(ValueError):
    """A device that is not there, or went away.

    Attributes:
        results: the `Latency` records that were complete by then.
    """

    def __init__(self, message: str, results: Sequence[Latency] = ()):
        super().__init__(message)
        self.results: tuple[Latency, ...] = tuple(results)


class DeviceWarning(UserWarning):
    """One way of running an artifact failed on a device that goes on with the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """How fast an artifact runs: from images (B,H,W,C) in memory to outputs, where B is the file's batch, usually 1.

    What a device cannot tell is `None`.

    Attributes:
        artifact_path: path of the file that was measured.
        device: one of `devices.DEVICES`, with its address: `"host"`, `"android:R58M123"`.
        cpu: the processor's or the chip's name.
        runtime: name and version of what ran the file.
        accelerator: what ran it: `"cpu"`, or another of the device's `ACCELERATORS`.
        threads: number of threads that the runtime was allowed; `None` where it decides for itself.
        runs: number of runs that were timed.
        median_ms: median time of one run.
        p10_ms: one of ten runs is faster; with `p90_ms`, the spread of the runs.
        p90_ms: nine of ten runs are faster.
        p99_ms: 99 of 100 runs are faster.
        load_ms: from the file to a model that is ready for its first image, the runtime being imported already.
        peak_memory_bytes: largest resident memory of the process that did nothing but run this artifact.
        baseline_memory_bytes: the part of it that was there before the file was loaded: Python and the runtime.
        round_ms: the mean of every turn, in the order of the turns; see `ratio`.
        started: date and time in UTC, the same for all artifacts of one `benchmark` call.
        environment: what else is known of the device, such as its operating system and temperature.
    """

    artifact_path: pathlib.Path
    device: str
    cpu: str
    runtime: str
    accelerator: str = "cpu"
    threads: int | None
    runs: int
    median_ms: float
    p10_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    load_ms: float | None = None
    peak_memory_bytes: int | None = None
    baseline_memory_bytes: int | None = None
    round_ms: tuple[float, ...] = ()
    started: str
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def ratio(a: Latency, b: Latency) -> float:
    """How many times as long `a` takes as `b`: the median, over the turns, of the ratio of their mean times.

    A busy machine hardly moves it. Medians and minima within a turn would not do: there, a run that fits between two
    interruptions looks free of them, while a longer one is always interrupted.

    Args:
        a: a `Latency`.
        b: another `Latency` of the same `benchmark` call.

    Returns:
        The ratio; 0.5 means that `a` takes half of `b`'s time.

    Raises:
        ValueError: they were not measured together.
    """
    if (a.started, len(a.round_ms)) != (b.started, len(b.round_ms)):
        names = f"{a.artifact_path.name} and {b.artifact_path.name}"
        raise ValueError(f"{names} were not measured together: give both to one benchmark() call.")
    return float(np.median(np.divide(a.round_ms, b.round_ms)))


def equally_fast(a: Latency, b: Latency) -> bool:
    """Whether the difference of two times lies within the spread of the runs, so that it says nothing.

    Measured in turns, it does where the ratios of the turns' mean times lie on both sides of 1 between their 10th and
    90th percentile: a busy moment of the machine, which hits both, is no difference. Otherwise, where the times between
    which four of five runs lie (of a device that tells no percentiles: all turns) overlap.

    Args:
        a: a `Latency`.
        b: another one.
    """
    if a.started == b.started and len(a.round_ms) == len(b.round_ms) >= ROUNDS:
        low, high = np.percentile(np.divide(a.round_ms, b.round_ms), [10, 90])
        return bool(low <= 1 <= high)
    (low_a, high_a), (low_b, high_b) = _spread(a), _spread(b)
    return low_a <= high_b and low_b <= high_a


def _spread(latency: Latency) -> tuple[float, float]:
    if latency.p10_ms is not None and latency.p90_ms is not None:
        return latency.p10_ms, latency.p90_ms
    times = latency.round_ms or (latency.median_ms,)
    return min(times), max(times)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputCheck:
    """How far one output is from the model's.

    Attributes:
        name: of the output.
        kind: of its `OutputSpec`.
        sqnr_db: as `Verification.sqnr_db`.
        max_abs_error: largest difference.
        agreement: fraction of images, and of a mask of pixels, for which both give the same class; `None` of an output
            that tells none.
    """

    name: str
    kind: str
    sqnr_db: float
    max_abs_error: float
    agreement: float | None = None

    @property
    def counted(self) -> str:
        """What `agreement` is a fraction of: `"images"`, or `"pixels"` of a mask."""
        return "pixels" if self.kind == "mask" else "images"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfStep:
    """One operation of a file in half precision, over all images.

    Attributes:
        layer: name of what it computes, which begins with our layer's name.
        operation: the format's name of it.
        largest: the largest absolute value that it computes in float32.
        overflowing: fraction of its finite results that half precision has as infinity or NaN, given right inputs.
        vanishing: fraction of its results that half precision has as 0 and float32 has not, given right inputs.
        own_db: signal-to-noise ratio of its results in half precision, given the inputs of float32: what it loses
            itself. Infinite if it loses nothing; NaN if its inputs were right for no image.
        sqnr_db: the same, given the inputs of half precision: with all that was lost before.
        output_db: signal-to-noise ratio of the file's outputs, of the worst one, on the first images, when this
            operation alone is in half precision; `None` of those that lose little.
    """

    layer: str
    operation: str
    largest: float
    overflowing: float
    vanishing: float
    own_db: float
    sqnr_db: float
    output_db: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfCheck:
    """A file run operation by operation in half precision.

    Attributes:
        accumulator: `"float32"` or `"float16"`: what sums are kept in while they grow.
        steps: a `HalfStep` for each operation that computes floating-point numbers, in the file's order.
    """

    accumulator: str
    steps: tuple[HalfStep, ...]

    @property
    def overflows(self) -> tuple[HalfStep, ...]:
        """The operations in which numbers overflow."""
        return tuple(step for step in self.steps if step.overflowing)

    @property
    def vanishes(self) -> tuple[HalfStep, ...]:
        """The operations in which numbers become 0, those that lose most by it first. Often that is right: beside what
        they are added to, those numbers are nothing."""
        return tuple(sorted((step for step in self.steps if step.vanishing), key=lambda step: step.own_db))

    def worst(self, count: int = 5) -> tuple[HalfStep, ...]:
        """The operations that cost the outputs most, the worst first."""
        known = [(step.output_db, i) for i, step in enumerate(self.steps) if step.output_db is not None]
        return tuple(self.steps[i] for _, i in sorted(known)[:count])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """How far an artifact is from its model.

    With several outputs, `sqnr_db` is the worst output's and `max_abs_error` the largest; `outputs` names each.

    Attributes:
        artifact: what was checked.
        images: how many images it was checked on.
        top1: fraction of images whose label the artifact gives, or `None` without labels.
        reference_top1: the same of the model.
        majority: fraction of images that have the most frequent label: the top-1 of always giving that class; `None`
            without labels.
        top1_agreement: fraction of images on which artifact and model give the same class (of a single class: are on
            the same side of its threshold); `None` where no output classifies images.
        sqnr_db: signal-to-quantization-noise ratio of the outputs, 10 log10(sum y^2 / sum (y - y')^2); infinite if
            equal.
        max_abs_error: largest difference of an output.
        partitions: number of partitions of the runtime's delegate (of a LiteRT file XNNPACK's), or `None` where the
            target has none.
        outside: operations by name that no partition computes, but the runtime's own, slower code; {}: the whole file
            runs on the delegate.
        op_histogram: operations in the file by name.
        operations: primitive operations of the model's graph, (before, after) it was simplified, or `None`.
        gpu_offenders: why a phone's GPU would refuse the file, () if it would not; `None` where that is not known. See
            `Traits.offenders`.
        verified_by: what ran the file.
        outputs: an `OutputCheck` for each output.
        half: a `HalfCheck`, of a check in half precision; otherwise `None`.
    """

    artifact: Artifact
    images: int
    top1: float | None
    reference_top1: float | None
    majority: float | None = None
    top1_agreement: float | None
    sqnr_db: float
    max_abs_error: float
    partitions: int | None
    op_histogram: Mapping[str, int]
    operations: tuple[int, int] | None = None
    gpu_offenders: tuple[str, ...] | None = None
    outside: Mapping[str, int] = dataclasses.field(default_factory=dict)
    verified_by: str
    outputs: tuple[OutputCheck, ...] = ()
    half: HalfCheck | None = None


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio of two sums of squares; minus infinity where the noise is infinite or NaN."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(max(signal, 1e-300) / noise) if math.isfinite(noise) else -math.inf
