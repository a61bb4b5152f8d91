"""Checkpoints in the layout of Hugging Face's transformers: from the folders that it saves, the numbers it computes.

Other image sizes than the checkpoint's are not compared: transformers resamples positions in another way for each of
its models, we always antialiased.
"""

import json

import families
import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_sample_image
from test_parity import close, randomized

import keras_vits
from keras_vits import checkpoints
from keras_vits.preprocess import Preprocessing

CHINA = load_sample_image("china.jpg")
VIT = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
)
DINOV2 = {k: v for k, v in VIT.items() if k != "intermediate_size"} | dict(mlp_ratio=2)
DECODER = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
XXS = dict(hidden_sizes=[64, 80, 96], neck_hidden_sizes=[16, 16, 24, 48, 64, 80, 320], expand_ratio=2.0, image_size=128)
OURS = dict(width=24, depth=2, mlp_hidden=48, patch_size=8)  # what no config.json tells: the rest comes from there
CASES = {  # transformers' model, its configuration, our variant, our hyper-parameters
    "vit": ("ViTForImageClassification", dict(**VIT, num_labels=5), "vit_base_patch16_224", OURS),
    "vit_of_another_kind": (
        "ViTForImageClassification",
        VIT
        | dict(num_labels=5, image_size=[32, 48], layer_norm_eps=1e-3, hidden_act="gelu_new", qkv_bias=False)
        | dict(num_channels=1),
        "vit_base_patch16_224",
        OURS,
    ),
    "dino": ("ViTModel", VIT, "vit_base_patch16_224", OURS),
    "masked_image_modeling": ("ViTForMaskedImageModeling", VIT, "vit_base_patch16_224", OURS),
    "deit": (
        "DeiTForImageClassification",
        dict(**VIT, num_labels=5),
        "deit_base_patch16_224",
        OURS | dict(registers=1),
    ),
    "deit_distilled": (
        "DeiTForImageClassificationWithTeacher",
        dict(**VIT, num_labels=5),
        "deit_base_distilled_patch16_224",
        OURS,
    ),
    "deit_headless": ("DeiTModel", VIT, "deit_base_distilled_patch16_224", OURS),
    "dinov2": ("Dinov2Model", DINOV2, "vit_base_patch14_dinov2", OURS),
    "dinov2_swiglu": (
        "Dinov2Model",
        dict(**DINOV2, use_swiglu_ffn=True),
        "vit_giant_patch14_dinov2",
        OURS | dict(mlp_hidden=32),
    ),
    "dinov2_registers": ("Dinov2WithRegistersModel", DINOV2, "vit_base_patch14_reg4_dinov2", OURS),
    "mae": ("ViTMAEModel", VIT | DECODER | dict(mask_ratio=0.0), "vit_base_patch16_224", OURS),
    "mae_pretraining": ("ViTMAEForPreTraining", VIT | DECODER | dict(mask_ratio=0.0), "vit_base_patch16_224", OURS),
    "mobilevit": ("MobileViTForImageClassification", dict(**XXS, num_labels=5), "mobilevit_xxs", {}),
    "mobilevit_headless": ("MobileViTModel", XXS, "mobilevit_xxs", {}),
    "mobilevitv2": (
        "MobileViTV2ForImageClassification",
        dict(width_multiplier=0.5, image_size=128, num_labels=5),
        "mobilevitv2_050",
        {},
    ),
}


@pytest.fixture(scope="module")
def transformers(timm):  # timm's fixture makes torchvision importable, which transformers imports, too
    return pytest.importorskip("transformers")


def build(transformers, case):
    """A transformers model with random parameters and statistics."""
    name, config, *_ = CASES[case]
    cls = getattr(transformers, name)
    return randomized(cls(cls.config_class(**config)))


def computed(reference, images):
    """Logits (B,K) or None, and the tokens or the map of the last layer, of transformers' model."""
    import torch

    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        if reference.config.model_type == "vit_mae":  # tokens come in the order of the noise
            encoder = getattr(reference, "vit", reference)
            count = encoder.embeddings.patch_embeddings.num_patches
            out = encoder(pixels, noise=torch.arange(count).float().expand(len(images), count))
        elif hasattr(reference, "decoder"):
            out = reference.vit(pixels)
        else:
            out = reference(pixels)
    logits, last = getattr(out, "logits", None), getattr(out, "last_hidden_state", None)
    return (logits if logits is None else logits.numpy()), (last if last is None else last.numpy())


