"""Tables of vectors on a grid, such as position embeddings, for a grid of another size."""

import math

import numpy as np


def cubic(distance):
    """Keys' cubic convolution of distances >= 0, a = -0.5."""
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    return np.where(distance < 1, near, np.where(distance < 2, far, 0))


def resample_grid(table, old, new):
    """A table of vectors (old[0] * old[1], D) on a grid of another size (new[0] * new[1], D): antialiased bicubic."""

    def matrix(n, m):
        scale = n / m
        weights = cubic(np.abs((np.arange(n) + 0.5 - (np.arange(m)[:, None] + 0.5) * scale) / max(scale, 1)))
        return weights / weights.sum(1, keepdims=True)

    grid = np.asarray(table, "float64").reshape(*old, -1)
    grid = np.einsum("yh,hwd,xw->yxd", matrix(old[0], new[0]), grid, matrix(old[1], new[1]), optimize=True)
    return grid.reshape(new[0] * new[1], -1).astype("float32")


def resample_positions(table, grid, prefix=0, old=None):
    """A position table (1, prefix + N, D) for another grid (height, width); the first `prefix` vectors stay.

    `old` is the grid that the table was made for. Where that is unknown or of another length, a table of the right
    length is taken as it is, as in timm, any other as a square, and one that is no square will not fit.
    """
    count = table.shape[1] - prefix
    if old is None or math.prod(old) != count:
        old = grid if math.prod(grid) == count else (math.isqrt(count),) * 2
    if tuple(old) == tuple(grid) or math.prod(old) != count:
        return table
    resampled = resample_grid(table[0, prefix:], old, grid)
    return np.concatenate([table[:, :prefix].astype("float32"), resampled[None]], axis=1)
