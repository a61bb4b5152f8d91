"""Operations that give tensors of one number, in the shape of another."""

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_vits.graph.ir import Value

from ._tracer import Tracer, UnsupportedError, graph_dtype, translates


def _filled(t: Tracer, o: Any, x: Any, number: float) -> Value:
    dtype = graph_dtype(x.dtype if o.dtype is None else o.dtype)
    return t.constant(np.full(x.shape, number, dtype))


def _like(number: float) -> Callable[..., Value]:
    def like(t: Tracer, o: Any, x: Any) -> Value:
        return _filled(t, o, x, number)

    return like


translates("OnesLike")(_like(1))
translates("ZerosLike")(_like(0))


@translates("FullLike")
def full_like(t: Tracer, o: Any, x: Any, fill_value: Any) -> Value:
    if t.is_traced(fill_value) or np.ndim(t.array(fill_value)):
        raise UnsupportedError("it fills with more than one known number")
    return _filled(t, o, x, t.array(fill_value).item())
