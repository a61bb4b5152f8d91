"""The operators and constants of a .tflite file, to be read and changed: what quantization works on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...quantize.recipes import LayerConfig, Operation
from .packages import require, schema

LINEAR = {  # TFLite's name -> ours, of what has weights
    "FULLY_CONNECTED": Operation.DENSE,
    "CONV_2D": Operation.CONV,
    "DEPTHWISE_CONV_2D": Operation.DEPTHWISE,
}
ARRANGING = ("RESHAPE", "TRANSPOSE")
Operator = Any  # the schema's OperatorT, which is generated without types


@dataclasses.dataclass(eq=False)
class Layer:
    """A dense layer or convolution of a file, and how it is to be quantized.

    Attributes:
        kind: which of them.
        name: of its weight's layer, as everywhere in this package.
        output: name of its output tensor, by which a recipe finds it.
        operator: the file's operator; `x`, `weight`, `bias` and `y` are its tensors (-1: no bias).
        config: how it computes in the quantized file, or `None` to leave it in float.
        attended: whether it reads what an attention gives.
    """

    kind: Operation
    name: str
    output: str
    operator: Operator
    config: LayerConfig | None = None
    attended: bool = False

    @property
    def x(self) -> int:
        return int(self.operator.inputs[0])

    @property
    def weight(self) -> int:
        return int(self.operator.inputs[1])

    @property
    def bias(self) -> int:
        return int(self.operator.inputs[2]) if len(self.operator.inputs) > 2 else -1

    @property
    def y(self) -> int:
        return int(self.operator.outputs[0])

    @property
    def settings(self) -> LayerConfig:
        """The `config` of a layer that is quantized."""
        if self.config is None:
            raise RuntimeError(f"Layer {self.name!r} stays in float.")
        return self.config

    @property
    def bits(self) -> int:
        """Of a weight."""
        return self.settings.weights.bits

    @property
    def activation_bits(self) -> int | None:
        """Of a static recipe; `None` where activations are dynamically quantized, or stay in float."""
        return self.settings.activations.bits if self.settings.activations else None

    @property
    def dynamic(self) -> bool:
        """Whether each row of its inputs gets a range of its own when the file runs."""
        return self.settings.dynamic


@dataclasses.dataclass(eq=False)
class Attention:
    """softmax(q k') v of a file, by its operators: two products of matrices with a softmax between them."""

    scores: Operator
    softmax: Operator
    product: Operator

    @property
    def q(self) -> int:
        return int(self.scores.inputs[0])

    @property
    def k(self) -> int:
        return int(self.scores.inputs[1])

    @property
    def s(self) -> int:
        return int(self.scores.outputs[0])

    @property
    def p(self) -> int:
        return int(self.softmax.outputs[0])

    @property
    def v(self) -> int:
        return int(self.product.inputs[1])

    @property
    def y(self) -> int:
        return int(self.product.outputs[0])


class File:
    """The operators and constants of a .tflite file, to be read and changed. A tensor is its number.

    Args:
        content: bytes of the file.
    """

    def __init__(self, content: bytes) -> None:
        self.S, self.tools = schema(), require("ai_edge_litert.tools.flatbuffer_utils")
        self.model = self.tools.read_model_from_bytearray(content)
        self.main = self.model.subgraphs[0]
        self.codes = {v: k for k, v in vars(self.S.BuiltinOperator).items() if isinstance(v, int)}

    def bytes(self) -> Any:
        """Of the file as it is now."""
        return self.tools.convert_object_to_bytearray(self.model)

    # ---- what there is

    def builtin(self, operator: Operator) -> str:
        """TFLite's name of an operation."""
        return self.codes[self.model.operatorCodes[operator.opcodeIndex].builtinCode]

    def layers(self) -> list[Layer]:
        """Every dense layer and convolution with constant float weights."""
        found = []
        for operator in self.main.operators:
            kind = LINEAR.get(self.builtin(operator))
            if kind is not None and self._data(operator.inputs[1]) is not None:
                name = self.name(operator.inputs[1]).rpartition("/")[0]
                found.append(Layer(kind, name, self.name(operator.outputs[0]), operator))
        return found

    def attentions(self) -> list[Attention]:
        """Every `Attention`."""
        found = []
        for operator in self.main.operators:
            if self.builtin(operator) != "SOFTMAX":
                continue
            s, p = int(operator.inputs[0]), int(operator.outputs[0])
            if any(len(self.readers(tensor)) != 1 or self.is_output(tensor) for tensor in (s, p)):
                continue
            scores, (product,) = self.maker(s), self.readers(p)
            products = scores is not None and self.builtin(scores) == self.builtin(product) == "BATCH_MATMUL"
            if products and product.inputs[0] == p != product.inputs[1]:
                found.append(Attention(scores, operator, product))
        return found

    def name(self, tensor: int) -> str:
        return self.main.tensors[tensor].name.decode()

    def shape(self, tensor: int) -> tuple[int, ...]:
        return tuple(int(n) for n in self.main.tensors[tensor].shape)

    def maker(self, tensor: int) -> Operator | None:
        """The operator that computes a tensor, or `None`."""
        return next((op for op in self.main.operators if tensor in list(op.outputs)), None)

    def readers(self, tensor: int) -> list[Operator]:
        """The operators that read a tensor."""
        return [op for op in self.main.operators if tensor in list(op.inputs)]

    def source(self, tensor: int, through: Sequence[str] = ARRANGING) -> tuple[int, list[Operator]]:
        """(the tensor of which this one is an arrangement, operators that arrange it, the last one first)."""
        steps = []
        while (operator := self.maker(tensor)) is not None and self.builtin(operator) in through:
            steps.append(operator)
            tensor = int(operator.inputs[0])
        return tensor, steps

    def arrangements(self, tensor: int) -> list[Operator]:
        """Operators that arrange a tensor which nothing else reads, the first one first."""
        steps: list[Operator] = []
        while len(readers := self.readers(tensor)) == 1 and not self.is_output(tensor):
            if self.builtin(readers[0]) not in ARRANGING:
                break
            steps += readers
            tensor = int(readers[0].outputs[0])
        return steps

    def is_output(self, tensor: int) -> bool:
        return tensor in list(self.main.outputs)

    def is_shared(self, layer: Layer) -> bool:
        """Whether another operator reads the layer's weights too."""
        return len(self.readers(layer.weight)) > 1

    def is_grouped(self, layer: Layer) -> bool:
        """Whether it is a convolution within groups of channels."""
        return layer.kind is Operation.CONV and self.shape(layer.weight)[3] != self.shape(layer.x)[3]

    def scales(self, layer: Layer) -> bool:
        """Whether scaling a layer's weights and bias scales its outputs: no activation but ReLU is fused into it."""
        return layer.operator.builtinOptions.fusedActivationFunction in (0, 1) and not self.is_shared(layer)

    # ---- constants

    def _data(self, tensor: int) -> Any:
        return self.model.buffers[self.main.tensors[tensor].buffer].data

    def get(self, tensor: int) -> np.ndarray:
        """The array of a float32 constant."""
        return np.frombuffer(self._data(tensor), np.float32).reshape(self.main.tensors[tensor].shape)

    def set(self, tensor: int, array: np.ndarray) -> None:
        """Replaces the array of a float32 constant."""
        changed = self.main.tensors[tensor]
        shared = sum(t.buffer == changed.buffer for t in self.main.tensors) > 1  # two tensors may have one buffer
        if not changed.buffer or shared:
            self.model.buffers.append(self.S.BufferT())
            changed.buffer = len(self.model.buffers) - 1
        data = np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint8)
        self.model.buffers[changed.buffer].data = data

    def by_input(self, layer: Layer) -> np.ndarray:
        """A layer's weights (O,...,I); of a depthwise convolution (multiplier,height,width,I)."""
        weight = self.get(layer.weight)
        if layer.kind is not Operation.DEPTHWISE:
            return weight
        _, height, width, channels = weight.shape
        multiplier = layer.operator.builtinOptions.depthMultiplier
        return np.moveaxis(weight.reshape(height, width, channels // multiplier, multiplier), -1, 0)

    def set_bias(self, layer: Layer, array: np.ndarray) -> None:
        """A bias (O) of the layer's own: equal ones are one tensor in the file."""
        if layer.bias >= 0 and len(self.readers(layer.bias)) == 1:
            self.set(layer.bias, array)
        else:
            bias = self.tensor(f"{layer.output}/bias", array.shape, array)
            layer.operator.inputs = [*list(layer.operator.inputs)[:2], bias]

    def add_bias(self, layer: Layer, array: np.ndarray) -> None:
        """Adds (O) to a layer's bias, or gives it one."""
        self.set_bias(layer, array + (self.get(layer.bias) if layer.bias >= 0 else 0))

    def scale_outputs(self, layer: Layer, scale: np.ndarray) -> None:
        """Multiplies a layer's weights and bias, and so its outputs, by (O)."""
        weight = self.get(layer.weight)
        last = layer.kind is Operation.DEPTHWISE
        self.set(layer.weight, weight * (scale if last else scale.reshape(-1, *[1] * (weight.ndim - 1))))
        if layer.bias >= 0:
            self.set_bias(layer, self.get(layer.bias) * scale)

    # ---- what is added

    def tensor(self, name: str, shape: Sequence[int], array: np.ndarray | None = None) -> int:
        """A new float32 tensor; its number."""
        tensor = self.S.TensorT()
        tensor.name, tensor.shape, tensor.type = name.encode(), list(shape), self.S.TensorType.FLOAT32
        tensor.buffer = 0
        self.main.tensors.append(tensor)
        if array is not None:
            self.set(len(self.main.tensors) - 1, array)
        return len(self.main.tensors) - 1

    def multiply(self, tensor: int, factors: np.ndarray, readers: Sequence[Operator]) -> None:
        """Lets these operators read tensor * factors (C) instead of the tensor."""
        name, shape = self.name(tensor), self.main.tensors[tensor].shape
        by = self.tensor(f"{name}/factors", factors.shape, factors)
        result = self.tensor(f"{name}/scaled", shape)
        operator = self.S.OperatorT()
        operator.opcodeIndex = self._code("MUL")
        operator.inputs, operator.outputs = [tensor, by], [result]
        operator.builtinOptionsType, operator.builtinOptions = self.S.BuiltinOptions.MulOptions, self.S.MulOptionsT()
        for reader in readers:
            reader.inputs = [result if i == tensor else i for i in reader.inputs]
        first = min(i for i, op in enumerate(self.main.operators) if any(op is reader for reader in readers))
        self.main.operators.insert(first, operator)

    def _code(self, name: str) -> int:
        builtin = getattr(self.S.BuiltinOperator, name)
        for i, code in enumerate(self.model.operatorCodes):
            if code.builtinCode == builtin:
                return i
        code = self.S.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, builtin, 1
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1
