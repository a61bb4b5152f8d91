"""Which published checkpoint exists for which variant."""

import csv
import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from keras_vits.checkpoints.files import without_scheme
from keras_vits.checkpoints.sources import Timm, Transformers, read
from keras_vits.preprocess import Preprocessing

SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "cc-by-nc-4.0": "CC-BY-NC-4.0"}  # the hub's spelling -> SPDX's
PERMISSIVE = ("Apache-2.0", "MIT")  # of the licences in the table; every other one restricts what the weights are for


class LicenseWarning(UserWarning):
    """A checkpoint's licence restricts what it may be used for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights published on the Hugging Face hub.

    Attributes:
        variant: the name that `keras_vits.create` builds them with.
        tag: how they were trained.
        hub_id: what `keras_vits.create` takes as `weights`.
        license: SPDX identifier, the publisher's own name of a licence, or `None` where the publisher names none.
        num_classes: outputs of the head; 0 if there is none.
        preprocessing: the `Preprocessing` that they were evaluated with.
        top1: accuracy in percent on ImageNet-1k's validation set as timm reports it; `None` if unknown or no such head.
    """

    variant: str
    tag: str
    hub_id: str
    license: str | None
    num_classes: int
    preprocessing: Preprocessing
    top1: float | None


@functools.cache
def table() -> tuple[Checkpoint, ...]:
    """Every published checkpoint of a registered variant, as a tuple of `Checkpoint`.

    They are those of timm on the hub; `tools/generate.py` writes the file from timm's registry.
    """
    with open(pathlib.Path(__file__).with_name("checkpoints.csv"), newline="", encoding="utf-8") as file:
        return tuple(_checkpoint(**row) for row in csv.DictReader(file))


def _checkpoint(
    *,
    variant: str,
    tag: str,
    hub_id: str,
    license: str,
    num_classes: str,
    top1: str,
    image_size: str,
    mean: str,
    std: str,
    crop: str,
    **texts: str,
) -> Checkpoint:
    numbers = lambda text, kind=float: tuple(map(kind, text.split()))
    preprocessing = Preprocessing(
        image_size=numbers(image_size, int), mean=numbers(mean), std=numbers(std), crop=float(crop), **texts
    )
    return Checkpoint(
        variant=variant,
        tag=tag,
        hub_id=hub_id,
        license=license or None,
        num_classes=int(num_classes),
        preprocessing=preprocessing,
        top1=float(top1) if top1 else None,
    )


def published(variant: str) -> tuple[Checkpoint, ...]:
    """The checkpoints of a variant.

    Args:
        variant: one of `keras_vits.list_models()`.

    Returns:
        A tuple of `Checkpoint`, empty if nobody published one.
    """
    return tuple(checkpoint for checkpoint in table() if checkpoint.variant == variant)


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1000 names of ImageNet-1k's classes in the order of the logits: each synset's first WordNet lemma."""
    return tuple(pathlib.Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8").splitlines())


def class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The classes of a checkpoint that names none, from its `config.json`: ImageNet-1k's, or `None`."""
    published = _described(config).published
    trained_on_imagenet = published.num_classes == 1000 and "in1k" in (published.tag or "")
    return imagenet_classes() if trained_on_imagenet else None


def _described(config: Mapping[str, Any]) -> Timm | Transformers:
    return read(config, pathlib.Path("config.json"))


_named: set[str] = set()  # licences that this process has been told of


def name_license(source: Any, config: Mapping[str, Any]) -> None:
    """Warns, once in a process for each licence, that it restricts what a checkpoint may be used for.

    Args:
        source: where the weights came from.
        config: the `config.json` beside them, {} if there is none.
    """
    described, licenses = _described(config), {c.hub_id: c.license for c in table()}
    original = f"timm/{described.architecture}.{described.published.tag}"
    stated = described.published.license
    license = licenses.get(without_scheme(source)) or SPDX.get(stated or "", stated) or licenses.get(original)
    if license and license not in (*PERMISSIVE, *_named):
        _named.add(license)
        warnings.warn(
            f"The weights of {source} are published under {license}, which restricts their use: read it on "
            "huggingface.co before you build on them.",
            LicenseWarning,
            stacklevel=2,
        )
