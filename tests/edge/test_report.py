"""report publishes what was measured, nothing else, in three files that need nothing around them."""

import dataclasses
import html.parser
import itertools
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from measured import latency

from keras_vits.edge import artifact as artifacts
from keras_vits.edge.evidence.plots import Point, plot
from keras_vits.edge.evidence.report import Row, host_environment, recommend, report
from keras_vits.edge.records import Verification
from keras_vits.specs import InputSpec, OutputSpec

pytestmark = pytest.mark.once

EXTENSIONS = {"litert": ".tflite", "coreml": ".mlpackage", "keras": ".keras"}
EVALUATOR = "checked against a reference evaluator"


def make_row(folder, model, format, recipe, *, size, top1=None, agreement=1.0, sqnr_db=40.0, median_ms=None):
    """A row with a file of `size` bytes; it has a latency if `median_ms` is given."""
    path = folder / f"{model}_{recipe}{EXTENSIONS[format]}"
    if format == "coreml":
        path.mkdir(parents=True)
        (path / "weights").write_bytes(bytes(size))
    else:
        path.write_bytes(bytes(size))
    spec = InputSpec(name="image", shape=(1, 8, 8, 3))
    artifact = artifacts.make(
        path,
        format=format,
        recipe=recipe,
        model=model,
        inputs=(spec,),
        outputs=(OutputSpec(name="logits", kind="logits"),),
        tools={"backend": "jax"},
    )
    check = Verification(
        artifact=artifact,
        images=500,
        top1=top1,
        reference_top1=None if top1 is None else 0.98,
        top1_agreement=agreement,
        sqnr_db=sqnr_db,
        max_abs_error=0.01,
        partitions=1 if format == "litert" else None,
        op_histogram={},
        verified_by=EVALUATOR if format == "coreml" else "ai_edge_litert 2.3.0",
    )
    return Row(artifact, check, median_ms and make_latency(path, median_ms))


def make_latency(path, median_ms):
    return latency(path, median_ms, peak_memory_bytes=60_000_000, baseline_memory_bytes=36_000_000)


@pytest.fixture
def rows(tmp_path):
    return [
        make_row(tmp_path, "vit", "litert", "float32", size=4000, top1=0.98, sqnr_db=math.inf, median_ms=3.0),
        make_row(tmp_path, "vit", "litert", "dynamic_int8", size=1100, top1=0.978, agreement=0.998, median_ms=1.6),
        make_row(tmp_path, "vit", "litert", "static_int8", size=1000, top1=0.972, agreement=0.99, median_ms=1.5),
        make_row(tmp_path, "vit", "litert", "weight_int4", size=600, top1=0.91, agreement=0.92, median_ms=1.2),
        make_row(tmp_path, "vit", "coreml", "float16", size=2000, top1=0.98),
        make_row(tmp_path, "vit", "coreml", "int8", size=1050, top1=0.976),
    ]


def test_json_says_what_was_measured(rows, tmp_path):
    written = report(rows, tmp_path / "deep" / "report.html", environment={"cpu": "Test CPU"})
    data = json.loads(written.json.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(data) == ["model", "backend", "rows", "environment"]
    assert (data["model"], data["backend"], data["environment"]) == ("vit", "jax", {"cpu": "Test CPU"})
    assert len(data["rows"]) == len(rows)
    for fields, row in zip(data["rows"], rows, strict=True):
        assert (written.json.parent / fields["artifact"]).resolve() == row.artifact.path.resolve()
        assert fields["format"] == row.artifact.format
        assert fields["recipe"] == row.artifact.recipe
        assert fields["size_bytes"] == row.artifact.size_bytes
        assert fields["top1"] == row.verification.top1
        assert fields["top1_agreement"] == row.verification.top1_agreement
        assert fields["partitions"] == row.verification.partitions
        assert fields["verified_by"] == row.verification.verified_by
        assert fields["latency_median_ms"] == (row.latency and row.latency.median_ms)
        assert fields["latency_p90_ms"] == (row.latency and row.latency.p90_ms)
    assert data["rows"][0]["sqnr_db"] is None  # infinite
    assert data["rows"][1]["sqnr_db"] == 40


def test_the_fastest_file_as_accurate_as_any_is_recommended(rows):
    row, reason = recommend(rows, "litert")
    assert row is rows[2]  # weight_int4 is faster, but loses seven points
    assert reason == "the fastest of the 3 LiteRT files within 1 point of the best top-1, 98.0 %"
    row, reason = recommend(rows, "coreml")
    assert row is rows[5]
    assert reason == "the smallest of the 2 Core ML files within 1 point of the best top-1, 98.0 %"
    row, reason = recommend([rows[0], dataclasses.replace(rows[5], verification=None)], "litert")
    assert (row, reason) == (rows[0], "the only LiteRT file within 1 point of the best top-1, 98.0 %")
    row, reason = recommend([rows[3], rows[4]], "litert")
    assert (row, reason) == (rows[3], "the most accurate one, 7.0 points below the best top-1")
    assert recommend(rows[:2], "coreml") is None


def test_files_checked_on_other_images_are_not_compared(rows):
    """The float file's 98 % of 500 images says nothing about a package that was checked on 100 others."""
    package = dataclasses.replace(
        rows[5], verification=dataclasses.replace(rows[5].verification, images=100, top1=0.93)
    )
    row, reason = recommend([*rows[:4], package], "coreml")
    assert (row, reason) == (package, "the only Core ML file within 1 point of the best top-1, 93.0 %")


def test_agreement_stands_in_where_labels_are_not_known(tmp_path):
    rows = [
        make_row(tmp_path, "vit", "litert", "float32", size=4000, median_ms=3.0),
        make_row(tmp_path, "vit", "litert", "static_int8", size=900, agreement=0.995, median_ms=1.5),
    ]
    page = report(rows, tmp_path / "report.html").html.read_text()
    assert "Top-1 agreement against latency" in page
    assert "<th>Top-1</th>" not in page
    assert recommend(rows, "litert")[0] is rows[1]


def test_page_is_whole_and_needs_nothing_around_it(rows, tmp_path):
    page = report(rows, tmp_path / "report.html").html.read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", page)
    for row in rows:
        assert row.artifact.path.name in page
    assert page.count("<svg") == 2
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.S):
        ElementTree.fromstring(svg.replace("xlink:", ""))
        assert "var(--ink)" in svg  # colours of the page, for dark mode too
    assert "exact" in page
    assert "97.8 % (−0.2)" in page
    assert EVALUATOR in page
    assert page.count("<mark>Android</mark>") == page.count("<mark>iPhone</mark>") == 1


