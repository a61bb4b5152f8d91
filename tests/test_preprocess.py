"""A picture becomes the same numbers as in timm's evaluation transform."""

import dataclasses

import families
import keras
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from keras_vits import checkpoints
from keras_vits.preprocess import INTERPOLATIONS, Preprocessing

pytestmark = pytest.mark.once

CHINA, FLOWER = load_sample_image("china.jpg"), load_sample_image("flower.jpg")  # (427,640,3) uint8
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def timm_transform(preprocessing):
    from timm.data import create_transform

    return create_transform(
        input_size=(3, *preprocessing.image_size),
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop,
        crop_mode=preprocessing.crop_mode,
    )


PICTURES = (CHINA, np.ascontiguousarray(FLOWER.transpose(1, 0, 2)))  # a wide one and a tall one


def same_as_timm(preprocessing):
    for picture in PICTURES:
        expected = timm_transform(preprocessing)(Image.fromarray(picture)).numpy().transpose(1, 2, 0)
        ours = preprocessing(picture)
        assert ours.shape == expected.shape and ours.dtype == np.float32
        assert np.abs(ours - expected).max() * max(preprocessing.std) < 1e-5  # a step of a pixel is 1/255


SIZES = [(224, 224), (256, 256), (96, 160), (160, 96), (700, 700)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", [0.875, 0.888, 0.9, 0.95, 1.0])
def test_equals_timm(timm, size, crop):
    same_as_timm(Preprocessing(image_size=size, crop=crop, **IMAGENET))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", [0.6, 0.95, 1.0])
@pytest.mark.parametrize("mode", ["squash", "border"])
def test_crop_mode_equals_timm(timm, size, crop, mode):
    same_as_timm(Preprocessing(image_size=size, crop=crop, crop_mode=mode, **IMAGENET))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_interpolation_equals_timm(timm, interpolation):
    same_as_timm(Preprocessing(interpolation=interpolation))


def test_every_published_setting_equals_timm(timm):
    """From timm's own configuration of a checkpoint to our row in the table, for each distinct one."""
    from timm.data import create_transform, resolve_data_config

    chosen = {c.preprocessing: c for c in checkpoints.table()}
    assert len({p.image_size for p in chosen}) > 2 and len({p.mean for p in chosen}) > 2
    for preprocessing, checkpoint in chosen.items():
        cfg = timm.get_pretrained_cfg(f"{checkpoint.variant}.{checkpoint.tag}").to_dict()
        transform = create_transform(**resolve_data_config(pretrained_cfg=cfg))
        for picture in PICTURES:
            expected = transform(Image.fromarray(picture)).numpy().transpose(1, 2, 0)
            difference = np.abs(preprocessing(picture) - expected) * preprocessing.std
            assert difference.max() < 1e-5, preprocessing


def test_border_is_of_the_mean_in_rgb():
    border = Preprocessing(image_size=(64, 64), crop=1.0, crop_mode="border", mean=(1.0, 0.5, 0.0))
    assert border.pixels(CHINA)[0, 0].tolist() == [255, 128, 0]
    bgr = dataclasses.replace(border, channel_order="bgr", mean=border.mean[::-1])
    np.testing.assert_array_equal(bgr.pixels(CHINA), border.pixels(CHINA))
    assert not bgr(CHINA)[0].round(2).any()
    grey = dataclasses.replace(border, mean=(0.5,), std=(1.0,))
    assert grey.pixels(CHINA)[0, 0].tolist() == [128]


def test_path_image_and_array_agree(tmp_path):
    preprocessing = Preprocessing(image_size=(64, 64))
    Image.fromarray(CHINA).save(tmp_path / "china.png")
    expected = preprocessing(CHINA)
    np.testing.assert_array_equal(preprocessing(tmp_path / "china.png"), expected)
    np.testing.assert_array_equal(preprocessing(str(tmp_path / "china.png")), expected)
    np.testing.assert_array_equal(preprocessing(Image.fromarray(CHINA).convert("RGBA")), expected)


def test_file_is_turned_upright(tmp_path):
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(CHINA)))  # the camera was held on its side: orientation 6
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    preprocessing = Preprocessing(image_size=(64, 96))
    np.testing.assert_array_equal(preprocessing(tmp_path / "turned.png"), preprocessing(CHINA))
    with Image.open(tmp_path / "turned.png") as opened:
        np.testing.assert_array_equal(preprocessing(opened), preprocessing(CHINA))


