"""A script in a process of its own, which answers orders."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class WorkerError(ValueError):
    """The process ended instead of answering; the last lines of its output are in the message."""


class Worker:
    """A process that reads one JSON object a line from its stdin and answers each with a line on its stdout.

    While it waits for its next line it uses no CPU. It ends with the `with` block, and with this process however that
    ends.

    Args:
        command: the program and its arguments.
        environment: its environment variables, all of them.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=environment, text=True
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def tell(self, **order: Any) -> None:
        """Gives it an order; `answer` waits for what it says."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()

    def answer(self) -> Any:
        """The answer to the oldest order that has none yet.

        Raises:
            WorkerError: it ended.
        """
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it left no message")
        raise WorkerError(f"its process ended with code {code}: {last}")

    def ask(self, **order: Any) -> Any:
        """Gives it an order and returns the answer; see `answer`."""
        self.tell(**order)
        return self.answer()


# ---------------------------------------------------------------- in the worker


def answers() -> Callable[..., None]:
    """reply(**fields), which alone writes to stdout from now on: a runtime may print what it likes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda **fields: print(json.dumps(fields), file=replies, flush=True)


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far.

    Each system has it in a place of its own: psutil knows that of Windows alone, and `resource`, which Windows lacks,
    gives on Linux a figure that begins at the peak of the process that started this one.
    """
    if sys.platform == "linux":
        status = pathlib.Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
