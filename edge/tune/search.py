"""The fastest quantized file that holds a budget: recipes first, then layers left in float where they lose too much."""

from __future__ import annotations

import dataclasses
import pathlib
import typing
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import keras
import numpy as np

from keras_vits._util.progress import progress

from ..artifact import Artifact
from ..evidence.benchmark import benchmark
from ..evidence.chance import at_chance, without_looking
from ..evidence.verify import verify
from ..quantize.calibration import CalibrationWarning, items
from ..quantize.recipes import checked_recipe, searched
from ..records import Latency, Verification, equally_fast, ratio
from ..targets import litert
from .sensitivity import sensitivity

Metric = Literal["top1", "agreement", "sqnr"]
METRICS: tuple[Metric, ...] = typing.get_args(Metric)
CALIBRATION = 64  # images, at most a quarter, that are taken from the data set when no others are given
MOST = 10_000  # images that are measured on of what may have no end: they tell 0.01 % of top-1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A file that was tried.

    Attributes:
        recipe: name of the recipe that it was quantized by.
        float_layers: names of the layers that were left in float.
        artifact: the file.
        verification: comparison with the model.
        drop: its loss, in the unit of the budget.
        latency: beside the other files that hold the budget; `None` for one that does not.
        time_ratio: its time over the float32 file's; `None` as above.
    """

    recipe: str
    float_layers: tuple[str, ...]
    artifact: Artifact
    verification: Verification
    drop: float
    latency: Latency | None = None
    time_ratio: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The fastest file that holds a budget; of those whose times lie within the spread of the runs, the smallest.

    Attributes:
        artifact: the file.
        metric: metric of the budget.
        max_drop: largest loss that was allowed, in percent.
        tried: every `Trial`, in the order they were made.
    """

    artifact: Artifact
    metric: Metric
    max_drop: float
    tried: tuple[Trial, ...]

    def table(self) -> list[str]:
        """What was tried, as lines of Markdown."""
        return table(self.tried, self.max_drop)


