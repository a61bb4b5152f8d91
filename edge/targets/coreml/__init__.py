"""Core ML: Graph -> .mlpackage (ML Program) written through coremltools' MIL builder; compression; running it.

exporter.py    Keras model -> Graph -> file and artifact
layout.py      Graph -> Graph: attention as one operation, the order of axes of tokens, the Neural Engine's layout
precision.py   what a file of half precision computes in float32
writer.py      Graph -> ML Program; handlers.py and handlers_matrix.py have the operations
compress.py    file -> file with smaller weights
runtime.py     runs a file: on a Mac, or by mlprogram.py (reading, stepping), encoding.py (numbers), evaluate.py and
               evaluate_matrix.py (what each operation means)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

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


def _checked(verified_by: Sequence[str]) -> str:
    """See `Traits.checked`."""
    if any("reference evaluator" in by for by in verified_by):
        return (
            "Core ML: only Apple's systems can run it, and this was not one. Each package was read back from its own "
            "bytes and checked against a reference evaluator, with its float16 rounding and its compressed weights: "
            "its accuracy is known, its speed is not."
        )
    return "Core ML: each package was run by Core ML itself on a Mac."


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
        about="Core ML runs on iPhone, iPad and Mac",
        pixel_option="image_input",
        precisions=PRECISIONS,
        checked=_checked,
        float_recipe="float16",
        exact_floats=False,
        unavailable=_unavailable,
    ),
)
