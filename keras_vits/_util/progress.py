"""Progress bars of what takes long: on a terminal, after two seconds, and only if `rich` is installed.

There is one display for the whole process, with a row for each piece of work that takes long. It is drawn on the
terminal behind stderr. While it is there, whole lines that are written to the same terminal go above it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from keras_vits._util.terminal import duplicate_of_stderr, visible

Item = TypeVar("Item")

DELAY_SECONDS = 2.0  # work that is done sooner shows no bar
BAR_CHARACTERS = 24
REFRESHES_PER_SECOND = 4


def progress(iterable: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yields the items, with a bar when they take more than two seconds on a terminal, be it the first of them.

    Args:
        iterable: what to go through.
        description: a few words that stand before the bar.
        total: number of items; `len(iterable)` by default, and a bar without an end where that is unknown too.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with _shown(_Row(description, total)) as row:
        for item in iterable:
            row.look()
            yield item
            row.move()


@contextlib.contextmanager
def working(description: str, *, when_idle: bool = False) -> Iterator[None]:
    """Shows how long a block takes if it takes more than two seconds on a terminal.

    Args:
        description: a few words that stand before the bar.
        when_idle: whether it is shown only while nothing else is.
    """
    with _shown(_Row(description, None, when_idle)):
        yield


def clear() -> None:
    """Takes everything off the terminal, also work that an exception left and that still waits to be cleaned up."""
    _display.clear()


class _Row:
    """A piece of work: `done` items of `total`, `None` where it has no end that is known."""

    def __init__(self, description: str, total: int | None, when_idle: bool = False) -> None:
        self.description, self.total, self.when_idle = description, total, when_idle
        self.start, self.done = time.monotonic(), 0
        self.task: Any = None  # of the display
        self.stream = sys.stderr
        self.over = self.stream is None or not self.stream.isatty()  # a windowed program has none

    def look(self) -> None:
        """Shows itself when it is time: a timer that waits for a busy interpreter may be late."""
        if self.task is None and not self.over and time.monotonic() - self.start > DELAY_SECONDS:
            _display.add(self)

    def move(self) -> None:
        """One item more is done."""
        self.done += 1
        if self.task is not None:
            _display.update(self)


@contextlib.contextmanager
def _shown(row: _Row) -> Iterator[_Row]:
    if row.over:
        yield row
        return
    timer = threading.Timer(DELAY_SECONDS, _display.add, [row])
    timer.daemon = True
    timer.start()
    try:
        yield row
    finally:
        timer.cancel()
        _display.remove(row)


class _Display:
    """What is drawn at the bottom of the terminal."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.rows: list[_Row] = []  # that are shown, the outermost first
        self.stream: Any = None  # the terminal, as the program has it
        self.screen: Any = None  # the console that it is drawn on
        self.bars: Any = None
        self.live: Any = None
        self.above: list[tuple[str, _Above]] = []

    def add(self, row: _Row) -> None:
        """Shows a row, unless its work is over."""
        with self.lock:
            if row.over or row.task is not None:
                return
            if self.bars is None and not self._open(row.stream):
                row.over = True
                return
            self.rows.append(row)
            description = visible(row.description)
            row.task = self.bars.add_task(description, total=row.total, completed=row.done, row=row)
            self._arrange()
            self.live.refresh()

    def update(self, row: _Row) -> None:
        """Shows how much of it is done."""
        with self.lock:
            if not row.over:
                self.bars.update(row.task, completed=row.done)

    def remove(self, row: _Row) -> None:
        """Takes a row away, and the display with the last one."""
        with self.lock:
            row.over = True
            if row in self.rows:
                self.rows.remove(row)
                self.bars.remove_task(row.task)
                self._arrange()
                if not self.rows:
                    self._close()

    def clear(self) -> None:
        """Takes all rows away."""
        with self.lock:
            for row in self.rows[:]:
                self.remove(row)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """The terminal without the display."""
        with self.lock:
            if self.live is not None:
                self.live.stop()
            try:
                yield
            finally:
                if self.live is not None:
                    self._start()

    def _arrange(self) -> None:
        busy = any(not row.when_idle for row in self.rows)
        for row in self.rows:
            if row.when_idle:
                self.bars.update(row.task, visible=not busy)

    def _open(self, stream: Any) -> bool:
        """Whether there is something to draw with."""
        try:
            from rich import console, progress, text
        except ImportError:
            return False

        class Count(progress.ProgressColumn):
            """How many are done, or for how long it has been at it."""

            def render(self, task: Any) -> text.Text:
                row = task.fields["row"]
                if row.total is None:
                    return text.Text(f"{time.monotonic() - row.start:.0f} s")
                return text.Text(f"{row.done}/{row.total}")

        self.stream, own = stream, _own(stream)
        self.screen = console.Console(file=own, markup=False, highlight=False)
        self.bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(BAR_CHARACTERS),
            Count(),
            progress.TimeRemainingColumn(),
            console=self.screen,
        )
        for name in ("stdout", "stderr"):
            current = getattr(sys, name)
            if current is not None and current.isatty():
                self.above.append((name, _Above(self, current)))
                setattr(sys, name, self.above[-1][1])
        self._start()
        return True

    def _start(self) -> None:
        from rich.live import Live

        self.live = Live(
            get_renderable=self.bars.get_renderable,
            console=self.screen,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.live.start(refresh=True)

    def _close(self) -> None:
        self.live.stop()
        self.live = self.bars = None
        for name, above in self.above:
            above.end()
            if getattr(sys, name) is above:
                setattr(sys, name, above.stream)
        self.above = []
        if self.screen.file is not self.stream:
            self.screen.file.close()


def _own(stream: Any) -> Any:
    """A terminal's stream for the display alone: what is done to `sys.stderr` or its descriptor does not concern it."""
    try:
        number = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return stream
    copy = duplicate_of_stderr() if number == 2 else os.dup(number)
    return io.TextIOWrapper(os.fdopen(copy, "wb"), stream.encoding, "backslashreplace")


class _Above:
    """Stands for `sys.stdout` or `sys.stderr` while the display is there: whole lines go above it."""

    def __init__(self, display: _Display, stream: Any) -> None:
        self.display, self.stream, self.held = display, stream, ""

    def write(self, text: str) -> int:
        with self.display.lock:
            lines, newline, self.held = (self.held + text).rpartition("\n")
            if newline:
                with self.display.away():
                    self.stream.write(lines + newline)
                    self.stream.flush()
            elif self.display.live is None:  # somebody kept this object
                self.end()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        """What has no line break yet waits for it."""

    def end(self) -> None:
        """Writes what waits."""
        held, self.held = self.held, ""
        self.stream.write(held)
        self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


_display = _Display()
