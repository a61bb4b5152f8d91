"""The linear attentions against timm, against their papers' formulas as matrices (N,N) in float64, and in time."""

import time

import keras
import numpy as np
import pytest
from families import once_but
from keras import ops

from keras_vits import edge
from keras_vits.graph.trace import trace
from keras_vits.layers import (
    ATTENTIONS,
    CrossCovarianceAttention,
    FavorAttention,
    LinformerAttention,
    MultiHeadAttention,
    ReLULinearAttention,
    SeparableSelfAttention,
)
from keras_vits.models.efficientvit import MultiScaleAttention

HEADS, TOKENS, WIDTH = 2, 12, 8

each = pytest.mark.parametrize("name", ATTENTIONS)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def randomized(layer, shape, scale=0.5, seed=3):
    """The layer, built, with every trainable weight random."""
    layer.build(shape)
    random = np.random.default_rng(seed)
    for variable in layer.trainable_weights:
        variable.assign(random.normal(0, scale, variable.shape))
    return layer


def run(layer, x):
    return ops.convert_to_numpy(layer(x))


def close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def rows(weights):
    """Every row divided by its sum."""
    return weights / weights.sum(-1, keepdims=True)


def value(variable):
    return ops.convert_to_numpy(variable).astype("float64")


# ---------------------------------------------------------------- formulas


def matrix_kernel(layer, q, k, v):
    """Similarity elu + 1: equation 5 of Katharopoulos et al. with the matrix written out."""
    f = lambda x: np.where(x > 0, x + 1, np.exp(x))
    return rows(f(q) @ f(k).mT + 1e-6 / TOKENS) @ v


def matrix_relu(layer, q, k, v):
    weights = np.maximum(q, 0) @ np.maximum(k, 0).mT
    return weights / (weights.sum(-1, keepdims=True) + 1e-5) @ v


def matrix_favor(layer, q, k, v):
    """Lemma 1 of Choromanski et al.: exp(w x - |x|^2 / 2) with the layer's w, of x divided by d^(1/4)."""
    w, d = value(layer.projection), q.shape[-1]
    f = lambda x: np.exp(x @ w / d**0.25 - (x**2).sum(-1, keepdims=True) / (2 * d**0.5))
    return rows(f(q) @ f(k).mT) @ v


def matrix_efficient(layer, q, k, v):
    return softmax(q) @ softmax(k, axis=-2).mT @ v


def matrix_cross_covariance(layer, q, k, v):
    q, k = (x / np.linalg.norm(x, axis=-2, keepdims=True) for x in (q, k))
    return np.stack(
        [
            sum(row[..., j, None] * v[..., j] for j in range(v.shape[-1]))
            for row in np.moveaxis(softmax(q.mT @ k * value(layer.temperature)), -2, 0)
        ],
        axis=-1,
    )


def matrix_linformer(layer, q, k, v):
    e, f = value(layer.key_projection), value(layer.value_projection)
    return softmax(q @ (e.T @ k).mT / q.shape[-1] ** 0.5) @ (f.T @ v)


