"""A device's self-test: ten pictures, and how far its outputs may be from this machine's."""

import numpy as np

from .targets._protocol import target

PICTURES = 10
# How far a device may be from this machine, as a part of the largest output.
FLOAT32_ERROR = 1e-4  # the same sums in another order; 2e-6 was measured in a browser
FLOAT16_ERROR = 2e-2  # what phones' GPUs and Core ML compute in
INTEGER_ERROR = 1e-1  # what lies between two integers is rounded to the other one elsewhere; 3e-2 was measured


def generated(size):
    """(N,h,w,C) uint8: random colours on a coarse grid, blended into each other, under some noise."""
    height, width, channels = size
    random = np.random.default_rng(0)
    knots = random.uniform(0, 255, (PICTURES, 4, 4, channels))
    blend = lambda n: np.maximum(0, 1 - np.abs(np.linspace(0, 3, n)[:, None] - np.arange(4)))  # (n,4), linear
    smooth = np.einsum("hi,nijc,wj->nhwc", blend(height), knots, blend(width))
    return np.clip(np.round(smooth + random.normal(0, 12, smooth.shape)), 0, 255).astype(np.uint8)


def tolerance(artifact, expected):
    """`"cpu"` and `"gpu"` -> how far a device's outputs may be from these (N,K)."""
    if artifact.recipe not in ("float32", "float16"):
        cpu = gpu = INTEGER_ERROR
    else:
        exact = target(artifact.format).traits.exact_floats
        cpu, gpu = FLOAT32_ERROR if exact else FLOAT16_ERROR, FLOAT16_ERROR
    scale = float(np.abs(expected).max())
    return {"cpu": cpu * scale, "gpu": gpu * scale}
