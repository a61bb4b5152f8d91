"""What the MIL operations mean that multiply matrices, slide windows or resample; see evaluate.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .evaluate import Array, bounded, defines, softmax

# ---------------------------------------------------------------- matrices


@defines("linear")
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    y = (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


@defines("matmul", broadcasts=True)
def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    return (np.swapaxes(x, -1, -2) if transpose_x else x) @ (np.swapaxes(y, -1, -2) if transpose_y else y)


@defines("einsum")
def einsum(values: Sequence[Array], equation: str) -> Array:
    x, y = values
    *outer, result = equation.replace(" ", "").replace("->", ",").split(",")
    return np.einsum(f"...{outer[0]},...{outer[1]}->...{result}", x, y, optimize=True)


@defines("scaled_dot_product_attention", broadcasts=True)
def scaled_dot_product_attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    scores = query @ np.swapaxes(key, -1, -2) / np.float32(math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == np.bool_ else scores + attn_mask
    return softmax(scores) @ value


# ---------------------------------------------------------------- windows


def _ints(numbers: Sequence[int] | None, default: int, rank: int) -> list[int]:
    return [default] * rank if numbers is None else [int(n) for n in numbers]


def _padding(
    shape: Sequence[int],
    size: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pad_type: str,
    pad: Sequence[int] | None,
) -> list[tuple[int, int]]:
    """(before, after) for each axis of space."""
    if pad_type == "custom":
        pads = [(int(a), int(b)) for a, b in np.reshape(pad, (-1, 2))]
        bounded(math.prod(float(n + a + b) for n, (a, b) in zip(shape, pads, strict=True)))
        return pads
    pads = []
    for n, k, s, d in zip(shape, size, strides, dilations, strict=True):
        total = 0 if pad_type == "valid" else max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        less = total // 2
        pads.append((total - less, less) if pad_type == "same_lower" else (less, total - less))
    return pads


def _windows(x: Array, size: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Array:
    """(B,C, space) -> (B,C, space of the output, size), a view."""
    n = len(size)
    span = [(k - 1) * d + 1 for k, d in zip(size, dilations, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(x, span, tuple(range(2, 2 + n)))
    return view[(..., *(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))]


@defines("conv", batched=True)
def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Sequence[int] | None = None,
    pad_type: str = "valid",
    pad: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    groups: int = 1,
) -> Array:
    n, size, groups = weight.ndim - 2, weight.shape[2:], int(groups)
    strides, dilations = _ints(strides, 1, n), _ints(dilations, 1, n)
    pads = _padding(x.shape[2:], size, strides, dilations, pad_type, pad)
    windows = _windows(np.pad(x, [(0, 0), (0, 0), *pads]), size, strides, dilations)
    batch, channels, space = x.shape[0], x.shape[1], windows.shape[2 : 2 + n]
    out = weight.shape[0]
    if groups == channels:  # depthwise: one multiply-add of the whole image for each tap
        y = np.zeros((batch, groups, out // groups, *space), x.dtype)
        taps = weight.reshape(groups, out // groups, *(1,) * n, *size)
        for tap in np.ndindex(*size):
            y += windows[(..., *tap)][:, :, None] * taps[(..., *tap)]
    else:  # one matrix product for each image and group
        order = (0, 1, *range(2 + n, 2 + 2 * n), *range(2, 2 + n))
        columns = windows.transpose(order).reshape(batch, groups, -1, math.prod(space))
        y = weight.reshape(groups, out // groups, -1) @ columns
    y = y.reshape(batch, out, *space)
    return y if bias is None else y + bias.reshape(-1, *(1,) * n)


def _pooled(
    x: Array,
    kernel_sizes: Sequence[int],
    strides: Sequence[int] | None,
    pad_type: str,
    pad: Sequence[int] | None,
    ceil_mode: bool,
    fill: float,
) -> tuple[Array, tuple[int, ...], Any]:
    """Windows of the padded tensor, their axes, and windows of ones with 0 where there is padding."""
    if ceil_mode:
        raise ValueError("ceil_mode of pooling has no reference definition")
    n, size = len(kernel_sizes), _ints(kernel_sizes, 1, len(kernel_sizes))
    steps, dilations = _ints(strides, 1, n), [1] * n
    pads = [(0, 0), (0, 0), *_padding(x.shape[2:], size, steps, dilations, pad_type, pad)]
    inside = np.pad(np.ones((1, 1, *x.shape[2:]), x.dtype), pads)
    windows = _windows(np.pad(x, pads, constant_values=fill), size, steps, dilations)
    return windows, tuple(range(-n, 0)), _windows(inside, size, steps, dilations)


@defines("max_pool", batched=True)
def max_pool(
    x: Array,
    kernel_sizes: Sequence[int],
    strides: Sequence[int] | None = None,
    pad_type: str = "valid",
    pad: Sequence[int] | None = None,
    ceil_mode: bool = False,
) -> Array:
    windows, axes, _ = _pooled(x, kernel_sizes, strides, pad_type, pad, ceil_mode, -np.inf)
    return windows.max(axes)


@defines("avg_pool", batched=True)
def avg_pool(
    x: Array,
    kernel_sizes: Sequence[int],
    strides: Sequence[int] | None = None,
    pad_type: str = "valid",
    pad: Sequence[int] | None = None,
    ceil_mode: bool = False,
    exclude_padding_from_average: bool = False,
) -> Array:
    windows, axes, inside = _pooled(x, kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0)
    count = inside.sum(axes) if exclude_padding_from_average else math.prod(int(k) for k in kernel_sizes)
    return windows.sum(axes) / count


# ---------------------------------------------------------------- resampling


def _resized(x: Array, places: Sequence[Array]) -> Array:
    """Linear interpolation along the last two axes at the given fractional places, edges replicated."""
    bounded(math.prod(map(len, places)) * math.prod(x.shape[:-2]))
    for axis, at in zip((-2, -1), places, strict=True):
        n = x.shape[axis]
        at = np.clip(at, 0, n - 1)
        low = np.floor(at).astype(int)
        t = (at - low).astype(x.dtype).reshape(-1, *(1,) * (-1 - axis))
        x = np.take(x, low, axis) * (1 - t) + np.take(x, np.minimum(low + 1, n - 1), axis) * t
    return x


def _places(n: int, size: int, align_corners: bool) -> Array:
    bounded(size)
    if align_corners:
        return np.arange(size) * ((n - 1) / max(size - 1, 1))
    return (np.arange(size) + 0.5) * (n / size) - 0.5


@defines("resize_bilinear")
def resize_bilinear(x: Array, target_size_height: int, target_size_width: int, sampling_mode: str = "DEFAULT") -> Array:
    if sampling_mode not in ("STRICT_ALIGN_CORNERS", "UNALIGN_CORNERS"):
        raise ValueError(f"resize_bilinear with sampling_mode {sampling_mode} has no reference definition")
    sizes = (int(target_size_height), int(target_size_width))
    return _resized(
        x, [_places(n, m, sampling_mode != "UNALIGN_CORNERS") for n, m in zip(x.shape[-2:], sizes, strict=True)]
    )


@defines("upsample_bilinear")
def upsample_bilinear(
    x: Array,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Array:
    if half_pixel_centers is not None and bool(half_pixel_centers) == bool(align_corners):
        raise ValueError(
            "upsample_bilinear with neither aligned corners nor half-pixel centres has no reference definition"
        )
    factors = (scale_factor_height, scale_factor_width)
    sizes = [math.floor(n * float(s)) for n, s in zip(x.shape[-2:], factors, strict=True)]
    return _resized(x, [_places(n, m, bool(align_corners)) for n, m in zip(x.shape[-2:], sizes, strict=True)])


@defines("upsample_nearest_neighbor")
def upsample_nearest_neighbor(x: Array, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Array:
    if int(scale_factor_height) != scale_factor_height or int(scale_factor_width) != scale_factor_width:
        raise ValueError("upsample_nearest_neighbor by a fraction has no reference definition")
    bounded(float(x.size) * float(scale_factor_height) * float(scale_factor_width))
    return np.repeat(np.repeat(x, int(scale_factor_height), -2), int(scale_factor_width), -1)


@defines("depth_to_space", batched=True)
def depth_to_space(x: Array, block_size: int) -> Array:
    (b, c, h, w), k = x.shape, int(block_size)
    return x.reshape(b, k, k, c // k**2, h, w).transpose(0, 3, 4, 1, 5, 2).reshape(b, c // k**2, h * k, w * k)


@defines("space_to_depth", batched=True)
def space_to_depth(x: Array, block_size: int) -> Array:
    (b, c, h, w), k = x.shape, int(block_size)
    return x.reshape(b, c, h // k, k, w // k, k).transpose(0, 3, 5, 1, 2, 4).reshape(b, c * k**2, h // k, w // k)


@defines("pixel_shuffle", batched=True)
def pixel_shuffle(x: Array, upscale_factor: int) -> Array:
    (b, c, h, w), k = x.shape, int(upscale_factor)
    return x.reshape(b, c // k**2, k, k, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(b, c // k**2, h * k, w * k)