def test_text_from_outside_is_escaped(tmp_path):
    evil = '<img src=x onerror="alert(1)">&$x_1$'
    rows = [make_row(tmp_path, "a", "litert", "float32", size=400, top1=0.9, median_ms=1.0)]
    rows += [make_row(tmp_path, "b", "litert", "float32", size=400, top1=0.9, median_ms=1.0)]
    rows = [
        dataclasses.replace(
            row,
            artifact=dataclasses.replace(row.artifact, model=evil + row.artifact.model, recipe=evil),
            verification=dataclasses.replace(row.verification, verified_by=evil),
        )
        for row in rows
    ]
    page = report(rows, tmp_path / "report.html", title=evil, environment={evil: evil}).html.read_text()
    assert "<img" not in page
    assert "&lt;img src=x onerror=&#34;alert(1)&#34;&gt;&amp;$x_1$" in page


def test_markdown_is_one_table(rows, tmp_path):
    text = report(rows, tmp_path / "report.html").markdown.read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == len(rows) + 2
    assert len({line.count("|") for line in table}) == 1
    assert "**Android: `vit_static_int8.tflite`**" in text
    assert (
        "| `vit_static_int8.tflite` | LiteRT | static_int8 | 0.00100 MB | 97.2 % (−0.8) | 99.0 % | 40.0 dB | 1.50 ms |"
        in text
    )


def test_the_spread_of_the_times_is_in_the_table_and_the_plot(rows, tmp_path):
    assert ">Spread</th>" not in report(rows, tmp_path / "none.html").html.read_text()  # no 10th percentile is known
    wide = [
        dataclasses.replace(
            row, latency=row.latency and dataclasses.replace(row.latency, p10_ms=0.8 * row.latency.median_ms)
        )
        for row in rows
    ]
    written = report(wide, tmp_path / "report.html")
    page, text = written.html.read_text(), written.markdown.read_text()
    timed = [row.latency for row in wide if row.latency]
    assert ">Spread</th>" in page and "| Spread |" in text
    assert timed and all(f"{0.8 * t.median_ms:#.3g} to {1.1 * t.median_ms:#.3g} ms" in page for t in timed)
    assert "| 1.20 to 1.65 ms |" in text
    latency, size = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(spreads(latency)) == len(timed) and not spreads(size)


def test_the_spread_of_a_point_is_a_line_through_it(tmp_path):
    points = [Point(x=x, y=90 + x, label="a", marker="o", spread=(x - d, x + d)) for x, d in ((2.0, 0.05), (3.0, 0.2))]
    points += [Point(x=2.5, y=91, label="b", marker="o")]
    (a, y_a), (b, y_b) = ((left + right, y) for left, right, y in spreads(plot(points, "x", "y")))
    (left, right, _), (left_b, right_b, _) = spreads(plot(points, "x", "y"))
    assert (right_b - left_b) == pytest.approx(4 * (right - left), rel=1e-3)
    assert (b - a) / 2 == pytest.approx(10 * (right - left), rel=1e-3) and y_a > y_b  # up is better


def spreads(svg):
    """(left, right, y) in pixels of the lines that show between which times runs lie."""
    lines = re.findall(r'<path d="M ([\d.]+) ([\d.]+)\s*L ([\d.]+) ([\d.]+)\s*"[^>]*stroke-opacity: 0\.45', svg)
    assert all(one[1] == one[3] for one in lines)
    return [(float(left), float(right), float(y)) for left, y, right, _ in lines]


