"""Writes RESULTS.md from the recorded runs, a section of each benchmark; no figure there is typed.

python benchmarks/results.py
"""

import pathlib

import linear_attention
import litert_graph
import quantization
import training_speed

RESULTS = pathlib.Path(__file__).with_name("RESULTS.md")
HEAD = ["# Results", "", "Written by `benchmarks/results.py` from `results/*.json`; do not edit.", ""]


def text():
    lines = [
        *HEAD,
        *litert_graph.section(),
        *quantization.section(),
        *linear_attention.section(),
        *training_speed.section(),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def write():
    RESULTS.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    write()
