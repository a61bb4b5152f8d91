"""The ONE table of primitive operations: types and shapes of what each gives, its meaning in numpy, and its traits.

Images and feature maps are channels last throughout. The tracer makes nodes of these operations only; `rewrite`, the
layouts and writers of the targets, the count of multiply-adds and the rules of phone GPUs ask the traits. What one
format alone needs, such as the operations that only ONNX computes in float32, is listed there. A new operation is an
entry here, one in each target's writers, and a case in the tests. It is one file, however long, so that all there is to
know of an operation stands in one place.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

DTYPES = {"float32": np.float32, "int32": np.int32, "uint8": np.uint8, "bool": np.bool_}
LATTICE = ("bool", "uint8", "int32", "float32")  # Keras' promotion among them: the later of two types wins

Shape = tuple[int, ...]
Pair = Sequence[int]  # (height, width)
Pads = Sequence[Sequence[int]]  # ((top, bottom), (left, right))


@dataclasses.dataclass(frozen=True)
class Op:
    """One primitive operation.

    Args:
        infer: (shape or None, ..., **attrs) -> the output's shape, or a list of shapes. ValueError: it does not fit.
        evaluate: (array or None, ..., **attrs) -> the output, or a list of them. None: a target's own fused operation,
            whose meaning stands in that target.
        types: (dtypes of the inputs, None where one is absent; attrs) -> the outputs' dtypes. ValueError: they do not
            fit. Nothing is promoted here: the tracer casts operands, by `promote`, to what an operation takes.
        elementwise: an entry of the output depends on the entries at its place, with numpy's broadcasting.
        commutative: its two operands can change places.
        arrangement: it moves or copies entries of its inputs and computes nothing.
        chooses: its results are entries of its inputs, given numbers or places (of floats, numbers between them, too):
            whole numbers give the same in every type that holds them.
        takes_axes: its attributes speak of each axis, so that it means the same among more axes.
        reduces: it makes one entry of all those along its `axes`.
        on_maps: its input is a feature map (B,H,W,C).
        is_linear: inputs (x, weight, bias or None), output channels last: scales and offsets of them fold in.
        keeps_same: an output of the first input's shape and type equals that input.
        macs: (shapes of the inputs, shape of the output, attrs) -> multiply-adds; None: not counted, as in fvcore.
        half_risk: how values leave the range of half precision, 6e-8 to 65504, which a file of half precision then
            computes in float32; "": they do not, or runtimes see to it, as they add products in float32.
        gpu_unfriendly: what a phone's GPU delegate cannot do about it, or what does the same; "": it can.
    """

    infer: Callable[..., Any]
    evaluate: Callable[..., Any] | None
    types: Callable[[Sequence[str | None], dict[str, Any]], tuple[str, ...]]
    elementwise: bool = False
    commutative: bool = False
    arrangement: bool = False
    chooses: bool = False
    takes_axes: bool = False
    reduces: bool = False
    on_maps: bool = False
    is_linear: bool = False
    keeps_same: bool = False
    macs: Callable[[Sequence[Shape | None], Shape, dict[str, Any]], int] | None = None
    half_risk: str = ""
    gpu_unfriendly: str = ""

    def __call__(self, *arrays: np.ndarray | None, **attrs: Any) -> Any:
        """What the operation gives for these arrays; infinities and NaN are results, as in every runtime."""
        assert self.evaluate is not None
        with np.errstate(all="ignore"):
            return self.evaluate(*arrays, **attrs)


# ---------------------------------------------------------------- types: (of the inputs, attrs) -> of the outputs


def promote(*dtypes: str) -> str:
    """The type that operands of these types are cast to, by Keras' rules, among the types that a graph has."""
    return max(dtypes, key=LATTICE.index)


def _same(given: Sequence[str | None]) -> str:
    """The one type that all inputs have."""
    found = sorted({dtype for dtype in given if dtype is not None})
    if len(found) != 1:
        raise ValueError(f"its inputs must have one type; they have {', '.join(found) or 'none'}")
    return found[0]


