"""What a fine-tuner expects: maps of known sizes, another head, frozen layers, parameter groups, remat and LoRA."""

import dataclasses
import functools

import families
import keras
import numpy as np
import pytest
from families import predict
from keras import ops

import keras_vits
from keras_vits import edge
from keras_vits._util import keras_private
from keras_vits.checkpoints import assign as weights
from keras_vits.training import adamw, fit, parameter_groups

BY_NAME = {family.name: family for family in reversed(families.FAMILIES)}
VIT, MIXER = BY_NAME["vit"], BY_NAME["mixer"]
MOBILEVIT = dataclasses.replace(  # smaller still
    BY_NAME["mobilevit"],
    tiny={
        **BY_NAME["mobilevit"].tiny,
        "widths": (8, 16),
        "depths": (1, 1),
        "token_widths": (24,),
        "token_depths": (1,),
    },
)
RECTANGLE = {f: (f.tiny["image_size"], 2 * f.tiny["image_size"]) for f in families.FAMILIES}

each_family = pytest.mark.parametrize("family", families.everywhere("vit", "mobilevit"))


@pytest.fixture(scope="module")
def tiny():
    """Family -> its tiny model, made once; no test may change it."""
    return functools.cache(lambda family: family.create())


def close(found, expected, bound=1e-5):
    """Equal to `bound` of the expected values' scale."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


def arrays(variables):
    return [np.array(ops.convert_to_numpy(v)).astype("float64") for v in variables]


def values(variables):
    return dict(zip((v.path for v in variables), arrays(variables), strict=True))


def train(model, optimizer=None, steps=2, **options):
    """The losses of a few steps on one batch."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.SGD(0.05), loss, **options)
    images = families.images(model, 4)
    labels = np.arange(4) % model.cfg.num_classes
    return model.fit(images, labels, batch_size=4, epochs=steps, shuffle=False, verbose=0).history["loss"]


def trained(model, **options):
    """Paths of the weights and statistics that a few steps change."""
    before = values(model.weights)
    assert np.isfinite(train(model, **options)).all()
    return {path for path, value in values(model.weights).items() if (value != before[path]).any()}


def paths(variables):
    return {v.path for v in variables}


# ---------------------------------------------------------------- feature maps


@pytest.mark.parametrize("family", families.everywhere("vit", "mobilevit"))
def test_feature_info_tells_what_the_maps_are(family):
    model = family.create(image_size=RECTANGLE[family])
    info, plain, maps = model.feature_info, model.features(), model.features(maps=True)
    found = predict(keras.Model(model.input, [*plain.outputs, *maps.outputs]), families.images(model))
    outputs, found = found[: len(info)], found[len(info) :]
    assert [f.name for f in info] == [layer.name for layer in model.layers if "block_" in layer.name]
    for feature, output, feature_map in zip(info, outputs, found, strict=True):
        size = feature.height, feature.width
        assert feature_map.shape == (2, *size, feature.channels)
        assert tuple(side * feature.stride for side in size) == model.cfg.image_size
        patches = output.reshape(2, -1, feature.channels)[:, -size[0] * size[1] :]
        np.testing.assert_array_equal(feature_map.reshape(patches.shape), patches)


def test_maps_have_no_tokens_before_the_patches():
    model = VIT.create(distill_token=True, registers=3, image_size=(16, 32))
    tokens, feature_map = predict(
        keras.Model(model.input, [*model.features(["norm"]).outputs, *model.features(["norm"], maps=True).outputs]),
        families.images(model),
    )
    assert tokens.shape == (2, 5 + 2 * 4, 24)
    np.testing.assert_array_equal(feature_map[:, 1, 2], tokens[:, 5 + 4 + 2])


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])
def test_the_pyramid_is_timms(timm, name):
    theirs = timm.create_model(name, features_only=True).feature_info
    with keras_private.values_later():
        pyramid = {f.stride: f for f in keras_vits.create(name).feature_info}
    assert list(pyramid) == theirs.reduction()
    assert [f.channels for f in pyramid.values()][:-1] == theirs.channels()[:-1]  # timm's last is after final_conv


