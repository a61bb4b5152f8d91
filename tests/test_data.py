"""Data sets: what is read, how it is split, and what is refused."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from keras_vits._util import pictures
from keras_vits.preprocess import Preprocessing
from keras_vits.training import data

pytestmark = pytest.mark.once

PREPROCESSING = Preprocessing(image_size=(16, 16), crop=1.0)


def save(path, colour=(255, 0, 0), size=(20, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def photos(tmp_path):
    """Ten red and ten blue pictures in several formats and depths."""
    for i in range(10):
        save(tmp_path / "red" / f"{i}.{('jpg', 'png', 'webp', 'bmp')[i % 4]}", (255, 0, 0))
        save(tmp_path / "blue" / "holidays" / f"{i}.PNG", (0, 0, 255))
    (tmp_path / "red" / "notes.txt").write_text("not an image, and not meant as one")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_digits_are_split_as_documented():
    from sklearn.datasets import load_digits

    found = data.load("digits", PREPROCESSING)
    assert (len(found.train), len(found.validation)) == (1297, 500)
    np.testing.assert_array_equal(found.train.labels, load_digits().target[:1297])
    np.testing.assert_array_equal(found.validation.labels, load_digits().target[1297:])
    assert found.train.class_names == tuple("0123456789") == data.class_names("digits")


def test_digits_fill_the_picture_and_the_range():
    found = data.load("digits", dataclasses.replace(PREPROCESSING, image_size=(8, 8), crop=0.5)).train
    from sklearn.datasets import load_digits

    expected = np.rint(load_digits().images[:1297] * 255 / 16)
    np.testing.assert_array_equal(found.pixels()[..., 1], expected)  # no crop, no blur: 8 x 8 stays what it was
    np.testing.assert_allclose(found.images()[..., 2], expected / 127.5 - 1, atol=1e-6)


def test_folder(photos):
    found = data.load(photos, PREPROCESSING)
    assert found.train.class_names == data.class_names(photos) == ("blue", "red")
    assert (len(found.train), len(found.validation), found.skipped) == (16, 4, ())
    for part in (found.train, found.validation):
        assert set(part.labels) == {0, 1}
        np.testing.assert_array_equal(part.pixels()[:, 8, 8, 0] > 128, part.labels == 1)  # red is class 1
        assert part.images().shape == (len(part), 16, 16, 3)


def test_the_split_depends_on_names_alone_and_moves_little(photos, tmp_path_factory):
    def held_out(root):
        files = pictures.listing(root / "red").pictures
        which = data._held_out(range(len(files)), files, root, 0.2)
        return {files[i].name for i in which}

    before = held_out(photos)
    other = tmp_path_factory.mktemp("other")
    for file in sorted((photos / "red").iterdir(), reverse=True):
        save(other / "red" / file.name) if file.suffix != ".txt" else None
    assert held_out(other) == before and len(before) == 2
    save(photos / "red" / "another.png")
    assert len(held_out(photos) & before) >= 1


def test_a_folder_that_is_split_already(tmp_path):
    for i, part in enumerate(("train", "val")):
        for name in ("a", "b"):
            for j in range(3 - i):
                save(tmp_path / part / name / f"{j}.png", (0, 255 * i, 0))
    found = data.load(tmp_path, PREPROCESSING)
    assert (len(found.train), len(found.validation)) == (6, 4)
    assert not found.train.pixels()[..., 1].any() and (found.validation.pixels()[..., 1] == 255).all()


def test_a_picture_is_turned_as_its_exif_data_says(tmp_path):
    picture = Image.new("RGB", (20, 20))
    picture.paste((255, 255, 255), (0, 0, 20, 10))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    for name in ("a", "b"):
        for i in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            picture.save(tmp_path / name / f"{i}.png", exif=exif)
    pixels = data.load(tmp_path, PREPROCESSING).train.pixels()
    assert (pixels[:, 2] < 50).all() and (pixels[:, -3] > 200).all()


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"no image at all"])
def test_an_unreadable_picture_is_skipped_and_named(photos, content):
    broken = photos / "red" / "broken.png"
    broken.write_bytes(content)
    found = data.load(photos, PREPROCESSING)
    assert found.skipped == (broken,)
    assert len(found.train) + len(found.validation) == 20
    assert str(broken) in found.warning() and "1 unreadable" in found.warning() and "\n" not in found.warning()


def test_a_truncated_photo_is_skipped(photos):
    whole = photos / "red" / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype("uint8")).save(whole)
    whole.write_bytes(whole.read_bytes()[:1500])
    assert data.load(photos, PREPROCESSING).skipped == (whole,)


def test_a_big_folder_is_read_when_needed(photos, monkeypatch):
    in_memory = data.load(photos, PREPROCESSING).train
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    lazy = data.load(photos, PREPROCESSING).train
    assert isinstance(lazy.sources, tuple) and isinstance(in_memory.sources, np.ndarray)
    for which in (slice(None), [3, 1], slice(2, 5)):
        np.testing.assert_array_equal(lazy.images(which), in_memory.images(which))
    np.testing.assert_array_equal(lazy.take(4).pixels(), in_memory.take(4).pixels())
    assert set(lazy.take(4).labels) == {0, 1}


def no_folder(path):
    return path / "nowhere"


def empty(path):
    return path


def no_images(path):
    for name in ("a", "b"):
        (path / name).mkdir()
        (path / name / "readme.txt").write_text("")
    return path


def one_class(path):
    save(path / "cats" / "1.png")
    return path


def all_of_a_class_unreadable(path):
    for i in range(3):
        save(path / "a" / f"{i}.png")
    (path / "b").mkdir()
    (path / "b" / "1.png").write_bytes(b"")
    return path


def other_classes(path):
    save(path / "train" / "a" / "1.png")
    save(path / "train" / "b" / "1.png")
    save(path / "val" / "a" / "1.png")
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (no_folder, "No such folder"),
        (empty, "no subfolders with images"),
        (no_images, "no subfolders with images"),
        (one_class, "one class, 'cats'"),
        (all_of_a_class_unreadable, "no readable image to train on of class 'b'"),
        (other_classes, "must have the same classes, .* there is 'b' in .*train alone"),
    ],
)
def test_refused(tmp_path, make, words):
    with pytest.raises(ValueError, match=words) as error:
        data.load(make(tmp_path), PREPROCESSING)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [dict(limit=0), dict(limit=-1)])
def test_limit_must_be_positive(arguments):
    with pytest.raises(ValueError, match="limit must be a positive number"):
        data.load("digits", PREPROCESSING, **arguments)


def test_batches_hold_every_picture_once_and_repeat_exactly():
    pictures = data.load("digits", PREPROCESSING, limit=50).train
    pictures = dataclasses.replace(
        pictures, sources=np.arange(50, dtype="uint8")[:, None, None, None] * np.ones((1, 16, 16, 3), "uint8")
    )

    def epoch(batches):
        return np.concatenate(
            [np.rint((x[:, 0, 0, 0] + 1) * 127.5) for x, _ in (batches[i] for i in range(len(batches)))]
        )

    first = data.Batches(pictures, 16, shuffle=True, seed=3)
    assert len(first) == 4 and first[3][0].shape == (2, 16, 16, 3)
    one = epoch(first)
    np.testing.assert_array_equal(np.sort(one), np.arange(50))
    np.testing.assert_array_equal(one, epoch(first))
    first.on_epoch_end()
    two = epoch(first)
    assert (one != two).any()
    np.testing.assert_array_equal(two, epoch(data.Batches(pictures, 16, shuffle=True, seed=3, epoch=1)))
    np.testing.assert_array_equal(epoch(data.Batches(pictures, 16)), np.arange(50))
    x, y = data.Batches(pictures, 50)[0]
    assert (x.dtype, y.dtype) == ("float32", "float32")
    np.testing.assert_array_equal(y.argmax(-1), pictures.labels)


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation(channels):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (6, 20, 24, channels)).astype("uint8")
    still = data.Augmentation(shift=0, rotation=0, zoom=0)
    np.testing.assert_array_equal(still(pixels, random), pixels)
    mirrored = data.Augmentation(shift=0, rotation=0, zoom=0, flip=True)(pixels, random)
    flipped = [np.array_equal(m, p[:, ::-1]) for m, p in zip(mirrored, pixels, strict=True)]
    assert all(f or np.array_equal(m, p) for f, m, p in zip(flipped, mirrored, pixels, strict=True))
    assert 0 < sum(flipped) < 6
    dot = np.zeros((50, 21, 21, channels), "uint8")
    dot[:, 10, 10] = 255
    moved = data.Augmentation(shift=0.2, rotation=0, zoom=0)(dot, random).astype(float)[..., 0]
    centre = (moved * np.arange(21)).sum((1, 2)) / moved.sum((1, 2))
    assert 10 - 0.2 * 21 <= centre.min() < 8 and 12 < centre.max() <= 10 + 0.2 * 21
    turned = data.Augmentation(shift=0, rotation=45, zoom=0)(dot, random)
    assert (turned[:, 10, 10] > 200).all()  # it turns about the centre
