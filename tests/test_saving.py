"""Saved models open again, in a fresh process after `import keras_vits`, and hold what they held."""

import inspect
import json
import os
import subprocess
import sys

import families
import keras
import numpy as np
import pytest
from families import predict

import keras_vits
from keras_vits import checkpoints, edge, layers
from keras_vits.models import _registry as registry

VIT = families.FAMILIES[0]
VALUES = {
    "kind": "learned",
    "heads": 2,
    "mlp_hidden": 8,
    "hidden": 8,
    "width": 8,
    "epsilon": 1e-6,
    "initial": 0.1,
    "rate": 0.1,
}
CLASSES = {name: cls for name in layers.__all__ if inspect.isclass(cls := getattr(layers, name))}
PUBLIC = {name: cls for name, cls in CLASSES.items() if cls is not layers.SameShape}  # which computes nothing
LOAD = """
import json, sys
{imports}
found = {{}}
for path, expected in json.load(open(sys.argv[1])).items():
    try:
        model = keras.saving.load_model(path)
        x = np.load(path + ".npy")
        y = keras.tree.flatten(model(x, training=False))[0]
        y = keras.ops.convert_to_numpy(y)
        found[path] = float(np.abs(y - np.load(path + ".out.npy")).max())
    except Exception as error:
        found[path] = f"{{type(error).__name__}}: {{error}}"[:400]
print(json.dumps(found))
"""


def layer(cls):
    """A layer with what its constructor demands."""
    parameters = inspect.signature(cls).parameters.values()
    demanded = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return cls(**{name: VALUES.get(name, 2) for name in demanded}, name="ours")


def models():
    """Name -> a model that holds ours."""
    for name, cls in PUBLIC.items():
        shape = (8, 8, 8) if name in ("ConvNorm", "InvertedResidual") else (16, 8)
        x = keras.Input(shape)
        yield name, keras.Model(x, layer(cls)(x))
    for family in families.FAMILIES:
        model = family.create()
        yield f"{family.variant}", model
        yield f"{family.variant}_features", model.features()
        yield f"{family.variant}_head", keras.Model(model.input, keras.layers.Dense(3)(model.layers[-2].output))
    yield "maps", VIT.create().features([0, -1], maps=True)
    yield "clone", keras.models.clone_model(VIT.create())
    image = keras.Input((32, 32, 3))
    left, right = (VIT.create(name=name) for name in ("left", "right"))
    yield "two", keras.Model(image, keras.layers.concatenate([left(image), right(image)]))
    yield "within", keras.Sequential([keras.Input((32, 32, 3)), VIT.create(), keras.layers.Dense(2)])


def opened(listed, imports):
    code = LOAD.format(imports=imports)
    done = subprocess.run([sys.executable, "-c", code, listed], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_layer_and_family_opens_in_a_fresh_process(tmp_path):
    expected = {}
    for name, model in models():
        path = str(tmp_path / f"{name}.keras")
        x = np.random.default_rng(0).normal(size=(2, *model.input_shape[1:])).astype("float32")
        np.save(f"{path}.npy", x)
        y = keras.tree.flatten(model(x, training=False))[0]
        np.save(f"{path}.out.npy", keras.ops.convert_to_numpy(y))
        model.save(path)
        expected[path] = name
    (tmp_path / "list.json").write_text(json.dumps(expected))
    found = opened(tmp_path / "list.json", "import keras_vits, keras, numpy as np")
    assert set(found) == set(expected)
    failed = {expected[path]: result for path, result in found.items() if not (result == 0 or result < 1e-4)}
    assert not failed


@pytest.mark.parametrize(
    "imports",
    [
        "import keras; import keras_vits",
        "import importlib.util; import keras_vits; importlib.util.find_spec('keras'); import keras",
        "from keras_vits.layers import Mlp; import keras",
        "import keras_vits; keras_vits.list_models; import keras",
        "from keras_vits import edge; import keras",
    ],
)
def test_the_order_of_the_imports_does_not_matter(imports, tmp_path):
    model, path = VIT.create(), str(tmp_path / "model.keras")
    x = families.images(model)
    np.save(f"{path}.npy", x)
    np.save(f"{path}.out.npy", keras.ops.convert_to_numpy(model(x, training=False)))
    model.save(path)
    (tmp_path / "list.json").write_text(json.dumps({path: ""}))
    (result,) = opened(tmp_path / "list.json", f"{imports}; import numpy as np").values()
    assert isinstance(result, float) and result < 1e-4, result


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda f: f.name)
def test_a_clone_is_a_model_of_ours(family):
    model = family.create(class_names=list("abcde"), preprocessing=dict(crop=0.5))
    clone = keras.models.clone_model(model)
    assert type(clone) is type(model) and clone.get_config() == model.get_config()
    clone.set_weights(model.get_weights())
    images = families.images(model)
    np.testing.assert_allclose(predict(clone, images), predict(model, images), rtol=1e-4, atol=1e-5)
    assert len(clone.features().outputs) == len(model.features().outputs)


