"""What a model or a file takes and gives."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What the file takes.

    Attributes:
        name: of the input in the file's signature.
        shape: (B,H,W,C), static.
        layout: `"nhwc"`, or `"nchw"` for a file whose images are (B,C,H,W); everything here takes them as (B,H,W,C).
        dtype: `"float32"` (normalised as `preprocessing` says), or `"uint8"` / `"image"` (pixels 0 to 255: the
            normalisation is in the graph, or in the image input of a Core ML model).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "nhwc"

    @property
    def stored_shape(self):
        """The shape that the file has for it."""
        return tuple(self.shape[i] for i in (0, 3, 1, 2)) if self.layout == "nchw" else self.shape

    def as_stored(self, images):
        """Images (B,H,W,C) as the file takes them."""
        return np.ascontiguousarray(np.moveaxis(images, 3, 1)) if self.layout == "nchw" else images
