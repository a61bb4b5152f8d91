"""Models with published weights: files, settings and tensors put together."""

import os
from collections.abc import Sequence
from typing import Any

from keras_vits._util.keras_private import initialize, values_later
from keras_vits.checkpoints import catalogue, files, sources
from keras_vits.checkpoints.assign import (
    adapt_channels,
    assign,
    find,
    resolved,
    table_of,
)
from keras_vits.layers import _names as names
from keras_vits.models import _registry as registry
from keras_vits.models._base import VisionModel


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
        allow_pickle: whether a `.pt` or `.pth` file may be read, by PyTorch with `weights_only=True`.

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


def create_from_checkpoint(name: str, weights: str | os.PathLike[str], overrides: dict[str, Any]) -> VisionModel:
    """A model with the weights, classes, image size and preprocessing of a checkpoint; see `keras_vits.create`."""
    cls, hyperparameters = registry.lookup(name)
    file, config = files.locate(weights)
    described = sources.read(config, file.with_name("config.json"))
    table, tensors = resolved(table_of(cls.names, described.format, name), files.read(file))
    stem, head = (find(tensors, table, layer, rank) for layer, rank in ((names.STEM, 4), (names.HEAD, 2)))
    classes = len(tensors[head]) if head else 0

    settings = {**hyperparameters, "num_classes": classes}
    if stem:
        settings["in_channels"] = tensors[stem].shape[1]
    if described.size:
        settings["image_size"] = described.size
    settings |= described.settings(cls, hyperparameters, weights)
    fields = {} if "preprocessing" in overrides else described.preprocessing(file.with_name("preprocessor_config.json"))
    settings.update(overrides)
    settings.setdefault("preprocessing", {**cls.preprocessing_defaults, **fields})
    if settings["num_classes"] == classes:
        settings.setdefault("class_names", described.class_names(classes) or catalogue.class_names(config))
    try:
        with values_later():
            model = cls(**{"name": name, **settings})
        if stem:
            tensors[stem] = adapt_channels(tensors[stem], model.cfg.in_channels)
        skip = () if model.cfg.num_classes == classes else (names.HEAD,)
        assign(model, tensors, weights, described.format, skip, described.size)
    except ValueError as e:
        architecture = config.get("architecture", name)
        if architecture != name:
            raise ValueError(f"{weights} holds weights of {architecture!r}, not of {name!r}. {e}") from None
        raise
    initialize(model)
    catalogue.name_license(weights, config)
    return model
