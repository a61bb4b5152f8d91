"""Replaces the files of a bundle: those that a bundle wrote and nobody changed, by the list of their hashes."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping

import msgspec

from keras_vits._util import files, jsons

LIST = "model/files.json"
LAST = "model/model.json"  # without it an app finds no bundle


class _List(msgspec.Struct):
    """files.json: path -> the hashes that the bundle's file may have, two of them while it is being replaced."""

    files: dict[str, list[str]]


def listed(path: pathlib.Path) -> dict[str, list[str]]:
    """What files.json of the bundle in a folder says; {} where the folder is new or empty.

    Raises:
        ValueError: the folder holds something else, or it is a file.
    """
    if not os.path.lexists(path):
        return {}
    if path.is_dir():
        if all(entry == files.LOCK or files.LEFTOVER.fullmatch(entry) for entry in os.listdir(path)):
            return {}
        try:
            found = msgspec.json.decode((path / LIST).read_bytes(), type=_List).files
        except (OSError, *jsons.ERRORS):
            found = {}
        if found and all(_inside(path, name) for name in found):
            return found
    raise ValueError(f"{path} holds something that is not a bundle: choose a new folder.")


def _inside(path: pathlib.Path, name: str) -> bool:
    """Whether a name of the list is that of a file in the folder."""
    pure = pathlib.PurePosixPath(name)
    plain = bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts and not {"\\", "\0", ":"} & set(name)
    return plain and (path / name).resolve().is_relative_to(path.resolve())


def replace(new: pathlib.Path, path: pathlib.Path) -> tuple[pathlib.PurePath, ...]:
    """Gives the files of a new bundle their places.

    Args:
        new: the bundle, directly in what `files.temporary` yields.
        path: where it goes.

    Returns:
        Paths within the folder of what stayed there: what no bundle wrote, and source files that were changed.

    Raises:
        ValueError: something is where a file of the bundle goes. Nothing has been changed then.
        OSError: the disk is full, and so on.
    """
    made = {file.relative_to(new).as_posix(): files.sha256(file) for file in sorted(new.rglob("*")) if file.is_file()}
    _write_list(new, {name: [digest] for name, digest in made.items()})
    files.ready(new)
    if not path.is_dir():
        os.replace(new, path)
        files.sync_entry(path.parent)
        return ()
    with files.alone(path):
        before = listed(path)
        ours, changed = _sorted(path, before, made)
        fresh = {name for name in made if name not in changed and ours.get(name) != made[name]}
        gone = {name for name in ours if name not in made}
        if fresh or gone:
            both = {name: sorted({*before.get(name, ()), *filter(None, [made.get(name)])}) for name in {*before, *made}}
            _write_list(path, both)
            if LAST in ours:
                (path / LAST).unlink()
            for name in sorted(fresh - {LAST}):
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(new / name, path / name)
            for name in sorted(gone - {LAST}):
                (path / name).unlink()
                _prune((path / name).parent, path)
            for folder in {(path / name).parent for name in fresh}:
                files.sync_entry(folder)
            os.replace(new / LAST, path / LAST)
        _write_list(path, {name: [digest] for name, digest in made.items()})
        return _kept(path, made, changed)


def _sorted(
    path: pathlib.Path, before: Mapping[str, list[str]], made: Mapping[str, str]
) -> tuple[dict[str, str], set[str]]:
    """(name -> hash of what a bundle wrote, names of what somebody changed or put there) of the files in a folder."""
    ours, changed = {}, set()
    for name in sorted({*before, *made}):
        file = path / name
        for parent in file.relative_to(path).parents:
            if (path / parent).exists() and not (path / parent).is_dir():
                raise ValueError(f"{path / parent} is a file, and the bundle has a folder there: move it away first.")
        if file.is_dir():
            raise ValueError(f"{file} is a folder, and the bundle has a file there: move it away first.")
        if not os.path.lexists(file):
            continue
        digest = files.sha256(file) if file.is_file() and not file.is_symlink() else ""
        if digest in before.get(name, ()) or digest == made.get(name):
            ours[name] = digest
        elif name in made and "/" in name:
            raise ValueError(
                f"{file} is not what the bundle wrote there, and would not fit the new model: move it away first."
            )
        else:
            changed.add(name)
    return ours, changed


def _prune(folder: pathlib.Path, path: pathlib.Path) -> None:
    """Removes a folder of the bundle that has become empty, and those that it lies in."""
    while folder != path and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _kept(path: pathlib.Path, made: Mapping[str, str], changed: set[str]) -> tuple[pathlib.PurePath, ...]:
    """What of a folder is not the bundle's; a folder of others is one entry."""
    folders = {str(parent) for name in made for parent in pathlib.PurePosixPath(name).parents}
    found = [pathlib.PurePath(name) for name in changed]
    for folder in folders:
        for entry in (path / folder).iterdir():
            name = entry.relative_to(path).as_posix()
            mine = name in made or name in folders or name in changed or name == LIST
            if not mine and entry.name != files.LOCK and not files.LEFTOVER.fullmatch(entry.name):
                found.append(pathlib.PurePath(name))
    return tuple(sorted(found))


def _write_list(path: pathlib.Path, content: Mapping[str, list[str]]) -> None:
    with files.writing(path / LIST) as temporary:
        text = json.dumps({"files": dict(sorted(content.items()))}, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
