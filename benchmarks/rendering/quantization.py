"""What each step of the quantization brings."""

import json
import statistics

from quantization import CALIBRATION, MODELS, RECORD, SEEDS, STEPS, TEST

from .tables import table


def read():
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else None


def section(record):
    if not record:
        return []
    rows = []
    for recipe, steps in STEPS.items():
        for what in steps:
            cells = []
            for name in MODELS:
                key = (recipe, what, name)
                found = [r for r in record["rows"] if (r["recipe"], r["steps"], r["model"]) == key]
                means = (statistics.mean(r[k] for r in found) for k in ("sqnr_db", "centred_db"))
                cells.append(" / ".join(f"{mean:.1f}" for mean in means))
            rows.append([recipe, what, *cells])
    partitions = max(row["partitions"] for row in record["rows"])
    return [
        "## Quantization",
        "",
        f"Recorded on {record['date']} by `benchmarks/quantization.py`. SQNR of the logits in dB, and after the "
        "slash that of their differences from their mean over the images, which distinguishes images; the mean "
        f"of {len(SEEDS)} models with random weights, calibrated on {CALIBRATION} crops of a photograph and measured "
        f"on {TEST} of another. XNNPACK partitions of a file: {partitions} at most. "
        "Random weights have no outlier channels, which smoothing is for: `tests/edge/test_quantization.py` plants "
        "them.",
        "",
        *table(["recipe", "steps", *MODELS], rows, 2),
        "",
    ]


def figures(record):
    return {}