def test_a_layer_without_a_map(tiny):
    with pytest.raises(ValueError, match=r"Layer 'pool' of vit_tiny_patch16_224 gives \(None, 24\).*choose a block"):
        tiny(VIT).features(["pool"], maps=True)


# ---------------------------------------------------------------- another head


@pytest.mark.parametrize("family", families.everywhere("vit", among=("vit", "efficientvit")))
def test_reset_head_changes_nothing_else(family, tiny):
    model, images = tiny(family), families.images(tiny(family))
    before = values(model.weights)
    again, headless = model.reset_head(3), model.reset_head(0)
    assert type(again) is type(model) and again.name == model.name
    assert again.cfg == dataclasses.replace(model.cfg, num_classes=3) and headless.cfg.num_classes == 0
    body = {path: value for path, value in before.items() if not path.startswith("head")}
    for other in (again, headless):
        found = values(other.weights)
        assert all((found[path] == value).all() for path, value in body.items())
        assert {path for path in found if path not in body} == paths(w for w in other.weights if "head/" in w.path)
    assert again.output_shape == (None, 3)
    close(predict(headless, images), predict(model.features(["pool"]), images))
    assert all((value == before[path]).all() for path, value in values(model.weights).items())


def test_reset_head_keeps_settings_and_drops_class_names():
    preprocessing = keras_vits.create("mobilevit_xxs", **MOBILEVIT.tiny).preprocessing
    preprocessing = dataclasses.replace(preprocessing, crop=0.5)
    options = dict(dtype="mixed_bfloat16", preprocessing=preprocessing, class_names=list("abcde"), remat=True)
    model = MOBILEVIT.create(**options)
    model.freeze(up_to=1)
    again = model.reset_head(7)
    assert again.preprocessing == preprocessing and again.class_names is None and again.remat
    assert again.dtype_policy.name == "mixed_bfloat16" and again.get_layer("head").compute_dtype == "float32"
    assert paths(again.trainable_weights) == paths(model.trainable_weights)
    with pytest.raises(ValueError, match="num_classes must be 0"):
        model.reset_head(-1)


def test_reset_head_of_a_distilled_model():
    model = VIT.create(distill_token=True)
    images = families.images(model)
    pooled = predict(model.features(["pool"]), images)
    close(predict(model.reset_head(0), images), pooled.mean(axis=1))
    assert model.reset_head(2).output_shape == (None, 2)


# ---------------------------------------------------------------- frozen layers


def test_freeze_up_to():
    model = MOBILEVIT.create()
    blocks = [f.name for f in model.feature_info]
    everything = paths(model.trainable_weights)
    first = {path for path in everything if path.startswith(("stem/", f"{blocks[0]}/", f"{blocks[1]}/"))}
    for up_to in (1, 1 - len(blocks), blocks[1]):
        model.freeze(up_to=up_to)
        assert paths(model.trainable_weights) == everything - first
    model.freeze(up_to="stem")
    assert paths(model.trainable_weights) == {path for path in everything if not path.startswith("stem/")}
    model.freeze()
    assert paths(model.trainable_weights) == {"head/kernel", "head/bias"}
    model.unfreeze()
    assert paths(model.trainable_weights) == everything
    with pytest.raises(ValueError, match="No block or layer 99"):
        model.freeze(up_to=99)


def test_frozen_weights_and_statistics_stay(tmp_path):
    model = MOBILEVIT.create(dtype="mixed_bfloat16")
    statistics = {path for path in paths(model.weights) if "moving" in path}
    model.freeze(up_to=0)
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    frozen = {path for path in paths(model.weights) if path.startswith(("stem/", model.feature_info[0].name))}
    assert frozen & statistics and paths(model.trainable_weights) == paths(model.weights) - statistics - frozen
    changed = trained(model)
    assert not changed & frozen
    still = paths(model.weights) - frozen - changed
    assert all(path.endswith("norm/beta") for path in still), "but those that a BatchNorm takes away behind them"


