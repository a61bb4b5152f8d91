"""Operations on each number alone: arithmetic, comparisons, activations, types."""

from __future__ import annotations

import typing

import numpy as np

from keras_vits.graph.ops import DTYPES

from ._registry import given, handles

if typing.TYPE_CHECKING:
    from keras_vits.graph.ir import Node

    from ..writer import Writer

BUILTINS = {  # operation -> TFLite's operator and its table of options, which has no fields
    "maximum": ("MAXIMUM", "MaximumMinimum"),
    "minimum": ("MINIMUM", "MaximumMinimum"),
    "pow": ("POW", "Pow"),
    "floor_div": ("FLOOR_DIV", "FloorDiv"),
    "mod": ("FLOOR_MOD", "FloorMod"),
    "equal": ("EQUAL", "Equal"),
    "not_equal": ("NOT_EQUAL", "NotEqual"),
    "greater": ("GREATER", "Greater"),
    "greater_equal": ("GREATER_EQUAL", "GreaterEqual"),
    "less": ("LESS", "Less"),
    "less_equal": ("LESS_EQUAL", "LessEqual"),
    "logical_and": ("LOGICAL_AND", "LogicalAnd"),
    "logical_or": ("LOGICAL_OR", "LogicalOr"),
    "logical_not": ("LOGICAL_NOT", "LogicalNot"),
    "where": ("SELECT_V2", "SelectV2"),
    "abs": ("ABS", "Abs"),
    "neg": ("NEG", "Neg"),
    "exp": ("EXP", "Exp"),
    "log": ("LOG", None),
    "sqrt": ("SQRT", None),
    "rsqrt": ("RSQRT", None),
    "square": ("SQUARE", "Square"),
    "sin": ("SIN", None),
    "cos": ("COS", "Cos"),
    "tanh": ("TANH", None),
    "floor": ("FLOOR", None),
    "ceil": ("CEIL", None),
    "round": ("ROUND", None),
    "sign": ("SIGN", "Sign"),
    "sigmoid": ("LOGISTIC", None),
    "hard_swish": ("HARD_SWISH", "HardSwish"),
}


@handles(*BUILTINS)
def builtin(w: Writer, node: Node) -> None:
    code, options = BUILTINS[node.op]
    w.emit_node(node, code, options)


@handles("add", "sub", "mul", "div")
def arithmetic(w: Writer, node: Node) -> None:
    out, activation = w.activation(node)
    options = node.op.capitalize()
    w.emit(node.op.upper(), [w.value(v) for v in node.inputs], [out], options, fusedActivationFunction=activation)


@handles("relu", "relu6")
def relu(w: Writer, node: Node) -> None:
    if node not in w.fused:
        w.emit_node(node, node.op.upper())


@handles("gelu")
def gelu(w: Writer, node: Node) -> None:
    w.emit_node(node, "GELU", "Gelu", approximate=node.attrs["approximate"])


@handles("leaky_relu")
def leaky_relu(w: Writer, node: Node) -> None:
    w.emit_node(node, "LEAKY_RELU", "LeakyRelu", alpha=node.attrs["alpha"])


@handles("elu")
def elu(w: Writer, node: Node) -> None:
    """The operator has alpha 1; with another one it is relu(x) + alpha * elu(min(x, 0))."""
    if node.attrs["alpha"] == 1.0:
        w.emit_node(node, "ELU")
        return
    x, shape = w.value(node.inputs[0]), node.output.shape
    below = w.step("MINIMUM", [x, w.constant(0.0, np.float32)], shape, "below", "MaximumMinimum")
    alpha = w.constant(node.attrs["alpha"], np.float32, "alpha")
    below = w.step("MUL", [w.step("ELU", [below], shape, "elu"), alpha], shape, "scaled", "Mul")
    w.emit("ADD", [w.step("RELU", [x], shape, "relu"), below], [w.value(node.output)], "Add")


@handles("erf")
def erf(w: Writer, node: Node) -> None:
    w.unsupported(node, "it has no error function; use keras.activations.gelu for a GELU")


@handles("silu")
def silu(w: Writer, node: Node) -> None:
    x = w.value(node.inputs[0])
    gate = w.step("LOGISTIC", [x], node.output.shape, "sigmoid")
    w.emit("MUL", [x, gate], [w.value(node.output)], "Mul")


@handles("hard_sigmoid")
def hard_sigmoid(w: Writer, node: Node) -> None:
    """relu6(x + 3) / 6"""
    x, three, sixth = w.value(node.inputs[0]), w.constant(3.0, np.float32), w.constant(1 / 6, np.float32)
    relu6 = w.S.ActivationFunctionType.RELU6
    y = w.step("ADD", [x, three], node.output.shape, "shift", "Add", fusedActivationFunction=relu6)
    w.emit("MUL", [y, sixth], [w.value(node.output)], "Mul")


@handles("softplus")
def softplus(w: Writer, node: Node) -> None:
    """relu(x) + log(1 + exp(-|x|))"""
    x, shape = w.value(node.inputs[0]), node.output.shape
    y = w.step("NEG", [w.step("ABS", [x], shape, "abs", "Abs")], shape, "neg", "Neg")
    y = w.step("ADD", [w.step("EXP", [y], shape, "exp", "Exp"), w.constant(1.0, np.float32)], shape, "add", "Add")
    y = w.step("LOG", [y], shape, "log")
    w.emit("ADD", [w.step("RELU", [x], shape, "relu"), y], [w.value(node.output)], "Add")


@handles("clip")
def clip(w: Writer, node: Node) -> None:
    low, high = (w.constant(node.attrs[k], DTYPES[node.output.dtype], k) for k in ("low", "high"))
    y = w.step("MAXIMUM", [w.value(node.inputs[0]), low], node.output.shape, "low", "MaximumMinimum")
    w.emit("MINIMUM", [y, high], [w.value(node.output)], "MaximumMinimum")


@handles("cast")
def cast(w: Writer, node: Node) -> None:
    source, made = (getattr(w.S.TensorType, value.dtype.upper()) for value in (given(node), node.output))
    w.emit_node(node, "CAST", "Cast", inDataType=source, outDataType=made)


@handles("dequantize")
def dequantize(w: Writer, node: Node) -> None:
    q = w.tensors[w.value(node.inputs[0])]
    q.quantization = w.S.QuantizationParametersT()
    q.quantization.scale = np.array([node.attrs["scale"]], np.float32)
    q.quantization.zeroPoint = np.array([node.attrs["zero_point"]], np.int64)
    w.emit_node(node, "DEQUANTIZE", "Dequantize")
