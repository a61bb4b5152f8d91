"""Products of matrices: matmul, einsum, attention."""

import math
import string
from collections.abc import Sequence
from typing import Any

from keras_vits.graph.ir import Value
from keras_vits.graph.ops import promote

from ._tracer import Tracer, UnsupportedError, graph_dtype, translates


@translates("Matmul")
def matmul(t: Tracer, o: Any, a: Any, b: Any) -> Value:
    if t.is_traced(a) and not t.is_traced(b) and len(b.shape) == 2:
        x, kernel = t.value(a), t.array(b)
        if promote(x.dtype, kernel.dtype.name) == "float32":  # x (...,I) times a constant kernel (I,O)
            weight = t.constant(kernel.T.astype("float32", copy=False), b, "kernel", "transposed")
            return t.build("dense", t.cast(x, "float32"), weight, None)
    return t.build("matmul", *t.operands(a, b, least="int32"))


@translates("Dot")
def dot(t: Tracer, o: Any, a: Any, b: Any) -> Value:
    if len(b.shape) != 2:
        raise UnsupportedError("only a dot product with a matrix is")
    return matmul(t, o, a, b)


def _terms(subscripts: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The two operands' indices and the result's, with letters in place of dots."""
    subscripts = subscripts.replace(" ", "")
    if len(ranks) != 2 or "->" not in subscripts:
        raise UnsupportedError(f"{subscripts!r} is not of the form 'a,b->c'")
    inputs, out = subscripts.split("->")
    terms = inputs.split(",")
    if "..." in subscripts:
        free = [c for c in string.ascii_letters if c not in subscripts]
        extra = [
            rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)
        ]
        letters = "".join(free[: max(extra)])
        terms = [term.replace("...", letters[len(letters) - n :]) for term, n in zip(terms, extra, strict=True)]
        out = out.replace("...", letters)
    if any(term.count(c) > 1 for term in terms for c in term):
        raise UnsupportedError(f"{subscripts!r} repeats an index within an operand")
    return terms, out


def _sizes(subscripts: str, terms: Sequence[str], shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    size: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for c, n in zip(term, shape, strict=True):
            if size.setdefault(c, n) != n:
                raise UnsupportedError(f"{subscripts!r} broadcasts an axis of {min(n, size[c])} to {max(n, size[c])}")
    return size


def _summed(t: Tracer, x: Any, term: str, kept: str) -> tuple[Any, str]:
    """The operand without the indices that stand in neither the other operand nor the result, which are summed."""
    alone = tuple(i for i, c in enumerate(term) if c not in kept)
    if not alone:
        return x, term
    total = t.build("sum", t.operands(x, least="int32")[0], axes=alone, keepdims=False)
    return t.wrap(total), "".join(c for c in term if c in kept)


@translates("Einsum")
def einsum(t: Tracer, o: Any, *operands: Any, **_: Any) -> Value:
    terms, out = _terms(o.subscripts, [len(x.shape) for x in operands])
    size = _sizes(o.subscripts, terms, [x.shape for x in operands])
    (a, ta), (b, tb) = (
        _summed(t, x, term, out + other) for x, term, other in zip(operands, terms, terms[::-1], strict=True)
    )
    batch = [c for c in ta if c in tb and c in out]
    inner = [c for c in ta if c in tb and c not in out]
    rows, columns = [c for c in ta if c not in tb], [c for c in tb if c not in ta]
    total = lambda cs: math.prod(size[c] for c in cs)
    ordered = batch + rows + columns
    if not t.is_traced(b) and not batch and promote(graph_dtype(a.dtype), graph_dtype(b.dtype)) == "float32":
        weight = t.array(b, "float32").transpose([tb.index(c) for c in columns + inner])
        weight = weight.reshape(total(columns), total(inner))
        x = t.transpose(t.floats(a), [ta.index(c) for c in rows + inner])
        x = t.reshape(x, [*(size[c] for c in rows), total(inner)])
        y = t.build("dense", x, t.constant(weight, b, "kernel", o.subscripts.replace(" ", "")), None)
    else:
        a, b = t.operands(a, b, least="int32")
        x = t.transpose(a, [ta.index(c) for c in batch + rows + inner])
        y = t.transpose(b, [tb.index(c) for c in batch + inner + columns])
        lead = [size[c] for c in batch]
        y = t.build(
            "matmul",
            t.reshape(x, [*lead, total(rows), total(inner)]),
            t.reshape(y, [*lead, total(inner), total(columns)]),
        )
    y = t.reshape(y, [size[c] for c in ordered])
    return t.transpose(y, [ordered.index(c) for c in out])


@translates("DotProductAttention")
def dot_product_attention(
    t: Tracer, o: Any, query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None, scale: Any = None
) -> Value:
    """(B,N,heads,d) of queries, (B,M,heads,d) of keys and values -> (B,N,heads,d)."""
    if o.is_causal or o.attn_logits_soft_cap is not None:
        raise UnsupportedError("causal and soft-capped attention are not available")
    q, k, v = (t.transpose(t.floats(x), (0, 2, 1, 3)) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    scores = t.build("matmul", t.build("mul", q, t.value(float(scale))), k, transpose_b=True)
    if bias is not None:
        scores = t.build("add", scores, t.floats(bias))
    if mask is not None:
        scores = t.build("where", t.cast(t.value(mask), "bool"), scores, t.value(-1e9))
    return t.transpose(t.build("matmul", t.build("softmax", scores, axis=3), v), (0, 2, 1, 3))