# ---------------------------------------------------------------- parameter groups


def timm_vit(timm, name):
    options = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2, num_classes=5)
    return timm.create_model(name, **options)


WITH_TIMM = {
    **{f.name: (f.variant, f.tiny, f.timm_tiny) for f in families.FAMILIES if f.timm_tiny},
    **{
        name: (name, {**VIT.tiny, **more}, functools.partial(timm_vit, name=name))
        for name, more in {
            "deit_tiny_distilled_patch16_224": {},
            "deit3_small_patch16_224": {},
            "vit_little_patch16_reg4_gap_256": {},
        }.items()
    },
}
FINER = ("vit_hybrid", "vit_resnetd", "efficientvit")  # timm takes their backbone, or what is after the blocks, as one


@pytest.mark.parametrize("case", families.once_but(WITH_TIMM, "vit", "efficientvit"))
def test_parameter_groups_are_timms(timm, case):
    """Every weight of timm's model becomes the number of its group, and ours are loaded from these."""
    from timm.optim import param_groups_layer_decay

    variant, shape, reference = WITH_TIMM[case]
    reference = reference(timm)
    exempt = reference.no_weight_decay() if hasattr(reference, "no_weight_decay") else ()
    theirs = param_groups_layer_decay(reference, 0.05, no_weight_decay_list=exempt, layer_decay=0.7)
    for number, group in enumerate(theirs):
        for parameter in group["params"]:
            parameter.data.fill_(number)
    model = keras_vits.create(variant, **shape)
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    weights.assign(model, tensors, "timm", "timm", (), None)
    by_path = {v.path: v for v in model.trainable_variables}
    found = {}
    for group in parameter_groups(model, layer_decay=0.7, weight_decay=0.05):
        for path in group.paths:
            (number,) = np.unique(ops.convert_to_numpy(by_path.pop(path)))
            found[path] = group, theirs[int(number)]
    assert not by_path, "these weights are in no group"
    for path, (ours, expected) in found.items():
        assert ours.weight_decay == expected["weight_decay"], path
        if case not in FINER:
            assert ours.lr_scale == pytest.approx(expected["lr_scale"]), path


@each_family
def test_every_trainable_weight_is_in_one_group(family, tiny):
    groups = parameter_groups(tiny(family))
    assert sorted(path for group in groups for path in group.paths) == sorted(
        v.path for v in tiny(family).trainable_variables
    )
    assert max(group.lr_scale for group in groups) == 1
    assert len({group.lr_scale for group in groups}) == len(tiny(family).feature_info) + 2
    assert len({group.lr_scale for group in parameter_groups(tiny(family), layer_decay=1)}) == 1


