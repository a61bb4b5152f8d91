"""The .keras file as one more format: the model that the phone files come from, kept and checked like them."""

import pathlib

import keras

from keras_vits import __version__, saving
from keras_vits._util import files
from keras_vits._util.files import writing
from keras_vits._util.keras_private import initialize, set_value, values_later
from keras_vits.graph.ir import histogram

from .. import artifact as artifacts
from ._protocol import Target, Traits


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
    with files.alone(path.parent):
        with writing(path) as temporary:
            bare.save(temporary)
        return artifacts.make(
            path,
            format="keras",
            recipe="float32",
            model=name,
            inputs=model.input_specs,
            outputs=model.output_specs,
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

    def predict(self, inputs):
        """Images (N,H,W,C), normalised float32 -> logits (N,K)."""
        return self.model.predict(inputs, batch_size=64, verbose=0)

    def histogram(self):
        """Number of layers by class, most frequent first."""
        return histogram(type(layer).__name__ for layer in self.model.layers)


def run(order):
    """See `Target.run`."""
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        torch.set_num_threads(order["threads"])

    def load():
        model = saving.load(order["path"])
        return model.predict_on_batch, f"keras {keras.__version__} on {backend}"

    return load


def _environment(artifact, threads):
    """What keeps a Keras model on the CPU and, each backend in its own way, on so many threads."""
    count = str(threads)
    return {
        "KERAS_BACKEND": artifact.tools["backend"],
        "TF_NUM_INTRAOP_THREADS": count,
        "NPROC": count,  # JAX
        "OMP_NUM_THREADS": count,  # PyTorch
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "KERAS_TORCH_DEVICE": "cpu",
    }


TARGET = Target(
    name="keras",
    suffix=".keras",
    export=export,
    quantize=None,
    load=load,
    run=run,
    traits=Traits(title="Keras", about="Keras is the model itself", marker="^", sign="▲", environment=_environment),
)
