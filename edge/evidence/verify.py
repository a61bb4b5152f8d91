"""Numerics and agreement of an artifact with the model it came from, output by output."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from keras_vits._util.progress import working
from keras_vits.specs import OutputSpec, SpecError, checked_names

from ..artifact import Artifact, check
from ..devices._common import verifying
from ..records import OutputCheck, Verification, sqnr_db
from ..targets import _protocol as targets
from ..targets._batches import Arrays, checked
from .half import Accumulator, HalfRunner

BATCH = 64  # examples that the model computes at once


def verify(
    artifact: Artifact,
    against: keras.Model | Arrays | Sequence[np.ndarray] | None = None,
    images: Arrays | None = None,
    labels: np.ndarray | Sequence[int] | None = None,
    *,
    device: str = "host",
    precision: Literal["float32", "float16"] = "float32",
    accumulator: Accumulator = "float32",
) -> Verification:
    """Runs an artifact and the model it came from on the same images, and compares every output.

    Args:
        artifact: an `Artifact`.
        against: the `keras.Model`; or its outputs on these images: the array (N,...) of the one output, name -> array,
            or a list in the file's order. With `precision="float16"` it may be left out: then the file is compared with
            itself in float32.
        images: (N,H,W,C) float32 as the model takes them; for a file that takes pixels, uint8 pixels, which the model
            then sees normalised by its preprocessing. Of a file with several inputs, name -> array.
        labels: (N,) class numbers from 0 to K - 1, or one-hot rows (N,K), for top-1.
        device: `"host"`, or `"arm64"` for a LiteRT file on an emulated ARM processor; see devices/arm64.py.
        precision: `"float16"` runs a LiteRT or ONNX file operation by operation on this machine and rounds every result
            to half precision, as phones' GPUs do: `Verification.half` tells the layers in which numbers overflow,
            vanish, or lose most. It takes some seconds for an image.
        accumulator: of `precision="float16"`: whether sums grow in `"float32"`, or are rounded as they grow,
            `"float16"`.

    Returns:
        A `Verification`.

    Raises:
        ValueError: inputs or labels that do not fit the file, with the place of the first that does not; a model of
            other classes; outputs that are not finite, with their name and the image (but with `precision="float16"`,
            which tells where that begins); a damaged file, or a device that does not run it.
    """
    check(artifact)
    load = _loader(artifact, device)
    halves = _half_runner(artifact, device, precision, accumulator)
    if images is None or (against is None and halves is None):
        missing = "images" if images is None else "the model, or its outputs"
        raise ValueError(f"verify needs {missing}: edge.verify(artifact, model, images).")
    given = checked(images, artifact.inputs, artifact.path.name)
    if any(spec.kind == "top_scores" for spec in artifact.outputs):
        raise ValueError(
            "A file with a top-k head cannot be compared with logits: verify the model exported with head='softmax'."
        )
    told = artifact.classification
    count = len(next(iter(given.values())))
    if labels is not None:
        if told is None:
            kinds = ", ".join(f"{spec.name} ({spec.kind})" for spec in artifact.outputs)
            raise SpecError(f"Labels need a file that classifies images; {artifact.path.name} gives {kinds}.")
        labels = told.labels(labels, count)
    runner, arrays = load(artifact), given if len(given) > 1 else next(iter(given.values()))
    if halves is None:
        expected = _expected(artifact, against, given)
        found = _by_name(artifact, runner.predict(arrays))
    else:
        found, single = halves.predict(arrays)
        expected = single if against is None else _expected(artifact, against, given)
    checks, agreement, top1, reference_top1, majority = [], None, None, None, None
    for spec in artifact.outputs:
        y = found[spec.name] if halves else _finite(artifact, spec, found[spec.name])
        checks.append(
            _compared(spec, np.asarray(y).reshape(expected[spec.name].shape), expected[spec.name], spec is told)
        )
    if told:
        ours, theirs = told.decide(found[told.name]), told.decide(expected[told.name])
        agreement = float(np.mean(ours == theirs))
        if labels is not None:
            top1, reference_top1 = float(np.mean(ours == labels)), float(np.mean(theirs == labels))
            majority = float(np.unique(labels, return_counts=True)[1].max() / count)
    traits = targets.target(artifact.format).traits
    return Verification(
        artifact=artifact,
        images=count,
        top1=top1,
        reference_top1=reference_top1,
        majority=majority,
        top1_agreement=agreement,
        sqnr_db=min(check.sqnr_db for check in checks),
        max_abs_error=max(check.max_abs_error for check in checks),
        partitions=traits.partitions(runner),
        outside=traits.outside(runner),
        op_histogram=runner.histogram(),
        operations=artifact.operations,
        gpu_offenders=traits.offenders(artifact),
        verified_by=runner.verified_by + (f", in half precision with sums in {accumulator}" if halves else ""),
        outputs=tuple(checks),
        half=halves.check() if halves else None,
    )


def _compared(spec: OutputSpec, found: np.ndarray, expected: np.ndarray, decides: bool) -> OutputCheck:
    """How far an output is from the model's; -infinity dB where it is not finite."""
    same = float(np.mean(spec.decide(found) == spec.decide(expected))) if decides or spec.kind == "mask" else None
    with np.errstate(invalid="ignore"):
        error = found.astype(np.float64) - expected
        noise, signal = float(np.square(error).sum()), float(np.square(expected, dtype=np.float64).sum())
    finite = math.isfinite(noise)
    return OutputCheck(
        name=spec.name,
        kind=spec.kind,
        sqnr_db=sqnr_db(signal, noise) if finite else -math.inf,
        max_abs_error=float(np.abs(error).max()) if finite else math.inf,
        agreement=same,
    )


