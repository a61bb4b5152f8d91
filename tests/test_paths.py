"""The four ways that CONTRIBUTING.md walks, each followed to the end on a toy: a family, an operation, a recipe, a
target. A step that is missing there is missing here, and the toy does not work."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_vits
from keras_vits import edge
from keras_vits.edge.quantize.recipes import DYNAMIC, RECIPES, Entry, Operation, Recipe
from keras_vits.edge.targets import _protocol as targets

ROOT = pathlib.Path(__file__).parents[1]
TINY = dict(width=24, depth=2, heads=2, mlp_hidden=48, image_size=32, patch_size=8, num_classes=5)

FAMILY = '''
"""Toy: an image cut into patches, their mean, a head.

image (B,H,W,C) -> stem (B,h,w,D) -> tokens (B,N,D) -> pool (B,D) -> head (B,K)
"""

from dataclasses import dataclass

from keras import layers

from keras_vits.models._base import VisionModel
from keras_vits.models._registry import register


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    image_size: int | tuple[int, int] = 32
    in_channels: int = 3
    patch_size: int = 8
    width: int = 16
    num_classes: int = 10
    drop_path: float = 0.0


class ToyBlock(layers.Layer):
    """(B,N,D) -> (B,N,D): a dense layer and its input."""

    def build(self, shape):
        self.dense = layers.Dense(shape[-1], name="dense", dtype=self.dtype_policy)
        self.dense.build(shape)

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        return x + self.dense(x)


@register
class Toy(VisionModel):
    Config = ToyConfig
    variants = {"toy_small": dict(width=16), "toy_base": dict(width=32)}
    names = {"timm": {"stem": "stem", "block_{i}/dense": "blocks.{i}", "head": "head"}}

    @staticmethod
    def size_multiple(cfg):
        return cfg.patch_size

    @staticmethod
    def backbone(cfg, image):
        x = layers.Conv2D(cfg.width, cfg.patch_size, strides=cfg.patch_size, name="stem")(image)
        x = layers.Reshape((-1, cfg.width), name="tokens")(x)
        x = ToyBlock(name="block_0")(x)
        return layers.GlobalAveragePooling1D(name="pool")(x)
'''
USES_FAMILY = """
import sys
import keras, numpy as np
import keras_vits
from keras_vits import edge, models
models.__path__.append(sys.argv[1])
path = sys.argv[2]
images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype("float32")
if sys.argv[3] == "make":
    assert keras_vits.list_models("toy*") == ["toy_base", "toy_small"]
    model = keras_vits.create("toy_small", num_classes=3)
    model.compile("adamw")
    model.fit(images, np.arange(8) % 3, verbose=0)
    model.save(path)
    np.save(path + ".npy", model.predict(images, verbose=0))
    file = edge.litert.export(model, sys.argv[1] + "/out")
    print(edge.verify(file, model, images).sqnr_db > 90, [f.name for f in model.feature_info])
else:
    keras_vits.list_models()
    print(np.abs(keras_vits.load(path).predict(images, verbose=0) - np.load(path + ".npy")).max() < 1e-5)
