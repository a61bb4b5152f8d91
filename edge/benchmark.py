"""Latency, load time and memory of artifacts on a device that can be reached.

Each artifact lives in a child process of its own (benchmark_worker.py). They are measured in turns, A B C A B C ..., so
that a machine that slows down for a second slows all of them down, and a ratio between two of them stays true. A child
that is not being measured waits for its next line and uses no CPU.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import numpy as np

from . import artifact as artifact_files
from . import litert
from .artifact import Artifact
from .progress import progress

DEVICES = ("host",)
ROUND_SECONDS = 0.1  # of one artifact's turn
WARMUP_RUNS = 3  # at least
PATIENCE = 10  # an artifact so slow that `min_runs` takes this many times `min_seconds` is not run `min_runs` times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """How fast an artifact runs: from images (B,H,W,C) in memory to outputs, where B is the file's batch, usually 1.

    Attributes:
        artifact_path: of the file that was measured.
        device: one of `DEVICES`.
        cpu: the processor's name.
        runtime: name and version of what ran the file.
        threads: how many the runtime was allowed.
        runs: how many were timed.
        median_ms: of one run, as the next two.
        p90_ms: nine of ten runs are faster.
        p99_ms: 99 of 100 runs are faster.
        load_ms: from the file to a model that is ready for its first image, the runtime being imported already.
        peak_memory_bytes: largest resident memory of the process that did nothing but run this artifact.
        baseline_memory_bytes: the part of it that was there before the file was loaded: Python and the runtime.
        round_ms: the mean of every turn, in the order of the turns; see `ratio`.
        started: date and time in UTC, the same for all artifacts of one `benchmark` call.
    """

    artifact_path: pathlib.Path
    device: str
    cpu: str
    runtime: str
    threads: int
    runs: int
    median_ms: float
    p90_ms: float
    p99_ms: float
    load_ms: float
    peak_memory_bytes: int
    baseline_memory_bytes: int
    round_ms: tuple[float, ...]
    started: str


def benchmark(artifacts, *, device="host", threads=2, min_runs=50, min_seconds=2.0, warmup_seconds=0.5):
    """Measures artifacts in turns, so that they can be compared.

    Args:
        artifacts: an `Artifact`, or a list of them to be compared.
        device: where to run; `"host"` is the CPU of this machine.
        threads: how many the runtime may use.
        min_runs: every artifact is run at least this often ...
        min_seconds: ... and at least this long; but a run that takes over a second or so is repeated less often.
        warmup_seconds: every artifact first runs this long, and at least three times, unmeasured.

    Returns:
        A `Latency`, or a list of them in the order of `artifacts`.

    Raises:
        ValueError: unknown device; an artifact that cannot run there, or is not the file that was written, or whose
            process died (its last words are in the message).
    """
    if isinstance(artifacts, Artifact):
        return benchmark(
            [artifacts],
            device=device,
            threads=threads,
            min_runs=min_runs,
            min_seconds=min_seconds,
            warmup_seconds=warmup_seconds,
        )[0]
    artifacts = list(artifacts)
    _check(artifacts, device, threads, min_runs)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(_Child(artifact, threads)) for artifact in progress(artifacts, "Loading")]
        turns = [child.warm_up(warmup_seconds) for child in progress(children, "Warming up")]
        estimate = max(max(math.ceil(min_runs / runs), math.ceil(min_seconds / ROUND_SECONDS)) for runs in turns)
        for _ in progress(_rounds(children, min_runs, min_seconds), "Measuring", estimate):
            for child, runs in zip(children, turns, strict=True):
                child.measure(runs)
        return [child.latency(device=device, threads=threads, started=started) for child in children]


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


def _check(artifacts, device, threads, min_runs):
    if device not in DEVICES:
        raise ValueError(f"Unknown device {device!r}. Known: {', '.join(DEVICES)}.")
    if not artifacts:
        raise ValueError("There is nothing to measure: the list of artifacts is empty.")
    for name, value in (("threads", threads), ("min_runs", min_runs)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer; received {value!r}.")
    for artifact in artifacts:
        if artifact.format == "coreml" and sys.platform != "darwin":
            raise ValueError(
                f"{artifact.path.name} is a Core ML model, which can run on macOS only: measure it on a Mac."
            )
        artifact_files.load(artifact.path)  # refuses a file that is not the one that was written


def _rounds(children, min_runs, min_seconds):
    """Yields until every child has run often and long enough."""
    while not all(child.has_enough(min_runs, min_seconds) for child in children):
        yield


def _keras_environment(backend, threads):
    """What keeps a Keras model on the CPU and, each backend in its own way, on so many threads."""
    return {
        "KERAS_BACKEND": backend,
        "TF_NUM_INTRAOP_THREADS": threads,
        "NPROC": threads,  # JAX
        "OMP_NUM_THREADS": threads,  # PyTorch
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "KERAS_TORCH_DEVICE": "cpu",
    }


class _Child:
    """The process of one artifact. It ends with the `with` block, and with this process however that ends."""

    def __init__(self, artifact, threads):
        self.artifact, self.threads = artifact, threads
        self.rounds = []  # one array of milliseconds for each turn

    def __enter__(self):
        artifact, environment = self.artifact, dict(os.environ)
        order = {"format": artifact.format, "path": str(artifact.path.absolute()), "threads": self.threads}
        order |= {"shape": artifact.input.stored_shape, "dtype": artifact.input.dtype}
        if artifact.format == "litert":
            interpreter, order["runtime"] = litert.interpreter_class()
            order["interpreter"] = interpreter.__module__
        if artifact.format == "keras":
            environment |= _keras_environment(artifact.tools["backend"], str(self.threads))
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(pathlib.Path(__file__).with_name("benchmark_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            text=True,
        )
        try:
            self.loaded = self._ask(**order)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def _ask(self, **order):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it left no message")
        raise ValueError(f"{self.artifact.path.name} could not be measured, its process ended with code {code}: {last}")

    def warm_up(self, seconds):
        """Runs it for a while; returns how many runs make a turn of `ROUND_SECONDS`."""
        start, ms = time.monotonic(), []
        while len(ms) < WARMUP_RUNS or time.monotonic() - start < seconds:
            ms += self._ask(runs=1)["ms"]
        return max(1, round(ROUND_SECONDS * 1e3 / np.median(ms)))  # the first run may compile, for seconds

    def measure(self, runs):
        answer = self._ask(runs=runs)
        self.rounds.append(np.array(answer["ms"]))
        self.peak_memory_bytes = answer["peak_memory_bytes"]

    def has_enough(self, min_runs, min_seconds):
        runs, seconds = sum(map(len, self.rounds)), sum(ms.sum() for ms in self.rounds) / 1e3
        return (runs >= min_runs and seconds >= min_seconds) or (runs > 0 and seconds > PATIENCE * min_seconds)

    def latency(self, **common):
        ms = np.concatenate(self.rounds)
        median, p90, p99 = (float(p) for p in np.percentile(ms, [50, 90, 99]))
        return Latency(
            artifact_path=self.artifact.path,
            cpu=cpu_name(),
            runs=len(ms),
            median_ms=median,
            p90_ms=p90,
            p99_ms=p99,
            peak_memory_bytes=self.peak_memory_bytes,
            round_ms=tuple(float(r.mean()) for r in self.rounds),
            **self.loaded,
            **common,
        )
