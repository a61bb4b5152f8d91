"""Saved models open again, in a fresh process after `import keras_vits`, and hold what they held."""

import inspect
import itertools
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
from keras_vits._util.keras_private import set_value, values_later
from keras_vits.models import _registry as registry

VIT = families.FAMILIES[0]
TWO = [family for family in families.FAMILIES if family.name in ("vit", "mobilevit")]
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
import json, os, sys
{imports}
found = {{}}
for path in json.load(open(sys.argv[1])):
    try:
        model, x = keras.saving.load_model(path), np.load(path + ".npz")
        differs = [name for name in x.files if name.startswith("w") and not np.array_equal(
            x[name], keras.ops.convert_to_numpy(model.weights[int(name[1:])]))]
        if len(model.weights) != sum(name.startswith("w") for name in x.files):
            differs.append("number of weights")
        if json.loads(json.dumps(model.get_config())) != json.load(open(path + ".json")):
            differs.append("configuration")
        if "x" in x.files:
            y = keras.ops.convert_to_numpy(keras.tree.flatten(model(x["x"], training=False))[0])
            if not np.abs(y - x["y"]).max() < 1e-4:
                differs.append("output")
        found[path] = ", ".join(differs)
    except Exception as error:
        found[path] = f"{{type(error).__name__}}: {{error}}"[:400]
print(json.dumps(found))
"""


def layer(cls):
    """A layer with what its constructor demands."""
    parameters = inspect.signature(cls).parameters.values()
    demanded = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    demanded += [p.name for p in parameters if p.name == "groups"]  # whose default is for more channels than here
    return cls(**{name: VALUES.get(name, 2) for name in demanded}, name="ours")


def models():
    """(name, a model that holds ours, whether its outputs are compared).

    The layers' outputs are compared on one backend: to compute them takes JAX longer than all the rest.
    """
    compared = keras.backend.backend() == "torch"
    for name, cls in PUBLIC.items():
        shape = (8, 8, 8) if name in ("ConvNorm", "GroupNorm", "InvertedResidual") else (16, 8)
        x = keras.Input(shape)
        with values_later():
            model = keras.Model(x, layer(cls)(x))
        yield name, families.randomize(model), compared
    yield "maps", VIT.create().features([0, -1], maps=True), True
    original = VIT.create()
    with values_later():
        clone = keras.models.clone_model(original)
    yield "clone", families.randomize(clone), True
    image = keras.Input((32, 32, 3))
    left, right = (VIT.create(name=name) for name in ("left", "right"))
    yield "two", keras.Model(image, keras.layers.concatenate([left(image), right(image)])), True
    yield "within", keras.Sequential([keras.Input((32, 32, 3)), VIT.create(), keras.layers.Dense(2)]), True


def of_family(family):
    """The family's own model, of two families its features, and a user's model on its layers."""
    model = family.create()
    yield f"{family.variant}", model, family is VIT
    if family in (VIT, families.FAMILIES[-1]):
        yield f"{family.variant}_features", model.features(), family is VIT
    head = keras.layers.Dense(3)(model.layers[-2].output)
    yield f"{family.variant}_head", keras.Model(model.input, head), family is VIT


def save(model, path, compared=True):
    """Writes a model, its configuration and weights, and an input with its output."""
    model.save(path)
    path.with_name(f"{path.name}.json").write_text(json.dumps(model.get_config()))
    values = {f"w{i}": keras.ops.convert_to_numpy(v) for i, v in enumerate(model.weights)}
    if compared:
        x = np.random.default_rng(0).normal(size=(2, *model.input_shape[1:])).astype("float32")
        y = keras.tree.flatten(model(x, training=False))[0]
        values |= dict(x=x, y=keras.ops.convert_to_numpy(y))
    np.savez(f"{path}.npz", **values)


def opened(paths, imports, **environment):
    """What differs in each file's model, "" if nothing does; read by a new process."""
    listed = paths[0].parent / "list.json"
    listed.write_text(json.dumps([str(path) for path in paths]))
    code = LOAD.format(imports=imports)
    done = subprocess.run(
        [sys.executable, "-c", code, listed], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(done.stdout.splitlines()[-1])[str(path)] for path in paths}