def test_the_first_step_is_the_groups(tmp_path):
    """AdamW's first step is the learning rate in size, whatever the gradient, and the decay."""
    model = VIT.create()
    model.freeze(up_to="stem")
    groups = parameter_groups(model, layer_decay=0.5, weight_decay=20.0)
    before = values(model.weights)
    train(model, adamw(groups, 1e-3), steps=1)
    after = values(model.weights)
    for group in groups:
        for path in group.paths:
            rate = 1e-3 * group.lr_scale
            step = np.abs(after[path] - before[path] * (1 - rate * group.weight_decay))
            assert np.median(step) == pytest.approx(rate, rel=0.01) and step.max() < 1.01 * rate, path
    assert all((after[path] == before[path]).all() for path in before if path.startswith("stem/"))

    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    for kept, loaded in zip(model.optimizer.optimizers, again.optimizer.optimizers, strict=True):
        assert loaded.weight_decay == kept.weight_decay
        assert [v.path for v in loaded._trainable_variables] == [v.path for v in kept._trainable_variables]
        for ours, theirs in zip(arrays(loaded.variables), arrays(kept.variables), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_groups_of_a_model_with_adapters():
    model = VIT.create()
    model.enable_lora(2)
    groups = parameter_groups(model, layer_decay=0.5)
    scales = {path: group.lr_scale for group in groups for path in group.paths}
    assert (
        scales["block_0/attention/qkv/lora_kernel_a"] == 0.25 and scales["block_1/attention/out/lora_kernel_b"] == 0.5
    )
    assert trained(model, optimizer=adamw(groups, 1e-2)) == set(scales) == paths(model.trainable_weights)


def test_impossible_groups():
    model = VIT.create()
    for wrong, message in [(dict(layer_decay=0), "layer_decay is a factor"), (dict(weight_decay=-1), "weight_decay")]:
        with pytest.raises(ValueError, match=message):
            parameter_groups(model, **wrong)
    model.trainable = False
    with pytest.raises(ValueError, match=r"has no trainable variables: call model\.unfreeze"):
        parameter_groups(model)
    with pytest.raises(ValueError, match="received none"):
        adamw([], 1e-3)


# ---------------------------------------------------------------- remat


def pair(family, **options):
    """The same model without and with remat, down to the seeds of what is random in training."""
    models = []
    for remat in (False, True):
        fit.set_seed(0)
        models.append(family.create(remat=remat, **options))
    return models


RANDOM = {VIT: dict(dropout=0.2, drop_path=0.3), MOBILEVIT: dict(drop_path=0.3)}


@pytest.mark.parametrize(
    ("family", "dtype", "eager"),
    [
        (VIT, "mixed_bfloat16", False),
        (MOBILEVIT, "float32", False),
        (MOBILEVIT, "float32", True),
    ],
    ids=["vit-bfloat16", "mobilevit-float32", "mobilevit-eager"],
)
def test_remat_trains_the_same(family, dtype, eager):
    """The losses and steps of plain gradient descent, statistics and random states."""
    backend = keras.backend.backend()
    if eager and backend != "tensorflow":
        pytest.skip("only TensorFlow has two ways to run a step")
    models = pair(family, dtype=dtype, **RANDOM[family])
    plain = models[0]
    state = ["seed_generator" in v.path for v in plain.variables]
    start = arrays(plain.variables)
    losses = []
    for model in models:
        if backend == "torch":
            keras.utils.set_random_seed(0)  # its dropout takes no other
        losses.append(train(model, run_eagerly=eager))
    bound = 1e-2 if dtype == "mixed_bfloat16" else 1e-5
    np.testing.assert_allclose(*losses, rtol=bound)
    steps = [[a - b for a, b in zip(arrays(m.variables), start, strict=False)] for m in models]
    largest = max(np.abs(step).max() for step, seed in zip(steps[0], state, strict=True) if not seed)
    for variable, seed, expected, found in zip(plain.variables, state, *steps, strict=False):
        allowed = 0 if seed else bound * (20 * np.abs(expected).max() + largest)
        assert np.abs(found - expected).max() <= allowed, variable.path
    assert any(step.any() for step, seed in zip(steps[0], state, strict=True) if seed), "nothing was random"


def kept_bytes(model, images):
    """Memory that a training step's forward pass keeps for the backward pass."""
    if keras.backend.backend() == "jax":
        import jax

        trainable, rest = ([v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables))
        forward = lambda values: model.stateless_call(values, rest, images, training=True)[0].sum()
        backward = jax.eval_shape(lambda values: jax.vjp(forward, values)[1], trainable)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))
    import torch

    kept = {}
    pack = lambda t: kept.update({t.untyped_storage().data_ptr(): t}) or t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(images, training=True).sum()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="TensorFlow does not tell what a tape keeps")
@pytest.mark.parametrize("family", [VIT, MOBILEVIT], ids=lambda f: f.name)
def test_remat_keeps_less(family):
    plain, remat = pair(family)
    images = families.images(plain, 32)
    assert kept_bytes(remat, images) < 0.5 * kept_bytes(plain, images)


# ---------------------------------------------------------------- LoRA


def adapted(family, rank=2, seed=3, **options):
    """A model whose adapters are not zero."""
    model = family.create()
    model.enable_lora(rank, **options)
    random = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        if "lora" in variable.path:
            variable.assign(random.normal(0, 0.2, variable.shape))
    return model


