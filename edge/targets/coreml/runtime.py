"""Runs a Core ML artifact: Core ML itself on a Mac, the numpy evaluator of mlprogram.py elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np

from keras_vits._util import jsons
from keras_vits._util.progress import progress

from ... import artifact as artifacts
from ...headers import METADATA
from .._batches import check_output, checked
from .common import COMPUTE_UNITS, check_option, coremltools, telling
from .mlprogram import Program

Arrays = dict[str, np.ndarray]


def load(artifact: artifacts.Artifact, compute_units: str | None = None) -> Runner:
    """A `Runner` of a Core ML artifact.

    Args:
        artifact: an `Artifact`.
        compute_units: what a Mac runs it on, see `export`; what the file was exported with by default.

    Raises:
        ValueError: a damaged file, one that is not the one that was written, or unknown compute units.
        ImportError: coremltools is not installed.
    """
    return Runner(artifact, compute_units)


class _Written(msgspec.Struct):
    """What is read of the metadata that `export` writes."""

    compute_units: str = "all"


def _written(artifact: artifacts.Artifact, text: str) -> _Written:
    try:
        return msgspec.json.decode(text, type=_Written)
    except jsons.ERRORS as e:
        raise ValueError(f"{artifact.path} has damaged metadata ({e}): export the model again.") from None


class Runner:
    """Runs a Core ML artifact.

    Attributes:
        runtime: what computes, with its version.
        compute_units: what a Mac computes it on.
        verified_by: what a check with this runner is worth.
    """

    def __init__(self, artifact: artifacts.Artifact, compute_units: str | None = None) -> None:
        self.artifact = artifacts.check(artifact)
        self._program = Program(artifact.path)
        metadata = self._program.spec.description.metadata.userDefined
        self.compute_units: str = compute_units or _written(artifact, metadata.get(METADATA, "{}")).compute_units
        check_option("compute_units", self.compute_units, COMPUTE_UNITS)
        self._model: Any = None
        ct = coremltools()
        if sys.platform == "darwin":
            import platform

            units = ct.ComputeUnit[self.compute_units.upper()]
            with telling(artifact.path):
                self._model = ct.models.MLModel(str(artifact.path), compute_units=units)
            self.runtime = f"Core ML on macOS {platform.mac_ver()[0]}"
            self.verified_by = "Core ML on macOS"
        else:
            self.runtime = f"numpy {np.__version__} reference evaluator"
            self.verified_by = "checked against a reference evaluator"

    def predict(self, inputs: np.ndarray | Mapping[str, np.ndarray]) -> np.ndarray | Arrays:
        """What the file makes of N examples, whatever its static batch is.

        Args:
            inputs: the array (N,...) of the one input, or name -> array where there are several. Images are (N,H,W,C),
                normalised float32; of an image input pixels 0 to 255, channels in the order R, G, B.

        Returns:
            The array (N,...) of the one output in float32, such as logits or probabilities (N,K); for a file of several
            outputs a dict of their names and values.

        Raises:
            ValueError: see `_batches.checked`.
        """
        specs = self.artifact.inputs
        given = checked(inputs, specs, self.artifact.path.name)
        count, batch = len(given[specs[0].name]), specs[0].shape[0]
        groups = {}
        for spec in specs:
            x = given[spec.name]
            x = np.concatenate([x, np.repeat(x[-1:], -count % batch, axis=0)])
            groups[spec.name] = x if spec.dtype == "image" else x.reshape(-1, batch, *x.shape[1:])
        pixels = max(math.prod(spec.shape) for spec in specs)
        at_once = max(1, 2**20 // pixels)  # a few feature maps of this many pixels fit the caches
        starts = range(0, -(-count // batch), at_once)
        runs = progress(starts, f"Running {self.artifact.path.name}")
        parts = [self._run({name: x[i : i + at_once] for name, x in groups.items()}) for i in runs]
        found = {name: np.concatenate([p[name] for p in parts]).astype(np.float32)[:count] for name in parts[0]}
        return found if len(found) > 1 else next(iter(found.values()))

    def _run(self, groups: Arrays) -> Arrays:
        """Name of an input -> (n,B,...), or n pictures (n,H,W,C) -> name of an output -> (n * B, ...)."""
        if self._model is None:
            found = self._program(groups)
        else:
            pictures = {spec.name for spec in self.artifact.inputs if spec.dtype == "image"}
            results = [
                self._model.predict({name: _pil(x) if name in pictures else x for name, x in each})
                for each in (zip(groups, group, strict=True) for group in zip(*groups.values(), strict=True))
            ]
            found = {name: [result[name] for result in results] for name in results[0]}
        if "classify" in self._program.operations:
            probabilities = next(found[name] for name in found if isinstance(found[name][0], dict))
            rows = np.array([[p[label] for label in self.artifact.class_names] for p in probabilities])
            return {self.artifact.output_names[0]: rows}
        arrays = {name: np.asarray(found[name]) for name in self.artifact.output_names}
        for name, array in arrays.items():
            check_output(name, array.shape[1:], self.artifact.inputs[0].shape[0])
        return {name: array.reshape(-1, *array.shape[2:]) for name, array in arrays.items()}

    def histogram(self) -> dict[str, int]:
        """Name of a MIL operation -> how often it is in the file, constants left out."""
        return self._program.operations


def _pil(pixels: np.ndarray) -> Any:
    from PIL import Image

    pixels = np.clip(np.round(pixels), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def run(order: Mapping[str, Any]) -> Callable[[], tuple[Callable[..., Any], str]]:
    """See `Target.run`."""
    coremltools()
    described = artifacts.load(order["path"])

    def load_it() -> tuple[Callable[..., Any], str]:
        runner = load(described, order.get("compute_units"))
        names = [spec.name for spec in described.inputs]

        def predict(*arrays: np.ndarray) -> np.ndarray | Arrays:
            return runner.predict(dict(zip(names, arrays, strict=True)))

        return predict, runner.runtime

    return load_it
