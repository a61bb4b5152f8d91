"""Labelled pictures to train on: a folder with one subfolder per class, or scikit-learn's handwritten digits.

Pictures are kept as 8-bit pixels of the model's size and normalised as they are read, so that augmentation works on
pixels with Pillow: 0.1 ms for a picture of 64 x 64, where Keras' layers take 0.4 ms on TensorFlow, 1.7 ms on JAX and
5 ms on PyTorch (a CPU, batches of 64).
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np

from keras_vits._util.files import name_bytes
from keras_vits._util.limits import number, whole
from keras_vits._util.pictures import listing
from keras_vits._util.terminal import counted, unreadable
from keras_vits.preprocess import Preprocessing
from keras_vits.training._folders import read_folders

IN_MEMORY_BYTES = 1 << 29  # pictures that take more are read from their files again in every epoch
HASHED_FILES, HASHED_BYTES = 256, 1 << 16  # of those: evenly spaced files, and the beginning of each, in a fingerprint


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """N labelled pictures and how they become a model's input.

    Attributes:
        sources: their pixels, uint8 (N,H,W,C), or the N paths of files that are read when needed.
        labels: class numbers, int32 (N,).
        class_names: K names in the order of the class numbers.
        preprocessing: the `Preprocessing` that `images` applies.
    """

    sources: np.ndarray | tuple[pathlib.Path, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(self.sources):
            raise ValueError(
                f"labels are a class number (N,) for each of the {len(self.sources)} pictures; received "
                f"{labels.dtype} of shape {labels.shape}."
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            raise ValueError(
                f"labels are class numbers from 0 to {len(self.class_names) - 1}, by class_names; received numbers "
                f"from {labels.min()} to {labels.max()}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Hash of the pictures, in their order: of their pixels, or of the names and sizes of files that stay there.

        Of such files 256, evenly spaced, are read, too: the first 64 KB of each tell pictures apart that were replaced
        by others of equal size, at a cost that does not grow with the folder.
        """
        digest = hashlib.sha256()
        if isinstance(self.sources, np.ndarray):
            digest.update(f"{self.sources.dtype} {self.sources.shape}".encode())
            digest.update(np.ascontiguousarray(self.sources).data)
        else:
            for file in self.sources:
                name = name_bytes(pathlib.PurePath(file.parent.name, file.name))
                digest.update(name + f" {file.stat().st_size}\n".encode())
            for i in _spaced(len(self), HASHED_FILES):
                with open(self.sources[i], "rb") as content:
                    digest.update(content.read(HASHED_BYTES))
        return digest.hexdigest()

    def pixels(self, which: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Pixels (n,H,W,C) uint8, RGB or grey, of the pictures at these indices (array or slice); all by default."""
        if isinstance(self.sources, np.ndarray):
            return self.sources[which]
        return np.stack([self.preprocessing.pixels(self.sources[i]) for i in np.arange(len(self))[which]])

    def images(self, which: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The model's input (n,H,W,C) float32 of the pictures at these indices (array or slice); all by default."""
        return self.preprocessing.normalize(self.pixels(which))

    def take(self, count: int) -> Self:
        """At most `count` of the pictures, evenly spaced, so that every class of a sorted folder keeps its share."""
        if count >= len(self):
            return self
        which = _spaced(len(self), count)
        given = self.sources
        sources = given[which] if isinstance(given, np.ndarray) else tuple(given[i] for i in which)
        return dataclasses.replace(self, sources=sources, labels=self.labels[which])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """A training and a held-out set.

    Attributes:
        name: `"digits"`, or the folder's name.
        train: the `Pictures` to fit on.
        validation: the held-out `Pictures`.
        skipped: paths of the files that are no readable image.
        ignored: kind of file -> how many of it are no pictures, such as `".txt"` or `"hidden"`.
        test: pictures that a folder of its own keeps for a test, which neither trains nor is held out.
        doubt: what of the folder's layout may be meant otherwise, a sentence, or "".
    """

    name: str
    train: Pictures
    validation: Pictures
    skipped: tuple[pathlib.Path, ...] = ()
    ignored: Mapping[str, int] = dataclasses.field(default_factory=dict)
    test: int = 0
    doubt: str = ""

    def warning(self) -> str:
        """One line that counts and names what was skipped, ignored and kept away, or ""."""
        said = []
        if self.skipped:
            said.append(unreadable(self.skipped))
        if self.ignored:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.ignored.items())
            total = sum(self.ignored.values())
            which = "that is no picture" if total == 1 else "that are no pictures"
            said.append(f"Ignored {counted(total, 'file')} {which}: {kinds}")
        if self.test:
            said.append(f"Kept {counted(self.test, 'picture')} for a test away from the training")
        if self.doubt:
            said.append(self.doubt)
        return ". ".join(said)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random affine changes of a picture, each drawn evenly from its range. Empty corners are black.

    Attributes:
        shift: largest shift to each side, as a fraction of the side.
        rotation: largest angle to each side, in degrees.
        zoom: largest change of the size, as a fraction.
        flip: whether half of the pictures are mirrored left to right; not for digits or letters.
    """

    shift: float = 0.1
    rotation: float = 15.0
    zoom: float = 0.15
    flip: bool = False

    def __post_init__(self) -> None:
        of_degrees = "an angle in [0, 360) degrees"
        object.__setattr__(self, "shift", number("shift", self.shift, 0, 1, "a fraction in [0, 1)"))
        object.__setattr__(self, "rotation", number("rotation", self.rotation, 0, 360, of_degrees))
        object.__setattr__(self, "zoom", number("zoom", self.zoom, 0, 1, "a fraction in [0, 1)"))

    def __call__(self, pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Changes pixels (n,H,W,C) uint8, with the numpy generator `random`."""
        from PIL import Image

        bilinear = Image.Resampling.BILINEAR
        n, (height, width, channels) = len(pixels), pixels.shape[1:]
        angles = np.deg2rad(random.uniform(-self.rotation, self.rotation, n))
        scales = 1 / random.uniform(1 - self.zoom, 1 + self.zoom, n)
        shifts = random.uniform(-self.shift, self.shift, (n, 2)) * (width, height)
        flips = np.where(self.flip & (random.random(n) < 0.5), -1, 1)
        cx, cy = width / 2, height / 2
        changed = np.empty_like(pixels)
        for i, (angle, scale, (dx, dy), flip) in enumerate(zip(angles, scales, shifts, flips, strict=True)):
            a, b = scale * np.cos(angle) * flip, scale * np.sin(angle)  # output pixel (x, y) -> input pixel
            d, e = -scale * np.sin(angle) * flip, scale * np.cos(angle)
            c, f = cx + dx - a * cx - b * cy, cy + dy - d * cx - e * cy
            picture = Image.fromarray(pixels[i, ..., 0] if channels == 1 else pixels[i])
            picture = picture.transform((width, height), Image.Transform.AFFINE, (a, b, c, d, e, f), bilinear)
            changed[i] = np.asarray(picture).reshape(height, width, channels)
        return changed


