"""The main job, end to end: pictures -> fit -> export -> quantize -> verify -> benchmark -> report."""

import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from keras_vits._util import files, jsons
from keras_vits._util.progress import progress
from keras_vits._util.terminal import counted
from keras_vits.cli._app import refuse_taken, refuse_unfinished
from keras_vits.edge import coreml, keras_file, litert
from keras_vits.edge.artifact import Artifact, file_name
from keras_vits.edge.evidence.benchmark import benchmark
from keras_vits.edge.evidence.report import Report, Row, report
from keras_vits.edge.evidence.verify import verify
from keras_vits.edge.quantize.recipes import demonstrated
from keras_vits.edge.targets._protocol import target
from keras_vits.models import _registry as registry
from keras_vits.training import data, fit

IMAGE_SIZE = 64  # pixels, at least: rounded up to what the model can take
CALIBRATION = 128  # training pictures that static_int8 sees
COREML_IMAGES = 500  # held-out pictures that the Core ML packages are checked on, at most
LIST = "demo.json"  # in the folder: which files of it a demo wrote, which the next one may replace


class _List(msgspec.Struct):
    """demo.json: name of a file -> its hash, as a demo wrote it."""

    files: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A model to train.

    Attributes:
        variant: one of `keras_vits.list_models()`.
        name: name of its files; the variant's by default.
        hyperparameters: what differs from the variant.
        epochs: passes over the training pictures.
        learning_rate: peak learning rate of AdamW.
    """

    variant: str
    name: str = ""
    hyperparameters: dict = dataclasses.field(default_factory=dict)
    epochs: int = 20
    learning_rate: float = 1e-3


# Small enough for some minutes on two cores. A narrow MobileViT v2, since depthwise convolutions train slowly on a CPU.
JOBS = (
    Job(
        variant="mobilevitv2_050",
        name="mobilevitv2_small",
        hyperparameters=dict(
            stem_width=8,
            widths=(8, 16, 64, 96, 128),
            depths=(1, 1, 1, 1, 1),
            token_widths=(32, 48, 64),
            token_depths=(1, 2, 1),
        ),
        epochs=8,
        learning_rate=3e-3,
    ),
    Job(
        variant="vit_tiny_patch16_224",
        name="vit_small",
        hyperparameters=dict(width=128, depth=6, heads=4, mlp_hidden=256),
        epochs=40,
        learning_rate=1e-3,
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo came to.

    Attributes:
        rows: a `Row` for each file.
        fits: model name -> its `Fit`.
        report: paths of the report.
        data: the `Data` it was trained on.
        seconds: wall-clock time.
    """

    rows: tuple[Row, ...]
    fits: dict
    report: Report
    data: data.Data
    seconds: float


