"""Numerics and top-1 agreement of an artifact against the model it came from."""

import contextlib

import numpy as np

from ..devices import arm64
from ..records import Verification, sqnr_db
from ..targets import coreml, keras_file, litert
from ..targets.litert import gpu

RUNNERS = {  # where -> format -> what loads a file to run it there
    "host": {"litert": litert, "coreml": coreml, "keras": keras_file},
    "arm64": {"litert": arm64},
}


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


def _gpu_offenders(artifact):
    if artifact.format == "litert":
        with contextlib.suppress(ImportError):  # a small board may have the interpreter alone
            return gpu.offenders(artifact.path)


def reference(model, images, batch_size=64):
    """The model's outputs (N,K) in float32 on images (N,H,W,C), normalising them first when they are pixels."""
    if images.dtype == np.uint8:
        images = model.preprocessing.normalize(images)
    return np.asarray(model.predict(images, batch_size=batch_size, verbose=0), np.float32)
