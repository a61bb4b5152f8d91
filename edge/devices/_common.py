"""What a device is, and what all of them ask before they measure."""

from __future__ import annotations

import contextlib
import importlib
import pathlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Protocol, cast

from .. import artifact as artifact_files
from ..artifact import Artifact
from ..records import Latency
from . import DEVICES


class Device(Protocol):
    """What the module of a kind of device has.

    One that runs artifacts for `edge.verify`, too, has `load(artifact)`, which returns a `Runner`.

    Attributes:
        THREADS: how many threads a runtime may use where the caller does not say.
        ACCELERATORS: names of everything there that may run an artifact, the CPU first.
        FORMATS: names of the targets whose files it runs.
    """

    THREADS: tuple[int, ...]
    ACCELERATORS: tuple[str, ...]
    FORMATS: tuple[str, ...]

    def measure(
        self,
        artifacts: Sequence[Artifact],
        where: str | None,
        *,
        threads: tuple[int, ...],
        accelerators: tuple[str, ...] | None,
        min_runs: int,
        min_seconds: float,
        warmup_seconds: float,
    ) -> list[Latency]:
        """See `edge.benchmark`; `where` is what stands behind the colon of `"android:R58M123"`, or `None`."""
        ...


def device(kind: str) -> Device:
    """The module of a kind of device.

    Raises:
        ValueError: there is none of this name.
    """
    if kind not in DEVICES:
        raise ValueError(f"Unknown device {kind!r}. Known: {', '.join(DEVICES)}.")
    return cast(Device, importlib.import_module(f".{kind}", __package__))


def verifying(artifact: Artifact) -> dict[str, Any]:
    """Kinds of device beside this machine on which an artifact can be verified -> what loads it there."""
    found = {kind: device(kind) for kind in DEVICES}
    return {kind: d.load for kind, d in found.items() if hasattr(d, "load") and artifact.format in d.FORMATS}


def check(
    artifacts: Sequence[Artifact],
    kind: str,
    threads: Sequence[int],
    accelerators: Sequence[str] | None,
    min_runs: int,
) -> None:
    """Refuses what a device does not take.

    Raises:
        ValueError: nothing to measure, numbers that are not positive integers, an accelerator or a format that the
            device does not have, or a file that is not the one that was written.
    """
    module = device(kind)
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
        artifact_files.check(artifact)


def cpu_name() -> str:
    """The name of this machine's processor, as the operating system knows it."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or platform.machine()
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
