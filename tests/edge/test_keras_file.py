"""A .keras file as an artifact: its runner, and what it refuses."""

import keras
import numpy as np
import pytest
from families import FAMILIES, images

from keras_vits.edge import keras_file, verify


def vit(**overrides):
    return next(f for f in FAMILIES if f.name == "vit").create(**overrides)


def test_a_file_gives_what_its_model_gives(tmp_path):
    """An array for the one output, from an array or from name -> array."""
    model = vit()
    x = images(model, 3)
    artifact = keras_file.export(model, tmp_path)
    runner = keras_file.load(artifact)
    found = runner.predict(x)
    np.testing.assert_allclose(found, np.asarray(model.predict(x, verbose=0)), atol=1e-5)
    np.testing.assert_array_equal(runner.predict({artifact.input.name: x}), found)
    assert verify(artifact, model, x).top1_agreement == 1
    assert sum(runner.histogram().values()) == len(runner.model.layers)
    with pytest.raises(ValueError, match=r"takes image; received picture"):
        runner.predict({"picture": x})


@pytest.mark.parametrize("make", [lambda: vit().features([0, "pool"]), lambda: keras.Sequential([keras.Input((4,))])])
def test_other_models_are_refused(make, tmp_path):
    with pytest.raises(ValueError, match=r"writes a VisionModel.*received .*: use its own save"):
        keras_file.export(make(), tmp_path)
    assert not list(tmp_path.iterdir())
