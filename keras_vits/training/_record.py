"""What a checkpoint keeps of its training beside the weights: epochs, settings, and a fingerprint of the pictures.

Epochs are not to be told from the optimizer's steps: a loss scale skips some, and another batch size has others.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import msgspec

from keras_vits._util import jsons
from keras_vits.training.data import Pictures

MEMBER = "training.json"  # in the .keras file, which is a zip archive; Keras leaves it alone
MAX_BYTES = 1 << 20


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What was trained on, and how.

    Attributes:
        epochs: that were finished.
        settings: name -> value of what decides the order and the change of the pictures, and the optimizer's groups.
        preprocessing: fields of the pictures' `Preprocessing`.
        pictures: part -> hash of its pictures.
        labels: part -> hash of its labels.
        count: part -> number of its pictures.
    """

    epochs: int
    settings: dict[str, Any]
    preprocessing: dict[str, Any]
    pictures: dict[str, str]
    labels: dict[str, str]
    count: dict[str, int]

    def differences(self, other: Record | None) -> list[str]:
        """What another training has that this one did not have, in words; nothing but the epochs may differ."""
        if other is None:
            return []
        found = []
        for ours, theirs in ((self.settings, other.settings), (self.preprocessing, other.preprocessing)):
            for name in sorted(set(ours) | set(theirs)):
                before, now = ours.get(name), theirs.get(name)
                if before != now:
                    found.append(f"{name.replace('_', ' ')} ({_told(before)}, now {_told(now)})")
        for part in sorted(set(self.pictures) | set(other.pictures), reverse=True):
            before, now = self.count.get(part), other.count.get(part)
            if before != now:
                found.append(f"number of {part} pictures ({before}, now {now})")
            elif self.pictures.get(part) != other.pictures.get(part):
                found.append(f"set of {part} pictures")
            elif self.labels.get(part) != other.labels.get(part):
                found.append(f"set of {part} labels")
        return found


def _told(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def record_of(train: Pictures, validation: Pictures, *, settings: Mapping[str, Any]) -> Record:
    """The record of a training that is about to begin, as JSON gives it back."""
    parts = {"training": train, "held-out": validation}
    preprocessing = train.preprocessing
    record = Record(
        epochs=0,
        settings=dict(settings),
        preprocessing={name: getattr(preprocessing, name) for name in preprocessing.__dataclass_fields__},
        pictures={part: pictures.fingerprint() for part, pictures in parts.items()},
        labels={part: hashlib.sha256(p.labels.astype("<i8").tobytes()).hexdigest() for part, p in parts.items()},
        count={part: len(pictures) for part, pictures in parts.items()},
    )
    return msgspec.json.decode(msgspec.json.encode(record), type=Record)


def write_record(path: str | os.PathLike[str], record: Record | None, *, epochs: int) -> None:
    """Adds the record to a .keras file that is being written."""
    if record is None:
        return
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(MEMBER, msgspec.json.encode(msgspec.structs.replace(record, epochs=epochs)))


def read_record(path: str | os.PathLike[str]) -> Record:
    """The record in a .keras file.

    Raises:
        ValueError: it has none, as files of `model.save` and of older releases.
    """
    path = pathlib.Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo(MEMBER).file_size > MAX_BYTES:
                raise KeyError(MEMBER)
            return msgspec.json.decode(archive.read(MEMBER), type=Record)
    except (KeyError, zipfile.BadZipFile, *jsons.ERRORS):
        raise ValueError(
            f"{path} does not say what it was trained on: resume from a checkpoint that a training of this release "
            "wrote, or train without resume."
        ) from None
