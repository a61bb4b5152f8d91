"""Multiply-adds against counts by hand; against PyTorch's counter over timm's models: test_contract.py."""

import families
import keras
import pytest
from keras import layers

import keras_vits
from keras_vits import count_macs
from keras_vits._util.keras_private import has_value, values_later


def model(*stack, shape=(8, 6, 4)):
    x = inputs = keras.Input(shape)
    for layer in stack:
        x = layer(x)
    return keras.Model(inputs, x)


def of(*stack, **shape):
    """What makes a model, once a test asks."""
    return lambda: model(*stack, **shape)


def attend(x):
    return layers.MultiHeadAttention(num_heads=2, key_dim=5)(x, x)


CASES = {
    "dense": (of(layers.Dense(7)), 8 * 6 * 4 * 7),
    "dense of a vector": (of(layers.Flatten(), layers.Dense(7, use_bias=False)), 8 * 6 * 4 * 7),
    "convolution": (of(layers.Conv2D(7, 3, padding="same")), 8 * 6 * 7 * 3 * 3 * 4),
    "strides, no padding": (of(layers.Conv2D(7, (3, 2), strides=2)), 3 * 3 * 7 * 3 * 2 * 4),
    "dilation": (of(layers.Conv2D(7, 3, dilation_rate=2)), 4 * 2 * 7 * 3 * 3 * 4),
    "groups": (of(layers.Conv2D(6, 3, groups=2, padding="same")), 8 * 6 * 6 * 3 * 3 * 2),
    "depthwise": (of(layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same")), 8 * 6 * 8 * 3 * 3),
    "separable": (of(layers.SeparableConv2D(7, 3, padding="same")), 8 * 6 * 4 * 3 * 3 + 8 * 6 * 4 * 7),
    "einsum": (of(layers.EinsumDense("bhwc,cdw->bhd", (8, 5))), 8 * 5 * 6 * 4),
    "product of two tensors": (
        of(layers.Lambda(lambda x: keras.ops.matmul(x, x), (8, 6, 6)), shape=(8, 6, 6)),
        8 * 6**3,
    ),
    "attention": (of(attend, shape=(9, 4)), 3 * 9 * 4 * 10 + 2 * 2 * 9 * 9 * 5 + 9 * 10 * 4),
    "no products": (of(layers.LayerNormalization(), layers.Activation("gelu"), layers.MaxPooling2D()), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_by_hand(case):
    make, expected = CASES[case]
    counted = make()
    macs = count_macs(counted)
    assert isinstance(macs, int) and macs == expected


@pytest.mark.parametrize("family", families.everywhere("vit"))
def test_weights_are_not_needed(family, monkeypatch):
    """A model without weights, one with, and one in bfloat16 count the same; the model is as it was."""
    made = family.create()
    nodes = [len(layer._inbound_nodes) for layer in made._flatten_layers()]
    macs = count_macs(made)
    assert macs > 0 and nodes == [len(layer._inbound_nodes) for layer in made._flatten_layers()]
    assert macs == count_macs(family.create(dtype="mixed_bfloat16"))
    with values_later():
        empty = keras_vits.create(family.variant, **family.tiny)
        assert count_macs(empty) == macs
        assert not any(map(has_value, empty.trainable_weights))


def test_what_cannot_be_counted():
    with pytest.raises(ValueError, match=r"functional inputs can be traced; received Dense, which has none"):
        count_macs(layers.Dense(3))
    with pytest.raises(ValueError, match=r"axis of unknown size \(None, None, None, 3\)"):
        count_macs(model(layers.Conv2D(3, 3), shape=(None, None, 3)))
