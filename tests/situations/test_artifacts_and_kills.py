"""What happens to files: names, hashes, descriptions, kills, and what of the user's lies beside them.

Numbers are those of the reported cases. One file, since its parts share the artifacts that are written once.
"""

import builtins
import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import warnings

import keras
import msgspec
import numpy as np
import pytest
from PIL import Image

import keras_vits
from keras_vits import edge
from keras_vits._util import files, scratch
from keras_vits.cli import demo_job
from keras_vits.edge import artifact as artifacts
from keras_vits.edge.devices.ios import write_steps
from keras_vits.edge.evidence.report import Row, report
from keras_vits.edge.targets.coreml.compress import COMPRESSORS
from keras_vits.edge.tune.sensitivity import LayerNoise, Sensitivity
from keras_vits.preprocess import Preprocessing
from keras_vits.training import fit
from keras_vits.training._record import read_record
from keras_vits.training.data import Pictures

pytestmark = pytest.mark.once

TARGETS = {"litert": edge.litert, "onnx": edge.onnx, "coreml": edge.coreml, "keras": edge.keras_file}
SUFFIXES = {"litert": "_float32.tflite", "onnx": "_float32.onnx", "coreml": "_float16.mlpackage", "keras": ".keras"}


def make(seed=0, classes=3):
    tiny = dict(image_size=16, patch_size=8, width=24, depth=1, heads=2, mlp_hidden=24, num_classes=classes)
    model = keras_vits.create("vit_tiny_patch16_224", **tiny)
    random = np.random.default_rng(seed)
    model.set_weights([random.normal(0, 0.3, w.shape) for w in model.weights])
    model.class_names = [f"class {i}" for i in range(classes)]
    return model


@pytest.fixture(scope="module")
def models():
    return make(0), make(1)


@pytest.fixture(scope="module")
def folder_of(models, tmp_path_factory):
    """Format -> an artifact of the first model, written once; copied by those who change it."""
    folder = tmp_path_factory.mktemp("written")
    return {name: module.export(models[0], folder, name="v") for name, module in TARGETS.items()}


def copied(artifact, folder):
    """The same artifact in another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / artifact.path.name
    (shutil.copytree if artifact.path.is_dir() else shutil.copy)(artifact.path, path)
    shutil.copy(artifacts.sidecar(artifact.path), artifacts.sidecar(path))
    return dataclasses.replace(artifact, path=path)


def described(artifact, change):
    """Changes the .json beside a file, by a function of its fields; the hash in it stays the file's."""
    beside = artifacts.sidecar(artifact.path)
    fields = json.loads(beside.read_text())
    change(fields)
    beside.write_text(json.dumps(fields))
    return artifact


