"""The evidence on one page: which file to ship, how good and how fast each one is, and how that was found out.

The page is one HTML file that needs no network and follows the reader's light or dark mode. A JSON with the same
numbers and a Markdown table lie beside it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from keras_vits._util.files import writing
from keras_vits._util.terminal import counted, listed

from ..artifact import Artifact
from ..artifact import check as check_artifact
from ..devices._common import cpu_name
from ..records import Latency, Verification, equally_fast
from ..targets._protocol import Traits, names, target
from .chance import at_chance
from .plots import Point, plot

TOLERANCE = 0.01  # of top-1: a file this close to the most accurate one is as good as it
PACKAGES = (
    "keras-vits keras numpy jax tensorflow torch ai-edge-litert ai-edge-quantizer coremltools onnx onnxruntime".split()
)
TEMPLATES = pathlib.Path(__file__).with_name("templates")
STYLE = (TEMPLATES / "report.css").read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of one artifact.

    Attributes:
        artifact: the file.
        verification: what `verify` found.
        latency: what `benchmark` found.
    """

    artifact: Artifact
    verification: Verification | None = None
    latency: Latency | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The paths of a report's three files."""

    html: pathlib.Path
    json: pathlib.Path
    markdown: pathlib.Path


def report(
    rows: Sequence[Row],
    path: str | pathlib.Path,
    *,
    title: str | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Report:
    """Writes a report: one HTML page, and a JSON and a Markdown file of the same name beside it.

    Args:
        rows: list of `Row`, in the order of the table. They may belong to several models.
        path: of the page, e.g. `"out/report.html"`.
        title: of the page; made of the models' names by default.
        environment: name -> value, what the numbers were made with; `host_environment()` by default.

    Returns:
        A `Report`, the three paths.

    Raises:
        ImportError: Jinja2 or matplotlib is not installed.
        ValueError: no rows; a file that is not the one that was written; a latency of an artifact that was not
            verified; a verification or latency of another file; a path that does not end in `.html`, cannot be written,
            or is that of something that is no report.
    """
    rows, path = list(rows), pathlib.Path(path)
    if path.suffix != ".html":
        raise ValueError(f"The path of a report ends in .html; received {path}.")
    _check(rows)
    title = title or f"Which file to ship: {', '.join(_models(rows))}"
    facts = {str(k): str(v) for k, v in (host_environment() if environment is None else environment).items()}
    data = _data(rows, path.parent, facts)
    written = Report(html=path, json=path.with_suffix(".json"), markdown=path.with_suffix(".md"))
    _check_places(written)
    contents = {  # the .json first: it tells that the two others are a report's
        written.json: json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        written.markdown: _markdown(rows, title),
        written.html: _page(rows, path.parent, title, facts),
    }
    for file, content in contents.items():
        with writing(file) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return written


def _check_places(report: Report) -> None:
    """Refuses to replace what is no report: its three names may be those of somebody's own files."""
    known = _is_report(report.json)
    for file in (report.html, report.json, report.markdown):
        if file.is_dir():
            raise ValueError(f"{file} is a folder, and a file of the report goes there: choose another name.")
        if file.exists() and file.stat().st_size and not known:
            raise ValueError(f"{file} is there already, and is no report: choose another name.")


def _is_report(path: pathlib.Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"model", "rows", "environment"} <= set(found)


def host_environment() -> dict[str, Any]:
    """What numbers are made with here, as name -> value: processor, system, Python, and the packages that matter."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "os": platform.platform(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


# ---------------------------------------------------------------- what the rows say


def _check(rows: Sequence[Row]) -> None:
    if not rows:
        raise ValueError("A report needs at least one row.")
    for row in rows:
        name, check, speed = row.artifact.path.name, row.verification, row.latency
        check_artifact(row.artifact)
        if speed is not None and check is None:
            raise ValueError(
                f"{name} has a latency but was not verified: call edge.verify first. A wrong answer is never fast."
            )
        if check is not None and check.artifact.sha256 != row.artifact.sha256:
            raise ValueError(f"The verification beside {name} is of another file, {check.artifact.path.name}.")
        if speed is not None and speed.artifact_path.absolute() != row.artifact.path.absolute():
            raise ValueError(f"The latency beside {name} is of another file, {speed.artifact_path.name}.")


def _models(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.artifact.model for row in rows))


def _traits(row: Row) -> Traits:
    return target(row.artifact.format).traits


def _formats(rows: Sequence[Row]) -> list[str]:
    """Targets of the rows that are for phones, in the order in which targets are listed."""
    found = {row.artifact.format for row in rows if _traits(row).phone}
    return [name for name in names() if name in found]


def _measure(rows: Sequence[Row]) -> tuple[str, str]:
    """What accuracy means in this report, as (field of Verification, name): agreement where labels are not known."""
    known = all(row.verification.top1 is not None for row in rows if row.verification)
    return ("top1", "top-1") if known else ("top1_agreement", "top-1 agreement")


def _accuracy(rows: Sequence[Row], row: Row) -> float | None:
    """`None` of a file that was not verified, or whose outputs tell no class."""
    return getattr(row.verification, _measure(rows)[0], None)


def _known_accuracy(rows: Sequence[Row], row: Row) -> float:
    """The same of a row that has one."""
    return cast(float, _accuracy(rows, row))


def _best(rows: Sequence[Row]) -> Row:
    """The most accurate row; the first one where no accuracy is known."""
    known = [row for row in rows if _accuracy(rows, row) is not None]
    return max(known, key=lambda row: _known_accuracy(rows, row)) if known else rows[0]


def recommend(rows: Sequence[Row], format: str) -> tuple[Row, str] | None:
    """The row to ship among those of a format, and why: the fastest as accurate as any, else the most accurate.

    Times that differ within the spread of the runs are equal, and then the smaller file is shipped. A file whose
    accuracy may be reached without looking at the images is not: see `chance.at_chance`.

    Args:
        rows: list of `Row`.
        format: name of a target.

    Returns:
        (row, reason), or `None` where no file of the format was verified, none classifies, or none tells
        more than chance or one answer to all (`withheld` says so).
    """
    files = [row for row in _known(rows, format) if not at_chance(cast(Verification, row.verification))]
    if not files:
        return None
    name, title = _measure(rows)[1], target(format).traits.title
    good = [row for row in files if _lost(rows, row) <= TOLERANCE + 1e-9]
    if not good:
        row = min(files, key=lambda row: _lost(rows, row))
        return row, f"the most accurate one, {_lost(rows, row) * 100:.1f} points below the best {name}"
    timed = [(row, row.latency) for row in good if row.latency]
    equal = good
    if len(timed) == len(good):
        _, least = min(timed, key=lambda pair: pair[1].median_ms)
        equal = [row for row, speed in timed if equally_fast(speed, least)]
    row = min(equal, key=lambda row: row.artifact.size_bytes)
    count = f"of the {len(good)} {title} files" if len(good) > 1 else f"{title} file"
    which = ("the fastest" if len(timed) == len(good) else "the smallest") if len(good) > 1 else "the only"
    equally = ""
    if len(timed) == len(good) and len(equal) > 1:
        which = "the smallest" if len(equal) == len(good) else f"the smallest of the {len(equal)} fastest"
        equally = ", whose times differ within the spread of the runs"
    best = _known_accuracy(rows, row) + _lost(rows, row)
    return row, f"{which} {count} within {TOLERANCE * 100:.0f} point of the best {name}, {_percent(best)}{equally}"


def withheld(rows: Sequence[Row], format: str) -> str:
    """Why no file of a format is recommended, in a sentence; "" where one is, or where there is none to judge."""
    files = _known(rows, format)
    if not files or recommend(rows, format):
        return ""
    best = max(files, key=lambda row: _known_accuracy(rows, row))
    title = target(format).traits.title
    why = at_chance(cast(Verification, best.verification))
    return f"No {title} file is recommended: {best.artifact.path.name}, the best, has {why}."


def _known(rows: Sequence[Row], format: str) -> list[Row]:
    """The rows of a format whose accuracy is known."""
    return [row for row in rows if row.artifact.format == format and _accuracy(rows, row) is not None]


def _lost(rows: Sequence[Row], row: Row) -> float:
    """Accuracy below the best of the files that were checked on as many images."""
    images = cast(Verification, row.verification).images
    peers = [r for r in rows if r.verification and r.verification.images == images]
    known = [a for r in peers if (a := _accuracy(rows, r)) is not None]
    return max(known) - _known_accuracy(rows, row)


def _data(rows: Sequence[Row], folder: pathlib.Path, facts: Mapping[str, str]) -> dict[str, Any]:
    best = _best(rows).artifact
    return {
        "model": best.model,
        "backend": best.tools.get("backend"),
        "rows": [_fields(row, folder) for row in rows],
        "environment": facts,
    }


def _fields(row: Row, folder: pathlib.Path) -> dict[str, Any]:
    """A row of report.json; what is not known, or not a finite number, is null."""
    artifact, check, speed = row.artifact, row.verification, row.latency
    fields = {
        "artifact": _relative(artifact.path, folder),
        "model": artifact.model,
        "format": artifact.format,
        "recipe": artifact.recipe,
        "size_bytes": artifact.size_bytes,
    }
    fields["pixel_agreement"] = None if check is None else _pixels(check)
    for key in (
        "images",
        "top1",
        "reference_top1",
        "majority",
        "top1_agreement",
        "sqnr_db",
        "max_abs_error",
        "partitions",
        "outside",
        "operations",
        "gpu_offenders",
        "verified_by",
    ):
        fields[key] = getattr(check, key, None)
    for key in (
        "median_ms",
        "p10_ms",
        "p90_ms",
        "p99_ms",
        "load_ms",
        "peak_memory_bytes",
        "runs",
        "threads",
        "runtime",
    ):
        fields[f"latency_{key}" if key.startswith(("median", "p1", "p9")) else key] = getattr(speed, key, None)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def _relative(path: pathlib.Path, folder: pathlib.Path) -> str:
    return pathlib.Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()


# ---------------------------------------------------------------- numbers as text

NONE = "–"
SECONDS = 10_000  # milliseconds, from which on times are told in seconds


def _significant(value: float, digits: int = 3) -> str:
    """2.7182 -> "2.72", 1234.5 -> "1234"."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def _percent(fraction: float) -> str:
    return f"{fraction * 100:.1f} %"


def _megabytes(size_bytes: float) -> str:
    return f"{_significant(size_bytes / 1e6)} MB"


def _ms(milliseconds: float | None) -> str:
    """1.234 -> "1.23 ms", 32534 -> "32.5 s"."""
    if milliseconds is None:
        return NONE
    return f"{_significant(milliseconds / 1e3)} s" if milliseconds >= SECONDS else f"{_significant(milliseconds)} ms"


def _spread(latency: Latency) -> str:
    """1.2 and 1.4 -> "1.20 to 1.40 ms"."""
    if latency.p10_ms is None or latency.p90_ms is None:
        return NONE
    low, high = _ms(latency.p10_ms), _ms(latency.p90_ms)
    return f"{low.removesuffix(' ms') if high.endswith(' ms') else low} to {high}"


def _top1(check: Verification) -> str:
    if check.top1 is None:
        return NONE
    if check.reference_top1 is None:
        return _percent(check.top1)
    points = round((check.top1 - check.reference_top1) * 100, 1)
    return f"{_percent(check.top1)} ({points:+.1f})".replace("-", "−") if points else f"{_percent(check.top1)} (±0)"


def _pixels(check: Verification) -> float | None:
    """The smallest share of a mask's pixels that have the model's class, or `None` without a mask."""
    found = [o.agreement for o in check.outputs if o.counted == "pixels" and o.agreement is not None]
    return min(found, default=None)


def _agreement(check: Verification) -> str:
    if check.top1_agreement is not None:
        return _percent(check.top1_agreement)
    return NONE if (pixels := _pixels(check)) is None else f"{_percent(pixels)} of pixels"


def _sqnr(check: Verification) -> str:
    return "exact" if check.sqnr_db == math.inf else f"{check.sqnr_db:z.1f} dB"


def _partitions(check: Verification) -> str:
    left_out = sum(check.outside.values())
    return NONE if check.partitions is None else f"{check.partitions}{f' + {left_out}' if left_out else ''}"


# Heading -> (the part of a row that it is read from, its text).
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "Size": ("artifact", lambda artifact: _megabytes(artifact.size_bytes)),
    "Top-1": ("verification", _top1),
    "Agreement": ("verification", _agreement),
    "SQNR": ("verification", _sqnr),
    "Median": ("latency", lambda latency: _ms(latency.median_ms)),
    "Spread": ("latency", _spread),
    "Load": ("latency", lambda latency: _ms(latency.load_ms)),
    "Memory": ("latency", lambda latency: NONE if (b := latency.peak_memory_bytes) is None else _megabytes(b)),
    "Parts": ("verification", _partitions),
}
MEANINGS = {
    "Recipe": "How the numbers are stored: float32 as trained, float16 in half the space, int8 and int4 in 8 and 4 "
    "bits. Ranges of activations were found by calibration (static) or are found while the file runs (dynamic).",
    "Size": "On disk, and about what the app grows by; 1 MB is 1,000,000 bytes.",
    "Top-1": "Share of the images whose class the file gets right; in brackets the difference to the model it was "
    "made from, in percentage points.",
    "Agreement": "Share of the images on which the file and its model give the same class, right or wrong; of a model "
    "that gives a class for each pixel, share of the pixels, which are not images: neighbours agree together.",
    "SQNR": "Signal-to-quantization-noise ratio of the outputs: at 20 dB the output error is a tenth of them, at 40 dB "
    "a hundredth; exact means that there is none.",
    "Median": "Time of one run, from the image in memory to the answer; half of the runs are faster.",
    "Spread": "From the 10th to the 90th percentile: four of five runs take so long. Files whose times differ within "
    "the spread are taken as equally fast, and then the smaller one is recommended.",
    "Load": "From the file to a model that is ready for its first image, once for each start of the app.",
    "Memory": "Largest memory of a process that does nothing but run this file, Python and the runtime included.",
    "Parts": "Partitions: parts of the graph that LiteRT hands to its fast kernels (XNNPACK). 1 is best: all of it; "
    "1 + 2 means that two operations are left to slower code.",
}