def _takes(
    *allowed: str, gives: str | None = None
) -> Callable[[Sequence[str | None], dict[str, Any]], tuple[str, ...]]:
    """Inputs of one type, of those allowed (none: of any); the output has it, too, or the type `gives`."""

    def types(given: Sequence[str | None], attrs: dict[str, Any]) -> tuple[str, ...]:
        dtype = _same(given)
        if allowed and dtype not in allowed:
            raise ValueError(f"it takes {' or '.join(allowed)}; its input is {dtype}")
        return (gives or dtype,)

    return types


ANY = _takes()
NUMBERS = _takes("float32", "int32", "uint8")
WIDE = _takes("float32", "int32")  # sums of uint8 or bool would not fit their type
FLOATS = _takes("float32")
BOOLS = _takes("bool")
COMPARED = _takes(gives="bool")


def _where_types(given: Sequence[str | None], attrs: dict[str, Any]) -> tuple[str, ...]:
    if given[0] != "bool":
        raise ValueError(f"its condition must be bool; it is {given[0]}")
    return (_same(given[1:]),)


def _cast_types(given: Sequence[str | None], attrs: dict[str, Any]) -> tuple[str, ...]:
    if attrs["dtype"] not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; received {attrs['dtype']!r}")
    return (attrs["dtype"],)


def _gather_types(given: Sequence[str | None], attrs: dict[str, Any]) -> tuple[str, ...]:
    if given[1] != "int32":
        raise ValueError(f"its indices must be int32; they are {given[1]}")
    return (given[0] or "float32",)


def _resize_types(given: Sequence[str | None], attrs: dict[str, Any]) -> tuple[str, ...]:
    return ANY(given, attrs) if attrs["mode"] == "nearest" else FLOATS(given, attrs)


def _clip_types(given: Sequence[str | None], attrs: dict[str, Any]) -> tuple[str, ...]:
    """Whole numbers stay what they are between bounds that their type has; all others are floats by then."""
    (dtype,) = NUMBERS(given, attrs)
    if dtype != "float32":
        held = np.iinfo(DTYPES[dtype])
        if not all(held.min <= attrs[k] <= held.max and attrs[k] == int(attrs[k]) for k in ("low", "high")):
            raise ValueError(
                f"its bounds must be numbers that {dtype} has; they are {attrs['low']} and {attrs['high']}"
            )
    return (dtype,)


def _top_k_types(given: Sequence[str | None], attrs: dict[str, Any]) -> tuple[str, ...]:
    return (*NUMBERS(given, attrs), "int32")


# ---------------------------------------------------------------- shapes and meaning


def _broadcast(*shapes: Shape | None) -> Shape:
    given = {s for s in shapes if s is not None}
    return given.pop() if len(given) == 1 else np.broadcast_shapes(*given)


