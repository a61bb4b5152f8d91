"""Quantization in numpy, for every target: ranges of activations, scales and rounding of weights, smoothing, noise.

`range` is (low, high) of what 8 bits stand for; `scale` the step between two neighbouring integers.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Method = Literal["minmax", "percentile", "mse"]  # to choose the range of an activation
METHODS: tuple[Method, ...] = get_args(Method)
BINS = 4096  # of a histogram: 16 for each of the 256 values that 8 bits have
ALPHAS = (0.25, 0.5, 0.75, 1.0)  # how much of an activation's outliers goes into the weights, tried in turn
CLIPS = np.linspace(0.4, 1.0, 25)  # fractions of the largest weight that are tried as the end of the scale
DAMPING = 0.01  # of a Hessian's diagonal, as in the GPTQ paper


class Histogram:
    """Counts of a tensor's values over all batches; its width doubles when a batch has larger ones."""

    def __init__(self) -> None:
        self.counts, self.limit = np.zeros(BINS, np.int64), 0.0
        self.low, self.high = np.inf, -np.inf

    def add(self, x: np.ndarray) -> None:
        """Counts the values of an array."""
        low, high = float(x.min()), float(x.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high)
        self.limit = self.limit or largest
        while self.limit < largest:
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(1), BINS // 4)
            self.limit *= 2
        if self.limit:
            at = np.minimum((x.ravel() + self.limit) * (BINS / 2 / self.limit), BINS - 1).astype(np.int32)
            self.counts += np.bincount(at, minlength=BINS)

    def range(self, method: Method = "mse", bits: int = 8) -> tuple[float, float]:
        """(low, high) by one of `METHODS`: of all values, of all but 1 in 10,000 on each side, or the range whose
        quantization changes the values least, by mean square."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)  # zero is always exact
        if method == "minmax" or not self.limit:
            return low, high
        step = 2 * self.limit / BINS
        at = (np.arange(BINS) + 0.5) * step - self.limit
        if method == "percentile":
            share = np.cumsum(self.counts) / self.counts.sum()
            first, last = at[np.searchsorted(share, [1e-4, 1 - 1e-4])]
            return max(low, min(0.0, first)), min(high, max(0.0, last))
        filled = self.counts > 0
        at, counts = at[filled], self.counts[filled]
        error = lambda low, high: float(counts @ np.square(fake_quantize(at, low, high, bits) - at))
        for factors in (np.geomspace(0.02, 1, 24), np.linspace(0.8, 1, 9)):  # one side at a time, then finer
            low = min((low * f for f in factors), key=lambda x: error(x, high))
            high = min((high * f for f in factors), key=lambda x: error(low, x))
        return low, high


def fake_quantize(x: np.ndarray, low: float | np.ndarray, high: float | np.ndarray, bits: int = 8) -> np.ndarray:
    """x rounded to the 2^bits values from low to high (numbers, or arrays that broadcast), of which zero is one."""
    scale = np.maximum((np.maximum(high, 0) - np.minimum(low, 0)) / (2**bits - 1), 1e-9)
    zero = np.rint(np.minimum(low, 0) / scale)
    return (np.clip(np.rint(x / scale), zero, zero + 2**bits - 1) * scale).astype(x.dtype, copy=False)


# ---- weights (O,...,I): output channels first, input channels last


def weight_scale(weight: np.ndarray, bits: int) -> np.ndarray:
    """(O,1,...): the largest weight of an output channel is the largest integer."""
    largest = np.abs(weight).max(tuple(range(1, weight.ndim)), keepdims=True)
    return np.maximum(largest, 1e-9) / (2 ** (bits - 1) - 1)


def round_weight(weight: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """Weights on the grid, as ai-edge-quantizer rounds: to the nearest, from -127 in 8 bits and from -8 in 4."""
    most = 2 ** (bits - 1)
    return np.clip(np.rint(weight / scale), -most + (bits >= 8), most - 1) * scale


def clipped_scale(weight: np.ndarray, bits: int, importance: np.ndarray) -> np.ndarray:
    """(O,1): the scale whose rounding errors, weighted by the importance (I) of each input, are least."""
    full = weight_scale(weight, bits)
    errors = [np.square(round_weight(weight, full * f, bits) - weight) @ importance for f in CLIPS]
    return full * CLIPS[np.argmin(errors, axis=0)][:, None]


def compensation(hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order, factor (I,I), importance (I)): what `gptq` needs to know of a layer's inputs.

    Args:
        hessian: (I,I), sum of x x^T over them.
    """
    importance = np.diag(hessian)
    order = np.argsort(-importance, kind="stable")
    h = hessian[np.ix_(order, order)].astype(np.float64)
    h[np.diag_indices_from(h)] += DAMPING * np.mean(np.diag(h)) + 1e-12
    return order, np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32), importance  # upper


