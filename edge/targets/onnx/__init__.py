"""ONNX: Graph -> .onnx written with onnx's own protobuf, quantized and run by ONNX Runtime.

The file has a static batch, named inputs and outputs, and nodes named after our layers.
"""

from ...artifact import Artifact
from .._protocol import Target, Traits
from .._steps import Steps
from .exporter import PRECISIONS, export
from .quantization import quantize
from .runtime import Runner, load, run
from .writer import IR_VERSION, OPSET, write

__all__ = ["IR_VERSION", "OPSET", "TARGET", "Runner", "export", "load", "quantize", "write"]


def _steps(artifact: Artifact) -> Steps:
    from .stepwise import steps

    return steps(artifact)


TARGET = Target(
    name="onnx",
    suffix=".onnx",
    export=export,
    quantize=quantize,
    load=load,
    run=run,
    traits=Traits(
        title="ONNX",
        marker="D",
        sign="◆",
        extra="onnx",
        pixels="uint8",
        pixel_option="uint8_input",
        precisions=PRECISIONS,
        restarts=True,
        steps=_steps,
    ),
)