def same_padding(image: Sequence[int], size: Pair, strides: Pair, dilation: Pair) -> Pads:
    """((top, bottom), (left, right)) of TensorFlow's "same" rule for an image (height, width)."""
    pads = []
    for n, k, s, d in zip(image, size, strides, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pads.append((total // 2, total - total // 2))
    return tuple(pads)


def _unary(f: Callable[..., Any], types: Any = FLOATS, **traits: Any) -> Op:
    return Op(lambda s, **_: s, f, types, elementwise=True, **traits)


def _binary(f: Callable[..., Any], types: Any = NUMBERS, **traits: Any) -> Op:
    return Op(lambda a, b: _broadcast(a, b), f, types, elementwise=True, **traits)


def _reduce(f: Callable[..., Any], types: Any, **traits: Any) -> Op:
    def infer(s: Shape, axes: Sequence[int], keepdims: bool) -> Shape:
        if not all(0 <= a < len(s) for a in axes):
            raise ValueError(f"it has no axes {tuple(axes)}")
        return tuple(1 if i in axes else n for i, n in enumerate(s) if keepdims or i not in axes)

    evaluate = lambda x, axes, keepdims: f(x, axis=tuple(axes), keepdims=keepdims)
    return Op(infer, evaluate, types, takes_axes=True, reduces=True, **traits)


def sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(x.dtype)


def erf(x: np.ndarray) -> np.ndarray:
    """Error function in double precision by Python's own, or by scipy when it is there (much faster)."""
    try:
        from scipy.special import erf as fast
    except ImportError:
        fast = np.vectorize(math.erf, otypes=[np.float64])
    return fast(x).astype(x.dtype)


def gelu(x: np.ndarray, approximate: bool = False) -> np.ndarray:
    if approximate:
        return (0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))).astype(
            x.dtype
        )
    return (0.5 * x * (1 + erf(x * np.float32(math.sqrt(0.5))))).astype(x.dtype)


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def layer_norm(
    x: np.ndarray, gamma: np.ndarray | None, beta: np.ndarray | None, axes: Sequence[int], epsilon: float
) -> np.ndarray:
    centred = x - x.mean(tuple(axes), keepdims=True)
    y = centred / np.sqrt(np.square(centred).mean(tuple(axes), keepdims=True) + np.float32(epsilon))
    y = y if gamma is None else y * gamma
    return y if beta is None else y + beta


def _windows(
    x: np.ndarray, size: Sequence[int], strides: Pair, dilation: Pair, pads: Pads, fill: float = 0
) -> np.ndarray:
    """(B,H,W,C) -> (B,h,w,C,kh,kw), a view."""
    x = np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill)
    span = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    w = np.lib.stride_tricks.sliding_window_view(x, span, axis=(1, 2))
    return w[:, :: strides[0], :: strides[1], :, :: dilation[0], :: dilation[1]]


def _window_shape(s: Shape, size: Sequence[int], strides: Pair, dilation: Pair, pads: Pads) -> Shape:
    return tuple(
        (n + sum(p) - ((k - 1) * d + 1)) // st + 1
        for n, k, st, d, p in zip(s[1:3], size, strides, dilation, pads, strict=True)
    )


def _conv2d(
    x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None, strides: Pair, pads: Pads, dilation: Pair, groups: int
) -> np.ndarray:
    w = _windows(x, kernel.shape[:2], strides, dilation, pads)
    cin, cout = kernel.shape[2], kernel.shape[3] // groups
    parts = []
    for g in range(groups):
        window = w[:, :, :, g * cin : (g + 1) * cin].reshape(*w.shape[:3], -1)
        k = kernel[..., g * cout : (g + 1) * cout].transpose(2, 0, 1, 3).reshape(-1, cout)
        parts.append(window @ k)
    y = parts[0] if groups == 1 else np.concatenate(parts, -1)
    return y if bias is None else y + bias


def _conv2d_shape(
    s: Shape, kernel: Shape, bias: Shape | None, strides: Pair, pads: Pads, dilation: Pair, groups: int
) -> Shape:
    if s[3] != kernel[2] * groups:
        raise ValueError(f"{s[3]} input channels, but the kernel takes {kernel[2] * groups}")
    return (s[0], *_window_shape(s, kernel[:2], strides, dilation, pads), kernel[3])


def _depthwise(
    x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None, strides: Pair, pads: Pads, dilation: Pair
) -> np.ndarray:
    kh, kw, c, m = kernel.shape
    w = _windows(x, (kh, kw), strides, dilation, pads)
    y = np.zeros((*w.shape[:3], c, m), x.dtype)
    for i in range(kh):
        for j in range(kw):
            y += w[..., i, j][..., None] * kernel[i, j]
    y = y.reshape(*w.shape[:3], c * m)
    return y if bias is None else y + bias


def _pool(kind: str, **traits: Any) -> Op:
    def evaluate(x: np.ndarray, size: Pair, strides: Pair, pads: Pads) -> np.ndarray:
        lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
        w = _windows(x, size, strides, (1, 1), pads, lowest if kind == "max" else 0)  # (B,h,w,C,kh,kw)
        if kind == "max":
            return w.max((-2, -1))
        inside = _windows(np.ones((1, *x.shape[1:3], 1), x.dtype), size, strides, (1, 1), pads)
        return w.sum((-2, -1)) / inside.sum((-2, -1))

    infer = lambda s, size, strides, pads: (s[0], *_window_shape(s, size, strides, (1, 1), pads), s[3])
    return Op(infer, evaluate, NUMBERS if kind == "max" else FLOATS, on_maps=True, **traits)


