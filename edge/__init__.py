"""model -> trace -> rewrite -> write -> quantize -> verify -> benchmark -> report: phone files, with evidence."""

from . import artifact, coreml, keras_file, litert
from .artifact import Artifact
from .benchmark import DeviceError, DeviceWarning, Latency, benchmark, ratio
from .bundle import Bundle, bundle
from .calibration import CalibrationWarning
from .profile import OperationTime, Profile, profile
from .qat import qat
from .quantize_to import Choice, Trial, quantize_to
from .report import Row, report
from .sensitivity import LayerNoise, Sensitivity, sensitivity
from .targets import onnx
from .trace import trace
from .verify import Verification, verify

__all__ = [
    "Artifact",
    "Bundle",
    "CalibrationWarning",
    "Choice",
    "DeviceError",
    "DeviceWarning",
    "Latency",
    "LayerNoise",
    "OperationTime",
    "Profile",
    "Row",
    "Sensitivity",
    "Trial",
    "Verification",
    "artifact",
    "benchmark",
    "bundle",
    "coreml",
    "keras_file",
    "litert",
    "onnx",
    "profile",
    "qat",
    "quantize_to",
    "ratio",
    "report",
    "sensitivity",
    "trace",
    "verify",
]
