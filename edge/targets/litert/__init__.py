"""LiteRT: Graph -> .tflite written with ai-edge-litert's own schema, quantized by ai-edge-quantizer, run by the
interpreter.

The file has a static batch, a signature with named inputs and outputs, fused activations, and only operations that one
XNNPACK partition holds. Neither TensorFlow nor PyTorch is needed, and to run a file no Keras is imported.

    exporter      a Keras model -> a float32 file
    writer        Graph -> bytes; `handlers` say what becomes of each operation
    quantizer     a float32 file -> a quantized one; `quantization` prepares it, with `flatbuffer` for its hands
    runtime       the interpreter
    gpu           what a phone's GPU would refuse
    metadata      class names and normalisation inside the file
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from ...artifact import Artifact
from .._protocol import Target, Traits
from .._steps import Steps
from .exporter import export
from .handlers import HANDLERS
from .packages import require
from .quantizer import quantize
from .runtime import Runner, interpreter_class, load, of_bytes, order, run
from .writer import write

__all__ = [
    "HANDLERS",
    "TARGET",
    "Runner",
    "export",
    "interpreter_class",
    "load",
    "of_bytes",
    "quantize",
    "require",
    "run",
    "write",
]


def _offenders(artifact: Artifact) -> tuple[str, ...] | None:
    from . import gpu

    with contextlib.suppress(ImportError):  # a small board may have the interpreter alone
        return gpu.offenders(artifact.path)
    return None


def _steps(artifact: Artifact) -> Steps:
    from .stepwise import steps

    return steps(artifact)


def _quantized(runner: Any) -> tuple[Any, ...]:
    """See `Traits.quantized`."""

    def scale(tensor: Mapping[str, Any]) -> dict[str, float] | None:
        value, zero_point = tensor["quantization"]
        return {"scale": float(value), "zero_point": int(zero_point)} if value else None

    interpreter = runner.interpreter
    return tuple([scale(t) for t in f()] for f in (interpreter.get_input_details, interpreter.get_output_details))


TARGET = Target(
    name="litert",
    suffix=".tflite",
    export=export,
    quantize=quantize,
    load=load,
    run=run,
    traits=Traits(
        title="LiteRT",
        phone="Android",
        about="LiteRT runs on Android and small boards",
        marker="o",
        sign="●",
        extra="litert",
        pixels="uint8",
        pixel_option="uint8_input",
        restarts=True,
        steps=_steps,
        profiled=True,
        order=order,
        partitions=Runner.partitions,
        outside=Runner.outside,
        offenders=_offenders,
        quantized=_quantized,
    ),
)