def _space_to_depth_shape(s: Shape, block: int) -> Shape:
    if s[1] % block or s[2] % block:
        raise ValueError(f"height and width must be multiples of {block}")
    return (s[0], s[1] // block, s[2] // block, s[3] * block**2)


def _depth_to_space_shape(s: Shape, block: int) -> Shape:
    if s[3] % block**2:
        raise ValueError(f"channels must be a multiple of {block**2}")
    return (s[0], s[1] * block, s[2] * block, s[3] // block**2)


def _slice(x: np.ndarray, begin: Shape, end: Shape, strides: Shape) -> np.ndarray:
    return x[tuple(slice(b, e, s) for b, e, s in zip(begin, end, strides, strict=True))]


def _resize(x: np.ndarray, size: Pair, mode: str) -> np.ndarray:
    """Half-pixel centres, edges replicated, no antialiasing."""
    for axis, out in zip((1, 2), size, strict=True):
        n = x.shape[axis]
        at = (np.arange(out) + 0.5) * (n / out)
        if mode == "nearest":
            x = np.take(x, np.minimum(np.floor(at).astype(int), n - 1), axis)
            continue
        at = np.clip(at - 0.5, 0, n - 1)
        low = np.floor(at).astype(int)
        t = (at - low).astype(x.dtype).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        x = np.take(x, low, axis) * (1 - t) + np.take(x, np.minimum(low + 1, n - 1), axis) * t
    return x


def _space_to_depth(x: np.ndarray, block: int) -> np.ndarray:
    b, h, w, c = x.shape
    return (
        x.reshape(b, h // block, block, w // block, block, c)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(b, h // block, w // block, -1)
    )


def _depth_to_space(x: np.ndarray, block: int) -> np.ndarray:
    b, h, w, c = x.shape
    return (
        x.reshape(b, h, w, block, block, c // block**2).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * block, w * block, -1)
    )


def _top_k(x: np.ndarray, k: int) -> list[np.ndarray]:
    keys = x if x.dtype.kind == "f" else x.astype(np.int64)  # which holds the negative of each
    order = np.argsort(-keys, axis=-1, kind="stable")[..., :k]
    return [np.take_along_axis(x, order, -1), order]


def _reshape_shape(s: Shape, shape: Shape) -> Shape:
    if math.prod(s) != math.prod(shape):
        raise ValueError(f"{s} cannot become {shape}")
    return tuple(shape)


def _matmul(a: np.ndarray, b: np.ndarray, transpose_a: bool = False, transpose_b: bool = False) -> np.ndarray:
    return (np.swapaxes(a, -1, -2) if transpose_a else a) @ (np.swapaxes(b, -1, -2) if transpose_b else b)


def _matmul_shape(a: Shape, b: Shape, transpose_a: bool = False, transpose_b: bool = False) -> Shape:
    m, k = (a[-1], a[-2]) if transpose_a else a[-2:]
    k2, n = (b[-1], b[-2]) if transpose_b else b[-2:]
    if k != k2:
        raise ValueError(f"inner sizes {k} and {k2} differ")
    return (*_broadcast(a[:-2], b[:-2]), m, n)


def _dense(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    return x @ weight.T if bias is None else x @ weight.T + bias


def _concat_shape(*shapes: Shape, axis: int) -> Shape:
    first = shapes[0]
    if any(len(s) != len(first) or any(n != m for i, (n, m) in enumerate(zip(s, first, strict=True)) if i != axis)
           for s in shapes):  # fmt: skip
        raise ValueError("its inputs differ in more than the axis along which they are joined")
    return tuple(sum(s[i] for s in shapes) if i == axis else n for i, n in enumerate(first))


def _norm_shape(s: Shape, gamma: Shape | None, beta: Shape | None, axes: Sequence[int], epsilon: float) -> Shape:
    if not all(0 <= a < len(s) for a in axes) or _broadcast(s, gamma, beta) != s:
        raise ValueError("its gains and offsets must broadcast to the input, and its axes be the input's")
    return s


def _softmax_shape(s: Shape, axis: int) -> Shape:
    if not 0 <= axis < len(s):
        raise ValueError(f"it has no axis {axis}")
    return s


def _transpose_shape(s: Shape, perm: Shape) -> Shape:
    if sorted(perm) != list(range(len(s))):
        raise ValueError(f"{perm} is no order of its axes")
    return tuple(s[p] for p in perm)


def _slice_shape(s: Shape, begin: Shape, end: Shape, strides: Shape) -> Shape:
    if not len(s) == len(begin) == len(end) == len(strides):
        raise ValueError("it needs a begin, an end and a stride for each axis")
    if any(not 0 <= b <= e <= n or st < 1 for n, b, e, st in zip(s, begin, end, strides, strict=True)):
        raise ValueError("it reads what its input does not have")
    return tuple(len(range(b, e, st)) for b, e, st in zip(begin, end, strides, strict=True))


def _dense_shape(s: Shape, weight: Shape, bias: Shape | None) -> Shape:
    if s[-1] != weight[1] or bias not in (None, weight[:1]):
        raise ValueError(f"weight (out,in) {weight} and bias {bias} do not fit {s[-1]} inputs")
    return (*s[:-1], weight[0])


def _depthwise_shape(s: Shape, kernel: Shape, bias: Shape | None, strides: Pair, pads: Pads, dilation: Pair) -> Shape:
    if s[3] != kernel[2]:
        raise ValueError(f"{s[3]} input channels, but the kernel takes {kernel[2]}")
    return (s[0], *_window_shape(s, kernel[:2], strides, dilation, pads), kernel[2] * kernel[3])


def _gather(x: np.ndarray, indices: np.ndarray, axis: int) -> np.ndarray:
    return np.take(x, indices, axis)


def _pad(x: np.ndarray, pads: Sequence[Pair], mode: str, value: float) -> np.ndarray:
    return np.pad(x, pads, constant_values=value) if mode == "constant" else np.pad(x, pads, mode=mode)


def _attention_shape(*shapes: Shape | None, heads: int | None = None) -> Shape:
    """(q, k, v, bias or None), each (...,N,d) -> (...,N,d); (qkv (B,3*heads,N,d), bias or None) -> (B,heads,N,d)."""
    *qkv, _ = shapes
    if len(qkv) == 1:
        return (qkv[0][0], qkv[0][1] // 3, *qkv[0][2:])
    query, key, value = qkv
    if query[-1] != key[-1] or key[:-1] != value[:-1]:
        raise ValueError("queries and keys must be of one size, and keys and values of one number")
    return (*query[:-1], value[-1])


# ---------------------------------------------------------------- multiply-adds: (inputs' shapes, output's, attrs)


def _dense_macs(shapes: Sequence[Shape], out: Shape, attrs: dict[str, Any]) -> int:
    return math.prod(out) * shapes[1][1]  # weight (out,in)


def _matmul_macs(shapes: Sequence[Shape], out: Shape, attrs: dict[str, Any]) -> int:
    return math.prod(out) * shapes[0][-2 if attrs.get("transpose_a") else -1]


def _conv2d_macs(shapes: Sequence[Shape], out: Shape, attrs: dict[str, Any]) -> int:
    return math.prod(out) * math.prod(shapes[1][:3])  # kernel (kh,kw,in/groups,out)


def _depthwise_macs(shapes: Sequence[Shape], out: Shape, attrs: dict[str, Any]) -> int:
    return math.prod(out) * math.prod(shapes[1][:2])  # kernel (kh,kw,in,multiplier)


# ---------------------------------------------------------------- the table

SUMS = "a sum of many entries passes 65504"
SQUARES = "squares of numbers over 255 overflow, and of those under 2.5e-4 vanish"
SORTS = "it sorts: leave it to the application, head='softmax'"


OPS: dict[str, Op] = {
    # ---- elementwise, with numpy's broadcasting
    "add": _binary(np.add, commutative=True),
    "sub": _binary(np.subtract),
    "mul": _binary(np.multiply, commutative=True),
    "div": _binary(lambda a, b: a / b, FLOATS),
    "maximum": _binary(np.maximum, commutative=True, chooses=True),
    "minimum": _binary(np.minimum, commutative=True, chooses=True),
    "pow": _binary(np.power, half_risk="powers overflow or vanish"),
    "floor_div": _binary(np.floor_divide),
    "mod": _binary(np.mod),
    "equal": _binary(np.equal, COMPARED, commutative=True),
    "not_equal": _binary(np.not_equal, COMPARED, commutative=True),
    "greater": _binary(np.greater, COMPARED),
    "greater_equal": _binary(np.greater_equal, COMPARED),
    "less": _binary(np.less, COMPARED),
    "less_equal": _binary(np.less_equal, COMPARED),
    "logical_and": _binary(np.logical_and, BOOLS, commutative=True),
    "logical_or": _binary(np.logical_or, BOOLS, commutative=True),
    "where": Op(  # condition, value if true, value if false
        lambda c, a, b: _broadcast(c, a, b),
        np.where,
        _where_types,
        elementwise=True,
        chooses=True,
        gpu_unfriendly="a product with a mask does the same",
    ),
    "abs": _unary(np.abs, NUMBERS),
    "neg": _unary(np.negative, NUMBERS),
    "exp": _unary(np.exp, half_risk="it overflows above 11.09"),
    "log": _unary(np.log),
    "sqrt": _unary(np.sqrt),
    "rsqrt": _unary(lambda x: 1 / np.sqrt(x)),
    "square": _unary(np.square, NUMBERS, half_risk=SQUARES),
    "sin": _unary(np.sin),
    "cos": _unary(np.cos),
    "tanh": _unary(np.tanh),
    "erf": _unary(erf),
    "floor": _unary(np.floor),
    "ceil": _unary(np.ceil),
    "round": _unary(np.round),
    "sign": _unary(np.sign, WIDE),
    "logical_not": _unary(np.logical_not, BOOLS),
    "sigmoid": _unary(sigmoid),
    "relu": _unary(lambda x: np.maximum(x, 0), NUMBERS, chooses=True),
    "relu6": _unary(lambda x: np.clip(x, 0, 6), NUMBERS, chooses=True),
    "silu": _unary(lambda x: x * sigmoid(x)),
    "softplus": _unary(lambda x: np.logaddexp(x, np.float32(0))),
    "hard_sigmoid": _unary(lambda x: np.clip(x / 6 + 0.5, 0, 1)),
    "hard_swish": _unary(lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    "gelu": _unary(gelu),  # approximate: the tanh form, otherwise the exact erf form
    "elu": _unary(lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))),
    "leaky_relu": _unary(lambda x, alpha: np.where(x >= 0, x, alpha * x)),
    "clip": _unary(  # low, high: floats, for whole numbers ints
        lambda x, low, high: np.clip(x, x.dtype.type(low), x.dtype.type(high)), _clip_types, chooses=True
    ),
    "cast": _unary(  # dtype: a key of DTYPES
        lambda x, dtype: x.astype(DTYPES[dtype]),
        _cast_types,
        keeps_same=True,
        gpu_unfriendly="GPUs compute in one type of float",
    ),
    "dequantize": _unary(
        lambda q, scale, zero_point: (q.astype(np.float32) - zero_point) * np.float32(scale),
        _takes("uint8", "int32", gives="float32"),
    ),
    # ---- along axes (never negative); axes is a tuple
    "softmax": Op(_softmax_shape, softmax, FLOATS, takes_axes=True),
    # gamma, beta: None, or broadcastable to x
    "layer_norm": Op(_norm_shape, layer_norm, FLOATS, takes_axes=True),
    "mean": _reduce(np.mean, FLOATS, half_risk=SUMS),
    "sum": _reduce(np.sum, WIDE, half_risk=SUMS),
    "max": _reduce(np.max, NUMBERS, chooses=True),
    "min": _reduce(np.min, NUMBERS, chooses=True),
    "prod": _reduce(np.prod, WIDE, half_risk="products overflow or vanish", gpu_unfriendly="shapes must be static"),
    "argmax": Op(
        lambda s, axis: tuple(n for i, n in enumerate(_softmax_shape(s, axis)) if i != axis),
        lambda x, axis: np.argmax(x, axis),
        _takes("float32", "int32", "uint8", gives="int32"),
        takes_axes=True,
        chooses=True,
        gpu_unfriendly="it gives integers: leave it to the application, head='softmax'",
    ),
    # values and int32 indices of the last axis, descending
    "top_k": Op(lambda s, k: [(*s[:-1], k)] * 2, _top_k, _top_k_types, chooses=True, gpu_unfriendly=SORTS),
    # ---- arrangement
    "reshape": Op(_reshape_shape, lambda x, shape: x.reshape(shape), ANY, arrangement=True, keeps_same=True),
    "transpose": Op(_transpose_shape, lambda x, perm: x.transpose(perm), ANY, arrangement=True, takes_axes=True),
    "concat": Op(
        _concat_shape,
        lambda *xs, axis: np.concatenate(xs, axis),
        ANY,
        arrangement=True,
        takes_axes=True,
        keeps_same=True,
    ),
    "slice": Op(_slice_shape, _slice, ANY, arrangement=True, takes_axes=True, keeps_same=True),
    "pad": Op(  # mode: constant, reflect, edge
        lambda s, pads, mode, value: tuple(n + sum(p) for n, p in zip(s, pads, strict=True)),
        _pad,
        ANY,
        takes_axes=True,
        keeps_same=True,
        chooses=True,
    ),
    "tile": Op(
        lambda s, reps: tuple(n * r for n, r in zip(s, reps, strict=True)),
        lambda x, reps: np.tile(x, reps),
        ANY,
        arrangement=True,
        takes_axes=True,
        keeps_same=True,
    ),
    "reverse": Op(lambda s, axes: s, lambda x, axes: np.flip(x, axes), ANY, arrangement=True, takes_axes=True),
    "gather": Op(  # indices: int32
        lambda s, i, axis: s[:axis] + i + s[axis + 1 :],
        _gather,
        _gather_types,
        arrangement=True,
        gpu_unfriendly="it reads at computed places: a slice or a dense layer does the same",
    ),
    "space_to_depth": Op(_space_to_depth_shape, _space_to_depth, ANY, arrangement=True, on_maps=True),
    "depth_to_space": Op(_depth_to_space_shape, _depth_to_space, ANY, arrangement=True, on_maps=True),
    "resize": Op(  # mode: bilinear, nearest
        lambda s, size, mode: (s[0], *size, s[3]), _resize, _resize_types, on_maps=True, keeps_same=True, chooses=True
    ),
    # ---- matrix work; bias may be None
    "matmul": Op(_matmul_shape, _matmul, WIDE, macs=_matmul_macs),
    # x (...,in), weight (out,in), bias (out,)
    "dense": Op(_dense_shape, _dense, FLOATS, is_linear=True, macs=_dense_macs),
    # kernel (kh,kw,in/groups,out); pads ((top,bottom),(left,right))
    "conv2d": Op(_conv2d_shape, _conv2d, FLOATS, is_linear=True, on_maps=True, macs=_conv2d_macs),
    "depthwise_conv2d": Op(  # kernel (kh,kw,in,multiplier)
        _depthwise_shape, _depthwise, FLOATS, is_linear=True, on_maps=True, macs=_depthwise_macs
    ),
    "max_pool2d": _pool("max", chooses=True),
    "avg_pool2d": _pool("avg"),  # padding does not count
}

FUSED: dict[str, Op] = {  # what one target's layout makes of several operations: no tracer and no other target meets it
    "attention": Op(_attention_shape, None, FLOATS, macs=None),
}


def definition(name: str) -> Op:
    """The table's entry of an operation.

    Raises:
        ValueError: there is none.
    """
    found = OPS.get(name) or FUSED.get(name)
    if found is None:
        raise ValueError(f"No primitive op {name!r}.")
    return found


def having(trait: str) -> tuple[str, ...]:
    """Names of the operations whose trait is set, in the table's order."""
    return tuple(name for name, op in OPS.items() if getattr(op, trait))
