"""Pictures, and tables of vectors on a grid such as position embeddings, in another size."""

import math
from typing import Any

import numpy as np

WASTE = 16  # resized pixels for each that is kept, from which on only those are computed
BITS = 22  # of the fractions that Pillow multiplies 8-bit pixels by
PILLOW = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # interpolation -> Pillow's number of it


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


# ---------------------------------------------------------------- pictures


def resized_part(
    picture: Any, size: tuple[int, int], corner: tuple[int, int], kept: tuple[int, int], interpolation: str
) -> np.ndarray:
    """A rectangle of a resized picture, uint8 (h,w,C): the same numbers as of Pillow's `resize` and a crop.

    Pillow resizes all of it. Where that would be far more than is kept, as of a picture of 1 x 10,000 pixels, only the
    pixels that are kept are computed here, in Pillow's own arithmetic: along one axis and then the other, each a sum
    of pixels times weights of BITS bits, rounded to 8.

    Args:
        picture: a PIL image in the mode `"L"` or `"RGB"`.
        size: (width, height) that it is resized to.
        corner: (left, top) of the rectangle.
        kept: (w, h) of the rectangle.
        interpolation: a key of PILLOW.
    """
    (left, top), (width, height) = corner, kept
    if math.prod(size) <= WASTE * width * height:
        pixels = np.asarray(picture.resize(size, PILLOW[interpolation]))
        return pixels.reshape(*pixels.shape[:2], -1)[top : top + height, left : left + width]
    pixels = np.asarray(picture)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    taps = (
        _weights(pixels.shape[0], size[1], top, height, interpolation),
        _weights(pixels.shape[1], size[0], left, width, interpolation),
    )
    first = 0 if _rows_first(picture.size, size) else 1
    starts, weights = taps[1 - first]
    needed = slice(starts[0], starts[-1] + weights.shape[1])  # of the other axis
    pixels = pixels[:, needed] if first == 0 else pixels[needed]
    return _weighed(_weighed(pixels, first, *taps[first]), 1 - first, starts - starts[0], weights)


def _rows_first(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Whether Pillow shrinks the height before the width, which rounds differently; sizes are (width, height).

    Measured on 2,311 sizes. Before version 13 it always begins with the width, but for 1.4 % of sizes in 12.2 and 12.3.
    """
    import PIL

    narrower, lower = (before - after for before, after in zip(old, new, strict=True))
    return int(PIL.__version__.partition(".")[0]) >= 13 and lower > 0 and lower > 2 * narrower


def _weights(old: int, new: int, first: int, count: int, interpolation: str) -> tuple[np.ndarray, np.ndarray]:
    """First input pixel (n,) and weights (n,k) of `count` of the `new` pixels of an axis, as Pillow computes them."""
    scale = old / new
    if interpolation == "nearest":
        at = np.array([scale / 2])
        while first:  # the sum of as many steps as Pillow adds up, whose rounding decides between two pixels
            steps = min(first, 1 << 20)
            at, first = np.cumsum(np.r_[at, np.full(steps, scale)])[-1:], first - steps
        starts = np.cumsum(np.r_[at, np.full(count - 1, scale)]).astype("int64")
        return starts, np.full((count, 1), 1 << BITS)
    reach, kernel = KERNELS[interpolation]
    stretch = max(scale, 1.0)
    centres = (np.arange(first, first + count) + 0.5) * scale
    starts = np.maximum((centres - reach * stretch + 0.5).astype("int64"), 0)
    stops = np.minimum((centres + reach * stretch + 0.5).astype("int64"), old)
    taps = np.arange((stops - starts).max())
    weights = kernel(np.abs((taps + starts[:, None] - centres[:, None] + 0.5) * (1 / stretch)))
    weights = np.where(taps < (stops - starts)[:, None], weights, 0)
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # added up one after the other
    return starts, np.trunc(weights * (1 << BITS) + np.copysign(0.5, weights)).astype("int64")


def _weighed(pixels: np.ndarray, axis: int, starts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pixels (H,W,C) uint8 with another number of them along an axis."""
    pixels = pixels.swapaxes(0, axis)
    total = np.full((len(starts), *pixels.shape[1:]), 1 << (BITS - 1))
    for tap in range(weights.shape[1]):  # beyond the edge the weights are 0
        total += weights[:, tap, None, None] * pixels[np.minimum(starts + tap, len(pixels) - 1)]
    return np.clip(total >> BITS, 0, 255).astype("uint8").swapaxes(0, axis)


def _triangle(distance: np.ndarray) -> np.ndarray:
    return np.where(distance < 1, 1 - distance, 0)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution in Pillow's order of operations."""
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0))


def _lanczos(distance: np.ndarray) -> np.ndarray:
    return np.where(distance < 3, np.sinc(distance) * np.sinc(distance / 3), 0)


KERNELS = {"bilinear": (1.0, _triangle), "bicubic": (2.0, _cubic), "lanczos": (3.0, _lanczos)}
