"""A numpy evaluator of a saved Core ML ML Program, for checks off a Mac.

It reads a .mlpackage from its own bytes (Manifest.json, the protobuf, weights/weight.bin) and computes every operation
from its documented definition (evaluate.py, evaluate_matrix.py), rounded to the type that the file declares: a float16
program is rounded operation by operation, compressed weights are decoded as the file says (encoding.py). It shows what
the file says, not what Apple's hardware makes of it.

Reference  coremltools' `mlmodel/format/Model.proto` and `mlmodel/format/MIL.proto`.
"""

from __future__ import annotations

import inspect
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from keras_vits.graph.ir import histogram

from ...headers import package_model, within
from . import evaluate_matrix  # noqa: F401  it defines operations
from .common import coremltools
from .encoding import TYPES, Blobs, decode, rounded, shape_of
from .evaluate import BROADCAST, OPS, TENSORS

Arguments = dict[str, Any]  # of an operation: an array, the name of a value, or a list of them


class Program:
    """A saved ML Program: `program({input: array}) -> {output: array}`, any number of images at once.

    Args:
        path: of the .mlpackage folder.

    Attributes:
        inputs: name -> (shape, type); the type of an image input is "rgb", "bgr" or "gray".
        outputs: names.
        operations: name of a MIL operation -> how often it occurs, constants left out, most frequent first.

    Raises:
        ValueError: the package is damaged or truncated, or holds an operation that has no definition here.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        proto = coremltools().proto
        try:
            model = package_model(self.path)
            self.spec = proto.Model_pb2.Model.FromString(model.read_bytes())
            self._folder = model.parent
            self._files: dict[str, Blobs] = {}
            unknown = self._read()
        except ImportError:
            raise
        except Exception as e:  # a damaged program fails where it has lost something: in protobuf, in numpy
            raise ValueError(
                f"{self.path} is not a complete .mlpackage ({reason_of(e)}): export the model again."
            ) from None
        if unknown:
            raise ValueError(f"{self.path} cannot be evaluated: no reference definition of {', '.join(unknown)}.")

    def _read(self) -> list[str]:
        """Finds inputs, outputs, constants and steps; returns the operations without a definition, if there are any."""
        if self.spec.WhichOneof("Type") != "mlProgram":
            raise ValueError("it holds no ML Program")
        function = self.spec.mlProgram.functions["main"]
        block = function.block_specializations[function.opset]
        colours = {10: "gray", 20: "rgb", 30: "bgr"}
        pictures = [i for i in self.spec.description.input if i.type.HasField("imageType")]
        orders = {i.name: colours[i.type.imageType.colorSpace] for i in pictures}
        kind = lambda i: orders.get(i.name, TYPES[i.type.tensorType.dataType][0])
        self.inputs = {i.name: (shape_of(i.type.tensorType), kind(i)) for i in function.inputs}
        self.outputs = tuple(block.outputs)
        self.operations = histogram(op.type for op in block.operations if op.type != "const")
        if unknown := sorted(set(self.operations) - set(OPS) - {"classify"}):
            return unknown
        self._constants: dict[str, Any] = {}
        self._steps: list[tuple[str, Arguments, list[tuple[str, tuple[int, ...], int]]]] = []
        self._free: dict[int, list[str]] = {}
        for op in block.operations:
            if op.type == "const":
                self._constants[op.outputs[0].name] = self._value(op.attributes["val"])
            else:
                self._prepare(op)
        made = {name for _, _, outputs in self._steps for name, _, _ in outputs} | set(self.inputs)
        if not self.outputs or not self.inputs:
            raise ValueError("its program has no inputs or no outputs")
        read = {name for _, arguments, _ in self._steps for name in _names(arguments)} | set(self.outputs)
        if lost := sorted(read - made):
            raise ValueError(f"nothing gives the values {', '.join(lost[:3])}")
        last = {name: i for i, (_, arguments, _) in enumerate(self._steps) for name in _names(arguments)}
        for name, i in last.items():  # a value goes after the last step that reads it
            if name not in self.outputs:
                self._free.setdefault(i, []).append(name)
        return []

    def _prepare(self, op: Any) -> None:
        """An operation becomes a step, or a constant when it depends on no input."""
        arguments: Arguments = {}
        for key, argument in op.inputs.items():
            found = [
                _Name(b.name) if b.WhichOneof("binding") == "name" else self._value(b.value) for b in argument.arguments
            ]
            found = [self._constants.get(v, v) if isinstance(v, _Name) else v for v in found]
            arguments[key] = found if key == "values" else found[0]
        if op.type.startswith("constexpr_"):  # those of iOS 16 keep their operands as attributes
            arguments |= {
                k: self._value(v) for k, v in op.attributes.items() if k in inspect.signature(OPS[op.type]).parameters
            }
        outputs = [(o.name, shape_of(o.type.tensorType), o.type.tensorType.dataType) for o in op.outputs]
        if op.type == "classify" or _names(arguments):
            self._steps.append((op.type, arguments, outputs))
            return
        if not op.type.startswith("constexpr_"):
            arguments = {k: _lead(v) if k in TENSORS else v for k, v in arguments.items()}
        results = self._results(op.type, arguments)
        for (name, shape, code), result in zip(outputs, results, strict=True):
            self._constants[name] = rounded(np.asarray(result).reshape(shape), code)

    def _value(self, value: Any) -> Any:
        """A literal of the file; floating-point ones as float32."""
        if value.type.WhichOneof("type") == "listType":
            return [self._value(v) for v in value.immediateValue.list.values]
        code, shape = value.type.tensorType.dataType, shape_of(value.type.tensorType)
        if code not in TYPES:
            raise ValueError(f"it holds a constant of the unknown type {code}")
        if value.WhichOneof("value") == "blobFileValue":
            name = value.blobFileValue.fileName
            if name not in self._files:
                self._files[name] = Blobs(within(self._folder, name.removeprefix("@model_path/"), self.path))
            array = decode(self._files[name][value.blobFileValue.offset], code, shape)
        else:
            kind = value.immediateValue.tensor.WhichOneof("value")
            values = getattr(value.immediateValue.tensor, kind).values
            if kind == "strings":
                return list(values) if shape else values[0]
            array = decode(values, code, shape) if kind == "bytes" else np.array(values, TYPES[code][1]).reshape(shape)
        return array.astype(np.float32) if array.dtype == np.float16 else array

    def _results(self, kind: str, arguments: Arguments) -> list[np.ndarray]:
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            results = OPS[kind](**arguments)
        return results if isinstance(results, list) else [results]

    def __call__(self, inputs: Mapping[str, np.ndarray], trace: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
        """Evaluates N images at once.

        Args:
            inputs: name -> array (N, *shape), where the shape is that of the file's input and has its own batch; for an
                image input, pixels 0 to 255 (N,H,W,3) in the order red, green, blue, or (N,H,W,1).
            trace: a dict that receives the inputs and every intermediate value by name, or `None`.

        Returns:
            Name -> array (N, *shape) of the output; for the outputs of a classifier, N labels and N dicts of
            probabilities.

        Raises:
            ValueError: a missing input or one of another shape, or a program whose steps do not fit each other.
        """
        values = self._given(inputs)
        if trace is not None:
            trace |= values
        count = len(next(iter(values.values())))
        for i in range(len(self._steps)):
            try:
                self._step(i, count, values, trace)
            except Exception as e:  # whatever numpy raises on operands that do not belong together
                kind, _, outputs = self._steps[i]
                raise ValueError(
                    f"{self.path.name} cannot be computed at {kind} {', '.join(name for name, _, _ in outputs)} "
                    f"({reason_of(e)}): export the model again."
                ) from None
        return {name: values[name] for name in self.outputs}

    def _given(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Name -> array (N, *shape) of each input, as the program computes with them."""
        values: dict[str, Any] = {}
        for name, (shape, kind) in self.inputs.items():
            if name not in inputs:
                raise ValueError(f"{self.path.name} needs the input {name!r}; received {', '.join(inputs) or 'none'}.")
            array = np.asarray(inputs[name])
            if kind in ("rgb", "bgr", "gray"):
                array = np.moveaxis(array, -1, 1)[:, None, :: -1 if kind == "bgr" else 1]
            if array.shape[1:] != shape:
                raise ValueError(
                    f"Input {name!r} of {self.path.name} has shape {shape}; received {array.shape[1:]} for each image."
                )
            values[name] = array.astype(np.int32 if kind == "int32" else np.float32)
            if kind == "fp16":
                values[name] = rounded(values[name], 10)
        return values

    def _step(self, i: int, count: int, values: dict[str, Any], trace: dict[str, np.ndarray] | None) -> None:
        """Computes a step of the program from the values so far, adds what it gives, and drops what no other reads."""
        kind, arguments, outputs = self._steps[i]
        find = lambda v: values[v] if isinstance(v, _Name) else v
        found = {k: [find(x) for x in v] if k == "values" else find(v) for k, v in arguments.items()}
        if kind == "classify":
            scores, labels = found["probabilities"].reshape(count, -1), found["classes"]
            values[outputs[0][0]] = [labels[j] for j in scores.argmax(-1)]
            values[outputs[1][0]] = [dict(zip(labels, row.tolist(), strict=True)) for row in scores]
            return
        constant = {k for k, v in arguments.items() if k in TENSORS and not isinstance(v, _Name)}
        if kind in BROADCAST:
            found |= _aligned({k: v for k, v in found.items() if k in TENSORS}, constant)
        elif "values" in found:
            pairs = zip(found["values"], arguments["values"], strict=True)
            found["values"] = [v if isinstance(a, _Name) else np.broadcast_to(v, (count, *v.shape)) for v, a in pairs]
        elif constant:
            found |= {k: np.broadcast_to(found[k], (count, *found[k].shape)) for k in constant}
        for (name, shape, code), result in zip(outputs, self._results(kind, found), strict=True):
            if result.shape[1:] != shape:
                raise ValueError(f"it gave {name} the shape {result.shape[1:]}; the file declares {shape}")
            values[name] = rounded(result, code)
            if trace is not None:
                trace[name] = values[name]
        for name in self._free.get(i, ()):
            values.pop(name, None)

    def ranges(self, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, tuple[float, float]]:
        """Name of an input or of an intermediate value -> (lowest, highest) number that it takes over all batches.

        Args:
            batches: an iterable of dicts as `__call__` takes them.
        """
        found: dict[str, tuple[float, float]] = {}
        for inputs in batches:
            values: dict[str, np.ndarray] = {}
            self(inputs, trace=values)
            for name, array in values.items():
                if array.dtype == np.float32:
                    low, high = found.get(name, (np.inf, -np.inf))
                    found[name] = (min(low, float(array.min())), max(high, float(array.max())))
        return found


def reason_of(e: Exception) -> str:
    """The first line of an error's message, for another message; with its class where it is no sentence."""
    text = " ".join(str(e).split())[:200].rstrip(".:")
    return text if isinstance(e, ValueError) and text else f"{type(e).__name__} {text}".strip()


class _Name(str):
    """The name of a value that depends on the input."""


def _names(arguments: Arguments) -> set[str]:
    flat = (v for key, value in arguments.items() for v in (value if key == "values" else [value]))
    return {v for v in flat if isinstance(v, _Name)}


def _lead(value: Any) -> Any:
    return [v[None] for v in value] if isinstance(value, list) else value[None]


def _aligned(operands: Arguments, constant: set[str]) -> Arguments:
    """Operands of unequal rank made ready for numpy: all but constants have the images as one more first axis."""
    rank = max(v.ndim - (k not in constant) for k, v in operands.items())
    wide = lambda v: v.reshape(v.shape[0], *(1,) * (rank + 1 - v.ndim), *v.shape[1:])
    return {k: v if k in constant else wide(v) for k, v in operands.items()}
