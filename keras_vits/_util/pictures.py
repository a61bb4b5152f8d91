"""Pictures on the disk: which files of a folder are some, opened safely, upright and with 8 bits for each sample."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import pathlib
import stat
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

MAX_PIXELS = 178_956_970  # of a picture: where Pillow's own default limit is, 0.7 GB in its memory
MAX_SIDE = 1_000_000  # pixels
# Formats for which Pillow starts a program (Ghostscript), asks Windows, or has a name and no decoder.
UNREAD = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"})
# What cameras and programs write that Pillow reads with a plugin at most.
FOREIGN = frozenset(
    ".heic .heif .hif .jxl .avif .svg .eps .pdf .psb .xcf .raw .dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .rw2 "
    ".raf .pef .srw .x3f .dcm .exr .hdr .jxr .wdp .mp4 .mov .avi .mkv .webm".split()
)
LITTER = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "__pycache__", "thumbs.db",
                    "ehthumbs.db", "desktop.ini", "system volume information"})  # fmt: skip
DEEP = 1 << 14  # of 16 bits: a picture that stays below uses fewer bits than it has, or is black


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """What a folder holds.

    Attributes:
        pictures: paths of the files that are pictures by their suffix, or by their content if they have none, sorted.
        ignored: kind of file -> how many of it were left out.
    """

    pictures: tuple[pathlib.Path, ...]
    ignored: Mapping[str, int]


@functools.cache
def _formats() -> tuple[tuple[str, ...], frozenset[str]]:
    """Pillow's names of the formats that are read, and their suffixes; with those of plugins that were registered."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError('Reading pictures needs Pillow. From a checkout: pip install -e ".[train]"') from None
    suffixes = Image.registered_extensions()  # imports all of Pillow's own plugins
    formats = tuple(name for name in Image.ID if name in Image.OPEN and name not in UNREAD)
    return formats, frozenset(suffix for suffix, name in suffixes.items() if name in formats)


def suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the files that are taken for pictures."""
    return _formats()[1]


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is a system's or a program's own, such as `.ipynb_checkpoints`."""
    return name.startswith(".") or name.lower() in LITTER


def listing(folder: str | os.PathLike[str]) -> Listing:
    """The pictures in a folder and the folders in it, at any depth.

    Hidden files and folders are left out. Symbolic links are followed, after all that lies in the folder itself: a file
    or folder that is reached a second time is not read again. Pipes, sockets and devices are no pictures.

    Args:
        folder: the folder; one that does not exist holds nothing.
    """
    known, found = suffixes(), []
    ignored: collections.Counter[str] = collections.Counter()
    seen: set[tuple[int, int]] = set()
    waiting = collections.deque([pathlib.Path(folder)])  # links stand behind everything that is no link
    while waiting:
        path = waiting.popleft()
        try:
            status = os.stat(path)
            is_folder = stat.S_ISDIR(status.st_mode)
            entries = sorted(path.iterdir()) if is_folder else []
        except OSError:
            ignored["unreadable"] += path != pathlib.Path(folder)
            continue
        if status.st_ino:
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                ignored["links to what is there already"] += 1
                continue
            seen.add(identity)
        if is_folder:
            hidden = [entry for entry in entries if is_hidden(entry.name)]
            ignored["hidden"] += len(hidden)
            visible = [entry for entry in entries if not is_hidden(entry.name)]
            waiting.extendleft(entry for entry in reversed(visible) if not entry.is_symlink())
            waiting.extend(entry for entry in visible if entry.is_symlink())
        elif not stat.S_ISREG(status.st_mode):
            ignored["pipes, sockets or devices"] += 1
        elif path.suffix.lower() in known or (not path.suffix and _is_picture(path)):
            found.append(path)
        else:
            ignored[_kind(path)] += 1
    return Listing(pictures=tuple(sorted(found)), ignored={kind: n for kind, n in sorted(ignored.items()) if n})


def _kind(path: pathlib.Path) -> str:
    suffix = path.suffix.lower()
    return f"{suffix} (Pillow has no plugin that reads it)" if suffix in FOREIGN else suffix or "without a suffix"


def _is_picture(path: pathlib.Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path, formats=_formats()[0]):
            return True
    except Exception:  # whatever Pillow's plugins raise on what is none
        return False


def read(path: str | os.PathLike[str], mode: str) -> Any:
    """A file as a PIL image of `mode`, see `converted`.

    Raises:
        ValueError: the file is not there, is no regular file, or cannot be read. It is named.
    """
    formats = _formats()[0]
    from PIL import Image

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is a folder, a pipe or a device")
        with Image.open(path, formats=formats) as file:
            return _converted(file, mode)
    except Exception as e:  # whatever Pillow's plugins raise on a damaged file
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ValueError(f"{path} is not a readable picture: {reason}") from None


