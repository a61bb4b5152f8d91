"""The CPU of this machine: each artifact in child processes of its own (benchmark_worker.py).

They are started in a changing order and measured in turns, A B C B A C ..., so that a machine that slows down for a
second slows all of them down, and a ratio between two of them stays true. A child that is not being measured waits for
its next line and uses no CPU. Where its memory happens to lie gives every process a speed of its own: each LiteRT file
has several, one after the other.
"""

import contextlib
import datetime
import math
import os
import pathlib
import sys
import time

import numpy as np

from .. import litert
from ..benchmark import Latency, cpu_name
from ..progress import progress
from ..worker import Worker, WorkerError

THREADS = (2,)
ACCELERATORS = ("cpu",)
FORMATS = ("litert", "keras", "coreml", "onnx")
WORKER = pathlib.Path(__file__).parents[1] / "benchmark_worker.py"
PROCESSES = 3  # of a LiteRT file, one after the other: identical files in one process each differed by 2 to 6 percent
ROUND_SECONDS = 0.1  # of one artifact's turn
WARMUP_RUNS = 3  # at least
PATIENCE = 10  # an artifact so slow that `min_runs` takes this many times `min_seconds` is not run `min_runs` times


def measure(artifacts, where, *, threads, accelerators, min_runs, min_seconds, warmup_seconds):
    """See `edge.benchmark`; `where` and `accelerators` have nothing to choose from."""
    if where:
        raise ValueError(f"The device 'host' is this machine and takes no address; received {where!r}.")
    for artifact in artifacts:
        if artifact.format == "coreml" and sys.platform != "darwin":
            raise ValueError(
                f"{artifact.path.name} is a Core ML model, which can run on macOS only: measure it on a Mac."
            )
    return in_turns(
        [Child(artifact, count) for artifact in artifacts for count in threads],
        "host",
        min_runs,
        min_seconds,
        warmup_seconds,
        PROCESSES,
    )


def in_turns(children, device, min_runs, min_seconds, warmup_seconds, processes=1):
    """Measures children in turns, LiteRT files in so many processes; a `Latency` of each child, in their order."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    random = np.random.default_rng(0)
    with contextlib.ExitStack() as kept:
        for i in range(processes):
            of = f", process {i + 1} of {processes}" if processes > 1 else ""
            share = (i + 1) / processes  # of all runs, when these processes are done
            if all(child.has_enough(min_runs * share, min_seconds * share) for child in children):
                continue  # one turn of a slow artifact may be more than its share
            with contextlib.ExitStack() as stack:
                starting = [child for child in children if child.restarts or not i]
                for j in progress(random.permutation(len(starting)), f"Loading{of}"):
                    (stack if starting[j].restarts else kept).enter_context(starting[j])
                turns = [child.warm_up(warmup_seconds) for child in progress(children, f"Warming up{of}")]
                estimate = max(
                    max(math.ceil(min_runs / runs), math.ceil(min_seconds / ROUND_SECONDS)) for runs in turns
                )
                orders = rounds(children, min_runs * share, min_seconds * share, random)
                for order in progress(orders, f"Measuring{of}", math.ceil(estimate / processes)):
                    for j in order:
                        children[j].measure(turns[j])
    return [child.latency(device=device, started=started) for child in children]


def rounds(children, min_runs, min_seconds, random=None):
    """Yields the order of the next round until every child has run often and long enough.

    It is another one each time: what ran before leaves the processor in its state, which is worth some percent.
    """
    random = random or np.random.default_rng(0)
    while not all(child.has_enough(min_runs, min_seconds) for child in children):
        yield random.permutation(len(children))


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


class Child:
    """The process of one artifact. It ends with the `with` block, and with this process however that ends.

    Its measurements stay, and another `with` block, with another process, adds to them.

    Args:
        artifact: what it runs.
        threads: how many its runtime may use.
        accelerator: what it runs on, for the record.
        **order: what its worker has to know beyond that.
    """

    def __init__(self, artifact, threads, accelerator="cpu", **order):
        self.artifact, self.threads, self.accelerator, self.order = artifact, threads, accelerator, order
        self.rounds = []  # one array of milliseconds for each turn
        self.loads, self.peaks = [], []  # of each process and each turn

    @property
    def restarts(self):
        """Whether each process lays out the file's weights anew; a Keras model takes long to load and compile."""
        return self.artifact.format in ("litert", "onnx")

    def __enter__(self):
        artifact, environment = self.artifact, dict(os.environ)
        order = {"format": artifact.format, "path": str(artifact.path.absolute()), "threads": self.threads}
        order |= {"shape": artifact.input.stored_shape, "dtype": artifact.input.dtype, **self.order}
        if artifact.format == "litert":
            interpreter, order["runtime"] = litert.interpreter_class()
            order["interpreter"] = interpreter.__module__
        if artifact.format == "keras":
            environment |= _keras_environment(artifact.tools["backend"], str(self.threads))
        self.worker = Worker([sys.executable, "-P", str(WORKER)], environment)
        try:
            self.loads.append(self._ask(**order))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.worker.__exit__()

    def _ask(self, **order):
        try:
            return self.worker.ask(**order)
        except WorkerError as e:
            raise ValueError(f"{self.artifact.path.name} could not be measured, {e}") from None

    def warm_up(self, seconds):
        """Runs it for a while; returns how many runs make a turn of `ROUND_SECONDS`."""
        start, ms = time.monotonic(), []
        while len(ms) < WARMUP_RUNS or time.monotonic() - start < seconds:
            ms += self._ask(runs=1)["ms"]
        return max(1, round(ROUND_SECONDS * 1e3 / np.median(ms)))  # the first run may compile, for seconds

    def measure(self, runs):
        answer = self._ask(runs=runs)
        self.rounds.append(np.array(answer["ms"]))
        self.peaks.append(answer["peak_memory_bytes"])

    def has_enough(self, min_runs, min_seconds):
        runs, seconds = sum(map(len, self.rounds)), sum(ms.sum() for ms in self.rounds) / 1e3
        return (runs >= min_runs and seconds >= min_seconds) or (runs > 0 and seconds > PATIENCE * min_seconds)

    @property
    def load_ms(self):
        return float(np.median([loaded["load_ms"] for loaded in self.loads]))

    def latency(self, **common):
        ms = np.concatenate(self.rounds)
        median, p90, p99 = (float(p) for p in np.percentile(ms, [50, 90, 99]))
        return Latency(
            artifact_path=self.artifact.path,
            cpu=cpu_name(),
            accelerator=self.accelerator,
            threads=self.threads,
            runs=len(ms),
            median_ms=median,
            p90_ms=p90,
            p99_ms=p99,
            load_ms=self.load_ms,
            peak_memory_bytes=max(self.peaks, default=None),
            round_ms=tuple(float(r.mean()) for r in self.rounds),
            runtime=self.loads[-1]["runtime"],
            baseline_memory_bytes=self.loads[-1].get("baseline_memory_bytes"),
            **common,
        )
