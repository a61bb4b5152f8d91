"""What users have on their disks: pictures of every shape and depth, and folders that programs have been in."""

import os
import resource
import socket
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from keras_vits._util import pictures, resampling
from keras_vits.preprocess import CROP_MODES, INTERPOLATIONS, Preprocessing
from keras_vits.training import data

pytestmark = pytest.mark.once

SMALL = Preprocessing(image_size=(16, 16), crop=1.0)


def save(path, value=100, size=(20, 20), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path, **options)


def classes(root, *parts, count=3, first=0):
    """`count` pictures of each of the classes cat and dog, those of dog brighter, in each of the folders."""
    for part in parts or (".",):
        for name, value in (("cat", 40), ("dog", 200)):
            for i in range(first, first + count):
                save(root / part / name / f"{i}.png", value)
    return root


# ---------------------------------------------------------------- shapes


def whole(preprocessing, picture):
    """Pixels by Pillow's resizing of all of the picture, and a crop."""
    size = preprocessing._resized(*picture.size)
    resized = np.asarray(picture.resize(size, resampling.PILLOW[preprocessing.interpolation]))
    resized = resized.reshape(*resized.shape[:2], -1)
    height, width = preprocessing.image_size
    top, left = (
        max(0, round((have - want) / 2)) for have, want in zip(resized.shape[:2], (height, width), strict=True)
    )
    return resized[top : top + height, left : left + width]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_thin_picture_has_the_same_pixels_as_when_all_of_it_is_resized(interpolation, monkeypatch):
    """Also pictures of every other shape, if only the pixels that are kept are computed: equal to the bit."""
    random = np.random.default_rng(0)
    for waste in (resampling.WASTE, 0):
        monkeypatch.setattr(resampling, "WASTE", waste)
        for i in range(40):
            width, height = (int(n) for n in np.exp(random.uniform(0, 6, 2)))
            if waste:
                width, height = (width % 4 + 1, 900 + height) if i % 2 else (900 + width, height % 4 + 1)
            image_size = tuple(int(n) for n in random.integers(3, 40, 2)) if i % 3 else (24, 24)
            preprocessing = Preprocessing(
                image_size=image_size,
                crop=float(random.uniform(0.3, 1)),
                crop_mode=CROP_MODES[i % 2],
                interpolation=interpolation,
            )
            shape = (height, width, 3) if i % 4 else (height, width)
            picture = Image.fromarray(random.integers(0, 256, shape).astype("uint8")).convert("RGB")
            np.testing.assert_array_equal(preprocessing.pixels(picture), whole(preprocessing, picture))


@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("size", [(1, 10_000), (2, 20_000), (60_000, 1), (1, 65_000), (1, 1_000_000)], ids=str)
def test_a_thin_picture_costs_megabytes_and_milliseconds(size, mode, tmp_path):
    Image.new("L", size, 77).save(tmp_path / "thin.png")
    preprocessing = Preprocessing(crop_mode=mode)
    preprocessing.pixels(tmp_path / "thin.png")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    pixels = preprocessing.pixels(tmp_path / "thin.png")
    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert pixels.shape == (224, 224, 3) and (pixels == 77).any()


