"""Calibration images from an array, a data set or a folder, checked before they touch a quantizer."""

import pathlib

import numpy as np

from keras_vits.preprocess import Preprocessing

from .progress import progress


def batches(calibration, artifact, description):
    """Yields arrays (B,H,W,C) of the artifact's input shape and dtype, with a progress bar when it takes long.

    Args:
        calibration: an array (N,H,W,C); an iterable that yields such arrays or (images, labels) pairs, as `tf.data`,
            a PyTorch `DataLoader` and `keras.utils.PyDataset` do; or a folder of pictures, read with the artifact's
            preprocessing.
        artifact: whose input the images are for.
        description: of the progress bar.

    Raises:
        ValueError: there are no images, their shape is another, or they hold NaN or infinity.
    """
    shape = artifact.input.shape
    count = None
    if isinstance(calibration, (str, pathlib.Path)):
        calibration = _folder(pathlib.Path(calibration), artifact)
    elif hasattr(calibration, "shape"):
        count = -(-len(calibration) // shape[0])
        calibration = [calibration]
    images = 0
    for x in progress(_regroup(calibration, shape, artifact.input.dtype), description, count):
        images += len(x)
        yield x
    if not images:
        raise ValueError("The calibration set is empty: pass some tens of real images.")


def _regroup(source, shape, dtype):
    """Checked images in batches of the file's size; the last images are repeated to fill one."""
    held = []
    for item in _items(source):
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


def _items(source):
    if hasattr(source, "__getitem__") and hasattr(source, "num_batches"):  # a PyDataset is a sequence without an end
        return (source[i] for i in range(source.num_batches))
    return source


def _folder(folder, artifact):
    from PIL import Image

    files = (
        sorted(p for p in folder.rglob("*") if p.suffix.lower() in Image.registered_extensions())
        if folder.is_dir()
        else []
    )
    if not files:
        raise ValueError(f"No pictures in {folder}: calibration needs a folder with some tens of real images.")
    if not artifact.preprocessing:
        raise ValueError("This file does not know its preprocessing: pass calibration images as an array.")
    preprocessing = Preprocessing(**artifact.preprocessing)
    read = preprocessing.pixels if artifact.input.dtype == "uint8" else preprocessing
    return (read(file)[None] for file in files)
