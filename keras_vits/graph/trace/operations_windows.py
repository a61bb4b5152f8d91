"""Operations on windows of feature maps (B,H,W,C): convolutions, poolings, resampling."""

from collections.abc import Callable, Sequence
from typing import Any

from keras_vits.graph.ir import Value
from keras_vits.graph.ops import same_padding

from ._tracer import Tracer, UnsupportedError, pair, translates


def _window(t: Tracer, o: Any, x: Any, size: Sequence[int], dilation: Any = 1) -> tuple[Value, dict[str, Any]]:
    x = t.image(o, x)
    strides, dilation = pair(o.strides or size), pair(dilation)
    pads = same_padding(x.shape[1:3], size, strides, dilation) if o.padding == "same" else ((0, 0), (0, 0))
    return x, dict(strides=strides, pads=pads, dilation=dilation)


@translates("Conv")
def conv(t: Tracer, o: Any, x: Any, kernel: Any) -> Value:
    groups = x.shape[-1] // kernel.shape[-2]
    x, attrs = _window(t, o, x, tuple(kernel.shape[:2]), o.dilation_rate)
    kernel = t.constant(t.array(kernel), kernel, "kernel")
    return t.build("conv2d", t.floats(x), kernel, None, groups=groups, **attrs)


@translates("DepthwiseConv")
def depthwise_conv(t: Tracer, o: Any, x: Any, kernel: Any) -> Value:
    x, attrs = _window(t, o, x, tuple(kernel.shape[:2]), o.dilation_rate)
    return t.build("depthwise_conv2d", t.floats(x), t.constant(t.array(kernel), kernel, "kernel"), None, **attrs)


@translates("SeparableConv")
def separable_conv(t: Tracer, o: Any, x: Any, depthwise_kernel: Any, pointwise_kernel: Any) -> Value:
    y = depthwise_conv(t, o, x, depthwise_kernel)
    kernel = t.constant(t.array(pointwise_kernel), pointwise_kernel, "kernel")
    return t.build("conv2d", y, kernel, None, strides=(1, 1), pads=((0, 0), (0, 0)), dilation=(1, 1), groups=1)


def _pool(op: str) -> Callable[..., Value]:
    def pool(t: Tracer, o: Any, x: Any) -> Value:
        size = pair(o.pool_size)
        x, attrs = _window(t, o, x, size)
        x = t.floats(x) if op == "avg_pool2d" else x
        return t.build(op, x, size=size, strides=attrs["strides"], pads=attrs["pads"])

    return pool


translates("MaxPool")(_pool("max_pool2d"))
translates("AveragePool")(_pool("avg_pool2d"))


@translates("Resize")
def resize(t: Tracer, o: Any, x: Any) -> Value:
    if o.interpolation not in ("bilinear", "nearest"):
        raise UnsupportedError(f"interpolation {o.interpolation!r} is not bilinear or nearest")
    size = pair(o.size)
    shrinks = any(s < n for s, n in zip(size, x.shape[1:3], strict=True))
    if (o.antialias and shrinks) or o.crop_to_aspect_ratio or o.pad_to_aspect_ratio:
        raise UnsupportedError("antialiasing, cropping and padding to the aspect ratio are not available")
    return t.build("resize", t.image(o, x), size=size, mode=o.interpolation)