def content(folder):
    """Path -> bytes of everything in a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------- edge 10: one name, two files


@pytest.mark.parametrize("format", TARGETS)
def test_a_second_model_does_not_take_the_name_of_the_first(format, models, folder_of, tmp_path):
    module, first = TARGETS[format], copied(folder_of[format], tmp_path)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"is there already, and is another file: give another name .* overwrite=True"):
        module.export(models[1], tmp_path, name="v")
    assert content(tmp_path) == before
    again = module.export(models[0], tmp_path, name="v")  # the same bytes are no other file
    assert again.sha256 == first.sha256 and artifacts.load(again.path).sha256 == first.sha256

    second = module.export(models[1], tmp_path, name="v", overwrite=True)
    assert artifacts.load(second.path) == second and second.sha256 != first.sha256
    with pytest.raises(ValueError, match="changed after it was written, so that it is not the file of this Artifact"):
        module.load(first)
    with pytest.raises(ValueError, match="is not the file of this Artifact"):
        edge.verify(first, models[0], np.zeros((1, 16, 16, 3), "float32"))
    if format != "keras":
        recipe = {"litert": "dynamic_int8", "onnx": "dynamic_int8", "coreml": "int8"}[format]
        with pytest.raises(ValueError, match="is not the file of this Artifact"):
            module.quantize(first, recipe)
        assert module.quantize(second, recipe).recipe == recipe
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_every_use_of_a_stale_artifact_says_so(models, tmp_path):
    stale = edge.litert.export(models[0], tmp_path, name="v")
    check = edge.verify(stale, models[0], np.zeros((1, 16, 16, 3), "float32"))
    edge.litert.export(models[0], tmp_path, name="v", batch=4, overwrite=True)
    x = np.zeros((4, 16, 16, 3), "float32")
    uses = {
        "benchmark": lambda: edge.benchmark(stale),
        "profile": lambda: edge.profile(stale),
        "sensitivity": lambda: edge.sensitivity(stale, x),
        "bundle": lambda: edge.bundle(stale, tmp_path / "app", "android"),
        "report": lambda: report([Row(stale, check)], tmp_path / "report.html"),
    }
    for use, run in uses.items():
        with pytest.raises(ValueError, match="is not the file of this Artifact"):
            run()
            pytest.fail(use)
    assert sorted(os.listdir(tmp_path)) == ["v_float32.tflite", "v_float32.tflite.json"]


@pytest.mark.parametrize("options", [dict(batch=4), dict(uint8_input=True), dict(head="softmax"), dict(layout="nchw")])
def test_other_options_do_not_take_the_name(options, models, folder_of, tmp_path):
    for format in ("litert", "onnx"):
        copied(folder_of[format], tmp_path)
        with pytest.raises(ValueError, match="overwrite=True"):
            TARGETS[format].export(models[0], tmp_path, name="v", **options)


def test_other_layers_in_float_do_not_take_the_name(folder_of, tmp_path):
    file = copied(folder_of["onnx"], tmp_path)
    first = edge.onnx.quantize(file, "dynamic_int8", float_layers=["head"])
    with pytest.raises(ValueError, match="overwrite=True"):
        edge.onnx.quantize(file, "dynamic_int8", float_layers=["block_0"])
    assert artifacts.load(first.path) == first


@pytest.mark.parametrize("format", ["litert", "onnx"])
def test_a_layer_that_is_named_twice_counts_once(format, folder_of, tmp_path):  # edge 23
    file = copied(folder_of[format], tmp_path)
    made = TARGETS[format].quantize(file, "dynamic_int8", float_layers=["head", "head"])
    assert made.path.stem == "v_dynamic_int8_float1"


def test_a_change_is_seen_whatever_the_times_say(folder_of, tmp_path):
    """Of the same size, at once after the last look, and with the old times put back."""
    file = copied(folder_of["litert"], tmp_path)
    old = os.stat(file.path)
    for _ in range(3):
        assert artifacts.check(file) is file
        whole = bytearray(file.path.read_bytes())
        whole[-1] ^= 1
        file.path.write_bytes(whole)
        os.utime(file.path, ns=(old.st_atime_ns, old.st_mtime_ns))
        with pytest.raises(ValueError, match="changed after it was written"):
            artifacts.check(file)
        whole[-1] ^= 1
        file.path.write_bytes(whole)


def test_a_file_is_not_read_again_for_nothing(folder_of, tmp_path, monkeypatch):
    file = copied(folder_of["litert"], tmp_path)
    monkeypatch.setattr(files, "FRESH_SECONDS", -1.0)  # as if it were older
    artifacts.check(file)
    monkeypatch.setattr(files, "sha256", lambda path: pytest.fail("read again"))
    artifacts.check(file)
    artifacts.load(file.path)


# ---------------------------------------------------------------- edge 23, robust 2: names

BAD_NAMES = ("a/b", "../../x", "", ".", "..", ".hidden", "a\\b", "nul\0", "a\nb", "x" * 300, "con", "C:x", " a", 7)


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:12])
def test_a_name_is_one_plain_file_name(name, models, tmp_path):
    for module in TARGETS.values():
        with pytest.raises(ValueError, match="must be one plain file name") as caught:
            module.export(models[0], tmp_path / "out", name=name)
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_usual_names_are_taken(models, tmp_path):
    for name in ("model v2.1 (final)", "модель", "a" * 150, "with-dash_and+plus"):
        assert edge.litert.export(models[0], tmp_path, name=name).path.is_file()


@pytest.mark.parametrize("name", ["../../x", "/x", "a/b", ".x", ""])
def test_a_description_cannot_choose_where_files_go(name, folder_of, tmp_path):  # robust 2
    file = described(copied(folder_of["litert"], tmp_path / "a" / "b"), lambda fields: fields.update(model=name))
    with pytest.raises(ValueError, match=r"is not a description of an artifact .*must be one plain file name"):
        artifacts.load(file.path)
    with pytest.raises(ValueError, match="must be one plain file name"):
        edge.litert.quantize(dataclasses.replace(file, model=f"{name}/"), "float16")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and len(os.listdir(tmp_path / "a" / "b")) == 2


# ---------------------------------------------------------------- robust 8: the description is the file's


def _input(**changes):
    return lambda fields: fields["inputs"][0].update(changes)


def _output(**changes):
    return lambda fields: fields["outputs"][0].update(changes)


def _preprocessing(**changes):
    return lambda fields: fields["inputs"][0]["preprocessing"].update(changes)


LIES = {
    "dtype": _input(dtype="uint8"),
    "dtype that is none": _input(dtype="float99"),
    "shape": _input(shape=[1, 32, 32, 3]),
    "batch": _input(shape=[4, 16, 16, 3]),
    "layout": _input(layout="nchw"),
    "layout that is none": _input(layout="hwcn"),
    "input name": _input(name="picture"),
    "output name": _output(name="scores"),
    "output shape": _output(shape=[1, 4]),
    "classes": lambda fields: fields["outputs"][0].update(classes=2, class_names=["a", "b"], shape=[]),
    "kind": _output(kind=None),
    "top-k": _output(kind="top_classes"),
    "two outputs": lambda fields: fields["outputs"].append({**fields["outputs"][0], "name": "more"}),
    "no outputs": lambda fields: fields.update(outputs=[]),
    "two inputs": lambda fields: fields["inputs"].append({**fields["inputs"][0], "name": "more"}),
    "format": lambda fields: fields.update(format="onnx" if fields["format"] == "litert" else "litert"),
    "std of 0": _preprocessing(std=[0.5, 0.0, 0.5]),
    "std of NaN": _preprocessing(std=[0.5, float("nan"), 0.5]),
    "std that is infinite": _preprocessing(std=[0.5, float("inf"), 0.5]),
    "mean of two": _preprocessing(mean=[0.5, 0.5]),
    "crop": _preprocessing(crop=7),
    "unknown field": _preprocessing(brightness=1),
    "image size": _preprocessing(image_size=[0, 16]),
    "mean": _preprocessing(mean=[0.4, 0.5, 0.5]),
    "std": _preprocessing(std=[0.5, 0.5, 0.4]),
    "class names in another order": lambda fields: fields["outputs"][0]["class_names"].reverse(),
    "another class": lambda fields: fields["outputs"][0]["class_names"].__setitem__(0, "plum"),
}
UNKNOWN_TO = {  # what a file does not say of itself
    "keras": {"input name", "output name", "output shape", "classes", "top-k", "two outputs"},
    "coreml": set(),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("format", TARGETS)
def test_a_description_that_does_not_fit_its_file_is_refused(format, lie, folder_of, tmp_path):
    if lie in UNKNOWN_TO.get(format, ()):
        pytest.skip("the file does not say it")
    file = described(copied(folder_of[format], tmp_path), LIES[lie])
    with pytest.raises(ValueError, match=r"does not describe|is not a description") as caught:
        artifacts.load(file.path)
    assert "export the model again" in str(caught.value).lower() and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(batch=2, layout="nchw"),
        dict(uint8_input=True, head="softmax"),
        dict(head="top_k", top_k=2),
        dict(features=[0, "pool"]),
    ],
    ids=str,
)
def test_a_description_that_we_write_fits(options, models, tmp_path):
    for format in ("litert", "onnx"):
        made = TARGETS[format].export(models[0], tmp_path, name="v", **options)
        assert artifacts.load(made.path) == made
        if format == "litert" and "features" in options:
            two = {"classify": [made.output_names[0]], "embed": ["pool"]}
            made = edge.litert.export(models[0], tmp_path, name="two", signatures=two, **options)
            assert artifacts.load(made.path) == made


def test_a_picture_input_and_a_classifier_fit_their_description(models, tmp_path):
    for name, options in {
        "picture": dict(image_input=True),
        "numbers": dict(precision="float32", batch=2),
        "ane": dict(layout="ane"),
        "features": dict(features=[0, "pool"]),
    }.items():
        made = edge.coreml.export(models[0], tmp_path, name=name, **options)
        assert artifacts.load(made.path) == dataclasses.replace(made)


def test_several_inputs_and_outputs_fit_their_description(tmp_path):
    for format in ("litert", "onnx", "coreml"):
        dtype = "float32" if format == "coreml" else "int32"
        a, b = keras.Input((4, 4, 3), name="a"), keras.Input((5,), name="b", dtype=dtype)
        y = keras.layers.Dense(4, name="one")(keras.layers.Flatten()(a))
        z = keras.layers.Dense(2, activation="softmax", name="two")(keras.ops.cast(b, "float32"))
        made = TARGETS[format].export(keras.Model([a, b], {"y": y, "z": z}, name="several"), tmp_path)
        assert artifacts.load(made.path) == made and len(made.inputs) == len(made.outputs) == 2


@pytest.mark.parametrize("format", ["litert", "onnx", "coreml", "keras"])
def test_damaged_bytes_are_one_sentence_even_with_the_right_hash(format, folder_of, tmp_path):
    """Whoever can write the file can write its hash, too."""
    random = np.random.default_rng(0)
    whole = folder_of[format]
    inside = whole.path / "Data/com.apple.CoreML/model.mlmodel" if format == "coreml" else whole.path
    original = inside.read_bytes()
    for i in range(60):
        file = copied(whole, tmp_path / str(i))
        damaged = file.path / inside.relative_to(whole.path) if format == "coreml" else file.path
        bytes_ = bytearray(original[: random.integers(1, len(original))] if i % 3 == 0 else original)
        for place in random.integers(0, min(len(bytes_), 4096), 8):
            bytes_[place] = random.integers(256)
        damaged.write_bytes(bytes_)
        digest = files.sha256(file.path)
        described(file, lambda fields, digest=digest: fields.update(sha256=digest))
        with contextlib.suppress(ValueError):
            artifacts.load(file.path)


@pytest.fixture(scope="module")
def quantized(models, tmp_path_factory):
    """A file of integers, and a float one of a model that was fine-tuned for them."""
    folder, images = tmp_path_factory.mktemp("quantized"), np.zeros((4, 16, 16, 3), "float32")
    images[:] = np.linspace(-1, 1, 4)[:, None, None, None]
    first = edge.litert.quantize(edge.litert.export(models[0], folder, name="v"), "static_int8", images)
    tuned = edge.litert.export(edge.qat(models[0], "static_int8", images), folder, name="tuned")
    return first, tuned


RANGES = {
    "limits in the wrong order": lambda ranges: ranges.update({next(iter(ranges)): [1.0, -1.0]}),
    "one limit": lambda ranges: ranges.update({next(iter(ranges)): [1.0]}),
    "text": lambda ranges: ranges.update({next(iter(ranges)): "/etc/passwd"}),
    "nothing of a layer": lambda ranges: ranges.pop(next(name for name in ranges if "fc1" in name)),
    "absurd": lambda ranges: ranges.update({name: [-1e308, 1e308] for name in ranges}),
}


@pytest.mark.parametrize("damage", [*RANGES, "another field", "mean of one channel"])
def test_damaged_ranges_of_a_fine_tuning_are_told_with_their_file(damage, quantized, tmp_path):
    def change(fields):
        told = fields["trained_for"]
        if damage in RANGES:
            RANGES[damage](told["ranges"])
        elif damage == "another field":
            told["RANGES"] = told.pop("ranges")
        else:
            told["mean"] = [0.5]

    file = described(copied(quantized[1], tmp_path), change)
    with pytest.raises(ValueError, match=r"tuned_float32\.tflite\.json has .*range") as caught:
        edge.litert.quantize(artifacts.load(file.path), "static_int8")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*int8*"))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-40, 1e-15, 1e8])
def test_a_scale_that_would_end_the_process_is_refused(scale, quantized, tmp_path):
    """Whoever can write the file can write its hash, too: LiteRT believes every scale."""
    from keras_vits.edge.targets.litert.flatbuffer import File

    assert artifacts.load(quantized[0].path) == quantized[0]
    whole = quantized[0].path.read_bytes()
    parsed = File(whole)
    dense = next(op for op in parsed.main.operators if parsed.builtin(op) == "FULLY_CONNECTED")
    old = float(parsed.main.tensors[dense.outputs[0]].quantization.scale[0])
    file = copied(quantized[0], tmp_path)
    file.path.write_bytes(whole.replace(struct.pack("<f", old), struct.pack("<f", scale)))
    digest = files.sha256(file.path)
    described(file, lambda fields: fields.update(sha256=digest))
    with pytest.raises(ValueError, match=r"does not describe .*(has a scale or a zero point|the scale of) .*"):
        artifacts.load(file.path)


@pytest.mark.parametrize("damage", ["a field of another type", "weights without a file"])
def test_a_package_that_coremltools_cannot_read_is_named(damage, folder_of, tmp_path):
    file = copied(folder_of["coreml"], tmp_path)
    if damage == "a field of another type":
        manifest = json.loads((file.path / "Manifest.json").read_text())
        next(iter(manifest["itemInfoEntries"].values()))["author"] = []
        (file.path / "Manifest.json").write_text(json.dumps(manifest))
    else:
        manifest = json.loads((file.path / "Manifest.json").read_text())
        manifest["itemInfoEntries"] = {
            key: item for key, item in manifest["itemInfoEntries"].items() if key == manifest["rootModelIdentifier"]
        }
        (file.path / "Manifest.json").write_text(json.dumps(manifest))
    digest = files.sha256(file.path)
    described(file, lambda fields: fields.update(sha256=digest))
    with pytest.raises(ValueError, match=r"v_float16\.mlpackage cannot be read") as caught:
        edge.coreml.quantize(artifacts.load(file.path), "int8")
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*int8*"))


def test_a_damaged_onnx_file_is_one_sentence_and_nothing_else(folder_of, tmp_path, capfd):
    file = copied(folder_of["onnx"], tmp_path)
    whole = file.path.read_bytes()
    assert b"MatMul" in whole
    file.path.write_bytes(whole.replace(b"MatMul", b"Mat\xa0ul", 1))
    digest = files.sha256(file.path)
    described(file, lambda fields: fields.update(sha256=digest))
    capfd.readouterr()
    with pytest.raises(ValueError, match=r"v_float32\.onnx cannot be run: it is truncated, damaged"):
        edge.onnx.load(artifacts.load(file.path))
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- robust 1: nothing of the user's is lost


@pytest.mark.parametrize("format", TARGETS)
def test_a_folder_of_the_users_is_not_removed(format, models, tmp_path):
    module = TARGETS[format]
    place = tmp_path / f"v{SUFFIXES[format]}"
    place.mkdir()
    (place / "precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"is a folder, and a file|holds precious, which nothing here wrote"):
            module.export(models[0], tmp_path, name="v", overwrite=overwrite)
    assert content(tmp_path) == {f"{place.name}/precious": b"x"}
    shutil.rmtree(place)
    beside = tmp_path / f"v{SUFFIXES[format]}.json"
    beside.write_text("my notes")
    with pytest.raises(ValueError, match="is no description of a file"):
        module.export(models[0], tmp_path, name="v")
    assert content(tmp_path) == {beside.name: b"my notes"}


def test_a_file_of_the_users_is_not_replaced(models, tmp_path):
    for suffix in SUFFIXES.values():
        (tmp_path / f"v{suffix}").write_text("mine")
    for module in TARGETS.values():
        with pytest.raises(ValueError, match=r"is there already|is a file, and a folder"):
            module.export(models[0], tmp_path, name="v")
    assert set(content(tmp_path).values()) == {b"mine"}


def test_a_package_with_a_file_of_the_users_is_not_replaced(models, folder_of, tmp_path):
    file = copied(folder_of["coreml"], tmp_path)
    (file.path / "Data" / "precious").write_text("x")
    with pytest.raises(ValueError, match="holds Data/precious, which nothing here wrote"):
        edge.coreml.export(models[1], tmp_path, name="v", overwrite=True)
    assert (file.path / "Data" / "precious").read_text() == "x"


def test_a_report_takes_the_place_of_a_report_and_of_nothing_else(folder_of, tmp_path):
    rows = [Row(copied(folder_of["litert"], tmp_path / "files"))]
    (tmp_path / "page.html").mkdir()
    (tmp_path / "README.md").write_text("mine")
    for name, message in (("page", "is a folder"), ("README", "is no report")):
        with pytest.raises(ValueError, match=message):
            report(rows, tmp_path / f"{name}.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "files", "page.html"]
    (tmp_path / "empty.html").touch()
    for name in ("empty", "empty"):
        assert report(rows, tmp_path / f"{name}.html").html.stat().st_size > 1000


def test_a_second_bundle_keeps_what_is_the_users(models, folder_of, tmp_path):
    app = tmp_path / "app"
    first = edge.bundle(folder_of["litert"], app, "android")
    assert first.kept == ()
    (app / "MyOwnCode.kt").write_text("mine")
    (app / "lib").mkdir()
    (app / "lib" / "more.kt").write_text("mine")
    (app / "model" / "notes.txt").write_text("mine")
    with open(app / "ImageClassifier.kt", "a") as source:
        source.write("// edited")
    edited = (app / "ImageClassifier.kt").read_bytes()
    other = edge.litert.export(models[1], tmp_path / "other", name="v")
    second = edge.bundle(other, app, "android")
    assert [p.as_posix() for p in second.kept] == ["ImageClassifier.kt", "MyOwnCode.kt", "lib", "model/notes.txt"]
    assert (app / "ImageClassifier.kt").read_bytes() == edited
    assert files.sha256(app / "model" / "model.tflite") == other.sha256
    assert json.loads((app / "model" / "model.json").read_text())["sha256"] == other.sha256

    web = edge.bundle(other, app, "web")  # the Kotlin file is not the bundle's any more: it was edited
    assert web.source.is_file() and (app / "ImageClassifier.kt").read_bytes() == edited
    assert "ImageClassifier.kt" in [p.name for p in web.kept]

    (app / "model" / "labels.txt").write_text("Katze\nHund\nMaus\n")  # it would not fit a new model: not silently
    before = content(app)
    with pytest.raises(ValueError, match=r"labels\.txt is not what the bundle wrote there"):
        edge.bundle(folder_of["litert"], app, "web")
    assert content(app) == before


def test_a_folder_that_looks_like_a_bundle_is_none(folder_of, tmp_path):
    """`model/model.json` alone is no list of what a bundle wrote."""
    (tmp_path / "work" / "model").mkdir(parents=True)
    (tmp_path / "work" / "model" / "model.json").write_text("{}")
    (tmp_path / "work" / "thesis.txt").write_text("years")
    before = content(tmp_path)
    for listed in (
        None,
        b'{"files": {}}',
        b'{"files": {"../thesis.txt": ["0"]}}',
        b"[]",
        b'{"files": {"/etc/passwd": []}}',
        b'{"files": {"\xf8": ["0"]}}',  # no text
        b'{"files": ' + b"[" * 9999,
    ):
        if listed:
            (tmp_path / "work" / "model" / "files.json").write_bytes(listed)
        with pytest.raises(ValueError, match="holds something that is not a bundle"):
            edge.bundle(folder_of["litert"], tmp_path / "work", "android")
    (tmp_path / "work" / "model" / "files.json").unlink()
    assert content(tmp_path) == before
    with pytest.raises(ValueError, match="is not a bundle"):
        edge.bundle(folder_of["litert"], tmp_path / "work" / "thesis.txt", "android")


# ---------------------------------------------------------------- robust 11, 18, 20


@pytest.mark.parametrize("where", ["/etc/passwd", "../../other.mlpackage/Data/com.apple.CoreML/model.mlmodel", "link"])
def test_a_package_reads_nothing_outside_of_itself(where, folder_of, tmp_path):  # robust 11
    other, file = copied(folder_of["coreml"], tmp_path / "other"), copied(folder_of["coreml"], tmp_path)
    model = file.path / "Data" / "com.apple.CoreML"
    manifest = json.loads((file.path / "Manifest.json").read_text())
    if where == "link":
        shutil.copy(other.path / "Data/com.apple.CoreML/model.mlmodel", tmp_path / "stolen.mlmodel")
        (model / "model.mlmodel").unlink()
        (model / "model.mlmodel").symlink_to(tmp_path / "stolen.mlmodel")
    else:
        for item in manifest["itemInfoEntries"].values():
            item["path"] = where
        (file.path / "Manifest.json").write_text(json.dumps(manifest))
    digest = files.sha256(file.path)
    described(file, lambda fields: fields.update(sha256=digest))
    with pytest.raises(ValueError, match="outside of the package"):
        artifacts.load(file.path)
    with pytest.raises(ValueError, match="outside of the package"):
        edge.coreml.load(dataclasses.replace(file, sha256=digest))


@pytest.mark.parametrize("name", ["@model_path/../../../../other/weight.bin", "/{tmp}/other/weight.bin"])
def test_weights_come_from_the_package(name, folder_of, tmp_path):  # robust 11
    file = copied(folder_of["coreml"], tmp_path)
    model = file.path / "Data/com.apple.CoreML/model.mlmodel"
    (tmp_path / "other").mkdir()
    shutil.copy(file.path / "Data/com.apple.CoreML/weights/weight.bin", tmp_path / "other" / "weight.bin")
    proto = edge.coreml.coremltools().proto.Model_pb2.Model.FromString(model.read_bytes())
    block = next(iter(proto.mlProgram.functions["main"].block_specializations.values()))
    for op in block.operations:
        if op.attributes["val"].WhichOneof("value") == "blobFileValue":
            op.attributes["val"].blobFileValue.fileName = name.format(tmp=tmp_path)
    model.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="outside of the package"):
        edge.coreml.load(dataclasses.replace(file, sha256=files.sha256(file.path)))


def test_files_can_be_read_by_whom_the_user_lets_read_files(models, tmp_path):  # robust 18
    (tmp_path / "probe").touch()
    (tmp_path / "folder").mkdir()
    usual, folder = ((tmp_path / name).stat().st_mode & 0o777 for name in ("probe", "folder"))
    for module in TARGETS.values():
        module.export(models[0], tmp_path / "out")
    edge.bundle(
        edge.coreml.export(models[0], tmp_path / "out", image_input=True, name="image"), tmp_path / "app", "ios"
    )
    for path in [*(tmp_path / "out").rglob("*"), *(tmp_path / "app").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (folder if path.is_dir() else usual), path


def test_a_keras_file_that_was_changed_is_refused_everywhere(models, folder_of, tmp_path):  # robust 20
    file, other = copied(folder_of["keras"], tmp_path), edge.keras_file.export(models[1], tmp_path / "other", name="v")
    shutil.copy(other.path, file.path)  # a whole file, of another model
    for read in (
        lambda: keras_vits.load(file.path),
        lambda: artifacts.load(file.path),
        lambda: edge.keras_file.load(file),
        lambda: edge.verify(file, models[0], np.zeros((1, 16, 16, 3), "float32")),
        lambda: edge.benchmark(file),
    ):
        with pytest.raises(ValueError, match="truncated or was changed after it was written"):
            read()


# ---------------------------------------------------------------- robust 12: kills, and what they leave

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CALLS = {  # every way in which Python changes a file system -> whether it does in a call
    (os, "open"): lambda path, flags, *_, **__: bool(flags & WRITING),
    (io, "open"): lambda path, mode="r", *_, **__: bool(set(mode) & set("wax+")),
    (builtins, "open"): lambda path, mode="r", *_, **__: bool(set(mode) & set("wax+")),
}
CALLS |= {
    (os, name): lambda *_, **__: True for name in "replace rename mkdir unlink remove rmdir chmod symlink".split()
}


class Kills:
    """What a kill at each step of an operation leaves, and what the next run makes of it.

    Before each call that changes the file system, the folders are copied as the disk has them: that is what a process
    killed there leaves. Then the operation runs again in each of these states.

    Args:
        tmp_path: of the test.
        monkeypatch: that puts the system's temporary folder there.
    """

    USERS = {"notes.txt": b"mine", ".hidden": b"mine", "v_float32.tflite.d/more": b"mine", ".keras_vits_mine": b"mine"}

    def __init__(self, tmp_path, monkeypatch):
        self.both, self.states, self.monkeypatch = tmp_path / "both", tmp_path / "states", monkeypatch
        self.out, self.system = self.both / "out", self.both / "system"
        self.out.mkdir(parents=True)
        self.system.mkdir()
        self.states.mkdir()
        scratch.close()
        monkeypatch.setattr(tempfile, "tempdir", str(self.system))
        monkeypatch.setattr(os, "fsync", lambda _: None)  # what is copied is what Python sees, on the disk or not
        for name, text in self.USERS.items():
            (self.out / name).parent.mkdir(exist_ok=True)
            (self.out / name).write_bytes(text)

    def recorded(self, operation):
        """Runs the operation; the states before each of its steps, each once."""
        seen, found, busy = set(), [], False

        def spy(module, name, changes):
            real = getattr(module, name)

            def call(*args, **options):
                nonlocal busy
                path = "" if not args or isinstance(args[0], int) else os.fsdecode(args[0])
                inside = not os.path.isabs(path) or path.startswith(str(self.both))
                if not busy and inside and changes(*args, **options):
                    busy = True
                    try:
                        state = tree(self.both)
                        if state not in seen:
                            seen.add(state)
                            found.append(self.states / str(len(found)))
                            shutil.copytree(self.both, found[-1], symlinks=True)
                    finally:
                        busy = False
                return real(*args, **options)

            return call

        with self.monkeypatch.context() as patched:
            for (module, name), changes in CALLS.items():
                patched.setattr(module, name, spy(module, name, changes))
            operation()
            scratch.close()
        return found

    def __call__(self, operation, check):
        """`check(whether it is done)` looks at the folder after a kill and after the next run; the number of kills."""
        states = self.recorded(operation)
        check(True)
        for state in states:
            shutil.rmtree(self.both)
            shutil.copytree(state, self.both)
            self.users(state)
            check(False)
            operation()
            scratch.close()
            self.users(state)
            check(True)
            scratch.close()  # what the check itself opened
            left = [p.name for p in self.out.rglob(".keras_vits*") if p.name not in self.USERS]
            assert not left and not os.listdir(self.system), f"{state} left {left}, {os.listdir(self.system)}"
        return len(states)

    def users(self, state):
        found = content(self.out)
        assert {name: found.get(name) for name in self.USERS} == self.USERS, f"{state}: a file of the user's is changed"


def tree(folder):
    return tuple(sorted((str(p), p.read_bytes() if p.is_file() else None) for p in folder.rglob("*")))


@pytest.fixture
def kills(tmp_path, monkeypatch):
    return Kills(tmp_path, monkeypatch)


def prepared(model):
    """A traced model, given to an exporter in place of the tracing."""
    from keras_vits.edge.targets import _prepare

    ready = _prepare.prepare(model, name="v")
    return lambda *_, **__: ready


def converted(package):
    """A package that coremltools made in our folder for such ones, given to the exporter in place of the conversion."""
    from keras_vits.edge.targets.coreml import common

    def write(*_, **__):
        with scratch.redirected(*common.MAKERS) as folder:
            shutil.copytree(package, folder / "made.mlpackage")
        model = common.coremltools().models.MLModel(str(folder / "made.mlpackage"), skip_model_load=True)
        return common.tied(model, folder)

    return write


def pair(kills, name, old, new, refused=()):
    """Checks that a file is the old or the new one, with the description of its own."""

    def check(done):
        path = kills.out / name
        try:
            found = artifacts.load(path)
        except ValueError as e:
            assert not done and any(text in str(e) for text in refused), str(e)
        else:
            assert found.sha256 in ((new.sha256,) if done else (old and old.sha256, new.sha256))
            assert (
                found.tools.get("which") is None
                and found.classification.class_names
                == (old if old and found.sha256 == old.sha256 else new).classification.class_names
            )
        if done:
            own = {f"{name}/{file}" for file in content(path)} if path.is_dir() else {name}
            assert set(content(kills.out)) == {*own, f"{name}.json", *kills.USERS}

    return check


def bare(names, seed):
    """A model of one layer: coremltools takes its time for each."""
    image = keras.Input((4, 4, 3), name="image")
    model = keras.Model(image, keras.layers.Dense(3, name="head")(keras.layers.Flatten()(image)), name="v")
    model.class_names = names
    model.set_weights([np.random.default_rng(seed).normal(size=w.shape) for w in model.weights])
    return model


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Format -> the models and the artifacts of two files with other labels."""
    folder, found = tmp_path_factory.mktemp("two"), []
    for seed, names in enumerate((["a", "b", "c"], ["x", "y", "z"])):
        model = make(seed)
        model.class_names = names
        models = {"litert": model, "onnx": model, "coreml": bare(names, seed)}
        written = {f: TARGETS[f].export(m, folder / str(seed), name="v") for f, m in models.items()}
        found.append((models, written))
    return found


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """A Core ML classifier that takes pictures, as the bundle for iOS has it."""
    image = keras.Input((16, 16, 3), name="image")
    model = keras.Model(image, keras.layers.Dense(3, name="head")(keras.layers.Flatten()(image)), name="v")
    model.class_names, model.preprocessing = ["x", "y", "z"], Preprocessing(image_size=(16, 16))
    return edge.coreml.export(model, tmp_path_factory.mktemp("pictured"), name="v", image_input=True)


