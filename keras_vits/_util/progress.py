"""A progress bar for what takes long: on a terminal, after two seconds, and only if `rich` is installed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

Item = TypeVar("Item")

DELAY_SECONDS = 2.0  # work that is done sooner shows no bar


def progress(iterable: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yields the items, with a bar on stderr when they take more than about two seconds on a terminal.

    Args:
        iterable: what to go through.
        description: a few words that stand before the bar.
        total: number of items; `len(iterable)` by default, and a bar without an end where that is unknown too.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    start, bar = time.monotonic(), None
    quiet = not sys.stderr.isatty()
    try:
        for done, item in enumerate(iterable):
            if bar is None and not quiet and time.monotonic() - start > DELAY_SECONDS:
                bar = _bar(description, total, done)
                quiet = bar is None
            yield item
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done + 1)
    finally:
        if bar is not None:
            bar.stop()


def _bar(description: str, total: int | None, done: int) -> Any:
    """A started bar, or `None` without `rich`."""
    try:
        from rich import console, progress
    except ImportError:
        return None
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        console=console.Console(stderr=True),
        transient=True,
    )
    bar.add_task(description, total=total, completed=done)
    bar.start()
    return bar
