"""model -> trace -> rewrite -> write -> quantize -> verify -> benchmark -> report: phone files, with evidence."""

from . import artifact, coreml, keras_file, litert
from .artifact import Artifact
from .benchmark import Latency, benchmark, ratio
from .bundle import Bundle, bundle
from .report import Row, report
from .trace import trace
from .verify import Verification, verify

__all__ = [
    "Artifact",
    "Bundle",
    "Latency",
    "Row",
    "Verification",
    "artifact",
    "benchmark",
    "bundle",
    "coreml",
    "keras_file",
    "litert",
    "ratio",
    "report",
    "trace",
    "verify",
]
