"""The table of published weights, what loading one adds (licence, classes), and labels for a picture."""

import json
import pathlib
import warnings

import families
import generate_checkpoints
import keras
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from sklearn.datasets import load_sample_image
from test_weights import exported

import keras_vits
from keras_vits import checkpoints, cli
from keras_vits.prediction import Prediction, best
from keras_vits.specs import OutputSpec, classification

PACKAGE = pathlib.Path(keras_vits.__file__).parent / "checkpoints"
CHINA = load_sample_image("china.jpg")
FAMILY = next(f for f in families.FAMILIES if f.name == "vit")


@pytest.mark.once
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("checkpoints.csv", generate_checkpoints.checkpoints),
        ("imagenet_classes.txt", generate_checkpoints.imagenet_classes),
    ],
)
def test_files_are_what_timm_says(timm, file, content):
    written = (PACKAGE / file).read_text(encoding="utf-8")
    assert written == content(timm), f"{file} is out of date: run tools/generate.py"


@pytest.mark.once
def test_table():
    known = keras_vits.list_models()
    table = checkpoints.table()
    assert len({(c.variant, c.tag) for c in table}) == len(table) > 80
    for c in table:
        assert c.variant in known and checkpoints.files.HUB_ID.fullmatch(c.hub_id)
        assert c in checkpoints.published(c.variant)
        assert c.top1 is None or (60 < c.top1 < 90 and c.num_classes == 1000)
    assert {c.license for c in table} >= {"Apache-2.0", "CC-BY-NC-4.0", "cvnets-license", "MIT", None}
    (xs,) = checkpoints.published("mobilevit_xs")
    assert (xs.hub_id, xs.license, xs.top1) == ("timm/mobilevit_xs.cvnets_in1k", "cvnets-license", 74.618)
    assert xs.preprocessing.image_size == (256, 256) and xs.preprocessing.mean == (0, 0, 0)
    mae = next(c for c in table if c.hub_id == "timm/vit_base_patch16_224.mae")
    assert (mae.license, mae.top1, mae.num_classes) == ("CC-BY-NC-4.0", None, 0)
    assert checkpoints.published("mixer_s32_224") == ()


@pytest.mark.once
def test_list_models_with_published_weights():
    names = keras_vits.list_models(pretrained=True)
    assert names == sorted({c.variant for c in checkpoints.table()}) and set(names) < set(keras_vits.list_models())
    assert keras_vits.list_models("mixer_*", pretrained=True) == ["mixer_b16_224", "mixer_l16_224"]


@pytest.mark.once
def test_imagenet_classes():
    names = checkpoints.imagenet_classes()
    assert len(set(names)) == len(names) == 1000 and all(name == name.strip() and name for name in names)
    assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")


# ---------------------------------------------------------------- what loading a checkpoint adds


@pytest.fixture
def folder(tmp_path):
    """(architecture and licence of a config.json, number of classes) -> a tiny ViT's folder in the hub's layout."""

    def write(classes, **published):
        model = FAMILY.create(num_classes=classes)
        save_file(exported(model), tmp_path / "model.safetensors")
        published = {"input_size": [3, *model.cfg.image_size], "num_classes": classes, **published}
        config = {"architecture": published.pop("architecture", "vit_of_mine"), "pretrained_cfg": published}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def create(weights, **overrides):
    shape = {k: v for k, v in FAMILY.tiny.items() if k not in ("num_classes", "image_size")}
    return keras_vits.create(FAMILY.variant, weights=weights, **{**shape, **overrides})


def test_imagenet_checkpoint_gets_its_labels(folder):
    assert create(folder(1000, tag="mine_in21k_ft_in1k")).class_names == list(checkpoints.imagenet_classes())
    assert create(folder(1000, tag="mine_in1k"), num_classes=7).class_names is None
    assert create(folder(1000, tag="photos")).class_names is None  # a thousand other classes
    assert create(folder(9, tag="mine_in1k")).class_names is None
    assert keras_vits.create(FAMILY.variant, **{**FAMILY.tiny, "num_classes": 1000}).class_names is None


