"""How a picture becomes a model's input: resize, crop, mean and standard deviation, colour order."""

import dataclasses
import math
import os
from typing import Any

import numpy as np

CROP_MODES = ("center", "squash", "border")
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
        for field in ("image_size", "mean", "std"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be one of {', '.join(INTERPOLATIONS)}; received {self.interpolation!r}."
            )
        if self.channel_order not in ("rgb", "bgr"):
            raise ValueError(f"channel_order must be 'rgb' or 'bgr'; received {self.channel_order!r}.")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is a fraction in (0, 1]; received {self.crop!r}.")
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"crop_mode must be one of {', '.join(CROP_MODES)}; received {self.crop_mode!r}.")
        if any(s <= 0 for s in self.std):
            raise ValueError(f"std must be positive; received {self.std!r}.")

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
        resampling = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}[self.interpolation]  # PIL's numbers
        pixels = np.asarray(picture.resize(self._resized(*picture.size), resampling))
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        mean = self.mean[::-1] if self.channel_order == "bgr" else self.mean
        cropped = np.empty((*self.image_size, len(mean)), "uint8")
        cropped[:] = [round(255 * value) for value in mean]  # seen only at a border
        (top, to_top), (left, to_left) = map(_centered, pixels.shape[:2], self.image_size)
        inner = pixels[top : top + self.image_size[0], left : left + self.image_size[1]]
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
            try:
                with Image.open(picture) as file:
                    return _upright(file).convert(mode)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
                raise ValueError(f"{picture} is not a readable picture: {e}") from None
        if isinstance(picture, Image.Image):
            return _upright(picture).convert(mode)
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
            return int(target_width * width / short), int(target_height * height / short)
        choose = min if self.crop_mode == "center" else max
        ratio = choose(height / target_height, width / target_width)
        return round(width / ratio), round(height / ratio)


def _upright(picture: Any) -> Any:
    """A PIL image turned as its EXIF data says; one of 16-bit greys, which PIL would clip to white, has 8 bits."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    return Image.fromarray((np.asarray(picture) >> 8).astype("uint8")) if picture.mode.startswith("I;16") else picture


def _centered(size: int, target: int) -> tuple[int, int]:
    """Where `target` pixels are cut out of `size`, and where these are put: the first index of each."""
    return (round((size - target) / 2), 0) if size > target else (0, (target - size) // 2)
