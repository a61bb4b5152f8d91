"""How a picture becomes a model's input: resize, crop, mean and standard deviation, colour order."""

import dataclasses
import math
import os

import numpy as np

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a checkpoint expects of its input images, and the function that makes them: `preprocessing(picture)`.

    The numbers are those of timm's evaluation transform. A file that says how the camera was held is turned upright.

    Attributes:
        image_size: (height, width) in pixels after the crop.
        mean: per channel (one for a grey picture, or three), on the 0 to 1 scale, subtracted first.
        std: per channel, on the 0 to 1 scale, divided by afterwards.
        interpolation: `"nearest"`, `"bilinear"`, `"bicubic"` or `"lanczos"`, antialiased as PIL does it.
        crop: fraction of the resized image's side that the centre crop keeps (timm's `crop_pct`).
        channel_order: `"rgb"` or `"bgr"`.
    """

    image_size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop: float = 0.9
    channel_order: str = "rgb"

    def __post_init__(self):
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
        if any(s <= 0 for s in self.std):
            raise ValueError(f"std must be positive; received {self.std!r}.")

    def __call__(self, picture):
        """A picture as the model's input.

        Args:
            picture: path of a file, a PIL image, or uint8 pixels (H,W), (H,W,3) or (H,W,4).

        Returns:
            float32 (height,width,C), resized, cropped and normalised, in the checkpoint's colour order.

        Raises:
            ValueError: an unreadable picture, or a model that takes neither 1 nor 3 channels.
        """
        return self.normalize(self.pixels(picture))

    def pixels(self, picture):
        """A picture resized and cropped, as uint8 (height,width,C), RGB or grey; arguments and errors as above."""
        picture = self._open(picture)
        width, height = self._resized(*picture.size)
        target_height, target_width = self.image_size
        left, top = round((width - target_width) / 2), round((height - target_height) / 2)
        resampling = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}[self.interpolation]  # PIL's numbers
        picture = picture.resize((width, height), resampling).crop(
            (left, top, left + target_width, top + target_height)
        )
        return np.asarray(picture).reshape(target_height, target_width, -1)

    def normalize(self, pixels):
        """RGB pixels (...,C), 0 to 255 -> float32 (...,C): (pixels / 255 - mean) / std, in the checkpoint's order."""
        x = np.asarray(pixels, "float32") / np.float32(255)
        x = x[..., ::-1] if self.channel_order == "bgr" else x
        return (x - np.asarray(self.mean, "float32")) / np.asarray(self.std, "float32")

    def _open(self, picture):
        try:
            from PIL import Image, ImageOps
        except ImportError:
            raise ImportError('Reading pictures needs Pillow: pip install "keras-vits[train]"') from None
        mode = {1: "L", 3: "RGB"}.get(len(self.mean))
        if mode is None:
            raise ValueError(
                f"A picture has 1 or 3 channels and this model takes {len(self.mean)}: pass arrays to the model."
            )
        if isinstance(picture, (str, os.PathLike)):
            try:
                with Image.open(picture) as file:
                    return ImageOps.exif_transpose(file).convert(mode)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
                raise ValueError(f"{picture} is not a readable picture: {e}") from None
        if not isinstance(picture, Image.Image):
            array = np.asarray(picture)
            if array.dtype != np.uint8 or array.ndim not in (2, 3):
                raise ValueError(
                    f"Pixels must be uint8 of shape (H,W) or (H,W,C); received {array.dtype} of shape {array.shape}. "
                    "Arrays that are scaled already go to `normalize` or to the model."
                )
            picture = Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
        return picture.convert(mode)

    def _resized(self, width, height):
        """Size (width, height) before the crop: the picture just covers the crop's size divided by `crop`."""
        target_height, target_width = (math.floor(side / self.crop) for side in self.image_size)
        if target_height == target_width:
            short = min(width, height)
            return int(target_width * width / short), int(target_height * height / short)
        ratio = min(height / target_height, width / target_width)
        return round(width / ratio), round(height / ratio)
