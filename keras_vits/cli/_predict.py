"""The verb predict: pictures and folders of them -> a table, CSV or JSON."""

from __future__ import annotations

import csv
import io
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keras_vits._util.terminal import unreadable, visible
from keras_vits.cli._app import BackendOption, app, console, console_of, say, table

if TYPE_CHECKING:
    from keras_vits.prediction import Prediction
    from keras_vits.specs import OutputSpec

COLUMNS = ("path", "rank", "label", "probability")  # of the CSV

Found = list[tuple[pathlib.Path, "list[Prediction]"]]


class Form(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"


@app.command(
    epilog="Examples: `keras-vits predict photo.jpg --model out/vit_dynamic_int8.tflite`; `keras-vits predict photos/ "
    "--model out/vit.keras --out labels.csv`"
)
def predict(
    images: Annotated[list[pathlib.Path], typer.Argument(help="Pictures, and folders of pictures.")],
    model: Annotated[pathlib.Path, typer.Option(help="A .tflite, .mlpackage, .onnx or .keras file.")],
    top: Annotated[int, typer.Option(min=1, help="How many labels of a picture to tell.")] = 5,
    format: Annotated[
        Form | None, typer.Option(help="Default: what the name of --out says, else table.", show_default=False)
    ] = None,
    out: Annotated[
        pathlib.Path | None, typer.Option("--out", "-o", help="File to write to. Default: the terminal.")
    ] = None,
    backend: BackendOption = None,
) -> None:
    """Classify pictures: the most likely labels, with probabilities.

    A folder is read with the folders in it, in sorted order. What is no readable picture is skipped, counted and named.
    """
    form, files = _form(format, out), _pictures(images)
    if out is not None:
        _check_out(out, [model, *files])
    skipped: list[tuple[pathlib.Path, ValueError]] = []
    found = _predicted(model, files, top, skipped)
    if form is Form.table and out is None:
        for path, labels in found:
            _show(path, labels)
    else:
        text = WRITERS[form](list(found))
        if len(skipped) < len(files):
            _write(text, out)
    _tell(skipped, files)


def _form(asked: Form | None, out: pathlib.Path | None) -> Form:
    if asked or out is None:
        return asked or Form.table
    known = {".csv": Form.csv, ".json": Form.json, ".txt": Form.table}
    if out.suffix.lower() not in known:
        raise ValueError(f"The name {out} does not say what to write: call it .csv, .json or .txt, or give --format.")
    return known[out.suffix.lower()]


def _pictures(given: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """The files themselves, and what has a picture's extension in the folders; each once."""
    from keras_vits._util.pictures import listing, suffixes

    files: list[pathlib.Path] = []
    for path in given:
        if path.is_file():
            files.append(path)
            continue
        if not path.is_dir():
            what = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise ValueError(f"{path} {what}: give pictures, or folders of pictures.")
        inside = listing(path).pictures
        if not inside:
            raise ValueError(f"There are no pictures in {path}: {', '.join(sorted(suffixes()))} are read.")
        files += inside
    return list(dict.fromkeys(files))


def _check_out(out: pathlib.Path, read: Sequence[pathlib.Path]) -> None:
    if out.is_dir():
        raise ValueError(f"{out} is a folder: --out is the file to write.")
    if out.exists() and any(path.exists() and path.samefile(out) for path in read):
        raise ValueError(f"{out} is read, and would be overwritten: give another --out.")


def _predicted(
    model: pathlib.Path, files: Sequence[pathlib.Path], top: int, skipped: list[tuple[pathlib.Path, ValueError]]
) -> Iterator[tuple[pathlib.Path, list[Prediction]]]:
    """Yields each picture with its labels; those that cannot be read go into `skipped`, with the reason."""
    import numpy as np

    from keras_vits._util.progress import progress
    from keras_vits.prediction import BATCH, best

    read, scores, spec = _classifier(model)

    def readable() -> Iterator[tuple[pathlib.Path, Any]]:
        for path in progress(files, "Classifying"):
            try:
                picture = read(path)
            except ValueError as e:
                skipped.append((path, e))
            else:
                yield path, picture

    pictures = readable()
    while batch := list(itertools.islice(pictures, BATCH)):
        answers = scores(np.stack([picture for _, picture in batch]))
        for (path, _), answer in zip(batch, answers, strict=True):
            yield path, best(answer, spec, top, visible(str(path)))


def _classifier(file: pathlib.Path) -> tuple[Callable[[Any], Any], Callable[[Any], Any], OutputSpec]:
    """(path -> a picture as the model takes it, pictures (N,...) -> scores (N,K), spec of the scores) of any format."""
    import keras_vits
    from keras_vits.edge import artifact
    from keras_vits.edge.targets._protocol import target

    if file.suffix == ".keras":
        net = keras_vits.load(file)
        spec = net.output_specs[0]
        if not spec.is_classification:
            raise ValueError(f"{file} gives {spec.kind}, so it predicts no classes: create it with num_classes.")
        return net.preprocessing, net.predict_on_batch, spec
    given = artifact.load(file)
    told = given.classification
    if told is None or told.kind == "top_scores":
        kinds = ", ".join(output.kind for output in given.outputs)
        raise ValueError(f"{file} gives {kinds}: predict takes a file that was exported with logits or probabilities.")
    preprocessing, runner = given.image.prepared, target(given.format).load(given)

    def scores(pictures: Any) -> Any:
        answer = runner.predict(pictures)
        return answer[told.name] if isinstance(answer, dict) else answer

    return (preprocessing.pixels if given.image.takes_pixels else preprocessing), scores, told


# ---------------------------------------------------------------- what is written


def _rows(found: Found) -> Iterator[tuple[str, int, str, float]]:
    for path, labels in found:
        for rank, one in enumerate(labels, 1):
            yield str(path), rank, one.label, one.probability


def _as_table(found: Found) -> str:
    text = io.StringIO()
    on = console_of(text)
    for path, labels in found:
        _show(path, labels, on)
    return text.getvalue()


def _as_csv(found: Found) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((path, rank, label, f"{share:.6g}") for path, rank, label, share in _rows(found))
    return text.getvalue()


def _as_json(found: Found) -> str:
    """An array with an object for each picture; ASCII alone, so that every name survives."""
    pictures = [
        {
            "path": str(path),
            "labels": [
                {"rank": rank, "label": one.label, "probability": one.probability, "index": one.index}
                for rank, one in enumerate(labels, 1)
            ],
        }
        for path, labels in found
    ]
    return json.dumps(pictures, indent=1) + "\n"


WRITERS = {Form.table: _as_table, Form.csv: _as_csv, Form.json: _as_json}


def _show(path: pathlib.Path, labels: Sequence[Prediction], on: Any = console) -> None:
    shown = table(str(path), "Probability")
    for one in labels:
        shown.add_row(one.label, f"{one.probability:.1%}")
    on.print(shown, soft_wrap=False)


def _write(text: str, out: pathlib.Path | None) -> None:
    """Writes a file whole, or to stdout: names as they are, but visible on a terminal."""
    from keras_vits._util.files import writing

    if out is None:
        if sys.stdout.isatty():
            text = "\n".join(map(visible, text.split("\n")))
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.flush()
        buffer = getattr(sys.stdout, "buffer", None)
        if buffer is None:  # somebody's own stream of text
            sys.stdout.write(text)
        else:  # a name that is not in this encoding, as --out writes it
            buffer.write(text.encode(encoding, "surrogateescape" if encoding == "utf-8" else "backslashreplace"))
            buffer.flush()
        return
    with writing(out) as temporary:
        temporary.write_bytes(text.encode("utf-8", "surrogateescape"))
    console.print(f"{out}")


def _tell(skipped: Sequence[tuple[pathlib.Path, ValueError]], files: Sequence[pathlib.Path]) -> None:
    """Counts and names what was no picture.

    Raises:
        ValueError: nothing was one.
    """
    if not skipped:
        return
    if len(skipped) == len(files):
        more = "" if len(files) == 1 else f" Neither are the other {len(files) - 1}."
        raise ValueError(f"{skipped[0][1]}{more}")
    say(unreadable([path for path, _ in skipped]))
