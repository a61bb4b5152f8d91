"""Chromium or Chrome of this machine: where it is, and a process of it that never outlives the one that wants it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from ..records import DeviceError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"

# Starts a browser with a profile of its own and ends it with its stdin: with the process that wants it, however that
# ends. The browser's own processes are one group.
WATCH = """
import os, signal, subprocess, sys, tempfile, threading
with tempfile.TemporaryDirectory(prefix="keras_vits_", ignore_cleanup_errors=True) as profile:
    browser = subprocess.Popen([*sys.argv[1:], "--user-data-dir=" + profile], stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, start_new_session=True,
                               env={**os.environ, "TMPDIR": profile})  # it leaves folders there when it is killed
    def end():
        if hasattr(os, "killpg"):
            try:
                os.killpg(browser.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        else:
            browser.kill()
    threading.Thread(target=lambda: (sys.stdin.read(), end()), daemon=True).start()
    code = browser.wait()
    end()
sys.exit(code if code >= 0 else 128 - code)
"""


def chromium() -> str:
    """Path of Chromium or Chrome: the environment variable CHROME (it may name a script that adds options), or what the
    PATH has.

    Raises:
        DeviceError: there is none.
    """
    named = os.environ.get("CHROME")
    for name in [named] if named else [*NAMES, MAC]:
        if path := shutil.which(name):
            return path
    if named:
        raise DeviceError(f"The environment variable CHROME names {named}, which is not a program: correct it.")
    raise DeviceError(
        "There is no Chromium or Chrome: install one, or set the environment variable CHROME to its path."
    )


def flags(accelerators: Sequence[str] | None) -> list[str]:
    """Options of a browser without a window, in which nothing is held back."""
    flags = "--headless --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    flags += " --disable-sync --disable-breakpad --disable-dev-shm-usage"
    flags += " --disable-background-timer-throttling --disable-renderer-backgrounding"
    if getattr(os, "geteuid", lambda: 1)() == 0:
        flags += " --no-sandbox"  # Chromium refuses to start as root otherwise
    flags += " --disable-gpu" if accelerators and "webgpu" not in accelerators else " --enable-unsafe-webgpu"
    return flags.split()


class Browser:
    """A process that ends with the `with` block, and with this process however that ends.

    Args:
        command: the program, its options and the address to open.
    """

    def __init__(self, command: Sequence[str]):
        self.command = command

    def __enter__(self) -> Browser:
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", WATCH, *self.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the browser
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def check(self) -> None:
        """Raises `DeviceError` if it has ended."""
        if (code := self.process.poll()) is not None:
            raise DeviceError(f"The browser ended with code {code}: {self.last_words()}")

    def last_words(self) -> str:
        """The last line that it wrote to stderr."""
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().decode(errors="replace").split("\n")]
        return next(filter(None, reversed(lines)), "it left no message")
