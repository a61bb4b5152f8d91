"""A file as single operations, each run alone by the file's own runtime, and sums in half precision as on GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Arrays = Sequence[np.ndarray]
TOGETHER = 4  # products that a GPU adds before it rounds: those of one vector


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One operation of a file.

    Attributes:
        name: of its first output, which begins with our layer's name.
        operation: the format's name of it.
        inputs: names of the tensors that it reads, but for constants that are no floating-point numbers.
        outputs: names of the tensors that it computes.
        run: arrays of the inputs -> arrays of the outputs, computed by the runtime.
        summed: the same with every sum rounded to half precision as it grows; `None` where it adds nothing up.
        adds: whether it adds, subtracts or compares, so that an error of one operand counts against the result's size.
        exact: whether its floating-point results are sums of integers or their scales, which belong to the arithmetic
            of integers: no runtime rounds them to half precision.
    """

    name: str
    operation: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[[Arrays], list[np.ndarray]]
    summed: Callable[[Arrays], list[np.ndarray]] | None = None
    adds: bool = False
    exact: bool = False


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Steps:
    """The operations of a file in the order in which they run.

    Attributes:
        steps: them.
        inputs: names of the file's input tensors, in its order.
        dtypes: numpy's, of the inputs.
        batch: B, of the inputs.
        outputs: names of the file's output tensors, in its order.
        constants: name -> array of floating-point numbers that half precision rounds. Quantized weights of LiteRT are
            among them, dequantized; those of ONNX stay in their step with their scales.
    """

    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    dtypes: tuple[Any, ...]
    batch: int
    outputs: tuple[str, ...]
    constants: Mapping[str, np.ndarray]


def half(x: np.ndarray) -> np.ndarray:
    """Floating-point numbers rounded to half precision, as float32; other arrays as they are."""
    if x.dtype.kind != "f":
        return x
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def half_matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (...,M,K) b (...,K,N), where the sum is rounded to half precision after every four products."""
    total = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), np.float32)
    for k in range(0, a.shape[-1], TOGETHER):
        total = half(total + a[..., k : k + TOGETHER] @ b[..., k : k + TOGETHER, :])
    return total


def half_sum(x: np.ndarray, axes: Sequence[int], keepdims: bool) -> np.ndarray:
    """Sum over axes, rounded to half precision after every four entries."""
    axes = tuple(axis % x.ndim for axis in axes)
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    flat = x.transpose(*kept, *axes).reshape(*(x.shape[axis] for axis in kept), -1)
    total = np.zeros(flat.shape[:-1], np.float32)
    for k in range(0, flat.shape[-1], TOGETHER):
        total = half(total + flat[..., k : k + TOGETHER].sum(-1))
    return total.reshape([1 if i in axes else n for i, n in enumerate(x.shape)]) if keepdims else total


def windows(
    x: np.ndarray,
    size: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[Sequence[int]],
    dilation: Sequence[int] = (1, 1),
) -> np.ndarray:
    """(B,H,W,C) -> (B,h,w,kh,kw,C), padded with zeros."""
    x = np.pad(x, ((0, 0), *map(tuple, pads), (0, 0)))
    span = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(x, span, axis=(1, 2))
    view = view[:, :: strides[0], :: strides[1], :, :: dilation[0], :: dilation[1]]
    return np.moveaxis(view, 3, -1)


def half_convolution(columns: np.ndarray, kernel: np.ndarray, groups: int = 1) -> np.ndarray:
    """(B,h,w,kh,kw,C) of `windows`, kernel (kh,kw,C/groups,O) -> (B,h,w,O), by `half_matmul`."""
    inside, outside = kernel.shape[2], kernel.shape[3] // groups
    parts = []
    for g in range(groups):
        rows = columns[..., g * inside : (g + 1) * inside].reshape(*columns.shape[:3], -1)
        parts.append(half_matmul(rows, kernel[..., g * outside : (g + 1) * outside].reshape(-1, outside)))
    return np.concatenate(parts, -1)