class Batches(keras.utils.PyDataset):
    """Batches (images (B,H,W,C) float32, one-hot labels (B,K) float32) of `Pictures`, for `model.fit`.

    The order and the augmentation depend on seed, epoch and batch number alone: a resumed training sees what an
    uninterrupted one would have seen.

    Args:
        pictures: the `Pictures`.
        batch_size: B; the last batch of an epoch may be smaller.
        augmentation: an `Augmentation`, or `None`.
        shuffle: whether every epoch has its own random order.
        seed: seed of the order and of the augmentation.
        epoch: number of the first epoch, from 0.
    """

    def __init__(
        self,
        pictures: Pictures,
        batch_size: int = 32,
        *,
        augmentation: Augmentation | None = None,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.pictures, self.batch_size = pictures, whole("batch_size", batch_size)
        self.augmentation = augmentation
        self.shuffle, self.seed, self.epoch = shuffle, seed, epoch

    def __len__(self) -> int:
        return -(-len(self.pictures) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.arange(len(self.pictures))
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        which = order[index * self.batch_size : (index + 1) * self.batch_size]
        pixels = self.pictures.pixels(which)
        if self.augmentation:
            pixels = self.augmentation(pixels, np.random.default_rng((self.seed, self.epoch, index)))
        one_hot = np.eye(len(self.pictures.class_names), dtype="float32")[self.pictures.labels[which]]
        return self.pictures.preprocessing.normalize(pixels), one_hot

    def on_epoch_end(self) -> None:
        self.epoch += 1


def class_names(source: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of the classes of `"digits"` or of a folder, in the order of their numbers; errors as in `folder`."""
    return tuple("0123456789") if source == "digits" else read_folders(pathlib.Path(source)).class_names


def load(
    source: str | os.PathLike[str], preprocessing: Preprocessing, *, validation: float = 0.2, limit: int | None = None
) -> Data:
    """Reads a data set.

    Args:
        source: `"digits"`, or a folder as `folder` takes it.
        preprocessing: the model's `Preprocessing`.
        validation: see `folder`.
        limit: use at most so many training and so many held-out pictures; all by default.

    Returns:
        A `Data`.

    Raises:
        ValueError: see `digits` and `folder`.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be a positive number of pictures; received {limit!r}.")
    data = digits(preprocessing) if source == "digits" else folder(source, preprocessing, validation=validation)
    if limit is None:
        return data
    return dataclasses.replace(data, train=data.train.take(limit), validation=data.validation.take(limit))


def digits(preprocessing: Preprocessing) -> Data:
    """The 1,797 handwritten digits that scikit-learn brings along, enlarged from 8 x 8 to the model's size.

    The last 500 are held out and the first 1,297 train. The set lists one writer after another, so most of the held-out
    digits come from people whose hand the model has never seen: harder than a random split, and closer to
    what an app meets. The whole picture is used (`crop` is 1), since the digits reach to its edges.

    Args:
        preprocessing: the model's `Preprocessing`.

    Returns:
        A `Data`.

    Raises:
        ImportError: scikit-learn or Pillow is not installed.
    """
    try:
        import PIL  # noqa: F401  preprocessing.pixels needs it
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ImportError(f'The digits need {e.name}. From a checkout: pip install -e ".[train]"') from None
    bunch = load_digits()
    preprocessing = dataclasses.replace(preprocessing, crop=1.0)
    small = np.rint(bunch.images * (255 / 16)).astype("uint8")
    pixels = np.stack([preprocessing.pixels(picture) for picture in small])
    labels = bunch.target.astype("int32")

    def part(which: slice) -> Pictures:
        return Pictures(
            sources=pixels[which], labels=labels[which], class_names=class_names("digits"), preprocessing=preprocessing
        )

    return Data(name="digits", train=part(slice(None, -500)), validation=part(slice(-500, None)))


def folder(path: str | os.PathLike[str], preprocessing: Preprocessing, *, validation: float = 0.2) -> Data:
    """A folder of images with one subfolder per class, named after it; class numbers follow the sorted names.

    Images may lie at any depth below their class, in the formats that Pillow reads; they are turned as their EXIF data
    says. Hidden files and folders are left out, symbolic links are followed, files of another kind are counted.

    A folder that is split already, in subfolders `train`, `val` and `test` of whatever usual spelling, above the
    classes or inside each of them, is taken as it is: `test` is kept away. Without a `val` of its own, what trains is
    split class by class: ordered by the SHA-256 of their path below the folder, the first fifth of a class's images is
    held out, so the split is the same on every machine and moves little when images are added.

    Args:
        path: the folder.
        preprocessing: the model's `Preprocessing`.
        validation: fraction of each class that is held out.

    Returns:
        A `Data`. Unreadable images are left out and listed in its `skipped`.

    Raises:
        ValueError: no such folder, no images, fewer than two classes, a class without a readable image, a picture that
            both trains and is held out, or a layout that is not clear.
        ImportError: Pillow is not installed.
    """
    validation = number("validation", validation, 0, 1, "a fraction between 0 and 1", open_low=True)
    path = pathlib.Path(path)
    found = read_folders(path)
    classes = found.class_names
    ignored: collections.Counter[str] = collections.Counter()
    entries = []
    for part, of_class in found.parts.items():
        for label, name in enumerate(classes):
            listed = listing(of_class[name])
            ignored.update(listed.ignored)
            entries += [(file, label, part) for file in listed.pictures]
    _refuse_overlap(path, entries)
    files = [file for file, _, _ in entries]
    labels = np.array([label for _, label, _ in entries], "int32")
    sources, good = _read(files, preprocessing)
    if "validation" in found.parts:
        held = np.array([part == "validation" for _, _, part in entries])
    else:
        held = np.zeros(len(files), bool)
        for label in range(len(classes)):
            held[_held_out(np.flatnonzero(good & (labels == label)), files, path, validation)] = True

    parts = []
    for which, held_name in ((~held, "to train on"), (held, "to hold out")):
        which = np.flatnonzero(which & good)
        missing = [name for number, name in enumerate(classes) if number not in labels[which]]
        if missing:
            raise ValueError(
                f"{path} has no readable image {held_name} of class {', '.join(map(repr, missing))}: "
                "every class needs at least two."
            )
        chosen = [sources[i] for i in which]
        pictures = np.stack(chosen) if isinstance(chosen[0], np.ndarray) else tuple(chosen)
        parts.append(Pictures(sources=pictures, labels=labels[which], class_names=classes, preprocessing=preprocessing))
    return Data(
        name=path.resolve().name,
        train=parts[0],
        validation=parts[1],
        skipped=tuple(files[i] for i in np.flatnonzero(~good)),
        ignored=dict(sorted((ignored + collections.Counter(found.ignored)).items())),
        test=sum(len(listing(folder).pictures) for folder in found.test),
        doubt=found.doubt,
    )


def _refuse_overlap(root: pathlib.Path, entries: Sequence[tuple[pathlib.Path, int, str]]) -> None:
    """One file under two classes or in two parts, by links, would be learned and asked for at once."""
    seen: dict[pathlib.Path, tuple[pathlib.Path, int, str]] = {}
    for entry in entries:
        file, label, part = seen.setdefault(entry[0].resolve(), entry)
        if (label, part) != entry[1:]:
            raise ValueError(
                f"{entry[0].relative_to(root)} and {file.relative_to(root)} are one file: a picture belongs to one "
                "class, and to what trains or what is held out. Remove one of the two links."
            )


def _spaced(total: int, count: int) -> np.ndarray:
    """Indices (n,) of at most `count` of so many things, evenly spaced, from the first on."""
    count = min(count, total)
    return np.arange(count) * total // max(count, 1)


def _held_out(which: np.ndarray, files: Sequence[pathlib.Path], root: pathlib.Path, fraction: float) -> list[int]:
    """Those of the files with these indices that are held out: at least one of two or more."""
    digest = lambda i: hashlib.sha256(name_bytes(files[i].relative_to(root))).digest()
    count = max(1, round(fraction * len(which))) if len(which) > 1 else 0
    return sorted(which, key=digest)[:count]


def _read(files: Sequence[pathlib.Path], preprocessing: Preprocessing) -> tuple[list[Any], np.ndarray]:
    """Reads every file once, on all cores: pixels, or paths if pixels take too much memory, and which are readable."""
    from keras_vits._util.progress import progress

    keep = len(files) * math.prod(preprocessing.image_size) * len(preprocessing.mean) <= IN_MEMORY_BYTES

    def read(file: pathlib.Path) -> np.ndarray | pathlib.Path | None:
        try:
            pixels = preprocessing.pixels(file)
        except ValueError:
            return None
        return pixels if keep else file

    with concurrent.futures.ThreadPoolExecutor() as pool:
        sources = list(progress(pool.map(read, files), "Reading images", len(files)))
    return sources, np.array([source is not None for source in sources])