"""


@pytest.mark.once
def test_a_family_is_one_file(tmp_path):
    """It trains, is saved, opens in a fresh process and becomes a file for phones."""
    (tmp_path / "toy.py").write_text(FAMILY)
    for what, printed in (("make", "True ['block_0']"), ("load", "True")):
        command = [sys.executable, "-c", USES_FAMILY, str(tmp_path), str(tmp_path / "toy.keras"), what]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"KERAS_BACKEND": "jax"})
        assert done.returncode == 0 and done.stdout.strip().endswith(printed), done.stderr[-2000:]


def test_an_operation_is_an_entry_in_the_table_and_in_each_writer(monkeypatch, tmp_path):
    from keras_vits.edge.targets.coreml import handlers as coreml
    from keras_vits.edge.targets.litert.handlers import HANDLERS as LITERT
    from keras_vits.edge.targets.onnx import operations as onnx
    from keras_vits.graph import ops
    from keras_vits.graph.trace._tracer import OPERATIONS

    one = np.float32(1)

    def traced(t, operation, x):
        return t.build("expm1", t.value(x))

    def in_litert(w, node):
        y = w.step("EXP", [w.value(node.inputs[0])], node.output.shape, "exp", "Exp")
        w.emit("SUB", [y, w.constant(1.0, np.float32)], [w.value(node.output)], "Sub")

    def in_coreml(w, node, x):
        variable, order = w.at_hand(x)
        return w.emit("sub", x=w.emit("exp", x=variable), y=one), order

    def in_onnx(w, node, x):
        x, order = w.at_hand(x)
        return w.emit("Sub", w.emit("Exp", x), w.number(1, "one")), order

    image = keras.Input((8, 8, 3), name="image")
    y = keras.layers.Conv2D(4, 3, name="conv")(image)
    model = keras.Model(image, keras.ops.expm1(0.1 * y), name="toy")
    with pytest.raises(ValueError, match="Expm1"):
        edge.trace(model)
    monkeypatch.setitem(ops.OPS, "expm1", ops.Op(lambda s: s, np.expm1, ops.FLOATS, elementwise=True))
    monkeypatch.setitem(OPERATIONS, "Expm1", traced)
    monkeypatch.setitem(LITERT, "expm1", in_litert)
    monkeypatch.setitem(coreml.HANDLERS, "expm1", in_coreml)
    monkeypatch.setitem(onnx.WRITERS, "expm1", in_onnx)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    assert np.allclose(edge.trace(model, batch=2)(images)[0], model.predict(images, verbose=0), atol=1e-5)
    for target in (edge.litert, edge.onnx):
        assert edge.verify(target.export(model, tmp_path), model, images).sqnr_db > 90
    assert edge.verify(edge.coreml.export(model, tmp_path, precision="float32"), model, images).sqnr_db > 90


def test_a_recipe_is_one_row(monkeypatch, tmp_path):
    row = Recipe(
        name="toy_int8",
        formats=("litert",),
        description="8-bit weights of dense layers alone",
        entries=(Entry(operations=(Operation.DENSE,), config=DYNAMIC),),
    )
    monkeypatch.setitem(RECIPES, row.name, row)
    model = keras_vits.create("vit_tiny_patch16_224", **TINY)
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype("float32")
    f32 = edge.litert.export(model, tmp_path)
    i8 = edge.litert.quantize(f32, "toy_int8")
    assert i8.path.name == "vit_tiny_patch16_224_toy_int8.tflite" and i8.size_bytes < f32.size_bytes
    assert edge.verify(i8, model, images).sqnr_db > 25
    from keras_vits import cli

    assert "toy_int8" in cli._files.recipes_by_target()


TARGET = '''
"""Toy: the traced graph as a pickle, run by its numpy evaluator."""

import pathlib
import pickle

import numpy as np

from keras_vits.edge import artifact as artifacts
from keras_vits.edge.targets._prepare import prepare
from keras_vits.edge.targets._protocol import Target, Traits


def export(model, folder, *, batch=1, head="logits", name=None, overwrite=False):
    ready = prepare(model, batch=batch, head=head, name=name)
    with artifacts.writing(folder, f"{ready.name}.toy", overwrite=overwrite) as draft:
        draft.temporary.write_bytes(pickle.dumps(ready.graph))
        draft.describe(
            format="toy", recipe="float32", model=ready.name, inputs=ready.inputs, outputs=ready.outputs,
            tools=ready.tools, operations=ready.operations,
        )
    return draft.artifact


class Runner:
    runtime = verified_by = "numpy"

    def __init__(self, path):
        self.graph = pickle.loads(pathlib.Path(path).read_bytes())

    def predict(self, inputs):
        return np.concatenate([self.graph(x[None])[0] for x in inputs])

    def histogram(self):
        return self.graph.histogram()


def load(artifact):
    return Runner(artifacts.check(artifact).path)


def run(order):
    return lambda: (Runner(order["path"]).graph, "numpy")


TARGET = Target(
    name="toy", suffix=".toy", export=export, quantize=None, load=load, run=run, traits=Traits(title="Toy", marker="*")
)
'''


def test_a_target_is_one_package_and_one_line(monkeypatch, tmp_path):
    """It is exported, loaded, verified and reported like the others."""
    (tmp_path / "toy.py").write_text(TARGET)
    from keras_vits.edge import targets as package

    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.setitem(targets.HOMES, "toy", "toy")
    model = keras_vits.create("vit_tiny_patch16_224", **TINY)
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype("float32")
    try:
        target = targets.target("toy")
        written = target.export(model, tmp_path / "out", head="softmax")
        assert edge.artifact.load(written.path) == written and targets.target_of(written.path) is target
        check = edge.verify(written, model, images, np.arange(4))
        assert check.sqnr_db > 90 and check.top1_agreement == 1 and check.verified_by == "numpy"
        page = edge.report([edge.Row(written, check)], tmp_path / "report.html").html.read_text(encoding="utf-8")
        assert "Toy" in page
    finally:
        sys.modules.pop("keras_vits.edge.targets.toy", None)


def test_contributing_names_every_file_of_the_four_ways():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for file in (
        "tests/families.py",
        "tools/generate.py",
        "keras_vits/graph/ops.py",
        "edge/quantize/recipes.py",
        "edge/targets/_protocol.py",
        "edge/targets/_prepare.py",
    ):
        assert (file in text and (ROOT / file).exists()) or "KERAS_VITS_WHEEL" in os.environ, file
