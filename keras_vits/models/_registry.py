"""Variant name -> (model class, hyper-parameters). Families in `keras_vits/models/` are found automatically."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

import keras

if TYPE_CHECKING:
    from keras_vits.models._base import VisionModel

_variants: dict[
    str, tuple[type[VisionModel], dict[str, Any]]
] = {}  # name -> (class, hyper-parameters), in the order of registration


def register(cls: type[VisionModel]) -> type[VisionModel]:
    """Class decorator of a family: makes its `variants` known to `create` and its class known to `.keras` files."""
    for name, hyperparameters in cls.variants.items():
        if name in _variants:
            raise ValueError(
                f"Variant {name!r} is registered twice: by {_variants[name][0].__name__} and {cls.__name__}."
            )
        _variants[name] = (cls, hyperparameters)
    return keras.saving.register_keras_serializable("keras_vits")(cls)


def variants() -> dict[str, tuple[type[VisionModel], dict[str, Any]]]:
    """All registered variants, as a mapping name -> (class, hyper-parameters)."""
    from keras_vits import models

    for module in pkgutil.iter_modules(models.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{models.__name__}.{module.name}")
    return _variants


def lookup(name: str) -> tuple[type[VisionModel], dict[str, Any]]:
    """The class and hyper-parameters of a variant; a `ValueError` with the nearest names if there is none."""
    known = variants()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"Did you mean {', '.join(map(repr, near))}?" if near else "See keras_vits.list_models()."
        raise ValueError(f"Unknown model {name!r}. {hint}")
    return known[name]
