"""Models by name, with random weights or from a published checkpoint."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection
from typing import Any

from keras_vits import checkpoints
from keras_vits.checkpoints.loading import create_from_checkpoint
from keras_vits.models._base import VisionModel
from keras_vits.models._registry import lookup, variants


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """Names that `create` accepts.

    Args:
        pattern: shell pattern such as `"mobilevit*"`.
        pretrained: only models that have published weights; `keras_vits.checkpoints.published(name)` lists these.

    Returns:
        Sorted list of names.
    """
    registered = variants()
    known: Collection[str] = registered
    if pretrained:
        known = registered.keys() & {checkpoint.variant for checkpoint in checkpoints.table()}
    return sorted(fnmatch.filter(known, pattern))


def create(variant: str, /, weights: str | os.PathLike[str] | bool | None = None, **overrides: Any) -> VisionModel:
    """Builds a model, with random weights or from a published checkpoint.

    Args:
        variant: one of `list_models()`, e.g. `"mobilevit_xs"`.
        weights: `None` or `False` for random weights; a Hugging Face hub id of a timm checkpoint
            (`"timm/mobilevit_xs.cvnets_in1k"`) or of one of transformers (`"google/vit-base-patch16-224"`); a local
            folder in either layout (`config.json` + `model.safetensors`); or a `.safetensors` file of timm's names.
            `True` takes the published checkpoint of the highest accuracy on ImageNet-1k in
            `keras_vits.checkpoints.published(variant)`, or the first of them where none is known; `pretrained=True`
            says the same.
            With a checkpoint, `num_classes` defaults to the checkpoint's; another `num_classes` leaves the head
            randomly initialised. A licence that restricts the weights' use is named once by a
            `keras_vits.checkpoints.LicenseWarning`.
        **overrides: `name`, the model's, by default the variant's; fields of the family's `Config`: `num_classes`,
            `in_channels`, `image_size` (pixels, or (height, width)), `drop_path` and so on; and `dtype`, a Keras dtype
            policy such as `"mixed_bfloat16"`.

    Returns:
        A `VisionModel`, which is a `keras.Model` from images (B,H,W,C), normalised as `model.preprocessing` says, to
        logits (B,K).

    Raises:
        ValueError: unknown name, impossible hyper-parameters, or a checkpoint that does not fit (tensors are named).
    """
    cls, hyperparameters = lookup(variant)
    if "pretrained" in overrides:
        pretrained = overrides.pop("pretrained")
        if weights is not None or not isinstance(pretrained, bool):
            raise ValueError(f"pretrained is True or False, without weights; received {pretrained!r} and {weights!r}.")
        weights = pretrained
    if weights is None or weights is False:
        return cls(**{"name": variant, **hyperparameters, **overrides})
    if weights is True:
        weights = _default_checkpoint(variant)
    elif weights == "imagenet":
        raise ValueError(
            "weights='imagenet' names no checkpoint: give weights=True for the default one, or a hub id, of which "
            f"keras_vits.checkpoints.published({variant!r}) lists those of this variant."
        )
    return create_from_checkpoint(variant, weights, overrides)


def _default_checkpoint(variant: str) -> str:
    """Hub id of the published checkpoint of the highest accuracy, or of the first one."""
    found = checkpoints.published(variant)
    if not found:
        raise ValueError(
            f"{variant} has no published checkpoint: give weights a file or folder, or choose one of "
            "keras_vits.list_models(pretrained=True)."
        )
    return max(found, key=lambda checkpoint: checkpoint.top1 or 0.0).hub_id
