"""Neighbours of the situations in the other files: the same kinds of input, in forms that nobody reported."""

import dataclasses
import io
import os
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops
from PIL import Image

from keras_vits import create, edge
from keras_vits._util import files, progress, terminal
from keras_vits.edge.evidence.half import HalfRunner
from keras_vits.edge.targets._prepare import unique_names
from keras_vits.graph.ir import Builder
from keras_vits.graph.rewrite import rewrite
from keras_vits.preprocess import Preprocessing

pytestmark = pytest.mark.once

WRITERS = ("litert", "onnx")


def export(model, folder, format="litert", **options):
    return getattr(edge, format).export(model, folder, **options)


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize("format", WRITERS)
def test_what_overflows_before_an_addition_is_named(format, tmp_path):
    given = keras.Input((8,), name="given")
    large = layers.Dense(8, kernel_initializer=keras.initializers.Constant(1e4), use_bias=False, name="large")(given)
    model = keras.Model(given, layers.Add(name="sum")([large, ops.negative(large) * 0.5]))
    x = np.full((2, 8), 100, np.float32)
    found = edge.verify(export(model, tmp_path, format), precision="float16", images=x)
    assert found.sqnr_db == -np.inf
    assert [step.layer.split("/")[0] for step in found.half.overflows] == ["large"]


def test_what_is_computed_of_infinity_is_no_fault_of_its_own(tmp_path):
    given = keras.Input((4,), name="given")
    large = ops.square(given)  # 90,000
    model = keras.Model(given, ops.rsqrt(large + 1.0) * ops.cos(given))
    runner = HalfRunner(export(model, tmp_path))
    runner.predict(np.full((1, 4), 300, np.float32))
    steps = {step.operation: step for step in runner.check().steps}
    assert steps["RSQRT"].vanishing == 0 and np.isnan(steps["RSQRT"].own_db)
    assert steps["COS"].own_db > 40


def test_a_pooling_of_large_numbers_does_not_overflow_while_it_adds(tmp_path):
    image = keras.Input((7, 7, 4), name="image")
    model = keras.Model(image, layers.AveragePooling2D(7)(image))
    x = np.random.default_rng(0).uniform(1900, 2100, (1, 7, 7, 4)).astype("float32")  # 98,000 together
    artifact = edge.onnx.export(model, tmp_path, precision="float16")
    assert edge.verify(artifact, model, x, precision="float16", accumulator="float16").sqnr_db > 40
    assert edge.verify(artifact, model, x).sqnr_db > 55


# ---------------------------------------------------------------- types


@pytest.mark.parametrize("format", WRITERS)
def test_an_input_of_truth_values_is_taken(format, tmp_path):
    given = keras.Input((4,), dtype="bool", name="mask")
    model = keras.Model(given, ops.sum(ops.cast(given, "float32"), axis=-1, keepdims=True))
    x = np.array([[True, False, True, True]])
    artifact = export(model, tmp_path, format)
    assert artifact.input.dtype == "bool"
    runner = getattr(edge, format).load(artifact)
    assert np.asarray(runner.predict(x)).tolist() == [[3.0]]
    assert edge.verify(artifact, precision="float16", images=x).sqnr_db == np.inf
    with pytest.raises(ValueError, match="takes bool in 'mask', numbers from 0 to 1; received 0 to 2"):
        runner.predict(np.array([[0, 1, 2, 1]]))


@pytest.mark.parametrize("value", [2**32 + 1, -(2**31) - 1, 1e20])
def test_a_number_that_the_input_does_not_hold_is_refused(value, tmp_path):
    given = keras.Input((4,), dtype="int32", name="ids")
    model = keras.Model(given, layers.Dense(2)(ops.cast(given, "float32")))
    artifact = export(model, tmp_path)
    x = np.array([[1, 2, 3, value]])
    with pytest.raises(ValueError, match="takes int32 in 'ids', numbers from -2147483648 to 2147483647"):
        edge.litert.load(artifact).predict(x)
    with pytest.raises(ValueError, match="Calibration takes int32 in 'ids'"):
        edge.litert.quantize(artifact, "static_int8", x)


