"""Calibration images from an array, a data set or a folder, checked before they touch a quantizer."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits._util.progress import progress
from keras_vits.preprocess import Preprocessing
from keras_vits.specs import InputSpec

MANY = 16  # images, from which on their colours mean something
BLUISH = 0.03  # of the 0 to 1 scale: photographs are on average 0.08 redder than blue


class CalibrationWarning(UserWarning):
    """Calibration images that do not look like what the model takes: their range or colour order is another."""


def batches(
    calibration: Any, spec: InputSpec, preprocessing: Mapping[str, Any], description: str
) -> Iterator[np.ndarray]:
    """Yields arrays of a file's input shape, dtype and layout, with a progress bar when it takes long.

    Args:
        calibration: an array (N,H,W,C); an iterable that yields such arrays or (images, labels) pairs, as `tf.data`,
            a PyTorch `DataLoader` and `keras.utils.PyDataset` do; or a folder of pictures, read with the
            preprocessing.
        spec: the `InputSpec` that the images are for.
        preprocessing: fields of the model's `Preprocessing`, or {} where it is not known.
        description: of the progress bar.

    Raises:
        ValueError: there are no images, their shape is another, or they hold NaN or infinity.

    Warns:
        CalibrationWarning: after the last one, if their statistics do not match the model's normalisation.
    """
    count = None
    if isinstance(calibration, (str, pathlib.Path)):
        calibration = _folder(pathlib.Path(calibration), spec, preprocessing)
    elif hasattr(calibration, "shape"):
        count = -(-len(calibration) // spec.shape[0])
        calibration = [calibration]
    seen = []  # (smallest, largest, mean of every channel) of each image
    for x in progress(_regroup(calibration, spec.shape, spec.dtype), description, count):
        seen += [(image.min(), image.max(), image.mean((0, 1))) for image in x]
        yield spec.as_stored(x)
    if not seen:
        raise ValueError("The calibration set is empty: pass some tens of real images.")
    if preprocessing and (doubt := _doubt(seen, spec, preprocessing)):
        warnings.warn(f"{doubt} Quantized on such images, the file will not fit real ones.", CalibrationWarning, 2)


def _doubt(
    seen: Sequence[tuple[Any, Any, np.ndarray]], spec: InputSpec, preprocessing: Mapping[str, Any]
) -> str | None:
    """What is odd about the images, in a sentence, or `None`."""
    low, high = float(min(s[0] for s in seen)), float(max(s[1] for s in seen))
    found = f"The calibration images lie between {low:.3g} and {high:.3g}"
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
            return f"{found}, outside of this model's {first:.3g} to {last:.3g}: pass pixels through its preprocessing."
        if low >= 0 and high <= 1 and first < -4 * slack:
            return f"{found}, but this model takes {first:.3g} to {last:.3g}: normalise them with its preprocessing."
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


def _regroup(source: Iterable[Any], shape: Sequence[int], dtype: str) -> Iterator[np.ndarray]:
    """Checked images in batches of the file's size; the last images are repeated to fill one."""
    held: list[np.ndarray] = []
    for item in items(source):
        item = np.asarray(item[0] if isinstance(item, (tuple, list)) else item)
        if item.ndim != 4 or item.shape[1:] != tuple(shape[1:]):
            raise ValueError(
                f"Calibration images must have shape (N, {', '.join(map(str, shape[1:]))}); received {item.shape}."
            )
        if not np.all(np.isfinite(item)):
            raise ValueError("The calibration images hold NaN or infinity: look at how they are loaded and normalised.")
        for x in item:
            held.append(x)
            if len(held) == shape[0]:
                yield np.stack(held).astype(dtype)
                held = []
    if held:
        yield np.stack([*held, *[held[-1]] * (shape[0] - len(held))]).astype(dtype)


def items(source: Any) -> Iterable[Any]:
    """The batches of a data set."""
    if hasattr(source, "__getitem__") and hasattr(source, "num_batches"):  # a PyDataset is a sequence without an end
        return (source[i] for i in range(source.num_batches))
    return source


def pictures(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Paths of the pictures in a folder and the folders in it, sorted; none where there is no folder."""
    from PIL import Image

    readable, folder = Image.registered_extensions(), pathlib.Path(folder)
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in readable) if folder.is_dir() else []


def _folder(folder: pathlib.Path, spec: InputSpec, preprocessing: Mapping[str, Any]) -> Iterator[np.ndarray]:
    files = pictures(folder)
    if not files:
        raise ValueError(f"No pictures in {folder}: calibration needs a folder with some tens of real images.")
    if not preprocessing:
        raise ValueError("This file does not know its preprocessing: pass calibration images as an array.")
    prepared = Preprocessing(**preprocessing)
    read = prepared.pixels if spec.dtype == "uint8" else prepared
    return (read(file)[None] for file in files)
