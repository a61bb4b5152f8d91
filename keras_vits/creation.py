"""Models by name, with random weights or from a published checkpoint."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import re
from collections.abc import Collection
from typing import Any

from keras_vits import checkpoints
from keras_vits.checkpoints.files import without_scheme
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


# Arguments of timm and of keras.applications -> ours, or what to do.
SPELLINGS = {
    "classes": "num_classes",
    "in_chans": "in_channels",
    "img_size": "image_size",
    "input_shape": "image_size and in_channels",
    "embed_dim": "width",
    "num_heads": "heads",
    "drop_path_rate": "drop_path",
    "drop_rate": "dropout",
    "global_pool": "pool",
    "pooling": "pool",
    "act_layer": "activation",
    "init_values": "layer_scale",
    "reg_tokens": "registers",
    "checkpoint_path": "weights",
    "include_top": "num_classes=0 for a model without its head",
    "features_only": "model.features() for a model of the blocks' outputs",
    "classifier_activation": "keras_vits.predict, or a softmax of the logits",
    "include_preprocessing": "model.preprocessing, which prepares pictures",
    "input_tensor": "the model as a layer: model(tensor)",
}


def create(
    variant: str,
    /,
    weights: str | os.PathLike[str] | bool | None = None,
    *,
    allow_pickle: bool = False,
    **overrides: Any,
) -> VisionModel:
    """Builds a model, with random weights or from a published checkpoint.

    Args:
        variant: one of `list_models()`, e.g. `"mobilevit_xs"`.
        weights: `None` or `False` for random weights; a Hugging Face hub id of a timm checkpoint
            (`"timm/mobilevit_xs.cvnets_in1k"`) or of one of transformers (`"google/vit-base-patch16-224"`); a local
            folder in either layout (`config.json` + `model.safetensors`); or a file of timm's names, or of the
            published code's for MobileViT v3. `True` takes the published checkpoint of the highest accuracy on
            ImageNet-1k in `keras_vits.checkpoints.published(variant)`, or the first of them where none is known;
            `pretrained=True` says the same.
            With a checkpoint, `num_classes` defaults to the checkpoint's; another `num_classes` leaves the head
            randomly initialised. A licence that restricts the weights' use is named once by a
            `keras_vits.checkpoints.LicenseWarning`.
        allow_pickle: whether `weights` may be a pickled `.pt`, `.pth` or `.bin` file, see `load_weights`.
        **overrides: `name`, the model's, by default the variant's (where several are layers of one model, Keras wants
            another name for each); fields of the family's `Config`: `num_classes`, `in_channels`, `image_size` (pixels,
            or (height, width)), `drop_path` and so on; and `dtype`, a Keras dtype policy such as `"mixed_bfloat16"`.

    Returns:
        A `VisionModel`, which is a `keras.Model` from images (B,H,W,C), normalised as `model.preprocessing` says, to
        logits (B,K).

    Raises:
        ValueError: unknown name, impossible hyper-parameters, or a checkpoint that does not fit (tensors are named).
            Names and arguments of timm and of keras.applications are answered with ours.
    """
    _answer_a_checkpoint(variant)
    cls, hyperparameters = lookup(variant)
    if "pretrained" in overrides:
        pretrained = overrides.pop("pretrained")
        if weights is not None or not isinstance(pretrained, bool):
            raise ValueError(f"pretrained is True or False, without weights; received {pretrained!r} and {weights!r}.")
        weights = pretrained
    fields = {field.name for field in dataclasses.fields(cls.Config)}
    for theirs, ours in SPELLINGS.items():
        if theirs in overrides and theirs not in fields:
            raise ValueError(f"{cls.__name__} has no {theirs}: use {ours}; received {overrides[theirs]!r}.")
    if weights is None or weights is False:
        return cls(**{"name": variant, **hyperparameters, **overrides})
    if weights is True:
        weights = _default(variant).hub_id
    elif isinstance(weights, str) and weights.startswith("imagenet"):
        meant = _default(variant, weights)
        default = "weights=True, which is " if meant == _default(variant) else ""
        raise ValueError(
            f"weights={weights!r} names no checkpoint: give {default}weights={meant.hub_id!r}{_worth(meant)}, or "
            f"another of keras_vits.checkpoints.published({variant!r})."
        )
    return create_from_checkpoint(variant, weights, overrides, allow_pickle)


def _answer_a_checkpoint(variant: object) -> None:
    """Tells which variant and checkpoint are meant by one of timm's names that mean both."""
    name = without_scheme(variant)
    tagged = name.rpartition("/")[2]
    meant = [c for c in checkpoints.table() if tagged == f"{c.variant}.{c.tag}"]
    if meant:
        raise ValueError(
            f"{variant!r} names a checkpoint: say create({meant[0].variant!r}, weights={meant[0].hub_id!r}) for its "
            f"weights, or create({meant[0].variant!r}) for random ones."
        )
    base, dot, tag = tagged.partition(".")
    if dot and base in variants():
        listed = ", ".join(c.hub_id for c in checkpoints.published(base)) or "none"
        raise ValueError(f"{base} has no published checkpoint {tag!r}: there is {listed}.")
    if name != str(variant) or "/" in name:
        raise ValueError(
            f"{variant!r} is no model's name: say create(name, weights={name!r}) with one of keras_vits.list_models()."
        )


def _default(variant: str, spelling: str = "imagenet") -> checkpoints.Checkpoint:
    """The published checkpoint of the highest accuracy, or the first one; for ImageNet-21k the first one of that."""
    found = checkpoints.published(variant)
    if not found:
        raise ValueError(
            f"{variant} has no published checkpoint: give weights a file or folder, or choose one of "
            "keras_vits.list_models(pretrained=True)."
        )
    if re.search(r"2[12]k", spelling):
        found = tuple(c for c in found if re.search(r"in2[12]k$", c.tag)) or found
    return max(found, key=lambda checkpoint: checkpoint.top1 or 0.0)


def _worth(checkpoint: checkpoints.Checkpoint) -> str:
    return "" if checkpoint.top1 is None else f" (top-1 {checkpoint.top1:.1f} %)"