def test_a_clone_with_other_layers_is_a_plain_model():
    def other(layer):
        config = layer.get_config()
        return type(layer).from_config({**config, "rate": 0.5} if layer.name == "drop" else config)

    clone = keras.models.clone_model(VIT.create(), clone_function=other)
    assert not isinstance(clone, keras_vits.VisionModel) and clone.get_layer("drop").rate == 0.5


def test_frozen_layers_inside_layers_stay_frozen(tmp_path):
    model = VIT.create()
    model.get_layer("block_0").attention.trainable = False
    model.get_layer("block_1").trainable = False
    expected = {v.path for v in model.trainable_variables}
    assert "block_0/attention/qkv/kernel" not in expected and "block_0/mlp/fc1/kernel" in expected
    model.save(tmp_path / "model.keras")
    for other in (keras_vits.load(tmp_path / "model.keras"), model.reset_head(3), model.resized((32, 64))):
        assert {v.path for v in other.trainable_variables} == expected
    old = {**model.get_config(), "frozen": ["stem"]}
    assert "stem/kernel" not in {v.path for v in type(model).from_config(old).trainable_variables}


def test_load_checks_the_hash(tmp_path):
    model = VIT.create()
    path = edge.keras_file.export(model, tmp_path).path
    assert keras_vits.load(path).cfg == model.cfg
    VIT.create(num_classes=3).save(path)
    with pytest.raises(ValueError, match="was changed after it was written: its hash is not the one in"):
        keras_vits.load(path)
    path.with_name(f"{path.name}.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe"):
        keras_vits.load(path)
    path.with_name(f"{path.name}.json").unlink()
    assert keras_vits.load(str(path)).cfg.num_classes == 3


def test_a_legacy_file_is_refused_when_it_is_saved(tmp_path):
    with pytest.raises(ValueError, match=r"saved as \.keras files; received .*model\.h5"):
        VIT.create().save(tmp_path / "model.h5")
    assert not list(tmp_path.iterdir())


def test_the_name_is_free_and_the_default_checkpoint_is_named(monkeypatch):
    assert VIT.create(name="left").name == "left" and VIT.create().name == VIT.variant
    assert [v.path for v in VIT.create(name="left").weights] == [v.path for v in VIT.create().weights]
    asked = []

    def download(hub_id):
        asked.append(hub_id)
        raise ValueError("no network")

    monkeypatch.setattr(checkpoints.catalogue, "download", download)
    for given in (dict(weights=True), dict(pretrained=True)):
        with pytest.raises(ValueError, match="no network"):
            keras_vits.create("efficientvit_b1", **given)
    best = max(checkpoints.published("efficientvit_b1"), key=lambda c: c.top1)
    assert asked == [best.hub_id] * 2
    assert VIT.create(weights=False).cfg == VIT.create(pretrained=False).cfg
    with pytest.raises(ValueError, match="mobilevitv3_xxs has no published checkpoint"):
        keras_vits.create("mobilevitv3_xxs", pretrained=True)
    with pytest.raises(ValueError, match=r"names no checkpoint: give weights=True"):
        keras_vits.create("efficientvit_b1", weights="imagenet")
    with pytest.raises(ValueError, match="pretrained is True or False, without weights"):
        keras_vits.create("efficientvit_b1", weights="here", pretrained=True)


def test_every_class_has_a_name_of_its_own():
    registry.variants()
    ours = {name for name in keras.saving.get_custom_objects() if name.startswith("keras_vits>")}
    assert {f"keras_vits>{name}" for name in PUBLIC} <= ours and len(ours) > 40