def converted(picture: Any, mode: str) -> Any:
    """A PIL image turned as its EXIF data says, in the mode `"RGB"` or `"L"`; transparency is ignored.

    Deep greys are scaled to 8 bits by what the file says: the largest value of a PGM, the bits of a PNG or TIFF, the
    largest sample of a TIFF. Of 16 bits about which nothing is said the upper 8 are taken. Floats reach from 0 to 1, or
    to 255 if one is above 1.

    Raises:
        ValueError: too many pixels, or deep values about which the file does not say enough.
    """
    try:
        return _converted(picture, mode)
    except ValueError as e:
        name = getattr(picture, "filename", "") or "The image"
        raise ValueError(f"{name} is not a readable picture: {e}") from None


def _converted(picture: Any, mode: str) -> Any:
    from PIL import Image, ImageOps

    width, height = picture.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(
            f"it has {width:,} x {height:,} pixels, and the limit is {MAX_PIXELS:,}, {MAX_SIDE:,} along a side"
        )
    white, inverted = _white(picture)
    deep_colour = ";16" in str(getattr(picture, "tile", "")) and picture.mode in ("RGB", "RGBA", "LA")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = Image.fromarray(_eight_bits(np.asarray(picture), white, inverted))
    elif deep_colour and 0 < max(high for _, high in _extrema(picture)) < DEEP >> 8:
        raise ValueError(_doubt("its colours stay below a quarter of their 16 bits"))
    if (picture.mode == "P" and "transparency" in picture.info) or picture.mode in ("RGBa", "La"):
        picture = picture.convert("RGBA" if picture.mode != "La" else "LA")
    return picture.convert(mode)


def _extrema(picture: Any) -> list[Any]:
    """(lowest, highest) of each channel but the transparency."""
    return list(picture.getextrema())[: len(picture.mode.removesuffix("A"))]


def _doubt(what: str) -> str:
    return f"{what}, and nothing in it says which value is white: convert it to 8 bits"


def _white(picture: Any) -> tuple[float | None, bool]:
    """The value that a deep grey picture's file says is white, or `None`, and whether 0 is white instead of black."""
    if picture.format == "PPM" and picture.mode.startswith("I"):
        return 65535.0, False  # Pillow has scaled it by the file's largest value
    if picture.format == "PNG" and picture.mode.startswith("I"):
        bits = _significant_bits(picture.filename)
        return (2.0**bits - 1 if bits else None), False
    tags = getattr(picture, "tag_v2", None)
    if picture.format != "TIFF" or tags is None:
        return None, False
    inverted = tags.get(262) == 0 and picture.mode != "L"  # PhotometricInterpretation: WhiteIsZero
    for tag in (341, 281):  # SMaxSampleValue, MaxSampleValue
        value = tags.get(tag)
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, (int, float)) and np.isfinite(value) and value > 0:
            return float(value), inverted
    bits = tags.get(258, (16,))[0]  # BitsPerSample
    return (2.0**bits - 1 if picture.mode.startswith("I") and bits < 16 else None), inverted


def _significant_bits(path: Any) -> int | None:
    """Bits of a PNG file's samples, by its chunk `sBIT`; `None` without one."""
    if not path or not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"sBIT" and length:
                return file.read(1)[0] or None
            if kind in (b"IDAT", b"IEND"):
                return None
            file.seek(length + 4, os.SEEK_CUR)
    return None


def _eight_bits(values: np.ndarray, white: float | None, inverted: bool) -> np.ndarray:
    """Deep greys (H,W) as uint8."""
    low, high = float(values.min()), float(values.max())  # of NaN they are NaN
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError("it holds NaN or infinity")
    floats = values.dtype.kind == "f"
    if white is not None and not floats and high > white:
        white = 65535.0  # as PNG's specification has it: the bits are the upper ones of 16
    elif white is None and floats:
        white = 1.0 if high <= 1 else 255.0
    elif white is None:
        of_32_bits = values.dtype.itemsize > 2
        white = 255.0 if of_32_bits and high <= 255 else 65535.0
        if white == 65535 and 0 < high < DEEP:
            raise ValueError(_doubt(f"its values reach {high:.0f} of 65535"))
    if low < 0 or high > white:
        raise ValueError(_doubt(f"its values lie between {low:.6g} and {high:.6g}"))
    if floats:
        scaled = np.rint(np.asarray(values, "float64") * (255 / white))
    else:
        whole = np.asarray(values, "int64")  # the upper 8 bits, where white has at least as many
        scaled = whole * 256 // (int(white) + 1) if white >= 255 else whole * 255 // int(white)
    return (255 - scaled if inverted else scaled).astype("uint8")
