"""Writes what is published of the recorded runs: RESULTS.md, RESULTS.html and two tables of the README.

    python benchmarks/publish.py

The scripts beside it record into results/ and stop; this reads what lies there, and no figure is typed. The README's
other tables, and everything else that is generated, are written by tools/generate.py, which calls this, too.
"""

import pathlib

import recording
from rendering import demo, gpu, litert_graph, page, peers, quantization, quantizers, training

from keras_vits._util.files import writing

HERE = pathlib.Path(__file__).resolve().parent
MARKDOWN, PAGE, README = HERE / "RESULTS.md", HERE / "RESULTS.html", HERE.parent / "README.md"
SECTIONS = (demo, peers, gpu, training, quantization, quantizers, litert_graph)
TITLE = "keras_vits: recorded benchmarks"
INTRO = (
    "Written by `benchmarks/publish.py` from `benchmarks/results/`. A figure holds for the machine, the day and the "
    "versions beside it: measure on yours."
)


def results_markdown():
    """The text of RESULTS.md."""
    lines = ["# Results", "", INTRO, ""]
    for module in SECTIONS:
        lines += module.section(module.read())
    return "\n".join(lines).rstrip("\n") + "\n"


def results_page():
    """The text of RESULTS.html: the same sections with figures, and every recorded row."""
    sections = [
        (module.section(recorded), module.figures(recorded)) for module in SECTIONS if (recorded := module.read())
    ]
    rows = ['<h2 id="every-row">Every row</h2>']
    for path in sorted(recording.RESULTS.glob("*.jsonl")):
        found = recording.read(path)
        rows.append(f"<details><summary>{path.name}, {len(found)} rows</summary>{page.rows_table(found)}</details>")
    return page.page(TITLE, page.html([INTRO]), sections, "\n".join(rows))


def blocks():
    """Name -> Markdown lines of the README's tables that are recorded."""
    return {"demo": demo.block(demo.read()), "peers": peers.block(peers.read())}


def with_blocks(text, blocks):
    """A text with what stands between the marks of every block written again.

    Args:
        text: of the README.
        blocks: name -> Markdown lines; `<!-- name -->` and `<!-- /name -->` are the marks.
    """
    for name, lines in blocks.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = text.split(begin)
        text = head + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1]
    return text


def write():
    readme = with_blocks(README.read_text(encoding="utf-8"), blocks())
    for path, text in {MARKDOWN: results_markdown(), PAGE: results_page(), README: readme}.items():
        with writing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
