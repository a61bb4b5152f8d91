"""The CPU of this machine: each artifact in child processes of its own (host_worker.py), in turns (turns.py).

They are started in a changing order. A child that is not being measured waits for its next line and uses no CPU. Where
its memory happens to lie gives every process a speed of its own: a file whose weights each process lays out anew
(`Traits.restarts`) has several, one after the other.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_vits._util.process import Worker, WorkerError
from keras_vits._util.progress import progress

from ..artifact import Artifact
from ..records import Latency
from ..targets._protocol import names, target
from ._common import cpu_name
from .turns import Goal, Timed, take_turns

THREADS = (2,)
ACCELERATORS = ("cpu",)
FORMATS = names()
WORKER = pathlib.Path(__file__).with_name("host_worker.py")
PROCESSES = 3  # of a file that restarts, one after the other: identical files in one process each differed by 2 to 6 %


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
    """See `edge.benchmark`; `where` and `accelerators` have nothing to choose from."""
    if where:
        raise ValueError(f"The device 'host' is this machine and takes no address; received {where!r}.")
    for artifact in artifacts:
        if reason := target(artifact.format).traits.unavailable():
            raise ValueError(f"{artifact.path.name} {reason}.")
    children = [Child(artifact, count) for artifact in artifacts for count in threads]
    return in_turns(children, "host", min_runs, min_seconds, warmup_seconds, PROCESSES)


def in_turns(
    children: Sequence[Child],
    device: str,
    min_runs: int,
    min_seconds: float,
    warmup_seconds: float,
    processes: int = 1,
) -> list[Latency]:
    """Measures children in turns.

    Args:
        children: what is measured.
        device: for the records.
        min_runs, min_seconds, warmup_seconds: as of `edge.benchmark`; of each child, in all processes together.
        processes: how many a child that restarts has, one after the other.

    Returns:
        A `Latency` of each child, in their order.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    random, goal = np.random.default_rng(0), Goal(runs=min_runs, seconds=min_seconds)
    with contextlib.ExitStack() as kept:
        for i in range(processes):
            of = f", process {i + 1} of {processes}" if processes > 1 else ""
            share = goal.part((i + 1) / processes)  # when these processes are done
            if all(child.has_enough(share) for child in children):
                continue  # one turn of a slow artifact may be more than its share
            with contextlib.ExitStack() as stack:
                starting = [child for child in children if child.restarts or not i]
                for j in progress(random.permutation(len(starting)), f"Loading{of}"):
                    (stack if starting[j].restarts else kept).enter_context(starting[j])
                for child in progress(children, f"Warming up{of}"):
                    child.warm_up(warmup_seconds)
                take_turns(children, share, random=random, description=f"Measuring{of}")
    return [child.latency(device=device, started=started) for child in children]


class Child(Timed):
    """The process of one artifact. It ends with the `with` block, and with this process however that ends.

    Its measurements stay, and another `with` block, with another process, adds to them.

    Args:
        artifact: what it runs.
        threads: how many its runtime may use; `None` where it decides for itself.
        accelerator: what it runs on, for the record.
        **order: what its worker has to know beyond that.
    """

    def __init__(self, artifact: Artifact, threads: int | None, accelerator: str = "cpu", **order: Any):
        super().__init__()
        self.artifact, self.threads, self.accelerator, self.order = artifact, threads, accelerator, order
        self.traits = target(artifact.format).traits
        self.loads: list[dict[str, Any]] = []  # of each process
        self.peaks: list[int] = []  # of each turn

    @property
    def restarts(self) -> bool:
        """Whether each process lays out the file's weights anew; a Keras model takes long to load and compile."""
        return self.traits.restarts

    def __enter__(self) -> Child:
        artifact, environment = self.artifact, dict(os.environ)
        order = {"format": artifact.format, "path": str(artifact.path.absolute()), "threads": self.threads}
        order["inputs"] = [{"shape": spec.stored_shape, "dtype": spec.dtype} for spec in artifact.inputs]
        order |= {**self.traits.order(artifact), **self.order}
        environment |= self.traits.environment(artifact, self.threads or 1)
        self.worker = Worker([sys.executable, "-P", str(WORKER)], environment)
        try:
            self.loads.append(self._ask(**order))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.__exit__()

    def _ask(self, **order: Any) -> dict[str, Any]:
        try:
            return self.worker.ask(**order)
        except WorkerError as e:
            raise ValueError(f"{self.artifact.path.name} could not be measured, {e}") from None

    def run(self, runs: int, seconds: float = 0.0) -> list[float]:
        start, ms = time.monotonic(), []
        while len(ms) < runs or time.monotonic() - start < seconds:
            answer = self._ask(runs=1 if seconds else runs)
            ms += answer["ms"]
            self.peaks.append(answer["peak_memory_bytes"])
        return ms

    @property
    def load_ms(self) -> float:
        return float(np.median([loaded["load_ms"] for loaded in self.loads]))

    def latency(self, **common: Any) -> Latency:
        """The record of what was measured; `common`: its fields that all children share."""
        return Latency(
            artifact_path=self.artifact.path,
            cpu=cpu_name(),
            accelerator=self.accelerator,
            threads=self.threads,
            load_ms=self.load_ms,
            peak_memory_bytes=max(self.peaks, default=None),
            runtime=self.loads[-1]["runtime"],
            baseline_memory_bytes=self.loads[-1].get("baseline_memory_bytes"),
            **self.times,
            **common,
        )
