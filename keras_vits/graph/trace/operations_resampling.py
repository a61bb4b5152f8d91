"""Operations that make images of another size: resampled, repeated, padded, cropped."""

import math
from typing import Any

import keras
import numpy as np

from keras_vits.graph.ir import Value
from keras_vits.graph.ops import DTYPES

from ._tracer import Tracer, UnsupportedError, pair, translates
from .along import multiplied


@translates("Resize")
def resize(t: Tracer, o: Any, x: Any) -> Value:
    """Integers are rounded and kept within their type, as in Keras.

    Whether it antialiases has no meaning for nearest pixels, and what it fills with none where nothing is padded.
    """
    size, x, _ = pair(o.size), t.image(o, x), (o.antialias, o.fill_value)
    if o.fill_mode != "constant":
        raise UnsupportedError(f"fill_mode {o.fill_mode!r} is not; constant is")
    x = _of_aspect(t, o, x, size)
    if x.shape[1:3] == size:
        return x
    if o.interpolation == "nearest":
        return t.build("resize", x, size=size, mode="nearest")
    if x.dtype != "float32":
        y = t.build("round", _resampled(t, o, t.cast(x, "float32"), size))
        if x.dtype == "uint8":
            y = t.build("clip", y, low=0.0, high=255.0)
        return t.cast(y, x.dtype)
    return _resampled(t, o, x, size)


def _of_aspect(t: Tracer, o: Any, x: Value, size: tuple[int, ...]) -> Value:
    """The image cropped, or padded, around its middle to the aspect ratio of what it becomes, as Keras does it."""
    (h, w), (high, wide), crops, pads = x.shape[1:3], size, o.crop_to_aspect_ratio, o.pad_to_aspect_ratio
    as_high, as_wide = int(w * high / wide), int(h * wide / high)
    if crops:
        for axis, n, kept in ((1, h, as_high), (2, w, as_wide)):
            kept = max(min(n, kept), 1)
            begin = (n - kept) // 2
            x = t.cut(x, axis, begin, begin + kept)
    elif pads:
        (top, left) = (max(as_high - h, 0) // 2, max(as_wide - w, 0) // 2)
        if top or left:
            around = ((0, 0), (top, top), (left, left), (0, 0))
            x = t.build("pad", x, pads=around, mode="constant", value=float(o.fill_value))
    return x


def _resampled(t: Tracer, o: Any, x: Value, size: tuple[int, ...]) -> Value:
    """A product of matrices for each axis, but for what every target has an operation for."""
    shrinks = any(s < n for s, n in zip(size, x.shape[1:3], strict=True))
    if o.interpolation == "bilinear" and not (o.antialias and shrinks):
        return t.build("resize", x, size=size, mode="bilinear")
    matrices = (None if n == s else _weights(o, n, s) for n, s in zip(x.shape[1:3], size, strict=True))
    return multiplied(t, x, *matrices)


def _weights(o: Any, n: int, size: int) -> np.ndarray:
    """(size, n): what each of n entries gives to each of `size` ones. Backends differ in bicubic's constants, and in
    how they treat the border: so it is read from the running one, by resizing the image of a unit matrix."""
    unit = keras.ops.convert_to_tensor(np.eye(n, dtype="float32")[None, :, :, None])
    image = keras.ops.image.resize(unit, (size, n), interpolation=o.interpolation, antialias=o.antialias)
    return keras.ops.convert_to_numpy(image)[0, :, :, 0].astype(DTYPES["float32"])


@translates("PadImages", "CropImages")
def in_simple_steps(t: Tracer, o: Any, x: Any) -> Value:
    """What Keras makes of a padding or a slice."""
    return t.value(o.call.__func__(o, x))  # which reads the arguments


@translates("Repeat")
def repeat(t: Tracer, o: Any, x: Any) -> Value:
    """Along the height or width of a map it is nearest upsampling, which targets have an operation for."""
    if o.axis is None or not isinstance(o.repeats, int):
        raise UnsupportedError("it repeats without an axis or by unequal counts")
    x, axis = t.value(x), o.axis % len(x.shape)
    shape = tuple(n * o.repeats if i == axis else n for i, n in enumerate(x.shape))
    if o.repeats == 1:
        return x
    if len(shape) == 4 and axis in (1, 2) and x.dtype == "float32":
        return t.build("resize", x, size=shape[1:3], mode="nearest")
    rows = t.reshape(x, (math.prod(x.shape[: axis + 1]), 1, math.prod(x.shape[axis + 1 :])))
    return t.reshape(t.build("tile", rows, reps=(1, o.repeats, 1)), shape)
