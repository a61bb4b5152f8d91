"""Core ML: Graph -> .mlpackage (ML Program) written through coremltools' MIL builder; compression; running it.

exporter.py    Keras model -> Graph -> file and artifact
layout.py      Graph -> Graph: attention as one operation, the order of axes of tokens, the Neural Engine's layout
writer.py      Graph -> ML Program; forms.py has the orders of axes, handlers.py and handlers_matrix.py the operations
compress.py    file -> file with smaller weights
runtime.py     runs a file: on a Mac, or by mlprogram.py (reading, stepping), encoding.py (numbers), evaluate.py and
               evaluate_matrix.py (what each operation means)
"""

from __future__ import annotations

import sys

from .._protocol import Target, Traits
from .common import COMPUTE_UNITS, LAYOUTS, PRECISIONS, coremltools
from .compress import quantize
from .exporter import export
from .runtime import Runner, load, run
from .writer import Pixels, write

__all__ = [
    "COMPUTE_UNITS",
    "LAYOUTS",
    "PRECISIONS",
    "TARGET",
    "Pixels",
    "Runner",
    "coremltools",
    "export",
    "load",
    "quantize",
    "run",
    "write",
]


def _unavailable() -> str:
    return "" if sys.platform == "darwin" else "is a Core ML model, which can run on macOS only: measure it on a Mac"


TARGET = Target(
    name="coreml",
    suffix=".mlpackage",
    export=export,
    quantize=quantize,
    load=load,
    run=run,
    traits=Traits(
        title="Core ML",
        phone="iPhone",
        marker="s",
        sign="■",
        extra="coreml",
        pixels="image",
        float_recipe="float16",
        exact_floats=False,
        unavailable=_unavailable,
    ),
)
