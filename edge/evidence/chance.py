"""Whether an accuracy says anything: a share of few images that guessing would reach, too."""

from __future__ import annotations

import math

from ..records import Verification

Z = 1.96  # of a two-sided interval of 95 %


def lower_bound(share: float, count: int) -> float:
    """The lower end of Wilson's 95 % interval of a share that was found in so many images.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927: it holds for few images and
    for shares near 0 and 1, where the normal approximation does not.
    """
    middle = share + Z**2 / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, (middle - half) / (1 + Z**2 / count))


def at_chance(check: Verification) -> str:
    """What a file's top-1 is, in words, if guessing may reach it: 1 of K, or 1 of 2 of a single class. "" otherwise,
    and where labels or classes are not known."""
    told = check.artifact.classification
    if told is None or not told.classes or check.top1 is None:
        return ""
    classes = max(2, told.classes)
    bound = lower_bound(check.top1, check.images)
    if bound > 1 / classes:
        return ""
    return (
        f"a top-1 of {100 * check.top1:.1f} % on {check.images} images, which may be chance: of {classes} classes that "
        f"is {100 / classes:.1f} %, and the 95 % interval begins at {100 * bound:.1f} %"
    )
