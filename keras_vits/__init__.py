"""Vision transformers for Keras 3 on TensorFlow, JAX and PyTorch, with an `edge` module that ships them to phones."""

import importlib

from keras_vits.version import __version__

__all__ = ["__version__", "count_macs", "create", "list_models", "load_weights", "predict"]

_HOMES = {
    "count_macs": "graph.macs",
    "create": "models._registry",
    "list_models": "models._registry",
    "load_weights": "checkpoints.assign",
    "predict": "prediction",
}


def __getattr__(name):
    """Keras is imported at the first use: the command line chooses its backend first, and answers --help at once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