def demo(
    out: str | pathlib.Path = "out",
    *,
    source: str = "digits",
    model: str | None = None,
    size: int | None = None,
    epochs: int | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> Demo:
    """Trains, exports, quantizes, verifies, benchmarks and reports.

    Args:
        out: folder that everything is written to.
        source: `"digits"`, or a folder with one subfolder of images per class; see `training.data.load`.
        model: one of `keras_vits.list_models()`; a small MobileViT v2 and a small ViT by default.
        size: side of the square that the model sees, in pixels; by default 64, or the next that the model can take.
        epochs: passes over the training pictures; each model's own by default.
        batch_size: pictures in a step of the training.
        limit: use at most so many training and so many held-out pictures; all by default.
        resume: whether to continue an interrupted training from its checkpoint in `out`.
        overwrite: whether files of `out` that no demo wrote, or that were changed since, may be replaced, and the
            checkpoint of an interrupted training.
        seed: of the initial weights, the order of the pictures and the augmentation.
        say: called with a line of text when a step begins and when an epoch ends.

    Returns:
        A `Demo`.

    Raises:
        ValueError: an unknown model, pictures that cannot be trained on, a folder that cannot be written, or a name in
            it that is taken.
    """
    say, out = say or (lambda line: None), pathlib.Path(out)
    started = time.perf_counter()
    names = data.class_names(source)
    rows: list[Row] = []
    fits: dict[str, Any] = {}
    jobs = [Job(variant=model)] if model else JOBS
    for job in jobs:
        _check_names(out, job.name or job.variant, resume, overwrite)
    for job in jobs:
        fit.set_seed(seed)
        net = _create(job, len(names), size)
        pictures = data.load(source, net.preprocessing, limit=limit)
        if (warning := pictures.warning()) and not fits:
            say(warning)
        checkpoint = fit.checkpoint_path(out, net.name)
        total = epochs or job.epochs
        say(f"Training {net.name} on {counted(len(pictures.train), 'picture')}, {len(pictures.validation)} held out")
        fits[net.name] = fit.fit(
            net,
            pictures.train,
            pictures.validation,
            epochs=total,
            batch_size=batch_size,
            learning_rate=job.learning_rate,
            checkpoint=checkpoint,
            resume=resume and checkpoint.exists(),
            seed=seed,
            callbacks=[fit.Say(say, total)],
        )
        say(f"Writing and verifying the files of {net.name}")
        rows += _ship(net, pictures, out)
        _list(out, [row.artifact for row in rows])
    say("Measuring the latency of every file")
    rows = measure(rows)
    written = report(rows, out / "report.html")
    for name in fits:
        fit.checkpoint_path(out, name).unlink(missing_ok=True)
    return Demo(rows=tuple(rows), fits=fits, report=written, data=pictures, seconds=time.perf_counter() - started)


def image_size(job: Job) -> int:
    """Side of the square that the job's model sees, in pixels."""
    cls, defaults = registry.lookup(job.variant)
    multiple = cls.size_multiple(cls.Config(**{**defaults, **job.hyperparameters}))
    return math.ceil(IMAGE_SIZE / multiple) * multiple


def _create(job: Job, classes: int, size: int | None) -> Any:
    cls, defaults = registry.lookup(job.variant)
    given = dict(image_size=size or image_size(job), num_classes=classes)
    return cls(name=job.name or job.variant, **{**defaults, **job.hyperparameters, **given})


def _check_names(out: pathlib.Path, name: str, resume: bool, overwrite: bool) -> None:
    """Refuses to begin where a file that no demo wrote, or the checkpoint of another training, would be replaced.

    Raises:
        ValueError: one is there.
    """
    listed, checkpoint = _listed(out), fit.checkpoint_path(out, name)
    if overwrite or (resume and checkpoint.exists()):  # what goes on was allowed its names when it began
        return
    names = [f"{name}.keras"]
    for format, precision in (("litert", "float32"), ("coreml", "float16")):
        suffix = target(format).suffix
        names += [file_name(name, recipe, suffix) for recipe in (precision, *demonstrated(format))]
    for path in (out / file for file in names):
        if not (path.exists() and listed.get(path.name) == files.known_sha256(path)):
            refuse_taken(path, False, "another --out")
    refuse_unfinished(checkpoint)


def _listed(out: pathlib.Path) -> dict[str, str]:
    """Name -> hash of the files that demos wrote into a folder.

    Raises:
        ValueError: what is to say so is another file.
    """
    path = out / LIST
    if not os.path.lexists(path):
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=_List).files
    except (OSError, *jsons.ERRORS):
        raise ValueError(f"{path} is no list of what a demo wrote: move it, or give another --out.") from None


def _list(out: pathlib.Path, artifacts: Sequence[Artifact]) -> None:
    """Adds files to those that demos wrote into a folder."""
    found = _listed(out) | {artifact.path.name: artifact.sha256 for artifact in artifacts}
    with files.writing(out / LIST) as temporary:
        temporary.write_text(json.dumps({"files": found}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _ship(model: Any, pictures: data.Data, out: pathlib.Path) -> list[Row]:
    """Writes all files of a trained model and verifies each; returns a list of `Row`."""
    held_out = pictures.validation
    images, labels = held_out.images(), held_out.labels
    expected = model.predict(images, batch_size=64, verbose=0)
    calibration = pictures.train.take(CALIBRATION).images()

    own: Any = {"overwrite": True}  # see `_check_names`
    float32 = litert.export(model, out, **own)
    float16 = coreml.export(model, out, precision="float16", **own)
    artifacts = [
        keras_file.export(model, out, **own),
        float32,
        *(litert.quantize(float32, recipe, calibration, **own) for recipe in demonstrated("litert")),
        float16,
        *(coreml.quantize(float16, recipe, **own) for recipe in demonstrated("coreml")),
    ]
    rows = []
    for artifact in progress(artifacts, f"Verifying {model.name}"):
        n = COREML_IMAGES if target(artifact.format).traits.unavailable() else len(images)
        rows.append(Row(artifact, verify(artifact, expected[:n], images[:n], labels[:n])))
    return rows


def measure(rows: Sequence[Row], *, threads: int = 2, min_seconds: float = 1.0) -> list[Row]:
    """The rows with the latency of every file that this machine can run: Core ML runs on a Mac only."""
    able = [row.artifact for row in rows if not target(row.artifact.format).traits.unavailable()]
    found = benchmark(able, threads=threads, min_seconds=min_seconds) if able else []
    latency = {artifact.path: speed for artifact, speed in zip(able, found, strict=True)}
    return [dataclasses.replace(row, latency=latency.get(row.artifact.path)) for row in rows]
