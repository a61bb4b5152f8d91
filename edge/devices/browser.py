"""LiteRT.js in a browser: headless Chromium on this machine, or whatever opens the page that is served here.

    browser              the Chromium or Chrome of this machine
    browser:serve        the page on 127.0.0.1, e.g. for a phone on a cable: `adb reverse tcp:PORT tcp:PORT`
    browser:HOST[:PORT]  the page on another address of this machine, 0.0.0.0 for all, for any phone in its network

The server of the page is in browser_server.py, the browser's process in chromium.py. Several threads and WebGPU need a
secure page, which for a browser is HTTPS or the address 127.0.0.1: in a network there is one thread.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_vits._util.progress import progress

from ..artifact import Artifact
from ..records import DeviceError, DeviceWarning, Latency
from . import browser_server as pages
from ._common import check, cpu_name
from .browser_server import LeftError, Page, Server
from .chromium import Browser, chromium, flags
from .turns import FailedError, Goal, Timed, attempt, take_turns

THREADS = (1, 2)
ACCELERATORS = ("wasm", "webgpu")
FORMATS = ("litert",)
OPEN_SECONDS = 600  # for somebody to open the page that is served


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
    """See `edge.benchmark`; `where` is `None` for the browser of this machine, `"serve"`, or HOST[:PORT]."""
    if where is not None:
        if not (sys.stderr.isatty() and importlib.util.find_spec("rich")):
            raise DeviceError(
                "Nobody would see the address of the page: run this on a terminal with rich installed, or call "
                "browser.serve(artifacts, on_url=print)."
            )
        return serve(
            artifacts,
            *address(where),
            threads=threads,
            accelerators=accelerators,
            min_runs=min_runs,
            min_seconds=min_seconds,
            warmup_seconds=warmup_seconds,
        )
    command = [chromium(), *flags(accelerators)]
    with Server(artifacts, "127.0.0.1", 0) as server, Browser([*command, server.url]) as browser:
        return _measured(
            server,
            artifacts,
            "browser",
            pages.SILENCE_SECONDS,
            browser,
            threads=threads,
            accelerators=accelerators,
            goal=Goal(runs=min_runs, seconds=min_seconds),
            warmup_seconds=warmup_seconds,
        )


def serve(
    artifacts: Sequence[Artifact],
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    on_url: Callable[[str], object] | None = None,
    threads: tuple[int, ...] = THREADS,
    accelerators: tuple[str, ...] | None = None,
    min_runs: int = 50,
    min_seconds: float = 2.0,
    warmup_seconds: float = 0.5,
    patience_seconds: float = OPEN_SECONDS,
) -> list[Latency]:
    """Serves the page that measures artifacts, until one browser that opened it has done so.

    The page that was opened last is the one that is measured; one that is closed or loaded again begins anew.

    Args:
        artifacts: LiteRT `Artifact`s.
        host: name or IPv4 address to listen on; `"0.0.0.0"` for all of this machine's. Whoever knows the page's address
            can read the artifacts, nobody else can.
        port: to listen on; 0 takes a free one.
        on_url: called with the address to open, once the page is there; by default it stands before the progress bar.
        threads: tuple of how many to use on the CPU.
        accelerators: tuple of `ACCELERATORS`; by default all that the browser has.
        min_runs, min_seconds, warmup_seconds: as of `edge.benchmark`.
        patience_seconds: how long to wait for somebody to open the page.

    Returns:
        A list of `Latency`, as `edge.benchmark` gives it.

    Raises:
        DeviceError: the address cannot be used; nobody opened the page in time, or it fell silent; nothing could be
            measured. What fails alone, or gives other outputs than on this machine, is a `DeviceWarning`.
        ValueError: an artifact that cannot run there, or is not the file that was written.
    """
    check(artifacts, "browser", threads, accelerators, min_runs)
    where = f"browser:{'serve' if host == '127.0.0.1' else host}"
    with Server(artifacts, host, port) as server:
        if on_url:
            on_url(server.url)
        return _measured(
            server,
            artifacts,
            where,
            patience_seconds,
            waiting="Waiting for the page to be opened" if on_url else f"Open {server.url}",
            threads=threads,
            accelerators=accelerators,
            goal=Goal(runs=min_runs, seconds=min_seconds),
            warmup_seconds=warmup_seconds,
        )


def address(where: str) -> tuple[str, int]:
    """(host, port) to listen on of the text `"serve"`, HOST or HOST:PORT.

    Raises:
        ValueError: it is none of them.
    """
    host, colon, port = ("127.0.0.1" if where == "serve" else where).partition(":")
    if not host or (colon and not port.isdecimal()):
        raise ValueError(f"Behind 'browser:' stands serve, HOST or HOST:PORT; received {where!r}.")
    return host, int(port or 0)


# ---------------------------------------------------------------- what the page is asked for


def _measured(
    server: Server,
    artifacts: Sequence[Artifact],
    device: str,
    patience_seconds: float,
    browser: Browser | None = None,
    waiting: str = "Starting the browser",
    **options: Any,
) -> list[Latency]:
    """A `Latency` of everything, by the first page that stays until the end."""
    while True:
        page = server.opened(patience_seconds, browser, waiting)
        try:
            found = _in_turns(page, artifacts, device, **options)
        except LeftError:
            continue
        except BaseException as e:
            page.end(f"It could not be measured. {e}")
            raise
        page.end("Done, the result was sent: this page can be closed.", found)
        return found


def _in_turns(
    page: Page,
    artifacts: Sequence[Artifact],
    device: str,
    *,
    threads: Sequence[int],
    accelerators: Sequence[str] | None,
    goal: Goal,
    warmup_seconds: float,
) -> list[Latency]:
    models = [
        _Model(page, number, *combination)
        for number, combination in enumerate(_combinations(page, artifacts, threads, accelerators))
    ]
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    error = None
    try:
        for model in progress(models, "Loading"):
            attempt(model, model.load)
        for model in progress(models, "Warming up"):
            attempt(model, model.warm_up, warmup_seconds)
        take_turns(models, goal, random=np.random.default_rng(0))
    except DeviceError as e:
        error = e
    enough = [model for model in models if not model.failure and model.has_enough(goal)]
    found = [model.latency(device=device, started=started) for model in enough]
    if error:
        raise DeviceError(str(error), found)
    if not found:
        why = next((model.failure for model in models if model.failure), "it has nothing of what was asked for.")
        raise DeviceError(f"{device} could run nothing: {why}")
    return found


def _combinations(
    page: Page, artifacts: Sequence[Artifact], threads: Sequence[int], accelerators: Sequence[str] | None
) -> list[tuple[Artifact, str, int]]:
    """(artifact, accelerator, threads) of all that can be measured; warns of what was asked for and cannot be."""
    ways: list[tuple[str, int]] = []
    for accelerator in accelerators or ACCELERATORS:
        if accelerator == "wasm":
            ways += [(accelerator, count) for count in threads if count == 1 or page.about.isolated]
        elif page.about.gpu and (accelerators or not page.about.software_gpu):
            ways.append((accelerator, 1))
            if page.about.software_gpu:
                _warn(f"webgpu is the CPU here, through {page.about.gpu}: its times say nothing of a GPU.")
        elif accelerators:
            _warn(
                "webgpu cannot be measured: the browser has no WebGPU adapter, or shows none to a page without HTTPS."
            )
    if not page.about.isolated and "wasm" in (accelerators or ACCELERATORS) and max(threads) > 1:
        _warn(
            "wasm can be measured with one thread only: a browser gives several to a page by HTTPS or from 127.0.0.1 "
            "(a phone on a cable: adb reverse tcp:PORT tcp:PORT)."
        )
    return [(artifact, *way) for artifact in artifacts for way in ways]


def _warn(message: str) -> None:
    warnings.warn(message, DeviceWarning, stacklevel=2)


class _Model(Timed):
    """An artifact in a frame of the page."""

    def __init__(self, page: Page, number: int, artifact: Artifact, accelerator: str, threads: int):
        super().__init__()
        self.page, self.number, self.artifact = page, number, artifact
        self.accelerator, self.threads = accelerator, threads

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.threads > 1 else ""
        return f"{self.artifact.path.name} on {self.accelerator}{threads}"

    def fail(self, reason: str) -> None:
        self.failure = f"{self} was not measured: {reason}"
        _warn(self.failure)
        with contextlib.suppress(FailedError):
            self._ask(task="drop")

    def _ask(self, **order: Any) -> Any:
        return self.page.ask(model=self.number, **order)

    def load(self) -> None:
        """Loads the file and compares its outputs on the self-test's images with this machine's."""
        files = self.page.server.tests[self.artifact.path]
        order = dict(name=self.artifact.path.name, file=files.file, accelerator=self.accelerator, threads=self.threads)
        loaded = self._ask(task="load", **order)
        spec = self.artifact.input
        given = dict(name=spec.name, shape=spec.stored_shape, dtype=spec.dtype)
        expected = [dict(name=name, file=file) for name, file in files.outputs.items()]
        errors = self._ask(task="check", input=given, images=files.images, expected=expected).errors
        compared = [name for name in files.outputs if name in errors]  # it may have signatures with different outputs
        if not compared:
            raise FailedError(f"it gives none of the outputs {', '.join(files.outputs)}.")
        for name in compared:
            error, allowed = errors[name], files.tolerances[name]["cpu" if self.accelerator == "wasm" else "gpu"]
            if error is None or error > allowed:
                error = "NaN" if error is None else f"{error:.2g}"
                raise FailedError(
                    f"its output {name} differs by {error} from this machine's, {allowed:.2g} is allowed."
                )
        self.load_ms, self.whole = loaded.load_ms, loaded.whole

    def run(self, runs: int, seconds: float = 0.0) -> list[float]:
        return self._ask(task="run", runs=runs, seconds=seconds).ms

    def latency(self, **common: Any) -> Latency:
        """The record of what was measured; `common`: its fields that all models share."""
        about = self.page.about
        environment = {"browser": about.browser, "user_agent": about.agent}
        if self.accelerator == "webgpu":
            environment |= {"gpu": about.gpu, "on_gpu": "all of it" if self.whole else "a part of it"}
        return Latency(
            artifact_path=self.artifact.path,
            cpu=cpu_name() if self.page.browser else f"{about.device or about.platform}, {about.cores} cores",
            runtime=self.page.server.runtime,
            accelerator=self.accelerator,
            threads=self.threads,
            load_ms=self.load_ms,
            environment=environment,
            **self.times,
            **common,
        )
