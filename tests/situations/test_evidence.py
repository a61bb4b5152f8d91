"""Numbers that would mislead, and input that is checked instead of cast (evidence 1 to 8, edge 13 to 15, robust 6, 7
and 19)."""

import dataclasses
import importlib
import itertools
import json
import pathlib
import re
import subprocess
import threading

import keras
import measured
import numpy as np
import pytest

import keras_vits
from keras_vits import edge
from keras_vits.edge.evidence import chance
from keras_vits.edge.evidence.report import Row, recommend, report, withheld
from keras_vits.edge.records import equally_fast
from keras_vits.preprocess import Preprocessing

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[2]
WINDOWS = (400, 1400)  # pixels: a phone, and a laptop
TINY = dict(image_size=32, patch_size=8, width=32, depth=1, heads=2, mlp_hidden=64)


def vit(num_classes=4, seed=0):
    model = keras_vits.create("vit_tiny_patch16_224", num_classes=num_classes, **TINY)
    random = np.random.default_rng(seed)
    model.set_weights([w + random.normal(0, 0.1, w.shape).astype("float32") for w in model.get_weights()])
    return model


def random(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype("float32")


def pixels(count, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """(model of four classes, its float32 file, images, the model's own classes)."""
    model, x = vit(), random(40, 32, 32, 3)
    return model, edge.litert.export(model, tmp_path_factory.mktemp("four")), x, model.predict(x, verbose=0).argmax(-1)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A model of two layers that knows its preprocessing: its file of normalised numbers, and that of pixels."""
    image = keras.Input((32, 32, 3), name="image")
    x = keras.layers.Conv2D(8, 8, strides=8, activation="relu", name="body")(image)
    model = keras.Model(image, keras.layers.Dense(3, name="scores")(keras.layers.Flatten()(x)), name="known")
    model.preprocessing = Preprocessing(image_size=(32, 32))
    folder = tmp_path_factory.mktemp("known")
    return edge.litert.export(model, folder), edge.litert.export(model, folder, uint8_input=True, name="pixels"), model


# ---------------------------------------------------------------- the pictures of another model (evidence 1)


@pytest.mark.parametrize("verb", ["verify", "report"])
def test_no_pictures_are_taken_by_default(run, four, verb, tmp_path):
    four[0].save(tmp_path / "m.keras")
    code, _, err = run(verb, four[1].path, "--against", tmp_path / "m.keras")
    assert code == 2 and "--data" in err and err.count("\n") == 1


def test_pictures_of_other_classes_are_refused(run, four, tmp_path):
    pytest.importorskip("sklearn")
    model = vit()
    model.save(tmp_path / "m.keras")
    artifact = edge.litert.export(model, tmp_path)
    code, out, err = run("verify", artifact.path, "--against", tmp_path / "m.keras", "--data", "digits")
    assert (code, out) == (2, "")
    assert "vit_tiny_patch16_224_float32.tflite there are 4 classes, of the pictures 10" in err
    named = vit(10)
    named.class_names = [f"shape {i}" for i in range(10)]
    named.save(tmp_path / "n.keras")
    artifact = edge.litert.export(named, tmp_path / "n")
    code, out, err = run("verify", artifact.path, "--against", tmp_path / "n.keras", "--data", "digits")
    assert (code, out) == (2, "") and "Class 0 is 'shape 0' in" in err and "'0' in the pictures" in err


def test_a_model_of_other_classes_is_refused(tmp_path):
    model, other = vit(), vit(seed=1)
    model.class_names, other.class_names = list("abcd"), list("abdc")
    artifact = edge.litert.export(model, tmp_path)
    with pytest.raises(ValueError, match=r"Class 2 is 'c' in .*_float32\.tflite and 'd' in the model"):
        edge.verify(artifact, other, random(2, 32, 32, 3))


# ---------------------------------------------------------------- every file has its own pictures


@pytest.mark.parametrize("verb", ["verify", "report"])
def test_every_file_sees_the_pictures_as_it_takes_them(verb, run, tmp_path, monkeypatch):
    from keras_vits.training import data

    image = pytest.importorskip("PIL.Image")
    for i, picture in enumerate(pixels(12, 40)):
        (tmp_path / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image.fromarray(picture).save(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png")
    model = vit(num_classes=2)
    edge.keras_file.export(model, tmp_path, name="m")
    files = [edge.litert.export(model, tmp_path, name="first")]
    model.preprocessing = Preprocessing(image_size=(32, 32), mean=(0.2,) * 3, crop=0.5)
    files += [edge.litert.export(model, tmp_path, name="second")]
    files += [edge.litert.export(model, tmp_path, name="third", uint8_input=True)]
    own = {file.path.name: data.load(tmp_path / "photos", file.image.prepared).validation for file in files}

    seen, reads, real = {}, [], (edge.verify, data.load)
    verifying = importlib.import_module("keras_vits.edge.evidence.verify")
    spy = lambda artifact, model, images, *a, **k: (
        seen.update({artifact.path.name: images}) or real[0](artifact, model, images, *a, **k)
    )
    monkeypatch.setattr(verifying, "verify", spy)
    monkeypatch.setattr(data, "load", lambda *a, **k: reads.append(a) or real[1](*a, **k))
    monkeypatch.setattr("keras_vits.cli.demo_job.measure", lambda rows, **options: rows)
    names = [file.path for file in files]
    options = ("--against", tmp_path / "m.keras", "--data", tmp_path / "photos")
    code, _, err = run(verb, *names, *options, *(["--out", tmp_path / "r.html"] if verb == "report" else []))
    assert code == 0, err
    np.testing.assert_array_equal(seen["first_float32.tflite"], own["first_float32.tflite"].images())
    np.testing.assert_array_equal(seen["second_float32.tflite"], own["second_float32.tflite"].images())
    np.testing.assert_array_equal(seen["third_float32.tflite"], own["third_float32.tflite"].pixels())
    assert np.abs(seen["first_float32.tflite"] - seen["second_float32.tflite"]).max() > 0.1
    assert len(reads) == 2  # of three files, two of which take the same


# ---------------------------------------------------------------- pixels and numbers (evidence 2)


def test_pixels_are_not_compared_with_normalised_numbers(known):
    f32, takes_pixels, model = known
    x = random(4, 32, 32, 3)
    with pytest.raises(ValueError, match=r"takes normalised float32 images; received uint8 pixels: pass them through"):
        edge.verify(f32, model, pixels(4))
    with pytest.raises(ValueError, match="received int64 pixels"):
        edge.verify(f32, model, pixels(4).astype(int))
    with pytest.raises(ValueError, match=r"takes pixels 0 to 255 \(uint8\); received float32 from -"):
        edge.verify(takes_pixels, model, x)
    with pytest.raises(ValueError, match="received uint16 from"):
        edge.verify(takes_pixels, model, pixels(4).astype(np.uint16) * 256)
    exact = edge.verify(takes_pixels, model, pixels(4))
    assert exact.sqnr_db > 90
    assert edge.verify(takes_pixels, model, pixels(4).astype("float32")).sqnr_db == exact.sqnr_db  # whole numbers


# ---------------------------------------------------------------- labels and NaN (evidence 3, robust 6)


def test_labels_in_every_usual_form(four):
    model, f32, x, truth = four
    one_hot = np.eye(4)[truth]
    for known in (truth, truth.tolist(), truth[:, None], truth.astype(np.uint8), truth.astype(float), one_hot):
        assert edge.verify(f32, model, x, known).reference_top1 == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((3, 999), "Labels are class numbers from 0 to 3; label 3 is 999"),
        ((5, -1), "label 5 is -1"),
        ((0, np.nan), "label 0 is nan"),
        ((7, 0.7), "label 7 is 0.7"),
        ((1, 4), "label 1 is 4"),
    ],
)
def test_a_label_that_is_no_class_is_named(four, wrong, message):
    model, f32, x, truth = four
    at, value = wrong
    labels = truth.astype(type(value))
    labels[at] = value
    with pytest.raises(ValueError, match=message):
        edge.verify(f32, model, x, labels)
    with pytest.raises(ValueError, match=r"labels? (?:are|.* is)"):
        edge.quantize_to(model, 1, dataset=(x, np.full(40, 7)), folder=f32.path.parent / "never")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda y: y[:7], r"there are 40 images, and labels of shape \(7,\)"),
        (lambda y: np.eye(5)[y], "has 4 classes, and these labels 5 columns"),
        (lambda y: np.eye(4)[y] * 0.9, r"no one-hot rows: row 0 is"),
        (lambda y: np.eye(4)[y] + np.eye(4)[(y + 1) % 4], "no one-hot rows"),
        (lambda y: np.array(["a"] * 40), "Labels are class numbers; received <U1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(four, labels, message):
    model, f32, x, truth = four
    with pytest.raises(ValueError, match=message):
        edge.verify(f32, model, x, labels(truth))


def test_the_image_with_nan_is_named(four):
    model, f32, x, _ = four
    broken = x.copy()
    broken[17, 3, 4, 1] = np.nan
    with pytest.raises(ValueError, match="'image' must be finite numbers; image 17 holds NaN or infinity"):
        edge.verify(f32, model, broken)
    with pytest.raises(ValueError, match="image 17 holds NaN or infinity: look at how it is loaded"):
        edge.litert.quantize(f32, "static_int8", [broken[:16], broken[16:]])


# ---------------------------------------------------------------- what to ship (evidence 4)


def latency(path, ms, spread=0.02, rounds=(), started="now"):
    low, high = ms * (1 - spread), ms * (1 + spread)
    return measured.latency(path, ms, p10_ms=low, p90_ms=high, p99_ms=high, round_ms=rounds or (ms,), started=started)


def row(folder, name, size, ms, top1=0.98, images=500, classes=10, majority=None, **more):
    """A row of a file of so many bytes, as `verify` and `benchmark` fill it."""
    path = folder / f"{name}.tflite"
    path.write_bytes(bytes(size))
    spec = keras_vits.specs.OutputSpec(name="logits", kind="logits", classes=classes, shape=(1, classes or 10))
    image = keras_vits.specs.InputSpec(name="image", shape=(1, 8, 8, 3))
    artifact = edge.artifact.make(
        path, format="litert", recipe=name, model="m", inputs=(image,), outputs=(spec,)
    )  # fmt: skip
    check = edge.Verification(
        artifact=artifact, images=images, top1=top1, reference_top1=top1, top1_agreement=1.0, sqnr_db=40.0,
        max_abs_error=0.1, partitions=1, op_histogram={}, verified_by="a runtime", majority=majority,
    )  # fmt: skip
    return Row(artifact, check, latency(path, ms, **more))


def test_equal_times_leave_the_choice_to_the_size(tmp_path):
    noisy = [row(tmp_path, "float16", 410, 0.166, spread=0.3), row(tmp_path, "dynamic_int8", 280, 0.173, spread=0.3)]
    chosen, why = recommend(noisy, "litert")
    assert chosen is noisy[1]
    assert why == (
        "the smallest of the 2 LiteRT files within 1 point of the best top-1, 98.0 %, whose times differ within the "
        "spread of the runs"
    )
    clear = [row(tmp_path, "float16", 410, 0.10), row(tmp_path, "dynamic_int8", 280, 0.173)]
    assert recommend(clear, "litert") == (
        clear[0],
        "the fastest of the 2 LiteRT files within 1 point of the best top-1, 98.0 %",
    )


def test_times_in_turns_are_compared_turn_by_turn():
    """A busy machine slows all files down in the same turn: their ratio stays, and so does the difference."""
    busy = np.array([1, 3, 1, 5, 1, 2, 1.5, 4])
    fast, slow = (
        latency("a", 1, 4, tuple(f * busy * (1 + 0.01 * (-1) ** np.arange(8) * s))) for f, s in ((1, 1), (1.1, 0))
    )
    assert not equally_fast(fast, slow) and not equally_fast(slow, fast)
    assert equally_fast(fast, latency("b", 1.001, 4, tuple(busy * 1.001)))
    assert equally_fast(fast, latency("b", 1.1, 0.5, tuple(busy * 1.1), started="another day"))  # nothing but spreads


def test_a_model_near_chance_is_not_recommended(tmp_path):
    guess = [row(tmp_path, "float32", 400, 1.0, top1=0.25, images=16, classes=4)]
    assert recommend(guess, "litert") is None
    assert withheld(guess, "litert") == (
        "No LiteRT file is recommended: float32.tflite, the best, has a top-1 of 25.0 % on 16 images, which may be "
        "chance: of 4 classes that is 25.0 %, and the 95 % interval begins at 10.2 %."
    )
    written = report(guess, tmp_path / "report.html", environment={})
    assert "No LiteRT file is recommended" in written.html.read_text() and "<mark>" not in written.html.read_text()
    assert "No LiteRT file is recommended" in written.markdown.read_text()
    known = [row(tmp_path, "float32", 400, 1.0, top1=0.5, images=200, classes=4)]
    assert recommend(known, "litert")[0] is known[0]


def test_one_answer_to_all_is_not_recommended(tmp_path):
    """Pictures of which nine of ten are of one class: a constant has 90 % of them right."""
    guess = [row(tmp_path, "float32", 400, 1.0, top1=0.9, images=200, classes=2, majority=0.9)]
    assert recommend(guess, "litert") is None
    assert withheld(guess, "litert") == (
        "No LiteRT file is recommended: float32.tflite, the best, has a top-1 of 90.0 % on 200 images, which one "
        "answer to all may reach: 90.0 % of them are of one class, and the 95 % interval begins at 85.1 %."
    )
    written = report(guess, tmp_path / "report.html", environment={})
    assert json.loads(written.json.read_text())["rows"][0]["majority"] == 0.9
    better = [row(tmp_path, "float32", 400, 1.0, top1=0.96, images=200, classes=2, majority=0.9)]
    assert recommend(better, "litert")[0] is better[0]
    even = [row(tmp_path, "float32", 400, 1.0, top1=0.5, images=200, classes=2, majority=0.5)]
    assert "which may be chance: of 2 classes that is 50.0 %" in withheld(even, "litert")
    unnamed = row(tmp_path, "float32", 400, 1.0, classes=None, majority=0.99).verification  # but the labels are known
    assert "which one answer to all may reach: 99.0 %" in chance.at_chance(unnamed)


def constant(share):
    """A model that gives class 0 for every picture, and labels of which so large a share is class 0."""
    model = vit(num_classes=2)
    kernel, bias = model.get_layer("head").get_weights()
    model.get_layer("head").set_weights([np.zeros_like(kernel), np.array([1, -1], bias.dtype)])
    labels = np.ones(40, int)
    labels[np.random.default_rng(0).permutation(40)[: round(40 * share)]] = 0
    return model, labels


def test_what_always_gives_the_most_frequent_class_tells_nothing(tmp_path):
    (model, labels), x = constant(0.9), random(40, 32, 32, 3)
    artifact = edge.litert.export(model, tmp_path)
    for known in (labels, np.eye(2)[labels]):
        check = edge.verify(artifact, model, x, known)
        assert check.top1 == check.majority == 0.9
    assert edge.verify(artifact, model, x).majority is None
    assert recommend([Row(artifact, check)], "litert") is None
    with pytest.raises(ValueError, match=r"The model itself has a top-1 of .* which one answer to all may reach: "):
        edge.quantize_to(model, 1, dataset=(x, labels), folder=tmp_path / "tried")
    assert not list((tmp_path / "tried").glob("*int8*"))


def test_a_model_of_one_answer_agrees_with_whatever_its_files_give(four, tmp_path):
    (model, _), x = constant(0.9), random(40, 32, 32, 3)
    words = r"gives 100\.0% of these images one answer, so that a file that gives it to all .* hold max_drop=0:"
    with pytest.raises(ValueError, match=words):
        edge.quantize_to(model, 0, metric="agreement", dataset=x, folder=tmp_path / "one")
    model, _, x, truth = four  # which it names right: the budget reaches down to one answer to all
    most = np.unique(truth[10:], return_counts=True)[1].max() / 30
    with pytest.raises(ValueError, match=rf"gives {most:.1%} of these images one answer"):
        edge.quantize_to(model, 100 * (1 - most) + 0.1, metric="agreement", dataset=x, folder=tmp_path / "four")
    assert not list(tmp_path.rglob("*int8*"))


def test_a_budget_down_to_the_most_frequent_class_is_refused(four, tmp_path):
    model, _, x, truth = four
    most = np.unique(truth[10:], return_counts=True)[1].max() / 30
    assert most < 0.85  # so that the model itself tells something
    words = rf"is all that the model has, a top-1 of 100\.0% where {most:.1%} needs no look at the images"
    with pytest.raises(ValueError, match=words):
        edge.quantize_to(model, 100 * (1 - most) + 0.1, dataset=(x, truth), folder=tmp_path)
    assert not list(tmp_path.glob("*int8*"))


def test_the_interval_of_a_share():
    """Wilson's, as in the table of Newcombe, "Two-sided confidence intervals for the single proportion", 1998."""
    assert chance.lower_bound(81 / 263, 263) == pytest.approx(0.2553, abs=1e-4)
    assert chance.lower_bound(15 / 148, 148) == pytest.approx(0.0624, abs=1e-4)
    assert chance.lower_bound(0, 20) == 0 and chance.lower_bound(1 / 29, 29) == pytest.approx(0.0061, abs=1e-4)


def test_a_gate_that_cannot_fail_is_refused(four, tmp_path):
    model, _, x, truth = four
    guessed = (truth + 1 + np.arange(40) % 3) % 4
    with pytest.raises(
        ValueError, match=r"The model itself has a top-1 of 0\.0 % .* which one answer to all may reach"
    ):
        edge.quantize_to(model, 1, dataset=(x, guessed), folder=tmp_path)
    assert not list(tmp_path.glob("*int8*"))
    for wrong in (100, float("inf"), float("nan"), -1):
        with pytest.raises(ValueError, match="from 0 to below 100"):
            edge.quantize_to(model, wrong, dataset=(x, truth), folder=tmp_path)


def test_a_gate_takes_one_hot_labels(four, tmp_path, monkeypatch):
    model, _, x, truth = four
    short = lambda artifacts, **options: edge.benchmark(
        artifacts, min_runs=1, min_seconds=0, warmup_seconds=0, **options
    )
    monkeypatch.setitem(edge.quantize_to.__globals__, "benchmark", short)
    batches = [(x[i : i + 10], np.eye(4)[truth[i : i + 10]]) for i in range(0, 40, 10)]
    choice = edge.quantize_to(model, 10, dataset=batches, folder=tmp_path, recipes=("float16",))
    assert choice.tried[0].verification.reference_top1 == 1


# ---------------------------------------------------------------- pixels are not images (evidence 5)


def test_pixels_are_called_pixels(tmp_path):
    image = keras.Input((16, 16, 3), name="image")
    y = keras.layers.Conv2D(3, 3, padding="same", activation="softmax", name="mask")(image)
    model, x = keras.Model(image, y), random(3, 16, 16, 3)
    artifact = edge.litert.export(model, tmp_path, name="segment")
    assert artifact.outputs[0].kind == "mask"
    wrong = model.predict(x, verbose=0)
    wrong[0, :8] = np.roll(wrong[0, :8], 1, axis=-1)  # half of one picture of three
    check = edge.verify(artifact, wrong, x)
    assert check.top1_agreement is None and check.outputs[0].counted == "pixels"
    assert check.outputs[0].agreement == pytest.approx(1 - 1 / 6)
    written = report([Row(artifact, check)], tmp_path / "report.html", environment={})
    assert "83.3 % of pixels" in written.html.read_text()
    found = json.loads(written.json.read_text())["rows"][0]
    assert found["top1_agreement"] is None and found["pixel_agreement"] == pytest.approx(1 - 1 / 6)
    with pytest.raises(ValueError, match=r"Labels need a file that classifies images.*mask \(mask\)"):
        edge.verify(artifact, model, x, np.zeros(3, int))


# ---------------------------------------------------------------- pages fit (evidence 6, 7)


def test_long_times_are_seconds(tmp_path):
    page = report([row(tmp_path, "float32", 400, 32_534.0)], tmp_path / "report.html", environment={}).html.read_text()
    assert "32.5 s" in page and "32534" not in page


def laid_out(page, tmp_path):
    """By how many pixels a page is wider than windows of 400 and 1,400, as headless Chromium lays it out."""
    from keras_vits.edge.devices import chromium

    try:
        browser = chromium.chromium()
    except ValueError:
        pytest.skip("no Chromium")
    frame = tmp_path / "frame.html"  # a headless window is never narrower than 500 pixels: a frame may be
    frame.write_text(
        "".join(f"<iframe src='{page.absolute().as_uri()}' style='width:{w}px;border:0'></iframe>" for w in WINDOWS)
        + "<script>onload = () => { document.title = [...document.querySelectorAll('iframe')]"
        ".map(f => f.contentDocument.documentElement).map(e => e.scrollWidth - e.clientWidth); };</script>"
    )
    flags = [*chromium.flags(["cpu"]), "--allow-file-access-from-files", "--virtual-time-budget=4000", "--dump-dom"]
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return tuple(map(int, re.search(r"<title>(\d+),(\d+)</title>", done.stdout).groups()))


@pytest.mark.parametrize("page", ["report", "results", "example"])
def test_a_page_fits_its_window(page, tmp_path):
    if page == "report":
        rows = [
            row(tmp_path, name, 400 + i, 1.0 + i) for i, name in enumerate(("float32", "static_int8_int16", "a" * 70))
        ]
        other = [dataclasses.replace(r, artifact=dataclasses.replace(r.artifact, model="b" * 60)) for r in rows]
        file = report([*rows, *other], tmp_path / "report.html", environment={"os": "Linux-" + "x" * 80}).html
    elif page == "results":
        file = ROOT / "benchmarks" / "RESULTS.html"
    else:
        text = (ROOT / "examples" / "web" / "index.html").read_text(encoding="utf-8")
        said = json.dumps({"passed": True, "errors": [0.123456789] * 60})
        file = tmp_path / "index.html"
        file.write_text(text.replace("Loading the model …", "Self-test passed " + said.replace(" ", "")))
    assert laid_out(file, tmp_path) == (0, 0)


def test_text_of_a_plot_is_readable_on_a_phone(tmp_path):
    page = report([row(tmp_path, "float32", 400, 1.0)], tmp_path / "report.html", environment={}).html.read_text()
    widths = [float(w) for w in re.findall(r'viewBox="0 0 ([\d.]+) ', page)]
    sizes = [float(s) for s in re.findall(r"font: (?:bold )?([\d.]+)px", page)]
    assert len(widths) == 2 and sizes and min(sizes) * 360 / max(widths) >= 9


def test_the_published_page_opens_with_what_was_measured():
    text = (ROOT / "benchmarks" / "RESULTS.html").read_text(encoding="utf-8")
    first = re.findall('<h2 id="[^"]+">(.*?)</h2>', text)[0]
    assert first == "On real images"
    before = text[text.index("<h1>") : text.index("<h2")]
    assert "target" not in before.lower()


# ---------------------------------------------------------------- one number, not the best of several (evidence 8)


def test_no_test_of_speed_takes_the_best_of_several_ratios():
    source = (ROOT / "tests" / "edge" / "test_litert.py").read_text(encoding="utf-8")
    assert not re.search(r"min\([^\n]*ratio|best_ratio|for _ in range\(\d\):[^\n]*\n[^\n]*ratio", source)


# ---------------------------------------------------------------- NaN has a name (robust 7)


@pytest.mark.parametrize("format", ["litert", "onnx", "coreml", "keras_file"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_named(format, value, tmp_path):
    model = vit()
    weights = model.get_layer("block_0").get_weights()
    weights[2].flat[3] = value
    model.get_layer("block_0").set_weights(weights)
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 of the \d+ numbers of its weight 'block_0/"):
        getattr(edge, format).export(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_gives_nan_is_named(four):
    model, f32, x, _ = four
    image = keras.Input((32, 32, 3), name="image")
    y = keras.layers.Dense(4, name="classes")(keras.ops.log(keras.layers.Flatten(name="flat")(image)))
    bad = keras.Model(image, y)
    odd = np.abs(x[:6])
    odd[4, 0, 0] = -1
    with pytest.raises(
        ValueError, match="The model itself gives NaN or infinity in 'logits' for image 4, first in layer 'log"
    ):
        edge.verify(f32, bad, odd)
    expected = model.predict(x, verbose=0)
    expected[5] = np.nan
    with pytest.raises(ValueError, match="The model itself gives NaN or infinity in 'logits' for image 5: "):
        edge.verify(f32, expected, x)
    with pytest.raises(
        ValueError, match=r"Output 'logits' of .* has shape \(40, 4\) for these images; received \(3, 4\)"
    ):
        edge.verify(f32, expected[:3], x)


def test_nan_is_no_prediction(tmp_path):
    model = vit()
    kernel, bias = model.get_layer("head").get_weights()
    model.get_layer("head").set_weights([kernel, np.full_like(bias, np.nan)])
    with pytest.raises(ValueError, match="gives NaN or infinity in 'logits' for picture 0"):
        keras_vits.predict(model, pixels(1)[0])
    with pytest.raises(ValueError, match="predict takes a VisionModel"):
        keras_vits.predict(keras.Sequential([keras.layers.Dense(2)]), pixels(1)[0])


# ---------------------------------------------------------------- calibration is checked (edge 13, robust 19)


def test_calibration_of_pixels_is_not_wrapped(known):
    quantize = lambda images: edge.litert.quantize(known[1], "static_int8", images, overwrite=True)
    for wrong, message in [
        (random(8, 32, 32, 3), "takes pixels 0 to 255 in 'image'; received float32 from -"),
        (pixels(8).astype(np.uint16) * 257, "received uint16 from"),
        (pixels(8).astype("float32") * 2, "received float32 from"),
        (pixels(8).astype(str), "Calibration takes numbers in 'image'; received <U"),
        (pixels(8).transpose(0, 3, 1, 2), "whose channels are first: move them to the end"),
        (pixels(8)[0], "which is one example: give it a first axis"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize(wrong)
    same = [quantize(kind).sha256 for kind in (pixels(8), pixels(8).astype(int), pixels(8) + np.float32(0.3))]
    assert len(set(same)) == 1


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("images", [random(1, 32, 32, 3), np.repeat(random(1, 32, 32, 3), 24, 0)])
def test_one_image_is_no_calibration(known, images):
    with pytest.warns(edge.CalibrationWarning, match="all the same, or a single one"):
        edge.litert.quantize(known[0], "dynamic_int8", images, overwrite=True)


# ---------------------------------------------------------------- without an end (edge 14)


class Endless(keras.utils.PyDataset):
    """What has no end, as Keras' documentation makes it."""

    @property
    def num_batches(self):
        return None

    def __getitem__(self, i):
        return random(8, 8, 8, 3, seed=i), np.zeros(8)


def forever(kind):
    numbers = itertools.count()
    if kind == "PyDataset":
        return Endless()
    if kind == "representative data":
        return lambda: ([random(1, 8, 8, 3, seed=i)] for i in numbers)
    if kind == "dictionaries":
        return ({"image": random(8, 8, 8, 3, seed=i), "label": 1} for i in numbers)
    return (random(8, 8, 8, 3, seed=i) for i in numbers)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The file of a small model without preprocessing, and its model."""
    image = keras.Input((8, 8, 3), name="image")
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu", name="body")(image)
    model = keras.Model(image, keras.layers.Dense(3, name="scores")(keras.layers.Flatten()(x)), name="plain")
    return edge.litert.export(model, tmp_path_factory.mktemp("plain"), kinds={"scores": "logits"}), model


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["generator", "PyDataset", "representative data", "dictionaries"])
def test_what_has_no_end_is_cut(kind, plain, monkeypatch):
    monkeypatch.setattr("keras_vits.edge.quantize.calibration.MOST", 40)
    with pytest.warns(edge.CalibrationWarning, match="more than 40 images, perhaps no end: the first 40"):
        artifact = edge.litert.quantize(plain[0], "static_int8", forever(kind), overwrite=True)
    assert artifact.path.is_file()


@pytest.mark.filterwarnings("default")
def test_a_budget_of_what_has_no_end(plain, monkeypatch, tmp_path):
    _, model = plain
    monkeypatch.setitem(edge.quantize_to.__globals__, "MOST", 40)
    short = lambda artifacts, **options: edge.benchmark(
        artifacts, min_runs=1, min_seconds=0, warmup_seconds=0, **options
    )
    monkeypatch.setitem(edge.quantize_to.__globals__, "benchmark", short)
    with pytest.warns(edge.CalibrationWarning, match="has more than 40 images, perhaps no end"):
        edge.quantize_to(model, 50, metric="sqnr", dataset=forever("generator"), folder=tmp_path, recipes=("float16",))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: itertools.repeat(random(0, 8, 8, 3)), "empty, or yields a batch of no images"),
        (lambda: [()], "received an empty list"),
        (lambda: [{}], "needs the input image; received an empty dictionary"),
        (lambda: [{"picture": random(2, 8, 8, 3)}], "needs the input image; received picture"),
        (lambda: 7, "is an array, or yields batches of images; received int"),
        (lambda: lambda: None, "yields batches of images; received NoneType"),
    ],
)
def test_calibration_that_is_none(source, message, plain):
    with pytest.raises(ValueError, match=message):
        edge.litert.quantize(plain[0], "static_int8", source(), overwrite=True)


def test_no_more_than_a_thousand_images_are_held(plain):
    from keras_vits.edge.quantize.calibration import batches

    taken = []
    source = (taken.append(i) or random(10, 8, 8, 3, seed=i) for i in itertools.count())
    with pytest.warns(edge.CalibrationWarning, match="more than 1,000"):
        found = list(batches(source, plain[0].inputs, "reading"))
    assert len(found) == 1000 and len(taken) == 101
    enough = (random(10, 8, 8, 3, seed=i) for i in range(100))  # exactly as many: nothing is left out
    assert len(list(batches(enough, plain[0].inputs, "reading"))) == 1000


# ---------------------------------------------------------------- folders, and what nobody said (edge 15, robust 16)


@pytest.fixture
def folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "photos").mkdir()
    for i, picture in enumerate(pixels(4, 40)):
        image.fromarray(picture).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.filterwarnings("default")
def test_unreadable_pictures_are_skipped_and_counted(known, folder):
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "empty.jpg").write_bytes(b"")
    with pytest.warns(edge.CalibrationWarning, match=r"Skipped 2 unreadable images: .*broken\.png, .*empty\.jpg"):
        edge.litert.quantize(known[0], "static_int8", folder, overwrite=True)
    for file in folder.glob("?.png"):
        file.unlink()
    with pytest.raises(ValueError, match="None of the 2 pictures can be read"):
        edge.litert.quantize(known[0], "static_int8", folder, overwrite=True)


def test_a_pipe_is_no_picture(known, folder):
    import os

    os.mkfifo(folder / "pipe.png")
    done = threading.Event()
    worker = threading.Thread(
        target=lambda: (edge.litert.quantize(known[0], "static_int8", folder, overwrite=True), done.set()), daemon=True
    )
    worker.start()
    assert done.wait(60)


@pytest.mark.filterwarnings("default")
def test_a_large_folder_is_taken_evenly(known, folder, monkeypatch):
    monkeypatch.setattr("keras_vits.edge.quantize.calibration.MOST", 2)
    with pytest.warns(edge.CalibrationWarning, match="has 4 pictures, of which 2, evenly spaced, are calibrated on"):
        edge.litert.quantize(known[0], "static_int8", folder, overwrite=True)


def test_a_file_that_knows_no_preprocessing_takes_no_pictures(plain, folder, run):
    artifact, _ = plain
    words = "The file does not know how pictures become its input 'image': set model.preprocessing"
    with pytest.raises(ValueError, match=words):
        edge.litert.quantize(artifact, "static_int8", folder)
    for command in (
        ("predict", folder / "0.png", "--model", artifact.path),
        ("quantize", artifact.path, "static_int8", "--calibration", folder, "--overwrite"),
        ("quantize", artifact.path, "static_int8", "--calibration", "digits", "--overwrite"),
    ):
        code, out, err = run(*command)
        assert (code, out) == (2, "") and words in err, command


def test_a_foreign_file_with_preprocessing_takes_pictures(folder, tmp_path, run):
    image = keras.Input((8, 8, 3), name="image")
    model = keras.Model(image, keras.layers.Dense(3)(keras.layers.Flatten()(image)), name="told")
    model.preprocessing, model.class_names = Preprocessing(image_size=(8, 8), mean=(0.2,) * 3), ["a", "b", "c"]
    artifact = edge.litert.export(model, tmp_path)
    code, out, _ = run("predict", folder / "0.png", "--model", artifact.path)
    expected = model.predict(model.preprocessing(folder / "0.png")[None], verbose=0)[0]
    assert code == 0 and f"{np.exp(expected).max() / np.exp(expected).sum():.1%}" in out
