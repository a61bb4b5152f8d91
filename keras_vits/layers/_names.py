"""Names of layers that are a protocol: weight tables, parameter groups, features and exported files rely on them."""

import re

IMAGE = "image"  # the input
STEM = "stem"  # what reads the image
TOKENS = "tokens"  # where a feature map becomes tokens (B,N,D)
NORM = "norm"  # the last normalisation before the pooling
POOL = "pool"  # one vector of features for an image
HEAD = "head"  # what makes the task's output of the features
POSITION_TABLE = "position/table"  # path of the learned position embedding (1,N,D)
BLOCK = re.compile(r"(stage_\d+_)?block_\d+")  # the layers that `VisionModel.features` numbers


def block(i: int) -> str:
    """Name of block i of a model whose blocks all have one size."""
    return f"block_{i}"


def stage_block(s: int, i: int) -> str:
    """Name of block i of stage s."""
    return f"stage_{s}_block_{i}"


def in_head(path: str) -> bool:
    """Whether a layer's name or a weight's path is of the head: `"head"` or what lies in it."""
    return path == HEAD or path.startswith(f"{HEAD}/")
