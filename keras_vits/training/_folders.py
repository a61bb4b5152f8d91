"""How a folder of pictures is laid out: which of its folders are classes, and which a split of the pictures."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

from keras_vits._util.pictures import is_hidden, listing, suffixes
from keras_vits._util.terminal import listed

ROLES = {  # every usual spelling of a part, in lower case
    "train": "train training trainval".split(),
    "validation": "val valid validation validate validating dev devel eval evaluation heldout holdout".split(),
    "test": "test testing tests".split(),
}
FILLERS = frozenset("set sets split data dataset images image imgs img pictures photos folder dir files".split())
DETECTION = frozenset("images labels annotations masks annotation label".split())  # of boxes and masks, no classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folders:
    """The folders of a data set.

    Attributes:
        class_names: K names, sorted.
        parts: `"train"` and, where it has a folder of its own, `"validation"` -> class name -> folder.
        test: folders that are kept for a test.
        ignored: kind of what lies beside the classes -> how many of it.
        doubt: what may be meant otherwise, a sentence, or "".
    """

    class_names: tuple[str, ...]
    parts: Mapping[str, Mapping[str, pathlib.Path]]
    test: tuple[pathlib.Path, ...] = ()
    ignored: Mapping[str, int] = dataclasses.field(default_factory=dict)
    doubt: str = ""


def read_folders(path: pathlib.Path) -> Folders:
    """The classes of a folder, and its split if it has one.

    Args:
        path: of a folder with one subfolder for each class; or with one for each part (`train`, `val`, `test` in any
            usual spelling) that has one for each class; or with one for each class that has one for each part.

    Raises:
        ValueError: no such folder, no classes, a single one, or a layout that is not clear.
    """
    if not path.is_dir():
        raise ValueError(f"No such folder: {path}. Give a folder with one subfolder of images per class.")
    names = _subfolders(path)
    if not names or not any(_holds_pictures(path / name) for name in names):
        raise ValueError(
            f"{path} has no subfolders with images: give each class a subfolder with its .jpg or .png files."
        )
    split = _split(path, names)
    if not split:
        return _of_classes(path, names)
    if "train" not in split:
        raise ValueError(f"{path} has {' and '.join(names)}, and no folder train: add what the model is to learn.")
    parts = {}
    for part, folder in split.items():
        if part != "test":
            parts[part] = {name: folder / name for name in _subfolders(folder)}
    _refuse_detection(split["train"], parts["train"])
    beside = [name for name in names if path / name not in split.values()]
    if filled := [name for name in beside if _holds_pictures(path / name)]:
        raise ValueError(
            f"{path} has {', '.join(folder.name for folder in split.values())}, which are a split, and beside them "
            f"{', '.join(filled)} with images: move those elsewhere, or into the classes."
        )
    if "validation" in parts and list(parts["train"]) != list(parts["validation"]):
        alone = [
            f"{', '.join(map(repr, only))} in {split[part]} alone"
            for part, other in (("train", "validation"), ("validation", "train"))
            if (only := sorted(set(parts[part]) - set(parts[other])))
        ]
        raise ValueError(
            f"{split['train']} and {split['validation']} must have the same classes, one subfolder each; there is "
            f"{' and '.join(alone)}."
        )
    ignored = _loose(path, *split.values())
    return Folders(
        class_names=_enough(split["train"], list(parts["train"])),
        parts=parts,
        test=(split["test"],) if "test" in split else (),
        ignored=ignored,
    )


def _of_classes(path: pathlib.Path, names: Sequence[str]) -> Folders:
    """Classes right below the folder, each of which may be split."""
    _refuse_detection(path, names)
    if len(names) == 1:
        inside = path / names[0]
        if len(_subfolders(inside)) > 1:
            raise ValueError(f"{path} holds one folder, whose own subfolders look like the data: give {inside}.")
    class_names = _enough(path, names)
    folders_in = {name: _subfolders(path / name) for name in names}
    for name in filter(_role, names):
        if set(names) & set(folders_in[name]):
            raise ValueError(
                f"{path} has the classes {', '.join(n for n in names if n != name)}, and {name} has classes of the "
                "same names: put those that train into a folder train beside it."
            )
    splits = {name: _split(path / name, folders_in[name]) for name in names}
    splits = {name: split if "train" in split and len(split) > 1 else {} for name, split in splits.items()}
    if not any(splits.values()):
        folders = {name: path / name for name in names}
        doubt = _same_inside(path, folders_in)
        return Folders(class_names=class_names, parts={"train": folders}, ignored=_loose(path), doubt=doubt)
    parts: dict[str, dict[str, pathlib.Path]] = {}
    for name, split in splits.items():
        entries = [p for p in (path / name).iterdir() if not is_hidden(p.name)]
        if set(entries) != set(split.values()) or set(split) != set(splits[names[0]]):
            raise ValueError(
                f"Some classes of {path} are split into train and the like, and {name!r} is not, or in another way: "
                "put train, val and test above the classes."
            )
        for part, folder in split.items():
            parts.setdefault(part, {})[name] = folder
    test = tuple(parts.pop("test", {}).values())
    return Folders(class_names=class_names, parts=parts, test=test, ignored=_loose(path))


def _same_inside(path: pathlib.Path, inside: Mapping[str, Sequence[str]]) -> str:
    """What to say of classes that hold nothing but the same folders: they may be parts of the data, such as folds.

    Args:
        path: of the folder.
        inside: class -> folders in it.
    """
    same = next(iter(inside.values()))
    if len(same) < 2 or any(names != same for names in inside.values()):
        return ""
    if any(_pictures_right_in(path / name) for name in inside):
        return ""
    return (
        f"Taken for classes: {listed(list(inside))}, which hold the same folders ({listed(same)}). If those are the "
        "classes, give one of the folders that hold them"
    )


def _split(path: pathlib.Path, names: Sequence[str]) -> dict[str, pathlib.Path]:
    """Part -> folder of it; nothing where the folders are classes."""
    found: dict[str, list[str]] = {}
    rests = set()
    for name in names:
        if known := _role(name):
            found.setdefault(known[0], []).append(name)
            rests.add(known[1])
    others = [name for name in names if not _role(name) and _holds_pictures(path / name)]
    if len(rests) > 1 or (len(found) < 2 and (others or rests != {""})):
        return {}  # "train_station" and "test_tube", or "bus", "car" and "train": these are classes
    if set(found) == {"train"} and not _subfolders(path / found["train"][0]):
        return {}
    if "train" not in found and others:
        return {}
    for part, given in found.items():
        if len(given) > 1:
            raise ValueError(f"{path} has {' and '.join(given)}, which both are the {part} pictures: keep one.")
    return {part: path / given[0] for part, given in found.items()}


def _role(name: str) -> tuple[str, str] | None:
    """The part that a folder's name means, and what else the name says; `None` for any other name."""
    words = [word for word in re.split(r"[\W_\d]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()) if word]
    joined = "".join(words)
    for part, spellings in ROLES.items():
        if joined in spellings:  # "hold-out"
            return part, ""
        if len(hits := [word for word in words if word in spellings]) == 1:
            return part, " ".join(word for word in words if word != hits[0] and word not in FILLERS)
    return None


def _refuse_detection(path: pathlib.Path, names: Sequence[str] | Mapping[str, object]) -> None:
    """Boxes and masks have the layout of another task: `images/train` and `labels/train`, or `train/images`."""
    lower = {name.lower() for name in names}
    inner = [name for name in names if name.lower() == "images" and any(map(_role, _subfolders(path / name)))]
    if inner or ("images" in lower and lower <= DETECTION):
        raise ValueError(
            f"{path} has {', '.join(names)}: that is the layout of object detection or segmentation. A classifier "
            "needs one subfolder of images per class."
        )


def _enough(path: pathlib.Path, names: Sequence[str]) -> tuple[str, ...]:
    if not any(_holds_pictures(path / name) for name in names):
        raise ValueError(
            f"{path} has no subfolders with images: give each class a subfolder with its .jpg or .png files."
        )
    if len(names) < 2:
        raise ValueError(f"{path} has one class, {names[0]!r}: a classifier needs at least two subfolders with images.")
    return tuple(names)


def _subfolders(path: pathlib.Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(p.name for p in path.iterdir() if not is_hidden(p.name) and p.is_dir())


def _holds_pictures(path: pathlib.Path) -> bool:
    """Whether there is a picture at any depth. One right here ends the search."""
    try:
        return _pictures_right_in(path) or bool(listing(path).pictures)
    except OSError:
        return False


def _pictures_right_in(path: pathlib.Path) -> bool:
    known = suffixes()
    with os.scandir(path) as entries:
        return any(
            pathlib.Path(e.name).suffix.lower() in known and not is_hidden(e.name) and e.is_file() for e in entries
        )


def _loose(*folders: pathlib.Path) -> dict[str, int]:
    """Kind -> number of the files that lie beside the folders of the classes, and hidden folders there."""
    count = {"hidden": 0, "beside the classes": 0}
    for folder in folders:
        for entry in folder.iterdir():
            if is_hidden(entry.name):
                count["hidden"] += 1
            elif not entry.is_dir():
                count["beside the classes"] += 1
    return {kind: n for kind, n in count.items() if n}
