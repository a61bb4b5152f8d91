"""What benchmarks/publish.py writes: true of the rows, and what is committed is what it writes today.

Pages are compared by their text, which holds every table, heading, list and every label and number of a figure; how
matplotlib draws a line is not compared.
"""

import ast
import graphlib
import html.parser
import itertools
import json
import pathlib
import re

import numpy as np
import publish
import pytest
import recording
import suite
import train
from rendering import gpu, page, peers, plots, training

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.once


class _Text(html.parser.HTMLParser):
    """The texts of a page in their order, each with the element that it is in."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.open += [tag] * (tag not in self.VOID)

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        if data.strip() and "style" not in self.open:
            self.found.append((self.open[-1], " ".join(data.split())))


def texts(page, *tags):
    """The texts of a page, those of some elements alone."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    return [text for tag, text in parser.found if not tags or tag in tags]


def cells(page):
    """The texts of the tables' cells, with the empty ones."""
    found = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", page)
    return [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in found]


def markdown_cells(text):
    """The cells of every Markdown table, row by row."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return [cell.strip().replace("\\|", "|") for line in lines for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


# ---------------------------------------------------------------- what is committed


@pytest.fixture(scope="module")
def committed():
    return publish.PAGE.read_text(encoding="utf-8")


def test_results_are_the_recorded_runs():
    text, expected = publish.MARKDOWN.read_text(encoding="utf-8"), publish.results_markdown()
    assert markdown_cells(text) == markdown_cells(expected)
    assert [line for line in text.splitlines() if line] == [line for line in expected.splitlines() if line]


def test_files_are_no_slower_than_keras_own_export():
    """In turns, in ten processes of each file: python benchmarks/litert_graph.py, on the TensorFlow backend."""
    record = json.loads(
        (pathlib.Path(recording.__file__).parent / "results" / "litert_graph.json").read_text(encoding="utf-8")
    )
    theirs = {row["model"]: row["ratio_to_ours"] for row in record["rows"] if row["choice"] == "keras_export"}
    assert len(theirs) == 4 and min(theirs.values()) >= 1 / 1.02


def test_page_is_of_the_recorded_runs(committed):
    assert texts(committed) == texts(publish.results_page())


def test_every_recorded_row_is_on_the_page(committed):
    """The figure that each row is about stands in a table, and the whole row among the rows as they are."""
    found = set(cells(committed))
    for row in peers.read():
        if not row["error"]:
            assert {f"{row['median_ms']:.2f}", page.value(row["gflops"])} <= found
    for row in training.read():
        if row["part"] == "speed" and not row["error"]:
            assert f"{row['images_per_second']:.1f}" in found
    for path in recording.RESULTS.glob("*.jsonl"):
        assert f"{path.name}, {len(recording.read(path))} rows" in texts(committed, "summary")


def test_page_is_whole(committed):
    """It has a title, links to all its sections, and needs nothing from outside; no internal target opens it."""
    links = re.findall(r'<a href="#([^"]+)"', committed)
    assert len(links) >= 6 and all(committed.count(f'id="{link}"') == 1 for link in links)
    assert not re.search(r'(src|href)="(https?:)?//|url\((?!#)', committed)
    assert not [text for text in texts(committed) if re.search(r"\b(met|missed)\b", text)]


def test_nobody_imports_in_a_circle():
    """A script that records imports no module that renders."""
    files = {path.relative_to(BENCHMARKS).with_suffix(""): path for path in BENCHMARKS.rglob("*.py")}
    names = {".".join(path.parts): file for path, file in files.items() if "wheels" not in path.parts}
    graph = {}
    for name, file in names.items():
        inside = name.startswith("rendering.")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(filter(None, ["rendering" if node.level and inside else "", node.module]))
                found = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            else:
                continue
            graph.setdefault(name, set()).update(other for other in found if other in names)
    assert "recording" in graph["run"] and "rendering.peers" in graph["publish"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    for name, others in graph.items():
        assert name == "publish" or name.startswith("rendering") or not [o for o in others if "rendering" in o]


# ---------------------------------------------------------------- tables and figures of rows made here


def made_rows():
    """Rows of every part, each figure of them different, on a CPU and on a GPU."""
    tick = itertools.count(1)
    found = []

    def add(part, model, runner, mode="infer", batch=8, tokens=196, devices=1, gpu=False, **more):
        n = next(tick)
        figures = dict(median_ms=1000 / n, images_per_second=batch * n, first_step_s=n / 7, peak_memory_bytes=n * 10**7)
        figures |= dict(ratio=n / 20, ratio_q1=n / 25, ratio_q3=n / 15)
        figures |= dict(flops_per_second=n * 1e9, gemm_flops_per_second=2e11)
        place = (
            dict(device="NVIDIA Some GPU", dtype="bfloat16") if gpu else dict(device="A CPU, 2 cores", dtype="float32")
        )
        made = dict(
            benchmark="train", threads=2, date="2030-01-02", commit="abc1234", command="python benchmarks/train.py"
        )
        row = dict(part=part, model=model, runner=runner, mode=mode, batch=batch, tokens=tokens, devices=devices)
        versions = dict(backend="jax", runtime="jax", runtime_version="1.2", library="keras", library_version="3.4")
        found.append(dict.fromkeys(train.FIELDS) | made | place | versions | row | figures | more)

    for where, runner, mode in itertools.product((False, True), train.RUNNERS, train.MODES):
        add("speed", "vit_tiny_patch16_224", runner, mode, gpu=where)
    nothing = dict.fromkeys(("median_ms", "images_per_second", "ratio", "flops_per_second"))
    found[2] |= nothing | dict(error="not enough | memory")
    for runner, tokens in itertools.product(
        ("softmax", "kernel", "favor", "efficient", "separable"), (256, 1024, 4096)
    ):
        add("tokens", train.ATTENTION, runner, tokens=tokens, exponent=1.23)
    for runner, tokens in itertools.product(("timm", "keras_vits, JAX"), (196, 784)):
        add("tokens", "vit_tiny_patch16_224", runner, tokens=tokens, batch=1)
    for runner, mode, batch in itertools.product(("timm", "keras_vits, JAX"), train.MODES, (1, 8, 64)):
        add("batch", "vit_tiny_patch16_224", runner, mode, batch)
    for mode, devices in itertools.product(train.MODES, (1, 2, 4)):
        add("devices", "vit_tiny_patch16_224", train.SHARED, mode, devices=devices)
    return found


def made_peers():
    """Rows of every contestant with every model, as run.py records them; one of them failed."""
    tick, found = itertools.count(1), []
    for model, threads, (name, contestant) in itertools.product(suite.MODELS[:2], (1, 2), suite.CONTESTANTS.items()):
        n = next(tick)
        figures = dict(median_ms=n, p90_ms=n + 1, ratio=0.2 + n / 20, ratio_q1=0.18 + n / 22, ratio_q3=0.25 + n / 19)
        figures |= dict(peak_memory_bytes=n * 10**6, size_bytes=n * 10**5, load_ms=n, sqnr_db=40.0, gflops=9.0 + n)
        figures |= dict(baseline_memory_bytes=n * 10**5, cores_used=1.5)
        row = dict(benchmark="peers", model=model, contestant=name, runtime="r", runtime_version="1", threads=threads)
        row |= dict(recipe=contestant.recipe, device="A CPU", date="2030-01-02", commit="abc1234", command="run.py")
        found.append({**row, **figures, "error": None})
        if name == "litert_torch":
            found[-1] |= dict.fromkeys(figures) | {"error": "its process ended with code 1: <b> is not known"}
    return found


def test_tables_are_the_rows():
    """Every row is found in the Markdown as it was made, and all of the Markdown's cells in the HTML."""
    rows = made_rows()
    markdown = training.section(rows)
    text = "\n".join(markdown)
    assert [line for line in markdown if line.startswith("### ")] == [
        "### Speed of vit_tiny_patch16_224",
        "### Speed of vit_tiny_patch16_224, NVIDIA Some GPU",
        "### Tokens: attention",
        "### Tokens: vit_tiny_patch16_224",
        "### Batch size: vit_tiny_patch16_224",
        "### Devices: vit_tiny_patch16_224",
    ]
    assert text.count("Recorded on 2030-01-02 at commit abc1234 by `python benchmarks/train.py`: ") == 6
    assert "NVIDIA Some GPU, 2 threads; bfloat16; batch 8; keras 3.4, jax 1.2." in text
    assert "| timm | 16.0 | 0.10 (0.08 to 0.13) | 8.0 | 0.05 (0.04 to 0.07) | 20 | 10 | 0.3 | 2.0 | 1% |" in markdown
    assert "| timm, torch.compile | 32.0 | 0.20 (0.16 to 0.27) |  |  | 40 | 30 | 0.6 | 4.0 | 2% |" in markdown
    assert "- timm, torch.compile, infer, failed: not enough | memory" in markdown
    assert any(re.fullmatch(r"\| softmax (\| [\d.]+ ){3}\| 1.23 \|", line) for line in markdown)
    tokens = [row for row in rows if row["part"] == "tokens" and row["runner"] == "timm"]
    ms = [1e3 / row["images_per_second"] for row in tokens]
    p = np.log(ms[1] / ms[0]) / np.log(4)
    assert f"| timm | {ms[0]:.2f} | {ms[1]:.2f} | {p:.2f} |" in markdown
    one = next(row for row in rows if row["part"] == "batch" and row["batch"] == 64)
    assert f" {one['images_per_second']:.1f} / {one['peak_memory_bytes'] / 1e6:.0f} |" in text
    shared = next(row for row in rows if row["devices"] == 4)
    assert f"| 4 | infer | {shared['images_per_second']:.1f} | {shared['ratio']:.2f} (" in text
    assert cells(page.html(markdown)) == markdown_cells(text)


