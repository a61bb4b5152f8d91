"""Checkpoints, configurations and packages that others wrote or something damaged: read right, or refused by name."""

import json
import random
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import families
import keras
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_parity import close, randomized
from test_transformers import DINOV2, OURS, VIT, build, changed
from test_transformers import transformers as transformers
from test_weights import exported

import keras_vits
from keras_vits import checkpoints
from keras_vits.checkpoints import files, sources
from keras_vits.edge.devices import ios
from keras_vits.preprocess import Preprocessing
from keras_vits.training import data

FAMILY = next(f for f in families.FAMILIES if f.name == "vit")
SHAPE = {k: v for k, v in FAMILY.tiny.items() if k not in ("num_classes", "image_size")}


def create(source, **overrides):
    return keras_vits.create(FAMILY.variant, weights=source, **{**SHAPE, **overrides})


def same_weights(a, b):
    pairs = zip(a.weights, b.weights, strict=True)
    arrays = [tuple(map(keras.ops.convert_to_numpy, pair)) for pair in pairs if "seed" not in pair[0].path]
    return all(np.array_equal(x, y) for x, y in arrays)


# ---------------------------------------------------------------- settings that no shape tells: timm

TINY_TIMM = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2, num_classes=5)
TRANSLATED = [
    dict(global_pool="avg", fc_norm=False),
    dict(global_pool="avg", final_norm=False),
    dict(act_layer="silu"),
    dict(act_layer="relu", norm_layer="layernorm"),
    dict(num_heads=6),
    dict(qk_norm=True, init_values=0.1),
    dict(class_token=False, global_pool="avg", reg_tokens=2),
    dict(reg_tokens=2, no_embed_class=True),
    dict(pre_norm=True, pos_embed="none"),
    dict(img_size=(48, 32), patch_size=16, embed_dim=32, mlp_ratio=3.5),
    dict(qkv_bias=False, dynamic_img_size=True, weight_init="skip", drop_path_rate=0.1, proj_drop_rate=0.1),
    dict(fc_norm=True),
]


@pytest.fixture
def timm_folder(timm, tmp_path):
    """(timm's arguments) -> the model, and the folder as timm's own function writes it."""

    def write(**args):
        model = randomized(timm.create_model(FAMILY.variant, **{**TINY_TIMM, **args}))
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        return model, tmp_path

    return write


@pytest.mark.once
@pytest.mark.parametrize("args", TRANSLATED, ids=lambda args: "-".join(args))
def test_a_model_that_timm_saved_computes_the_same(timm_folder, args):
    import torch

    theirs, folder = timm_folder(**args)
    model = keras_vits.create(FAMILY.variant, weights=folder)
    images = families.images(model)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    close(families.predict(model, images), expected)


REFUSED = [
    (dict(global_pool="max"), "global_pool 'max'"),
    (dict(global_pool=""), "global_pool ''"),
    (dict(pool_include_prefix=True), "pool_include_prefix"),
    (dict(scale_attn_norm=True), "scale_attn_norm"),
    (dict(proj_bias=False), "proj_bias"),
    (dict(norm_layer="rmsnorm"), "norm_layer"),
    (dict(act_layer="leaky_relu"), "act_layer 'leaky_relu'"),
    (dict(patch_size=[8, 16]), r"patch_size \(8, 16\)"),
    (dict(mlp_layer="GluMlp"), "mlp_layer"),
]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder in the hub's layout and the model whose weights it holds."""
    folder = tmp_path_factory.mktemp("vit_tiny")
    model = FAMILY.create()
    save_file(exported(model), folder / "model.safetensors")
    names = ["ant", "bee", "cat", "dog", "elk"]
    pretrained = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.75}
    config = {"architecture": FAMILY.variant, "label_names": names, "pretrained_cfg": pretrained}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model


def with_config(published, target, **change):
    """A folder with the published weights and another configuration."""
    folder, _ = published
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    (target / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | change))
    return target