@pytest.mark.parametrize("over", [False, True], ids=["new", "over another"])
@pytest.mark.parametrize("format", ["litert", "onnx", "coreml"])
def test_an_export_that_is_killed_loses_nothing_and_leaves_nothing(format, over, kills, two, monkeypatch):
    module, ((_, old), (given, new)) = TARGETS[format], two
    model = given[format]
    exporter = sys.modules[f"keras_vits.edge.targets.{format}.exporter"]
    monkeypatch.setattr(exporter, "prepare", prepared(model))
    if format == "coreml":
        monkeypatch.setattr(exporter, "write", converted(new["coreml"].path))
    if over:
        copied(old[format], kills.out)
    refused = ("No such file",) if format == "coreml" or not over else ()
    check = pair(kills, f"v{SUFFIXES[format]}", old[format] if over else None, new[format], refused)
    steps = kills(lambda: module.export(model, kills.out, name="v", overwrite=over), check)
    assert steps >= 8


@pytest.mark.parametrize("format", ["litert", "onnx"])
def test_a_quantization_that_is_killed_loses_nothing_and_leaves_nothing(format, kills, two, monkeypatch):
    module, ((_, old), (_, new)) = TARGETS[format], two
    first, second = (module.quantize(each[format], "dynamic_int8") for each in (old, new))
    if format == "litert":
        from keras_vits.edge.targets.litert import quantizer

        done = second.path.read_bytes()

        class Done:
            def __init__(self, *_, **__): ...

            def quantized(self):
                return done

        monkeypatch.setattr(quantizer, "Preparation", Done)
        monkeypatch.setattr("keras_vits.edge.targets.litert.exporter.add_labels", lambda *_: None)  # they are in it
    copied(first, kills.out)
    check = pair(kills, first.path.name, first, second)
    kills(lambda: module.quantize(new[format], "dynamic_int8", None, kills.out, overwrite=True), check)


