"""What each operation of a Graph becomes in a .tflite file: a named function for each, in one table, `HANDLERS`.

A new operation is one function beside those of its kind; what is one TFLite operator without options of its own is one
row of `elementwise.BUILTINS`.
"""

from . import arrange, elementwise, linear, norm, reduce  # noqa: F401 - which register their functions
from ._registry import HANDLERS, Handler, handles

__all__ = ["HANDLERS", "Handler", "handles"]
