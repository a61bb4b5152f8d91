"""Artifacts on an emulated ARM processor: for real where QEMU and the prepared folder are, the rest with stand-ins."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shutil
import stat
import sys

import keras
import numpy as np
import pytest
from families import FAMILIES

from keras_vits import edge
from keras_vits.edge.devices import arm64
from keras_vits.edge.records import sqnr_db

pytestmark = pytest.mark.once

CACHE = pathlib.Path(__file__).parents[2] / ".cache" / "arm64"
QEMU = """#!{python}
# In place of QEMU: keeps what it was asked to run, and answers with the first numbers of each image.
import json, pathlib, sys
if sys.argv[1:] == ["--version"]:
    sys.exit(print("qemu-aarch64 version 9.9.9 (of no system)"))
*command, model, images, outputs = sys.argv[1:]
pathlib.Path({folder!r}, "asked.json").write_text(json.dumps(command))
if pathlib.Path({folder!r}, "fails").exists():
    print("first words", file=sys.stderr)
    print("qemu: uncaught target signal 11 (Segmentation fault)", file=sys.stderr)
    sys.exit(139)
import numpy as np
np.save(outputs, np.stack([batch.reshape(len(batch), -1)[:, :5] for batch in np.load(images)]))
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A LiteRT artifact that takes two images at a time."""
    image = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(8, 3, activation="relu")(image)
    x = keras.layers.Dense(5)(keras.layers.GlobalAveragePooling2D()(x))
    return edge.litert.export(keras.Model(image, x, name="tiny"), tmp_path_factory.mktemp("arm64"), batch=2)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A prepared folder with nothing in it that runs, and a QEMU that runs nothing; the folder."""
    (tmp_path / "site" / "ai_edge_litert").mkdir(parents=True)
    (tmp_path / "site" / "ai_edge_litert-1.2.3.dist-info").mkdir()
    (tmp_path / "root" / "usr" / "bin").mkdir(parents=True)
    for name in ("python3", "python3.11", "python3.11-config"):
        (tmp_path / "root" / "usr" / "bin" / name).touch()
    qemu = tmp_path / arm64.QEMU[1]
    qemu.write_text(QEMU.format(python=sys.executable, folder=str(tmp_path)))
    qemu.chmod(qemu.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(arm64.VARIABLE, str(tmp_path))
    return tmp_path


def images(count):
    return np.random.default_rng(0).normal(size=(count, 8, 8, 3)).astype("float32")


def test_what_is_run(artifact, stand_in):
    x = images(3)
    found = arm64.outputs(artifact, x)
    assert np.array_equal(found, x.reshape(3, -1)[:, :5])  # as the stand-in answers; the padding of the batch is gone
    asked = json.loads((stand_in / "asked.json").read_text())
    root = stand_in / "root"
    assert asked[:4] == ["-cpu", "cortex-a76", "-L", str(root)]
    assert asked[4:7] == [str(root / "usr/bin/python3.11"), "-I", "-S"]
    assert asked[-1] == str(stand_in / "site")
    runner = arm64.load(artifact)
    assert runner.verified_by == "ai_edge_litert 1.2.3 on an ARM cortex-a76 emulated by QEMU 9.9.9"
    assert runner.partitions() == 1 and runner.histogram()["CONV_2D"] == 1


def test_a_runtime_that_stops_is_quoted(artifact, stand_in):
    (stand_in / "fails").touch()
    message = r"tiny_float32\.tflite could not be run on arm64, its process ended with code 139: qemu: uncaught target"
    with pytest.raises(ValueError, match=message):
        arm64.outputs(artifact, images(2))


def test_what_is_missing_is_named(artifact, stand_in, monkeypatch):
    (stand_in / arm64.QEMU[1]).unlink()
    with pytest.raises(ValueError, match=r"needs qemu-aarch64-static or qemu-aarch64: install qemu-user-static"):
        arm64.outputs(artifact, images(2))
    monkeypatch.setenv(arm64.VARIABLE, str(stand_in / "elsewhere"))
    with pytest.raises(ValueError, match=r"elsewhere holds no Python and LiteRT for ARM: make it with .*prepare\(\)"):
        arm64.outputs(artifact, images(2))
    with pytest.raises(ValueError, match=r"is of the format coreml, and arm64 runs: litert"):
        arm64.outputs(dataclasses.replace(artifact, format="coreml"), images(2))


def test_times_are_refused(artifact):
    with pytest.raises(ValueError, match=r"emulated processor, whose times say nothing.*device='arm64'"):
        edge.benchmark(artifact, device="arm64")


def test_preparing_says_what_failed_and_leaves_nothing(tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(ValueError, match=r"needs apt-get and dpkg-deb, which Debian has"):
        arm64.prepare(tmp_path / "made")
    for name in ("apt-get", "dpkg-deb"):
        (tools / name).write_text("#!/bin/sh\necho 'E: no such mirror' >&2\nexit 100\n")
        (tools / name).chmod(0o755)
    with pytest.raises(ValueError, match=r"could not be prepared, apt-get ended with code 100: E: no such mirror"):
        arm64.prepare(tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tools"]


@pytest.fixture
def prepared(monkeypatch):
    """The real folder, made once for each clone unless the environment names one."""
    if not any(map(shutil.which, arm64.QEMU)):
        pytest.skip("there is no QEMU here: install qemu-user-static")
    if not os.environ.get(arm64.VARIABLE):
        monkeypatch.setenv(arm64.VARIABLE, str(CACHE))
        if not (CACHE / "site").is_dir():
            try:
                arm64.prepare()
            except ValueError as e:
                pytest.skip(str(e))


@pytest.mark.usefixtures("prepared")
def test_an_emulated_arm_processor_agrees_with_this_one(tmp_path):
    family = next(family for family in FAMILIES if family.name == "mobilevit_v2")
    model = family.create()
    x = np.random.default_rng(0).uniform(size=(4, *model.input_shape[1:])).astype("float32")
    float32 = edge.litert.export(model, tmp_path)
    files = {"float32": (float32, 100)}  # and at least so many decibels between the two processors
    files["static_int8"] = (edge.litert.quantize(float32, "static_int8", calibration=x), 30)
    files["dynamic_int8"] = (edge.litert.quantize(float32, "dynamic_int8"), 20)
    for recipe, (artifact, least) in files.items():
        here, there = edge.litert.load(artifact).predict(x), arm64.outputs(artifact, x)
        noise = float(np.square(here - there, dtype=np.float64).sum())
        signal = float(np.square(here, dtype=np.float64).sum())
        assert sqnr_db(signal, noise) > least, recipe
    version = importlib.metadata.version("ai-edge-litert")
    assert arm64.load(float32).verified_by.startswith(
        f"ai_edge_litert {version} on an ARM {arm64.CPU} emulated by QEMU"
    )
