"""The demo on every backend: the files of one run, and the accuracies of all."""

import json

import recording

from .tables import table

COLUMNS = {
    "model": lambda row: row["model"],
    "file": lambda row: f"{row['format']} {row['recipe']}",
    "size": lambda row: f"{row['size_bytes'] / 1e6:.2f} MB",
    "top-1": lambda row: f"{row['top1']:.1%}",
    "agreement": lambda row: f"{row['top1_agreement']:.1%}",
    "SQNR": lambda row: "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.0f} dB",
    "median": lambda row: "" if row["latency_median_ms"] is None else f"{row['latency_median_ms']:.2f} ms",
    "partitions": lambda row: "" if row["partitions"] is None else str(row["partitions"]),
    "verified by": lambda row: row["verified_by"],
}
SHOWN = ("float32", "float16", "dynamic_int8", "static_int8")


def read():
    """The recorded runs, one of each backend."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(recording.RESULTS.glob("demo_*.json"))]


def section(records):
    if not records:
        return []
    said = "Written by `keras-vits demo`, which trains, exports, quantizes, verifies and measures in one run."
    return ["## On real images", "", said, "", *block(records), ""]


def figures(records):
    return {}


def block(records):
    """The first run's table, and the accuracies of all runs."""
    record = records[0]
    facts = record["environment"]
    return [
        f"{facts['cpu']}, {facts['cores']} cores, {record['backend']} backend; 500 held-out digits.",
        "",
        *table(list(COLUMNS), [[cell(row) for cell in COLUMNS.values()] for row in record["rows"]], len(COLUMNS)),
        "",
        "The same job on every backend, top-1 of the LiteRT files:",
        "",
        *table(["trained on", "model", *(f"litert {r}" for r in SHOWN)], accuracies(records), 2 + len(SHOWN)),
    ]


def accuracies(records):
    """Top-1 of every LiteRT file: a row for each backend and model."""
    found = {}
    for record in records:
        for row in record["rows"]:
            if row["format"] == "litert":
                found.setdefault((record["backend"], row["model"]), {})[row["recipe"]] = f"{row['top1']:.1%}"
    return [[*key, *(by_recipe[recipe] for recipe in SHOWN)] for key, by_recipe in found.items()]
