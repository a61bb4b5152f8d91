"""Any number of examples through a file of a static batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits.specs import InputSpec

PIXELS = 32  # far above what any normalisation makes of the largest pixel, and far below that

Arrays = np.ndarray | Mapping[str, np.ndarray]


def checked(inputs: Arrays, specs: Sequence[InputSpec], file: str) -> dict[str, np.ndarray]:
    """Input name -> array (N,...), of what an artifact is given.

    Args:
        inputs: the array (N,...) of the one input, or name -> array.
        specs: of the inputs in the file's order.
        file: its name, for messages.

    Raises:
        ValueError: an input that is missing or unknown; no examples, or another number in each input; another shape;
            numbers of a type or a range that the file does not take, which are never cast; NaN or infinity.
    """
    names = ", ".join(spec.name for spec in specs)
    if not isinstance(inputs, Mapping):
        if len(specs) != 1:
            raise ValueError(f"{file} takes several inputs, {names}: pass a dictionary of their names and arrays.")
        inputs = {specs[0].name: inputs}
    if set(inputs) != {spec.name for spec in specs}:
        raise ValueError(f"{file} takes {names}; received {', '.join(map(str, inputs)) or 'nothing'}.")
    found = {spec.name: _checked(np.asarray(inputs[spec.name]), spec, file) for spec in specs}
    counts = {len(array) for array in found.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"{file} takes one example or more, the same number in each input; received "
            f"{', '.join(str(len(array)) for array in found.values())}."
        )
    return found


def _checked(array: np.ndarray, spec: InputSpec, file: str) -> np.ndarray:
    spec.check_examples(array, file)
    if spec.takes_pixels and array.size:
        whole = array.dtype.kind != "f" or bool((array == np.rint(array)).all())
        if not whole or array.min() < 0 or array.max() > 255:
            raise ValueError(
                f"{file} takes pixels 0 to 255 (uint8); received {array.dtype} from {array.min():.4g} to "
                f"{array.max():.4g}: pass the picture's own pixels, not normalised."
            )
    found = spec.as_dtype(array, file)
    if found.dtype == np.float32 and spec.is_image and spec.preprocessing and found.size:
        low, high = float(found.min()), float(found.max())
        if low >= 0 and PIXELS < high <= 255:
            raise ValueError(
                f"{file} takes normalised images; received numbers from {low:.4g} to {high:.4g}, as pixels are: pass "
                "them through model.preprocessing.normalize first."
            )
    return found


def split(
    inputs: Arrays, specs: Sequence[InputSpec], dtypes: Sequence[Any], batch: int, file: str
) -> tuple[int, list[list[np.ndarray]]]:
    """N, and the arrays of each run in the file's order, dtype and layout, the last one padded with zeros.

    Args:
        inputs: the array (N,...) of the one input, or name -> array.
        specs: of the inputs in the file's order; () for an array that is taken as the file takes it.
        dtypes: numpy's, of each input.
        batch: B of the file.
        file: its name, for messages.

    Raises:
        ValueError: see `checked`.
    """
    given = checked(inputs, specs, file) if specs else {"": np.asarray(inputs)}
    arrays = [np.asarray(x, dtype) for x, dtype in zip(given.values(), dtypes, strict=True)]
    count = len(arrays[0])
    arrays = [np.concatenate([x, np.zeros((-count % batch, *x.shape[1:]), x.dtype)]) for x in arrays]
    stored: list[Callable[[np.ndarray], np.ndarray]] = [s.as_stored for s in specs] or [np.asarray] * len(arrays)
    starts = range(0, len(arrays[0]), batch)
    return count, [[f(x[i : i + batch]) for f, x in zip(stored, arrays, strict=True)] for i in starts]


def join(
    names: Sequence[str], count: int, batch: int, results: Sequence[Sequence[np.ndarray]]
) -> np.ndarray | dict[str, np.ndarray]:
    """The array (N,...) of the one output, or name -> array, from the outputs of each run of B examples.

    Raises:
        ValueError: see `check_output`.
    """
    arrays = []
    for name, parts in zip(names, zip(*results, strict=True), strict=True):
        check_output(name, parts[0].shape, batch)
        arrays.append(np.concatenate(parts)[:count])
    return arrays[0] if len(arrays) == 1 else dict(zip(names, arrays, strict=True))


def check_output(name: str, shape: Sequence[int], batch: int) -> None:
    """Refuses an output that has not a value for each of B examples, such as a mean over the batch, or anchors.

    Raises:
        ValueError: its first axis is not the batch.
    """
    if not shape or shape[0] != batch:
        raise ValueError(
            f"Output {name!r} has the shape {tuple(shape)}, not a value for each of {batch} in a batch: use run, "
            "which gives the outputs as they are, or export a model without it."
        )
