"""Core ML on the compute units of this Mac: each artifact and unit in a child process of its own, in turns (host.py).

Core ML may use what it was given or leave it: `"cpu_and_ne"` allows the Neural Engine and the CPU, and an operation
that the Neural Engine lacks, or that is too small for it, runs on the CPU. Its number of threads is its own affair.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
import warnings
from collections.abc import Sequence

from keras_vits._util.progress import progress

from ..artifact import Artifact
from ..records import DeviceError, DeviceWarning, Latency
from . import host

THREADS = (1,)
ACCELERATORS = ("cpu", "cpu_and_gpu", "cpu_and_ne", "all")
FORMATS = ("coreml",)


def measure(
    artifacts: Sequence[Artifact],
    where: str | None,
    *,
    threads: tuple[int, ...],
    accelerators: tuple[str, ...] | None,
    min_runs: int,
    min_seconds: float,
    warmup_seconds: float,
) -> list[Latency]:
    """See `edge.benchmark`. Everything is tried once before the turns begin, and what fails is left out of them.

    Returns:
        One `Latency` for each artifact and compute unit, its `threads` being `None`. `load_ms` is that of a file which
        macOS has seen; `environment["first_load_ms"]` is that of the trial, with the compilation for the Neural Engine
        and the GPU unless macOS kept it from an earlier day.

    Raises:
        ValueError: an address or a number of threads, which there is no choice of.
        DeviceError: this is not a Mac, or not one combination runs.
    """
    if where:
        raise ValueError(f"The device 'macos' is this machine and takes no address; received {where!r}.")
    if threads != THREADS:
        raise ValueError("Core ML chooses its threads by itself: leave `threads` out.")
    if sys.platform != "darwin":
        raise DeviceError(
            "Core ML runs on macOS only: measure on a Mac, or import a report of Xcode's with 'ios:PATH'."
        )
    pairs = [(artifact, name) for artifact in artifacts for name in accelerators or _present()]
    tried = [(*pair, _try(*pair)) for pair in progress(pairs, "Trying")]
    running = [(artifact, name, load_ms) for artifact, name, load_ms in tried if load_ms is not None]
    if not running:
        raise DeviceError("Core ML runs none of the files on any compute unit; the warnings say what it said.")
    children = [_child(artifact, name) for artifact, name, _ in running]
    found = host.in_turns(children, "macos", min_runs, min_seconds, warmup_seconds)
    known = {"macos": platform.mac_ver()[0], "machine": platform.machine()}
    return [
        dataclasses.replace(speed, environment={**known, "first_load_ms": load_ms})
        for speed, (*_, load_ms) in zip(found, running, strict=True)
    ]


def _present() -> tuple[str, ...]:
    """The compute units of this Mac; one with an Intel processor has no Neural Engine."""
    return tuple(name for name in ACCELERATORS if name != "cpu_and_ne" or platform.machine() == "arm64")


def _child(artifact: Artifact, name: str) -> host.Child:
    return host.Child(artifact, None, name, compute_units="cpu_only" if name == "cpu" else name)


def _try(artifact: Artifact, name: str) -> float | None:
    """Milliseconds that loading took, or `None` with a warning where loading or running fails."""
    try:
        with _child(artifact, name) as child:
            child.warm_up(0)
            return child.load_ms
    except ValueError as e:
        warnings.warn(DeviceWarning(f"{artifact.path.name} on {name}: {e}"), stacklevel=4)
        return None
