"""The evidence on one page: which file to ship, how good and how fast each one is, and how that was found out.

The page is one HTML file that needs no network and follows the reader's light or dark mode. A JSON with the same
numbers and a Markdown table lie beside it.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import urllib.parse
from html import escape

from keras_vits._util.files import writing

from ..artifact import Artifact
from ..devices._common import cpu_name
from ..records import Latency, Verification
from .plots import Point, plot

TOLERANCE = 0.01  # of top-1: a file this close to the most accurate one is as good as it
FORMATS = {"litert": "LiteRT", "coreml": "Core ML", "keras": "Keras"}
SIGNS = {"litert": "●", "coreml": "■", "keras": "▲"}  # in the plots
PHONES = {"litert": "Android", "coreml": "iPhone"}  # what a format is for
PACKAGES = "keras-vits keras numpy jax tensorflow torch ai-edge-litert ai-edge-quantizer coremltools".split()


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


def report(rows, path, *, title=None, environment=None):
    """Writes a report: one HTML page, and a JSON and a Markdown file of the same name beside it.

    Args:
        rows: list of `Row`, in the order of the table. They may belong to several models.
        path: of the page, e.g. `"out/report.html"`.
        title: of the page; made of the models' names by default.
        environment: name -> value, what the numbers were made with; `host_environment()` by default.

    Returns:
        A `Report`, the three paths.

    Raises:
        ValueError: no rows; a latency of an artifact that was not verified; a verification or latency of another file;
            a path that does not end in `.html` or cannot be written.
    """
    rows, path = list(rows), pathlib.Path(path)
    if path.suffix != ".html":
        raise ValueError(f"The path of a report ends in .html; received {path}.")
    _check(rows)
    title = title or f"Which file to ship: {', '.join(_models(rows))}"
    facts = {str(k): str(v) for k, v in (host_environment() if environment is None else environment).items()}
    data = _data(rows, path.parent, facts)
    written = Report(html=path, json=path.with_suffix(".json"), markdown=path.with_suffix(".md"))
    contents = {
        written.html: _page(rows, path.parent, title, facts),
        written.json: json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        written.markdown: _markdown(rows, title),
    }
    for file, content in contents.items():
        with writing(file) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return written


def host_environment():
    """What numbers are made with here, as name -> value: processor, system, Python, and the packages that matter."""
    facts = {"cpu": cpu_name(), "cores": os.cpu_count(), "os": platform.platform(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


# ---------------------------------------------------------------- what the rows say


def _check(rows):
    if not rows:
        raise ValueError("A report needs at least one row.")
    for row in rows:
        name, check, speed = row.artifact.path.name, row.verification, row.latency
        if speed is not None and check is None:
            raise ValueError(
                f"{name} has a latency but was not verified: call edge.verify first. A wrong answer is never fast."
            )
        if check is not None and check.artifact.sha256 != row.artifact.sha256:
            raise ValueError(f"The verification beside {name} is of another file, {check.artifact.path.name}.")
        if speed is not None and speed.artifact_path.absolute() != row.artifact.path.absolute():
            raise ValueError(f"The latency beside {name} is of another file, {speed.artifact_path.name}.")


def _models(rows):
    return list(dict.fromkeys(row.artifact.model for row in rows))


def _measure(rows):
    """What accuracy means in this report, as (field of Verification, name): agreement where labels are not known."""
    known = all(row.verification.top1 is not None for row in rows if row.verification)
    return ("top1", "top-1") if known else ("top1_agreement", "top-1 agreement")


def _accuracy(rows, row):
    return getattr(row.verification, _measure(rows)[0])


def _best(rows):
    """The most accurate row; the first one where nothing was verified."""
    verified = [row for row in rows if row.verification]
    return max(verified, key=lambda row: _accuracy(rows, row)) if verified else rows[0]


def recommend(rows, format):
    """The row to ship among those of a format, and why: the fastest as accurate as any, else the most accurate.

    Args:
        rows: list of `Row`.
        format: `"litert"` or `"coreml"`.

    Returns:
        (row, reason), or `None` where no file of the format was verified.
    """
    files = [row for row in rows if row.artifact.format == format and row.verification]
    if not files:
        return None
    name = _measure(rows)[1]
    good = [row for row in files if _lost(rows, row) <= TOLERANCE + 1e-9]
    if not good:
        row = min(files, key=lambda row: _lost(rows, row))
        return row, f"the most accurate one, {_lost(rows, row) * 100:.1f} points below the best {name}"
    timed = all(row.latency for row in good)
    row = min(good, key=lambda row: row.latency.median_ms if timed else row.artifact.size_bytes)
    count = f"of the {len(good)} {FORMATS[format]} files" if len(good) > 1 else f"{FORMATS[format]} file"
    which = ("the fastest" if timed else "the smallest") if len(good) > 1 else "the only"
    best = _accuracy(rows, row) + _lost(rows, row)
    return row, f"{which} {count} within {TOLERANCE * 100:.0f} point of the best {name}, {_percent(best)}"


def _lost(rows, row):
    """Accuracy below the best of the files that were checked on as many images."""
    peers = [r for r in rows if r.verification and r.verification.images == row.verification.images]
    return max(_accuracy(rows, peer) for peer in peers) - _accuracy(rows, row)


def _data(rows, folder, facts):
    best = _best(rows).artifact
    return {
        "model": best.model,
        "backend": best.tools.get("backend"),
        "rows": [_fields(row, folder) for row in rows],
        "environment": facts,
    }


def _fields(row, folder):
    """A row of report.json; what is not known, or not a finite number, is null."""
    artifact, check, speed = row.artifact, row.verification, row.latency
    fields = {
        "artifact": _relative(artifact.path, folder),
        "model": artifact.model,
        "format": artifact.format,
        "recipe": artifact.recipe,
        "size_bytes": artifact.size_bytes,
    }
    for key in (
        "images",
        "top1",
        "reference_top1",
        "top1_agreement",
        "sqnr_db",
        "max_abs_error",
        "partitions",
        "operations",
        "gpu_offenders",
        "verified_by",
    ):
        fields[key] = getattr(check, key, None)
    for key in ("median_ms", "p90_ms", "p99_ms", "load_ms", "peak_memory_bytes", "runs", "threads", "runtime"):
        fields[f"latency_{key}" if key.startswith(("median", "p9")) else key] = getattr(speed, key, None)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def _relative(path, folder):
    return pathlib.Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()


# ---------------------------------------------------------------- numbers as text

NONE = "–"


def _significant(value, digits=3):
    """2.7182 -> "2.72", 1234.5 -> "1234"."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def _percent(fraction):
    return f"{fraction * 100:.1f} %"


