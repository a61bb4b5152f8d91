"""Numerics and top-1 agreement of an artifact against the model it came from."""

import contextlib
import dataclasses
import math

import numpy as np

from . import coreml, gpu, keras_file, litert
from .artifact import Artifact
from .devices import arm64
from .targets import onnx

RUNNERS = {  # where -> format -> what loads a file to run it there
    "host": {"litert": litert, "coreml": coreml, "keras": keras_file, "onnx": onnx},
    "arm64": {"litert": arm64},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """How far an artifact is from its model.

    Attributes:
        artifact: what was checked.
        images: how many images it was checked on.
        top1: fraction of images whose label the artifact gives, or `None` without labels.
        reference_top1: the same of the model.
        top1_agreement: fraction of images on which artifact and model give the same class.
        sqnr_db: signal-to-quantization-noise ratio of the outputs, 10 log10(sum y^2 / sum (y - y')^2); infinite if
        equal.
        max_abs_error: largest difference of an output.
        partitions: number of XNNPACK partitions of a LiteRT file (1: it runs there as a whole), otherwise `None`.
        op_histogram: operations in the file by name.
        operations: primitive operations of the model's graph, (before, after) it was simplified, or `None`.
        gpu_offenders: why a phone's GPU would refuse a LiteRT file, see `gpu.offenders`; () if it would not, `None` for
            another file or where ai-edge-litert is not installed.
        verified_by: what ran the file.
    """

    artifact: Artifact
    images: int
    top1: float | None
    reference_top1: float | None
    top1_agreement: float
    sqnr_db: float
    max_abs_error: float
    partitions: int | None
    op_histogram: dict
    operations: tuple[int, int] | None = None
    gpu_offenders: tuple[str, ...] | None = None
    verified_by: str


def verify(artifact, against, images, labels=None, *, device="host"):
    """Runs an artifact and the model it came from on the same images.

    Args:
        artifact: an `Artifact`.
        against: the `keras.Model`, or its outputs (N,K) on these images.
        images: (N,H,W,C) float32 as the model takes them. For a file that takes pixels, uint8 pixels; the model then
            sees them normalised by its preprocessing.
        labels: (N,) class numbers, for top-1.
        device: `"host"`, or `"arm64"` for a LiteRT file on an emulated ARM processor; see devices/arm64.py.

    Returns:
        A `Verification`.

    Raises:
        ValueError: images of another shape than the file's, a damaged file, or a device that does not run it.
    """
    if device not in RUNNERS or artifact.format not in RUNNERS[device]:
        known = ", ".join(name for name, formats in RUNNERS.items() if artifact.format in formats)
        raise ValueError(f"{artifact.path.name} cannot be verified on {device!r}. It can on: {known}.")
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != tuple(artifact.input.shape[1:]) or not len(images):
        raise ValueError(
            f"{artifact.path.name} takes images (N, {', '.join(map(str, artifact.input.shape[1:]))}); "
            f"received {images.shape}."
        )
    if artifact.head == "top_k":
        raise ValueError(
            "A file with a top-k head cannot be compared with logits: verify the model exported with head='softmax'."
        )
    expected = reference(against, images) if hasattr(against, "predict") else np.asarray(against)
    if artifact.head == "softmax":
        expected = np.exp(expected - expected.max(-1, keepdims=True))
        expected /= expected.sum(-1, keepdims=True)
    runner = RUNNERS[device][artifact.format].load(artifact)
    found = np.asarray(runner.predict(images), np.float32).reshape(expected.shape)
    if not np.all(np.isfinite(found)):
        raise ValueError(
            f"{artifact.path.name} gives NaN or infinity: its numbers overflow. Export with more precision."
        )
    error = (found - expected).astype(np.float64)
    noise, signal = float(np.square(error).sum()), float(np.square(expected, dtype=np.float64).sum())
    ours, theirs = found.argmax(-1), expected.argmax(-1)
    hit = lambda classes: (
        None if labels is None else float(np.mean(classes == np.asarray(labels).reshape(classes.shape)))
    )
    return Verification(
        artifact=artifact,
        images=len(images),
        top1=hit(ours),
        reference_top1=hit(theirs),
        top1_agreement=float(np.mean(ours == theirs)),
        sqnr_db=sqnr_db(signal, noise),
        max_abs_error=float(np.abs(error).max()),
        partitions=runner.partitions() if artifact.format == "litert" else None,
        op_histogram=runner.histogram(),
        operations=artifact.operations,
        gpu_offenders=_gpu_offenders(artifact),
        verified_by=runner.verified_by,
    )


def sqnr_db(signal, noise):
    """Signal-to-quantization-noise ratio of two sums of squares."""
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def _gpu_offenders(artifact):
    if artifact.format == "litert":
        with contextlib.suppress(ImportError):  # a small board may have the interpreter alone
            return gpu.offenders(artifact.path)


def reference(model, images, batch_size=64):
    """The model's outputs (N,K) in float32 on images (N,H,W,C), normalising them first when they are pixels."""
    if images.dtype == np.uint8:
        images = model.preprocessing.normalize(images)
    return np.asarray(model.predict(images, batch_size=batch_size, verbose=0), np.float32)
