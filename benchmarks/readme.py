"""Puts a recorded run of the demo into the README, between its two marks; no figure there is typed.

python benchmarks/readme.py out          takes over out/report.json as benchmarks/results/demo.json
python benchmarks/readme.py              writes the README's table again
"""

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
RECORD = HERE / "results" / "demo.json"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- demo -->\n", "<!-- /demo -->"
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


def table(record):
    rows = [[cell(row) for cell in COLUMNS.values()] for row in record["rows"]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [list(COLUMNS), ["---"] * len(COLUMNS), *rows])


def updated(readme, record):
    environment = record["environment"]
    head, rest = readme.split(BEGIN)
    where = f"{environment['cpu']}, {environment['cores']} cores, {record['backend']} backend; 500 held-out digits.\n\n"
    return head + BEGIN + where + table(record) + END + rest.split(END)[1]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        RECORD.write_text((pathlib.Path(sys.argv[1]) / "report.json").read_text(encoding="utf-8"), encoding="utf-8")
    text = updated(README.read_text(encoding="utf-8"), json.loads(RECORD.read_text(encoding="utf-8")))
    README.write_text(text, encoding="utf-8")
