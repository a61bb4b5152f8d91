"""Our preparation of quantized files beside ai-edge-quantizer's algorithms."""

import quantizers
import recording

from .tables import grouped, number, table

AEQ = "aeq "  # in front of the names of ai-edge-quantizer's algorithms


def read():
    return recording.read(quantizers.RECORD)


def section(rows):
    if not rows:
        return []
    ways = [*quantizers.OURS, *(AEQ + key for key in quantizers.THEIRS)]
    lines = []
    for (model, case), found in grouped(rows, "model", "case").items():
        known = {row["way"]: row for row in found}
        lines.append([model, case, *(cell(known.get(way), case) for way in ways)])
    dates = sorted({row["date"] for row in rows})
    one = rows[0]
    return [
        "## Beside ai-edge-quantizer",
        "",
        f"Recorded from {dates[0]} to {dates[-1]} by `benchmarks/quantizers.py`, with ai-edge-quantizer "
        f"{one['ai_edge_quantizer']}. SQNR of the logits in dB on {one['test']} images, of files with the same layers "
        f"in the same bits and the same {one['calibration']} calibration images: three models with random weights, "
        "calibrated on crops of one photograph and measured on crops of another, and a ViT trained on handwritten "
        "digits. The numbers of a static row in brackets are of files whose dense layers are dynamically quantized all "
        "the same: compare them with the dynamic rows.",
        "",
        *table(["model", "bits", *(way.removeprefix(AEQ).lower().replace("_", " ") for way in ways)], lines, 2),
        "",
    ]


def cell(row, case):
    if row is None or row.get("sqnr_db") is None:
        return "failed" if row else ""
    text = number(row["sqnr_db"], ".1f")
    return f"({text})" if "static" in case and not row["static_dense"] else text


def figures(rows):
    return {}
