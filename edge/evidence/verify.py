"""Numerics and agreement of an artifact with the model it came from, output by output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_vits.specs import InputSpec, OutputSpec, SpecError

from ..artifact import Artifact
from ..devices._common import verifying
from ..records import OutputCheck, Verification, sqnr_db
from ..targets import _protocol as targets

BATCH = 64  # examples that the model computes at once

Arrays = np.ndarray | Mapping[str, np.ndarray]


def verify(
    artifact: Artifact,
    against: keras.Model | Arrays | Sequence[np.ndarray],
    images: Arrays,
    labels: np.ndarray | Sequence[int] | None = None,
    *,
    device: str = "host",
) -> Verification:
    """Runs an artifact and the model it came from on the same images, and compares every output.

    Args:
        artifact: an `Artifact`.
        against: the `keras.Model`; or its outputs on these images: the array (N,...) of the one output, name -> array,
            or a list in the file's order.
        images: (N,H,W,C) float32 as the model takes them; for a file that takes pixels, uint8 pixels, which the model
            then sees normalised by its preprocessing. Of a file with several inputs, name -> array.
        labels: (N,) class numbers, for top-1.
        device: `"host"`, or `"arm64"` for a LiteRT file on an emulated ARM processor; see devices/arm64.py.

    Returns:
        A `Verification`.

    Raises:
        ValueError: inputs or labels that do not fit the file, outputs that are not finite, a damaged file, or a device
            that does not run it.
    """
    load = _loader(artifact, device)
    given = _inputs(artifact, images)
    if any(spec.kind == "top_scores" for spec in artifact.outputs):
        raise ValueError(
            "A file with a top-k head cannot be compared with logits: verify the model exported with head='softmax'."
        )
    expected = _expected(artifact, against, given)
    runner = load(artifact)
    found = _by_name(artifact, runner.predict(given if len(given) > 1 else next(iter(given.values()))))
    checks, agreement, top1, reference_top1 = [], None, None, None
    for spec in artifact.outputs:
        y = _finite(artifact, spec, found[spec.name]).reshape(expected[spec.name].shape)
        error = y.astype(np.float64) - expected[spec.name]
        noise, signal = float(np.square(error).sum()), float(np.square(expected[spec.name], dtype=np.float64).sum())
        largest = float(np.abs(error).max())
        checks.append(
            OutputCheck(name=spec.name, kind=spec.kind, sqnr_db=sqnr_db(signal, noise), max_abs_error=largest)
        )
    if told := artifact.classification:
        ours, theirs = told.decide(found[told.name]), told.decide(expected[told.name])
        agreement = float(np.mean(ours == theirs))
        if labels is not None:
            known = _labels(labels, ours.shape, told)
            top1, reference_top1 = float(np.mean(ours == known)), float(np.mean(theirs == known))
    elif labels is not None:
        kinds = ", ".join(f"{spec.name} ({spec.kind})" for spec in artifact.outputs)
        raise SpecError(f"Labels need a file that classifies images; {artifact.path.name} gives {kinds}.")
    traits = targets.target(artifact.format).traits
    return Verification(
        artifact=artifact,
        images=len(next(iter(given.values()))),
        top1=top1,
        reference_top1=reference_top1,
        top1_agreement=agreement,
        sqnr_db=min(check.sqnr_db for check in checks),
        max_abs_error=max(check.max_abs_error for check in checks),
        partitions=traits.partitions(runner),
        op_histogram=runner.histogram(),
        operations=artifact.operations,
        gpu_offenders=traits.offenders(artifact),
        verified_by=runner.verified_by,
        outputs=tuple(checks),
    )


def _loader(artifact: Artifact, device: str) -> Callable[[Artifact], Any]:
    """What loads the artifact to run it on a device."""
    if device == "host":
        return targets.target(artifact.format).load
    loads = verifying(artifact)
    if device not in loads:
        raise ValueError(
            f"{artifact.path.name} cannot be verified on {device!r}. It can on: {', '.join(['host', *loads])}."
        )
    return loads[device]


def _inputs(artifact: Artifact, images: Arrays) -> dict[str, np.ndarray]:
    """Input name -> array, checked against the file's specs."""
    if not isinstance(images, Mapping):
        images = {artifact.input.name: images}
    names = [spec.name for spec in artifact.inputs]
    if set(images) != set(names):
        raise ValueError(f"{artifact.path.name} takes {', '.join(names)}; received {', '.join(map(str, images))}.")
    given = {spec.name: _checked(artifact, spec, np.asarray(images[spec.name])) for spec in artifact.inputs}
    counts = {name: len(array) for name, array in given.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"Every input needs an entry for each example; received {counts}.")
    return given