def test_a_cpu_is_told_only_where_there_is_no_gpu():
    rows = made_rows()
    assert "of a CPU" not in "\n".join(training.section(rows))
    assert "of a CPU" in "\n".join(training.section([row for row in rows if not training.on_gpu(row)]))


def test_plots_of_training():
    rows = made_rows()
    drawn = page.html(training.section(rows), training.figures(rows))
    captions = [html.unescape(re.sub("<.*?>", "", c)) for c in re.findall("<figcaption>(.*?)</figcaption>", drawn)]
    assert captions == [
        "Arithmetic rate in GFLOP/s A CPU, 2 cores",
        "Arithmetic rate in GFLOP/s NVIDIA Some GPU",
        *["Training speed / timm's, right is faster", "Inference speed / timm's, right is faster"] * 2,
        "Time against tokens ms for one sample",
        "Time against tokens ms for one image",
        *["Training images per second", "Inference images per second"] * 2,
    ]
    figures = [figure.split("</figure>")[0] for figure in drawn.split("<figure>")[1:]]
    assert texts(drawn, "text").count("one matrix product") == 2
    assert [len(set(train.RUNNERS) & set(texts(figures[i], "text"))) for i in (6, 7, 8, 9, 10)] == [0, 2, 2, 2, 1]
    assert {"softmax", "kernel", "favor", "efficient", "separable", "4,096"} <= set(texts(figures[6], "text"))
    ratios = [f"{r['ratio']:.2f}" for r in rows if r["part"] == "speed" and r["mode"] == "train"][: len(train.RUNNERS)]
    shown = [text for text in texts(figures[2], "text") if re.fullmatch(r"\d\.\d\d", text)]
    assert shown[-len(ratios) :] == ratios  # before them are numbers of the axis


