"""Linear maps along the height and the width of a feature map: what resampling and averaging are."""

from collections.abc import Sequence

import numpy as np

from keras_vits.graph.ir import Value

from ._tracer import Tracer


def multiplied(t: Tracer, x: Value, rows: np.ndarray | None, columns: np.ndarray | None) -> Value:
    """A float map with a matrix applied to its rows, and one to its columns; (B,H,W,C) -> (B,H',W',C).

    Each is a dense layer of what is moved to the last axis. With the constant as the left factor of a matrix product
    nothing is moved, but XNNPACK takes 1.5 times (rows) and 2.2 times (columns) as long for 256 -> 224 pixels.

    Args:
        t: the tracer.
        x: the map.
        rows: (H',H), or `None` for the unit matrix.
        columns: (W',W), or `None`.
    """
    b, h, w, c = x.shape
    if rows is not None:  # (h,w c) -> (w c,h)
        y = _dense(t, t.transpose(t.reshape(x, (b, h, w * c)), (0, 2, 1)), rows)
        h = len(rows)
        if columns is None:
            return t.reshape(t.transpose(y, (0, 2, 1)), (b, h, w, c))
        y = _dense(t, t.transpose(t.reshape(y, (b, w, c * h)), (0, 2, 1)), columns)  # (w,c h) -> (c h,w)
        y = t.transpose(t.reshape(y, (b, c, h * len(columns))), (0, 2, 1))
        return t.reshape(y, (b, h, len(columns), c))
    if columns is None:
        return x
    y = _dense(t, t.transpose(t.reshape(x, (b * h, w, c)), (0, 2, 1)), columns)
    return t.reshape(t.transpose(y, (0, 2, 1)), (b, h, len(columns), c))


def _dense(t: Tracer, x: Value, matrix: np.ndarray) -> Value:
    return t.build("dense", x, t.constant(matrix, name="matrix"), None)


def averages(parts: Sequence[tuple[int, int]], n: int) -> np.ndarray:
    """The matrix (len(parts), n) whose row i takes the mean of the entries from the i-th begin to the i-th end."""
    matrix = np.zeros((len(parts), n), np.float32)
    for row, (begin, end) in zip(matrix, parts, strict=True):
        row[begin:end] = 1 / (end - begin)
    return matrix
