"""What is on a picture: labels with probabilities."""

import dataclasses

import numpy as np

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


def predict(model, image, top_k=5):
    """Tells what is on pictures.

    Args:
        model: a `VisionModel` with a head. Its `preprocessing` resizes, crops and normalises the pictures.
        image: path of a file, a PIL image, or uint8 pixels (H,W), (H,W,3) or (H,W,4); or a list of these. Grey pictures
            become RGB, transparency is ignored, and a picture that says how the camera was held is turned upright.
        top_k: how many classes to return; all if the model has fewer.

    Returns:
        A list of `Prediction`, the most probable first; for a list of pictures, a list of such lists.

    Raises:
        ValueError: an unreadable picture, pixels that are not uint8, `top_k` below 1, or a model without a head.
    """
    if not model.cfg.num_classes:
        raise ValueError(f"{model.name} has no head (num_classes=0), so it predicts no classes: create it with one.")
    images = image if isinstance(image, (list, tuple)) else [image]
    found = []
    for start in range(0, len(images), BATCH):
        batch = np.stack([model.preprocessing(one) for one in images[start : start + BATCH]])
        found += [best(logits, model.class_names, top_k) for logits in model.predict_on_batch(batch)]
    return found if isinstance(image, (list, tuple)) else found[0]


def best(scores, class_names, top_k, *, logits=True):
    """The `top_k` most probable classes, as a list of `Prediction`, from K logits or K probabilities."""
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1; received {top_k}.")
    scores = np.asarray(scores, "float64")
    if logits:
        scores = np.exp(scores - scores.max())
        scores /= scores.sum()
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [Prediction(class_names[i] if class_names else f"class {i}", float(scores[i]), int(i)) for i in order]
