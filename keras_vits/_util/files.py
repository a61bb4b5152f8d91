"""Files that are written whole or not at all, one writer of a folder at a time, and their hashes."""

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile


def _files(path):
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def sha256(path):
    digest = hashlib.sha256()
    for file in _files(path):
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode())
        with open(file, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def size(path):
    return sum(file.stat().st_size for file in _files(path))


@contextlib.contextmanager
def alone(folder):
    """Holds a folder against other writers, processes and threads: a file and its .json are written as one.

    Raises:
        ValueError: the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise ValueError(f"Cannot write to {folder}: {e.strerror or e}. Choose another folder.") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(path):
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
