"""Checks of single arguments that every room makes alike, and the limits on what may be asked for."""

import math
import numbers
from typing import Any

import numpy as np

MAX_INTEGER = 10**7  # of a single hyper-parameter: the largest data sets have some 30,000 classes
MAX_BLOCKS = 1000  # of a model; the deepest of the published ones here have 40
MAX_PARAMETERS = 10**10  # of a model, 40 GB in float32; the largest of the published ones here has 2 * 10^9
MAX_INPUT_PIXELS = 1 << 26  # of a model's image, 8192 x 8192: 0.8 GB in float32


def is_bool(value: Any) -> bool:
    """Whether it is a truth value, which Python counts among the integers."""
    return isinstance(value, (bool, np.bool_))


def whole(name: str, value: Any, least: int = 1, most: int = MAX_INTEGER, hint: str = "") -> int:
    """A value as an int: an integer of any type (NumPy's, too), or a float without a fraction.

    Args:
        name: of the argument.
        value: what was given.
        least: the smallest that is allowed.
        most: the largest.
        hint: what to do, for the message.

    Raises:
        ValueError: anything else.
    """
    integral = isinstance(value, numbers.Integral) and not is_bool(value)
    if not integral and isinstance(value, numbers.Real) and not is_bool(value):
        integral = float(value).is_integer()
    if not integral or not least <= value <= most:
        rule = "a positive integer" if least == 1 else f"an integer of at least {least}"
        limit = f" and at most {most:,}" if integral and value > most else ""
        raise ValueError(f"{name} must be {rule}{limit}; received {value!r}.{hint and f' {hint}'}")
    return int(value)


def number(name: str, value: Any, low: float, high: float, rule: str, *, open_low: bool = False) -> float:
    """A value as a finite float in [low, high), or (low, high) where `open_low`.

    Args:
        name: of the argument.
        value: what was given.
        low: the smallest that is allowed.
        high: the first that is not.
        rule: what it is, for the message: `"a probability in [0, 1)"`.
        open_low: whether `low` itself is not allowed either.

    Raises:
        ValueError: anything else.
    """
    real = isinstance(value, numbers.Real) and not is_bool(value)
    if not real or not math.isfinite(value) or not low <= value < high or (open_low and value == low):
        raise ValueError(f"{name} is {rule}; received {value!r}.")
    return float(value)
