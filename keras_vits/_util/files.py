"""Files that are written whole or not at all, one writer of a folder at a time, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

LOCK = ".keras_vits.lock"  # in a folder that is being written


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def sha256(path: pathlib.Path) -> str:
    """Hash of a file's bytes; of a folder's files, in sorted order, each path within it and then its bytes."""
    digest = hashlib.sha256()
    for file in _files(path):
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode())
        with open(file, "rb") as f:
            hashlib.file_digest(f, lambda: digest)  # goes on with this one
    return digest.hexdigest()


def size(path: pathlib.Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in _files(path))


@contextlib.contextmanager
def alone(folder: str | pathlib.Path) -> Iterator[None]:
    """Holds a folder against other writers, processes and threads: a file and its .json are written as one.

    The lock is a hidden file in the folder itself, so that it holds for everybody who reaches the folder, by whatever
    path and from whatever machine. It is removed by whoever holds it, as the last thing before it is released: those
    who wait see that the file they wait for has lost its name, and open the next one.

    Args:
        folder: made if it does not exist.

    Raises:
        ValueError: the folder cannot be written.
    """
    import filelock

    folder = pathlib.Path(folder)
    lock = filelock.FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as e:
        raise ValueError(f"Cannot write to {folder}: {e.strerror or e}. Choose another folder.") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes it at the release, and not before
            os.unlink(lock.lock_file)
        lock.release()


@contextlib.contextmanager
def writing(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path in the same folder; it takes the name `path` only when the block ends without an error.

    Raises:
        ValueError: the folder cannot be written, or the disk is full. Nothing is left behind.
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as e:
        raise ValueError(f"Cannot write to {path.parent}: {e.strerror or e}. Choose another folder.") from None
    temporary = folder / path.name
    try:
        try:
            yield temporary
            if path.is_dir():
                os.rename(path, folder / "replaced")
            os.replace(temporary, path)
        except OSError as e:
            raise ValueError(f"Could not write {path}: {e.strerror or e}. Nothing was left behind.") from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)