def test_a_core_ml_compression_that_is_killed_loses_nothing_and_leaves_nothing(kills, two, monkeypatch):
    (_, old), (_, new) = two
    first, second = (edge.coreml.quantize(each["coreml"], "int8") for each in (old, new))
    copied(first, kills.out)
    check = pair(kills, first.path.name, first, second, refused=("No such file",))
    MLModel = edge.coreml.coremltools().models.MLModel
    monkeypatch.setitem(COMPRESSORS, "int8", lambda *_: MLModel(str(second.path), skip_model_load=True))
    steps = kills(lambda: edge.coreml.quantize(new["coreml"], "int8", None, kills.out, overwrite=True), check)
    assert steps >= 8


@pytest.mark.parametrize("over", [False, True], ids=["new", "over another"])
def test_a_keras_file_whose_export_is_killed_loses_nothing_and_leaves_nothing(over, kills, two, tmp_path):
    first, second = (
        edge.keras_file.export(each[0]["litert"], tmp_path / str(i), name="v") for i, each in enumerate(two)
    )
    if over:
        copied(first, kills.out)
    check = pair(kills, "v.keras", first if over else None, second, refused=() if over else ("No such file",))
    model = two[1][0]["litert"]
    assert kills(lambda: edge.keras_file.export(model, kills.out, name="v", overwrite=over), check) >= 8


