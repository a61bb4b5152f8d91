"""Whether an accuracy says anything: a share of few images that guessing, or one answer to all, would reach, too."""

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


def without_looking(check: Verification) -> float:
    """The top-1 of the better of two who do not look at the images: one guesses, 1 of K (of a single class 1 of 2), the
    other always gives the class that is most frequent among these labels. 0 where neither is known."""
    return max(_guessed(check), check.majority or 0.0)


def at_chance(check: Verification) -> str:
    """What a file's top-1 is, in words, if it may be reached without looking at the images, and how. "" otherwise, and
    where labels are not known."""
    least = without_looking(check)
    if not least or check.top1 is None:
        return ""
    bound = lower_bound(check.top1, check.images)
    if bound > least:
        return ""
    top1, begins = f"a top-1 of {100 * check.top1:.1f} %", f"the 95 % interval begins at {100 * bound:.1f} %"
    if least > (guessed := _guessed(check)):
        return (
            f"{top1} on {check.images} images, which one answer to all may reach: {100 * least:.1f} % of them are of "
            f"one class, and {begins}"
        )
    return (
        f"{top1} on {check.images} images, which may be chance: of {round(1 / guessed)} classes that is "
        f"{100 * guessed:.1f} %, and {begins}"
    )


def _guessed(check: Verification) -> float:
    """The top-1 of guessing; 0 where the number of classes is not known."""
    told = check.artifact.classification
    return 1 / max(2, told.classes) if told is not None and told.classes else 0.0
