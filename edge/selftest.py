"""A self-test of an artifact: what it gives here on ten pictures, and how far a device's outputs may be from that."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from keras_vits.preprocess import Preprocessing
from keras_vits.specs import SpecError

from .artifact import Artifact
from .targets._protocol import Runner, target

PICTURES = 10
# How far a device may be from this machine, as a part of the largest output.
FLOAT32_ERROR = 1e-4  # the same sums in another order; 2e-6 was measured in a browser
FLOAT16_ERROR = 2e-2  # what phones' GPUs and Core ML compute in
INTEGER_ERROR = 1e-1  # what lies between two integers is rounded to the other one elsewhere; 3e-2 was measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """What one output is to be.

    Attributes:
        name: of the output.
        kind: of its `OutputSpec`.
        values: (N,...) float32.
        tolerance: `"cpu"` and `"gpu"` -> the largest difference of a number that is accepted there.
    """

    name: str
    kind: str
    values: np.ndarray
    tolerance: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfTest:
    """What an artifact gives on pictures.

    Attributes:
        pixels: (N,h,w,C) uint8, the pictures; N fills whole batches of the file.
        batches: the inputs of the runs, each as the file takes it, (B,h,w,C) or (B,C,h,w).
        outputs: an `Expected` for each output of floating-point numbers, in the file's order. Class numbers are not
            among them: where two scores are close, they may differ.
        classes: (N,) the class that the file gives for each picture, see `OutputSpec.decide`; `None` where no output
            tells a class.
    """

    pixels: np.ndarray
    batches: tuple[np.ndarray, ...]
    outputs: tuple[Expected, ...]
    classes: np.ndarray | None

    @property
    def named(self) -> dict[str, Expected]:
        """Output name -> what it is to be."""
        return {output.name: output for output in self.outputs}


def self_test(artifact: Artifact, runner: Runner, pixels: np.ndarray | None = None) -> SelfTest:
    """Runs an artifact here on pictures.

    Args:
        artifact: of one input, an image.
        runner: of it.
        pixels: (N,h,w,C) uint8 of the input's size; `generated` ones by default. The last batch is filled up with the
            first pictures.

    Returns:
        A `SelfTest`. Pictures are normalised by the file's preprocessing, and to -1 to 1 where that is not known.

    Raises:
        ValueError: other inputs than one image, or outputs that are not finite.
    """
    spec = artifact.input
    if not spec.is_image:
        raise SpecError(f"A self-test is made of pictures, and {artifact.path.name} takes {spec.name!r} {spec.shape}.")
    if pixels is None:
        pixels = generated(spec.shape[1:])
    batch = spec.shape[0]
    pixels = pixels[np.arange(-(-len(pixels) // batch) * batch) % len(pixels)]
    half = (0.5,) * spec.shape[3]
    known = Preprocessing(**(artifact.preprocessing or {"mean": half, "std": half}))
    inputs = pixels if spec.takes_pixels else known.normalize(pixels)
    found = runner.predict(inputs)
    arrays = found if isinstance(found, Mapping) else {artifact.output_names[0]: found}
    outputs, classes = [], None
    for output in artifact.outputs:
        if output.name not in arrays:
            continue  # of another signature
        values = np.asarray(arrays[output.name])
        if output.kind == "top_classes":
            classes = output.decide(values)
        if values.dtype.kind != "f":
            continue
        if not np.all(np.isfinite(values)):
            raise ValueError(
                f"{artifact.path.name} gives NaN or infinity in {output.name!r}: its numbers overflow. Export with "
                "more precision."
            )
        values = values.astype(np.float32)
        allowed = tolerance(artifact, values)
        outputs.append(Expected(name=output.name, kind=output.kind, values=values, tolerance=allowed))
        if output is artifact.classification and output.kind != "top_scores":
            classes = output.decide(values)
    batches = [spec.as_stored(inputs[i : i + batch]) for i in range(0, len(inputs), batch)]
    return SelfTest(pixels=pixels, batches=tuple(batches), outputs=tuple(outputs), classes=classes)


def generated(size: Sequence[int]) -> np.ndarray:
    """(N,h,w,C) uint8: random colours on a coarse grid, blended into each other, under some noise."""
    height, width, channels = size
    random = np.random.default_rng(0)
    knots = random.uniform(0, 255, (PICTURES, 4, 4, channels))
    blend = lambda n: np.maximum(0, 1 - np.abs(np.linspace(0, 3, n)[:, None] - np.arange(4)))  # (n,4), linear
    smooth = np.einsum("hi,nijc,wj->nhwc", blend(height), knots, blend(width))
    return np.clip(np.round(smooth + random.normal(0, 12, smooth.shape)), 0, 255).astype(np.uint8)


def tolerance(artifact: Artifact, expected: np.ndarray) -> dict[str, float]:
    """`"cpu"` and `"gpu"` -> how far a device's outputs may be from these (N,...)."""
    if artifact.recipe not in ("float32", "float16"):
        cpu = gpu = INTEGER_ERROR
    else:
        exact = target(artifact.format).traits.exact_floats
        cpu, gpu = FLOAT32_ERROR if exact else FLOAT16_ERROR, FLOAT16_ERROR
    scale = float(np.abs(expected).max())
    return {"cpu": cpu * scale, "gpu": gpu * scale}