def test_every_kind_of_picture_is_read():
    preprocessing = Preprocessing(image_size=(32, 32))
    picture = Image.fromarray(CHINA)
    expected = preprocessing(CHINA)
    grey = preprocessing(picture.convert("L"))
    deep = Image.fromarray(np.asarray(picture.convert("L")).astype("uint16") * 257)  # 16 bits
    assert deep.mode == "I;16"
    for same, kind in ((expected, picture.convert("RGBA")), (grey, picture.convert("LA")), (grey, deep)):
        np.testing.assert_array_equal(preprocessing(kind), same)
    for near, mode in ((expected, "CMYK"), (expected, "P"), (grey, "1"), (grey, "F")):
        assert np.abs(preprocessing(picture.convert(mode)) - near).mean() < 0.01 < np.abs(grey - expected).mean()
    pixels = CHINA[..., :1]
    np.testing.assert_array_equal(preprocessing(pixels), preprocessing(pixels[..., 0]))


def test_bgr_is_the_reversed_rgb_normalised_in_its_own_order():
    rgb = Preprocessing(image_size=(32, 32), **IMAGENET)
    bgr = dataclasses.replace(rgb, mean=rgb.mean[::-1], std=rgb.std[::-1], channel_order="bgr")
    np.testing.assert_array_equal(bgr(CHINA), rgb(CHINA)[..., ::-1])
    np.testing.assert_array_equal(bgr.pixels(CHINA), rgb.pixels(CHINA))


def test_one_channel_model_takes_grey_pictures():
    model = families.FAMILIES[0].create(in_channels=1)
    grey = model.preprocessing(CHINA)
    assert grey.shape == (*model.cfg.image_size, 1)
    np.testing.assert_array_equal(grey, model.preprocessing(np.asarray(Image.fromarray(CHINA).convert("L"))))
    assert keras.ops.convert_to_numpy(model(grey[None])).shape == (1, 5)
    with pytest.raises(ValueError, match="takes 4"):
        families.FAMILIES[0].create(in_channels=4).preprocessing(CHINA)


def test_unreadable_pictures_are_named(tmp_path):
    good = tmp_path / "good.jpg"
    Image.fromarray(CHINA).save(good)
    truncated, text = tmp_path / "truncated.jpg", tmp_path / "text.jpg"
    truncated.write_bytes(good.read_bytes()[:2000])
    text.write_text("not a picture")
    for path in (truncated, text, tmp_path / "missing.jpg", tmp_path):
        with pytest.raises(ValueError, match=rf"{path.name} is not a readable picture"):
            Preprocessing()(path)
    for pixels, words in [
        (np.zeros((4, 4, 3), "float32"), r"float32 of shape \(4, 4, 3\)"),
        (np.zeros((3, 8, 8), "uint8"), r"uint8 of shape \(3, 8, 8\)"),
        (np.zeros((2, 8, 8, 3), "uint8"), r"uint8 of shape \(2, 8, 8, 3\)"),
        (np.zeros((0, 8, 3), "uint8"), r"uint8 of shape \(0, 8, 3\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            Preprocessing()(pixels)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(interpolation="cubic"), "interpolation"),
        (dict(crop=0.0), "crop"),
        (dict(crop=1.5), "crop"),
        (dict(std=(0.0, 1.0, 1.0)), "std"),
        (dict(channel_order="gbr"), "channel_order"),
        (dict(crop_mode="stretch"), "crop_mode"),
    ],
)
def test_impossible_values(wrong, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**wrong)