def open_again(models, folder):
    """Saves them all and opens them in a new process."""
    paths = []
    for name, model, compared in models:
        paths.append(folder / f"{name}.keras")
        save(model, paths[-1], compared)
    found = opened(paths, "import keras_vits, keras, numpy as np")
    assert len(found) == len(paths) and not {name: differs for name, differs in found.items() if differs}


def test_every_layer_and_family_opens_in_a_fresh_process(tmp_path):
    """Of the families, all on one backend and two on the others. Outputs are compared where they are quick to compute;
    elsewhere weights and configuration, which make them."""
    some = families.FAMILIES if keras.backend.backend() == "torch" else TWO
    open_again(itertools.chain(models(), *map(of_family, some)), tmp_path)


IMPORTS = (
    "import keras; import keras_vits",
    "import importlib.util; import keras_vits; importlib.util.find_spec('keras'); import keras",
    "from keras_vits import edge; edge.artifact; from keras_vits.layers import Mlp; import keras",
)
EACH = f"""
import json, os, sys
import h5py, jax, numpy as np, sklearn.base  # most of what Keras imports
for number, imports in enumerate({IMPORTS!r}):
    assert not {{"keras", "keras_vits"}} & set(sys.modules)
    if not os.fork():  # each copy imports them for the first time
        exec(imports)
        os.dup2(os.open(f"{{sys.argv[1]}}.{{number}}", os.O_CREAT | os.O_WRONLY), 1)
        break
    os.wait()
else:
    found = [json.load(open(f"{{sys.argv[1]}}.{{number}}")) for number in range({len(IMPORTS)})]
    print(json.dumps({{path: "".join(each[path] for each in found) for path in found[0]}}))
    sys.exit()
"""


@pytest.mark.once
def test_the_order_of_the_imports_does_not_matter(tmp_path):
    save(VIT.create(), tmp_path / "model.keras", compared=False)
    found = opened([tmp_path / "model.keras"], EACH, KERAS_BACKEND="jax")
    assert found == {"model": ""}


@pytest.mark.parametrize("family", families.everywhere("vit", "mobilevit"))
def test_a_clone_is_a_model_of_ours(family):
    model = family.create(class_names=list("abcde"), preprocessing=dict(crop=0.5))
    with values_later():
        clone = keras.models.clone_model(model)
    assert type(clone) is type(model) and clone.get_config() == model.get_config()
    for ours, theirs in zip(clone.weights, model.weights, strict=True):
        set_value(ours, keras.ops.convert_to_numpy(theirs))
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
    for damaged in ("{}", '{"sha256": 3}', "[]", "[" * 9999):
        path.with_name(f"{path.name}.json").write_text(damaged)
        with pytest.raises(ValueError, match="does not describe"):
            keras_vits.load(path)
    path.with_name(f"{path.name}.json").unlink()
    assert keras_vits.load(str(path)).cfg.num_classes == 3


def test_a_legacy_file_is_refused_when_it_is_saved(tmp_path):
    with pytest.raises(ValueError, match=r"saved as \.keras files; received .*model\.h5"):
        VIT.create().save(tmp_path / "model.h5")
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_a_legacy_file_is_refused_by_whatever_function_saves_it(tmp_path):
    model = VIT.create()
    image = keras.Input(model.input_shape[1:])
    whole = keras.Model(image, keras.layers.Dense(2)(model(image)))
    for save in (
        lambda path: keras.saving.save_model(model, path),
        lambda path: keras.models.save_model(model, path),
        whole.save,
        lambda path: keras.models.save_model(keras.Sequential([model]), path),
    ):
        for suffix in (".h5", ".hdf5"):
            with pytest.raises(ValueError, match=r"Models of keras_vits are saved as \.keras files; received"):
                save(tmp_path / f"model{suffix}")
    model.save(tmp_path / "model.keras")  # nothing of it is left behind in the process
    assert keras_vits.load(tmp_path / "model.keras").cfg == model.cfg


def test_the_name_is_free_and_the_default_checkpoint_is_named(monkeypatch):
    assert VIT.create(name="left").name == "left" and VIT.create().name == VIT.variant
    assert [v.path for v in VIT.create(name="left").weights] == [v.path for v in VIT.create().weights]
    asked = []

    def download(hub_id):
        asked.append(hub_id)
        raise ValueError("no network")

    monkeypatch.setattr(checkpoints.files, "download", download)
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
