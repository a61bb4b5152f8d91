"""What `keras_vits.edge` exports, for editors and type checkers: at run time each name is imported at its first use."""

from keras_vits.graph.trace import trace as trace

from . import artifact as artifact
from .artifact import Artifact as Artifact
from .bundling.write import Bundle as Bundle
from .bundling.write import bundle as bundle
from .evidence.benchmark import benchmark as benchmark
from .evidence.profile import OperationTime as OperationTime
from .evidence.profile import Profile as Profile
from .evidence.profile import profile as profile
from .evidence.report import Row as Row
from .evidence.report import report as report
from .evidence.verify import verify as verify
from .quantize.calibration import CalibrationWarning as CalibrationWarning
from .records import DeviceError as DeviceError
from .records import DeviceWarning as DeviceWarning
from .records import HalfCheck as HalfCheck
from .records import HalfStep as HalfStep
from .records import Latency as Latency
from .records import Verification as Verification
from .records import ratio as ratio
from .targets import coreml as coreml
from .targets import keras_file as keras_file
from .targets import litert as litert
from .targets import onnx as onnx
from .tune.qat import qat as qat
from .tune.search import Choice as Choice
from .tune.search import Trial as Trial
from .tune.search import quantize_to as quantize_to
from .tune.sensitivity import LayerNoise as LayerNoise
from .tune.sensitivity import Sensitivity as Sensitivity
from .tune.sensitivity import sensitivity as sensitivity

__all__ = [
    "Artifact",
    "Bundle",
    "CalibrationWarning",
    "Choice",
    "DeviceError",
    "DeviceWarning",
    "HalfCheck",
    "HalfStep",
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
