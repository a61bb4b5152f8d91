"""Operations that move, copy, join or take entries."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_vits.graph.ir import Value

from ._tracer import Tracer, UnsupportedError, axes_of, pair, translates


@translates("Reshape")
def reshape(t: Tracer, o: Any, x: Any) -> Value:
    return t.reshape(t.value(x), o.newshape)


@translates("Ravel")
def ravel(t: Tracer, o: Any, x: Any) -> Value:
    return t.reshape(t.value(x), (-1,))


@translates("Transpose")
def transpose(t: Tracer, o: Any, x: Any) -> Value:
    return t.transpose(t.value(x), o.axes or range(len(x.shape))[::-1])


@translates("Tile")
def tile(t: Tracer, o: Any, x: Any) -> Value:
    x, reps = t.value(x), tuple(int(r) for r in o.repeats)
    rank = max(len(x.shape), len(reps))
    x = t.reshape(x, (1,) * (rank - len(x.shape)) + x.shape)
    return t.build("tile", x, reps=(1,) * (rank - len(reps)) + reps)


@translates("Flip")
def flip(t: Tracer, o: Any, x: Any) -> Value:
    return t.build("reverse", t.value(x), axes=axes_of(o.axis, len(x.shape)))


@translates("SpaceToDepth")
def space_to_depth(t: Tracer, o: Any, x: Any) -> Value:
    return t.build("space_to_depth", t.image(o, x), block=int(o.block_size))


@translates("DepthToSpace")
def depth_to_space(t: Tracer, o: Any, x: Any) -> Value:
    return t.build("depth_to_space", t.image(o, x), block=int(o.block_size))


@translates("ExpandDims")
def expand_dims(t: Tracer, o: Any, x: Any) -> Value:
    x = t.value(x)
    axes = axes_of(o.axis, len(x.shape) + (1 if isinstance(o.axis, int) else len(o.axis)))
    rest = iter(x.shape)
    return t.reshape(x, [1 if i in axes else next(rest) for i in range(len(x.shape) + len(axes))])


@translates("Squeeze")
def squeeze(t: Tracer, o: Any, x: Any) -> Value:
    x = t.value(x)
    axes = [i for i, n in enumerate(x.shape) if n == 1] if o.axis is None else axes_of(o.axis, len(x.shape))
    return t.reshape(x, [n for i, n in enumerate(x.shape) if i not in axes])


@translates("Swapaxes")
def swapaxes(t: Tracer, o: Any, x: Any) -> Value:
    perm = list(range(len(x.shape)))
    a, b = o.axis1 % len(perm), o.axis2 % len(perm)
    perm[a], perm[b] = perm[b], perm[a]
    return t.transpose(t.value(x), perm)


@translates("Moveaxis")
def moveaxis(t: Tracer, o: Any, x: Any) -> Value:
    n = len(x.shape)
    source, destination = ([a % n for a in ([v] if isinstance(v, int) else v)] for v in (o.source, o.destination))
    moved = dict(zip(destination, source, strict=True))
    rest = iter(i for i in range(n) if i not in source)
    return t.transpose(t.value(x), [moved[i] if i in moved else next(rest) for i in range(n)])


@translates("BroadcastTo")
def broadcast_to(t: Tracer, o: Any, x: Any) -> Value:
    x, shape = t.value(x), tuple(int(d) for d in o.shape)
    x = t.reshape(x, [1] * (len(shape) - len(x.shape)) + list(x.shape))
    if x.shape == shape:
        return x
    return t.build("tile", x, reps=tuple(d // n for d, n in zip(shape, x.shape, strict=True)))


@translates("Concatenate")
def concatenate(t: Tracer, o: Any, xs: Sequence[Any]) -> Value:
    values = t.operands(*xs)
    return t.build("concat", *values, axis=o.axis % len(values[0].shape))


@translates("Stack")
def stack(t: Tracer, o: Any, xs: Sequence[Any]) -> Value:
    values = t.operands(*xs)
    axis = o.axis % (len(values[0].shape) + 1)
    shape = (*values[0].shape[:axis], 1, *values[0].shape[axis:])
    return t.build("concat", *(t.reshape(x, shape) for x in values), axis=axis)


@translates("Split")
def split(t: Tracer, o: Any, x: Any) -> list[Value]:
    x, axis, parts = t.value(x), o.axis % len(x.shape), o.indices_or_sections
    n = x.shape[axis]
    edges = [n // parts * i for i in range(parts + 1)] if isinstance(parts, int) else [0, *(int(p) for p in parts), n]
    return [t.cut(x, axis, a, b) for a, b in itertools.pairwise(edges)]


@translates("Unstack")
def unstack(t: Tracer, o: Any, x: Any) -> list[Value]:
    x, axis = t.value(x), o.axis % len(x.shape)
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    return [t.reshape(t.cut(x, axis, i, i + 1), shape) for i in range(x.shape[axis])]


def _whole_key(key: Any, rank: int) -> list[Any]:
    """The entries of a key with a slice for each axis that it leaves out."""
    entries = list(key) if isinstance(key, (list, tuple)) else [key]
    plain = lambda k: k is None or k is Ellipsis or (isinstance(k, (int, np.integer, slice)) and type(k) is not bool)
    if not all(map(plain, entries)) or (isinstance(key, list) and all(isinstance(k, int) for k in key)):
        raise UnsupportedError("it indexes with something other than numbers, slices, None and ...")
    used = sum(k is not None and k is not Ellipsis for k in entries)
    if used > rank:
        raise UnsupportedError(f"it indexes {used} axes of {rank}")
    rest = [slice(None)] * (rank - used)
    at = next((i for i, k in enumerate(entries) if k is Ellipsis), None)
    return [*entries, *rest] if at is None else [*entries[:at], *rest, *entries[at + 1 :]]


@translates("GetItem")
def get_item(t: Tracer, o: Any, x: Any, key: Any) -> Value:
    x = t.value(x)
    begin, end, strides, shape, axis = [], [], [], [], 0
    for k in _whole_key(key, len(x.shape)):
        if k is None:
            shape.append(1)
            continue
        n = x.shape[axis]
        if isinstance(k, slice):
            a, b, s = k.indices(n)
            if s < 0:
                raise UnsupportedError("it slices backwards; use keras.ops.flip")
            b = max(a, b)
            shape.append(len(range(a, b, s)))
        else:
            if not -n <= k < n:
                raise UnsupportedError(f"it reads entry {k} of an axis of {n}")
            a, b, s = int(k) % n, int(k) % n + 1, 1
        begin, end, strides = [*begin, a], [*end, b], [*strides, s]
        axis += 1
    if list(zip(begin, end, strides, strict=True)) != [(0, n, 1) for n in x.shape]:
        x = t.build("slice", x, begin=tuple(begin), end=tuple(end), strides=tuple(strides))
    return t.reshape(x, shape)


@translates("Slice")
def slice_of_shape(t: Tracer, o: Any, x: Any, start_indices: Any) -> Value:
    if t.any_traced(start_indices):
        raise UnsupportedError("it begins at a computed place")
    x = t.value(x)
    starts = [int(i) for i in t.array(start_indices).reshape(-1)]
    for axis, (begin, n) in enumerate(zip(starts, o.shape, strict=True)):
        x = t.cut(x, axis, begin, begin + int(n))
    return x


@translates("Take")
def take(t: Tracer, o: Any, x: Any, indices: Any) -> Value:
    x, axis = t.value(x), o.axis
    if axis is None:
        x, axis = t.reshape(x, (-1,)), 0
    axis %= len(x.shape)
    n = x.shape[axis]
    if t.is_traced(indices):
        places = t.value(indices)
        if places.dtype in ("float32", "int32"):  # a negative one counts from the end
            places = t.cast(places, "int32")
            places = t.build("where", t.build("less", places, t.value(0)), t.build("add", places, t.value(n)), places)
        return t.build("gather", x, t.cast(places, "int32"), axis=axis)
    indices = t.array(indices, np.int32)
    if ((indices < -n) | (indices >= n)).any():
        raise UnsupportedError(f"it takes entries {indices.min()} to {indices.max()} of an axis of {n}")
    positive = np.where(indices < 0, indices + n, indices)
    return t.build("gather", x, t.constant(positive, name="indices"), axis=axis)


@translates("Roll")
def roll(t: Tracer, o: Any, x: Any) -> Value:
    x = t.value(x)
    if o.axis is None:
        raise UnsupportedError("it rolls without an axis")
    axes = pair(o.axis, 1)
    for shift, axis in zip(pair(o.shift, len(axes)), axes, strict=True):
        axis, n = axis % len(x.shape), x.shape[axis]
        if shift % n:
            x = t.build("concat", t.cut(x, axis, n - shift % n, n), t.cut(x, axis, 0, n - shift % n), axis=axis)
    return x


@translates("Pad")
def pad(t: Tracer, o: Any, x: Any, constant_values: Any = None) -> Value:
    x = t.value(x)
    pads = o.pad_width if len(o.pad_width) == len(x.shape) else tuple(o.pad_width) * len(x.shape)
    if o.mode not in ("constant", "reflect", "edge"):
        raise UnsupportedError(f"mode {o.mode!r} is not constant, reflect or edge")
    pads = tuple((int(a), int(b)) for a, b in pads)
    if not any(a or b for a, b in pads):
        return x
    return t.build("pad", x, pads=pads, mode=o.mode, value=float(constant_values or 0))
