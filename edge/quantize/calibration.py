"""Calibration images from an array, a data set, a function or a folder, checked before they touch a quantizer."""

from __future__ import annotations

import hashlib
import itertools
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits._util.pictures import listing
from keras_vits._util.progress import progress
from keras_vits._util.terminal import listed, unreadable
from keras_vits.specs import InputSpec

MANY = 16  # images, from which on their colours mean something
BLUISH = 0.03  # of the 0 to 1 scale: photographs are on average 0.08 redder than blue
MOST = 1000  # images that are taken of what may have no end; ranges of activations settle within a hundred


class CalibrationWarning(UserWarning):
    """Calibration images that do not look like what the model takes: their range or colour order is another, they are
    one and the same, some are unreadable, or there are more than are used."""


def batches(calibration: Any, specs: Sequence[InputSpec], description: str) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields an array for each of a file's inputs, in their order, of its shape, dtype and layout; with a progress bar
    when it takes long.

    Args:
        calibration: an array (N,H,W,C); an iterable that yields such arrays or (images, labels) pairs, as `tf.data`,
            a PyTorch `DataLoader` and `keras.utils.PyDataset` do, or a function that returns one, as TensorFlow Lite
            calls a representative data set; or a folder of pictures, read with the preprocessing. Of a file with
            several inputs, name -> array, or an iterable of such mappings or of lists in the file's order, each alone
            or beside labels. Of what may have no end the first 1,000 images are taken, of a folder 1,000 from all of
            it.
        specs: the `InputSpec` of each input.
        description: of the progress bar.

    Raises:
        ValueError: there are no images, an input is missing, their shape, dtype or range is another, or they hold NaN
            or infinity, with the image's number.

    Warns:
        CalibrationWarning: after the last one, if their statistics do not match the model's normalisation, or they are
            all the same; or if only some of them were taken.
    """
    batch = specs[0].shape[0]
    source, count = _source(calibration, specs)
    total = None if count is None else -(-count // batch)
    seen: list[list[tuple[Any, Any, np.ndarray]]] = [[] for _ in specs]  # see `_doubt`
    digests = set()
    for arrays in progress(_regroup(source, specs, limited=count is None), description, total):
        for spec, x, of_spec in zip(specs, arrays, seen, strict=True):
            of_spec += [(one.min(), one.max(), one.mean((0, 1))) for one in x] if spec.is_image else []
        digests |= {hashlib.sha256(b"".join(x[i].tobytes() for x in arrays)).digest() for i in range(batch)}
        yield tuple(spec.as_stored(x) for spec, x in zip(specs, arrays, strict=True))
    if not digests:
        raise ValueError("The calibration set is empty: pass some tens of real images.")
    if len(digests) == 1:
        warnings.warn(
            "The calibration images are all the same, or a single one: the ranges of activations hold for no other. "
            "Pass some tens of different, real ones.",
            CalibrationWarning,
            2,
        )
    for spec, of_spec in zip(specs, seen, strict=True):
        if of_spec and spec.preprocessing and (doubt := _doubt(of_spec, spec)):
            warnings.warn(f"{doubt} Quantized on such images, the file will not fit real ones.", CalibrationWarning, 2)


def items(source: Any) -> Iterable[Any]:
    """The batches of a data set, of which a function may be asked."""
    if callable(source) and not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
        source = source()
    if hasattr(type(source), "num_batches") and hasattr(source, "__getitem__"):  # a PyDataset, which is not iterable
        try:
            ends = source.num_batches
        except NotImplementedError:
            ends = None
        return (source[i] for i in (itertools.count() if ends is None else range(ends)))
    if not isinstance(source, Iterable):
        raise ValueError(
            f"A data set is an array, or yields batches of images; received {type(source).__name__}, which does not."
        )
    return source


# ---------------------------------------------------------------- where images come from


def _source(calibration: Any, specs: Sequence[InputSpec]) -> tuple[Iterable[Any], int | None]:
    """(what yields batches, number of examples where they lie in memory already)."""
    if isinstance(calibration, (str, pathlib.Path)):
        if len(specs) != 1:
            raise ValueError(f"A folder of pictures calibrates a file of one input; this one has: {_names(specs)}.")
        files, read = _folder(pathlib.Path(calibration), specs[0])
        return _readable(files, read), len(files)
    if isinstance(calibration, Mapping):
        given = {str(name): np.asarray(array) for name, array in calibration.items()}
        return [given], max((len(array) for array in given.values() if array.ndim), default=0)
    if hasattr(calibration, "shape"):
        return [calibration], len(calibration)
    return items(calibration), None


def _folder(folder: pathlib.Path, spec: InputSpec) -> tuple[list[pathlib.Path], Callable[[Any], np.ndarray]]:
    """(files, what makes an input of each)."""
    files = list(listing(folder).pictures)
    if not files:
        raise ValueError(f"No pictures in {folder}: calibration needs a folder with some tens of real images.")
    prepared = spec.prepared
    if len(files) > MOST:
        chosen = [files[i * len(files) // MOST] for i in range(MOST)]
        warnings.warn(
            f"{folder} has {len(files):,} pictures, of which {MOST:,}, evenly spaced, are calibrated on.",
            CalibrationWarning,
            4,
        )
        files = chosen
    return files, prepared.pixels if spec.takes_pixels else prepared


def _readable(files: Sequence[pathlib.Path], read: Callable[[Any], np.ndarray]) -> Iterator[np.ndarray]:
    """The pictures, one by one, without those that cannot be read, which are counted and named."""
    skipped = []
    for file in files:
        try:
            picture = read(file)
        except ValueError:
            skipped.append(file)
            continue
        yield picture[None]
    if len(skipped) == len(files):
        raise ValueError(f"None of the {len(files)} pictures can be read: {listed(skipped)}.")
    if skipped:
        warnings.warn(unreadable(skipped), CalibrationWarning, 4)


# ---------------------------------------------------------------- what they are


def _names(specs: Sequence[InputSpec]) -> str:
    return ", ".join(spec.name for spec in specs)


def _arrays(item: Any, specs: Sequence[InputSpec]) -> list[np.ndarray]:
    """An array for each input, of what a data set yields: alone, beside labels, in a list, or by name."""
    if isinstance(item, (tuple, list)):
        if len(specs) > 1 and len(item) == len(specs) and not isinstance(item[0], (Mapping, tuple, list)):
            return [np.asarray(x) for x in item]
        if not item:
            raise ValueError("A calibration set yields images, or images beside labels; received an empty list.")
        item = item[0]
        if isinstance(item, (tuple, list)) and len(item) == len(specs):
            return [np.asarray(x) for x in item]
    if isinstance(item, Mapping):
        found = {str(key): value for key, value in item.items()}
        if missing := [spec.name for spec in specs if spec.name not in found]:
            raise ValueError(
                f"Calibration needs the input{'s' * (len(missing) > 1)} {', '.join(missing)}; received "
                f"{', '.join(found) or 'an empty dictionary'}."
            )
        return [np.asarray(found[spec.name]) for spec in specs]
    if len(specs) > 1:
        raise ValueError(
            "This file has several inputs: calibrate it with name -> array, or with a data set of such dictionaries, "
            f"of {_names(specs)}."
        )
    return [np.asarray(item)]


def _regroup(source: Iterable[Any], specs: Sequence[InputSpec], limited: bool) -> Iterator[list[np.ndarray]]:
    """Checked examples in batches of the file's size; the last examples are repeated to fill one."""
    held: list[list[np.ndarray]] = []
    count, batch = 0, specs[0].shape[0]
    for item in source:
        arrays = [_checked(array, spec, count) for array, spec in zip(_arrays(item, specs), specs, strict=True)]
        if len({len(x) for x in arrays}) != 1:
            counts = ", ".join(f"{spec.name} {len(x)}" for spec, x in zip(specs, arrays, strict=True))
            raise ValueError(f"Every input needs an entry for each example; received {counts}.")
        if not len(arrays[0]):
            raise ValueError(
                "The calibration set is empty, or yields a batch of no images: pass some tens of real ones."
            )
        for example in zip(*arrays, strict=True):
            if limited and count == MOST:
                break
            held.append(list(example))
            count += 1
            if len(held) == batch:
                yield [np.stack(x) for x in zip(*held, strict=True)]
                held = []
        else:
            continue
        warnings.warn(
            f"The calibration set has more than {MOST:,} images, perhaps no end: the first {MOST:,} are calibrated on.",
            CalibrationWarning,
            4,
        )
        break
    if held:
        held += [held[-1]] * (batch - len(held))
        yield [np.stack(x) for x in zip(*held, strict=True)]


