"""Operations on entries at one place: arithmetic, comparisons, activations, types."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_vits.graph.ir import Value

from ._tracer import NARROW, Tracer, UnsupportedError, graph_dtype, translates

BINARY = {  # of Keras -> of the Graph
    "Add": "add",
    "Subtract": "sub",
    "Multiply": "mul",
    "Maximum": "maximum",
    "Minimum": "minimum",
    "Equal": "equal",
    "NotEqual": "not_equal",
    "Greater": "greater",
    "GreaterEqual": "greater_equal",
    "Less": "less",
    "LessEqual": "less_equal",
}
OF_BOOLS = {"add": "logical_or", "maximum": "logical_or", "mul": "logical_and", "minimum": "logical_and"}
LOGICAL = {"LogicalAnd": "logical_and", "LogicalOr": "logical_or", "LogicalXor": "not_equal"}
UNARY = {  # integers keep their type
    "Negative": "neg",
    "Relu": "relu",
    "Relu6": "relu6",
}
UNARY_OF_FLOATS = {  # integers become floats
    "Exp": "exp",
    "Log": "log",
    "Sqrt": "sqrt",
    "Rsqrt": "rsqrt",
    "Sin": "sin",
    "Cos": "cos",
    "Tanh": "tanh",
    "Erf": "erf",
    "Floor": "floor",
    "Ceil": "ceil",
    "Sigmoid": "sigmoid",
    "Silu": "silu",
    "Softplus": "softplus",
    "HardSigmoid": "hard_sigmoid",
    "HardSilu": "hard_swish",
}


def _register(table: dict[str, str], translation: Callable[[str], Callable[..., Value]]) -> None:
    for name, op in table.items():
        translates(name)(translation(op))


def _binary(op: str) -> Callable[..., Value]:
    def binary(t: Tracer, operation: Any, a: Any, b: Any) -> Value:
        a, b = t.operands(a, b)
        return t.build(OF_BOOLS.get(op, op) if a.dtype == "bool" else op, a, b)

    return binary


def _logical(op: str) -> Callable[..., Value]:
    def logical(t: Tracer, operation: Any, a: Any, b: Any) -> Value:
        return t.build(op, t.cast(t.value(a), "bool"), t.cast(t.value(b), "bool"))

    return logical


def _unary(op: str) -> Callable[..., Value]:
    def unary(t: Tracer, operation: Any, x: Any) -> Value:
        return t.build(op, t.value(x))

    return unary


def _unary_of_floats(op: str) -> Callable[..., Value]:
    def unary_of_floats(t: Tracer, operation: Any, x: Any) -> Value:
        return t.build(op, t.floats(x))

    return unary_of_floats


_register(BINARY, _binary)
_register(LOGICAL, _logical)
_register(UNARY, _unary)
_register(UNARY_OF_FLOATS, _unary_of_floats)


@translates("Absolute", "Abs")
def absolute(t: Tracer, o: Any, x: Any) -> Value:
    x = t.value(x)
    return x if x.dtype in ("uint8", "bool") else t.build("abs", x)


@translates("Sign")
def sign(t: Tracer, o: Any, x: Any) -> Value:
    x = t.value(x)
    return t.build("minimum", x, t.value(np.uint8(1))) if x.dtype == "uint8" else t.build("sign", x)


@translates("Power")
def power(t: Tracer, o: Any, a: Any, b: Any) -> Value:
    a, b = t.operands(a, b)
    if a.dtype == "int32" and (b.data is None or (b.data < 0).any()):
        raise UnsupportedError(
            "a power of whole numbers is of known exponents that are not negative; cast it to float32"
        )
    return t.build("pow", a, b)


def _divided(op: str) -> Callable[..., Value]:
    def divided(t: Tracer, o: Any, a: Any, b: Any) -> Value:
        a, b = t.operands(a, b)
        if a.dtype == "bool" and op == "mod":
            a, b = t.cast(a, "int32"), t.cast(b, "int32")
        if a.dtype != "float32" and b.data is not None and not b.data.all() and not t.weightless:
            raise UnsupportedError("whole numbers are divided by zero")
        return t.build(op, a, b)

    return divided


_register({"FloorDivide": "floor_div", "Mod": "mod"}, _divided)


@translates("Divide", "TrueDivide")
def divide(t: Tracer, o: Any, a: Any, b: Any) -> Value:
    return t.build("div", *t.operands(a, b, least="float32"))


@translates("Reciprocal")
def reciprocal(t: Tracer, o: Any, x: Any) -> Value:
    return t.build("div", t.value(1.0), t.floats(x))


@translates("Log1p")
def log1p(t: Tracer, o: Any, x: Any) -> Value:
    return t.build("log", t.build("add", t.floats(x), t.value(1.0)))


@translates("Square")
def square(t: Tracer, o: Any, x: Any) -> Value:
    x = t.value(x)
    return t.build("square", t.cast(x, "int32") if x.dtype == "bool" else x)


@translates("Round")
def round_entries(t: Tracer, o: Any, x: Any) -> Value:
    x, decimals = t.value(x), int(o.decimals)
    if x.dtype != "float32":
        if decimals < 0:
            raise UnsupportedError("it rounds whole numbers to tens; cast them to float32")
        return x
    if not decimals:
        return t.build("round", x)
    scale = t.value(10.0 ** abs(decimals))
    before, after = ("mul", "div") if decimals > 0 else ("div", "mul")
    return t.build(after, t.build("round", t.build(before, x, scale)), scale)


@translates("LogicalNot")
def logical_not(t: Tracer, o: Any, x: Any) -> Value:
    return t.build("logical_not", t.cast(t.value(x), "bool"))


@translates("Gelu")
def gelu(t: Tracer, o: Any, x: Any) -> Value:
    return t.build("gelu", t.floats(x), approximate=bool(o.approximate))


@translates("Elu")
def elu(t: Tracer, o: Any, x: Any) -> Value:
    return t.build("elu", t.floats(x), alpha=float(o.alpha))


@translates("LeakyRelu")
def leaky_relu(t: Tracer, o: Any, x: Any) -> Value:
    return t.build("leaky_relu", t.floats(x), alpha=float(o.negative_slope))


@translates("Clip")
def clip(t: Tracer, o: Any, x: Any) -> Value:
    """Whole numbers stay such between whole bounds; between others they become floats, as on JAX and PyTorch."""
    if not all(isinstance(bound, (int, float)) for bound in (o.x_min, o.x_max)):
        return t.build("minimum", *t.operands(t.build("maximum", *t.operands(x, o.x_min)), o.x_max))
    x, low, high = t.value(x), float(o.x_min), float(o.x_max)
    if x.dtype == "float32":
        return t.build("clip", x, low=low, high=high)
    if not (low.is_integer() and high.is_integer()):
        return t.build("clip", t.cast(x, "float32"), low=low, high=high)
    x = x if x.dtype == "uint8" else t.cast(x, "int32")
    held = np.iinfo(x.dtype)
    low, high = (int(min(max(bound, held.min), held.max)) for bound in (low, high))
    return t.build("clip", x, low=low, high=high)


@translates("StopGradient", "Copy")
def unchanged(t: Tracer, o: Any, x: Any) -> Value:
    return t.value(x)


@translates("Cast", "ConvertToTensor")
def cast(t: Tracer, o: Any, x: Any) -> Value:
    x = t.value(x)
    return x if o.dtype is None else t.cast(x, graph_dtype(o.dtype))


@translates("SaturateCast")
def saturate_cast(t: Tracer, o: Any, x: Any) -> Value:
    """What a type does not hold becomes the nearest number that it does."""
    x, dtype = t.value(x), keras.backend.standardize_dtype(o.dtype)
    held = {
        **NARROW,
        "uint8": (0, 255),
        "bool": (0, 1),
        "int32": (-(2**31), 2**31 - 128 if x.dtype == "float32" else 2**31 - 1),
    }
    if dtype in held and x.dtype not in ("bool", dtype):
        low, high = held[dtype]
        if x.dtype == "uint8":
            x = t.cast(x, "int32")
        if x.dtype == "int32":
            low, high = max(low, -(2**31)), min(high, 2**31 - 1)
        x = t.build("clip", x, low=low, high=high)
    return t.cast(x, graph_dtype(dtype))


@translates("Where")
def where(t: Tracer, o: Any, condition: Any, a: Any = None, b: Any = None) -> Value:
    if a is None or b is None:
        raise UnsupportedError("it finds places; only the choice between two values is")
    condition = t.cast(t.value(condition), "bool")
    return t.build("where", condition, *t.operands(a, b))