@pytest.mark.parametrize("exported", [False, True], ids=["alone", "with the .json of an export"])
def test_a_model_whose_saving_is_killed_is_the_old_or_the_new_one(exported, kills, two):
    old, new = (each[0]["litert"] for each in two)
    path = kills.out / "v.keras"
    (edge.keras_file.export(old, kills.out, name="v") if exported else old.save(path))
    before = path.read_bytes()

    def check(done):
        if exported and path.read_bytes() != before:  # it is not the file of the .json any more: not silently
            with pytest.raises(ValueError, match=r"changed after it was written.* or delete that file"):
                keras_vits.load(path)
            return
        found = keras_vits.load(path)
        assert found.class_names == new.class_names or (not done and found.class_names == old.class_names)
        expected = new if found.class_names == new.class_names else old
        assert all(map(np.array_equal, found.get_weights(), expected.get_weights()))
        assert (
            set(content(kills.out)) == {"v.keras", *kills.USERS} | ({"v.keras.json"} if exported else set()) or not done
        )

    assert kills(lambda: new.save(path), check) >= 4


def test_a_training_that_is_killed_goes_on_as_if_it_had_not_been(kills, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), "uint8")

    def begin(checkpoint, epochs, resume):
        keras.utils.set_random_seed(0)
        model = make(classes=2)
        read = Pictures(
            sources=pixels, labels=np.arange(8) % 2, class_names=("a", "b"), preprocessing=model.preprocessing
        )
        fit.fit(model, read, read, epochs=epochs, batch_size=8, checkpoint=checkpoint, resume=resume)
        return model

    whole = tmp_path / "whole.keras"
    models = {1: begin(whole, 1, False)}
    path = kills.out / "v.checkpoint.keras"
    shutil.copy(whole, path)
    models[2] = begin(whole, 2, True)
    saver, known = fit._AfterEpoch(path, read_record(whole), None), {}
    saver.set_model(models[2])

    def check(done):
        digest = files.sha256(path)
        if digest not in known:
            known[digest] = read_record(path).epochs
            assert all(map(np.array_equal, keras_vits.load(path).get_weights(), models[known[digest]].get_weights()))
        assert known[digest] == 2 or (known[digest] == 1 and not done)
        assert set(content(kills.out)) == {path.name, *kills.USERS} or not done

    steps = kills(lambda: saver.on_epoch_end(1, {"loss": 1.0}), check)
    assert steps >= 8
    for step in (0, steps // 2, steps - 1):  # and the training itself goes on from there
        shutil.rmtree(kills.both)
        shutil.copytree(kills.states / str(step), kills.both)
        again = begin(path, 2, True)
        assert all(map(np.array_equal, again.get_weights(), models[2].get_weights()))
        assert read_record(path).epochs == 2 and set(content(kills.out)) == {path.name, *kills.USERS}


def test_files_of_the_command_line_are_whole_or_not_there(kills, two, tmp_path, run):
    """The answers of `predict` as CSV and JSON, and the list of a demo's files."""
    (_, old), (_, new) = two
    Image.fromarray(np.zeros((16, 16, 3), "uint8")).save(tmp_path / "photo.png")
    texts = {}

    def write(artifact, out):
        for name in ("labels.csv", "labels.json"):
            code, _, err = run("predict", tmp_path / "photo.png", "--model", artifact.path, "--out", out / name)
            assert code == 0, err
        demo_job._list(out, [artifact])

    for artifact in (old["litert"], new["litert"]):
        write(artifact, tmp_path / artifact.class_names[0])
        for name, text in content(tmp_path / artifact.class_names[0]).items():
            texts.setdefault(name, []).append(text)
    write(old["litert"], kills.out)

    def check(done):
        found = {name: text for name, text in content(kills.out).items() if name in texts}
        assert set(found) == set(texts)
        assert all(text in (texts[name][1:] if done else texts[name]) for name, text in found.items())

    assert kills(lambda: write(new["litert"], kills.out), check) >= 12


def test_drawings_and_steps_are_whole_or_not_there(kills, two):
    (_, old), (_, new) = two
    rows = lambda decibel: (LayerNoise(layer="head", sqnr_db=decibel),)

    def write(artifact, decibel):
        write_steps(artifact, kills.out)
        Sensitivity(model="v", recipe="static_int8", images=4, rows=rows(decibel)).plot(kills.out / "layers.svg")

    write(old["coreml"], 10.0)
    first = content(kills.out)
    write(new["coreml"], 20.0)
    second = content(kills.out)
    drawing, steps = (name for name in sorted(first) if first[name] != second[name])
    for name, text in first.items():
        (kills.out / name).write_bytes(text)

    def check(done):
        found = {name: text for name, text in content(kills.out).items() if name in second}
        assert set(found) == set(second) and found[drawing].endswith(b"</svg>\n")
        assert found[steps] == second[steps] or (not done and found[steps] == first[steps])

    assert kills(lambda: write(new["coreml"], 20.0), check) >= 8


@pytest.mark.parametrize("platforms", [("web", "android"), ("android", "ios")], ids=" to ".join)
def test_a_bundle_that_is_killed_loses_nothing_and_leaves_nothing(platforms, kills, two, pictured, monkeypatch):
    (_, old), (_, new) = two
    old, new = old["litert"], pictured if platforms[1] == "ios" else new["litert"]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), "uint8")
    app = kills.out / "app"
    edge.bundle(old, app, platforms[0], images=pixels)
    (app / "mine.ts").write_text("mine")
    monkeypatch.setattr(kills, "USERS", {**kills.USERS, "app/mine.ts": b"mine"})

    def check(done):
        app = kills.out / "app"
        about = app / "model" / "model.json"
        if done or about.is_file():  # without it an app finds no model
            sha256 = json.loads(about.read_text())["sha256"]
            which = new if sha256 == new.sha256 else old
            assert sha256 == new.sha256 or (not done and sha256 == old.sha256)
            assert files.sha256(app / "model" / f"model{which.path.suffix}") == sha256
            labels = (app / "model" / "labels.txt").read_text().split("\n")[:-1]
            assert tuple(labels) == which.class_names
        if done:
            listed = json.loads((app / "model" / "files.json").read_text())["files"]
            own = {name for name in content(app)} - {"mine.ts", "model/files.json"}
            assert own == set(listed) and all(listed[name] == [files.sha256(app / name)] for name in own)
            sources = {"web": "ImageClassifier.ts", "android": "ImageClassifier.kt", "ios": "ImageClassifier.swift"}
            assert {name for name in own if name.startswith("ImageC")} == {sources[platforms[1]]}

    kills(lambda: edge.bundle(new, kills.out / "app", platforms[1], images=pixels), check)


