"""Bundles: what is in them, that their expected outputs are the model's, and the web one run in a browser."""

import contextlib
import dataclasses
import functools
import http.server
import json
import os
import pathlib
import queue
import re
import runpy
import shutil
import subprocess
import sys
import threading
import urllib.parse

import numpy as np
import pytest
from PIL import Image

import keras_vits
from keras_vits import edge
from keras_vits._util.files import sha256
from keras_vits.edge.selftest import generated
from keras_vits.prediction import best
from keras_vits.preprocess import Preprocessing

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[2]
WEB = ROOT / "examples" / "web"
NAMES = ("cat", "dog", "Großer Baum", "тест")
PREPROCESSING = Preprocessing(  # nothing in it is a default
    image_size=(24, 32),
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.4),
    interpolation="bilinear",
    crop=0.8,
    channel_order="bgr",
)
PLATFORMS = {
    "android": (edge.litert, "model.tflite", "ImageClassifier.kt"),
    "ios": (edge.coreml, "model.mlpackage", "ImageClassifier.swift"),
    "web": (edge.litert, "model.tflite", "ImageClassifier.ts"),
}


def make(names, seed=0):
    tiny = dict(image_size=(24, 32), patch_size=8, width=24, depth=1, heads=2, mlp_hidden=48, num_classes=len(names))
    model = keras_vits.create("vit_tiny_patch16_224", **tiny)
    model.class_names, model.preprocessing = names, PREPROCESSING
    weights = [np.random.default_rng(seed + i).normal(0, 0.3, w.shape) for i, w in enumerate(model.weights)]
    model.set_weights(weights)
    return model


@pytest.fixture(scope="module")
def model():
    return make(NAMES)


@pytest.fixture(scope="module")
def one_class():
    """A model of a single class, which says yes to some pictures and no to others."""
    model = make(("cat",))
    logits = model.predict(PREPROCESSING.normalize(generated((24, 32, 3))), verbose=0)
    model.get_layer("head").bias.assign_sub(float(np.median(logits)))
    return model


@pytest.fixture(scope="module")
def artifacts(model, one_class, tmp_path_factory):
    """The model's file of a kind, written once."""
    folder = tmp_path_factory.mktemp("artifacts")

    @functools.cache
    def artifact(kind):
        if kind == "coreml":
            return edge.coreml.export(model, folder)
        if kind == "image":
            return edge.coreml.export(model, folder, image_input=True, name="image")
        if kind == "one_image":
            return edge.coreml.export(one_class, folder, image_input=True, name="one")
        if kind == "keras":
            return edge.keras_file.export(model, folder)
        if kind == "dynamic_int8":
            return edge.litert.quantize(artifact("litert"), "dynamic_int8")
        options = {"litert": {}, "pixels": dict(uint8_input=True, head="softmax"), "batch": dict(batch=2)}
        options |= dict(top_k=dict(head="top_k", top_k=3), one_logit={}, one_probability=dict(head="softmax"))
        options["features"] = dict(features=["pool"])
        if kind.startswith("one"):
            return edge.litert.export(one_class, folder, name=kind, **options[kind])
        return edge.litert.export(model, folder, name=kind, **options[kind])

    return artifact


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def photos(count=10, size=(60, 90)):
    """Smooth pictures (N,h,w,3)."""
    small = np.random.default_rng(5).integers(0, 256, (count, 5, 6, 3), "uint8")
    return np.stack([np.asarray(Image.fromarray(x).resize(size[::-1], Image.Resampling.BICUBIC)) for x in small])


def test_what_an_app_needs_is_in_the_folder(artifacts, tmp_path):
    for platform, kind in (("android", "litert"), ("web", "pixels"), ("ios", "image")):
        given, (_, file, source) = artifacts(kind), PLATFORMS[platform]
        bundle = edge.bundle(given, tmp_path / platform, platform, license="apache-2.0")
        assert sorted(p.name for p in bundle.path.iterdir()) == sorted(["model", source])
        assert bundle.source == bundle.path / source and bundle.model == bundle.path / "model"
        assert (bundle.model / "labels.txt").read_text(encoding="utf-8") == "".join(f"{name}\n" for name in NAMES)
        assert sha256(bundle.model / file) == given.sha256
        about = read(bundle.model / "model.json")
        assert about["file"] == file and about["platform"] == platform and about["license"] == "apache-2.0"
        assert about["input"]["shape"] == [1, 24, 32, 3] and about["input"]["dtype"] == given.input.dtype
        assert about["preprocessing"] == {
            "image_size": [24, 32], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear",
            "crop": 0.8, "crop_mode": "center", "channel_order": "bgr", "in_model": kind != "litert",
        }  # fmt: skip
        assert [output["name"] for output in about["outputs"]] == list(given.output_names)
        assert about["sha256"] == given.sha256 and about["recipe"] == given.recipe and about["tools"] == given.tools


