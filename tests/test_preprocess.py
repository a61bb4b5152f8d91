"""A picture becomes the same numbers as in timm's evaluation transform."""

import dataclasses

import families
import keras
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

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
    )


@pytest.mark.parametrize("size", [(224, 224), (256, 256), (96, 160), (160, 96), (700, 700)])
@pytest.mark.parametrize("crop", [0.875, 0.888, 0.9, 1.0])
def test_equals_timm(timm, size, crop):
    preprocessing = Preprocessing(image_size=size, crop=crop, **IMAGENET)
    for picture in (CHINA, FLOWER.transpose(1, 0, 2)):
        expected = (
            timm_transform(preprocessing)(Image.fromarray(np.ascontiguousarray(picture))).numpy().transpose(1, 2, 0)
        )
        ours = preprocessing(picture)
        assert ours.shape == expected.shape and ours.dtype == np.float32
        assert np.abs(ours - expected).max() * max(preprocessing.std) < 1e-5


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_interpolation_equals_timm(timm, interpolation):
    preprocessing = Preprocessing(interpolation=interpolation)
    expected = timm_transform(preprocessing)(Image.fromarray(CHINA)).numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(preprocessing(CHINA), expected, atol=1e-5)


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


def test_bgr_is_the_reversed_rgb_normalised_in_its_own_order():
    rgb = Preprocessing(image_size=(32, 32), **IMAGENET)
    bgr = dataclasses.replace(rgb, mean=rgb.mean[::-1], std=rgb.std[::-1], channel_order="bgr")
    np.testing.assert_array_equal(bgr(CHINA), rgb(CHINA)[..., ::-1])
    np.testing.assert_array_equal(bgr.pixels(CHINA), rgb.pixels(CHINA))


def test_one_channel_model_takes_grey_pictures():
    model = families.FAMILIES[0].create(in_channels=1)
    grey = model.preprocessing(CHINA)
    assert grey.shape == (32, 32, 1)
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
    with pytest.raises(ValueError, match=r"float32 of shape \(4, 4, 3\)"):
        Preprocessing()(np.zeros((4, 4, 3), "float32"))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(interpolation="cubic"), "interpolation"),
        (dict(crop=0.0), "crop"),
        (dict(crop=1.5), "crop"),
        (dict(std=(0.0, 1.0, 1.0)), "std"),
        (dict(channel_order="gbr"), "channel_order"),
    ],
)
def test_impossible_values(wrong, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**wrong)
