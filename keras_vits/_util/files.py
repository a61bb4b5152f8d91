"""Files that are written whole or not at all, one writer of a folder at a time, and their hashes.

What is written lies in a temporary folder beside its place, `.keras_vits_<8 letters>`, until it is complete and on the
disk; then it takes its name in one step. Whoever writes holds the lock `.keras_vits_<8 letters>.lock` beside the
temporary folder from before it is made until after it is removed, and the system gives the lock free however the
process ends. So a temporary folder whose lock is free is a leftover, whatever its age, and the next writer in the place
removes it (`sweep`). Only names of this form are ever removed, and nothing that somebody else put into the place.

A folder cannot take the name of another one in one step: the old one moves into `old/` of the temporary folder first.
A process that is killed between the two moves leaves the name free, and the next sweep moves the old folder back.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
import secrets
import shutil
import string
import time
from collections.abc import Collection, Iterator

LOCK = ".keras_vits.lock"  # in a folder that is being written
LEFTOVER = re.compile(r"(\.keras_vits_[a-z0-9]{8})(\.lock)?")  # a temporary folder, and the lock of it
LONGEST = 200  # bytes of a name: a file system allows 255, with what is added to a name
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # Windows' devices
FRESH_SECONDS = 2.0  # of a file system that keeps the times of files in whole or even seconds

_hashes: dict[pathlib.Path, tuple[tuple[object, ...], str]] = {}  # path -> what the file system says of it, its hash


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def name_bytes(path: pathlib.PurePath) -> bytes:
    """A path to be hashed; a name may be no UTF-8."""
    return path.as_posix().encode("utf-8", "surrogateescape")


def sha256(path: pathlib.Path) -> str:
    """Hash of a file's bytes; of a folder's files, in sorted order, each path within it and then its bytes."""
    digest = hashlib.sha256()
    for file in _files(path):
        if path.is_dir():
            digest.update(name_bytes(file.relative_to(path)))
        with open(file, "rb") as f:
            hashlib.file_digest(f, lambda: digest)  # goes on with this one
    return digest.hexdigest()


def known_sha256(path: pathlib.Path) -> str:
    """The same, read again only where a file's inode, size or times are not those of the last reading.

    A file that was changed within `FRESH_SECONDS` before it is read is read again the next time, for its times may not
    tell two changes apart.
    """
    path = path.absolute()
    began = time.time()
    state = _state(path)
    kept = _hashes.get(path)
    if kept and kept[0] == state:
        return kept[1]
    found = sha256(path)
    newest = max((max(s.st_mtime, s.st_ctime) for s in (file.stat() for file in _files(path))), default=0.0)
    if newest < began - FRESH_SECONDS and _state(path) == state:
        _hashes[path] = state, found
    else:
        _hashes.pop(path, None)
    return found


def _state(path: pathlib.Path) -> tuple[object, ...]:
    stats = ((file, file.stat()) for file in _files(path))
    return tuple((str(file), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in stats)


def size(path: pathlib.Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in _files(path))


def plain_name(name: object, what: str = "name") -> str:
    """A name that is one plain file name on every system.

    Raises:
        ValueError: it is no text, is empty or too long, begins with a dot, has characters that no file name has (`/`,
            a colon, a line break and so on), or is the name of a device on Windows.
    """
    plain = isinstance(name, str) and name == name.strip() and not name.startswith(".") and not name.endswith(".")
    if plain and isinstance(name, str):
        plain = bool(name) and not re.search(r'[\x00-\x1f\x7f\ud800-\udfff/\\:*?"<>|]', name)
        plain = plain and not RESERVED.fullmatch(name) and len(name.encode(errors="replace")) <= LONGEST
    if not plain or not isinstance(name, str):
        shown = repr(name) if len(repr(name)) <= 80 else f"{repr(name)[:80]}... of {len(str(name))} characters"
        raise ValueError(
            f"{what} must be one plain file name of at most {LONGEST} bytes, without folders, a leading dot or any of "
            f'/ \\ : * ? " < > |; received {shown}.'
        )
    return name


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
        _unlocked(lock)


def _unlocked(lock: object) -> None:
    """Removes the file of a lock, and releases it."""
    with contextlib.suppress(OSError):  # Windows removes it at the release, and not before
        os.unlink(lock.lock_file)  # type: ignore[attr-defined]
    lock.release()  # type: ignore[attr-defined]


@contextlib.contextmanager
def temporary(folder: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the empty folder `new` of a new temporary folder inside this one.

    All of it goes with the block, or is swept by the next writer there.

    Raises:
        ValueError: the folder cannot be written.
    """
    import filelock

    folder = pathlib.Path(folder)
    letters = string.ascii_lowercase + string.digits
    made = folder / f".keras_vits_{''.join(secrets.choice(letters) for _ in range(8))}"
    lock = filelock.FileLock(f"{made}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        lock.acquire()
        (made / "new").mkdir(parents=True)
    except OSError as e:
        if lock.is_locked:
            _unlocked(lock)
        raise ValueError(f"Cannot write to {folder}: {e.strerror or e}. Choose another folder.") from None
    try:
        yield made / "new"
    finally:
        _remove(made)
        _unlocked(lock)


def sweep(folder: pathlib.Path) -> None:
    """Removes what killed processes left in a folder; what they moved aside and did not replace is moved back."""
    import filelock

    found = [match for entry in os.scandir(folder) if (match := LEFTOVER.fullmatch(entry.name))]
    for name in sorted({match[1] for match in found}):
        lock = filelock.FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(blocking=False)
        except (OSError, filelock.Timeout):  # it belongs to somebody who writes just now, or it is not ours to remove
            continue
        try:
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                _remove(folder / name)
        finally:
            _unlocked(lock)


def _remove(made: pathlib.Path) -> None:
    """Removes a temporary folder, and first moves back what had to make room and was not replaced."""
    with contextlib.suppress(OSError):
        for old in (made / "old").iterdir():
            if not os.path.lexists(made.parent / old.name):
                os.rename(old, made.parent / old.name)
    shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def writing(path: str | pathlib.Path, *, ours: Collection[str] = ()) -> Iterator[pathlib.Path]:
    """Yields a temporary path in the same folder; it takes the name `path` only when the block ends without an error.

    Args:
        path: of the file or folder.
        ours: see `check_place`.

    Raises:
        ValueError: the folder cannot be written, the disk is full, or something lies there that must not be replaced;
            see `check_place`. Nothing is left behind.
    """
    path = pathlib.Path(path)
    with temporary(path.parent) as folder, telling(path):
        yield folder / path.name
        place(folder / path.name, path, ours)


@contextlib.contextmanager
def telling(path: pathlib.Path) -> Iterator[None]:
    """Says which file could not be written, and why, in place of the system's own error."""
    try:
        yield
    except OSError as e:
        raise ValueError(f"Could not write {path}: {e.strerror or e}. Nothing was left behind.") from e


def check_place(new: pathlib.Path, path: pathlib.Path, ours: Collection[str] = ()) -> None:
    """Refuses to let a new file or folder replace what somebody else may have put at its place.

    Args:
        new: what is to be written.
        path: where.
        ours: names in a folder there that go with all that is in them.

    Raises:
        ValueError: a folder is where a file goes, a file where a folder goes, or the folder there holds a file that the
            new one has not.
    """
    if not new.is_dir():
        if path.is_dir():
            raise ValueError(f"{path} is a folder, and a file is to be written there: move it, or choose another name.")
        return
    if not os.path.lexists(path):
        return
    if not path.is_dir() or path.is_symlink():
        raise ValueError(f"{path} is a file, and a folder is to be written there: move it, or choose another name.")
    for file in sorted(path.rglob("*")):
        own = new / file.relative_to(path)
        if file.relative_to(path).parts[0] in ours:
            continue
        if file.is_symlink() or not own.exists() or own.is_dir() != file.is_dir():
            raise ValueError(f"{path} holds {file.relative_to(path)}, which nothing here wrote: move it away first.")


def place(new: pathlib.Path, path: pathlib.Path, ours: Collection[str] = ()) -> None:
    """Gives what is complete in a temporary folder its name, after the disk has it.

    Args:
        new: the file or folder, directly in `new/` of a folder that `temporary` made.
        path: its name, in the folder beside the temporary one.
        ours: see `check_place`.

    Raises:
        ValueError: see `check_place`.
        OSError: the disk is full, and so on.
    """
    check_place(new, path, ours)
    ready(new)
    if new.is_dir() and path.is_dir():
        old = new.parent.parent / "old"
        old.mkdir()
        os.rename(path, old / path.name)  # `_remove` moves it back if the next line fails, or is not reached
        os.rename(new, path)
    else:
        os.replace(new, path)
    sync_entry(path.parent)


def ready(new: pathlib.Path) -> None:
    """Gives what is complete in a temporary folder the mode of new files and folders here (some libraries make theirs
    readable for one user alone), and waits until the disk has it.

    Raises:
        OSError: the disk is full, and so on.
    """
    probe = new.parent.parent / "mode"
    probe.touch()
    file = probe.stat().st_mode & 0o666
    probe.unlink()
    folder = file | (file & 0o444) >> 2  # whoever may read it may also enter it
    for path in [new, *new.rglob("*")] if new.is_dir() else [new]:
        if not path.is_symlink():
            executable = (file & 0o444) >> 2 if path.stat().st_mode & 0o100 else 0
            os.chmod(path, folder if path.is_dir() else file | executable)
            sync_entry(path)


def sync_entry(path: pathlib.Path) -> None:
    """Waits until the disk has a file's bytes, or a folder's names."""
    is_folder = path.is_dir()
    try:
        number = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | getattr(os, "O_BINARY", 0))
    except OSError:
        if is_folder:
            return  # Windows opens none
        raise
    try:
        os.fsync(number)
    except OSError:
        if not is_folder:
            raise
    finally:
        os.close(number)
