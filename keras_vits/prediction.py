"""What is on a picture: labels with probabilities."""

import dataclasses
import os
from typing import Any

import keras
import numpy as np

from keras_vits._util.limits import whole
from keras_vits.specs import OutputSpec

BATCH = 32  # pictures that are computed at once


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One of the classes that a picture may be of.

    Attributes:
        label: name of the class; `"class 7"` where the model knows no names.
        probability: 0 to 1.
        index: of the class in the model's logits.
    """

    label: str
    probability: float
    index: int


def predict(model: keras.Model, image: Any, top_k: int = 5) -> list[Any]:
    """Tells what is on pictures.

    Args:
        model: a `VisionModel` with a head. Its `preprocessing` resizes, crops and normalises the pictures.
        image: path of a file, a PIL image, or uint8 pixels (H,W), (H,W,3) or (H,W,4); or a list of these. Grey pictures
            become RGB, transparency is ignored, and a picture that says how the camera was held is turned upright.
        top_k: how many classes to return; all if the model has fewer.

    Returns:
        A list of `Prediction`, the most probable first; for a list of pictures, a list of such lists.

    Raises:
        ValueError: an unreadable picture, pixels that are not uint8, `top_k` below 1, a model without a head, or one
            that gives NaN or infinity for a picture, which the message names.
    """
    if not hasattr(model, "output_specs"):
        raise ValueError(f"predict takes a VisionModel, which knows its classes; received {type(model).__name__}.")
    spec = model.output_specs[0]
    if not spec.is_classification:
        raise ValueError(f"{model.name} gives {spec.kind}, so it predicts no classes: create it with num_classes.")
    images = image if isinstance(image, (list, tuple)) else [image]
    found = []
    for start in range(0, len(images), BATCH):
        batch = np.stack([model.preprocessing(one) for one in images[start : start + BATCH]])
        for i, scores in enumerate(model.predict_on_batch(batch), start):
            name = str(images[i]) if isinstance(images[i], (str, os.PathLike)) else f"picture {i}"
            found.append(best(scores, spec, top_k, name))
    return found if isinstance(image, (list, tuple)) else found[0]


def best(scores: np.ndarray, spec: OutputSpec, top_k: int, picture: str = "the picture") -> list[Prediction]:
    """The most probable classes.

    Args:
        scores: (K,), an image's values of the output.
        spec: the `OutputSpec` of the output.
        top_k: how many; all if there are fewer.
        picture: what the message calls it where the values are not finite.

    Returns:
        A list of `Prediction`, the most probable first. Of a single class there is one, with its own probability.

    Raises:
        ValueError: `top_k` below 1, an output without classes, or values that are not finite.
    """
    top_k = whole("top_k", top_k)
    if not np.all(np.isfinite(scores)):
        raise ValueError(
            f"The model gives NaN or infinity in {spec.name!r} for {picture}: look for it in its weights, or in the "
            "mean and deviation of its preprocessing."
        )
    shares = spec.probabilities(scores)
    order = np.argsort(-shares, kind="stable")[:top_k]
    names = spec.class_names
    return [Prediction(names[i] if names else f"class {i}", float(shares[i]), int(i)) for i in order]
