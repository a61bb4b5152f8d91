"""Orders of axes: the forms in which a MIL variable may hold a Value of a Graph.

Form `order` of a Value holds the Value's axis order[i] as its axis i.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

Order = tuple[int, ...]
Variable = Any  # of MIL, whose package has no types; or numpy, of a constant

CHANNELS_FIRST: Order = (0, 3, 1, 2)


def identity(rank: int) -> Order:
    """The order of a Graph's own axes."""
    return tuple(range(rank))


def turned(rank: int) -> Order:
    """The order of axes of matrices that are held transposed."""
    *outer, m, n = identity(rank)
    return (*outer, n, m)


def same_memory(a: Order, b: Order, shape: Sequence[int]) -> bool:
    """Whether two orders differ only in where axes of size 1 stand."""
    long = lambda order: [axis for axis in order if shape[axis] != 1]
    return long(a) == long(b)


def regroup(old: Sequence[int], new: Sequence[int], order: Order) -> Order | None:
    """The order of axes that a form of a tensor of shape `old` has once the tensor is reshaped to `new`, or None if it
    cannot be reshaped in that form: axes that merge or split must be neighbours in it."""
    groups: list[tuple[range, range]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        a, b = i + 1, j + 1
        while math.prod(old[i:a]) != math.prod(new[j:b]):
            if math.prod(old[i:a]) < math.prod(new[j:b]):
                a += 1
            else:
                b += 1
        groups.append((range(i, a), range(j, b)))
        i, j = a, b
    if not groups:
        return None
    merged, made = groups[-1]  # with the axes of size 1 that are left over
    groups[-1] = (range(merged.start, len(old)), range(made.start, len(new)))
    sequence = [axis for axis in order if old[axis] != 1]
    placed = []
    for merged, made in groups:
        long = [axis for axis in merged if old[axis] != 1]
        at = [sequence.index(axis) for axis in long]
        if at != list(range(at[0], at[0] + len(at)) if at else []):
            return None
        placed.append((order.index(long[0] if long else merged[0]), made))
    return tuple(itertools.chain.from_iterable(made for _, made in sorted(placed, key=lambda p: p[0])))