@pytest.mark.once
@pytest.mark.parametrize(("args", "words"), REFUSED, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_arguments_of_timm_that_change_what_is_computed_are_refused_by_name(published, tmp_path, args, words):
    with pytest.raises(ValueError, match=words) as error:
        create(with_config(published, tmp_path, model_args=args))
    assert str(tmp_path) in str(error.value)


@pytest.mark.once
def test_the_pooling_of_the_pretrained_cfg_counts(published, tmp_path):
    config = {"input_size": [3, 32, 32], "global_pool": "avg"}
    with pytest.raises(ValueError, match=r"fc_norm\.weight"):  # timm builds it with this norm
        create(with_config(published, tmp_path, pretrained_cfg=config))


@pytest.mark.once
def test_configurations_of_older_timm_in_one_level(published, tmp_path):
    folder, original = published
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    flat = {"architecture": FAMILY.variant, "labels": config["label_names"], **config["pretrained_cfg"]}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    model = create(tmp_path)
    assert model.class_names == original.class_names or model.class_names == config["label_names"]
    assert model.preprocessing.mean == (0.1, 0.2, 0.3) and model.preprocessing.crop == 0.75


@pytest.mark.once
def test_label_names_by_number(published, tmp_path):
    names = {str(i): name for i, name in enumerate("vwxyz")}
    assert create(with_config(published, tmp_path, label_names=names)).class_names == list("vwxyz")


@pytest.mark.once
def test_weights_of_a_variant_that_differs_in_no_shape(published, tmp_path):
    """SigLIP's at 512 pixels have the tanh form of GELU, those at 384 the exact one."""
    theirs, ours = "vit_base_patch16_siglip_gap_512", "vit_base_patch16_siglip_gap_384"
    shape = {**SHAPE, "heads": 2}
    theirs = "vit_large_patch16_siglip_gap_512"
    ours = "vit_large_patch16_siglip_gap_384"
    folder = with_config(published, tmp_path, architecture=theirs, global_pool="avg")
    with pytest.raises(ValueError, match=rf"'{theirs}', not of '{ours}': activation is 'gelu_tanh' there and 'gelu'"):
        keras_vits.create(ours, weights=folder, **shape)


# ---------------------------------------------------------------- settings that no shape tells: transformers


@pytest.mark.once
@pytest.mark.parametrize("model_type", sources.MODEL_TYPES)
def test_what_a_configuration_leaves_out_is_transformers_default(transformers, model_type):
    theirs = transformers.CONFIG_MAPPING[model_type]()
    known = sources.MODEL_TYPES[model_type]
    for ours, name in sources.SETTINGS.items():
        if ours in known:
            assert sources.ACTIVATIONS.get(getattr(theirs, name), getattr(theirs, name)) == known[ours], name


@pytest.mark.once
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(model_type="ijepa"), "model_type 'ijepa'"),
        (dict(hidden_act="leaky_relu"), "hidden_act 'leaky_relu'"),
        (dict(patch_size=[8, 4]), "patch_size"),
        (dict(layer_norm_eps=-1.0), "layer_norm_eps"),
    ],
)
def test_models_of_transformers_that_are_not_known(transformers, tmp_path, config, words):
    build(transformers, "vit").save_pretrained(tmp_path)
    (folder := tmp_path / "changed").mkdir()
    with pytest.raises(ValueError, match=words):
        keras_vits.create("vit_base_patch16_224", weights=changed(tmp_path, folder, **config), **OURS)