def test_a_report_that_is_killed_loses_nothing_and_leaves_nothing(kills, two):
    (_, old), (_, new) = two
    report([Row(old["litert"])], kills.out / "report.html", title="old", environment={})
    names = {"report.html", "report.json", "report.md"}

    def check(done):
        texts = {name: (kills.out / name).read_text() for name in names}
        assert ("<title>new" in texts["report.html"]) or (not done and "<title>old" in texts["report.html"])
        assert isinstance(msgspec.json.decode(texts["report.json"]), dict)
        assert set(content(kills.out)) == names | set(kills.USERS) or not done

    kills(lambda: report([Row(new["litert"])], kills.out / "report.html", title="new", environment={}), check)


def test_a_process_that_is_killed_at_each_rename(two, tmp_path, monkeypatch):
    """The same with the system's own signal."""
    (_, old), (given, new) = two
    model = given["litert"]
    monkeypatch.setattr("keras_vits.edge.targets.litert.exporter.prepare", prepared(model))
    name, real = new["litert"].path.name, os.replace
    for step in range(4):
        folder = tmp_path / str(step)
        copied(old["litert"], folder)
        with warnings.catch_warnings(action="ignore"):  # some backends warn of forks: the child runs none of them
            child = os.fork()
        if not child:
            try:
                left = [step]

                def replace(*args, left=left):
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1
                    return real(*args)

                os.replace = replace
                edge.litert.export(model, folder, name="v", overwrite=True)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) == (step < 3)  # the .json with both, the file, the .json of the new one
        found = artifacts.load(folder / name)
        assert found.sha256 == (old if step < 2 else new)["litert"].sha256
        assert found.class_names == (old if step < 2 else new)["litert"].class_names
        edge.litert.export(model, folder, name="v", overwrite=True)
        assert sorted(os.listdir(folder)) == [name, f"{name}.json"]
        assert artifacts.load(folder / name).class_names == new["litert"].class_names


