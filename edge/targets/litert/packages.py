"""The packages that LiteRT files need, imported at their first use."""

from __future__ import annotations

import importlib
from types import ModuleType

INSTALL = 'pip install -e ".[litert]"'


def require(name: str) -> ModuleType:
    """The module of this name.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ImportError(
            f"{name.split('.')[0]} is needed to write and quantize .tflite files ({e}): {INSTALL}"
        ) from None


def schema() -> ModuleType:
    """Classes of the .tflite format, as ai-edge-litert generated them."""
    return require("ai_edge_litert.schema_py_generated")
