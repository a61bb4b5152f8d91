"""What the float file computes on the calibration images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from keras_vits._util.progress import progress

from ....quantize import numerics as q
from ..flatbuffer import Attention, File, Layer
from ..runtime import of_bytes, set_inputs
from .plan import is_rounded

ROWS = 1024  # of a tensor's tokens or pixels, over all images, in the sample that scales are chosen on


@dataclasses.dataclass(eq=False)
class Activation:
    """What is known of a tensor (...,C) after all images.

    Attributes:
        histogram: of all its values.
        samples: of its rows (R,C), some of each batch.
        total: sum of its rows (C), of which there are `count`.
        hessian: sum of x x^T over its rows (C,C), or `None` where no layer needs it.
        first: the whole tensor of the first batch, or `None` where nothing needs it.
    """

    histogram: q.Histogram = dataclasses.field(default_factory=q.Histogram)
    samples: list[np.ndarray] = dataclasses.field(default_factory=list)
    total: np.ndarray | float = 0.0
    count: int = 0
    hessian: np.ndarray | None = None
    first: np.ndarray | None = None

    def add(self, x: np.ndarray, rows: int, hessian: bool = False, whole: bool = False) -> None:
        """Takes in a batch (...,C): `rows` of it into the sample."""
        if whole and self.first is None:
            self.first = x
        x = x.reshape(-1, x.shape[-1])
        self.histogram.add(x)
        self.total, self.count = self.total + x.sum(0, dtype=np.float64), self.count + len(x)
        keep = np.random.default_rng(self.count).permutation(len(x))[:rows]
        self.samples.append(x[np.sort(keep)])
        if hessian:
            self.hessian = x.T @ x + (0 if self.hessian is None else self.hessian)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The sample (R,C)."""
        return np.concatenate(self.samples)

    @property
    def mean(self) -> np.ndarray:
        """(C)"""
        return np.asarray(self.total / self.count)

    @property
    def signal(self) -> float:
        """Mean square, summed over the channels."""
        return float(np.square(self.rows).mean(0).sum())

    @functools.cached_property
    def compensation(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `numerics.compensation`."""
        if self.hessian is None:
            raise RuntimeError("No sum of x x^T was asked for.")
        return q.compensation(self.hessian)


def observe(
    file: File, layers: Sequence[Layer], images: Sequence[Sequence[np.ndarray]], attentions: Sequence[Attention] = ()
) -> dict[int, Activation]:
    """Runs the float file on the images.

    Args:
        file: the float file.
        layers: of `plan`.
        images: batches as the file takes them, an array for each input.
        attentions: the file's, where they are to be computed in integers.

    Returns:
        Tensor -> `Activation`, for every input and output of layers and attentions.
    """
    runner = of_bytes(bytes(file.bytes()), keep=True)
    found = {tensor: Activation() for layer in layers for tensor in (layer.x, layer.y)}
    rounded = {layer.x for layer in layers if is_rounded(file, layer)}
    operands = {tensor for a in attentions for tensor in (a.q, a.k, a.v)}
    found |= {t: Activation() for a in attentions for t in (*operands, a.s, a.p, a.y) if t not in found}
    for batch in progress(images, "calibrating"):
        set_inputs(runner, batch)
        runner.invoke()
        for tensor, activation in found.items():
            activation.add(runner.get_tensor(tensor), -(-ROWS // len(images)), tensor in rounded, tensor in operands)
    return found
