"""Latency, load time and memory of artifacts on a device that can be reached.

A kind of device is one file in devices/, with

    THREADS         how many threads a runtime may use where the caller does not say, a tuple
    ACCELERATORS    names of everything there that may run an artifact, the CPU first
    FORMATS         of the artifacts that it can run
    measure(artifacts, where, *, threads, accelerators, min_runs, min_seconds, warmup_seconds) -> [Latency]

where `where` is what stands behind the colon of `"android:R58M123"`, or `None`.
"""

import contextlib
import dataclasses
import importlib
import pathlib
import platform
import subprocess
import sys

import numpy as np

from . import artifact as artifact_files
from .artifact import Artifact

DEVICES = ("host", "android", "browser", "macos", "ios", "arm64")


class DeviceError(ValueError):
    """A device that is not there, or went away.

    Attributes:
        results: the `Latency` records that were complete by then.
    """

    def __init__(self, message, results=()):
        super().__init__(message)
        self.results = tuple(results)


class DeviceWarning(UserWarning):
    """One way of running an artifact failed on a device that goes on with the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """How fast an artifact runs: from images (B,H,W,C) in memory to outputs, where B is the file's batch, usually 1.

    What a device cannot tell is `None`.

    Attributes:
        artifact_path: of the file that was measured.
        device: one of `DEVICES`, with its address: `"host"`, `"android:R58M123"`.
        cpu: the processor's or the chip's name.
        runtime: name and version of what ran the file.
        accelerator: what ran it: `"cpu"`, or another of the device's `ACCELERATORS`.
        threads: how many the runtime was allowed; `None` where it decides for itself.
        runs: how many were timed.
        median_ms: of one run, as the next two.
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
    p90_ms: float | None = None
    p99_ms: float | None = None
    load_ms: float | None = None
    peak_memory_bytes: int | None = None
    baseline_memory_bytes: int | None = None
    round_ms: tuple[float, ...] = ()
    started: str
    environment: dict = dataclasses.field(default_factory=dict)


def benchmark(
    artifacts, *, device="host", threads=None, accelerators=None, min_runs=50, min_seconds=2.0, warmup_seconds=0.5
):
    """Measures artifacts in turns, so that they can be compared.

    Args:
        artifacts: an `Artifact`, or a list of them to be compared.
        device: where to run. `"host"` is the CPU of this machine; `"android"` or `"android:SERIAL"` a phone behind adb;
            `"browser"` LiteRT.js in a headless Chromium, `"browser:serve"` or `"browser:HOST:PORT"` in the browser that
            opens the page (`devices.browser.serve` tells its address); `"macos"` Core ML on each compute unit of this
            Mac; `"ios:FOLDER"` takes the reports that Xcode exported.
        threads: how many the runtime may use, or several such numbers; by default 2, in a browser 1 and 2, on a phone
            1, 2 and 4.
        accelerators: the name of one, or several: `"cpu"`, `"gpu"` and so on, as the device's file in devices/ lists
            them; all that are present by default.
        min_runs: every artifact is run at least this often ...
        min_seconds: ... and at least this long; but a run that takes over a second or so is repeated less often.
        warmup_seconds: every artifact first runs this long, and at least three times, unmeasured.

    Returns:
        A `Latency` of one artifact with one accelerator and one number of threads; a list of them where there is more
        of one of these: artifact by artifact, of each one accelerator by accelerator, of a CPU threads by threads.

    Raises:
        ValueError: unknown device; an artifact that cannot run there, or is not the file that was written, or whose
            process died (its last words are in the message).
        DeviceError: a device that is not there or went away, with what it had measured.
    """
    one = isinstance(artifacts, Artifact)
    artifacts = [artifacts] if one else list(artifacts)
    kind, _, where = str(device).partition(":")
    if kind not in DEVICES:
        raise ValueError(f"Unknown device {device!r}. Known: {', '.join(DEVICES)}.")
    module = importlib.import_module(f".devices.{kind}", __package__)
    threads = module.THREADS if threads is None else threads
    threads = (threads,) if isinstance(threads, int) else tuple(threads)
    chosen = (accelerators,) if isinstance(accelerators, str) else accelerators and tuple(accelerators)
    check(artifacts, module, kind, threads, chosen, min_runs)
    found = module.measure(
        artifacts,
        where or None,
        threads=threads,
        accelerators=chosen,
        min_runs=min_runs,
        min_seconds=min_seconds,
        warmup_seconds=warmup_seconds,
    )
    one = one and len(threads) == len(chosen or module.ACCELERATORS) == len(found) == 1
    return found[0] if one else found


def ratio(a, b):
    """How many times as long `a` takes as `b`: the median, over the turns, of the ratio of their mean times.

    A busy machine hardly moves it. Medians and minima within a turn would not do: there, a run that fits between two
    interruptions looks free of them, while a longer one is always interrupted.

    Args:
        a: a `Latency`.
        b: another one of the same `benchmark` call.

    Returns:
        The ratio; 0.5 means that `a` takes half of `b`'s time.

    Raises:
        ValueError: they were not measured together.
    """
    if (a.started, len(a.round_ms)) != (b.started, len(b.round_ms)):
        names = f"{a.artifact_path.name} and {b.artifact_path.name}"
        raise ValueError(f"{names} were not measured together: give both to one benchmark() call.")
    return float(np.median(np.divide(a.round_ms, b.round_ms)))


def cpu_name():
    """The processor's name, as the operating system knows it."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or platform.machine()
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def check(artifacts, module, kind, threads, accelerators, min_runs):
    """Raises a ValueError for what the device of this kind, with its module, does not take."""
    if not artifacts:
        raise ValueError("There is nothing to measure: the list of artifacts is empty.")
    for name, values in (("threads", threads), ("min_runs", (min_runs,))):
        for value in values or (None,):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer; received {value!r}.")
    for name in accelerators or ():
        if name not in module.ACCELERATORS:
            raise ValueError(f"{kind} has no accelerator {name!r}. It has: {', '.join(module.ACCELERATORS)}.")
    for artifact in artifacts:
        if artifact.format not in module.FORMATS:
            runs = ", ".join(module.FORMATS)
            raise ValueError(f"{artifact.path.name} is of the format {artifact.format}, and {kind} runs: {runs}.")
        artifact_files.load(artifact.path)  # refuses a file that is not the one that was written
