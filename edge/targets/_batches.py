"""Any number of examples through a file of a static batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits.specs import InputSpec


def split(
    inputs: np.ndarray | Mapping[str, np.ndarray],
    specs: Sequence[InputSpec],
    dtypes: Sequence[Any],
    batch: int,
) -> tuple[int, list[list[np.ndarray]]]:
    """N, and the arrays of each run in the file's order, dtype and layout, the last one padded with zeros.

    Args:
        inputs: the array (N,...) of the one input, or name -> array.
        specs: of the inputs in the file's order; () for arrays that are taken as the file takes them.
        dtypes: numpy's, of each input.
        batch: B of the file.
    """
    arrays = [inputs[spec.name] for spec in specs] if isinstance(inputs, Mapping) else [inputs]
    arrays = [np.asarray(x, dtype) for x, dtype in zip(arrays, dtypes, strict=True)]
    count = len(arrays[0])
    arrays = [np.concatenate([x, np.zeros((-count % batch, *x.shape[1:]), x.dtype)]) for x in arrays]
    stored: list[Callable[[np.ndarray], np.ndarray]] = [s.as_stored for s in specs] or [np.asarray] * len(arrays)
    starts = range(0, len(arrays[0]), batch)
    return count, [[f(x[i : i + batch]) for f, x in zip(stored, arrays, strict=True)] for i in starts]


def join(
    names: Sequence[str], count: int, results: Sequence[Sequence[np.ndarray]]
) -> np.ndarray | dict[str, np.ndarray]:
    """The array (N,...) of the one output, or name -> array, from the outputs of each run."""
    arrays = [np.concatenate(part)[:count] for part in zip(*results, strict=True)]
    return arrays[0] if len(arrays) == 1 else dict(zip(names, arrays, strict=True))