@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_classifiers_of_transformers(transformers, tmp_path, registers):
    """They read the class token and the mean of the patches' tokens, one behind the other."""
    name = "Dinov2WithRegistersForImageClassification" if registers else "Dinov2ForImageClassification"
    cls = getattr(transformers, name)
    reference = randomized(cls(cls.config_class(**DINOV2, num_labels=5)))
    reference.save_pretrained(tmp_path)
    variant = "vit_base_patch14_reg4_dinov2" if registers else "vit_base_patch14_dinov2"
    model = keras_vits.create(variant, weights=tmp_path, **OURS)
    assert model.cfg.pool == "token_and_mean" and model.get_layer("head").kernel.shape == (48, 5)
    images = families.images(model)
    import torch

    with torch.no_grad():
        expected = reference(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits.numpy()
    close(families.predict(model, images), expected)
    again = model.from_config(model.get_config())
    assert again.output_shape == (None, 5) and again.cfg == model.cfg


@pytest.mark.once
def test_a_file_of_transformers_names_alone_is_refused(transformers, tmp_path):
    build(transformers, "vit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors has transformers' names.*config\.json"):
        keras_vits.create("vit_base_patch16_224", weights=tmp_path / "model.safetensors", image_size=32, **OURS)


# ---------------------------------------------------------------- files of the published code: MobileViT v3


@pytest.mark.once
def test_mobilevit_v3_files_load_through_weights(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save
    from test_mobilevit_v3 import reference
    from timm_models import randomized as random_values

    theirs = random_values(reference("mobilevitv3_xxs"))
    torch.save(theirs.state_dict(), tmp_path / "checkpoint_ema_best.pt")
    save(theirs.state_dict(), tmp_path / "checkpoint.safetensors")
    pickled = tmp_path / "checkpoint_ema_best.pt"
    model = keras_vits.create("mobilevitv3_xxs", weights=pickled, image_size=64, allow_pickle=True)
    assert model.cfg.num_classes == 1000 and model.preprocessing.channel_order == "bgr"
    images = families.images(model)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    close(families.predict(model, images), expected)
    again = keras_vits.create("mobilevitv3_xxs", weights=tmp_path / "checkpoint.safetensors", image_size=64)
    assert same_weights(again, model)


# ---------------------------------------------------------------- pickles


@pytest.fixture(scope="module")
def state(published):
    torch = pytest.importorskip("torch")
    return {k: torch.from_numpy(v) for k, v in load_file(published[0] / "model.safetensors").items()}


def prefixed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def parameters(state):
    import torch

    return {name: torch.nn.Parameter(tensor.clone()) for name, tensor in state.items()}


PICKLES = {
    "parameters": parameters,
    "model_and_optimizer": lambda s: {"model": s, "optimizer": {"state": {0: {"step": 3}}}, "epoch": 3},
    "data_parallel": lambda s: {"state_dict": prefixed(s, "module.")},
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "lightning": lambda s: {"state_dict": prefixed(s, "model."), "hyper_parameters": {"lr": 0.1}},
    "averaged": lambda s: {"state_dict": {k: v * 0 for k, v in s.items()}, "state_dict_ema": s},
    "swa": lambda s: {**prefixed(s, "module."), "n_averaged": next(iter(s.values())).new_tensor(7)},
    "half": lambda s: {name: tensor.bfloat16() for name, tensor in s.items()},
}


@pytest.mark.once
@pytest.mark.parametrize("form", PICKLES)
def test_pickles_of_every_form_people_save(published, state, tmp_path, form):
    import torch

    torch.save(PICKLES[form](state), tmp_path / "w.bin")
    model = create(tmp_path / "w.bin", image_size=32, allow_pickle=True)
    if form != "half":
        assert same_weights(model, published[1])


UNREADABLE = {
    "list": (lambda s: list(s.values()), "a list"),
    "numbers": (lambda s: dict(enumerate(s.values())), "without names.* 0"),
    "one_tensor": (lambda s: next(iter(s.values())), "a Tensor"),
    "nothing": (lambda s: {}, "an empty dictionary"),
    "others": (lambda s: {**s, "epoch": 3}, "'epoch' is a int"),
    "teacher_and_student": (lambda s: {"student": s, "teacher": s}, "'student' is a dict"),
    "integers": (lambda s: {k: (v * 50).char() for k, v in s.items()}, r"cls_token is of int8"),
    "nan": (lambda s: s | {"cls_token": s["cls_token"] * float("nan")}, "cls_token is NaN"),
    "sparse": (lambda s: s | {"norm.bias": s["norm.bias"].to_sparse()}, "'norm.bias' that is not read"),
}


@pytest.mark.once
@pytest.mark.parametrize("form", UNREADABLE)
def test_pickles_that_hold_something_else(state, tmp_path, form):
    import torch

    make, words = UNREADABLE[form]
    with warnings.catch_warnings(action="ignore"):
        torch.save(make(state), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=words) as error:
        create(tmp_path / "w.pt", image_size=32, allow_pickle=True)
    assert "w.pt" in str(error.value)


@pytest.mark.once
@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "safetensors", "npz"])
def test_empty_and_truncated_files_are_named(state, published, tmp_path, suffix):
    import torch

    file = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        content = (published[0] / "model.safetensors").read_bytes()
    elif suffix == "npz":
        np.savez(file, a=np.ones(3))
        content = file.read_bytes()
    else:
        torch.save(state, file)
        content = file.read_bytes()
    for size in (0, 1, 4, 9, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=rf"weights\.{suffix}") as error:
            create(file, image_size=32, allow_pickle=True)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the spellings of timm and keras.applications