def test_labels_of_the_checkpoint_come_first(folder):
    path = folder(1000, tag="mine_in1k", label_names=[f"thing {i}" for i in range(1000)])
    assert create(path).class_names[7] == "thing 7"


def test_crop_mode_of_the_checkpoint(folder):
    assert create(folder(5, crop_mode="squash")).preprocessing.crop_mode == "squash"


@pytest.mark.parametrize(
    ("published", "license"),
    [
        (dict(license="cc-by-nc-4.0"), "CC-BY-NC-4.0"),
        (dict(architecture="mobilevit_s", tag="cvnets_in1k"), "cvnets-license"),
        (dict(license="apple-amlr"), "apple-amlr"),
    ],
)
def test_a_restricting_license_is_named_once(folder, monkeypatch, published, license):
    monkeypatch.setattr(checkpoints.catalogue, "_named", set())
    path = folder(5, **published)
    with pytest.warns(checkpoints.LicenseWarning, match=license) as told:
        model = create(path)
    assert len(told) == 1 and str(path) in str(told[0].message) and "\n" not in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error", checkpoints.LicenseWarning)
        create(path)
        keras_vits.load_weights(model, path)
    checkpoints.catalogue._named.clear()
    with pytest.warns(checkpoints.LicenseWarning, match=license):
        keras_vits.load_weights(model, path)


def test_the_table_knows_the_license_of_a_hub_id(folder, monkeypatch):
    monkeypatch.setattr(checkpoints.catalogue, "_named", set())
    path = folder(5)
    monkeypatch.setattr(checkpoints.files, "download", lambda hub_id: path)
    with pytest.warns(checkpoints.LicenseWarning, match=r"timm/vit_base_patch16_224\.mae .* CC-BY-NC-4\.0"):
        create("timm/vit_base_patch16_224.mae")


