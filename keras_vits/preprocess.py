"""How a picture becomes a model's input: resize, crop, mean and standard deviation, colour order."""

import dataclasses
import math
import os
from typing import Any

import numpy as np

from keras_vits._util import pictures
from keras_vits._util.limits import MAX_INPUT_PIXELS, number, whole
from keras_vits._util.resampling import resized_part

CROP_MODES = ("center", "squash", "border")
MAX = 1e6  # of a mean or a standard deviation, on the 0 to 1 scale
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a checkpoint expects of its input images, and the function that makes them: `preprocessing(picture)`.

    The numbers are those of timm's evaluation transform. A picture that says how the camera was held is turned upright;
    transparency is ignored.

    Attributes:
        image_size: (height, width) in pixels after the crop.
        mean: per channel (one for a grey picture, or three), on the 0 to 1 scale, subtracted first.
        std: per channel, on the 0 to 1 scale, divided by afterwards.
        interpolation: `"nearest"`, `"bilinear"`, `"bicubic"` or `"lanczos"`, antialiased as PIL does it.
        crop: fraction of the resized image's side that the centre crop keeps (timm's `crop_pct`).
        crop_mode: how a picture of another shape is resized to the side before the crop. `"center"` covers it, and what
            sticks out is lost; `"squash"` stretches the picture; `"border"` fits it in, and fills up with the mean.
        channel_order: `"rgb"` or `"bgr"`.
    """

    image_size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop: float = 0.9
    crop_mode: str = "center"
    channel_order: str = "rgb"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", checked_size(self.image_size))
        for field in ("mean", "std"):
            given = getattr(self, field)
            if isinstance(given, str) or not hasattr(given, "__len__") or not len(given):
                raise ValueError(f"{field} is a number for each channel; received {given!r}.")
            low, rule = (
                (0, "a positive number for each channel") if field == "std" else (-MAX, "a number for each channel")
            )
            values = tuple(number(field, value, low, MAX, rule, open_low=True) for value in given)
            object.__setattr__(self, field, values)
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean and std have a number for each channel; received {self.mean!r} and {self.std!r}.")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be one of {', '.join(INTERPOLATIONS)}; received {self.interpolation!r}."
            )
        if self.channel_order not in ("rgb", "bgr"):
            raise ValueError(f"channel_order must be 'rgb' or 'bgr'; received {self.channel_order!r}.")
        rule = "a fraction from 0.01 to 1"
        object.__setattr__(self, "crop", number("crop", self.crop, 0.01, math.nextafter(1, 2), rule))
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"crop_mode must be one of {', '.join(CROP_MODES)}; received {self.crop_mode!r}.")

    def __call__(self, picture: Any) -> np.ndarray:
        """A picture as the model's input.

        Args:
            picture: path of a file, a PIL image, or uint8 pixels (H,W), (H,W,3) or (H,W,4).

        Returns:
            float32 (height,width,C), resized, cropped and normalised, in the checkpoint's colour order.

        Raises:
            ValueError: an unreadable picture, or a model that takes neither 1 nor 3 channels.
        """
        return self.normalize(self.pixels(picture))

    def pixels(self, picture: Any) -> np.ndarray:
        """A picture resized and cropped, as uint8 (height,width,C), RGB or grey; arguments and errors as above."""
        picture = self._open(picture)
        width, height = self._resized(*picture.size)
        (top, to_top), (left, to_left) = map(_centered, (height, width), self.image_size)
        kept = min(width, self.image_size[1]), min(height, self.image_size[0])
        inner = resized_part(picture, (width, height), (left, top), kept, self.interpolation)
        mean = self.mean[::-1] if self.channel_order == "bgr" else self.mean
        cropped = np.empty((*self.image_size, len(mean)), "uint8")
        cropped[:] = [min(max(round(255 * value), 0), 255) for value in mean]  # seen only at a border
        cropped[to_top : to_top + inner.shape[0], to_left : to_left + inner.shape[1]] = inner
        return cropped

    def normalize(self, pixels: Any) -> np.ndarray:
        """RGB pixels (...,C), 0 to 255 -> float32 (...,C): (pixels / 255 - mean) / std, in the checkpoint's order."""
        x = np.asarray(pixels, "float32") / np.float32(255)
        x = x[..., ::-1] if self.channel_order == "bgr" else x
        return (x - np.asarray(self.mean, "float32")) / np.asarray(self.std, "float32")

    def _open(self, picture: Any) -> Any:
        try:
            from PIL import Image
        except ImportError:
            raise ImportError('Reading pictures needs Pillow. From a checkout: pip install -e ".[train]"') from None
        mode = {1: "L", 3: "RGB"}.get(len(self.mean))
        if mode is None:
            raise ValueError(
                f"A picture has 1 or 3 channels and this model takes {len(self.mean)}: pass arrays to the model."
            )
        if isinstance(picture, (str, os.PathLike)):
            return pictures.read(picture, mode)
        if isinstance(picture, Image.Image):
            return pictures.converted(picture, mode)
        array = np.asarray(picture)
        channels = array.shape[2:] if array.ndim > 2 else (1,)
        if array.dtype != np.uint8 or array.ndim < 2 or not array.size or channels not in ((1,), (3,), (4,)):
            raise ValueError(
                f"Pixels must be uint8 of shape (H,W) or (H,W,C), C of 1, 3 or 4; received {array.dtype} of shape "
                f"{array.shape}. Arrays that are scaled already go to `normalize` or to the model."
            )
        return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array).convert(mode)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Size (width, height) before the crop, which takes `crop` of it."""
        target_height, target_width = (math.floor(side / self.crop) for side in self.image_size)
        if self.crop_mode == "squash":
            return target_width, target_height
        if self.crop_mode == "center" and target_height == target_width:
            short = min(width, height)
            return int(target_width * width / short), int(target_height * height / short)  # the shorter is the target
        choose = min if self.crop_mode == "center" else max
        ratio = choose(height / target_height, width / target_width)
        return max(1, round(width / ratio)), max(1, round(height / ratio))


def checked_size(given: Any) -> tuple[int, int]:
    """An image size as (height, width).

    Args:
        given: pixels of a square, or (height, width).

    Raises:
        ValueError: it is neither, or has more than MAX_INPUT_PIXELS pixels.
    """
    try:
        pair = tuple(given) if hasattr(given, "__len__") and not isinstance(given, str) else (given, given)
        height, width = (whole("image_size", side, most=MAX_INPUT_PIXELS) for side in pair)
    except ValueError:
        raise ValueError(
            f"image_size must be pixels or (height, width), both positive and at most {MAX_INPUT_PIXELS:,}; received "
            f"{given!r}."
        ) from None
    if height * width > MAX_INPUT_PIXELS:
        raise ValueError(
            f"image_size {height:,} x {width:,} has more than the {MAX_INPUT_PIXELS:,} pixels that a model may take."
        )
    return height, width


def _centered(size: int, target: int) -> tuple[int, int]:
    """Where `target` pixels are cut out of `size`, and where these are put: the first index of each."""
    return (round((size - target) / 2), 0) if size > target else (0, (target - size) // 2)