@pytest.mark.once
def test_spellings_of_others_are_answered():
    for call, words in [
        (dict(weights="imagenet"), r"weights='timm/deit_tiny_patch16_224\.fb_in1k'"),
        (dict(weights="imagenet21k"), r"names no checkpoint.*timm/deit_tiny"),
        (dict(include_top=False), "has no include_top: use num_classes=0"),
        (dict(classes=7), "has no classes: use num_classes"),
        (dict(in_chans=1), "use in_channels"),
        (dict(img_size=64), "use image_size"),
        (dict(features_only=True), r"use model\.features"),
        (dict(pretrained="imagenet"), "pretrained is True or False"),
        (dict(weights=5), "received 5"),
        (dict(weights=""), "received ''"),
        (dict(weights=[1]), r"received \[1\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            keras_vits.create("deit_tiny_patch16_224", **call)
    with pytest.raises(ValueError, match=r"weights='timm/vit_base_patch16_224\.augreg_in21k'"):
        keras_vits.create("vit_base_patch16_224", weights="imagenet21k")


@pytest.mark.once
@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224.augreg_in21k_ft_in1k",
        "timm/vit_base_patch16_224.augreg_in21k_ft_in1k",
        "hf-hub:timm/vit_base_patch16_224.augreg_in21k_ft_in1k",
        "hf_hub:timm/vit_base_patch16_224.augreg_in21k_ft_in1k",
    ],
)
def test_names_of_timm_with_a_tag_are_answered_with_the_checkpoint(name):
    hub_id = "timm/vit_base_patch16_224.augreg_in21k_ft_in1k"
    answer = re.escape(f"create('vit_base_patch16_224', weights='{hub_id}')")
    for options in ({}, dict(pretrained=True)):
        with pytest.raises(ValueError, match=answer):
            keras_vits.create(name, **options)
    with pytest.raises(ValueError, match=r"has no published checkpoint 'mine': there is timm/"):
        keras_vits.create("vit_base_patch16_224.mine")
    with pytest.raises(ValueError, match=r"create\(name, weights='google/vit-base-patch16-224'\)"):
        keras_vits.create("google/vit-base-patch16-224")


@pytest.mark.once
@pytest.mark.parametrize("scheme", ["", "hf-hub:", "hf_hub:"])
def test_hub_ids_as_timm_writes_them_are_taken(published, monkeypatch, scheme):
    asked = []
    monkeypatch.setattr(files, "download", lambda hub_id: asked.append(hub_id) or published[0])
    assert same_weights(create(f"{scheme}timm/vit_tiny.x"), published[1]) and asked == ["timm/vit_tiny.x"]
    assert same_weights(create(f"local-dir:{published[0]}"), published[1])


# ---------------------------------------------------------------- configurations

DEEP = "[" * 50000 + "]" * 50000
CONFIGS = {  # config.json of timm -> what the sentence names
    "null": (dict(pretrained_cfg=None), None),
    "null_everywhere": (dict(pretrained_cfg=dict.fromkeys(["input_size", "mean", "std", "tag", "license"])), None),
    "null_args": (dict(model_args=None, label_names=None), None),
    "crop": (dict(pretrained_cfg=dict(crop_pct="x")), "pretrained_cfg.crop_pct"),
    "crop_of_two": (dict(pretrained_cfg=dict(crop_pct=2.0)), "crop"),
    "crop_nan": (dict(pretrained_cfg=dict(crop_pct=-1)), "crop"),
    "size": (dict(pretrained_cfg=dict(input_size=5)), "pretrained_cfg.input_size"),
    "size_of_two": (dict(pretrained_cfg=dict(input_size=[3, 32])), "pretrained_cfg.input_size"),
    "huge": (dict(pretrained_cfg=dict(input_size=[3, 10**6, 10**6])), "pretrained_cfg.input_size"),
    "huger": (dict(pretrained_cfg=dict(input_size=[3, 10**30, 8])), "config.json"),
    "negative": (dict(pretrained_cfg=dict(input_size=[3, -32, 32])), "pretrained_cfg.input_size"),
    "odd": (dict(pretrained_cfg=dict(input_size=[3, 33, 32])), "image_size 33 x 32"),
    "mean": (dict(pretrained_cfg=dict(mean=[])), "pretrained_cfg.mean"),
    "std": (dict(pretrained_cfg=dict(std=[0, 0, 0])), "std"),
    "interpolation": (dict(pretrained_cfg=dict(interpolation="cubicle")), "cubicle"),
    "tag": (dict(pretrained_cfg=dict(tag=["in1k"])), "pretrained_cfg.tag"),
    "license": (dict(pretrained_cfg=dict(license={"a": 1})), "pretrained_cfg.license"),
    "labels": (dict(label_names=5), "label_names"),
    "args": (dict(model_args=[1]), "model_args"),
    "heads": (dict(model_args=dict(num_heads="2")), "model_args.num_heads"),
    "no_heads": (dict(model_args=dict(num_heads=0)), "model_args.num_heads"),
    "deep": (None, "config.json"),
}


