"""keras-hub: our models as its presets and back, its preprocessing, and its own models as ours."""

import dataclasses
import importlib
import os
import subprocess
import sys

import families
import keras
import numpy as np
import pytest

from keras_vits.preprocess import Preprocessing

VIT = next(f for f in families.FAMILIES if f.name == "vit")


@pytest.fixture(scope="module")
def keras_hub():
    """The keras-hub package, imported by the first test that needs it: it takes TensorFlow along."""
    return pytest.importorskip("keras_hub")


@pytest.fixture(scope="module")
def hub(keras_hub):
    from keras_vits import hub

    return hub


@pytest.fixture(scope="module")
def photos():
    """Two photographs, uint8 (2,107,160,3)."""
    china, flower = pytest.importorskip("sklearn.datasets").load_sample_images().images
    return np.stack([china, flower])[:, ::4, ::4]


def arrays(model):
    return {v.path: keras.ops.convert_to_numpy(v) for v in model.weights if "seed" not in v.path}


def close(ours, theirs, tolerance=1e-4):
    ours, theirs = keras.ops.convert_to_numpy(ours), keras.ops.convert_to_numpy(theirs)
    scale = np.abs(theirs).max()
    assert ours.shape == theirs.shape
    assert np.ptp(theirs, axis=0).max() > 0.05 * scale, "the same numbers for every image prove nothing"
    assert np.abs(ours - theirs).max() <= tolerance * scale


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize(
    "family", families.everywhere("vit", among=("vit", "vit_hybrid", "mixer", "mobilevit", "efficientvit"))
)
def test_a_family_goes_through_a_preset(keras_hub, hub, family, tmp_path):
    model = family.create()
    hub.classifier(model).save_to_preset(tmp_path)
    families.randomize(model, seed=5)  # what was saved is a copy
    loaded = keras_hub.models.ImageClassifier.from_preset(str(tmp_path))
    assert type(loaded) is hub.VisionImageClassifier
    back = hub.model(loaded)
    families.randomize(model)
    assert type(back) is type(model) and back.get_config() == model.get_config()
    ours, theirs = arrays(back), arrays(model)
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    images = families.images(model)
    loaded.preprocessor = None
    close(loaded.predict(images, verbose=0), model.predict(images, verbose=0), 1e-6)


@pytest.mark.parametrize(
    "family", [VIT, pytest.param(families.FAMILIES[-1], marks=pytest.mark.once)], ids=lambda f: f.variant
)
def test_backbone_ends_before_the_pooling(keras_hub, hub, family, tmp_path):
    model = family.create()
    hub.backbone(model).save_to_preset(tmp_path)
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path))
    assert type(loaded) is hub.VisionBackbone and loaded.name == f"{model.name}_backbone"
    images = families.images(model)
    expected = keras.Model(model.input, model.get_layer("pool").input).predict(images, verbose=0)
    close(loaded.predict(images, verbose=0), expected, 1e-6)
    headless = hub.model(loaded)
    assert headless.cfg == dataclasses.replace(model.cfg, num_classes=0)
    random = keras_hub.models.Backbone.from_preset(str(tmp_path), load_weights=False)
    assert any((a != b).any() for a, b in zip(arrays(random).values(), arrays(loaded).values(), strict=True))


@pytest.mark.parametrize("shape", [dict(norm="pooled", pool="mean"), dict(distill_token=True)], ids=str)
def test_other_classes_keep_all_but_the_head(keras_hub, hub, shape, tmp_path):
    model = VIT.create(**shape)
    hub.classifier(model).save_to_preset(tmp_path)
    loaded = keras_hub.models.ImageClassifier.from_preset(str(tmp_path), num_classes=7, class_names=list("abcdefg"))
    back, original = arrays(hub.model(loaded)), arrays(model)
    assert back.keys() == original.keys()
    for path, value in back.items():
        if path.startswith("head"):
            assert value.shape[-1] == 7
        else:
            np.testing.assert_array_equal(value, original[path], err_msg=path)
    assert hub.model(loaded).class_names == list("abcdefg")
    fewer = hub.model(loaded, num_classes=3)
    assert fewer.output_shape == (None, 3) and fewer.class_names is None


def test_classifier_trains_on_pictures_and_leaves_the_model_alone(hub, photos):
    model = VIT.create(dropout=0.1, class_names=list("abcde"))
    before = arrays(model)
    classifier = hub.classifier(model)
    history = classifier.fit(photos, np.array([1, 3]), epochs=2, verbose=0).history["loss"]
    assert history[1] != history[0] and np.isfinite(history).all()
    trained = arrays(hub.model(classifier))
    assert all((trained[path] != before[path]).any() for path in ("stem/kernel", "block_1/mlp/fc1/kernel", "head/bias"))
    assert all((value == before[path]).all() for path, value in arrays(model).items())


def test_activation_and_mixed_precision(keras_hub, hub, tmp_path):
    model = VIT.create()
    classifier = hub.VisionImageClassifier(hub.backbone(model), 5, activation="softmax")
    classifier.save_to_preset(tmp_path)
    loaded = keras_hub.models.ImageClassifier.from_preset(str(tmp_path), dtype="mixed_bfloat16")
    assert loaded.activation == "softmax"
    probabilities = loaded.predict(families.images(model), verbose=0)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    back = hub.model(loaded)
    assert back.dtype_policy.name == "mixed_bfloat16" and back.get_layer("head").compute_dtype == "float32"