def test_a_double_that_float32_does_not_hold_is_refused(tmp_path):
    given = keras.Input((2,), name="given")
    artifact = export(keras.Model(given, layers.Dense(2)(given)), tmp_path)
    with pytest.raises(ValueError, match=r"takes float32 in 'given', which 1e\+300 is too large for"):
        edge.litert.load(artifact).predict(np.array([[1e300, 1]]))


def test_float_pixels_are_no_normalised_images(tmp_path):
    image = keras.Input((8, 8, 3), name="image")
    model = keras.Model(image, layers.Dense(3, name="scores")(layers.Flatten()(image)), name="known")
    model.preprocessing = Preprocessing(image_size=(8, 8))
    artifact = export(model, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3))
    with pytest.raises(ValueError, match=r"takes normalised images; received numbers from 0 to 2\d\d, as pixels are"):
        edge.verify(artifact, model, np.clip(pixels, 0, 255).astype("float32"))
    with pytest.raises(ValueError, match="Calibration takes normalised float32 images; received uint8 pixels"):
        edge.litert.quantize(artifact, "static_int8", pixels.astype("uint8"))


def test_a_pooling_of_single_integers_stays_a_pooling():
    build = Builder()
    x = build.input("x", (1, 4, 4, 2), "int32")
    options = dict(size=(1, 1), strides=(2, 2), pads=((0, 0), (0, 0)))
    build.graph.outputs = [build("max_pool2d", x, **options)]
    assert rewrite(build.graph).histogram() == {"max_pool2d": 1}


# ---------------------------------------------------------------- names


def test_two_outputs_that_are_one_tensor_keep_their_names(tmp_path):
    given = keras.Input((4,), name="given")
    dense = layers.Dense(3, name="scores")(given)
    model = keras.Model(given, {"first": dense, "second": layers.Dropout(0.5)(dense)})
    for format in WRITERS:
        artifact = export(model, tmp_path, format)
        assert edge.artifact.load(artifact.path) == artifact and set(artifact.output_names) == {"first", "second"}


def test_two_outputs_of_one_name_get_two(tmp_path):
    image = keras.Input((4, 4, 3), name="image")
    flat = layers.Flatten(name="probabilities")(image)
    model = keras.Model(image, [flat, layers.Dense(3, name="scores")(flat)])
    for format in WRITERS:
        artifact = export(model, tmp_path, format, kinds={"scores": "logits"}, head="softmax")
        assert artifact.output_names == ("probabilities", "probabilities_1")
        found = getattr(edge, format).load(artifact).predict(np.ones((1, 4, 4, 3), np.float32))
        assert found["probabilities"].shape == (1, 48) and found["probabilities_1"].sum() == pytest.approx(1)
    assert unique_names(["a", "a", "b", "a_1"], ["b"]) == ("a", "a_1", "b_1", "a_1_1")


# ---------------------------------------------------------------- a process without a terminal


def test_a_program_without_stderr_shows_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress.progress([1, 2], "Running")) == [1, 2]
    with progress.working("Running"), terminal.quiet():
        pass


def test_a_name_that_is_not_in_the_encoding_is_written_to_a_pipe(monkeypatch):
    from keras_vits.cli import _predict

    name = os.fsdecode(b"caf\xe9 \xe2\x82\xac.png")
    for encoding, expected in (("utf-8", os.fsencode(name)), ("cp1252", "caf\\udce9 \u20ac.png".encode("cp1252"))):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        _predict._write(name, None)
        assert stream.buffer.getvalue() == expected


def test_sums_and_scales_of_integers_are_not_rounded_to_half_precision(tmp_path):
    """A sum of integers passes 65,504 long before its scale makes a small number of it."""
    given = keras.Input((64,), name="given")
    dense = layers.Dense(32, kernel_initializer=keras.initializers.RandomUniform(0.5, 1.0, seed=0), name="dense")
    model = keras.Model(given, dense(given))
    x = np.random.default_rng(0).uniform(0.5, 1, (4, 64)).astype("float32")
    artifact = edge.onnx.quantize(edge.onnx.export(model, tmp_path), "dynamic_int8")
    found = edge.verify(artifact, model, x, precision="float16")
    assert found.sqnr_db > 40 and not found.half.overflows
    casts = [step for step in found.half.steps if step.operation == "Cast"]
    assert casts and casts[0].largest > 65_504 and casts[0].own_db == np.inf