def _megabytes(size_bytes):
    return f"{_significant(size_bytes / 1e6)} MB"


def _ms(milliseconds):
    return f"{_significant(milliseconds)} ms"


def _top1(row):
    check = row.verification
    if check.top1 is None:
        return NONE
    if check.reference_top1 is None:
        return _percent(check.top1)
    points = round((check.top1 - check.reference_top1) * 100, 1)
    return f"{_percent(check.top1)} ({points:+.1f})".replace("-", "−") if points else f"{_percent(check.top1)} (±0)"


def _sqnr(row):
    sqnr = row.verification.sqnr_db
    return "exact" if sqnr == math.inf else f"{sqnr:.1f} dB"


def _partitions(row):
    count = row.verification.partitions
    return NONE if count is None else str(count)


COLUMNS = {  # heading -> (the part of a row that it is read from, its text)
    "Size": ("artifact", lambda row: _megabytes(row.artifact.size_bytes)),
    "Top-1": ("verification", _top1),
    "Agreement": ("verification", lambda row: _percent(row.verification.top1_agreement)),
    "SQNR": ("verification", _sqnr),
    "Median": ("latency", lambda row: _ms(row.latency.median_ms)),
    "p90": ("latency", lambda row: _ms(row.latency.p90_ms)),
    "Load": ("latency", lambda row: _ms(row.latency.load_ms)),
    "Memory": ("latency", lambda row: _megabytes(row.latency.peak_memory_bytes)),
    "Parts": ("verification", _partitions),
}
MEANINGS = {
    "Format": "LiteRT runs on Android and small boards, Core ML on iPhone, iPad and Mac; Keras is the model itself.",
    "Recipe": "How the numbers are stored: float32 as trained, float16 in half the space, int8 and int4 in 8 and 4 "
    "bits. Their ranges were found beforehand on sample images (static) or are found while it runs (dynamic).",
    "Size": "On disk, and about what the app grows by; 1 MB is 1,000,000 bytes.",
    "Top-1": "Share of the images whose class the file gets right; in brackets the difference to the model it was "
    "made from, in percentage points.",
    "Agreement": "Share of the images on which the file and its model give the same class, right or wrong.",
    "SQNR": "How much stronger the outputs are than what the conversion changed in them: at 20 dB the change is a "
    "tenth of them, at 40 dB a hundredth; exact means that nothing changed.",
    "Median": "Time of one run, from the image in memory to the answer; half of the runs are faster.",
    "p90": "Nine of ten runs are faster.",
    "Load": "From the file to a model that is ready for its first image, once for each start of the app.",
    "Memory": "Largest memory of a process that does nothing but run this file, Python and the runtime included.",
    "Parts": "Pieces of the graph that LiteRT hands to its fast kernels (XNNPACK). 1 is best: all of it runs there.",
}