def _checked(artifact: Artifact, spec: InputSpec, array: np.ndarray) -> np.ndarray:
    if array.ndim != len(spec.shape) or array.shape[1:] != spec.shape[1:] or not len(array):
        what = "images" if spec.is_image else f"{spec.name!r} of shape"
        raise ValueError(
            f"{artifact.path.name} takes {what} (N, {', '.join(map(str, spec.shape[1:]))}); received {array.shape}."
        )
    if spec.takes_pixels and array.dtype != np.uint8:
        raise ValueError(f"{artifact.path.name} takes pixels 0 to 255 (uint8); received {array.dtype}.")
    if spec.is_image and spec.dtype == "float32" and array.dtype == np.uint8:
        raise ValueError(
            f"{artifact.path.name} takes normalised float32 images; received uint8 pixels: pass them through "
            "model.preprocessing.normalize first."
        )
    if array.dtype.kind == "f" and not np.all(np.isfinite(array)):
        raise ValueError(f"The values of {spec.name!r} must be finite numbers; received NaN or infinity.")
    return array


def _labels(labels: Any, shape: tuple[int, ...], spec: OutputSpec) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.size != np.prod(shape) or labels.dtype.kind not in "iub":
        raise ValueError(f"Labels are class numbers of shape {shape}; received {labels.dtype} of shape {labels.shape}.")
    largest = max(2, spec.classes or 2)
    if labels.min() < 0 or labels.max() >= largest:
        raise ValueError(f"Labels are from 0 to {largest - 1}; received {labels.min()} to {labels.max()}.")
    return labels.reshape(shape)


def _finite(artifact: Artifact, spec: OutputSpec, values: Any) -> np.ndarray:
    values = np.asarray(values, np.float32)
    if not np.all(np.isfinite(values)):
        raise ValueError(
            f"{artifact.path.name} gives NaN or infinity in {spec.name!r}: its numbers overflow. Export with more "
            "precision."
        )
    return values


def _by_name(artifact: Artifact, outputs: Any) -> dict[str, np.ndarray]:
    """Output name -> array, of an array, a list in the file's order, or a dictionary."""
    names = artifact.output_names
    if isinstance(outputs, Mapping):
        if set(outputs) != set(names):
            raise ValueError(f"{artifact.path.name} gives {', '.join(names)}; received {', '.join(map(str, outputs))}.")
        return {name: np.asarray(outputs[name]) for name in names}
    if isinstance(outputs, np.ndarray) or len(names) == 1:
        outputs = [outputs] if isinstance(outputs, np.ndarray) else list(outputs) if len(outputs) == 1 else [outputs]
    if len(outputs) != len(names):
        raise ValueError(
            f"{artifact.path.name} gives {len(names)} outputs, {', '.join(names)}; received {len(outputs)}."
        )
    return dict(zip(names, map(np.asarray, outputs), strict=True))


def _expected(artifact: Artifact, against: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Output name -> what the model gives, with what the export put behind it."""
    if hasattr(against, "predict"):
        against = reference(against, artifact, inputs)
    found = {name: np.asarray(y, np.float32) for name, y in _by_name(artifact, against).items()}
    before = {"softmax": "logits", "sigmoid": "binary_logit"}
    for spec in artifact.outputs:
        _finite_reference(spec, found[spec.name])
        if spec.applied in before:
            kind: Any = before[spec.applied]
            own = OutputSpec(name=spec.name, kind=kind, classes=spec.classes)
            found[spec.name] = own.probabilities(found[spec.name]).astype(np.float32)
    return found


def _finite_reference(spec: OutputSpec, values: np.ndarray) -> None:
    if not np.all(np.isfinite(values)):
        raise ValueError(f"The model itself gives NaN or infinity in {spec.name!r}: there is nothing to compare with.")


def reference(model: Any, artifact: Artifact, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The model's outputs in float32, in the order of the artifact's: its own, then layers that the file gives, too."""
    arrays = []
    for spec in artifact.inputs:
        array = inputs[spec.name]
        if spec.takes_pixels:
            array = model.preprocessing.normalize(array)
        arrays.append(array)
    own = keras.tree.flatten(model.output)
    taps = [model.get_layer(spec.name).output for spec in artifact.outputs[len(own) :]]
    whole = keras.Model(model.input, [*own, *taps]) if taps else model
    found = whole.predict(keras.tree.pack_sequence_as(model.input, arrays), batch_size=BATCH, verbose=0)
    return [np.asarray(y, np.float32) for y in keras.tree.flatten(found)]