def test_adapters_begin_as_no_change(tiny):
    model = VIT.create()
    model.enable_lora(3)
    images = families.images(model)
    close(predict(model, images), predict(tiny(VIT), images))
    d, blocks, head = 24, 2, 24 * 5 + 5
    assert sum(int(np.prod(v.shape)) for v in model.trainable_weights) == blocks * 3 * ((d + 3 * d) + (d + d)) + head
    adapters = {f"block_{i}/attention/{n}/lora_kernel_{x}" for i in (0, 1) for n in ("qkv", "out") for x in "ab"}
    assert trained(model) == adapters | {"head/kernel", "head/bias"}


@pytest.mark.parametrize("family", families.everywhere("vit", among=("vit", "mobilevit_v2")))
def test_merged_saved_and_traced_adapters_are_in_the_kernels(family, tiny, tmp_path):
    model = adapted(family, alpha=5)
    before = values(model.weights)
    images = families.images(model)
    logits = predict(model, images)
    merged = model.merge_lora()
    close(predict(merged, images), logits)
    close(edge.trace(model, batch=2)(images)[0], logits)
    expected = values(merged.weights)
    assert set(expected) == paths(tiny(family).weights)
    assert paths(merged.trainable_weights) == paths(tiny(family).trainable_weights)
    for path, kernel in expected.items():
        if f"{path.removesuffix('kernel')}lora_kernel_a" in before:
            a, b = (before[f"{path.removesuffix('kernel')}lora_kernel_{x}"] for x in "ab")
            close(kernel, before[path] + 5 / 2 * a @ b)
            assert np.abs(kernel - before[path]).max() > 0.1
        else:
            np.testing.assert_array_equal(kernel, before[path])
    model.save(tmp_path / "model.keras")
    saved, headless = keras.saving.load_model(tmp_path / "model.keras"), model.reset_head(0)
    assert paths(saved.trainable_weights) == paths(merged.trainable_weights)
    for other in (saved, headless):
        for path, value in values(other.weights).items():
            np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-6)
    assert all((value == before[path]).all() for path, value in values(model.weights).items())


def test_a_trained_model_with_adapters_saves_and_loads(tmp_path):
    model = adapted(VIT)
    train(model, adamw(parameter_groups(model), 1e-2))
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):  # it was the adapters'
        again = keras.saving.load_model(tmp_path / "model.keras")
        with pytest.raises(ValueError, match="held LoRA adapters, which cannot resume"):
            fit._resume(model, tmp_path / "model.keras", 1)
    for path, value in values(again.weights).items():
        np.testing.assert_allclose(value, values(model.merge_lora().weights)[path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_everything_together_in_mixed_precision(dtype):
    if dtype == "mixed_float16" and keras.backend.backend() == "jax":
        pytest.skip("JAX multiplies no float16 matrices on a CPU")
    model = VIT.create(dtype=dtype, remat=True, drop_path=0.1)
    model.enable_lora(2, pattern="*/mlp/*")
    assert {v.dtype for v in model.trainable_weights} == {"float32"}
    optimizer = adamw(parameter_groups(model), 1e-2, clipnorm=1.0)
    assert trained(model, optimizer=optimizer, steps=4) == paths(model.trainable_weights)


def test_impossible_adapters():
    with pytest.raises(ValueError, match=r"No dense layer of mixer_s32_224 matches .*block_0/channel_mlp/fc1,"):
        MIXER.create().enable_lora(2)
    model = VIT.create()
    for rank in (0, 2.5):
        with pytest.raises(ValueError, match="rank must be a positive integer"):
            model.enable_lora(rank)
    model.enable_lora(2)
    for method, argument in (("enable_lora", 2), ("freeze", 0), ("unfreeze", None)):
        with pytest.raises(ValueError, match=rf"has LoRA adapters, so {method} .*model\.merge_lora"):
            getattr(model, method)(*([] if argument is None else [argument]))
