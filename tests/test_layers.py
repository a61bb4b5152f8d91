"""The shared layers against their formulas, written out in numpy."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vits.layers import (
    ConvNorm,
    DropPath,
    GroupNorm,
    InvertedResidual,
    Mlp,
    MultiHeadAttention,
    SeparableSelfAttention,
    TransformerBlock,
    drop_path_rates,
    fold,
    unfold,
)

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return RANDOM.normal(size=shape).astype("float32")


def run(layer, x):
    """The layer's output, after every weight of it became random."""
    layer.build(x.shape)
    for variable in layer.trainable_weights:
        variable.assign(RANDOM.normal(0, 0.5, variable.shape))
    return ops.convert_to_numpy(layer(x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_attention():
    layer, x = MultiHeadAttention(heads=2), normal(3, 5, 8)
    found = run(layer, x)
    kernel, bias, out_kernel, out_bias = layer.get_weights()
    qkv = x @ kernel + bias
    q, k, v = (qkv[..., i * 8 : (i + 1) * 8].reshape(3, 5, 2, 4).transpose(0, 2, 1, 3) for i in range(3))
    y = (softmax(q @ k.transpose(0, 1, 3, 2) / 2) @ v).transpose(0, 2, 1, 3).reshape(3, 5, 8)
    np.testing.assert_allclose(found, y @ out_kernel + out_bias, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="heads=3, width=8"):
        MultiHeadAttention(heads=3).build((None, 5, 8))


def test_mlp_is_the_exact_gelu():
    from math import erf

    layer, x = Mlp(6), normal(2, 3, 4)
    found = run(layer, x)
    k1, b1, k2, b2 = layer.get_weights()
    hidden = x @ k1 + b1
    hidden = hidden * 0.5 * (1 + np.vectorize(erf)(hidden / np.sqrt(2)))
    np.testing.assert_allclose(found, hidden @ k2 + b2, rtol=1e-4, atol=1e-5)


def test_separable_attention():
    layer, x = SeparableSelfAttention(1), normal(2, 4, 6, 8)
    found = run(layer, x)
    kernel, bias, out_kernel, out_bias = layer.get_weights()
    qkv = x @ kernel + bias
    scores = softmax(qkv[..., 0])
    context = np.einsum("bpn,bpnd->bpd", scores, qkv[..., 1:9])
    expected = (np.maximum(qkv[..., 9:], 0) * context[:, :, None]) @ out_kernel + out_bias
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_group_norm(groups):
    layer, x = GroupNorm(groups), 3 * normal(2, 4, 6, 8) + 5
    found = run(layer, x)
    gamma, beta = layer.get_weights()
    y, axes = x.reshape(2, 4, 6, groups, 8 // groups), (1, 2, 4)
    y = (y - y.mean(axes, keepdims=True)) / np.sqrt(y.var(axes, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, y.reshape(x.shape) * gamma + beta, rtol=1e-4, atol=1e-4)
    theirs = keras.layers.GroupNormalization(groups, epsilon=1e-5)
    theirs.build(x.shape)
    theirs.set_weights([gamma, beta])
    np.testing.assert_allclose(found, ops.convert_to_numpy(theirs(x)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="groups=3, channels=8"):
        GroupNorm(3).build(x.shape)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("width", [None, 5])
def test_convolution_pads_like_pytorch(strides, size, width):
    torch = pytest.importorskip("torch")
    layer, x = ConvNorm(width, 3, strides, activation=None), normal(2, size, size, 4)
    found = run(layer, x)
    kernel = ops.convert_to_numpy(layer.conv.kernel)
    theirs = torch.nn.functional.conv2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
        torch.from_numpy(kernel.transpose((2, 3, 0, 1) if width is None else (3, 2, 0, 1)).copy()),
        stride=strides,
        padding=1,
        groups=4 if width is None else 1,
    ).numpy()
    gamma, beta = (ops.convert_to_numpy(v) for v in (layer.bn.gamma, layer.bn.beta))
    expected = theirs.transpose(0, 2, 3, 1) / np.sqrt(1 + 1e-5) * gamma + beta
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width, strides, residual", [(4, 1, True), (4, 2, False), (6, 1, False)])
def test_inverted_residual_adds_its_input_where_the_shape_stays(width, strides, residual):
    layer, x = InvertedResidual(width, strides, expansion=2), normal(2, 8, 8, 4)
    layer.build(x.shape)
    layer.project.bn.gamma.assign(np.zeros(width))  # the branch gives nothing
    found = ops.convert_to_numpy(layer(x))
    assert found.shape == (2, 8 // strides, 8 // strides, width)
    np.testing.assert_array_equal(found, x if residual else np.zeros_like(found))


def test_unfold_puts_the_pixels_of_a_patch_first_and_fold_undoes_it():
    x = normal(2, 4, 6, 3)
    found = ops.convert_to_numpy(unfold(ops.convert_to_tensor(x), 2))
    expected = x.reshape(2, 2, 2, 3, 2, 3).transpose(0, 2, 4, 1, 3, 5).reshape(2, 4, 6, 3)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(ops.convert_to_numpy(fold(ops.convert_to_tensor(found), 4, 6, 2)), x)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    layer, x = DropPath(0.25), np.ones((4000, 3, 2), "float32")
    found = ops.convert_to_numpy(layer(x, training=True))
    assert set(np.unique(found.round(4))) == {np.float32(0), np.float32(1.3333)}
    assert (found == found[:, :1, :1]).all()
    assert abs(found.mean() - 1) < 0.04
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(x, training=False)), x)


def test_drop_path_rates():
    assert drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0]


@pytest.mark.parametrize(
    "layer, shape",
    [
        (MultiHeadAttention(2, qkv_bias=False), (2, 5, 8)),
        (Mlp(6, "silu"), (2, 5, 8)),
        (TransformerBlock(2, 16, 1e-5, "silu", drop_path=0.1), (2, 5, 8)),
        (ConvNorm(6, 3, 2), (2, 8, 8, 4)),
        (InvertedResidual(6, 2, 2, 0.1), (2, 8, 8, 4)),
        (DropPath(0.2), (2, 3)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, keras.Layer) else "",
)
def test_a_layer_comes_back_from_its_config(layer, shape):
    x = normal(*shape)
    expected = run(layer, x)
    again = type(layer).from_config(layer.get_config())
    again.build(shape)
    again.set_weights(layer.get_weights())
    np.testing.assert_array_equal(ops.convert_to_numpy(again(x)), expected)