def _checked_by(row):
    return row.verification.verified_by if row.verification else "not verified"


def _columns(rows):
    """Heading -> one text for each row; without the columns that no row has anything in."""
    columns = {}
    for heading, (part, text) in COLUMNS.items():
        cells = [NONE if getattr(row, part) is None else text(row) for row in rows]
        if set(cells) != {NONE}:
            columns[heading] = cells
    return {**columns, "Checked by": [_checked_by(row) for row in rows]}


def _how(rows):
    """Sentences that tell how the numbers came about."""
    verified, timed = [r for r in rows if r.verification], [r.latency for r in rows if r.latency]
    core_ml = [r.verification.verified_by for r in verified if r.artifact.format == "coreml"]
    said = []
    if verified:
        pairs = dict.fromkeys((FORMATS[r.artifact.format], r.verification.images) for r in verified)
        counts = ", ".join(f"{format} on {images} images" for format, images in pairs)
        said.append(f"Accuracy: every file was compared with the model it was made from ({counts}).")
    if timed:
        cpus = ", ".join(sorted({speed.cpu for speed in timed}))
        threads = " or ".join(map(str, sorted({speed.threads for speed in timed if speed.threads})))
        with_threads = f" with {threads} thread{'s' * (threads != '1')}" if threads else ""
        said.append(
            f"Latency: measured on {cpus}{with_threads}, after a warm-up, at least "
            f"{min(speed.runs for speed in timed)} times each. Every file ran in a process of its own, in turns with "
            "the others, so that a busy moment of the machine hits all of them alike. A phone has other times."
        )
    if any("reference evaluator" in by for by in core_ml):
        said.append(
            "Core ML: only Apple's systems can run it, and this was not one. Each package was read back from its own "
            "bytes and checked against a reference evaluator, with its float16 rounding and its compressed weights: "
            "its accuracy is known, its speed is not."
        )
    elif core_ml:
        said.append("Core ML: each package was run by Core ML itself on a Mac.")
    if missing := [row.artifact.path.name for row in rows if not row.verification]:
        said.append(f"Not verified, so nothing is claimed of them: {', '.join(missing)}.")
    return said


# ---------------------------------------------------------------- Markdown


def _markdown(rows, title):
    def line(cells):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = [f"# {title}", ""]
    for format, phone in PHONES.items():
        if found := recommend(rows, format):
            lines += [f"**{phone}: `{found[0].artifact.path.name}`**, {found[1]}.", ""]
    columns = {
        "File": [f"`{row.artifact.path.name}`" for row in rows],
        "Format": [FORMATS[row.artifact.format] for row in rows],
        "Recipe": [row.artifact.recipe for row in rows],
        **_columns(rows),
    }
    lines += [line(columns), line(["---"] * len(columns)), *map(line, zip(*columns.values(), strict=True))]
    return "\n".join([*lines, "", *(f"- {said}" for said in _how(rows)), ""])


# ---------------------------------------------------------------- HTML


def _page(rows, folder, title, facts):
    found = {format: recommend(rows, format) for format in PHONES}
    chosen, columns = [answer[0] for answer in found.values() if answer], _columns(rows)
    cards = "".join(_card(rows, folder, PHONES[format], *answer) for format, answer in found.items() if answer)
    how = "".join(f"<p>{escape(said)}</p>" for said in _how(rows))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<div class="cards">{cards}</div>
{_plots(rows, chosen)}
<h2>All files</h2>
<div class="scroll"><table>{_table(rows, folder, chosen)}</table></div>
<h2>How this was measured</h2>
{how}
<h2>What the columns mean</h2>
{_definitions({k: v for k, v in MEANINGS.items() if k not in COLUMNS or k in columns})}
<h2>Made with</h2>
{_definitions(facts)}
</body>
</html>
"""


def _card(rows, folder, phone, row, reason):
    numbers = [f"{_percent(_accuracy(rows, row))} {_measure(rows)[1]}", _megabytes(row.artifact.size_bytes)]
    numbers += [_ms(row.latency.median_ms)] if row.latency else []
    return (
        f'<section><h2>{phone}</h2><p class="file">{_link(row, folder)}</p><p>{escape(" · ".join(numbers))}</p>'
        f"<p>{escape(reason[0].upper() + reason[1:])}.</p></section>"
    )


def _link(row, folder):
    path, name = row.artifact.path, escape(row.artifact.path.name)
    return name if path.is_dir() else f'<a href="{escape(urllib.parse.quote(_relative(path, folder)))}">{name}</a>'


def _plots(rows, chosen):
    """The legend and the plots; nothing of a plot that would have no points."""
    models, accuracy = _models(rows), _measure(rows)[1].capitalize()
    axes = {
        "latency": ("Latency of one run in ms, median", lambda row: row.latency and row.latency.median_ms),
        "size": ("Size of the file in MB", lambda row: row.artifact.size_bytes / 1e6),
    }
    figures = []
    for what, (label, x) in axes.items():
        points = [
            Point(
                x=x(row),
                y=_accuracy(rows, row) * 100,
                label=row.artifact.recipe,
                marker=row.artifact.format,
                series=models.index(row.artifact.model) if len(models) > 1 else None,
                chosen=row in chosen,
            )
            for row in rows
            if row.verification and x(row)
        ]
        if points:
            drawing = plot(points, f"{label} (left is better)", f"{accuracy} in % (up is better)")
            figures.append(f"<figure><figcaption>{accuracy} against {what}</figcaption>{drawing}</figure>")
    if not figures:
        return ""
    formats = dict.fromkeys(row.artifact.format for row in rows if row.verification)
    legend = [_model(models, model, "span") for model in models] if len(models) > 1 else []
    legend += [f"<span>{SIGNS[format]} {FORMATS[format]}</span>" for format in formats]
    return f'<p class="legend">{"".join(legend)}</p><div class="plots">{"".join(figures)}</div>'


def _model(models, model, tag, attributes=""):
    return f'<{tag} style="color: var(--series{models.index(model) % 4})"{attributes}>{escape(model)}</{tag}>'


def _table(rows, folder, chosen):
    columns, models = _columns(rows), _models(rows)
    lines = [f"<thead><tr><th>File</th>{''.join(f'<th>{escape(heading)}</th>' for heading in columns)}</tr></thead>"]
    for model in models:
        lines.append("<tbody>")
        if len(models) > 1:
            lines.append(f"<tr>{_model(models, model, 'th', f' colspan={len(columns) + 1}')}</tr>")
        for row, *cells in zip(rows, *columns.values(), strict=True):
            if row.artifact.model == model:
                name = f"<b>{FORMATS[row.artifact.format]} {escape(row.artifact.recipe)}</b>"
                badge = f"<mark>{PHONES[row.artifact.format]}</mark>" if row in chosen else ""
                cells = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
                lines.append(
                    f"<tr{' class=ship' * bool(badge)}><td>{name}{badge}<br>{_link(row, folder)}</td>{cells}</tr>"
                )
        lines.append("</tbody>")
    return "\n".join(lines)


def _definitions(texts):
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in texts.items())}</dl>"


STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d8dee4; --ship: #e5f3ea; --mark: #14692f;
  --series0: #0063a3; --series1: #b34700; --series2: #6b3fa0; --series3: #00695c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --ink: #e8ebee; --soft: #9aa4af; --line: #343b43; --ship: #173021; --mark: #6fd08c;
    --series0: #66b8f0; --series1: #f59b52; --series2: #c0a0f0; --series3: #5cc9b7;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
h1 { margin: 0 0 1.25rem; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .6rem; font-size: 1.1rem; }
p { margin: .4rem 0; max-width: 48rem; }
a { color: inherit; text-decoration-color: var(--soft); }
.cards, .plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
.cards section { padding: 1rem 1.25rem; border-radius: .6rem; background: var(--ship); }
.cards h2 { margin: 0; font-size: .95rem; color: var(--mark); }
.cards .file { font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; }
.legend { margin: 1.5rem 0 0; max-width: none; font-size: .9rem; }
.legend span { margin-right: 1.1rem; white-space: nowrap; }
figure { margin: .75rem 0 0; }
figcaption { font-weight: 600; }
figure svg { display: block; width: 100%; height: auto; }
figure text { font-family: inherit !important; paint-order: stroke; stroke: var(--paper); stroke-width: 2.5px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { color: var(--soft); }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
tbody th { padding-top: 1rem; }
td a, td:first-child { color: var(--soft); }
td b { color: var(--ink); }
td:last-child { white-space: normal; min-width: 9rem; }
.ship td { background: var(--ship); }
mark {
  margin-left: .5rem; padding: .05rem .5rem; border-radius: 1rem; background: var(--mark); color: var(--paper);
  font-size: .75rem; font-weight: 600;
}
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.25rem; margin: 0; font-size: .92rem; }
dt { font-weight: 600; }
dd { margin: 0; max-width: 46rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
"""