@pytest.mark.parametrize("published", [dict(license="apache-2.0"), dict(license="mit"), dict(), dict(tag="mine_in1k")])
def test_a_free_license_is_not_mentioned(folder, monkeypatch, published):
    monkeypatch.setattr(checkpoints.catalogue, "_named", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error", checkpoints.LicenseWarning)
        create(folder(5, **published))
        create(folder(5, **published) / "model.safetensors", image_size=FAMILY.tiny["image_size"])


# ---------------------------------------------------------------- the command line


@pytest.mark.once
def test_command_lists_published_weights(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["list", "mobilevitv2_15*", "--pretrained"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "timm/" in line]
    assert stopped.value.code == 0
    assert rows == [
        ["timm/mobilevitv2_150.cvnets_in1k", "80.4", "256", "cvnets-license"],
        ["timm/mobilevitv2_150.cvnets_in22k_ft_in1k", "81.5", "256", "cvnets-license"],
        ["timm/mobilevitv2_150.cvnets_in22k_ft_in1k_384", "82.6", "384", "cvnets-license"],
    ]


@pytest.mark.once
def test_command_names_a_license_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(checkpoints.catalogue, "_named", set())
    cli.use_backend(None)
    for _ in range(2):
        checkpoints.name_license("timm/mobilevit_s.cvnets_in1k", {})
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "cvnets-license" in err and "checkpoints.py" not in err


# ---------------------------------------------------------------- predict


@pytest.fixture(scope="module")
def model():
    model = FAMILY.create()
    model.class_names = ["ant", "bee", "cat", "dog", "elk"]
    return model


def test_predict_is_the_softmax_of_the_logits(model):
    found = keras_vits.predict(model, CHINA)
    logits = keras.ops.convert_to_numpy(model(model.preprocessing(CHINA)[None]))[0].astype("float64")
    expected = np.exp(logits) / np.exp(logits).sum()
    assert [p.index for p in found] == np.argsort(-logits).tolist()
    for p in found:
        assert p.label == model.class_names[p.index] and type(p.index) is int and type(p.probability) is float
        assert p.probability == pytest.approx(expected[p.index], rel=1e-4)
    assert sum(p.probability for p in found) == pytest.approx(1)


def test_predict_takes_what_people_have(model, tmp_path):
    picture = Image.fromarray(CHINA)
    picture.save(tmp_path / "china.png")
    turned, exif = Image.fromarray(np.ascontiguousarray(np.rot90(CHINA))), Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    turned.save(tmp_path / "turned.png", exif=exif)
    expected = keras_vits.predict(model, CHINA)
    same = [tmp_path / "china.png", str(tmp_path / "china.png"), tmp_path / "turned.png", picture]
    same += [picture.convert("RGBA"), np.asarray(picture.convert("RGBA")), Image.open(tmp_path / "turned.png")]
    for found in [keras_vits.predict(model, image) for image in same]:
        assert found == expected
    grey = np.asarray(picture.convert("L"))
    assert keras_vits.predict(model, grey) == keras_vits.predict(model, grey.repeat(3).reshape(*grey.shape, 3))


def test_predict_of_a_list_is_a_list_of_lists(model, monkeypatch):
    monkeypatch.setattr("keras_vits.prediction.BATCH", 2)
    pictures = [CHINA, CHINA[::-1], CHINA[:, ::-1]]
    found = keras_vits.predict(model, pictures, top_k=2)
    assert [len(one) for one in found] == [2, 2, 2] and len({one[0].probability for one in found}) == 3
    for one, picture in zip(found, pictures, strict=True):
        alone = keras_vits.predict(model, picture, top_k=2)
        assert [p.label for p in one] == [p.label for p in alone]
        assert one[0].probability == pytest.approx(alone[0].probability, rel=1e-5)
    ((first,),) = keras_vits.predict(model, (CHINA,), top_k=1)
    assert first.index == found[0][0].index
    assert keras_vits.predict(model, []) == []


def test_predict_without_names_and_with_one_channel():
    found = keras_vits.predict(FAMILY.create(in_channels=1), CHINA, top_k=1)
    assert len(found) == 1 and found[0].label == f"class {found[0].index}"


def test_keras_own_predict_is_as_it_was(model):
    assert model.predict(model.preprocessing(CHINA)[None], verbose=0).shape == (1, 5)


def test_predict_refuses(model):
    with pytest.raises(ValueError, match=r"Pixels must be uint8.*float32"):
        keras_vits.predict(model, CHINA.astype("float32") / 255)
    with pytest.raises(ValueError, match=r"nowhere\.jpg is not a readable picture"):
        keras_vits.predict(model, "nowhere.jpg")
    with pytest.raises(ValueError, match="top_k must be a positive integer; received 0"):
        keras_vits.predict(model, CHINA, top_k=0)
    with pytest.raises(ValueError, match="gives features, so it predicts no classes"):
        keras_vits.predict(FAMILY.create(num_classes=0), CHINA)


@pytest.mark.once
def test_best_of_logits_and_of_probabilities():
    assert best([0.0, np.log(3.0)], classification("logits", 2, ("a", "b")), 5) == [
        Prediction("b", pytest.approx(0.75), 1),
        Prediction("a", pytest.approx(0.25), 0),
    ]
    assert best([0.25, 0.75], OutputSpec(name="p", kind="probabilities", classes=2), 1) == [
        Prediction("class 1", 0.75, 1)
    ]
    assert best([1e4, 0.0], classification("logits", 2), 1) == [Prediction("class 0", 1.0, 0)]  # no overflow


@pytest.mark.once
def test_the_function_stays_what_it_is():
    """A module of the same name would take its place at the first import."""
    from keras_vits.prediction import predict

    assert keras_vits.predict is predict and keras_vits.predict is predict