def gptq(
    weight: np.ndarray, order: np.ndarray, factor: np.ndarray, importance: np.ndarray, bits: int, block: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """(weights on the grid, scale): each input's rounding error is made up for by the inputs not yet rounded.

    GPTQ, arXiv 2210.17323, the inputs with the largest activations first.

    Ours stays beside ai-edge-quantizer 0.10's algorithms: benchmarks/quantizers.py, images that were not calibrated on,
    SQNR of the logits of a random ViT, a random Mixer, a ViT trained on digits. Weights of 4 bits: 21.8, 28.0 and 28.0
    dB by ours, 14.9, 19.2 and 21.8 by its GPTQ (which clips no scale), at most 19.4 by OSCAR, OCTAV, MSE and Hadamard
    rotation. Weights of 8 bits, dynamically quantized inputs: 37.8, 42.7, 42.8 by ours, 34.8, 39.9, 40.7 by its
    GPTQ, less by the others. Static 8 bits: 28.7 and 34.0 (both ViTs) by ours, at most 21.7 and 27.6 by those of its
    algorithms that fix the ranges of activations.

    Args:
        weight: (O,I).
        order, factor, importance: of its inputs, from `compensation`.
        bits: of a weight.
        block: inputs whose errors are carried to the later blocks at once.
    """
    scale = clipped_scale(weight, bits, importance) if bits < 8 else weight_scale(weight, bits)
    w, steps = np.ascontiguousarray(weight.T[order], np.float32), scale[:, 0]  # (I,O): an input is a row
    rounded = np.empty_like(w)
    for begin in range(0, len(w), block):
        end = min(begin + block, len(w))
        errors = np.empty_like(w[begin:end])
        for i in range(begin, end):
            rounded[i] = round_weight(w[i], steps, bits)
            errors[i - begin] = (w[i] - rounded[i]) / factor[i, i]
            w[i + 1 : end] -= np.outer(factor[i, i + 1 : end], errors[i - begin])
        w[end:] -= factor[begin:end, end:].T @ errors
    return rounded[np.argsort(order)].T, scale


# ---- smoothing: exact in float, since what an activation is divided by, the next weights are multiplied with


def input_scales(rows: np.ndarray, largest: np.ndarray) -> list[np.ndarray]:
    """Candidates (I) to divide a layer's inputs by: max|x|^a / max|w|^(1-a); SmoothQuant, arXiv 2211.10438.

    Args:
        rows: (R,I), a sample of the inputs.
        largest: (I), the largest weight that each input meets, in all layers that read it.
    """
    x, w = np.abs(rows).max(0), np.maximum(largest, 1e-5 * largest.max() + 1e-12)
    return [_even(x**a / w ** (1 - a)) for a in ALPHAS]


def output_scales(rows: np.ndarray) -> list[np.ndarray]:
    """Candidates (O) to divide a layer's outputs by, given a sample of them (R,O)."""
    return [_even(np.abs(rows).max(0) ** a) for a in ALPHAS[1::2]]


def _even(scale: np.ndarray) -> np.ndarray:
    """With mean 1 in the logarithm; a channel that is always zero has scale 1."""
    scale = np.where(scale > 1e-5 * scale.max(), scale, 0)
    used = scale > 0
    mean = np.exp(np.log(scale[used]).mean()) if used.any() else 1.0
    return np.where(used, scale / mean, 1).astype(np.float32)


def input_noise(
    rows: np.ndarray, weight: np.ndarray, scale: np.ndarray, bits: int | None, each_row: bool = False
) -> float:
    """Mean square that quantization adds to a layer's outputs (summed over them) when its inputs are divided by scale.

    Errors of different inputs are taken as independent of each other.

    Args:
        rows: (R,I), a sample of the inputs.
        weight: (O,...,I).
        scale: (I).
        bits: of a weight; inputs have 8. `None` where the weights take the scale up exactly, as depthwise ones do.
        each_row: whether each row has a range of its own, as where activations are dynamically quantized.
    """
    x, w = rows / scale, weight * scale
    summed = lambda a: np.square(a).reshape(-1, len(scale)).sum(0)
    low, high = (x.min(1, keepdims=True), x.max(1, keepdims=True)) if each_row else (x.min(), x.max())
    noise = np.square(fake_quantize(x, low, high) - x).mean(0) @ summed(w)
    if bits:
        noise += np.square(x).mean(0) @ summed(round_weight(w, weight_scale(w, bits), bits) - w)
    return float(noise)


def output_noise(rows: np.ndarray, scale: np.ndarray) -> float:
    """Mean square that 8 bits add to a layer's outputs (R,O), summed over them, when they are divided by scale (O)."""
    y = rows / scale
    return float(np.square((fake_quantize(y, y.min(), y.max()) - y) * scale).mean(0).sum())