@pytest.mark.parametrize("kind", ["litert", "pixels", "top_k", "coreml", "image"])
def test_the_expected_outputs_are_the_models_own(model, artifacts, tmp_path, kind):
    """Read from the pictures' files, prepared by the model's preprocessing and computed by Keras."""
    platform = "ios" if kind in ("coreml", "image") else "android"
    bundle = edge.bundle(artifacts(kind), tmp_path / "out", platform)
    test = read(bundle.model / "selftest.json")
    pixels = np.stack([np.asarray(Image.open(bundle.model / p["file"])) for p in test["pictures"]])
    assert pixels.shape == (10, 24, 32, 3) and pixels.dtype == np.uint8 and bundle.pictures == 10
    logits = model.predict(PREPROCESSING.normalize(pixels), verbose=0)
    assert [p["class"] for p in test["pictures"]] == logits.argmax(-1).tolist()
    assert len(set(logits.argmax(-1))) > 1  # a model that always says the same would be no test
    expected = logits
    if kind in ("pixels", "image", "top_k"):
        expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    if kind == "top_k":
        expected = -np.sort(-expected)[:, :3]
    error = np.abs(expected - [p["output"] for p in test["pictures"]]).max()
    assert error <= (test["tolerance"]["gpu"] if platform == "ios" else 1e-5 * np.abs(expected).max())
    assert test["tolerance"] == bundle.tolerance and test["computed_by"]


@pytest.mark.parametrize(
    ("kind", "platform", "head"),
    [("one_logit", "android", "sigmoid"), ("one_probability", "web", "softmax"), ("one_image", "ios", "softmax")],
)
def test_a_single_class_is_there_or_not(one_class, artifacts, tmp_path, kind, platform, head):
    bundle = edge.bundle(artifacts(kind), tmp_path / "out", platform)
    about, test = read(bundle.model / "model.json"), read(bundle.model / "selftest.json")
    assert (bundle.model / "labels.txt").read_text() == "cat\n"
    pixels = np.stack([np.asarray(Image.open(bundle.model / p["file"])) for p in test["pictures"]])
    logits = one_class.predict(PREPROCESSING.normalize(pixels), verbose=0)
    assert about["head"] == head
    expected = logits if head == "sigmoid" else 1 / (1 + np.exp(-logits))
    assert np.abs(expected - [p["output"] for p in test["pictures"]]).max() <= test["tolerance"]["gpu"]
    assert [p["class"] for p in test["pictures"]] == (logits[:, 0] > 0).tolist()
    assert {p["class"] for p in test["pictures"]} == {0, 1}


def test_the_output_that_tells_the_class_comes_first(artifacts, tmp_path):
    """Features beside it are left alone."""
    bundle = edge.bundle(artifacts("features"), tmp_path / "out", "web")
    outputs = [output["name"] for output in read(bundle.model / "model.json")["outputs"]]
    assert outputs[0] == artifacts("features").classification.name and len(outputs) == 2
    assert {len(p["output"]) for p in read(bundle.model / "selftest.json")["pictures"]} == {len(NAMES)}


def test_pictures_are_the_same_each_time_or_the_given_ones(artifacts, tmp_path):
    same = [edge.bundle(artifacts("litert"), tmp_path / name, "web").model for name in ("a", "b")]
    assert sha256(same[0]) == sha256(same[1])
    assert read(same[0] / "selftest.json")["pictures_are"] == "generated"

    given = photos(12)
    (tmp_path / "photos").mkdir()
    for i, x in enumerate(given):
        Image.fromarray(x).save(tmp_path / "photos" / f"{i:02}.png")
    for images in (given, tmp_path / "photos"):
        bundle = edge.bundle(artifacts("litert"), tmp_path / "given", "web", images=images)
        assert bundle.pictures == 10 and read(bundle.model / "selftest.json")["pictures_are"] == "given"
        for i in range(10):
            assert np.array_equal(Image.open(bundle.model / f"selftest/{i}.png"), PREPROCESSING.pixels(given[i]))


