"""What every family promises, over the registry and tests/families.py: a new family is tested by existing."""

import ast
import csv
import functools
import json
import os
import pathlib
import pkgutil
import statistics
import subprocess
import sys

import families
import keras
import numpy as np
import pytest
from families import predict

import keras_vits
from keras_vits import models
from keras_vits._util import keras_private
from keras_vits.models import _registry as registry

PACKAGE = pathlib.Path(keras_vits.__file__).parent
TABLE = pathlib.Path(__file__).parent / "data" / "variants.csv"
VARIANTS = {row["name"]: row for row in csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines())}

each_family = pytest.mark.parametrize("family", families.everywhere("vit", "mobilevit"))


@pytest.fixture(scope="module")
def tiny():
    """Family -> its tiny model, made once."""
    return functools.cache(lambda family: family.create())


class Training(keras.Model):
    """A model that behaves as in training when it predicts."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, images):
        return self.model(images, training=True)


def count(variables):
    return sum(int(np.prod(v.shape)) for v in variables if not v.path.endswith("seed_generator_state"))


# ---------------------------------------------------------------- the registry


def test_every_family_is_under_test():
    files = {module.name for module in pkgutil.iter_modules(models.__path__)}
    assert {family.name for family in families.FAMILIES} == {name for name in files if not name.startswith("_")}


def test_every_variant_has_a_row():
    assert set(keras_vits.list_models()) == set(VARIANTS)


WHOLE = {family.variant for family in families.FAMILIES}


@pytest.mark.once
@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_multiply_adds(name):
    """Exact numbers of timm's parameters, and PyTorch's count of its multiply-adds.

    Where one block is repeated, a variant of each family is built whole, the others with one block, which counts as
    often as the depth says.
    """
    row = VARIANTS[name]
    cls, hyperparameters = registry.lookup(name)
    depth = getattr(cls._checked(hyperparameters), "depth", 1)
    shallow = dict(depth=1) if depth > 1 and name not in WHOLE else {}
    with keras_private.values_later():
        model = keras_vits.create(name, num_classes=int(row["num_classes"]), **shallow)
        parts = [(1, model)]
        if shallow:
            block = model.get_layer("block_0")
            parts.append((depth - 1, keras.Model(block.input, block.output)))
    assert model.input_shape == (None, int(row["img"]), int(row["img"]), 3)
    assert sum(n * count(part.trainable_weights) for n, part in parts) == int(row["params_with_head"])
    assert sum(n * count(part.non_trainable_weights) for n, part in parts) == int(row["bn_running_stats"])
    if row["gmacs_flopcounter"]:
        macs = sum(n * keras_vits.count_macs(part) for n, part in parts)
        assert macs / 1e9 == pytest.approx(float(row["gmacs_flopcounter"]), rel=0.04)


def test_list_models():
    assert keras_vits.list_models("mobilevit_*") == ["mobilevit_s", "mobilevit_xs", "mobilevit_xxs"]
    assert keras_vits.list_models("nothing*") == []


# ---------------------------------------------------------------- the models


@each_family
def test_layer_names(family, tiny):
    names = [layer.name for layer in tiny(family).layers]
    assert names[:2] == ["image", "stem"] and names[-2:] == ["pool", "head"]


@each_family
def test_no_head_gives_what_the_head_reads(family, tiny):
    model = tiny(family)
    headless = family.create(num_classes=0)
    headless.set_weights(model.get_weights()[:-2])
    images = families.images(model)
    pooled = predict(headless, images)
    kernel, bias = model.get_layer("head").get_weights()
    assert pooled.shape == (2, kernel.shape[0])
    np.testing.assert_allclose(pooled @ kernel + bias, predict(model, images), rtol=1e-4, atol=1e-5)


@each_family
def test_features_are_the_blocks(family, tiny):
    model = tiny(family)
    every = model.features()
    last_two = model.features([-2, model.layers[-2].name])
    images = families.images(model)
    outputs = predict(every, images)
    assert len(outputs) == sum("block_" in layer.name for layer in model.layers) >= 2
    penultimate, pooled = predict(last_two, images)
    np.testing.assert_allclose(penultimate, outputs[-2], atol=1e-5 * np.abs(penultimate).max())
    assert pooled.ndim == 2
    with pytest.raises(ValueError, match="No block or layer 99"):
        model.features([99])
    with pytest.raises(ValueError, match="No block or layer 'blok'"):
        model.features(["blok"])


@each_family
def test_layers_give_the_shape_they_declare(family, tiny):
    model = tiny(family)
    names = [layer.name for layer in model.layers]
    found = predict(model.features(names), families.images(model))
    for layer, output in zip(model.layers, found, strict=True):
        assert output.shape == (2, *layer.output.shape[1:]), layer.name


@each_family
def test_channels_and_rectangles(family):
    side = family.tiny["image_size"]
    model = family.create(in_channels=5, image_size=(side, side * 2))
    assert model.input_shape == (None, side, side * 2, 5)
    logits = predict(model, families.images(model))
    assert logits.shape == (2, 5) and np.isfinite(logits).all()
    with pytest.raises(
        ValueError, match=rf"multiples of {model.size_multiple(model.cfg)} pixels.*nearest size is {side} x {side}"
    ):
        family.create(image_size=(side, side + 1))


@each_family
def test_resized(family, tiny):
    """Another image size, the same weights; at the old size nothing has changed."""
    model, side = tiny(family), family.tiny["image_size"]
    if family.fixed_size:
        with pytest.raises(ValueError, match=rf"images of \({side}, {side}\) pixels only: at \({side}, {2 * side}\)"):
            model.resized((side, 2 * side))
        return
    wide = model.resized((side, 2 * side))
    assert wide.preprocessing.image_size == (side, 2 * side) and wide.class_names == model.class_names
    logits = predict(wide, families.images(wide))
    assert logits.shape == (2, 5) and np.isfinite(logits).all()
    images = families.images(model)
    np.testing.assert_allclose(predict(model.resized(side), images), predict(model, images), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="multiples of"):
        model.resized(side + 1)


@each_family
def test_every_pixel_counts(family, tiny):
    """No part of the picture is lost on the way to the logits, and the samples of a batch do not mix."""
    model = tiny(family)
    height, width = model.cfg.image_size
    base = families.images(model, 1)
    images = np.repeat(base, 5, axis=0)
    for i, (y, x) in enumerate([(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1)]):
        images[i, y, x] += 50
    logits = predict(model, images)
    for changed in logits[:4]:
        assert np.abs(changed - logits[4]).max() > 1e-4 * np.abs(logits).max()
    np.testing.assert_allclose(logits[4:], predict(model, base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", families.everywhere("vit"))  # the layer is the same in all
def test_drop_path_acts_in_training_only(family, tiny):
    model = family.create(drop_path=0.5)
    images = families.images(model)
    np.testing.assert_allclose(predict(model, images), predict(tiny(family), images), rtol=1e-5, atol=1e-6)
    rates = [
        sublayer.rate
        for layer in model.layers
        if "block_" in layer.name
        for sublayer in layer._flatten_layers()
        if type(sublayer).__name__ == "DropPath"
    ]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.5) and rates == sorted(rates)
    trained = predict(Training(model), images[:1].repeat(16, axis=0))
    assert np.ptp(trained, axis=0).max() > 1e-3 * np.abs(trained).max(), "every copy of one image went the same way"


@each_family
def test_save_and_load(family, tiny, tmp_path):
    model = family.create(drop_path=0.1)
    model.class_names = [f"class {i}" for i in range(5)]
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again) is type(model) and again.cfg == model.cfg and again.name == model.name
    assert again.class_names == model.class_names and again.preprocessing == model.preprocessing
    images = families.images(model)
    np.testing.assert_array_equal(predict(again, images), predict(model, images))
    model.save_weights(tmp_path / "model.weights.h5")
    other = families.randomize(family.create(drop_path=0.1), seed=9)
    other.load_weights(tmp_path / "model.weights.h5")
    for ours, theirs in zip(other.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@each_family
def test_config_round_trip_through_json(family, tiny):
    model = tiny(family)
    config = json.loads(json.dumps(model.get_config()))
    assert type(model).from_config(config).cfg == model.cfg


@each_family
def test_mixed_precision(family, tiny):
    model = family.create(dtype="mixed_bfloat16")
    assert {v.dtype for v in model.trainable_weights} == {"float32"}
    assert model.get_layer("head").compute_dtype == "float32"
    assert {layer.compute_dtype for layer in model.layers if "block_" in layer.name or layer.name == "stem"} == {
        "bfloat16"
    }
    nested = [sub for layer in model.layers if "block_" in layer.name for sub in layer._flatten_layers()]
    assert {sub.compute_dtype for sub in nested} == {"bfloat16"}
    images = families.images(model)
    logits, exact = predict(model, images), predict(tiny(family), images)
    assert logits.dtype == np.float32
    assert np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()
    assert keras.config.dtype_policy().name == "float32"


@each_family
def test_impossible_hyperparameters(family):
    for wrong, message in [
        (dict(num_classes=-1), "num_classes"),
        (dict(in_channels=0), "in_channels"),
        (dict(image_size=0), "image_size"),
        (dict(image_size=(32, 32, 3)), "image_size"),
        (dict(drop_path=1.0), "drop_path"),
        (dict(patch_sise=3), "patch_sise"),
    ]:
        with pytest.raises(ValueError, match=message):
            family.create(**wrong)


@each_family
def test_class_names_must_fit(family, tiny):
    with pytest.raises(ValueError, match="3 names but the model has 5 classes"):
        family.create(class_names=["a", "b", "c"])


def test_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown model 'mobilvit_xs'\. Did you mean 'mobilevit_xs'"):
        keras_vits.create("mobilvit_xs")
    with pytest.raises(ValueError, match=r"Unknown model 'zzz'\. See keras_vits\.list_models"):
        keras_vits.create("zzz")


def test_a_variant_cannot_be_registered_twice():
    cls, _ = registry.lookup("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="registered twice"):
        registry.register(cls)


# ---------------------------------------------------------------- the package


def imports(path):
    """(top-level package, whether inside a function) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0], id(node) in inside