def _half_runner(artifact: Artifact, device: str, precision: str, accumulator: Accumulator) -> HalfRunner | None:
    """What runs the file in half precision, if that is asked for."""
    if precision not in ("float32", "float16"):
        raise ValueError(f"precision must be 'float32' or 'float16'; received {precision!r}.")
    if precision == "float32":
        if accumulator != "float32":
            raise ValueError(f"accumulator={accumulator!r} belongs to precision='float16'.")
        return None
    if device != "host":
        raise ValueError(f"precision='float16' runs on this machine, not on {device!r}: leave device out.")
    return HalfRunner(artifact, accumulator)


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


def same_classes(artifact: Artifact, model: Any = None, data: Sequence[str] = ()) -> None:
    """Refuses to compare a file with a model or with pictures of other classes.

    Args:
        artifact: the file.
        model: what it is compared with, if that is a model.
        data: names of the classes of the pictures, in the order of the labels; () where nobody named them.

    Raises:
        ValueError: two of them have another number of classes, or name one of them otherwise.
    """
    spec = artifact.classification
    known: dict[str, tuple[int | None, tuple[str, ...]]] = {
        artifact.path.name: (spec.classes if spec else None, artifact.class_names),
        "the model": (None, checked_names(getattr(model, "class_names", None))),
        "the pictures": (len(data) or None, checked_names(data)),
    }
    for (one, (count, names)), (other, (others, theirs)) in itertools.combinations(known.items(), 2):
        count, others = len(names) or count, len(theirs) or others
        if count and others and max(2, count) != max(2, others):
            raise ValueError(f"Of {one} there are {count} classes, of {other} {others}: compare what belongs together.")
        if names and theirs and len(names) == len(theirs) and names != theirs:
            at = next(i for i, (a, b) in enumerate(zip(names, theirs, strict=True)) if a != b)
            raise ValueError(
                f"Class {at} is {names[at]!r} in {one} and {theirs[at]!r} in {other}: compare what belongs together."
            )


def _finite(artifact: Artifact, spec: OutputSpec, values: Any) -> np.ndarray:
    values = np.asarray(values, np.float32)
    if (at := _broken(values)) is not None:
        raise ValueError(
            f"{artifact.path.name} gives NaN or infinity in {spec.name!r}, for image {at} first: its numbers overflow. "
            "Export with more precision."
        )
    return values