# ---------------------------------------------------------------- preprocessing

KINDS = [
    dict(),
    dict(crop=1.0, crop_mode="squash", interpolation="bilinear"),
    dict(crop_mode="border", mean=(0.2, 0.5, 0.8)),
    dict(image_size=(48, 80), interpolation="lanczos", crop=0.875),
    dict(image_size=(160, 200), crop=0.7),
    dict(interpolation="nearest", channel_order="bgr", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
]


def converter(hub, kind):
    preprocessing = Preprocessing(**{"image_size": (64, 64), **kind})
    return preprocessing, hub.VisionImageConverter(**dataclasses.asdict(preprocessing))


def same_pixels(ours, pictures, preprocessing):
    """The arrays are those of PIL, to the last bit but for some pixels that fall on the other side of a half."""
    expected = np.stack([preprocessing(picture) for picture in pictures])
    assert ours.shape == expected.shape
    levels = np.abs(ours - expected) * np.float32(preprocessing.std) * 255
    assert levels.max() < 1.01 and (levels > 0.01).mean() < 0.01


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())) or "default")
def test_converter_equals_preprocessing(hub, photos, kind):
    preprocessing, layer = converter(hub, kind)
    same_pixels(keras.ops.convert_to_numpy(layer(photos)), photos, preprocessing)
    copy = hub.VisionImageConverter.from_config(layer.get_config())
    assert copy.preprocessing == layer.preprocessing == preprocessing


def test_converter_takes_lists_floats_and_tf_data(hub, photos):
    tf = pytest.importorskip("tensorflow")
    preprocessing, layer = converter(hub, KINDS[3])
    different = [photos[0], photos[1, :90, 10:]]
    ours = [keras.ops.convert_to_numpy(x) for x in layer(different)]
    same_pixels(np.stack(ours), different, preprocessing)
    same_pixels(keras.ops.convert_to_numpy(layer(photos[0].astype("float32")))[None], photos[:1], preprocessing)
    data = tf.data.Dataset.from_tensor_slices(photos).batch(2)
    same_pixels(next(iter(data.map(layer))).numpy(), photos, preprocessing)
    unknown = tf.data.Dataset.from_generator(lambda: photos, output_signature=tf.TensorSpec((None, None, 3), "uint8"))
    with pytest.raises(ValueError, match="height and width must be known"):
        unknown.map(layer)


def test_preprocessor_sees_to_pictures(keras_hub, hub, photos, tmp_path):
    model = VIT.create(preprocessing=dict(crop=0.8, mean=(0.4, 0.5, 0.6)))
    classifier = hub.classifier(model)
    classifier.save_to_preset(tmp_path)
    expected = model.predict(np.stack([model.preprocessing(photo) for photo in photos]), verbose=0)
    close(classifier.predict(photos, verbose=0), expected, 1e-2)
    loaded = keras_hub.models.ImageClassifierPreprocessor.from_preset(str(tmp_path))
    assert loaded.image_converter.preprocessing == model.preprocessing
    larger = keras_hub.layers.ImageConverter.from_preset(str(tmp_path), image_size=(40, 56))
    assert larger.preprocessing == dataclasses.replace(model.preprocessing, image_size=(40, 56))
    assert larger(photos).shape == (2, 40, 56, 3)


# ---------------------------------------------------------------- keras-hub's own models

SHAPE = dict(patch_size=8, num_layers=2, num_heads=2, hidden_dim=24)
DINO = dict(SHAPE, intermediate_dim=48, image_shape=(32, 32, 3), position_embedding_shape=(48, 48, 3))
BACKBONES = {
    "vit": ("ViT", dict(SHAPE, mlp_dim=48, image_shape=(32, 48, 3), name="vit")),
    "vit without class token": ("ViT", dict(SHAPE, mlp_dim=48, image_shape=(32, 32, 1), use_class_token=False)),
    "vit without biases": (
        "ViT",
        dict(
            SHAPE,
            mlp_dim=48,
            image_shape=(32, 32, 3),
            use_mha_bias=False,
            use_mlp_bias=False,
            use_patch_bias=False,
            layer_norm_epsilon=1e-2,
        ),
    ),
    "deit": ("DeiT", dict(SHAPE, intermediate_dim=48, image_shape=(48, 32, 3), layer_norm_epsilon=1e-2)),
    "dinov2": ("DINOV2", dict(DINO, name="dino")),
    "dinov2 with registers": ("DINOV2", dict(DINO, num_register_tokens=3, use_mask_token=False)),
    "dinov2 with swiglu": ("DINOV2", dict(DINO, num_register_tokens=3, use_swiglu_ffn=True, intermediate_dim=50)),
}


def theirs(keras_hub, name):
    kind, shape = BACKBONES[name]
    return families.randomize(getattr(keras_hub.models, f"{kind}Backbone")(**shape))


