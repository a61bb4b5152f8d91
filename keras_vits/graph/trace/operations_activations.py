"""Activations that are made of simpler operations, and logarithms of sums."""

from typing import Any

from keras_vits.graph.ir import Value

from ._tracer import Tracer, UnsupportedError, axes_of, translates

SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805  # Klambauer et al. 2017, as in every backend


def _positive(o: Any, name: str) -> float:
    """An argument that must be positive for the formula here to be the operation's."""
    value = float(getattr(o, name))
    if value <= 0:
        raise UnsupportedError(f"{name} is {value:g}; it must be positive")
    return value


@translates("Selu")
def selu(t: Tracer, o: Any, x: Any) -> Value:
    return t.build("mul", t.build("elu", t.floats(x), alpha=SELU_ALPHA), t.value(SELU_SCALE))


@translates("Celu")
def celu(t: Tracer, o: Any, x: Any) -> Value:
    """alpha * elu(x / alpha)"""
    alpha = _positive(o, "alpha")
    y = t.floats(x)
    y = y if alpha == 1 else t.build("mul", y, t.value(1 / alpha))
    y = t.build("elu", y, alpha=1.0)
    return y if alpha == 1 else t.build("mul", y, t.value(alpha))


@translates("Softsign")
def softsign(t: Tracer, o: Any, x: Any) -> Value:
    x = t.floats(x)
    return t.build("div", x, t.build("add", t.build("abs", x), t.value(1.0)))


@translates("LogSigmoid")
def log_sigmoid(t: Tracer, o: Any, x: Any) -> Value:
    return t.build("neg", t.build("softplus", t.build("neg", t.floats(x))))


@translates("HardTanh")
def hard_tanh(t: Tracer, o: Any, x: Any) -> Value:
    return t.build("clip", t.floats(x), low=-1.0, high=1.0)


@translates("TanhShrink")
def tanh_shrink(t: Tracer, o: Any, x: Any) -> Value:
    x = t.floats(x)
    return t.build("sub", x, t.build("tanh", x))


@translates("SoftShrink")
def soft_shrink(t: Tracer, o: Any, x: Any) -> Value:
    x, threshold = t.floats(x), _positive(o, "threshold")
    return t.build("sub", x, t.build("clip", x, low=-threshold, high=threshold))


@translates("HardShrink")
def hard_shrink(t: Tracer, o: Any, x: Any) -> Value:
    x = t.floats(x)
    outside = t.build("greater", t.build("abs", x), t.value(float(o.threshold)))
    return t.build("where", outside, x, t.value(0.0))


@translates("Threshold")
def threshold(t: Tracer, o: Any, x: Any) -> Value:
    x = t.floats(x)
    above = t.build("greater", x, t.value(float(o.threshold)))
    return t.build("where", above, x, t.value(float(o.default_value)))


@translates("Squareplus")
def squareplus(t: Tracer, o: Any, x: Any) -> Value:
    """(x + sqrt(x^2 + b)) / 2"""
    x = t.floats(x)
    root = t.build("sqrt", t.build("add", t.build("square", x), t.value(float(o.b))))
    return t.build("mul", t.build("add", x, root), t.value(0.5))


@translates("SparseSigmoid")
def sparse_sigmoid(t: Tracer, o: Any, x: Any) -> Value:
    """(x + 1) / 2, between 0 and 1"""
    half = t.build("mul", t.build("add", t.floats(x), t.value(1.0)), t.value(0.5))
    return t.build("clip", half, low=0.0, high=1.0)


@translates("SparsePlus")
def sparse_plus(t: Tracer, o: Any, x: Any) -> Value:
    """0 below -1, x above 1, and (x + 1)^2 / 4 between: of y = clip(x, -1, 1), (y + 1)^2 / 4 + (x - y) above 1"""
    x = t.floats(x)
    y = t.build("clip", x, low=-1.0, high=1.0)
    half = t.build("mul", t.build("add", y, t.value(1.0)), t.value(0.5))
    return t.build("add", t.build("square", half), t.build("relu", t.build("sub", x, y)))


@translates("Glu")
def glu(t: Tracer, o: Any, x: Any) -> Value:
    x, axis = t.floats(x), o.axis % len(x.shape)
    n = x.shape[axis]
    if n % 2:
        raise UnsupportedError(f"it halves an axis of {n} entries")
    gate = t.build("sigmoid", t.cut(x, axis, n // 2, n))
    return t.build("mul", t.cut(x, axis, 0, n // 2), gate)


# ---------------------------------------------------------------- logarithms of sums of exponentials


def _sum_of_exponentials(t: Tracer, x: Value, axes: tuple[int, ...]) -> tuple[Value, Value, Value]:
    """m, the largest entry; x - m; and log(sum(exp(x - m))), both along the axes, which are kept."""
    largest = t.build("max", x, axes=axes, keepdims=True)
    below = t.build("sub", x, largest)
    total = t.build("sum", t.build("exp", below), axes=axes, keepdims=True)
    return largest, below, t.build("log", total)


@translates("LogSoftmax")
def log_softmax(t: Tracer, o: Any, x: Any) -> Value:
    x = t.floats(x)
    _, below, log = _sum_of_exponentials(t, x, axes_of(o.axis, len(x.shape)))
    return t.build("sub", below, log)


@translates("Logsumexp")
def log_sum_exp(t: Tracer, o: Any, x: Any) -> Value:
    x = t.floats(x)
    axes = axes_of(o.axis, len(x.shape))
    largest, _, log = _sum_of_exponentials(t, x, axes)
    y = t.build("add", largest, log)
    return y if o.keepdims else t.reshape(y, [n for i, n in enumerate(x.shape) if i not in axes])