MATRICES = {
    "kernel": matrix_kernel,
    "relu_linear": matrix_relu,
    "favor": matrix_favor,
    "efficient": matrix_efficient,
    "cross_covariance": matrix_cross_covariance,
    "linformer": matrix_linformer,
}


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.once)])
@pytest.mark.parametrize("name", MATRICES)
def test_formula(name, bias):
    x = normal(3, TOKENS, WIDTH)
    layer = randomized(ATTENTIONS[name](HEADS, qkv_bias=bias), x.shape, scale=0.3)
    qkv = x.astype("float64") @ value(layer.qkv.kernel) + (value(layer.qkv.bias) if bias else 0)
    q, k, v = np.moveaxis(qkv.reshape(3, TOKENS, 3, HEADS, WIDTH // HEADS), (2, 3), (0, 2))  # (B,heads,N,d) each
    y = np.moveaxis(MATRICES[name](layer, q, k, v), 1, 2).reshape(x.shape)
    close(run(layer, x), y @ value(layer.out.kernel) + value(layer.out.bias), tolerance=3e-5)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_separable_attention(heads):
    """A head alone is the layer with one head, on the head's own channels."""
    x, d = normal(3, TOKENS, WIDTH), WIDTH // heads
    layer = randomized(SeparableSelfAttention(heads), x.shape)
    qkv = x.astype("float64") @ value(layer.qkv.kernel) + value(layer.qkv.bias)
    q, k, v = np.split(qkv, [heads, heads + WIDTH], axis=-1)
    y = np.empty_like(v)
    for b in range(3):
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            y[b, :, own] = np.maximum(v[b, :, own], 0) * (softmax(q[b, :, h]) @ k[b, :, own])
    close(run(layer, x), y @ value(layer.out.kernel) + value(layer.out.bias))


# ---------------------------------------------------------------- timm


def test_separable_attention_equals_timm_on_maps_of_patches(timm):
    import torch

    theirs = timm.models.mobilevit.LinearSelfAttention(WIDTH).eval()
    x = normal(2, 4, TOKENS, WIDTH)  # (B,P,N,D)
    layer = randomized(SeparableSelfAttention(heads=1), x.shape)
    with torch.no_grad():
        for ours, conv in ((layer.qkv, theirs.qkv_proj), (layer.out, theirs.out_proj)):
            conv.weight.copy_(torch.from_numpy(value(ours.kernel).T[:, :, None, None]))
            conv.bias.copy_(torch.from_numpy(value(ours.bias)))
        expected = theirs(torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1).numpy()
    close(run(layer, x), expected)


def test_cross_covariance_attention_equals_timm(timm):
    import torch

    theirs = timm.models.xcit.XCA(WIDTH, HEADS, qkv_bias=True).eval()
    x = normal(2, TOKENS, WIDTH)
    layer = randomized(CrossCovarianceAttention(HEADS), x.shape)
    with torch.no_grad():
        for ours, dense in ((layer.qkv, theirs.qkv), (layer.out, theirs.proj)):
            dense.weight.copy_(torch.from_numpy(value(ours.kernel).T))
            dense.bias.copy_(torch.from_numpy(value(ours.bias)))
        theirs.temperature.copy_(torch.from_numpy(value(layer.temperature)))
        expected = theirs(torch.from_numpy(x)).numpy()
    close(run(layer, x), expected)


def test_relu_linear_attention_equals_timm(timm):
    """timm's layer without its second scale and norm; its channels are ordered by head, then q, k, v."""
    import torch

    d = WIDTH // HEADS
    theirs = timm.models.efficientvit_mit.LiteMLA(WIDTH, WIDTH, dim=d, scales=(), use_bias=True).eval()
    theirs.proj.norm = torch.nn.Identity()
    x = normal(2, 3, 4, WIDTH)
    layer = randomized(ReLULinearAttention(HEADS), (2, 12, WIDTH))
    by_head = lambda a: np.swapaxes(a.reshape(3, HEADS, d, -1), 0, 1).reshape(3 * WIDTH, -1)
    with torch.no_grad():
        theirs.qkv.conv.weight.copy_(torch.from_numpy(by_head(value(layer.qkv.kernel).T))[..., None, None])
        theirs.qkv.conv.bias.copy_(torch.from_numpy(by_head(value(layer.qkv.bias)))[:, 0])
        theirs.proj.conv.weight.copy_(torch.from_numpy(value(layer.out.kernel).T)[..., None, None])
        theirs.proj.conv.bias.copy_(torch.from_numpy(value(layer.out.bias)))
        expected = theirs(torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1).numpy()
    close(run(layer, x.reshape(2, 12, WIDTH)), expected.reshape(2, 12, WIDTH))


def test_a_token_without_positive_features_gives_nothing():
    """relu of a query may be zero in every channel: the divisor's epsilon keeps 0 / 0 away."""
    x = np.zeros((1, TOKENS, WIDTH), "float32")
    for layer in (ReLULinearAttention(HEADS, qkv_bias=False), MultiScaleAttention(4, 1e-5)):
        images = x if isinstance(layer, ReLULinearAttention) else x.reshape(1, 3, 4, WIDTH)
        np.testing.assert_array_equal(run(layer, images), images)
    with pytest.raises(ValueError, match="head_width must divide the width; received 3, width 8"):
        MultiScaleAttention(3, 1e-5).build((None, 3, 4, 8))


# ---------------------------------------------------------------- FAVOR+


@pytest.mark.once
def test_favor_approaches_softmax_attention_with_more_features():
    x = normal(2, 64, 32)
    softmax_layer = randomized(MultiHeadAttention(HEADS), x.shape, scale=0.05)
    exact, errors, counts = run(softmax_layer, x), [], (64, 256, 1024)
    for features in counts:
        found = []
        for seed in range(6):
            layer = FavorAttention(HEADS, features=features, seed=seed)
            layer.build(x.shape)
            for ours, theirs in zip(layer.trainable_weights, softmax_layer.trainable_weights, strict=True):
                ours.assign(theirs)
            found.append(np.square(run(layer, x) - exact).mean())
        errors.append(np.mean(found) ** 0.5 / exact.std())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -0.65 < slope < -0.35, "the error must fall with 1 / sqrt(features)"
    assert errors[-1] < 0.01


def test_favor_adds_a_small_constant_kernel_to_the_plain_estimator():
    """What the layer computes is the plain estimator of exp(e) + 1e-6 exp(c), as its docstring says, and how far that
    is from exp(e) alone: little for usual sizes of activations, much for large ones."""
    tokens, size = 64, 16
    errors = {}
    for scale in (1.0, 4.0):
        q, k, v = (scale**i * normal(1, 1, tokens, size, seed=s).astype("float64") for s, i in ((1, 1), (2, 1), (3, 0)))
        layer = FavorAttention(1, features=64, seed=0)
        layer.build((None, tokens, size))
        w = value(layer.projection).astype("float64")
        e = [x @ w / size**0.25 - (x * x).sum(-1, keepdims=True) / (2 * size**0.5) for x in (q, k)]
        c = e[0].max(-1, keepdims=True), e[1].max((2, 3), keepdims=True)
        plain, said = (
            rows(fq @ np.swapaxes(fk, -1, -2)) @ v
            for fq, fk in (tuple(np.exp(x - y) for x, y in zip(e, c, strict=True)),
                           tuple(np.exp(x - y) * (1 + 1e-6 * np.exp(y - x)) for x, y in zip(e, c, strict=True)))
        )  # fmt: skip
        found = layer.attend(*(ops.convert_to_tensor(x.astype("float32")) for x in (q, k, v)))
        close(ops.convert_to_numpy(found), said, 1e-4)
        errors[scale] = np.linalg.norm(said - plain) / np.linalg.norm(plain)
    assert 1e-5 < errors[1.0] < 1e-3 and errors[4.0] > 0.01, errors


def test_favor_features_are_orthogonal_random_and_kept():
    layer, same, other = (FavorAttention(HEADS, features=20, seed=seed) for seed in (5, 5, 6))
    for made in (layer, same, other):
        made.build((None, TOKENS, 16))  # d = 8: groups of 8, 8 and 4
    w = value(layer.projection)
    np.testing.assert_array_equal(w, value(same.projection))
    assert np.abs(w - value(other.projection)).min() > 0
    products = w.T @ w
    length = np.sqrt(np.diag(products))
    for group in (slice(0, 8), slice(8, 16), slice(16, 20)):
        close(products[group, group], np.diag(length[group] ** 2), tolerance=1e-5)
    assert np.abs(products[:8, 8:16]).max() > 0.1, "every group is drawn anew"
    many = FavorAttention(1, features=4000)
    many.build((None, TOKENS, 16))
    assert (value(many.projection) ** 2).sum(0).mean() == pytest.approx(16, rel=0.03)  # as of normal vectors
    assert [v.path.rsplit("/")[-1] for v in layer.non_trainable_weights if "seed" not in v.path] == ["projection"]
    assert FavorAttention(2).features is None
    default = FavorAttention(2)
    default.build((None, TOKENS, 16))
    assert default.projection.shape == (8, 17)  # 8 ln 8 = 16.6


# ---------------------------------------------------------------- what all of them promise


@pytest.mark.once
@each
def test_any_batch_and_the_samples_do_not_mix(name):
    x = normal(3, TOKENS, WIDTH)
    layer = randomized(ATTENTIONS[name](HEADS), (None, TOKENS, WIDTH))
    assert layer.compute_output_shape((None, TOKENS, WIDTH)) == (None, TOKENS, WIDTH)
    whole = run(layer, x)
    for i in range(3):
        close(run(layer, x[i : i + 1]), whole[i : i + 1])
    if name != "linformer":  # which projects along the tokens, in their order
        close(run(layer, x[:, ::-1].copy()), whole[:, ::-1])
    moved = x.copy()
    moved[0, 0] += 3
    assert np.abs(run(layer, moved)[0, 1:] - whole[0, 1:]).max() > 1e-3 * np.abs(whole).max(), "tokens must see others"


@each
def test_wrong_heads(name):
    with pytest.raises(ValueError, match="heads must divide the width; received heads=3, width=8"):
        ATTENTIONS[name](heads=3).build((None, TOKENS, WIDTH))


def test_linformer_needs_a_fixed_number_of_tokens():
    with pytest.raises(ValueError, match=r"fixed number of tokens N; received the shape \(None, None, 8\)"):
        LinformerAttention(HEADS).build((None, None, WIDTH))


@pytest.mark.parametrize("name", once_but(ATTENTIONS, "favor", "linformer"))  # test_saving.py has all of them
def test_save_and_load(name, tmp_path):
    special = {"favor": dict(features=6, seed=4), "linformer": dict(rank=3)}.get(name, {})
    tokens = keras.Input((TOKENS, WIDTH))
    layer = ATTENTIONS[name](heads=HEADS, qkv_bias=False, dropout=0.25, name="attention", **special)
    model = keras.Model(tokens, layer(tokens))
    x = normal(4, TOKENS, WIDTH)
    expected = run(model, x)
    dropped = np.mean(run(lambda t: model(t, training=True), x) == 0)
    assert 0.1 < dropped < 0.4, "dropout must act in training"
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", custom_objects={type(layer).__name__: type(layer)})
    np.testing.assert_array_equal(run(again, x), expected)
    restored = again.get_layer("attention")
    assert restored.get_config() == layer.get_config()
    assert {k: getattr(restored, k) for k in special} == special


@each
@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_sixteen_bits_hold_the_sums_over_many_tokens(name, dtype):
    tokens = 16384
    x = normal(1, tokens, WIDTH) + 4
    exact = randomized(ATTENTIONS[name](HEADS), x.shape)
    layer = ATTENTIONS[name](HEADS, dtype=dtype)
    layer.build(x.shape)
    layer.set_weights(exact.get_weights())
    found, expected = ops.convert_to_numpy(ops.cast(layer(x), "float32")), run(exact, x)
    assert layer(x).dtype == layer(ops.cast(x, layer.compute_dtype)).dtype != exact(x).dtype
    error = np.sqrt(np.square(found - expected).mean()) / np.sqrt(np.square(expected).mean())
    assert error < (0.01 if dtype == "mixed_float16" else 0.08)


@each
def test_gradients_reach_every_weight(name):
    x = normal(8, TOKENS, WIDTH)
    tokens = keras.Input((TOKENS, WIDTH))
    layer = randomized(ATTENTIONS[name](HEADS), (None, TOKENS, WIDTH))
    model = keras.Model(tokens, layer(tokens))
    before = [value(v) for v in layer.trainable_weights]
    fixed = [value(v) for v in layer.non_trainable_weights]
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(x, normal(8, TOKENS, WIDTH, seed=1))
    for variable, old in zip(layer.trainable_weights, before, strict=True):
        new = value(variable)
        assert np.isfinite(new).all() and np.abs(new - old).max() > 0, variable.path
    for variable, old in zip(layer.non_trainable_weights, fixed, strict=True):
        np.testing.assert_array_equal(value(variable), old)


# ---------------------------------------------------------------- linear in N, and fit for a phone


def tensors(cls, tokens):
    """Number of elements of all intermediate results, and of the largest one."""
    x = keras.Input((tokens, WIDTH))
    graph = trace(keras.Model(x, cls(HEADS, name="attention")(x)))
    sizes = [int(np.prod(node.output.shape)) for node in graph.nodes]
    return sum(sizes), max(sizes)


@pytest.mark.once
@each
def test_memory_is_linear_in_the_tokens(name):
    """Four times the tokens make at most four times the numbers; softmax attention's grow sixteenfold."""
    (total, largest), (total4, largest4) = (tensors(ATTENTIONS[name], n) for n in (512, 2048))
    assert total4 <= 4 * total and largest4 <= 4 * largest
    assert tensors(MultiHeadAttention, 2048)[1] == 16 * tensors(MultiHeadAttention, 512)[1] > 4 * largest4


@pytest.mark.once
@each
def test_litert_graph_is_one_partition_and_equals_the_layer(name, tmp_path):
    image = keras.Input((4, 6, WIDTH))
    layer = ATTENTIONS[name](HEADS, name="attention")
    y = keras.layers.GlobalAveragePooling1D()(layer(keras.layers.Reshape((24, WIDTH))(image)))
    model = keras.Model(image, y, name=name)
    for variable in layer.trainable_weights:
        variable.assign(normal(*variable.shape, seed=7) / 2)
    check = edge.verify(edge.litert.export(model, tmp_path), against=model, images=normal(8, 4, 6, WIDTH))
    assert check.partitions == 1 and check.sqnr_db > 100


@pytest.mark.once
def test_time_is_linear_in_the_tokens(record_property):
    """CPU time ~ N^p from 1,024 to 16,384 tokens: p is at most 1.15, and softmax attention's p is beside it."""
    import train

    times = train.train_worker.attention_seconds(
        (256, 1024, 4096, 16384), 7, width=32, longest_softmax=4096, clock=time.process_time
    )
    exponents = {name: train.exponent(t, train.LAYER_FIT) for name, t in times.items()}
    for name, p in exponents.items():
        record_property(f"exponent_{name}", round(p, 3))
        print(f"{name:20}{p:.2f}")
    softmax_exponent = exponents.pop("softmax")
    assert set(exponents) == set(ATTENTIONS)
    assert max(exponents.values()) <= 1.15, exponents
    assert softmax_exponent > max(1.5, *exponents.values()), softmax_exponent
