"""The .keras file as one more format: the model that the phone files come from, kept and checked like them."""

import dataclasses
import pathlib

import keras

from keras_vits import __version__, saving
from keras_vits.weights import initialize, set_value, values_later

from . import artifact as artifacts
from .artifact import InputSpec, writing
from .graph import histogram


def export(model, folder, *, name=None):
    """Writes a model without its optimizer as `<folder>/<name>.keras`.

    Args:
        model: a `VisionModel`.
        folder: where to write; made if it does not exist.
        name: of the file; the model's own by default.

    Returns:
        An `Artifact`.

    Raises:
        ValueError: a folder that cannot be written. Nothing is half-written.
    """
    name = name or model.name
    path = pathlib.Path(folder) / f"{name}.keras"
    with values_later():
        bare = type(model).from_config(model.get_config())
    for variable, value in zip(bare.weights, model.get_weights(), strict=True):
        set_value(variable, value)
    initialize(bare)
    with artifacts.alone(path.parent):
        with writing(path) as temporary:
            bare.save(temporary)
        return artifacts.make(
            path,
            format="keras",
            recipe="float32",
            model=name,
            input=InputSpec(name="image", shape=(1, *model.input_shape[1:])),
            outputs=("logits",),
            class_names=tuple(model.class_names or ()),
            preprocessing=dataclasses.asdict(model.preprocessing),
            tools={"keras_vits": __version__, "keras": keras.__version__, "backend": keras.backend.backend()},
        )


def load(artifact):
    """A `Runner` of a .keras artifact on the current backend."""
    return Runner(artifact)


class Runner:
    """Runs a .keras artifact.

    Attributes:
        runtime: what computes, with its version.
        verified_by: what a check with this runner rests on.
    """

    def __init__(self, artifact):
        self.model = saving.load(artifact.path)
        self.runtime = self.verified_by = f"keras {keras.__version__} on {keras.backend.backend()}"

    def predict(self, images):
        """Images (N,H,W,C), normalised float32 -> logits (N,K)."""
        return self.model.predict(images, batch_size=64, verbose=0)

    def histogram(self):
        """Number of layers by class, most frequent first."""
        return histogram(type(layer).__name__ for layer in self.model.layers)
