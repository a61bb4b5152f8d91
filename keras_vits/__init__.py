"""Vision transformers for Keras 3 on TensorFlow, JAX and PyTorch, with an `edge` module that ships them to phones."""

import importlib

from keras_vits._registration import register_with_keras as _register_with_keras
from keras_vits.version import __version__

_HOMES = {  # public name -> the module that it comes from
    "VisionModel": "models._base",
    "count_macs": "graph.macs",
    "create": "creation",
    "list_models": "creation",
    "load": "saving",
    "load_weights": "checkpoints.loading",
    "predict": "prediction",
}
_MODULES = ("checkpoints", "edge", "hub", "layers", "models", "preprocess", "training")

# Not `hub`: it needs keras-hub, and `from keras_vits import *` must not.
__all__ = ["__version__", *_HOMES, *(name for name in _MODULES if name != "hub")]


def __getattr__(name):
    """Keras is imported at the first use: the command line chooses its backend first, and answers --help at once."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return sorted({*globals(), *_HOMES, *_MODULES})


_register_with_keras()