def _meanings(rows: Sequence[Row]) -> dict[str, str]:
    """Heading -> what it means."""
    about = "; ".join(dict.fromkeys(traits.about for row in rows if (traits := _traits(row)).about))
    return ({"Format": f"{about}."} if about else {}) | MEANINGS


def _checked_by(row: Row) -> str:
    return row.verification.verified_by if row.verification else "not verified"


def _columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Heading -> one text for each row; without the columns that no row has anything in."""
    columns = {}
    for heading, (part, text) in COLUMNS.items():
        cells = [NONE if (found := getattr(row, part)) is None else text(found) for row in rows]
        if set(cells) != {NONE}:
            columns[heading] = cells
    return {**columns, "Checked by": [_checked_by(row) for row in rows]}


def _how(rows: Sequence[Row]) -> list[str]:
    """Sentences that tell how the numbers came about."""
    verified = [(r, r.verification) for r in rows if r.verification]
    timed = [r.latency for r in rows if r.latency]
    said = []
    if verified:
        pairs = dict.fromkeys((_traits(r).title, check.images) for r, check in verified)
        counts = ", ".join(f"{title} on {images} images" for title, images in pairs)
        said.append(f"Accuracy: every file was compared with the model it was made from ({counts}).")
    if timed:
        cpus = ", ".join(sorted({speed.cpu for speed in timed}))
        threads = " or ".join(map(str, sorted({speed.threads for speed in timed if speed.threads})))
        with_threads = f" with {threads} thread{'s' * (threads != '1')}" if threads else ""
        said.append(
            f"Latency: measured on {cpus}{with_threads}, after a warm-up, at least "
            f"{min(speed.runs for speed in timed)} times each. Every file ran in a process of its own, in turns with "
            "the others, so that a busy moment of the machine hits all of them alike. Times on a phone differ."
        )
    for format in dict.fromkeys(r.artifact.format for r, _ in verified):
        by = [check.verified_by for r, check in verified if r.artifact.format == format]
        said += [sentence] if (sentence := target(format).traits.checked(by)) else []
    said += [_in_float32(row.artifact) for row in rows if row.artifact.float32_layers]
    if missing := [row.artifact.path.name for row in rows if not row.verification]:
        said.append(f"Not verified, so nothing is claimed of them: {', '.join(missing)}.")
    return said


def _in_float32(artifact: Artifact) -> str:
    layers = artifact.float32_layers
    return (
        f"Float32: half precision may not hold the numbers of {counted(len(layers), 'layer')} of {artifact.path.name}, "
        f"which computes them in float32 ({listed(layers)})."
    )


# ---------------------------------------------------------------- Markdown


def _markdown(rows: Sequence[Row], title: str) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = [f"# {title}", ""]
    for format in _formats(rows):
        if found := recommend(rows, format):
            lines += [f"**{_traits(found[0]).phone}: `{found[0].artifact.path.name}`**, {found[1]}.", ""]
        elif why := withheld(rows, format):
            lines += [f"**{target(format).traits.phone}**: {why}", ""]
    columns = {
        "File": [f"`{row.artifact.path.name}`" for row in rows],
        "Format": [_traits(row).title for row in rows],
        "Recipe": [row.artifact.recipe for row in rows],
        **_columns(rows),
    }
    lines += [line(columns), line(["---"] * len(columns)), *map(line, zip(*columns.values(), strict=True))]
    return "\n".join([*lines, "", *(f"- {said}" for said in _how(rows)), ""])


# ---------------------------------------------------------------- HTML


def _page(rows: Sequence[Row], folder: pathlib.Path, title: str, facts: Mapping[str, str]) -> str:
    """The page; what is on it is decided here, and how it looks in the template."""
    try:
        import jinja2
    except ImportError:
        raise ImportError('A report needs Jinja2: pip install -e ".[report]"') from None
    found = {format: answer for format in _formats(rows) if (answer := recommend(rows, format))}
    chosen, columns, models = [row for row, _ in found.values()], _columns(rows), _models(rows)
    series = {model: models.index(model) % 4 for model in models} if len(models) > 1 else {}
    groups = []
    for model in models:
        lines = [
            {
                "title": _traits(row).title,
                "recipe": row.artifact.recipe,
                "phone": _traits(row).phone if row in chosen else "",
                "file": _file(row, folder),
                "cells": cells,
            }
            for row, *cells in zip(rows, *columns.values(), strict=True)
            if row.artifact.model == model
        ]
        groups.append({"model": model, "lines": lines})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.j2").render(
        title=title,
        style=STYLE,
        cards=[_card(rows, folder, *answer) for answer in found.values()],
        withheld=[why for format in _formats(rows) if (why := withheld(rows, format))],
        figures=_figures(rows, chosen),
        signs={_traits(row).title: _traits(row).sign for row in rows if row.verification},
        series=series,
        columns=list(columns),
        groups=groups,
        how=_how(rows),
        meanings={k: v for k, v in _meanings(rows).items() if k not in COLUMNS or k in columns},
        facts=facts,
    )


def _card(rows: Sequence[Row], folder: pathlib.Path, row: Row, reason: str) -> dict[str, Any]:
    """What the template shows of a file to ship."""
    numbers = [f"{_percent(_known_accuracy(rows, row))} {_measure(rows)[1]}", _megabytes(row.artifact.size_bytes)]
    numbers += [_ms(row.latency.median_ms)] if row.latency else []
    return {
        "phone": _traits(row).phone,
        "file": _file(row, folder),
        "numbers": " · ".join(numbers),
        "reason": reason[0].upper() + reason[1:],
    }


def _file(row: Row, folder: pathlib.Path) -> dict[str, str]:
    """Name of a file and the address of it, "" of a folder."""
    path = row.artifact.path
    return {"name": path.name, "url": "" if path.is_dir() else urllib.parse.quote(_relative(path, folder))}


def _figures(rows: Sequence[Row], chosen: Sequence[Row]) -> list[dict[str, str]]:
    """The plots, each with its title; none of those that would have no points."""
    models, accuracy = _models(rows), _measure(rows)[1].capitalize()
    axes: dict[str, tuple[str, Callable[[Row], float | None]]] = {
        "latency": ("Latency in ms, median and spread", lambda row: row.latency.median_ms if row.latency else None),
        "size": ("Size of the file in MB", lambda row: row.artifact.size_bytes / 1e6),
    }
    figures = []
    for what, (label, x) in axes.items():
        points = [
            Point(
                x=place,
                y=_known_accuracy(rows, row) * 100,
                label=row.artifact.recipe,
                marker=_traits(row).marker,
                series=models.index(row.artifact.model) if len(models) > 1 else None,
                chosen=row in chosen,
                spread=_ends(row.latency) if what == "latency" else None,
            )
            for row in rows
            if _accuracy(rows, row) is not None and (place := x(row))
        ]
        if points:
            drawing = plot(points, f"{label} (left is better)", f"{accuracy} in % (up is better)")
            figures.append({"title": f"{accuracy} against {what}", "svg": drawing})
    return figures


def _ends(latency: Latency | None) -> tuple[float, float] | None:
    """10th and 90th percentile of the times, or `None`."""
    if latency is None or latency.p10_ms is None or latency.p90_ms is None:
        return None
    return latency.p10_ms, latency.p90_ms