def png(width, height, depth=8, colour=0, chunks=(), rows=b""):
    """A PNG file by hand: what no program would write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = [
        chunk(b"IHDR", header),
        *(chunk(*c) for c in chunks),
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 1), (1, 2_000_000), (20_000, 20_000)], ids=str)
def test_a_picture_of_absurd_size_is_refused_by_name(size, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"bomb\.png is not a readable picture: .*pixels") as error:
        SMALL.pixels(path)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize(
    "image_size",
    [(10**6, 10**6), (1e6, 1e6), (0, 5), (-1, 5), (2.5, 5), "224", (5, 5, 5), (True, 5), (None, 5), 10**400],
)
def test_an_absurd_size_in_a_preprocessing_is_refused(image_size):
    with pytest.raises(ValueError, match="image_size"):
        Preprocessing(image_size=image_size)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(crop="x"),
        dict(crop=float("nan")),
        dict(crop=1e-300),
        dict(mean=(float("nan"),) * 3),
        dict(std=(float("inf"),) * 3),
        dict(std=0.5),
        dict(mean=None),
        dict(mean="abc"),
        dict(mean=()),
        dict(mean=(0.5, 0.5)),
        dict(interpolation=3),
    ],
    ids=str,
)
def test_an_impossible_preprocessing_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))) as error:
        Preprocessing(**wrong)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- what is no file


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def bound(path):
    with socket.socket(socket.AF_UNIX) as s:
        before = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            s.bind(path.name)
        finally:
            os.chdir(before)


def folder(path):
    path.mkdir()


@pytest.mark.parametrize("make", [pipe, device, bound, folder])
def test_a_pipe_a_device_and_a_socket_are_no_pictures(make, tmp_path):
    classes(tmp_path)
    make(tmp_path / "cat" / "odd.png")
    with pytest.raises(ValueError, match=r"odd\.png is not a readable picture"):
        SMALL.pixels(tmp_path / "cat" / "odd.png")
    assert len(pictures.listing(tmp_path).pictures) == 6
    found = data.load(tmp_path, SMALL)
    assert len(found.train) + len(found.validation) == 6
    assert make is folder or "1 pipes, sockets or devices" in found.warning()


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(
    "parts",
    [
        ("train", "val", "test"),
        ("train", "valid"),
        ("Train", "Test", "Validation"),
        ("TRAIN", "VAL"),
        ("training", "validation", "testing"),
        ("train", "dev", "test"),
        ("train", "eval"),
        ("training_set", "validation_set"),
        ("train2017", "val2017"),
        ("seg_train", "seg_val"),
        ("trainImages", "valImages"),
    ],
    ids="+".join,
)
def test_a_split_of_any_usual_spelling_is_taken(parts, tmp_path):
    for i, part in enumerate(parts):
        classes(tmp_path, part, count=3 - i if "est" not in part else 5)
    found = data.load(tmp_path, SMALL)
    held = next(3 - i for i, part in enumerate(parts) if i and "est" not in part)
    assert found.train.class_names == data.class_names(tmp_path) == ("cat", "dog")
    assert (len(found.train), len(found.validation)) == (6, 2 * held)
    assert found.test == (10 if any("est" in part for part in parts) else 0)
    assert ("Kept 10 pictures for a test away" in found.warning()) == bool(found.test)


@pytest.mark.parametrize("parts", [("train", "test"), ("Train", "Test"), ("training", "testing")], ids="+".join)
def test_a_test_folder_is_neither_trained_on_nor_held_out(parts, tmp_path):
    classes(tmp_path, parts[0], count=5)
    for name in ("cat", "dog"):
        save(tmp_path / parts[1] / name / "t.png", 255)
    found = data.load(tmp_path, SMALL)
    assert (len(found.train), len(found.validation), found.test) == (8, 2, 2)
    assert max(found.train.pixels().max(), found.validation.pixels().max()) == 200


def test_a_folder_with_train_alone_is_split(tmp_path):
    classes(tmp_path, "train", count=5)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "all.json").write_text("{}")
    found = data.load(tmp_path, SMALL)
    assert found.train.class_names == ("cat", "dog") and (len(found.train), len(found.validation)) == (8, 2)


def test_a_split_inside_each_class_is_taken(tmp_path):
    for name, value in (("cat", 40), ("dog", 200)):
        for part, count in (("train", 3), ("val", 2), ("test", 1)):
            for i in range(count):
                save(tmp_path / name / part / f"{i}.png", value)
    found = data.load(tmp_path, SMALL)
    assert found.train.class_names == ("cat", "dog")
    assert (len(found.train), len(found.validation), found.test) == (6, 4, 2)


@pytest.mark.parametrize(
    "names",
    [("bus", "car", "train"), ("test_tube", "train_station"), ("invalid", "valid"), ("plane", "train")],
    ids="+".join,
)
def test_classes_whose_names_look_like_a_split_stay_classes(names, tmp_path):
    for name in names:
        for i in range(3):
            save(tmp_path / name / f"{i}.png")
    assert data.load(tmp_path, SMALL).train.class_names == names


def test_folds_that_would_be_taken_for_classes_are_told(tmp_path):
    for fold in ("fold_0", "fold_1"):
        classes(tmp_path / fold)
    found = data.load(tmp_path, SMALL)
    assert found.train.class_names == ("fold_0", "fold_1")
    assert "fold_0, fold_1, which hold the same folders (cat, dog)" in found.warning()
    assert not data.load(tmp_path / "fold_0", SMALL).warning()
    save(tmp_path / "fold_0" / "a.png")  # a class with pictures of its own
    assert not data.load(tmp_path, SMALL).warning()


def detection(root):
    for part in ("train", "val"):
        save(root / "images" / part / "1.png")
        (root / "labels" / part).mkdir(parents=True)
        (root / "labels" / part / "1.txt").write_text("0 0.5 0.5 1 1")


def detection_below(root):
    for part in ("train", "valid"):
        save(root / part / "images" / "1.png")
        (root / part / "labels").mkdir()


def masks(root):
    for name in ("images", "masks"):
        save(root / name / "1.png")


def twice(root):
    classes(root, "train", "val", "validation")


def beside(root):
    classes(root, "train", "val")
    save(root / "extra" / "1.png")


def no_train(root):
    classes(root, "val", "test")


def flat(root):
    for part in ("train", "test"):
        save(root / part / "1.png")


def some_classes(root):
    classes(root)
    classes(root / "bird" / "train")
    save(root / "bird" / "val" / "1.png")
    save(root / "bird" / "train" / "1.png")


def unpacked(root):
    classes(root / "photos")


def classes_and_their_test(root):
    classes(root)
    classes(root, "test")


def one_file_in_both(root):
    classes(root, "train")
    for name in ("cat", "dog"):
        (root / "val" / name).mkdir(parents=True)
        (root / "val" / name / "0.png").symlink_to(root / "train" / name / "0.png")


def one_file_in_two_classes(root):
    classes(root)
    (root / "dog" / "same.png").symlink_to(root / "cat" / "0.png")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (detection, "object detection"),
        (detection_below, "object detection"),
        (masks, "object detection"),
        (twice, "val and validation, which both are the validation pictures"),
        (beside, "beside them extra with images"),
        (no_train, "no folder train"),
        (flat, "no subfolders with images"),
        (some_classes, "put train, val and test above the classes"),
        (unpacked, "give .*photos"),
        (classes_and_their_test, "test has classes of the same names"),
        (one_file_in_both, "are one file"),
        (one_file_in_two_classes, "are one file"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_layout_that_is_not_clear_is_refused(make, words, tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        data.load(tmp_path, SMALL)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- what lies in a folder


def test_hidden_and_checkpoint_folders_are_left_out_and_counted(tmp_path):
    classes(tmp_path)
    save(tmp_path / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png", 255)
    save(tmp_path / "__MACOSX" / "cat" / "0.png", 255)
    save(tmp_path / "dog" / "@eaDir" / "0.png", 255)
    save(tmp_path / ".ipynb_checkpoints" / "x.png", 255)
    (tmp_path / "cat" / "._0.png").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"x")
    found = data.load(tmp_path, SMALL)
    assert found.train.class_names == ("cat", "dog") and len(found.train) + len(found.validation) == 6
    assert found.skipped == () and max(found.train.pixels().max(), found.validation.pixels().max()) == 200
    assert sum(found.ignored.values()) == 6 and "6 hidden" in found.warning()
    assert len(pictures.listing(tmp_path).pictures) == 6


def test_ignored_files_are_counted_by_their_suffix(tmp_path):
    classes(tmp_path)
    for name in ("1.heic", "2.HEIC", "notes.txt", "LICENSE"):
        (tmp_path / "cat" / name).write_text("x")
    (tmp_path / "labels.csv").write_text("x")
    (tmp_path / "dog" / "broken").symlink_to(tmp_path / "nowhere.png")
    said = data.load(tmp_path, SMALL).warning()
    assert "\n" not in said and said.startswith("Ignored 6 files that are no pictures: ")
    for words in (
        "2 .heic (Pillow has no plugin",
        "1 .txt",
        "1 without a suffix",
        "1 beside the classes",
        "1 unreadable",
    ):
        assert words in said


def test_a_picture_without_a_suffix_is_read_by_its_content(tmp_path):
    classes(tmp_path)
    save(tmp_path / "cat" / "IMG_0001", 40, format="PNG")
    save(tmp_path / "cat" / "3.JFIF", 40, format="JPEG")
    found = data.load(tmp_path, SMALL)
    assert len(found.train) + len(found.validation) == 8 and not found.ignored


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    root = classes(tmp_path / "photos", count=2)
    elsewhere = classes(tmp_path / "elsewhere", count=2, first=5)
    (root / "cat" / "more").symlink_to(elsewhere / "cat")
    (root / "dog" / "a_link.png").symlink_to(elsewhere / "dog" / "5.png")
    (root / "cat" / "loop").symlink_to(root / "cat")
    (root / "cat" / "up").symlink_to(root / "cat" / "more")
    (elsewhere / "cat" / "back").symlink_to(root / "cat" / "more")
    (root / "dog" / "again.png").symlink_to(root / "dog" / "0.png")
    found = data.load(root, SMALL)
    assert len(found.train) + len(found.validation) == 4 + 3
    assert found.ignored == {"links to what is there already": 4}
    listed = pictures.listing(root / "cat").pictures
    assert [p.relative_to(root / "cat").as_posix() for p in listed] == ["0.png", "1.png", "more/5.png", "more/6.png"]


def test_a_class_that_is_a_link_is_a_class(tmp_path):
    classes(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "b" / name).symlink_to(tmp_path / "a" / name)
    found = data.load(tmp_path / "b", SMALL)
    assert found.train.class_names == ("cat", "dog") and len(found.train) + len(found.validation) == 6


# ---------------------------------------------------------------- depths


RAMP = np.linspace(0, 1, 64).reshape(8, 8)  # mean 0.5


def rows(values):
    """Rows of 16-bit samples of a PNG."""
    return b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)


def tiff(values, bits, packed=None, **tags):
    """A little-endian grey TIFF of one strip."""
    height, width = values.shape
    body = packed if packed is not None else values.tobytes()
    fields = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 277: 1, 278: height, 279: len(body), 339: 1}
    fields |= {int(tag.removeprefix("t")): value for tag, value in tags.items()}
    fields[273] = 8 + 2 + 12 * (len(fields) + 1) + 4
    entries = b""
    for tag, value in sorted(fields.items()):
        if isinstance(value, float):
            entries += struct.pack("<HHLf", tag, 11, 1, value)
        else:
            entries += struct.pack("<HHLL", tag, 4, 1, value)
    return b"II*\x00" + struct.pack("<LH", 8, len(fields)) + entries + b"\x00" * 4 + body


def twelve(values):
    """12-bit samples, two in three bytes."""
    a, b = values.astype("u4").reshape(-1, 2).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype("u1").tobytes()


def full(top, kind="<u2"):
    return np.rint(RAMP * top).astype(kind)


DEEP = {
    "16-bit.pgm": b"P5 8 8 65535\n" + full(65535, ">u2").tobytes(),
    "12-bit.pgm": b"P5 8 8 4095\n" + full(4095, ">u2").tobytes(),
    "text.pgm": b"P2 8 8 1023\n" + " ".join(map(str, full(1023).ravel())).encode(),
    "16-bit.png": png(8, 8, 16, rows=rows(full(65535))),
    "12 of 16 bits.png": png(8, 8, 16, chunks=[(b"sBIT", b"\x0c")], rows=rows(full(4095))),
    "12 bits scaled to 16.png": png(8, 8, 16, chunks=[(b"sBIT", b"\x0c")], rows=rows(full(4095) * 16)),
    "16-bit.tiff": tiff(full(65535), 16),
    "12 bits of the file.tiff": tiff(full(4095), 12, twelve(full(4095))),
    "largest sample.tiff": tiff(full(4095), 16, t341=4095),
    "largest value.tiff": tiff(full(1023), 16, t281=1023),
    "white is zero.tiff": tiff(65535 - full(65535), 16, t262=0),
    "floats to 1.tiff": tiff(RAMP.astype("<f4"), 32, t339=3),
    "floats to 255.tiff": tiff((RAMP * 255).astype("<f4"), 32, t339=3),
    "floats to 1000.tiff": tiff((RAMP * 1000).astype("<f4"), 32, t339=3, t341=1000.0),
    "floats.pfm": b"Pf\n8 8\n-1.0\n" + RAMP[::-1].astype("<f4").tobytes(),
    "big endian.tiff": None,
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_grey_is_scaled_by_what_the_file_says(name, tmp_path):
    path = tmp_path / name
    if DEEP[name] is None:
        Image.frombytes("I;16B", (8, 8), full(65535, ">u2").tobytes()).save(path)
    else:
        path.write_bytes(DEEP[name])
    pixels = Preprocessing(image_size=(8, 8), crop=1.0).pixels(path)
    np.testing.assert_allclose(pixels[..., 1], RAMP * 255, atol=1.01)
    assert (pixels[0, 0, 0], pixels[-1, -1, 0]) == (0, 255)


UNKNOWN = {
    "12 of 16 bits.png": (png(8, 8, 16, rows=rows(full(4095))), "reach 4095 of 65535"),
    "12 of 16 bits.tiff": (tiff(full(4095), 16), "reach 4095 of 65535"),
    "12 of 16 bits in colour.png": (
        png(8, 8, 16, 2, rows=b"".join(b"\x00" + np.repeat(r, 3).astype(">u2").tobytes() for r in full(4095))),
        "a quarter of their 16 bits",
    ),
    "negative.tiff": (tiff((RAMP - 0.5).astype("<f4"), 32, t339=3), "lie between -0.5 and 0.5"),
    "degrees.tiff": (tiff((RAMP * 400).astype("<f4"), 32, t339=3), "lie between 0 and 400"),
    "nan.tiff": (tiff(np.full((8, 8), np.nan, "<f4"), 32, t339=3), "NaN or infinity"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_deep_grey_about_which_the_file_says_too_little_is_skipped_and_named(name, tmp_path):
    content, words = UNKNOWN[name]
    classes(tmp_path)
    (tmp_path / "cat" / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        SMALL.pixels(tmp_path / "cat" / name)
    assert name in str(error.value) and "\n" not in str(error.value)
    found = data.load(tmp_path, SMALL)
    assert found.skipped == (tmp_path / "cat" / name,) and name in found.warning()


def palette(transparency):
    picture = Image.fromarray((RAMP * 255).astype("uint8")).convert("P")
    picture.info["transparency"] = transparency
    return picture


def animation(path):
    frames = [Image.new("L", (8, 8), value) for value in (60, 250)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_picture_keeps_its_brightness(mode, tmp_path):
    grey = Image.fromarray((RAMP * 255).astype("uint8"))
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        Image.frombytes("I;16", (8, 8), full(65535).tobytes()).save(path)
    else:
        grey.convert(mode).save(path)
    assert abs(Preprocessing(image_size=(8, 8), crop=1.0).pixels(path).mean() - 127.5) < (9 if mode == "1" else 3)


@pytest.mark.parametrize("transparency", [3, bytes(range(256))], ids=["one colour", "every colour"])
def test_a_palette_with_transparency_is_read_without_a_warning(transparency, tmp_path):
    palette(transparency).save(tmp_path / "x.png")
    assert abs(Preprocessing(image_size=(8, 8), crop=1.0).pixels(tmp_path / "x.png").mean() - 127.5) < 3


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    animation(tmp_path / "x.gif")
    assert (SMALL.pixels(tmp_path / "x.gif") == 60).all()


def test_a_file_for_which_pillow_starts_a_program_is_no_picture(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"x\.png is not a readable picture"):
        SMALL.pixels(tmp_path / "x.png")
