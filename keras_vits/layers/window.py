"""Feature map to patches of pixels and back, in tensors of at most 4 dimensions."""

from typing import Any

from keras import ops


def unfold(x: Any, patch: int) -> Any:
    """(B,h,w,C) -> (B,P,N,C): P pixels in a patch, N patches. MobileViT (arXiv 2110.02178), section 3.1, "unfold"."""
    height, width, channels = x.shape[1:]
    x = ops.space_to_depth(x, patch)
    x = ops.reshape(x, (-1, height * width // patch**2, patch**2, channels))
    return ops.transpose(x, (0, 2, 1, 3))


def fold(x: Any, height: int, width: int, patch: int) -> Any:
    """(B,P,N,C) -> (B,h,w,C), the inverse of `unfold`. MobileViT (arXiv 2110.02178), section 3.1, "fold"."""
    x = ops.transpose(x, (0, 2, 1, 3))
    x = ops.reshape(x, (-1, height // patch, width // patch, patch**2 * x.shape[-1]))
    return ops.depth_to_space(x, patch)