def test_thirty_packages_leave_none_in_the_temporary_folder(models, tmp_path, monkeypatch):
    (tmp_path / "system").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "system"))
    scratch.close()
    file = edge.coreml.export(models[0], tmp_path / "out")
    for recipe in ("int8", "int4"):
        edge.coreml.quantize(file, recipe)
    (own,) = [p for p in (tmp_path / "system").iterdir() if p.is_dir()]
    assert not list((own / "new").iterdir())
    scratch.close()
    assert not list((tmp_path / "system").iterdir())


def test_a_leftover_is_swept_only_when_its_owner_is_gone(tmp_path):
    with files.temporary(tmp_path) as living:
        (tmp_path / ".keras_vits_abcdefgh" / "new").mkdir(parents=True)  # of a killed one, whose lock is gone
        (tmp_path / ".keras_vits_12345678.lock").touch()
        names = (".keras_vits_mine", ".keras_vits_ABCDEFGH", ".v.tflite.x1y2z3", "keras_vits_abcdefgh")
        mine = [tmp_path / name for name in names]
        for path in mine:
            path.mkdir()
        with files.temporary(tmp_path):
            assert living.is_dir()
            assert not (tmp_path / ".keras_vits_abcdefgh").exists()
            assert not (tmp_path / ".keras_vits_12345678.lock").exists()
    assert sorted(tmp_path.iterdir()) == sorted(mine)


def test_a_package_between_two_moves_comes_back(folder_of, tmp_path):
    """The old folder has made room, and the new one has not taken its name."""
    file = copied(folder_of["coreml"], tmp_path)
    aside = tmp_path / ".keras_vits_abcdefgh" / "old"
    aside.mkdir(parents=True)
    file.path.rename(aside / file.path.name)
    with pytest.raises(ValueError, match="No such file"):
        artifacts.load(file.path)
    files.sweep(tmp_path)
    assert artifacts.load(file.path).sha256 == file.sha256
    assert sorted(os.listdir(tmp_path)) == [file.path.name, f"{file.path.name}.json"]