def test_models_and_layers_know_no_backend():
    for folder in ("models", "layers"):
        for file in (PACKAGE / folder).glob("*.py"):
            packages = {package for package, _ in imports(file)} - set(sys.stdlib_module_names)
            backends = {"jax"} if file.name == "_backend.py" else set()  # the one place where they are told apart
            assert packages <= {"keras", "keras_vits"} | backends, file


def test_only_light_packages_are_imported_at_the_top():
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "hub.py" and not {"cli", "edge"} & set(file.parts)]
    assert len(files) > 15
    for file in files:
        heavy = {p for p, inside in imports(file) if not inside} - set(sys.stdlib_module_names)
        assert heavy <= {"keras", "keras_vits", "msgspec", "numpy"}, file


@pytest.mark.once
def test_import_is_light():
    """The public names load nothing heavy and add at most 0.3 s of CPU time to `import keras`, whatever its backend."""
    code = """
import os, sys, time
import keras
before = set(sys.modules)
for _ in range(3):
    if not os.fork():  # each copy imports the package for the first time
        start = time.process_time()
        from keras_vits import create, list_models, load_weights
        seconds = time.process_time() - start
        print(seconds, *sorted({name.split(".")[0] for name in set(sys.modules) - before}), flush=True)
        os._exit(0)
    os.wait()
"""
    environment = os.environ | {"KERAS_BACKEND": "jax"}  # which loads in half of PyTorch's time
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    seconds = []
    for line in run.stdout.splitlines()[-3:]:
        time, *packages = line.split()
        seconds.append(float(time))
        assert "keras_vits" in packages
        assert set(packages) <= {"keras_vits", "msgspec"} | set(sys.stdlib_module_names)
    assert len(seconds) == 3 and statistics.median(seconds) <= 0.3
