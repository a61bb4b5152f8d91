"""Latency, load time and memory of artifacts on a device that can be reached; see devices/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from ..artifact import Artifact
from ..devices._common import check
from ..devices._common import device as device_of
from ..records import Latency


@overload
def benchmark(
    artifacts: Artifact,
    *,
    device: str = ...,
    threads: int | Sequence[int] | None = ...,
    accelerators: str | Sequence[str] | None = ...,
    min_runs: int = ...,
    min_seconds: float = ...,
    warmup_seconds: float = ...,
) -> Latency | list[Latency]: ...


@overload
def benchmark(
    artifacts: Sequence[Artifact],
    *,
    device: str = ...,
    threads: int | Sequence[int] | None = ...,
    accelerators: str | Sequence[str] | None = ...,
    min_runs: int = ...,
    min_seconds: float = ...,
    warmup_seconds: float = ...,
) -> list[Latency]: ...


def benchmark(
    artifacts: Artifact | Sequence[Artifact],
    *,
    device: str = "host",
    threads: int | Sequence[int] | None = None,
    accelerators: str | Sequence[str] | None = None,
    min_runs: int = 50,
    min_seconds: float = 2.0,
    warmup_seconds: float = 0.5,
) -> Latency | list[Latency]:
    """Measures artifacts in turns, so that they can be compared.

    Args:
        artifacts: an `Artifact`, or a list of them to be compared.
        device: where to run. `"host"` is the CPU of this machine; `"android"` or `"android:SERIAL"` a phone behind adb;
            `"browser"` LiteRT.js in a headless Chromium, `"browser:serve"` or `"browser:HOST:PORT"` in the browser that
            opens the page (`devices.browser.serve` returns its address); `"macos"` Core ML on each compute unit of this
            Mac; `"ios:FOLDER"` takes the reports that Xcode exported.
        threads: number of threads that the runtime may use, or several such numbers; by default 2, in a browser 1 and
            2, on a phone 1, 2 and 4.
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
            process died (the last lines of its output are in the message).
        DeviceError: a device that is not there or went away, with what it had measured.
    """
    one = isinstance(artifacts, Artifact)
    artifacts = [artifacts] if isinstance(artifacts, Artifact) else list(artifacts)
    kind, _, where = str(device).partition(":")
    module = device_of(kind)
    threads = module.THREADS if threads is None else threads
    threads = (threads,) if isinstance(threads, int) else tuple(threads)
    chosen = (accelerators,) if isinstance(accelerators, str) else tuple(accelerators or ()) or None
    check(artifacts, kind, threads, chosen, min_runs)
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