def test_plots_of_peers():
    """For every model a bar for each contestant, the fastest first, of two threads; who failed is last, with why."""
    rows = made_peers()
    drawn = page.html(peers.section(rows), peers.figures(rows))
    models, contestants = suite.MODELS[:2], suite.CONTESTANTS
    figures = [figure.split("</figure>")[0] for figure in drawn.split("<figure>")[1:]]
    assert len(figures) == 3 and set(models) <= set(texts(figures[0], "text"))
    assert "one matrix product, int8" in texts(figures[0], "text")
    for model, figure in zip(models, figures[1:], strict=True):
        these = [row for row in rows if (row["model"], row["threads"]) == (model, 2)]
        these = [row for row in these if contestants[row["contestant"]].role != "gemm"]
        said = texts(figure, "text")
        for row in these:
            assert contestants[row["contestant"]].label[:30] in " ".join(said)
            assert row["error"] or f"{row['ratio']:.2f}" in said
        order = [float(text) for text in said if re.fullmatch(r"\d+\.\d\d", text)]
        assert order == sorted(order) and len(order) == len(these) - 1
        assert "failed: its process ended with code 1: <b> is not known" in " ".join(said)
        assert figure.count("var(--series0)") == 3


def test_a_figure_is_the_same_every_time_and_nothing_of_it_lies_outside():
    bars = [plots.Bar(label="a very long label " * 6, ratio=0.5, low=0.4, high=0.7), plots.Bar(label="b", error="no")]
    drawn = plots.bars(bars, "two bars")
    assert drawn == plots.bars(bars, "two bars")
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', drawn).groups())
    assert width == plots.WIDTH
    places = re.findall(r'<text[^>]* (?:x="([\d.]+)" y="([\d.]+)"|transform="translate\(([\d.]+) ([\d.]+)\))', drawn)
    assert len(places) >= 5
    assert all(0 <= float(a or c) <= width and 0 <= float(b or d) <= height for a, b, c, d in places)


