"""model -> trace -> rewrite -> write -> quantize -> verify -> benchmark -> report: phone files, with evidence.

Every name is imported at its first use: reading an artifact or running a file needs no Keras.
"""

import importlib

_HOMES = {  # public name -> the module that defines it
    "Artifact": "artifact",
    "Bundle": "bundling.write",
    "CalibrationWarning": "quantize.calibration",
    "Choice": "tune.search",
    "DeviceError": "records",
    "DeviceWarning": "records",
    "HalfCheck": "records",
    "HalfStep": "records",
    "Latency": "records",
    "LayerNoise": "tune.sensitivity",
    "OperationTime": "evidence.profile",
    "Profile": "evidence.profile",
    "Row": "evidence.report",
    "Sensitivity": "tune.sensitivity",
    "Trial": "tune.search",
    "Verification": "records",
    "benchmark": "evidence.benchmark",
    "bundle": "bundling.write",
    "profile": "evidence.profile",
    "qat": "tune.qat",
    "quantize_to": "tune.search",
    "ratio": "records",
    "report": "evidence.report",
    "sensitivity": "tune.sensitivity",
    "trace": "keras_vits.graph.trace",
    "verify": "evidence.verify",
}
_MODULES = {
    "artifact": "artifact",
    "coreml": "targets.coreml",
    "keras_file": "targets.keras_file",
    "litert": "targets.litert",
    "onnx": "targets.onnx",
}

__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    module = importlib.import_module(home if home.startswith("keras_vits.") else f"{__name__}.{home}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