# ---------------------------------------------------------------- what a description says of its numbers


@pytest.mark.parametrize(
    ("head", "kind", "applied"), [("logits", "probabilities", "softmax"), ("softmax", "logits", "")]
)
def test_numbers_that_are_not_of_the_described_kind_are_refused(head, kind, applied, run, tmp_path):
    shape = dict(image_size=16, patch_size=8, width=16, depth=1, heads=1, mlp_hidden=16, num_classes=5)
    model = create("vit_tiny_patch16_224", **shape)
    kernel = model.get_layer("head").kernel
    kernel.assign(np.random.default_rng(0).normal(size=kernel.shape))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    artifact = export(model, tmp_path, head=head)
    output = dataclasses.replace(artifact.outputs[0], kind=kind, applied=applied)
    dataclasses.replace(artifact, outputs=(output,)).save()
    code, _, err = run("predict", tmp_path / "a.png", "--model", artifact.path)
    assert code == 2 and f"is described as {kind}, and its numbers" in " ".join(err.split())


# ---------------------------------------------------------------- outputs of few axes, tables


@pytest.mark.parametrize("format", ("litert", "onnx", "coreml"))
def test_an_output_without_the_batch_is_told(format, tmp_path, capfd):
    """A mean over all of it is one number, whatever stands in front; numpy said that it cannot be concatenated."""
    image = keras.Input((4, 4, 3), name="image")
    mean = ops.mean(image)
    model = keras.Model(image, ops.where(mean > 0.5, mean % 0.3, ops.relu(mean) + 1))
    x = np.full((1, 4, 4, 3), 0.7, np.float32)
    runner = getattr(edge, format).load(export(model, tmp_path, format))
    with pytest.raises(ValueError, match=r"has the shape \(\), not a value for each of 1 in a batch"):
        runner.predict(x)
    if format != "coreml":
        np.testing.assert_allclose(runner.run(x)[0], 0.1, rtol=1e-5)
    assert "Error" not in capfd.readouterr().err


@pytest.mark.parametrize("format", ("litert", "onnx", "coreml"))
def test_numbers_gathered_from_a_table(format, tmp_path):
    given = keras.Input((3,), dtype="int32", name="given")
    table = np.arange(12, dtype="float32")
    model = keras.Model(given, ops.take(table, given))
    found = getattr(edge, format).load(export(model, tmp_path, format)).predict(np.int32([[1, 11, 2]]))
    np.testing.assert_allclose(found, [[1, 11, 2]])


# ---------------------------------------------------------------- training, and a model within a model


def test_numbers_of_numpy_are_kept_beside_a_checkpoint(tmp_path):
    from keras_vits.training import data, fit

    shape = dict(image_size=16, patch_size=8, width=16, depth=1, heads=1, mlp_hidden=16, num_classes=10)
    model = create("vit_tiny_patch16_224", **shape)
    digits = data.load("digits", model.preprocessing, limit=32)
    path = tmp_path / "model.keras"
    numbers = dict(weight_decay=np.float32(0.05), layer_decay=np.float32(0.75), learning_rate=np.float32(1e-3))
    augmentation = data.Augmentation(shift=np.float32(0.1))
    fit.fit(model, digits.train, digits.validation, epochs=1, checkpoint=path, augmentation=augmentation, **numbers)
    fit.fit(model, digits.train, digits.validation, epochs=2, checkpoint=path, resume=True, augmentation=augmentation,
            **numbers)  # fmt: skip


def test_nan_of_a_model_within_a_model_is_named(tmp_path):
    image = keras.Input((4, 4, 3), name="image")
    base = keras.Model(image, layers.Dense(4, name="inner")(layers.Flatten()(image)), name="base")
    again = keras.Input((4, 4, 3), name="image")
    model = keras.Model(again, layers.Dense(2, name="scores")(ops.log(base(again))))
    artifact = export(model, tmp_path)
    with pytest.raises(ValueError, match=r"gives NaN or infinity in .* for image 0, first in layer 'log"):
        edge.verify(artifact, model, np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype("float32"))


# ---------------------------------------------------------------- files


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut after the renaming would leave an empty file."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    with files.writing(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert "fsync" in done and done.index("fsync") < done.index("replace")
    assert (tmp_path / "a.txt").read_text() == "whole"