def test_a_grey_model_gets_grey_pictures(tmp_path):
    tiny = dict(image_size=16, patch_size=8, width=24, depth=1, heads=2, mlp_hidden=48, num_classes=3, in_channels=1)
    grey = keras_vits.create("vit_tiny_patch16_224", **tiny)
    grey.preprocessing = dataclasses.replace(PREPROCESSING, image_size=(16, 16), mean=(0.5,), std=(0.5,))
    bundle = edge.bundle(edge.litert.export(grey, tmp_path), tmp_path / "out", "android")
    with Image.open(bundle.model / "selftest/0.png") as picture:
        assert picture.mode == "L"
    assert (bundle.model / "labels.txt").read_text() == ""  # unknown: the app says "class 0"


@pytest.mark.parametrize(
    ("kind", "platform", "message"),
    [
        ("coreml", "android", r"android takes a \.tflite file; received .*\.mlpackage.*edge\.litert\.export"),
        ("keras", "web", r"web takes a \.tflite file; received .*\.keras"),
        ("litert", "ios", r"ios takes a \.mlpackage file; received .*\.tflite.*edge\.coreml\.export"),
        ("litert", "windows", "platform must be one of android, ios, web; received 'windows'"),
        ("batch", "android", r"one grey or colour frame at a time; .* takes \(2, 24, 32, 3\).*batch=1"),
    ],
)
def test_what_a_platform_cannot_use_is_refused(artifacts, tmp_path, kind, platform, message):
    with pytest.raises(ValueError, match=message):
        edge.bundle(artifacts(kind), tmp_path / "out", platform)
    assert not list(tmp_path.iterdir())


def test_other_mistakes(artifacts, tmp_path):
    given = artifacts("litert")
    with pytest.raises(ValueError, match="does not know its preprocessing"):
        edge.bundle(
            dataclasses.replace(given, inputs=(dataclasses.replace(given.input, preprocessing={}),)),
            tmp_path / "out",
            "web",
        )
    with pytest.raises(ValueError, match="has 4 classes and 1 class names"):
        dataclasses.replace(given.outputs[0], class_names=("cat",))
    with pytest.raises(ValueError, match="was changed after it was written"):
        edge.bundle(dataclasses.replace(given, sha256="0"), tmp_path / "out", "web")
    with pytest.raises(ValueError, match="no pictures for the self-test"):
        edge.bundle(given, tmp_path / "out", "web", images=tmp_path)
    with pytest.raises(ValueError, match="must be uint8"):
        edge.bundle(given, tmp_path / "out", "web", images=np.zeros((3, 24, 32, 3), "float32"))
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_replaced_and_nothing_else(artifacts, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    edge.bundle(artifacts("litert"), project, "web")  # an empty folder is nobody's
    edge.bundle(artifacts("pixels"), project, "android")
    assert sorted(p.name for p in project.iterdir()) == ["ImageClassifier.kt", "model"]
    assert [p.name for p in tmp_path.iterdir()] == ["project"]

    shutil.rmtree(project / "model")
    with pytest.raises(ValueError, match="holds something that is not a bundle"):
        edge.bundle(artifacts("litert"), project, "web")
    assert [p.name for p in project.iterdir()] == ["ImageClassifier.kt"]


def test_the_sources_read_only_what_the_files_hold(artifacts, tmp_path):
    """Kotlin and Swift are not compiled here: every name that they look up must be in a bundle."""

    def keys(value):
        if isinstance(value, list):
            return set().union(*map(keys, value))
        return set(value).union(*map(keys, value.values())) if isinstance(value, dict) else set()

    known = set()
    for platform, kind in (("android", "litert"), ("ios", "image")):
        bundle = edge.bundle(artifacts(kind), tmp_path / platform, platform)
        known = keys(read(bundle.model / "model.json")) | keys(read(bundle.model / "selftest.json"))
        text = bundle.source.read_text(encoding="utf-8")
        if platform == "android":
            used = set(re.findall(r'\bget(?:String|Int|Double|JSONObject|JSONArray)\("(\w+)"\)', text)) | {"cpu", "gpu"}
        else:
            declared = re.findall(r"^ +let `?(\w+)`?: (?!\w+\.)[\w\[\]]+$", text.split("private let folder")[0], re.M)
            used = {re.sub("([A-Z])", r"_\1", name).lower() for name in declared}
        assert {"file", "input", "shape", "mean", "channel_order", "crop_mode", "tolerance", "output"} <= used <= known
        for name in ("model.json", "labels.txt", "selftest.json"):
            assert f'"{name}"' in text and (bundle.model / name).is_file()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_examples_make_their_bundles(platform, tmp_path, monkeypatch, capsys):
    script = ROOT / "examples" / "make_bundle.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--platform", platform, "--smoke", "--out", str(tmp_path / "out")])
    runpy.run_path(str(script), run_name="__main__")
    assert "10 pictures to test itself" in capsys.readouterr().out
    written = {p.name for p in (tmp_path / "out").rglob("*")}
    assert {*PLATFORMS[platform][1:], "labels.txt", "model.json", "selftest.json", "9.png"} <= written