@pytest.mark.once
@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_of_another_form_is_one_sentence(published, tmp_path, name):
    change, words = CONFIGS[name]
    folder = with_config(published, tmp_path, **(change or {}))
    if change is None:
        (folder / "config.json").write_text(f'{{"architecture": {DEEP}}}')
    if words is None:
        assert same_weights(create(folder, image_size=32), published[1])
        return
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        create(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


PROCESSORS = {
    "size": dict(size="x"),
    "size_of_words": dict(size={"height": "x"}),
    "no_mean": dict(image_mean=None),
    "mean": dict(image_mean=0.5),
    "std": dict(image_std=[0.0, 0.0, 0.0]),
    "filter": dict(resample=-1),
    "factor": dict(rescale_factor="x"),
    "crop": dict(do_center_crop=True, crop_size=None),
    "huge": dict(size={"height": 10**9, "width": 10**9}),
}


@pytest.mark.once
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_preprocessor_configuration_of_another_form_is_one_sentence(transformers, tmp_path, name):
    build(transformers, "vit").save_pretrained(tmp_path)
    good = dict(size=224, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2, do_normalize=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(good | PROCESSORS[name]))
    with pytest.raises(ValueError) as error:
        keras_vits.create("vit_base_patch16_224", weights=tmp_path, **OURS)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.once
def test_the_public_functions_take_configurations_of_other_forms():
    for config in ({}, {"pretrained_cfg": None}, {"model_type": "vit", "pretrained_cfg": 5}):
        assert checkpoints.class_names(config) is None
        checkpoints.name_license("somebody/vit", config)


def test_the_vit_of_transformers_without_its_settings_has_those_of_its_type(transformers, tmp_path):
    """Ours would take the variant's: 1e-6 for 1e-12."""
    build(transformers, "vit").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("layer_norm_eps", "hidden_act", "qkv_bias"):
        config.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = keras_vits.create("vit_base_patch16_224", weights=tmp_path, **OURS)
    assert (model.cfg.epsilon, model.cfg.heads, model.cfg.image_size) == (1e-12, 2, (VIT["image_size"],) * 2)


# ---------------------------------------------------------------- Core ML packages


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    pytest.importorskip("coremltools")
    from keras_vits.edge import coreml

    return coreml.export(FAMILY.create(), tmp_path_factory.mktemp("package"))


@pytest.mark.once
def test_damaged_core_ml_programs_are_one_sentence(package, tmp_path):
    import shutil

    from keras_vits.edge.targets.coreml.mlprogram import Program

    copy = shutil.copytree(package.path, tmp_path / "copy.mlpackage")
    model = next(copy.rglob("*.mlmodel"))
    good, chance, refused = model.read_bytes(), random.Random(0), 0
    name, shape = package.input.name, package.input.shape
    for _ in range(150):
        data = bytearray(good)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        model.write_bytes(data)
        try:
            program = Program(copy)
            program({n: np.zeros((1, *s), "float32") for n, (s, _) in program.inputs.items() if np.prod(s) < 1e6})
        except ValueError as e:
            assert "copy.mlpackage" in str(e) and "\n" not in str(e)
            refused += 1
    assert refused > 50
    model.write_bytes(good)
    assert Program(copy)({name: np.zeros((1, *shape), "float32")})


@pytest.mark.once
@pytest.mark.parametrize("name", ["/absolute/weight.bin", "@model_path/../../../../x/weight.bin"])
def test_a_package_names_files_of_its_own_only(package, tmp_path, name):
    import shutil

    from keras_vits.edge.targets.coreml.mlprogram import Program

    copy = shutil.copytree(package.path, tmp_path / "copy.mlpackage")
    spec = Program(copy).spec
    block = spec.mlProgram.functions["main"].block_specializations
    values = [op.attributes["val"] for op in next(iter(block.values())).operations if op.type == "const"]
    blob = next(v for v in values if v.WhichOneof("value") == "blobFileValue")
    blob.blobFileValue.fileName = name
    next(copy.rglob("*.mlmodel")).write_bytes(spec.SerializeToString())
    with pytest.raises(ValueError, match=r"copy\.mlpackage.*which is outside of the package"):
        Program(copy)


@pytest.mark.once
@pytest.mark.parametrize("path", ["/etc/passwd", "../../other.mlpackage/Data/model.mlmodel"])
def test_a_manifest_names_files_of_its_own_only(package, tmp_path, path):
    import shutil

    from keras_vits.edge.targets.coreml.mlprogram import Program

    copy = shutil.copytree(package.path, tmp_path / "copy.mlpackage")
    manifest = json.loads((copy / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = path
    (copy / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"copy\.mlpackage.*which is outside of the package"):
        Program(copy)


# ---------------------------------------------------------------- everything that is parsed


@pytest.mark.once
@pytest.mark.early
@pytest.mark.parametrize("seed", [0, 1])
def test_no_damaged_file_ends_in_an_internal_error(seed):
    """Two minutes of tools/fuzz.py, of one process; what it prints names the seed and the case."""
    pytest.importorskip("torch")
    options = ["--seconds", "60", "--seed", str(seed), "--cases", "2000", "--processes", "1"]
    done = subprocess.run([sys.executable, ROOT / "tools" / "fuzz.py", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [int(n) for n in done.stdout.splitlines()[-1].split()[1:]]
    assert counts[0] > 100 and counts[2:] == [0, 0], done.stdout


@pytest.mark.once
@pytest.mark.skipif(sys.platform != "linux", reason="other systems take names of text alone")
def test_pictures_whose_names_are_no_text_are_read(tmp_path, monkeypatch):
    for i, folder in enumerate(("ant", "bee\udcff")):
        (tmp_path / folder).mkdir()
        for name in ("a\udcff.png", "b.png", "c\udce9.png"):
            Image.fromarray(np.full((8, 8, 3), 40 * i, "uint8")).save(tmp_path / folder / name)
    preprocessing = Preprocessing(image_size=(8, 8))
    read = data.load(tmp_path, preprocessing)
    assert len(read.train) == 4 and len(read.validation) == 2 and len(read.train.fingerprint()) == 64
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)  # as of a large folder, of which the files are read again
    again = data.load(tmp_path, preprocessing)
    assert len(again.train.fingerprint()) == 64 and again.train.fingerprint() != read.train.fingerprint()


@pytest.mark.once
@pytest.mark.parametrize(
    "change",
    [
        lambda results: results["predict"].update(startTime=1e300),
        lambda results: results["predict"].update(samples=[0.01, -5.0]),
        lambda results: results["load"].update(samples=[1e308]),
    ],
    ids=["when it was", "negative", "endless"],
)
def test_times_that_are_none_are_refused_in_xcodes_report(change, tmp_path):
    results = {"predict": {"samples": [0.01, 0.02], "startTime": 7e8}, "load": {"samples": [0.2]}}
    change(results)
    report = {"jsonVersion": 1, "modelMetadata": {"fileName": "v_float16", "size": 9}, "computeUnit": 2}
    report |= {"deviceInfo": {"modelName": "iPhone 16 Pro", "osNameAndVersionWithoutBuildNumber": "iOS 26.5"}}
    (tmp_path / "phone.mlperf").mkdir()
    (tmp_path / "phone.mlperf" / "report.json").write_text(json.dumps(report | {"deviceResults": results}))
    artifact = SimpleNamespace(path=tmp_path / "v_float16.mlpackage", size_bytes=9)
    with pytest.raises(ValueError, match=r"phone\.mlperf (was begun|has times) .*: run the test again"):
        ios.read_report(tmp_path / "phone.mlperf", artifact)
