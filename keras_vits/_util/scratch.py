"""Where libraries leave their temporary files: in a folder of ours, which goes with the process, however it ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import pathlib
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from keras_vits._util import files

ALIASES = ("tempfile", "_tempfile")

_kept: dict[int, tuple[pathlib.Path, contextlib.ExitStack]] = {}  # process -> its folder: a fork makes its own
_one = threading.RLock()


def scratch() -> pathlib.Path:
    """A folder of this process in the system's temporary one; those of processes that were killed go first.

    Raises:
        ValueError: no folder can be made there.
    """
    with _one:
        process = os.getpid()
        if process not in _kept or not _kept[process][0].is_dir():
            stack = contextlib.ExitStack()
            _kept[process] = stack.enter_context(files.temporary(tempfile.gettempdir())), stack
        return _kept[process][0]


@atexit.register
def close() -> None:
    """Removes the folder of this process; that of the process that it is a fork of stays."""
    with _one:
        if os.getpid() in _kept:
            _kept.pop(os.getpid())[1].close()


class _Within:
    """The module `tempfile`, but what is to be made nowhere in particular is made in one folder."""

    MAKERS = ("mkdtemp", "mkstemp", "TemporaryDirectory", "TemporaryFile", "NamedTemporaryFile")

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def __getattr__(self, name: str) -> Any:
        made = getattr(tempfile, name)
        if name not in self.MAKERS:
            return made
        return lambda *args, **options: made(*args, **{**options, "dir": options.get("dir") or str(self.folder)})


@contextlib.contextmanager
def redirected(*modules: str) -> Iterator[pathlib.Path]:
    """A new folder in `scratch`, in which these modules make their temporary files; one thread at a time.

    The folder stays: whoever asked for it removes it.

    Args:
        modules: names of modules that may have `tempfile` under this name, or as `_tempfile`. Those that are not
            imported, or have it no more, are left as they are: their files lie in the system's folder then.
    """
    with _one:
        folder = pathlib.Path(tempfile.mkdtemp(dir=scratch()))
        found = [(sys.modules[name], alias) for name in modules if name in sys.modules for alias in ALIASES]
        found = [(module, alias) for module, alias in found if getattr(module, alias, None) is tempfile]
        for module, alias in found:
            setattr(module, alias, _Within(folder))
        try:
            yield folder
        finally:
            for module, alias in found:
                setattr(module, alias, tempfile)
