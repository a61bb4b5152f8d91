"""Operations along axes: sums, means, extremes, softmax and norms."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_vits.graph.ir import Value

from ._tracer import Tracer, UnsupportedError, axes_of, graph_dtype, narrow, translates


def _along(o: Any, x: Value) -> dict[str, Any]:
    return dict(axes=axes_of(o.axis, len(x.shape)), keepdims=bool(o.keepdims))


@translates("Mean")
def mean(t: Tracer, o: Any, x: Any) -> Value:
    x = t.floats(x)
    return t.build("mean", x, **_along(o, x))


def _total(op: str) -> Callable[..., Value]:
    def total(t: Tracer, o: Any, x: Any) -> Value:
        x = t.operands(x, least="int32")[0]
        if getattr(o, "dtype", None) is not None:  # it is computed in
            if graph_dtype(o.dtype) not in ("float32", "int32") or narrow(o.dtype):
                raise UnsupportedError(f"its dtype {o.dtype!r} is not float32 or int32")
            x = t.cast(x, graph_dtype(o.dtype))
        return t.build(op, x, **_along(o, x))

    return total


def _extreme(op: str) -> Callable[..., Value]:
    def extreme(t: Tracer, o: Any, x: Any) -> Value:
        x, initial = t.value(x), getattr(o, "initial", None)
        found = _of_bools(t, op, x, _along(o, x)) if x.dtype == "bool" else t.build(op, x, **_along(o, x))
        if initial is None:
            return found
        if found.dtype == "bool" or (found.dtype != "float32" and int(initial) != initial):
            raise UnsupportedError(f"its initial value {initial!r} is not of the type {found.dtype} of its input")
        number = float(initial) if found.dtype == "float32" else int(initial)
        return t.build("maximum" if op == "max" else "minimum", *t.operands(found, number))

    return extreme


def _of_bools(t: Tracer, op: str, x: Value, along: dict[str, Any]) -> Value:
    return t.cast(t.build(op, t.cast(x, "int32"), **along), "bool")


translates("Sum")(_total("sum"))
translates("Prod")(_total("prod"))
translates("Max", "Amax")(_extreme("max"))
translates("Min", "Amin")(_extreme("min"))


@translates("Any")
def any_entry(t: Tracer, o: Any, x: Any) -> Value:
    x = t.cast(t.value(x), "bool")
    return _of_bools(t, "max", x, _along(o, x))


@translates("All")
def all_entries(t: Tracer, o: Any, x: Any) -> Value:
    x = t.cast(t.value(x), "bool")
    return _of_bools(t, "min", x, _along(o, x))


@translates("Argmax")
def argmax(t: Tracer, o: Any, x: Any) -> Value:
    x = t.value(x)
    x = t.cast(x, "int32") if x.dtype == "bool" else x
    if o.axis is None:
        y = t.build("argmax", t.reshape(x, (-1,)), axis=0)
        return t.reshape(y, (1,) * len(x.shape)) if o.keepdims else y
    axis = o.axis % len(x.shape)
    y = t.build("argmax", x, axis=axis)
    return t.reshape(y, [1 if i == axis else n for i, n in enumerate(x.shape)]) if o.keepdims else y


@translates("TopK")
def top_k(t: Tracer, o: Any, x: Any) -> list[Value]:
    return list(t.build("top_k", t.value(x), k=int(o.k)))


@translates("Softmax")
def softmax(t: Tracer, o: Any, x: Any) -> Value:
    x, axis = t.floats(x), o.axis
    if axis is None:
        flat = t.build("softmax", t.reshape(x, (-1,)), axis=0)
        return t.reshape(flat, x.shape)
    if isinstance(axis, int):
        return t.build("softmax", x, axis=axis % len(x.shape))
    axes = axes_of(axis, len(x.shape))
    if len(axes) == 1:
        return t.build("softmax", x, axis=axes[0])
    kept = [i for i in range(len(x.shape)) if i not in axes]  # the others become one axis, the last
    perm = [*kept, *axes]
    moved = t.transpose(x, perm)
    flat = t.reshape(moved, [*(x.shape[i] for i in kept), math.prod(x.shape[i] for i in axes)])
    y = t.reshape(t.build("softmax", flat, axis=len(kept)), moved.shape)
    return t.transpose(y, [perm.index(i) for i in range(len(perm))])


def _moments(t: Tracer, x: Value, axes: tuple[int, ...], keepdims: bool) -> tuple[Value, Value]:
    mean = t.build("mean", x, axes=axes, keepdims=True)
    variance = t.build("mean", t.build("square", t.build("sub", x, mean)), axes=axes, keepdims=keepdims)
    return mean if keepdims else t.reshape(mean, variance.shape), variance


@translates("Moments")
def moments(t: Tracer, o: Any, x: Any) -> list[Value]:
    x = t.floats(x)
    return list(_moments(t, x, axes_of(o.axes, len(x.shape)), bool(o.keepdims)))


@translates("Var")
def variance(t: Tracer, o: Any, x: Any) -> Value:
    x = t.floats(x)
    return _moments(t, x, axes_of(o.axis, len(x.shape)), bool(o.keepdims))[1]


@translates("Std")
def deviation(t: Tracer, o: Any, x: Any) -> Value:
    return t.build("sqrt", variance(t, o, x))


@translates("Norm")
def norm(t: Tracer, o: Any, x: Any) -> Value:
    axes = o.axis if isinstance(o.axis, int) or o.axis is None else tuple(o.axis)
    spectral = o.ord == 2 and isinstance(axes, tuple) and len(axes) > 1  # the largest singular value of matrices
    if o.ord not in (None, 2, "fro") or axes is None or spectral:
        raise UnsupportedError("only the root of the sum of squares along given axes is")
    x = t.floats(x)
    return t.build("sqrt", t.build("sum", t.build("square", x), **_along(o, x)))


@translates("Normalize")
def normalize(t: Tracer, o: Any, x: Any) -> Value:  # x * rsqrt(max(sum(x^2), epsilon^2))
    if o.order != 2:
        raise UnsupportedError("only the 2-norm is")
    x, epsilon = t.floats(x), keras.backend.epsilon() if o.epsilon is None else o.epsilon
    total = t.build("sum", t.build("square", x), axes=axes_of(o.axis, len(x.shape)), keepdims=True)
    return t.build("mul", x, t.build("rsqrt", t.build("maximum", total, t.value(float(epsilon) ** 2))))


def _epsilon(o: Any) -> float:
    return float(keras.backend.epsilon() if o.epsilon is None else o.epsilon)


@translates("LayerNorm")
def layer_norm(t: Tracer, o: Any, x: Any, gamma: Any = None, beta: Any = None) -> Value:
    x = t.floats(x)
    axes, epsilon = axes_of(o.axis, len(x.shape)), _epsilon(o)
    wide = [n if i in axes else 1 for i, n in enumerate(x.shape)]

    def affine(v: Any) -> Value | None:
        if v is None or axes == (len(x.shape) - 1,) or len(v.shape) == len(x.shape):
            return None if v is None else t.floats(v)
        return t.constant(t.array(v).reshape(wide), v, form="wide")

    gamma, beta = affine(gamma), affine(beta)
    if not o.rms_scaling:
        return t.build("layer_norm", x, gamma, beta, axes=axes, epsilon=epsilon)
    y = t.build("mul", x, _inverse_root(t, _moments(t, x, axes, True)[1], epsilon))
    return y if gamma is None else t.build("mul", y, gamma)


@translates("RMSNorm")
def rms_norm(t: Tracer, o: Any, x: Any, scale: Any = None) -> Value:
    x = t.floats(x)
    square = t.build("mean", t.build("square", x), axes=axes_of(o.axis, len(x.shape)), keepdims=True)
    y = t.build("mul", x, _inverse_root(t, square, _epsilon(o)))
    return y if scale is None else t.build("mul", y, t.floats(scale))


def _inverse_root(t: Tracer, x: Value, epsilon: float) -> Value:
    return t.build("rsqrt", t.build("add", x, t.value(epsilon)))


@translates("BatchNorm")
def batch_norm(t: Tracer, o: Any, x: Any, mean: Any, variance: Any, offset: Any = None, scale: Any = None) -> Value:
    x = t.floats(x)
    shape = [n if i == o.axis % len(x.shape) else 1 for i, n in enumerate(x.shape)]
    shape = shape[-1:] if o.axis % len(x.shape) == len(x.shape) - 1 else shape
    mean, variance = (t.array(v).astype(np.float64) for v in (mean, variance))
    k = (1.0 if scale is None else t.array(scale)) / np.sqrt(variance + o.epsilon)
    c = (0.0 if offset is None else t.array(offset)) - mean * k
    y = t.build("mul", x, t.constant(k.reshape(shape), name="scale"))
    return t.build("add", y, t.constant(c.reshape(shape), name="offset"))
