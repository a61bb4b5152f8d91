"""Writes RESULTS.md, and RESULTS.html with plots, from the recorded runs, a section of each; no figure there is typed.

python benchmarks/results.py
"""

import pathlib

import litert_graph
import quantization
import run
import train

RESULTS = pathlib.Path(__file__).with_name("RESULTS.md")
HEAD = ["# Results", "", "Written by `benchmarks/results.py` from `results/`; do not edit.", ""]
SECTIONS = (run, litert_graph, quantization, train)  # modules with a `section()`, empty where nothing is recorded


def text():
    return "\n".join([*HEAD, *(line for module in SECTIONS for line in module.section())]).rstrip("\n") + "\n"


def write():
    import page

    RESULTS.write_text(text(), encoding="utf-8")
    page.write()


if __name__ == "__main__":
    write()
