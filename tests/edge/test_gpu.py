"""What a phone's GPU refuses is found, and named by our layers; what we export has nothing of it."""

import keras
import numpy as np
import pytest
from families import FAMILIES

from keras_vits import edge
from keras_vits.edge.targets.litert import gpu

pytestmark = pytest.mark.once


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_family_is_clean(family, tmp_path):
    assert gpu.offenders(edge.litert.export(family.create(), tmp_path).path) == ()


def test_offenders_are_named_by_our_layers(tmp_path):
    model = FAMILIES[0].create()
    file = edge.litert.export(model, tmp_path, head="top_k")
    (found,) = gpu.offenders(file.path)
    assert found.startswith("top_k/top_k: TOPK_V2 is not for GPUs")
    image = keras.Input((4, 4, 3))
    chosen = keras.layers.Lambda(lambda x: keras.ops.take(x, [2, 0, 3], axis=1), (3, 4, 3), name="chosen")(image)
    mask = keras.layers.Lambda(lambda x: keras.ops.where(x > 0, x, 1.0), (3, 4, 3), name="mask")(chosen)
    found = gpu.offenders(edge.litert.export(keras.Model(image, mask, name="odd"), tmp_path).path)
    assert [text.split(" is not")[0] for text in found] == ["chosen/gather: GATHER", "mask/where: SELECT_V2"]


def test_verify_tells(tmp_path):
    model = FAMILIES[0].create()
    check = edge.verify(edge.litert.export(model, tmp_path), against=model, images=np.zeros((1, 32, 32, 3), "float32"))
    assert check.gpu_offenders == ()
    before, after = check.operations
    assert before > after > 20
    assert edge.artifact.load(check.artifact.path).operations == (before, after)