def test_the_command(artifacts, tmp_path, capsys):
    from keras_vits import cli

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["bundle", *map(str, arguments)])
        return stopped.value.code, *capsys.readouterr()

    file = artifacts("litert").path
    code, out, err = run(file, "--platform", "web", "--out", tmp_path / "out", "--license", "mit")
    assert code == 0 and not err and f"{tmp_path}/out/ImageClassifier.ts\n" in out and "10 pictures" in out
    assert read(tmp_path / "out" / "model" / "model.json")["license"] == "mit"
    code, _, err = run(file, "--platform", "ios", "--out", tmp_path / "ios")
    assert code == 2 and err.count("\n") == 1 and "ios takes a .mlpackage file" in err


# ---------------------------------------------------------------- the web bundle in a browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A copy of examples/web with LiteRT.js and TypeScript, which are installed once into .cache/web."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    cache = ROOT / ".cache" / "web"
    package = WEB / "package.json"
    if not (cache / "installed.json").is_file() or read(cache / "installed.json") != read(package):
        cache.mkdir(parents=True, exist_ok=True)
        shutil.copy(package, cache)
        command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(cache)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode == 0:
                shutil.copy(package, cache / "installed.json")
        if not (cache / "installed.json").is_file():
            pytest.skip("npm could not install @litertjs/core and typescript")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(WEB, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("bundle", "dist", "node_modules"))
    (folder / "node_modules").symlink_to(cache / "node_modules")
    return folder


