"""Which layer loses most accuracy: the noise that quantizing each one alone adds to the outputs."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import tempfile
import typing
from typing import Any

import numpy as np

from keras_vits._util.files import writing
from keras_vits._util.progress import progress

from ..artifact import Artifact, check
from ..quantize.calibration import batches
from ..quantize.recipes import checked_recipe
from ..records import sqnr_db
from ..targets import litert
from ..targets.litert.quantization.prepare import Preparation
from ..targets.litert.runtime import of_bytes, outputs

if typing.TYPE_CHECKING:
    import keras

COMPARED = 8  # batches, at most, that the outputs are compared on: one number for each layer needs no more


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNoise:
    """A layer that was quantized alone.

    Attributes:
        layer: its name, which `litert.quantize(..., float_layers=[...])` takes.
        sqnr_db: signal-to-quantization-noise ratio of the file's outputs, infinite if they did not change; of several
            outputs, the worst one's.
    """

    layer: str
    sqnr_db: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The noise that quantizing each layer alone adds to the outputs.

    Attributes:
        model: name of the model.
        recipe: name of the recipe that the layers were quantized by.
        images: number of images that the outputs were compared on.
        rows: a `LayerNoise` for each quantized layer, in the order of the file.
    """

    model: str
    recipe: str
    images: int
    rows: tuple[LayerNoise, ...]

    def worst(self) -> tuple[LayerNoise, ...]:
        """The rows, the most sensitive layer first."""
        return tuple(sorted(self.rows, key=lambda row: row.sqnr_db))

    def float_layers(self, min_sqnr_db: float) -> tuple[str, ...]:
        """The fewest layers to leave in float for outputs of at least so many dB, if the layers' noise adds up.

        Args:
            min_sqnr_db: smallest SQNR of the whole file, in dB.

        Returns:
            Names for `litert.quantize(..., float_layers=...)`, the most sensitive first.
        """
        rows = self.worst()
        noise = [10 ** (-row.sqnr_db / 10) for row in rows]
        allowed = 10 ** (-min_sqnr_db / 10)
        count = next(n for n in range(len(rows) + 1) if sum(noise[n:]) <= allowed)
        return tuple(row.layer for row in rows[:count])

    def plot(self, path: str | pathlib.Path) -> pathlib.Path:
        """Writes a plot: a point for each layer; the further to the left, the more it adds to the noise.

        Args:
            path: path of the `.svg` file.

        Returns:
            The path.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError('matplotlib is needed for a plot: pip install -e ".[report]"') from None
        rows = [row for row in self.rows if math.isfinite(row.sqnr_db)]
        figure = Figure(figsize=(6.2, 0.6 + 0.16 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.plot([row.sqnr_db for row in rows], range(len(rows)), "o", markersize=5)
        axes.set_yticks(range(len(rows)), [row.layer for row in rows], fontsize=7)
        axes.set_xlabel(f"SQNR of the outputs, dB, with this layer alone in {self.recipe}")
        axes.invert_yaxis()
        axes.grid(linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        path = pathlib.Path(path)
        with writing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        return path


def sensitivity(model: keras.Model | Artifact, calibration: Any, recipe: str = "static_int8") -> Sensitivity:
    """Quantizes one layer at a time and compares the outputs with those of the float file.

    Args:
        model: a `keras.Model`, or a float32 LiteRT `Artifact`.
        calibration: images as `litert.quantize` takes them.
        recipe: name of a LiteRT recipe of integers.

    Returns:
        A `Sensitivity`.

    Raises:
        ValueError: an unknown recipe or one without integers, bad calibration, or a file that is not the one that was
            written.
    """
    chosen = checked_recipe(recipe, "litert")
    if not chosen.is_integer:
        raise ValueError(f"Recipe {recipe!r} rounds no layer to integers: choose 'static_int8', for example.")
    if calibration is None:
        raise ValueError("A layer's sensitivity is measured on images: pass some tens of real ones as calibration=...")
    if not isinstance(model, Artifact):
        with tempfile.TemporaryDirectory() as folder:
            return sensitivity(litert.export(model, folder), calibration, recipe)
    check(model)
    images = list(batches(calibration, model.inputs, "reading images"))
    preparation = Preparation(model.path.read_bytes(), chosen, images)
    images = images[:COMPARED]
    expected = outputs(of_bytes(preparation.content), images)
    rows = []
    for layer in progress(preparation.layers(), "quantizing one layer at a time"):
        content = preparation.quantized(only=layer, method="minmax")
        pairs = zip(outputs(of_bytes(content), images), expected, strict=True)
        ratios = [sqnr_db(float(np.square(x).sum()), float(np.square(y - x).sum())) for y, x in pairs]
        rows.append(LayerNoise(layer=layer, sqnr_db=min(ratios)))
    count = len(images) * model.inputs[0].shape[0]
    return Sensitivity(model=model.model, recipe=recipe, images=count, rows=tuple(rows))
