"""Models with published weights: files, settings and tensors put together."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from keras_vits._util.keras_private import initialize, values_later
from keras_vits.checkpoints import catalogue, files, sources
from keras_vits.checkpoints.assign import (
    adapt_channels,
    assign,
    find,
    layer_pattern,
    resolved,
    table_of,
)
from keras_vits.layers import _names as names
from keras_vits.models import _registry as registry
from keras_vits.models._base import VisionModel
from keras_vits.preprocess import Preprocessing


def load_weights(
    model: VisionModel,
    source: str | os.PathLike[str],
    *,
    format: str = "timm",
    skip: Sequence[str] = (),
    allow_pickle: bool = False,
) -> VisionModel:
    """Gives a model published weights. Either every weight is set, or the model stays as it is.

    Args:
        model: a `VisionModel`.
        source: a Hugging Face hub id (`"timm/mobilevit_xs.cvnets_in1k"`), a local folder with `config.json` and
            `model.safetensors`, or a file.
        format: whose names the file uses, a key of the family's `names`. What no shape reveals is the model's:
            those of transformers have a LayerNorm `epsilon` of 1e-12 (DINOv2's 1e-6), which `create` reads from there.
        skip: names of our layers that keep their weights, e.g. `("head",)`.
        allow_pickle: whether a `.pt`, `.pth` or `.bin` file may be read, by PyTorch with `weights_only=True`. Where
            it has several sets of weights, the averaged ones are taken, as by timm.

    Returns:
        The model.

    Raises:
        ValueError: the file cannot be read, or does not fit: every tensor that is missing, left over or of another
            shape is named.
    """
    file, config = files.locate(source)
    size = sources.read(config, file.with_name("config.json")).size
    assign(model, files.read(file, allow_pickle), source, format, skip, size)
    catalogue.name_license(source, config)
    return model


def create_from_checkpoint(
    name: str, weights: str | os.PathLike[str], overrides: dict[str, Any], allow_pickle: bool = False
) -> VisionModel:
    """A model with the weights, classes, image size and preprocessing of a checkpoint; see `keras_vits.create`."""
    cls, hyperparameters = registry.lookup(name)
    file, config = files.locate(weights)
    described = sources.read(config, file.with_name("config.json"))
    tensors = files.read(file, allow_pickle)
    format = described.format if config else _format(cls, tensors, weights)
    table, tensors = resolved(table_of(cls.names, format, name), tensors)
    stem, head = (find(tensors, table, layer, rank) for layer, rank in ((names.STEM, 4), (names.HEAD, 2)))
    classes = len(tensors[head]) if head else 0

    settings = {**hyperparameters, "num_classes": classes}
    if stem:
        settings["in_channels"] = tensors[stem].shape[1]
    if described.size:
        settings["image_size"] = described.size
    told = described.settings(cls, hyperparameters, weights, overrides.get("num_classes", classes))
    _check_architecture(cls, name, described.architecture, {**told, **overrides}, weights)
    settings |= told
    fields = {} if "preprocessing" in overrides else described.preprocessing(file.with_name("preprocessor_config.json"))
    settings.update(overrides)
    settings.setdefault("preprocessing", _preprocessing({**cls.preprocessing_defaults, **fields}, weights))
    if settings["num_classes"] == classes:
        settings.setdefault("class_names", described.class_names(classes) or catalogue.class_names(config))
    try:
        with values_later():
            model = cls(**{"name": name, **settings})
        if stem:
            tensors[stem] = adapt_channels(tensors[stem], model.cfg.in_channels)
        skip = () if model.cfg.num_classes == classes else (names.HEAD,)
        assign(model, tensors, weights, format, skip, described.size)
    except ValueError as e:
        architecture = described.architecture or name
        if architecture != name:
            raise ValueError(f"{weights} holds weights of {architecture!r}, not of {name!r}. {e}") from None
        if str(weights) in str(e):
            raise
        raise ValueError(f"{weights} does not make a {name}: {e}") from None
    initialize(model)
    catalogue.name_license(weights, config)
    return model


def _format(cls: type[VisionModel], tensors: Mapping[str, Any], source: Any) -> str:
    """Whose names a file has that lies alone: those of which it has most."""
    known = {format: _familiar(table, tensors) for format, table in cls.names.items()}
    format = max(known, key=lambda format: known[format])  # the first one of equals
    if format == sources.Transformers.format:
        raise ValueError(
            f"{source} has transformers' names, and no tensor's shape tells heads, activation and epsilon: give the "
            "folder that holds its config.json, too."
        )
    return format


def _familiar(table: Any, tensors: Mapping[str, Any]) -> int:
    table, tensors = resolved(table, tensors)
    layers = [target for row, target in table.items() if row for target in _names_of(target)]
    return sum(any(map(pattern.match, tensors)) for pattern in map(layer_pattern, layers))


def _names_of(target: Any) -> Sequence[str]:
    return (target,) if isinstance(target, str) else target if isinstance(target, tuple) else ()


def _preprocessing(fields: Mapping[str, Any], source: Any) -> Preprocessing:
    try:
        return Preprocessing(**fields)
    except ValueError as e:
        raise ValueError(f"{source} says how to prepare pictures, which is impossible: {e}") from None


# Fields of a Config that no tensor's shape tells, and that variants of one family differ in.
IN_NO_SHAPE = ("heads", "epsilon", "activation", "pool", "norm", "prefix_position", "head_width", "attention")


def _check_architecture(
    cls: type[VisionModel], name: str, architecture: str | None, told: Mapping[str, Any], source: Any
) -> None:
    """Refuses the weights of another variant of the family whose tensors fit and that computes something else."""
    other, hyperparameters = registry.variants().get(architecture or name, (None, {}))
    if other is not cls:  # then the tensors differ
        return
    fields = {field.name: field.default for field in dataclasses.fields(cls.Config)}
    ours = registry.lookup(name)[1]
    for field in (field for field in IN_NO_SHAPE if field in fields and field not in told):
        theirs, wanted = (given.get(field, fields[field]) for given in (hyperparameters, ours))
        if theirs != wanted:
            raise ValueError(
                f"{source} holds weights of {architecture!r}, not of {name!r}: {field} is {theirs!r} there and "
                f"{wanted!r} here, which no tensor's shape tells. Create {architecture!r}, or give {field}={theirs!r}."
            )
