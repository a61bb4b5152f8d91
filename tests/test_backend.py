"""Layers in the words that are fastest on a backend: Keras' own results and gradients, and no other graph."""

import keras
import numpy as np
import pytest
from families import FAMILIES
from keras import layers, ops

from keras_vits.edge import trace
from keras_vits.layers import _backend
from keras_vits.layers._backend import apply

CASES = {
    "depthwise": lambda: layers.DepthwiseConv2D(3, padding="same", use_bias=False),
    "depthwise, 5 x 3, a bias and an activation": lambda: layers.DepthwiseConv2D((5, 3), activation="silu"),
    "depthwise, stride 2": lambda: layers.DepthwiseConv2D(3, strides=2),
    "depthwise, stride 2 and same": lambda: layers.DepthwiseConv2D(3, strides=2, padding="same"),
    "depthwise, as large as the map": lambda: layers.DepthwiseConv2D((7, 9)),
    "1 x 1": lambda: layers.Conv2D(5, 1, use_bias=False),
    "1 x 1, stride 2, a bias and an activation": lambda: layers.Conv2D(5, 1, strides=2, activation="relu"),
    "dilated": lambda: layers.DepthwiseConv2D(3, dilation_rate=2),
    "two kernels for a channel": lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
    "groups": lambda: layers.Conv2D(6, 1, groups=2),
    "3 x 3": lambda: layers.Conv2D(5, 3, padding="same"),
}


def built(make, dtype="float32"):
    keras.utils.set_random_seed(1)
    layer = make()
    layer.dtype_policy = keras.DTypePolicy(dtype)
    layer.build((None, 7, 9, 4))
    if getattr(layer, "use_bias", False):
        layer.bias.assign(np.random.default_rng(2).normal(size=layer.bias.shape))
    return layer, np.random.default_rng(3).normal(size=(2, 7, 9, 4)).astype("float32")


def gradients(call, layer, x):
    """Of the sum of squares, by the input and every weight, on the backend at hand."""
    weights = [variable.value for variable in layer.trainable_variables]
    if keras.backend.backend() == "jax":
        import jax

        def loss(x, weights):
            with keras.StatelessScope(state_mapping=list(zip(layer.trainable_variables, weights, strict=True))):
                return ops.sum(ops.square(call(layer, x)))

        by_input, by_weights = jax.jit(jax.grad(loss, argnums=(0, 1)))(ops.convert_to_tensor(x), weights)
        return [np.asarray(g) for g in (by_input, *by_weights)]
    if keras.backend.backend() == "torch":
        import torch

        given = torch.tensor(x, requires_grad=True)
        loss = ops.sum(ops.square(call(layer, given)))
        return [g.numpy() for g in torch.autograd.grad(loss, [given, *weights])]
    import tensorflow as tf

    given = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(given)
        loss = ops.sum(ops.square(call(layer, given)))
    return [g.numpy() for g in tape.gradient(loss, [given, *weights])]


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_keras(name):
    layer, x = built(CASES[name])
    own, ours = (
        ops.convert_to_numpy(y) for y in (layer(ops.convert_to_tensor(x)), apply(layer, ops.convert_to_tensor(x)))
    )
    np.testing.assert_allclose(ours, own, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients(apply, layer, x), gradients(lambda own, x: own(x), layer, x), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


class Doubled(layers.DepthwiseConv2D):
    """A layer of a user's."""

    def call(self, x):
        return 2 * super().call(x)


def adapted():
    layer = layers.Conv2D(5, 1)
    layer.build((None, 7, 9, 4))
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))
    return layer


def quantized():
    layer = layers.Dense(3)
    layer.build((None, 7, 9, 4))
    layer.quantize("int8")
    return layer


@pytest.mark.parametrize("make", [lambda: Doubled(3), adapted, quantized], ids=["a subclass", "adapted", "quantized"])
def test_what_is_not_plain_is_called(make):
    layer = make()
    x = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(2, 7, 9, 4)).astype("float32"))
    np.testing.assert_array_equal(*(ops.convert_to_numpy(y) for y in (apply(layer, x), layer(x))))


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_sixteen_bits_are_summed_as_precisely_as_before(dtype):
    for name in ("depthwise", "1 x 1"):
        layer, x = built(CASES[name], dtype)
        given = ops.cast(ops.convert_to_tensor(x), layer.compute_dtype)
        with keras.src.backend.common.variables.AutocastScope(layer.compute_dtype):
            ours = ops.convert_to_numpy(ops.cast(apply(layer, given), "float32"))
        own = ops.convert_to_numpy(ops.cast(layer(given), "float32"))
        np.testing.assert_allclose(ours, own, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="no other backend has another way to say them")
def test_jax_takes_them_in_other_words_on_a_processor(monkeypatch):
    import jax

    layer, x = built(CASES["depthwise"])
    words = lambda: str(jax.make_jaxpr(lambda x: apply(layer, x))(x))
    assert "conv_general_dilated" not in words()
    monkeypatch.setattr(_backend, "_spelled", dict)  # as on a GPU
    assert "conv_general_dilated" in words()


def test_graphs_keep_their_convolutions():
    model = next(family for family in FAMILIES if family.name == "mobilevit_v2").create()
    graph = trace(model)
    found = [node.op for node in graph.nodes]
    depthwise = sum(isinstance(layer, layers.DepthwiseConv2D) for layer in model._flatten_layers())
    assert found.count("depthwise_conv2d") == depthwise > 0
