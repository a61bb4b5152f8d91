"""The `keras-vits` command: every verb is one call of the public API.

What it needs is imported inside of `main`, so that Ctrl-C is answered from the first moment on.
"""

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

__all__ = ["app", "main", "use_backend"]

STOPPED = 130  # exit code after Ctrl-C, as shells have it


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The console script. Exit code 2 and one line for a user's mistake, 130 after Ctrl-C, 1 for an error of ours."""
    with _stoppable():
        try:
            from keras_vits.cli._run import run

            code = run(list(sys.argv[1:] if args is None else args))
        except KeyboardInterrupt:  # between what `run` guards
            _say_stopped()
            code = STOPPED
        if code == STOPPED and args is None:
            _leave()
    sys.exit(code)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, but while a module is being imported it ends the process: extension modules
    that are left half-initialised crash when Python ends."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where it is to be ignored, as by nohup
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        at = frame
        while at is not None:
            if at.f_code.co_filename == "<frozen importlib._bootstrap>":
                _say_stopped()
                _leave()
            at = at.f_back
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _say_stopped() -> None:
    """Straight to the terminal: Python's own streams may be in the middle of a line."""
    with contextlib.suppress(Exception):
        sys.modules["keras_vits._util.progress"].clear()
    number = 2
    with contextlib.suppress(Exception):
        number = sys.modules["keras_vits._util.terminal"].duplicate_of_stderr()
    with contextlib.suppress(OSError):
        os.write(number, b"Stopped.\n")


def _leave() -> NoReturn:
    """Ends the process without Python's own end, in which threads of native code that is still at work crash."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(STOPPED)


def __getattr__(name: str) -> Any:
    """What the verbs are made of, at the first use."""
    if name in ("app", "use_backend"):
        return getattr(importlib.import_module(f"{__name__}._run"), name)
    if name in ("_app", "_evidence", "_files", "_models", "_predict"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