def _broken(values: np.ndarray) -> int | None:
    """The number of the first example (N,...) that is not finite, or `None`."""
    finite = np.isfinite(values.reshape(len(values), -1)).all(1)
    return None if finite.all() else int(np.argmin(finite))


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
    model = against if isinstance(against, keras.Model) else None
    if model is None and (isinstance(against, Artifact) or hasattr(against, "predict")):
        raise ValueError(
            f"A file is compared with a keras.Model, or with a model's outputs; received {type(against).__name__}: "
            "pass what its predict gives for these images."
        )
    if model is not None:
        same_classes(artifact, model)
        against = reference(model, artifact, inputs)
    found = {name: np.asarray(y, np.float32) for name, y in _by_name(artifact, against).items()}
    count = len(next(iter(inputs.values())))
    before = {"softmax": "logits", "sigmoid": "binary_logit"}
    for spec in artifact.outputs:
        values = found[spec.name]
        shape = spec.shape[1:] if spec.shape else values.shape[1:]
        if values.ndim == 0 or len(values) != count or math.prod(values.shape[1:]) != math.prod(shape):
            raise ValueError(
                f"Output {spec.name!r} of {artifact.path.name} has shape {(count, *shape)} for these images; "
                f"{'the model gives' if model is not None else 'received'} {values.shape}."
            )
        if (at := _broken(values)) is not None:
            layer = "" if model is None else _where(model, artifact, {k: x[at : at + 1] for k, x in inputs.items()})
            raise ValueError(
                f"The model itself gives NaN or infinity in {spec.name!r} for image {at}{layer}: there is nothing to "
                "compare with."
            )
        if spec.applied in before:
            kind: Any = before[spec.applied]
            own = OutputSpec(name=spec.name, kind=kind, classes=spec.classes)
            found[spec.name] = own.probabilities(values).astype(np.float32)
    return found


def reference(model: Any, artifact: Artifact, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The model's outputs in float32, in the order of the artifact's: its own, then layers that the file gives, too."""
    own = keras.tree.flatten(model.output)
    taps = [model.get_layer(spec.name).output for spec in artifact.outputs[len(own) :]]
    whole = keras.Model(model.input, [*own, *taps]) if taps else model
    with working(f"Running {model.name}"):
        found = whole.predict(_as_trained(model, artifact, inputs), batch_size=BATCH, verbose=0)
    return [np.asarray(y, np.float32) for y in keras.tree.flatten(found)]


def _as_trained(model: Any, artifact: Artifact, inputs: Mapping[str, np.ndarray]) -> Any:
    """The file's inputs as the model takes them: pixels are normalised where only the file does that inside."""
    arrays, tensors = [], keras.tree.flatten(model.input)
    if [tuple(tensor.shape[1:]) for tensor in tensors] != [spec.shape[1:] for spec in artifact.inputs]:
        shapes = [
            ", ".join(map(str, found))
            for found in ([s.shape[1:] for s in artifact.inputs], [t.shape[1:] for t in tensors])
        ]
        raise ValueError(
            f"{artifact.path.name} takes {shapes[0]} for each example, and the model {shapes[1]}: compare it with the "
            "model of that size, as model.resized gives it."
        )
    for spec, tensor in zip(artifact.inputs, tensors, strict=True):
        array = inputs[spec.name]
        if spec.takes_pixels and keras.backend.standardize_dtype(tensor.dtype).startswith("float"):
            array = spec.prepared.normalize(array)
        arrays.append(array)
    return keras.tree.pack_sequence_as(model.input, arrays)


def _where(model: Any, artifact: Artifact, one: Mapping[str, np.ndarray]) -> str:
    """The first layer or operation of a model whose output for one example is not finite, as the end of a phrase; "" of
    none."""
    known = getattr(model, "operations", model.layers)  # those between layers are no layers
    layers = [layer for layer in known if isinstance(getattr(layer, "output", None), keras.KerasTensor)]
    try:
        every = keras.Model(model.input, [layer.output for layer in layers])
    except ValueError:  # a model within it, whose output is that of its own graph
        layers = [layer for layer in layers if not isinstance(layer, keras.Model)]
        every = keras.Model(model.input, [layer.output for layer in layers])
    found = every.predict(_as_trained(model, artifact, one), verbose=0)
    for layer, values in zip(layers, keras.tree.flatten(found), strict=True):
        if not np.isfinite(np.asarray(values, np.float32)).all():
            return f", first in layer {layer.name!r}"
    return ""