def pictures(model, count=2):
    return np.random.default_rng(3).normal(size=(count, *model.input_shape[1:])).astype("float32")


@pytest.mark.parametrize("name", families.once_but(BACKBONES, "vit", "dinov2 with registers"))
def test_features_equal_keras_hub(keras_hub, hub, name):
    source = theirs(keras_hub, name)
    ours = hub.model(source)
    assert ours.cfg.num_classes == 0 and ours.name == source.name
    images = pictures(ours)
    expected = source.predict({"images": images} if name.startswith("dino") else images, verbose=0)
    (features,) = [ours.features(["norm"]).predict(images, verbose=0)]
    close(features, expected)
    assert ours.cfg.depth == len({path.split("/")[0] for path in arrays(ours) if path.startswith("block_")}) == 2


@pytest.mark.parametrize(
    "name, pooling",
    [
        ("vit", "token"),
        pytest.param("vit without class token", "gap", marks=pytest.mark.once),
        pytest.param("deit", "token", marks=pytest.mark.once),
    ],
)
def test_logits_and_preprocessing_equal_keras_hub(keras_hub, hub, name, pooling, tmp_path):
    kind = BACKBONES[name][0]
    part = lambda module, suffix: getattr(module, kind + suffix)
    backbone = theirs(keras_hub, name)
    convert = part(keras_hub.layers, "ImageConverter")(
        image_size=backbone.image_shape[:2],
        scale=[1 / (255 * s) for s in (0.2, 0.3, 0.4)],
        offset=[-m / s for m, s in zip((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), strict=True)],
        crop_to_aspect_ratio=False,
    )
    source = part(keras_hub.models, "ImageClassifier")(
        backbone=backbone,
        num_classes=5,
        pooling=pooling,
        preprocessor=part(keras_hub.models, "ImageClassifierPreprocessor")(convert if kind == "DeiT" else None),
    )
    families.randomize(source)
    source.save_to_preset(tmp_path)
    ours = hub.model(tmp_path)
    images = pictures(ours)
    source.preprocessor = None
    close(ours.predict(images, verbose=0), source.predict(images, verbose=0))
    if kind == "DeiT":
        p = ours.preprocessing
        np.testing.assert_allclose((p.mean, p.std), ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
        assert (p.interpolation, p.crop, p.crop_mode) == ("bilinear", 1.0, "squash")


def test_overrides_of_keras_hub_models(keras_hub, hub, tmp_path):
    source = theirs(keras_hub, "dinov2")
    larger = hub.model(source, image_size=48, num_classes=4, name="mine")
    assert larger.output_shape == (None, 4) and larger.name == "mine"
    trained = arrays(source)["dino_embeddings/position_embeddings"]
    np.testing.assert_array_equal(arrays(larger)["position/table"], trained)
    wide = hub.model(source, image_size=(32, 64))
    assert arrays(wide)["position/table"].shape == (1, 1 + 4 * 8, 24)
    source.save_to_preset(tmp_path)
    again = keras_hub.models.Backbone.from_preset(str(tmp_path))
    (position,) = (v for path, v in arrays(again).items() if path.endswith("interpolated_position_embeddings"))
    np.testing.assert_array_equal(arrays(hub.model(tmp_path))["position/table"], position)


# ---------------------------------------------------------------- mistakes


@pytest.mark.once
def test_what_does_not_fit_is_said(keras_hub, hub, tmp_path):
    with pytest.raises(ValueError, match=r"no head \(num_classes=0\): use keras_vits.hub.backbone"):
        hub.classifier(VIT.create(num_classes=0))
    with pytest.raises(ValueError, match=r"family must be one of .*MobileViT.*; received 'VIT'"):
        hub.VisionBackbone(family="VIT")
    with pytest.raises(ValueError, match="ViT has no hyper-parameter hight"):
        hub.VisionBackbone(family="ViT", hight=3)
    with pytest.raises(ValueError, match="not a local folder with a preset"):
        hub.model(tmp_path)
    with pytest.raises(ValueError, match="received Functional"):
        hub.model(VIT.create().features())
    source = theirs(keras_hub, "vit")
    gap = keras_hub.models.ViTImageClassifier(source, 5, pooling="gap")
    with pytest.raises(ValueError, match="has pooling='gap'"):
        hub.model(gap)
    with pytest.raises(ValueError, match="intermediate_dim"):
        hub.model(keras_hub.models.ViTImageClassifier(source, 5, intermediate_dim=8))
    oblong = keras_hub.models.ViTBackbone(**{**BACKBONES["vit"][1], "patch_size": (8, 16)})
    with pytest.raises(ValueError, match="8 x 16 pixels"):
        hub.model(oblong)


@pytest.mark.once
def test_without_keras_hub_only_this_module_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    monkeypatch.delitem(sys.modules, "keras_vits.hub", raising=False)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[keras-hub\]"'):
        importlib.import_module("keras_vits.hub")
    code = "import sys, keras_vits; keras_vits.create('vit_tiny_patch16_224', image_size=32, depth=1)"
    code += "; assert not {'keras_hub', 'keras_vits.hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"KERAS_BACKEND": "jax"})
