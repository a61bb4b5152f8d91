"""Published weights: which there are, where they are, and how they become a model's."""

from keras_vits.checkpoints.catalogue import (
    Checkpoint,
    LicenseWarning,
    class_names,
    imagenet_classes,
    name_license,
    published,
    table,
)
from keras_vits.checkpoints.files import download

__all__ = [
    "Checkpoint",
    "LicenseWarning",
    "class_names",
    "download",
    "imagenet_classes",
    "name_license",
    "published",
    "table",
]
