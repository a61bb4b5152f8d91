"""What every family's Config must be, checked by the types and names of its fields before anything is built."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from keras_vits._util.limits import MAX_BLOCKS, is_bool, number, whole
from keras_vits.layers.mlp import activation_function
from keras_vits.preprocess import checked_size

ZERO = {  # integers that may be 0, and what that means
    "num_classes": "must be 0 (no head) or",
    "registers": "must be 0 (none) or",
    "depths": "must be 0 (none) or",
}
BLOCKS = ("depth", "depths", "token_depths", "stages")  # fields that count blocks
PROBABILITIES = ("drop_path", "dropout")
HUGE = 1e6  # of a number that is no probability


def checked(family: str, config: type, hyperparameters: Mapping[str, Any]) -> Any:
    """A Config of values that have their fields' types and lie in their ranges, `image_size` as (height, width).

    An integer may be NumPy's, or a float without a fraction, and a tuple a list, as JSON has it.

    Args:
        family: its name, for the messages.
        config: the family's Config, a dataclass.
        hyperparameters: field -> value.

    Raises:
        ValueError: a field that does not exist or is missing, or a value that is impossible. It is named.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    if unknown := sorted(set(hyperparameters) - set(fields)):
        raise ValueError(
            f"{family} has no hyper-parameter {', '.join(map(str, unknown))}. It has: {', '.join(sorted(fields))}."
        )
    if missing := [
        name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in hyperparameters
    ]:
        raise ValueError(
            f"{family} needs {', '.join(missing)}. Use keras_vits.create(name) to start from a published variant."
        )
    types = typing.get_type_hints(config)
    values = {name: hyperparameters.get(name, field.default) for name, field in fields.items()}
    values = {name: _value(name, value, types[name]) for name, value in values.items()}
    blocks = sum(sum(n) if isinstance(n := values[name], tuple) else n for name in BLOCKS if name in values)
    if blocks > MAX_BLOCKS:
        raise ValueError(f"A model has at most {MAX_BLOCKS:,} blocks; received {_told(values, BLOCKS)}.")
    return config(**values)


def _value(name: str, value: Any, kind: Any) -> Any:
    """A field's value in the field's type."""
    if name == "image_size":
        return checked_size(value)
    if kind is int:
        return _integer(name, value)
    if kind is float:
        return _number(name, value)
    if kind is bool:
        if not is_bool(value):
            raise ValueError(f"{name} is True or False; received {value!r}.")
        return bool(value)
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{name} is a name; received {value!r}.")
        if name == "activation":
            _check_activation(value)
        return value
    if isinstance(value, str) or not hasattr(value, "__len__"):
        raise ValueError(f"{name} has a value for each stage; received {value!r}.")
    return tuple(_value(name, one, typing.get_args(kind)[0]) for one in value)


def _integer(name: str, value: Any) -> int:
    if name not in ZERO:
        return whole(name, value)
    try:
        return whole(name, value, least=0)
    except ValueError as e:
        words = "must be an integer of at least 0"
        raise ValueError(str(e).replace(words, f"{ZERO[name]} a positive integer")) from None


def _number(name: str, value: Any) -> float:
    if name in PROBABILITIES:
        return number(name, value, 0, 1, "a probability in [0, 1)")
    if name == "epsilon":
        return number(name, value, 0, 1, "a small positive number, such as 1e-6", open_low=True)
    return number(name, value, 0, HUGE, "a number from 0 on")


def _check_activation(name: str) -> None:
    try:
        activation_function(name)
    except ValueError:
        raise ValueError(
            f"activation is the name of one of keras.activations, 'gelu_tanh' or 'quick_gelu'; received {name!r}."
        ) from None


def one_of(cfg: Any, name: str, known: Any) -> None:
    """Raises a ValueError unless the field's value, or each of its values, is one of the known."""
    value = getattr(cfg, name)
    for one in value if isinstance(value, tuple) else (value,):
        if one not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; received {one!r}.")


def divides(cfg: Any, part: str, whole: str) -> None:
    """Raises a ValueError unless one field divides another, or each of another's values."""
    value = getattr(cfg, whole)
    if any(one % getattr(cfg, part) for one in (value if isinstance(value, tuple) else (value,))):
        raise ValueError(f"{part} must divide {whole}; received {_told(vars(cfg), (part, whole))}.")


def same_length(cfg: Any, lengths: Mapping[str, int]) -> None:
    """Raises a ValueError unless the fields have so many values."""
    for name, length in lengths.items():
        if len(getattr(cfg, name)) != length:
            raise ValueError(f"{name} must have {length} values, by {_told(vars(cfg), lengths)}.")


def _told(values: Mapping[str, Any], names: Any) -> str:
    return ", ".join(f"{name}={values[name]!r}" for name in names if name in values)