@pytest.mark.parametrize(
    "case", families.once_but(CASES, "vit", "deit_distilled", "dinov2_registers", "mobilevit", "mobilevitv2")
)
def test_equals_transformers(transformers, case, tmp_path):
    """The logits; without a head, all tokens behind the last norm, or the pooled map."""
    reference = build(transformers, case)
    reference.save_pretrained(tmp_path)
    _, config, variant, ours = CASES[case]
    model = keras_vits.create(variant, weights=tmp_path, **ours)
    assert model.cfg.num_classes == config.get("num_labels", 0) and model.class_names is None
    assert list(model.cfg.image_size) == list(np.broadcast_to(config["image_size"], 2))
    images = families.images(model)
    logits, last = computed(reference, images)
    if logits is not None:
        close(families.predict(model, images), logits)
    elif last.ndim == 3:
        close(families.predict(model.features(["norm"]), images), last)
    else:
        close(families.predict(model, images), last.mean((2, 3)))

    again = families.randomize(model.from_config(model.get_config()), seed=1)
    keras_vits.load_weights(again, tmp_path, format="transformers")
    for a, b in zip(again.weights, model.weights, strict=True):
        if "seed" not in a.path:
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b))


PUBLISHED = {  # some names of tensors in checkpoints on the hub; transformers 5 names its layers differently in memory
    "vit": ["vit.embeddings.cls_token", "vit.encoder.layer.0.attention.attention.query.weight", "classifier.bias"],
    "dino": ["embeddings.position_embeddings", "encoder.layer.1.intermediate.dense.weight", "pooler.dense.weight"],
    "deit_distilled": ["deit.embeddings.distillation_token", "deit.encoder.layer.1.output.dense.weight"],
    "dinov2": ["embeddings.mask_token", "encoder.layer.0.layer_scale1.lambda1", "encoder.layer.1.mlp.fc1.weight"],
    "dinov2_swiglu": ["encoder.layer.0.mlp.weights_in.weight", "encoder.layer.1.norm2.bias"],
    "dinov2_registers": ["embeddings.register_tokens", "encoder.layer.0.attention.output.dense.weight"],
    "mae_pretraining": ["vit.encoder.layer.0.layernorm_before.weight", "decoder.decoder_embed.weight"],
}


@pytest.mark.once
@pytest.mark.parametrize("case", PUBLISHED)
def test_saved_names_are_the_published_ones(transformers, case, tmp_path):
    build(transformers, case).save_pretrained(tmp_path)
    assert set(PUBLISHED[case]) <= load_file(tmp_path / "model.safetensors").keys()


# ---------------------------------------------------------------- what does not fit


@pytest.fixture(scope="module")
def vit(transformers, tmp_path_factory):
    """Folder of a tiny ViT with a head."""
    folder = tmp_path_factory.mktemp("vit")
    build(transformers, "vit").save_pretrained(folder)
    return folder


def changed(folder, target, tensors=None, **config):
    """A copy of a folder, with other tensors and fields of config.json."""
    given = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**given, **config}))
    save_file(load_file(folder / "model.safetensors") if tensors is None else tensors, target / "model.safetensors")
    return target


def test_every_misfit_is_named(vit, tmp_path):
    tensors = load_file(vit / "model.safetensors")
    del (
        tensors["vit.encoder.layer.1.layernorm_before.bias"],
        tensors["vit.encoder.layer.0.attention.attention.key.bias"],
    )
    tensors["vit.encoder.layer.2.layernorm_after.bias"] = np.ones(24, "float32")
    with pytest.raises(ValueError, match="does not fit vit_base_patch16_224") as error:
        keras_vits.create("vit_base_patch16_224", weights=changed(vit, tmp_path, tensors), **OURS)
    _, missing, left = str(error.value).splitlines()
    assert "missing in the file (2)" in missing and "left over in the file (1)" in left
    assert "encoder.layer.1.layernorm_before.bias" in missing and "layer.0.attention.attention.key.bias" in missing
    assert "encoder.layer.2.layernorm_after.bias" in left


def test_a_dinov2_classifier_without_its_head(transformers, tmp_path):
    """Its head reads the class token and the mean of the others (see test_files_from_elsewhere.py); we, the first."""
    cls = transformers.Dinov2ForImageClassification
    reference = randomized(cls(cls.config_class(**DINOV2, num_labels=5)))
    reference.save_pretrained(tmp_path)
    model = keras_vits.create("vit_base_patch14_dinov2", weights=tmp_path, num_classes=0, **OURS)
    images = families.images(model)
    close(families.predict(model, images), computed(reference.dinov2, images)[1][:, 0])


@pytest.mark.once
def test_models_that_ours_do_not_compute(transformers, vit, tmp_path):
    build(transformers, "mobilevit").save_pretrained(tmp_path)
    for field, value in dict(output_stride=16, hidden_act="relu", layer_norm_eps=1e-6).items():
        (folder := tmp_path / field).mkdir()
        with pytest.raises(ValueError, match=f"has {field} {value!r}; MobileViT computes with"):
            keras_vits.create("mobilevit_xxs", weights=changed(tmp_path, folder, **{field: value}))
    with pytest.raises(ValueError, match="mixer_s16_224 has no weight table for 'transformers'; it has: timm"):
        keras_vits.create("mixer_s16_224", weights=vit)


# ---------------------------------------------------------------- what a folder tells of images and classes

IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
HALF = dict(image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
RESCALE = dict(do_rescale=True, rescale_factor=1 / 255, do_resize=True)
PROCESSORS = {  # model_type, processor, preprocessor_config.json in its older and its newer form, expected
    "google/vit-base-patch16-224": (
        *("vit", "ViTImageProcessorPil"),
        dict(do_normalize=True, do_resize=True, size=224, **HALF),
        dict(do_normalize=True, **RESCALE, resample=2, size=dict(height=224, width=224), **HALF),
        dict(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop=1.0, crop_mode="squash"),
    ),
    "facebook/deit-base-distilled-patch16-224": (
        *("deit", "DeiTImageProcessorPil"),
        dict(crop_size=224, do_center_crop=True, do_normalize=True, do_resize=True, resample=3, size=256, **IMAGENET),
        dict(crop_size=dict(height=224, width=224), do_center_crop=True, do_normalize=True, **RESCALE, resample=3)
        | dict(size=dict(height=256, width=256), **IMAGENET),
        dict(crop=0.875, interpolation="bicubic", crop_mode="squash"),
    ),
    "facebook/dinov2-base": (
        *("dinov2", "BitImageProcessorPil"),
        dict(crop_size=224, do_center_crop=True, do_normalize=True, do_resize=True, resample=3, size=256, **IMAGENET),
        dict(crop_size=dict(height=224, width=224), do_center_crop=True, do_normalize=True, **RESCALE, resample=3)
        | dict(size=dict(shortest_edge=256), **IMAGENET),
        dict(crop=0.875, interpolation="bicubic", crop_mode="center"),
    ),
    "apple/mobilevit-small": (
        *("mobilevit", "MobileViTImageProcessorPil"),
        dict(crop_size=256, do_center_crop=True, do_flip_channel_order=True, do_resize=True, resample=2, size=288),
        dict(crop_size=dict(height=256, width=256), do_center_crop=True, do_flip_channel_order=True, **RESCALE)
        | dict(resample=2, size=dict(shortest_edge=288)),
        dict(mean=(0.0,) * 3, std=(1.0,) * 3, channel_order="bgr", interpolation="bilinear", crop_mode="center"),
    ),
}


@pytest.mark.once
@pytest.mark.parametrize("form", ["older", "newer"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_are_prepared_as_in_transformers(transformers, name, form):
    """Within a step of 255, where both resample with PIL. transformers cuts the middle out half a pixel lower or
    further right where the rest is odd; the picture's size avoids that."""
    from keras_vits.checkpoints.sources import processor_fields

    model_type, processor, older, newer, expected = PROCESSORS[name]
    config = older if form == "older" else newer
    preprocessing = Preprocessing(
        image_size=(256, 256) if model_type == "mobilevit" else (224, 224), **processor_fields(config, model_type, name)
    )
    assert expected.items() <= vars(preprocessing).items()
    picture = CHINA[:400, :600]
    given = getattr(transformers, processor)(**newer)(picture, return_tensors="np")["pixel_values"][0]
    ours = preprocessing(picture)
    assert np.abs(ours - given.transpose(1, 2, 0)).max() <= 1.01 / 255 / min(preprocessing.std)
    assert np.ptp(ours) > 0.5


def test_folder_tells_classes_and_preprocessing(vit, tmp_path):
    names = ["tench, Tinca tinca", "bee", "cat", "dog", "elk"]
    folder = changed(vit, tmp_path, id2label={str(i): name for i, name in enumerate(names)})
    _, _, _, newer, expected = PROCESSORS["google/vit-base-patch16-224"]
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(newer))
    model = keras_vits.create("vit_base_patch16_224", weights=folder, **OURS)
    assert model.class_names == names
    assert expected.items() <= vars(model.preprocessing).items() and model.preprocessing.image_size == (32, 32)
    assert (model.cfg.heads, model.cfg.epsilon, model.cfg.activation) == (2, 1e-12, "gelu")

    for change in (
        dict(do_resize=False),
        dict(resample=5),
        dict(size=dict(height=224, width=256)),
        dict(rescale_factor=1),
    ):
        file.write_text(json.dumps(newer | change))
        with pytest.raises(ValueError, match="Preprocessing does not have: give another by `preprocessing=`"):
            keras_vits.create("vit_base_patch16_224", weights=folder, **OURS)
    model = keras_vits.create(
        "vit_base_patch16_224", weights=folder, preprocessing=dict(crop=0.5), num_classes=3, **OURS
    )
    assert model.preprocessing.crop == 0.5 and model.class_names is None and model.output_shape == (None, 3)


@pytest.mark.once
@pytest.mark.parametrize("there", [True, False])
def test_download_of_both_layouts(monkeypatch, tmp_path, there):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(hub_id, name):
        asked.append(name)
        if name == "preprocessor_config.json" and not there:
            raise hub.errors.EntryNotFoundError("404")
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    both = ["config.json", "model.safetensors"]
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    assert checkpoints.download("timm/vit") == tmp_path and asked == both
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert checkpoints.download("google/vit") == tmp_path and asked == [*both, *both, "preprocessor_config.json"]
