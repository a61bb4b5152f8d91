"""A float32 .tflite file -> a quantized one, by the name of a recipe."""

from __future__ import annotations

import importlib.metadata
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import msgspec

from ... import artifact as artifacts
from ...artifact import Artifact
from ...quantize.calibration import batches
from ...quantize.recipes import check_calibrated, checked_recipe
from .exporter import save
from .packages import require
from .quantization.prepare import Choice, Preparation

LARGEST = 2.0**100  # of a range: far below what float32 holds, so that its width is a number, too


def quantize(
    artifact: Artifact,
    recipe: str,
    calibration: Any = None,
    folder: str | pathlib.Path | None = None,
    *,
    float_layers: Sequence[str] = (),
    overwrite: bool = False,
) -> Artifact:
    """Quantizes a float32 .tflite file.

    Args:
        artifact: what `export` returned.
        recipe: name of one of `recipes.RECIPES`, such as `"dynamic_int8"` or `"static_int8"`.
        calibration: images as the file takes them: an array (N,H,W,C), a data set that yields batches of images or
            (images, labels), a function that returns one, or a folder of pictures; of a file with several inputs, name
            -> array. Some tens of real images are enough; all are held in memory, but no more than 1,000 of what may
            have no end. A static recipe needs them, unless `edge.qat` made the model for it and so chose the ranges;
            every integer one gets nearer to the float file with them.
        folder: where the new file goes; beside the float one by default.
        float_layers: names of layers, or of what they lie in (`"block_3"`), that stay in float.
        overwrite: whether another file of this name may be replaced; one of the same bytes is written anew.

    Returns:
        The `Artifact` of `<model>_<recipe>.tflite`, with `_float<n>` in its name where n layers were named.

    Raises:
        ValueError: an unknown recipe or layer, an artifact that is not a float32 .tflite file or not the file that was
            written, calibration that is missing, empty, of another shape, or not finite, or a name that another file
            has.
    """
    chosen = checked_recipe(recipe, "litert")
    if artifact.format != "litert" or artifact.recipe != "float32":
        raise ValueError(
            f"Only a float32 LiteRT artifact can be quantized; received {artifact.format} {artifact.recipe}."
        )
    choice = None
    if calibration is None and artifact.trained_for.get("recipe") == chosen.name:
        choice = _trained(artifact)
    if choice is None:
        check_calibrated(chosen, calibration)
    require("ai_edge_quantizer.quantizer")
    artifacts.check(artifact)
    float_layers = tuple(dict.fromkeys(float_layers))
    images = None
    if calibration is not None:
        images = list(batches(calibration, artifact.inputs, "reading images"))
    try:
        content = Preparation(artifact.path.read_bytes(), chosen, images, float_layers, choice=choice).quantized()
    except ValueError as e:
        if choice is None:
            raise
        raise ValueError(
            f"{artifacts.sidecar(artifact.path)} has ranges that do not fit {artifact.path.name}: {e}"
        ) from e
    name = artifacts.file_name(artifact.model, chosen.name, ".tflite", float_layers)
    with artifacts.writing(folder or artifact.path.parent, name, overwrite=overwrite) as draft:
        tools = {
            **artifact.tools,
            "litert_runtime": save(draft.temporary, content, artifact.class_names),
            "ai_edge_quantizer": importlib.metadata.version("ai-edge-quantizer"),
        }
        draft.describe(**artifacts.like(artifact, recipe=chosen.name, tools=tools, trained_for={}))
    return draft.artifact


def _trained(artifact: Artifact) -> Choice:
    """What the fine-tuning of a file's model chose.

    Raises:
        ValueError: it is no choice, or one with limits that no tensor has.
    """
    beside = artifacts.sidecar(artifact.path)
    try:
        choice = msgspec.convert(dict(artifact.trained_for), Choice)
    except msgspec.ValidationError as e:
        raise ValueError(f"{beside} has damaged ranges ({e}): export the fine-tuned model again.") from None
    numbers = [*choice.mean, *itertools.chain.from_iterable(choice.ranges.values())]
    channels = artifact.image.shape[-1]
    if not all(abs(number) < LARGEST for number in numbers) or len(choice.mean) != channels:
        raise ValueError(
            f"{beside} has ranges or a mean of the image that are no numbers for it: export the fine-tuned model again."
        )
    if wrong := [name for name, (low, high) in choice.ranges.items() if low > high]:
        raise ValueError(f"{beside} has a range of {wrong[0]!r} that ends before it begins: export the model again.")
    return choice