def _checked(array: np.ndarray, spec: InputSpec, first: int) -> np.ndarray:
    """An array (N,...) in the input's dtype, if nothing is lost by that.

    Args:
        array: as it was given.
        spec: of the input.
        first: number of its first example among all, for messages.
    """
    spec.check_examples(array, "Calibration", first)
    if spec.takes_pixels and array.size:
        low, high = float(array.min()), float(array.max())
        if low < -0.5 or high > 255.5:  # a resized picture has fractions
            raise ValueError(
                f"This file takes pixels 0 to 255 in {spec.name!r}; received {array.dtype} from {low:.4g} to "
                f"{high:.4g}: pass the pixels as they are in an 8-bit picture, not normalised."
            )
        return np.rint(array).astype(np.uint8)
    return spec.as_dtype(array, "Calibration")


def _doubt(seen: Sequence[tuple[Any, Any, np.ndarray]], spec: InputSpec) -> str | None:
    """What is odd about the images, given (smallest, largest, mean of every channel) of each, in a sentence, or
    `None`."""
    preprocessing = spec.preprocessing
    low, high = float(min(s[0] for s in seen)), float(max(s[1] for s in seen))
    found = f"The calibration images lie between {low:z.3g} and {high:z.3g}"
    means = np.stack([s[2] for s in seen])
    if spec.dtype != "float32":
        means = means / 255
        if high <= 1:
            return f"{found}, but this file takes pixels, 0 to 255: do not divide them."
    else:
        mean, std = (np.resize(preprocessing[k], spec.shape[3]) for k in ("mean", "std"))
        bounds = np.array([-mean / std, (1 - mean) / std])
        first, last = float(bounds.min()), float(bounds.max())
        slack = 0.05 * (last - first)
        if low < first - slack or high > last + slack:
            bounded = f"{first:z.3g} to {last:z.3g}"
            return f"{found}, outside of this model's {bounded}: pass pixels through its preprocessing."
        if low >= 0 and high <= 1 and first < -4 * slack:
            return f"{found}, but this model takes {first:z.3g} to {last:z.3g}: normalise them with its preprocessing."
        means = means * std + mean
    order = preprocessing["channel_order"] if spec.dtype == "float32" else "rgb"
    if means.shape[1] == 3 and len(means) >= MANY:
        blue_over_red = means @ ([-1, 0, 1] if order == "rgb" else [1, 0, -1])
        if np.mean(blue_over_red > 0) > 0.75 and blue_over_red.mean() > BLUISH:
            return (
                f"The calibration images are bluer than photographs are, and this model takes {order.upper()}: "
                "their colours may be in the other order."
            )
    return None