def quantize_to(
    model: keras.Model,
    max_drop: float = 0.5,
    *,
    metric: Metric = "top1",
    dataset: Any,
    folder: str | pathlib.Path = "out",
    calibration: Any = None,
    recipes: Sequence[str] | None = None,
    threads: int = 2,
    overwrite: bool = False,
) -> Choice:
    """Quantizes a model by several recipes and returns the fastest file that keeps a budget; of equally fast ones, the
    smallest.

    A recipe that misses it is tried again with its most sensitive layers in float: one, then two, four and so on.

    Args:
        model: a `keras.Model` that `litert.export` takes.
        max_drop: largest loss, in percent: of images by which top-1 falls (`"top1"`), of images whose class changes
            (`"agreement"`), or of the outputs, as root mean square of their change over their own (`"sqnr"`; 1 % is
            40 dB).
        metric: `"top1"`, `"agreement"` or `"sqnr"`.
        dataset: images (N,H,W,C), or (images, labels), as the model takes them, or a data set that yields batches of
            either, of which the first 10,000 images are taken; `"top1"` needs labels, class numbers (N,) or one-hot
            rows.
        folder: folder that the files are written to.
        calibration: images as `litert.quantize` takes them; by default the first of the data set, which are then not
            measured on.
        recipes: names, in the order they are tried; by default, those that the table of recipes says.
        threads: number of threads in the measurement of time.
        overwrite: whether files of the folder that have the names of those that are tried may be replaced.

    Returns:
        A `Choice`.

    Raises:
        ValueError: no file holds the budget (the message has the best one and the table), a budget that every file
            would hold, as of top-1 where the model is no better on these labels than chance, or than one answer to all,
            and of agreement where the model gives one answer to all; another file has the name of one that is tried; or
            a mistake in the arguments.
    """
    if len(keras.tree.flatten(model.inputs)) != 1:
        raise ValueError(
            f"quantize_to is for a model of one input; {model.name} has {len(model.inputs)}: quantize and verify each "
            "recipe by itself."
        )
    images, labels = _arrays(dataset)
    _check(metric, max_drop, images, labels)
    if calibration is None:
        held = min(CALIBRATION, len(images) // 4) or 1
        calibration, images = images[:held], images[held:]
        labels = None if labels is None else labels[held:]
    f32 = litert.export(model, folder, overwrite=overwrite)
    expected = litert.load(f32, threads).predict(images)
    _check_gate(metric, max_drop, verify(f32, expected, images, labels), expected)

    def trial(recipe: str, float_layers: Sequence[str] = ()) -> Trial:
        artifact = litert.quantize(f32, recipe, calibration, folder, float_layers=float_layers, overwrite=overwrite)
        check = verify(artifact, expected, images, labels)
        return Trial(
            recipe=recipe,
            float_layers=tuple(float_layers),
            artifact=artifact,
            verification=check,
            drop=_drop(check, metric),
        )

    tried: list[Trial] = []
    for recipe in progress(searched() if recipes is None else recipes, "quantizing"):
        tried.append(trial(recipe))
        if tried[-1].drop > max_drop and checked_recipe(recipe, "litert").search == "mixed":
            worst = [row.layer for row in sensitivity(f32, calibration, recipe).worst()]
            count = 1
            while tried[-1].drop > max_drop and count <= len(worst) // 2:
                tried.append(trial(recipe, worst[:count]))
                count *= 2
    holding = [t for t in tried if t.drop <= max_drop]
    if not holding:
        best = min(tried, key=lambda t: t.drop)
        raise ValueError(
            f"No file loses at most {max_drop} % ({metric}); the best, {best.artifact.path.name}, loses "
            f"{best.drop:z.3g} %. Allow more, or train with edge.qat.\n" + "\n".join(table(tried, max_drop))
        )
    base, *found = benchmark([f32, *(t.artifact for t in holding)], threads=threads)
    speeds = {t.artifact.path: s for t, s in zip(holding, found, strict=True)}
    timed = tuple(
        dataclasses.replace(t, latency=s, time_ratio=ratio(s, base)) if (s := speeds.get(t.artifact.path)) else t
        for t in tried
    )
    fastest = min((t for t in timed if t.latency is not None), key=lambda t: t.time_ratio or 0.0)
    equal = [t for t in timed if t.latency and equally_fast(t.latency, cast(Latency, fastest.latency))]
    smallest = min(equal, key=lambda t: t.artifact.size_bytes)
    return Choice(artifact=smallest.artifact, metric=metric, max_drop=max_drop, tried=timed)


def _arrays(dataset: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """(images, labels or None) of a data set."""
    if hasattr(dataset, "shape"):
        return np.asarray(dataset), None
    if isinstance(dataset, (tuple, list)) and len(dataset) == 2 and hasattr(dataset[0], "shape"):
        return np.asarray(dataset[0]), np.asarray(dataset[1])
    found: list[list[np.ndarray]] = []
    count = 0
    for batch in items(dataset):
        if count >= MOST:
            warnings.warn(
                f"The data set has more than {MOST:,} images, perhaps no end: the first {count:,} are measured on.",
                CalibrationWarning,
                3,
            )
            break
        if isinstance(batch, Mapping):
            raise ValueError(
                f"A data set yields images, or (images, labels); received a dictionary of {', '.join(batch)}."
            )
        found.append([np.asarray(part) for part in (batch if isinstance(batch, (tuple, list)) else (batch,))])
        count += len(found[-1][0])
        if not len(found[-1][0]):
            raise ValueError("The data set yields a batch of no images.")
    if not found:
        raise ValueError("The data set is empty.")
    if len({len(parts) for parts in found}) != 1:
        raise ValueError("A data set yields the same of every batch: images, or (images, labels).")
    images, *labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return images, labels[0] if labels else None


def _check(metric: str, max_drop: float, images: np.ndarray, labels: np.ndarray | None) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; received {metric!r}.")
    if not 0 <= max_drop < 100:
        raise ValueError(f"max_drop is a loss in percent, from 0 to below 100; received {max_drop!r}.")
    if metric == "top1" and labels is None:
        raise ValueError("metric='top1' needs labels: pass dataset=(images, labels), or take metric='agreement'.")
    if len(images) < 2 or (labels is not None and len(labels) != len(images)):
        count = "none" if labels is None else len(labels)
        raise ValueError(f"A data set has two or more images and a label for each; received {len(images)}, {count}.")


def _check_gate(metric: Metric, max_drop: float, check: Verification, expected: Any) -> None:
    """Raises a `ValueError` if every file would hold the budget, given what the float file does.

    Args:
        metric: of the budget.
        max_drop: the budget.
        check: of the float file.
        expected: what that file gives for the images: an array (N,...), or name -> array.
    """
    told = check.artifact.classification
    if metric == "sqnr":
        return
    if told is None:
        kinds = ", ".join(f"{spec.name} ({spec.kind})" for spec in check.artifact.outputs)
        raise ValueError(
            f"metric={metric!r} is for a model that classifies images; this one gives {kinds}: take 'sqnr'."
        )
    if metric == "top1" and (why := at_chance(check)):
        raise ValueError(
            f"The model itself has {why}: nothing can be lost of that, and every file would hold the budget. Look at "
            "the labels and at how the images are prepared, or take metric='agreement'."
        )
    if metric == "agreement":
        answers = told.decide(expected[told.name] if isinstance(expected, Mapping) else expected)
        most = float(np.unique(answers, return_counts=True)[1].max() / len(answers))
        if max_drop >= 100 * (1 - most):
            raise ValueError(
                f"The model itself gives {most:.1%} of these images one answer, so that a file that gives it to all of "
                f"them would hold max_drop={max_drop!r}: give images of every class, or take metric='sqnr'."
            )
        return
    top1, least = cast(float, check.reference_top1), without_looking(check)
    if max_drop >= 100 * (top1 - least):
        raise ValueError(
            f"max_drop={max_drop!r} is all that the model has, a top-1 of {top1:.1%} where {least:.1%} needs no look "
            "at the images: a file that tells nothing would hold it."
        )


def _drop(check: Verification, metric: Metric) -> float:
    """What a file loses, in percent."""
    if metric == "top1":
        return 100 * (cast(float, check.reference_top1) - cast(float, check.top1))
    if metric == "agreement":
        return 100 * (1 - cast(float, check.top1_agreement))
    return 100 * 10 ** (-check.sqnr_db / 20)


def table(tried: Iterable[Trial], max_drop: float) -> list[str]:
    """Trials as lines of Markdown."""
    lines = [
        "| file | float layers | loss % | holds | SQNR dB | MB | time / float32 |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for t in tried:
        time = "" if t.time_ratio is None else f"{t.time_ratio:.2f}"
        holds = "yes" if t.drop <= max_drop else "no"
        size, sqnr = t.artifact.size_bytes / 1e6, t.verification.sqnr_db
        name = pathlib.Path(t.artifact.path).name
        kept = len(t.float_layers)
        lines.append(f"| {name} | {kept} | {t.drop:z.3g} | {holds} | {sqnr:z.1f} | {size:.2f} | {time} |")
    return lines