def test_several_models_keep_their_names(rows, tmp_path):
    better = make_row(tmp_path, "mixer", "litert", "float32", size=3000, top1=0.99, median_ms=2.0)
    written = report([*rows, better], tmp_path / "report.html")
    data = json.loads(written.json.read_text())
    assert data["model"] == "mixer"
    assert [row["model"] for row in data["rows"]] == ["vit"] * 6 + ["mixer"]
    assert re.search(r"<th[^>]*>mixer</th>", written.html.read_text())


def test_no_latency_without_verification(rows, tmp_path):
    unchecked = dataclasses.replace(rows[1], verification=None)
    with pytest.raises(ValueError, match=r"vit_dynamic_int8\.tflite has a latency but was not verified"):
        report([rows[0], unchecked], tmp_path / "report.html")
    assert not list(tmp_path.glob("report*"))


def test_layers_that_half_precision_may_not_hold_are_named(rows, tmp_path):
    layers = tuple(f"block_{i}" for i in range(7))
    row = Row(dataclasses.replace(rows[1].artifact, float32_layers=layers))
    said = "not hold the numbers of 7 layers of vit_dynamic_int8.tflite, which computes them in float32 (block_0, "
    written = report([rows[0], row], tmp_path / "report.html")
    assert said in written.html.read_text() and "block_4 ...)." in written.markdown.read_text()


def test_a_row_without_measurements_claims_nothing(rows, tmp_path):
    bare = Row(rows[1].artifact)
    written = report([rows[0], bare], tmp_path / "report.html")
    fields = json.loads(written.json.read_text())["rows"][1]
    assert fields["size_bytes"] == 1100
    assert {fields[k] for k in ("top1", "top1_agreement", "sqnr_db", "latency_median_ms", "verified_by")} == {None}
    assert "Not verified, so nothing is claimed of them: vit_dynamic_int8.tflite" in written.html.read_text()
    report([bare], tmp_path / "bare.html")


def test_files_that_tell_no_class_are_compared_and_none_is_recommended(rows, tmp_path):
    check = dataclasses.replace(rows[0].verification, top1=None, reference_top1=None, top1_agreement=None)
    features = dataclasses.replace(rows[0], verification=check)
    assert recommend([features], "litert") is None
    written = report([features], tmp_path / "report.html")
    page = written.html.read_text()
    assert "SQNR" in page and "<svg" not in page and "<mark>" not in page and "Agreement" not in page
    assert json.loads(written.json.read_text())["rows"][0]["top1_agreement"] is None
    row, reason = recommend([rows[1], features], "litert")  # beside one that tells classes
    assert (row, reason) == (rows[1], "the only LiteRT file within 1 point of the best top-1 agreement, 99.8 %")


def test_a_report_names_what_it_needs(rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'A report needs Jinja2: pip install -e "\.\[report\]"'):
        report(rows, tmp_path / "report.html")
    assert not list(tmp_path.glob("report*"))


def test_mistakes_are_named(rows, tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        report([], tmp_path / "report.html")
    with pytest.raises(ValueError, match=r"ends in \.html; received .*report\.pdf"):
        report(rows, tmp_path / "report.pdf")
    with pytest.raises(
        ValueError, match=r"verification beside vit_float32\.tflite is of another file, vit_dynamic_int8"
    ):
        report([dataclasses.replace(rows[0], verification=rows[1].verification)], tmp_path / "report.html")
    with pytest.raises(ValueError, match=r"latency beside vit_float32\.tflite is of another file, vit_dynamic_int8"):
        report([dataclasses.replace(rows[0], latency=rows[1].latency)], tmp_path / "report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot write to"):
        report(rows, tmp_path / "file" / "report.html")


def test_host_environment_names_what_was_used():
    facts = host_environment()
    assert {"cpu", "cores", "os", "python", "keras", "keras-vits"} <= set(facts)


def test_labels_of_a_plot_do_not_overlap():
    """Ten points, some of them on one spot, as of two models with five recipes each."""
    names = ["float32", "float16", "dynamic_int8", "static_int8", "weight_int4"]
    points = [
        Point(x=x * scale, y=y + 0.2 * series, label=name, marker="o", series=series, chosen=name == "static_int8")
        for series, scale in enumerate((1.0, 1.08))
        for name, x, y in zip(names, (4.0, 2.0, 1.05, 1.0, 1.0), (98.0, 98.0, 97.8, 97.6, 97.6), strict=True)
    ]
    svg = ElementTree.fromstring(plot(points, "x", "y").replace("xlink:", ""))
    boxes = [box(text) for text in svg.iter() if text.tag.endswith("text") and text.text in names]
    assert len(boxes) == 10
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def box(text):
    """(left, top, right, bottom) of an 8-point text of the plot, a letter being at least 4 points wide."""
    assert "text-anchor: middle" in text.get("style")
    x, y, half = float(text.get("x")), float(text.get("y")), 2 * len(text.text)
    return x - half, y - 6, x + half, y


class Balanced(html.parser.HTMLParser):
    """Collects the elements that are open at the end, and fails at one that is closed in the wrong order."""

    VOID = {"meta", "br", "img", "path", "use", "rect"}

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag
