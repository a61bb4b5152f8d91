"""What was tried on the LiteRT graph."""

import json

from litert_graph import CHOICES, PROCESSES, RECORD

from . import plots
from .tables import grouped, table


def read():
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else None


def section(record):
    if not record:
        return []
    facts = record["environment"]
    lines = [
        "## The LiteRT graph",
        "",
        f"Recorded on {record['date']} by `benchmarks/litert_graph.py`: {facts['cpu']}, {facts['cores']} cores, 2 "
        "threads, random weights. Each row changes one choice of the exported file; what was expected of it stood "
        f"before it was measured. Files of one model took turns, each in {PROCESSES} processes of its own, one after "
        "the other: compare ratios within a model.",
        "",
    ]
    header = ["choice", "predicted", "time / ours", "median ms", "operations", "partitions", "SQNR dB"]
    for (model,), rows in grouped(record["rows"], "model").items():
        lines += [f"### {model}", "", *table(header, map(cells, rows), 2), ""]
    return lines


def cells(row):
    return [
        *CHOICES[row["choice"]],
        f"{row['ratio_to_ours']:.3f}",
        f"{row['median_ms']:.2f}",
        str(row["operations"]),
        str(row["partitions"]),
        f"{row['sqnr_db']:.1f}",
    ]


def figures(record):
    found = []
    for (model,), rows in grouped(record["rows"], "model").items():
        caption = f"{model}: time / ours, left is faster"
        items = [
            plots.Bar(
                label=CHOICES[row["choice"]][0],
                **dict.fromkeys(("ratio", "low", "high"), row["ratio_to_ours"]),
                series=plots.PEER if row["choice"] == "keras_export" else plots.OURS,
            )
            for row in rows
        ]
        found.append((caption, plots.bars(items, caption)))
    return {None: found}