# ---------------------------------------------------------------- a GPU


def gpu_row(part, **more):
    made = dict(device="GPU X", dtype="bfloat16", date="2030-01-02", commit="abc", command="bash benchmarks/gpu.sh")
    made |= dict(runtime="jax", runtime_version="1.2", backend="jax", library="keras", mode="train", threads=8)
    made |= dict.fromkeys(("model", "runner", "tokens", "ratio", "error", "images_per_second", "peak_memory_bytes"))
    made |= dict.fromkeys(("gemm_flops_per_second", "flops_per_second", "copy_bytes_per_second", "median_ms"))
    return made | {"part": part} | more


def test_a_gpu_has_a_section_where_it_is_recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "RECORD", tmp_path / "gpu.jsonl")
    assert gpu.section(gpu.read()) == []
    speed = dict(model="vit", runner="keras_vits, JAX", flops_per_second=1e14, gemm_flops_per_second=4e14)
    speed |= dict(ratio_q1=1.4, ratio_q3=1.6, peak_memory_bytes=3e9)
    errors = dict(model="vit", runner="parity, jax", mode="infer", relative_error=0.0042)
    rows = [
        gpu_row("device", runner="jax product", gemm_flops_per_second=8e14, copy_bytes_per_second=4e12),
        gpu_row("speed", **speed, images_per_second=100.0, ratio=0.1),
        gpu_row("speed", **speed, images_per_second=1234.0, ratio=1.5),  # measured again
        gpu_row("speed", **{**speed, "runner": "timm"}, tokens=196, error="left out: the time was over"),
        gpu_row("speed", **speed, error="it was not compiled in time"),  # another time, which is not the last word
        gpu_row("parity", **errors),
        gpu_row("tokens", model="attention", runner="attention", mode=None, error="left out: the time was over"),
        gpu_row("tokens", model="attention", runner="kernel", mode="infer", tokens=1024, images_per_second=2000.0),
    ]
    recording.write(gpu.RECORD, rows)
    found = gpu.read()
    text = "\n".join(gpu.section(found))
    assert "### GPU X" in text and "800 TFLOP/s in one large product and copies of 4,000 GB/s by jax" in text
    assert "| vit | keras_vits, JAX | 1,234 | 1.50 (1.40 to 1.60) | 25.0% | 3000 |  |  |  |  |" in text
    assert "| vit | 4.2e-03 |" in text and "| kernel | jax | 0.500 |" in text
    assert re.findall("^- .*", text, re.M) == [
        "- speed, vit, timm, train, N = 196, failed: left out: the time was over"
    ]
    captions = [caption for caption, _ in gpu.figures(found)["GPU X"]]
    assert captions == ["Training: speed / timm's, right is faster", "Attention alone: ms for one sample, jax"]