def tsc(site):
    return subprocess.run(
        [shutil.which("node"), site / "node_modules/typescript/bin/tsc"], cwd=site, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def browse(site, artifacts):
    """Opens the example in headless Chromium with a bundle; returns what the page reports."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium")
    reports = queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".wasm": "application/wasm"}

        def do_POST(self):
            reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    bundled(artifacts("litert"), site)
    compiled = tsc(site)
    assert compiled.returncode == 0, compiled.stdout

    def browse(page="index.html", **parameters):
        query = urllib.parse.urlencode({"report": "/report", **parameters})
        url = f"http://127.0.0.1:{server.server_port}/{page}?{query}"
        options = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage".split()
        profile = site / "profile"
        process = subprocess.Popen(
            [chromium, *options, f"--user-data-dir={profile}", url],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(site)},  # where it may leave folders
        )
        try:
            return reports.get(timeout=60)
        finally:
            process.terminate()
            process.wait(10)
            shutil.rmtree(profile, ignore_errors=True)

    yield browse
    server.shutdown()


def bundled(artifact, site):
    """A bundle for the page, in place of what was there, which a test may have changed."""
    shutil.rmtree(site / "bundle", ignore_errors=True)
    return edge.bundle(artifact, site / "bundle", "web")


@pytest.mark.parametrize(
    "kind", ["litert", "pixels", "top_k", "dynamic_int8", "features", "one_logit", "one_probability"]
)
def test_the_web_bundle_passes_its_test_in_a_browser(browse, site, artifacts, kind):
    bundle = bundled(artifacts(kind), site)
    Image.fromarray(photos(1)[0]).save(site / "photo.png")
    report = browse("index.html", picture="photo.png")
    assert "error" not in report, report
    test = report["selfTest"]
    assert test["passed"] and test["pictures"] == 10 and test["agreement"] == 1
    assert 0 < test["maxError"] <= test["tolerance"] == bundle.tolerance["cpu"]

    given = artifacts(kind)
    image = PREPROCESSING.pixels(photos(1)[0]) if kind == "pixels" else PREPROCESSING(photos(1)[0])
    scores = edge.litert.load(given).predict(image[None])
    scores = (scores[given.classification.name] if isinstance(scores, dict) else scores)[0]
    (found,) = report["labels"]
    names = given.classification.class_names
    assert len(found) == (3 if kind == "top_k" else len(names)) and all(p["label"] == names[p["index"]] for p in found)
    if kind != "top_k":
        expected = best(scores, given.classification, 4)
        assert [p["label"] for p in found] == [p.label for p in expected]
        scores = [p.probability for p in expected]
    assert [p["probability"] for p in found] == pytest.approx(scores, abs=0.05)  # one resampling is not the other


@pytest.mark.parametrize("size", [(600, 900), (90, 70)])
def test_a_frame_is_prepared_as_preprocessing_does_it(browse, site, artifacts, size):
    """In all crop modes, to the pixel but for the browser's own filter."""
    bundled(artifacts("litert"), site)
    Image.fromarray(photos(1, size)[0]).save(site / "photo.png")
    modes = ("center", "squash", "border")
    script = """
        import {ImageClassifier} from './dist/bundle/ImageClassifier.js';
        const classifier = await ImageClassifier.load('bundle/model', {wasm: 'node_modules/@litertjs/core/wasm'});
        const bitmap = await createImageBitmap(await (await fetch('photo.png')).blob());
        const prepared = %s.map((mode) => {
          classifier.description.preprocessing.crop_mode = mode;
          return Array.from(classifier.draw(bitmap, ...classifier.resized(bitmap.width, bitmap.height)));
        });
        await fetch('/report', {method: 'POST', body: JSON.stringify(prepared)});
    """
    head = (site / "index.html").read_text().split('<script type="module"')[0]
    (site / "prepare.html").write_text(f'{head}<script type="module">{script % json.dumps(modes)}</script></head>')
    for mode, prepared in zip(modes, browse("prepare.html"), strict=True):
        found = np.reshape(prepared, (24, 32, 4))[..., :3]
        expected = dataclasses.replace(PREPROCESSING, crop_mode=mode).pixels(photos(1, size)[0])
        error = np.abs(found - expected)
        assert error.mean() < 2 and error.max() <= 8, (mode, error.mean(), error.max())


def test_the_browser_tells_what_is_wrong(browse, site, artifacts):
    bundle = bundled(artifacts("litert"), site)

    def change(name, edit):
        content = read(bundle.model / name)
        edit(content)
        (bundle.model / name).write_text(json.dumps(content))
        return browse()

    def other_output(test):
        test["pictures"][7]["output"][2] += 3 * bundle.tolerance["cpu"]

    found = change("selftest.json", other_output)["selfTest"]
    assert not found["passed"] and 2 < found["maxError"] / found["tolerance"] < 4

    found = change("selftest.json", lambda test: test["pictures"][0]["output"].__setitem__(0, "not a number"))[
        "selfTest"
    ]
    assert not found["passed"] and found["maxError"] is None  # NaN, though later pictures have none

    bundled(artifacts("litert"), site)
    found = change("model.json", lambda about: about["preprocessing"].update(channel_order="rgb"))["selfTest"]
    assert not found["passed"] and found["maxError"] / found["tolerance"] > 10

    (bundle.model / "labels.txt").unlink()
    assert "labels.txt: 404" in browse()["error"]


def test_typescript_finds_a_wrong_call(browse, site):
    main = site / "main.ts"
    text = main.read_text()
    main.write_text(text.replace("classifier.classify(frame)", "classifier.classify(42)"))
    try:
        done = tsc(site)
    finally:
        main.write_text(text)
    assert done.returncode != 0 and "main.ts" in done.stdout and "ImageBitmapSource" in done.stdout
