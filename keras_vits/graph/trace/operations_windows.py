"""Operations on windows of feature maps (B,H,W,C), or of sequences (B,L,C), which are maps of height 1."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_vits.graph.ir import Value
from keras_vits.graph.ops import same_padding

from ._tracer import Tracer, UnsupportedError, pair, translates
from .along import averages, multiplied

ONE_BY_ONE = dict(strides=(1, 1), pads=((0, 0), (0, 0)), dilation=(1, 1), groups=1)  # of a convolution of one entry


def _map(t: Tracer, o: Any, x: Any) -> Value:
    """(B,H,W,C), of a map or of a sequence (B,L,C)."""
    x = t.value(x)
    return t.image(o, t.reshape(x, (x.shape[0], 1, *x.shape[1:])) if len(x.shape) == 3 else x)


def _like(t: Tracer, y: Value, x: Any) -> Value:
    """A result (B,1,L,C) as a sequence (B,L,C), if the operation's input is one."""
    return t.reshape(y, (y.shape[0], *y.shape[2:])) if len(x.shape) == 3 else y


def _two(v: int | Sequence[int], x: Any, along: int = 1) -> tuple[int, ...]:
    """(height, width) of a size, a stride, a dilation; of a sequence's, the height is `along`."""
    return (along, *pair(v, 1)) if len(x.shape) == 3 else pair(v)


def _kernel(t: Tracer, kernel: Any, x: Any) -> Value:
    """(kh,kw,in,out)"""
    array = t.array(kernel)
    return t.constant(array[None] if len(x.shape) == 3 else array, kernel, "kernel", f"{len(x.shape) - 2}-D")


def _window(t: Tracer, o: Any, x: Any, size: Sequence[int], dilation: Any = 1) -> tuple[Value, dict[str, Any]]:
    """The map, and strides, pads and dilation of an operation on its windows."""
    strides, dilation = _two(o.strides or size, x), _two(dilation, x)
    image = _map(t, o, x)
    pads = same_padding(image.shape[1:3], size, strides, dilation) if o.padding == "same" else ((0, 0), (0, 0))
    return image, dict(strides=strides, pads=pads, dilation=dilation)


@translates("Conv")
def conv(t: Tracer, o: Any, x: Any, kernel: Any) -> Value:
    groups, weight = x.shape[-1] // kernel.shape[-2], _kernel(t, kernel, x)
    image, attrs = _window(t, o, x, weight.shape[:2], o.dilation_rate)
    return _like(t, t.build("conv2d", t.floats(image), weight, None, groups=groups, **attrs), x)


def _depthwise(t: Tracer, o: Any, x: Any, kernel: Any) -> Value:
    weight = _kernel(t, kernel, x)
    image, attrs = _window(t, o, x, weight.shape[:2], o.dilation_rate)
    return t.build("depthwise_conv2d", t.floats(image), weight, None, **attrs)


@translates("DepthwiseConv")
def depthwise_conv(t: Tracer, o: Any, x: Any, kernel: Any) -> Value:
    return _like(t, _depthwise(t, o, x, kernel), x)


@translates("SeparableConv")
def separable_conv(t: Tracer, o: Any, x: Any, depthwise_kernel: Any, pointwise_kernel: Any) -> Value:
    y = _depthwise(t, o, x, depthwise_kernel)
    return _like(t, t.build("conv2d", y, _kernel(t, pointwise_kernel, x), None, **ONE_BY_ONE), x)


# ---------------------------------------------------------------- transposed convolution


def _phases(n: int, k: int, stride: int, dilation: int, o: Any, extra: int | None) -> tuple[np.ndarray, int, int]:
    """One axis of a transposed convolution: which entries of the input and of the kernel meet in an output.

    Output q * stride + r is the sum over m of x[q + first + m] * kernel[taps[r, m]], where a tap of -1 is zero.

    Args:
        n: entries of the input.
        k: of the kernel.
        stride, dilation: of the operation.
        o: the operation.
        extra: its output padding, along this axis.

    Returns:
        taps (stride, M); first, which may be negative; and the number of outputs.
    """
    span = (k - 1) * dilation + 1
    if o.padding == "same":  # Keras: TensorFlow's rule, whose left padding is that of the convolution back to the input
        length = n * stride if extra is None else (n - 1) * stride + span % 2 + extra
        before = max((n - 1) * stride + span - length, 0) // 2
    else:
        length, before = (n - 1) * stride + (max(span, stride) if extra is None else span + extra), 0
    met = {  # (r, k) -> the input's place from q
        (r, j): (r + before - j * dilation) // stride
        for r in range(stride)
        for j in range(k)
        if (r + before - j * dilation) % stride == 0
    }
    first, last = min(met.values()), max(met.values())
    taps = np.full((stride, last - first + 1), -1)
    for (r, j), m in met.items():
        taps[r, m - first] = j
    return taps, first, length


@translates("ConvTranspose")
def conv_transpose(t: Tracer, o: Any, x: Any, kernel: Any) -> Value:
    """Each of the stride^2 outputs between two inputs is a convolution of its own: one convolution makes them all as
    channels, and they are moved to their places. Nothing is multiplied by the zeros of a stretched input."""
    image, weight = t.floats(_map(t, o, x)), t.array(kernel)  # (kh,kw,out,in)
    weight = weight[None] if len(x.shape) == 3 else weight
    strides, dilation = _two(o.strides, x), _two(o.dilation_rate, x)
    extra = (None, None) if o.output_padding is None else _two(o.output_padding, x, along=0)
    axes = [
        _phases(n, k, s, d, o, e)
        for n, k, s, d, e in zip(image.shape[1:3], weight.shape[:2], strides, dilation, extra, strict=True)
    ]
    (rows, _, _), (columns, _, _) = axes
    padded = np.pad(weight, ((0, 1), (0, 1), (0, 0), (0, 0)))  # so that tap -1 is zero
    phases = padded[rows[:, :, None, None], columns]  # (sh,M,sw,M',out,in)
    phases = phases.transpose(1, 3, 5, 0, 2, 4).reshape(rows.shape[1], columns.shape[1], weight.shape[3], -1)
    pads = []
    for axis, (taps, first, length) in enumerate(axes, 1):
        n, steps = image.shape[axis], -(-length // taps.shape[0])
        after = steps - n + first + taps.shape[1] - 1
        image = t.cut(image, axis, max(first, 0), n + min(after, 0))
        pads.append((max(-first, 0), max(after, 0)))
    form = f"phases {strides} {dilation} {o.padding} {extra}"
    made = t.constant(phases, kernel, "kernel", form)
    y = _interleaved(t, t.build("conv2d", image, made, None, **{**ONE_BY_ONE, "pads": tuple(pads)}), strides)
    for axis, (_, _, length) in enumerate(axes, 1):
        y = t.cut(y, axis, 0, length)
    return _like(t, y, x)


def _interleaved(t: Tracer, y: Value, block: Sequence[int]) -> Value:
    """(B,H,W,bh*bw*C) -> (B,H*bh,W*bw,C), as `depth_to_space`, whose block is a square."""
    (b, h, w, c), (high, wide) = y.shape, block
    if high == wide:
        return y if high == 1 else t.build("depth_to_space", y, block=high)
    rows = t.reshape(y, (b * h, w, high, c // high))
    return t.reshape(t.transpose(rows, (0, 2, 1, 3)), (b, h * high, w * wide, c // (high * wide)))


# ---------------------------------------------------------------- patches


@translates("ExtractPatches")
def extract_patches(t: Tracer, o: Any, x: Any) -> Value:
    """Patches that do not overlap are moved; others are read by a convolution with ones and zeros, as in Keras."""
    if o.is_3d:
        raise UnsupportedError("only patches of 2-D images are")
    x = t.image(o, x)
    (high, wide), strides, dilation = pair(o.size), pair(o.strides), pair(o.dilation_rate)
    c, pads = x.shape[3], ((0, 0), (0, 0))
    if o.padding == "same":
        pads = same_padding(x.shape[1:3], (high, wide), strides, dilation)
    if strides != (high, wide) or dilation != (1, 1):
        ones = np.eye(high * wide * c, dtype="float32").reshape(high, wide, c, -1)
        attrs = dict(strides=strides, pads=pads, dilation=dilation, groups=1)
        return t.build("conv2d", t.floats(x), t.constant(ones, name="patches"), None, **attrs)
    if any(map(any, pads)):
        x = t.build("pad", x, pads=((0, 0), *pads, (0, 0)), mode="constant", value=0.0)
    h, w = x.shape[1] // high, x.shape[2] // wide
    x = t.cut(t.cut(x, 1, 0, h * high), 2, 0, w * wide)
    if high == wide:
        return x if high == 1 else t.build("space_to_depth", x, block=high)
    rows = t.reshape(x, (x.shape[0] * h, high, w, wide * c))
    return t.reshape(t.transpose(rows, (0, 2, 1, 3)), (x.shape[0], h, w, high * wide * c))


# ---------------------------------------------------------------- poolings


def _pooled(t: Tracer, op: str, x: Value, **attrs: Any) -> Value:
    return t.build(op, t.floats(x) if op == "avg_pool2d" else x, **attrs)


def _pool(op: str) -> Callable[..., Value]:
    def pool(t: Tracer, o: Any, x: Any) -> Value:
        size = _two(o.pool_size, x)
        image, attrs = _window(t, o, x, size)
        pads = attrs["pads"]
        if op == "avg_pool2d" and keras.backend.backend() == "torch" and any(a != b for a, b in pads):
            # Keras on PyTorch repeats the border where one side gets more: elsewhere padding does not count.
            around = ((0, 0), *pads, (0, 0))
            image, pads = t.build("pad", image, pads=around, mode="edge", value=0.0), ((0, 0), (0, 0))
        return _like(t, _pooled(t, op, image, size=size, strides=attrs["strides"], pads=pads), x)

    return pool


translates("MaxPool")(_pool("max_pool2d"))
translates("AveragePool")(_pool("avg_pool2d"))


def _adaptive_pool(op: str) -> Callable[..., Value]:
    """To a given size: output i of n entries reads those from floor(i n / size) to ceil((i + 1) n / size)."""

    def pool(t: Tracer, o: Any, x: Any) -> Value:
        size, image = _two(o.output_size, x), _map(t, o, x)
        given = image.shape[1:3]
        if not any(n % s for n, s in zip(given, size, strict=True)):
            window = tuple(n // s for n, s in zip(given, size, strict=True))
            return _like(t, _pooled(t, op, image, size=window, strides=window, pads=((0, 0), (0, 0))), x)
        parts = [[(i * n // s, -(-(i + 1) * n // s)) for i in range(s)] for n, s in zip(given, size, strict=True)]
        if op == "avg_pool2d":
            matrices = [averages(part, n) for part, n in zip(parts, given, strict=True)]
            return _like(t, multiplied(t, t.floats(image), *(None if m.size == 1 else m for m in matrices)), x)
        for axis, part in enumerate(parts, 1):
            largest = (t.build("max", t.cut(image, axis, a, b), axes=(axis,), keepdims=True) for a, b in part)
            image = t.build("concat", *largest, axis=axis)
        return _like(t, image, x)

    return pool


translates("AdaptiveMaxPool")(_adaptive_pool("max_pool2d"))
translates("AdaptiveAveragePool")(_adaptive_pool("avg_pool2d"))
