"""The .keras file as one more format: the model that the phone files come from, kept and checked like them."""

from __future__ import annotations

import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_vits._util import files
from keras_vits._util.progress import working
from keras_vits.graph.ir import histogram
from keras_vits.version import __version__

from .. import artifact as artifacts
from ._batches import checked
from ._prepare import check_finite
from ._protocol import Target, Traits

if TYPE_CHECKING:
    from keras_vits.models._base import VisionModel

BATCH = 64  # examples that the model computes at once


def export(
    model: VisionModel, folder: str | os.PathLike[str], *, name: str | None = None, overwrite: bool = False
) -> artifacts.Artifact:
    """Writes a model without its optimizer as `<folder>/<name>.keras`.

    Args:
        model: a `VisionModel`.
        folder: where to write; made if it does not exist.
        name: of the file; the model's own by default.
        overwrite: whether another file of this name may be replaced; one of the same model is written anew.

    Returns:
        An `Artifact`.

    Raises:
        ValueError: a model of another class, one that Keras has quantized, one with weights that are not finite
            numbers, a name that is no plain file name or is taken by another file, or a folder that cannot be written.
            Nothing is half-written.
    """
    import keras

    from keras_vits._util.keras_private import initialize, save_model, set_value, values_later
    from keras_vits._util.quantized import refuse_quantized
    from keras_vits.models._base import VisionModel

    if not isinstance(model, VisionModel):
        raise ValueError(
            f"keras_file.export writes a VisionModel, which keras_vits.load reads again; received {model.name}, a "
            f"{type(model).__name__}: use its own save."
        )
    refuse_quantized(model)
    check_finite(model)
    name = files.plain_name(model.name if name is None else name)
    with values_later():
        bare = type(model).from_config(model.get_config())
    for variable, value in zip(bare.weights, model.get_weights(), strict=True):
        set_value(variable, value)
    initialize(bare)
    with artifacts.writing(folder, f"{name}.keras", overwrite=overwrite) as draft:
        save_model(bare, draft.temporary)
        _undated(draft.temporary)
        draft.describe(
            format="keras",
            recipe="float32",
            model=name,
            inputs=model.input_specs,
            outputs=model.output_specs,
            tools={"keras_vits": __version__, "keras": keras.__version__, "backend": keras.backend.backend()},
        )
    return draft.artifact


def _undated(path: pathlib.Path) -> None:
    """Takes the time of writing out of a .keras file: the same model is the same bytes."""
    with zipfile.ZipFile(path) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for info, content in members:
            if info.filename == "metadata.json":
                kept = {key: value for key, value in json.loads(content).items() if key != "date_saved"}
                content = json.dumps(kept).encode()
            undated = zipfile.ZipInfo(info.filename)  # of 1980
            undated.compress_type = info.compress_type
            archive.writestr(undated, content)


def load(artifact: artifacts.Artifact) -> Runner:
    """A `Runner` of a .keras artifact on the current backend.

    Raises:
        ValueError: no such file, or it is truncated, was changed, or holds no model of this package.
    """
    return Runner(artifact)


class Runner:
    """Runs a .keras artifact.

    Attributes:
        runtime: what computes, with its version.
        verified_by: what a check with this runner rests on.
    """

    def __init__(self, artifact: artifacts.Artifact) -> None:
        import keras

        from keras_vits import saving

        self.artifact = artifacts.check(artifact)
        self.model = saving.load(artifact.path)
        self.runtime = self.verified_by = f"keras {keras.__version__} on {keras.backend.backend()}"

    def predict(self, inputs: np.ndarray | Mapping[str, np.ndarray]) -> np.ndarray | dict[str, np.ndarray]:
        """What the model makes of N examples.

        Args:
            inputs: the array (N,...) of the one input, images (N,H,W,C) in normalised float32, or name -> array.

        Returns:
            The array (N,...) of the one output, or name -> array where the model has several.

        Raises:
            ValueError: see `_batches.checked`.
        """
        import keras

        given = list(checked(inputs, self.artifact.inputs, self.artifact.path.name).values())
        with working(f"Running {self.artifact.path.name}"):
            found = self.model.predict(given[0] if len(given) == 1 else given, batch_size=BATCH, verbose=0)
        arrays = [np.asarray(y) for y in keras.tree.flatten(found)]
        return arrays[0] if len(arrays) == 1 else dict(zip(self.artifact.output_names, arrays, strict=True))

    def histogram(self) -> dict[str, int]:
        """Number of layers by class, most frequent first."""
        return histogram(type(layer).__name__ for layer in self.model.layers)


def run(order: Mapping[str, Any]) -> Callable[[], tuple[Callable[..., Any], str]]:
    """See `Target.run`."""
    import keras

    from keras_vits import saving

    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        torch.set_num_threads(order["threads"])

    def load_it() -> tuple[Callable[..., Any], str]:
        model = saving.load(order["path"])
        return model.predict_on_batch, f"keras {keras.__version__} on {backend}"

    return load_it


def _environment(artifact: artifacts.Artifact, threads: int) -> dict[str, str]:
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
