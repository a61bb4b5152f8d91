"""A float32 .tflite file -> a quantized one, by the name of a recipe."""

from __future__ import annotations

import importlib.metadata
import pathlib
from collections.abc import Sequence
from typing import Any

from keras_vits._util import files

from ... import artifact as artifacts
from ...artifact import Artifact
from ...quantize.calibration import batches
from ...quantize.recipes import check_calibrated, checked_recipe
from .exporter import save
from .packages import require
from .quantization.prepare import Choice, Preparation


def quantize(
    artifact: Artifact,
    recipe: str,
    calibration: Any = None,
    folder: str | pathlib.Path | None = None,
    *,
    float_layers: Sequence[str] = (),
) -> Artifact:
    """Quantizes a float32 .tflite file.

    Args:
        artifact: what `export` returned.
        recipe: name of one of `recipes.RECIPES`, such as `"dynamic_int8"` or `"static_int8"`.
        calibration: images as the file takes them: an array (N,H,W,C), a data set that yields batches of images or
            (images, labels), or a folder of pictures. Some tens of real images are enough; all are held in memory. A
            static recipe needs them, unless `edge.qat` made the model for it and so chose the ranges; every integer one
            gets nearer to the float file with them.
        folder: where the new file goes; beside the float one by default.
        float_layers: names of layers, or of what they lie in (`"block_3"`), that stay in float.

    Returns:
        The `Artifact` of `<model>_<recipe>.tflite`, with `_float<n>` in its name where n layers were named.

    Raises:
        ValueError: an unknown recipe or layer, an artifact that is not a float32 .tflite file, or calibration that is
            missing, empty, of another shape, or not finite.
    """
    chosen = checked_recipe(recipe, "litert")
    if artifact.format != "litert" or artifact.recipe != "float32":
        raise ValueError(
            f"Only a float32 LiteRT artifact can be quantized; received {artifact.format} {artifact.recipe}."
        )
    choice = None
    if calibration is None and artifact.trained_for.get("recipe") == chosen.name:
        choice = Choice(**artifact.trained_for)
    if choice is None:
        check_calibrated(chosen, calibration)
    require("ai_edge_quantizer.quantizer")
    images = None
    if calibration is not None:
        images = list(batches(calibration, artifact.input, artifact.preprocessing, "reading images"))
    content = Preparation(artifact.path.read_bytes(), chosen, images, float_layers, choice=choice).quantized()
    mixed = f"_float{len(float_layers)}" if float_layers else ""
    path = pathlib.Path(folder or artifact.path.parent) / f"{artifact.model}_{chosen.name}{mixed}.tflite"
    with files.alone(path.parent):
        tools = {
            **artifact.tools,
            "litert_runtime": save(path, content, artifact.class_names),
            "ai_edge_quantizer": importlib.metadata.version("ai-edge-quantizer"),
        }
        return artifacts.remake(artifact, path, recipe=chosen.name, tools=tools, trained_for={})
