"""The table of primitive operations: what each one gives (shapes, types) and what it means (numpy).

Images and feature maps are channels last throughout.
"""

import dataclasses
import math

import numpy as np

DTYPES = {"float32": np.float32, "int32": np.int32, "uint8": np.uint8, "bool": np.bool_}


@dataclasses.dataclass(frozen=True)
class Op:
    infer: object  # (shape, ..., **attrs) -> shape, or a list of shapes
    evaluate: object  # (array, ..., **attrs) -> array, or a list of arrays
    dtype: str | None = None  # of the outputs; None: that of the first input


def _broadcast(*shapes):
    return np.broadcast_shapes(*(s for s in shapes if s is not None))


def same_padding(image, size, strides, dilation):
    """((top, bottom), (left, right)) of TensorFlow's "same" rule for an image (height, width)."""
    pads = []
    for n, k, s, d in zip(image, size, strides, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pads.append((total // 2, total - total // 2))
    return tuple(pads)


def _unary(f):
    return Op(lambda s, **_: s, f)


def _binary(f, dtype=None):
    return Op(lambda a, b: _broadcast(a, b), f, dtype)


def _reduce(f):
    def infer(s, axes, keepdims):
        return tuple(1 if i in axes else n for i, n in enumerate(s) if keepdims or i not in axes)

    return Op(infer, lambda x, axes, keepdims: f(x, axis=tuple(axes), keepdims=keepdims))


def sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(x.dtype)


def erf(x):
    """Error function in double precision by Python's own, or by scipy when it is there (much faster)."""
    try:
        from scipy.special import erf as fast
    except ImportError:
        fast = np.vectorize(math.erf, otypes=[np.float64])
    return fast(x).astype(x.dtype)


def gelu(x, approximate=False):
    if approximate:
        return (0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))).astype(
            x.dtype
        )
    return (0.5 * x * (1 + erf(x * np.float32(math.sqrt(0.5))))).astype(x.dtype)


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def layer_norm(x, gamma, beta, axes, epsilon):
    centred = x - x.mean(tuple(axes), keepdims=True)
    y = centred / np.sqrt(np.square(centred).mean(tuple(axes), keepdims=True) + np.float32(epsilon))
    y = y if gamma is None else y * gamma
    return y if beta is None else y + beta


def _windows(x, size, strides, dilation, pads, fill=0.0):
    """(B,H,W,C) -> (B,h,w,C,kh,kw), a view."""
    x = np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill)
    span = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    w = np.lib.stride_tricks.sliding_window_view(x, span, axis=(1, 2))
    return w[:, :: strides[0], :: strides[1], :, :: dilation[0], :: dilation[1]]


def _window_shape(s, size, strides, dilation, pads):
    return tuple(
        (n + sum(p) - ((k - 1) * d + 1)) // st + 1
        for n, k, st, d, p in zip(s[1:3], size, strides, dilation, pads, strict=True)
    )


def _conv2d(x, kernel, bias, strides, pads, dilation, groups):
    w = _windows(x, kernel.shape[:2], strides, dilation, pads)
    cin, cout = kernel.shape[2], kernel.shape[3] // groups
    parts = []
    for g in range(groups):
        window = w[:, :, :, g * cin : (g + 1) * cin].reshape(*w.shape[:3], -1)
        k = kernel[..., g * cout : (g + 1) * cout].transpose(2, 0, 1, 3).reshape(-1, cout)
        parts.append(window @ k)
    y = parts[0] if groups == 1 else np.concatenate(parts, -1)
    return y if bias is None else y + bias


def _conv2d_shape(s, kernel, bias, strides, pads, dilation, groups):
    if s[3] != kernel[2] * groups:
        raise ValueError(f"{s[3]} input channels, but the kernel takes {kernel[2] * groups}")
    return (s[0], *_window_shape(s, kernel[:2], strides, dilation, pads), kernel[3])


def _depthwise(x, kernel, bias, strides, pads, dilation):
    kh, kw, c, m = kernel.shape
    w = _windows(x, (kh, kw), strides, dilation, pads)
    y = np.zeros((*w.shape[:3], c, m), x.dtype)
    for i in range(kh):
        for j in range(kw):
            y += w[..., i, j][..., None] * kernel[i, j]
    y = y.reshape(*w.shape[:3], c * m)
    return y if bias is None else y + bias


def _pool(kind):
    def evaluate(x, size, strides, pads):
        w = _windows(x, size, strides, (1, 1), pads, -np.inf if kind == "max" else 0.0)
        if kind == "max":
            return w.max((-2, -1))
        inside = _windows(np.ones((1, *x.shape[1:3], 1), x.dtype), size, strides, (1, 1), pads)
        return w.sum((-2, -1)) / inside.sum((-2, -1))

    return Op(lambda s, size, strides, pads: (s[0], *_window_shape(s, size, strides, (1, 1), pads), s[3]), evaluate)


def _slice(x, begin, end, strides):
    return x[tuple(slice(b, e, s) for b, e, s in zip(begin, end, strides, strict=True))]


def _resize(x, size, mode):
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


def _space_to_depth(x, block):
    b, h, w, c = x.shape
    return (
        x.reshape(b, h // block, block, w // block, block, c)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(b, h // block, w // block, -1)
    )


def _depth_to_space(x, block):
    b, h, w, c = x.shape
    return (
        x.reshape(b, h, w, block, block, c // block**2).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * block, w * block, -1)
    )


def _top_k(x, k):
    order = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    return [np.take_along_axis(x, order, -1), order]


def _reshape_shape(s, shape):
    if math.prod(s) != math.prod(shape):
        raise ValueError(f"{s} cannot become {shape}")
    return tuple(shape)


def _matmul(a, b, transpose_a=False, transpose_b=False):
    return (np.swapaxes(a, -1, -2) if transpose_a else a) @ (np.swapaxes(b, -1, -2) if transpose_b else b)


def _matmul_shape(a, b, transpose_a=False, transpose_b=False):
    m, k = (a[-1], a[-2]) if transpose_a else a[-2:]
    k2, n = (b[-1], b[-2]) if transpose_b else b[-2:]
    if k != k2:
        raise ValueError(f"inner sizes {k} and {k2} differ")
    return (*_broadcast(a[:-2], b[:-2]), m, n)


def _dense(x, weight, bias):
    return x @ weight.T if bias is None else x @ weight.T + bias


def _concat_shape(*shapes, axis):
    return tuple(sum(s[i] for s in shapes) if i == axis else n for i, n in enumerate(shapes[0]))


OPS = {
    # ---- elementwise, with numpy's broadcasting
    **{
        name: _binary(f)
        for name, f in dict(
            add=np.add,
            sub=np.subtract,
            mul=np.multiply,
            div=lambda a, b: a / b,
            maximum=np.maximum,
            minimum=np.minimum,
            pow=np.power,
            floor_div=np.floor_divide,
            mod=np.mod,
        ).items()
    },
    **{
        name: _binary(f, "bool")
        for name, f in dict(
            equal=np.equal,
            not_equal=np.not_equal,
            greater=np.greater,
            greater_equal=np.greater_equal,
            less=np.less,
            less_equal=np.less_equal,
            logical_and=np.logical_and,
            logical_or=np.logical_or,
        ).items()
    },
    "where": Op(lambda c, a, b: _broadcast(c, a, b), np.where),  # condition, value if true, value if false
    **{
        name: _unary(f)
        for name, f in dict(
            abs=np.abs,
            neg=np.negative,
            exp=np.exp,
            log=np.log,
            sqrt=np.sqrt,
            rsqrt=lambda x: 1 / np.sqrt(x),
            square=np.square,
            sin=np.sin,
            cos=np.cos,
            tanh=np.tanh,
            erf=erf,
            floor=np.floor,
            ceil=np.ceil,
            round=np.round,
            sign=np.sign,
            logical_not=np.logical_not,
            sigmoid=sigmoid,
            relu=lambda x: np.maximum(x, 0),
            relu6=lambda x: np.clip(x, 0, 6),
            silu=lambda x: x * sigmoid(x),
            softplus=lambda x: np.logaddexp(x, np.float32(0)),
            hard_sigmoid=lambda x: np.clip(x / 6 + 0.5, 0, 1),
            hard_swish=lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
        ).items()
    },
    "gelu": _unary(gelu),  # approximate: the tanh form, otherwise the exact erf form
    "elu": _unary(lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))),
    "leaky_relu": _unary(lambda x, alpha: np.where(x >= 0, x, alpha * x)),
    "clip": _unary(lambda x, low, high: np.clip(x, low, high)),
    "cast": _unary(lambda x, dtype: x.astype(DTYPES[dtype])),  # dtype: a key of DTYPES
    "dequantize": Op(
        lambda s, **_: s,
        lambda q, scale, zero_point: (q.astype(np.float32) - zero_point) * np.float32(scale),
        "float32",
    ),
    # ---- along axes (never negative); axes is a tuple
    "softmax": _unary(softmax),
    "layer_norm": Op(lambda s, gamma, beta, **_: s, layer_norm),  # gamma, beta: None, or broadcastable to x
    **{name: _reduce(f) for name, f in dict(mean=np.mean, sum=np.sum, max=np.max, min=np.min, prod=np.prod).items()},
    "argmax": Op(
        lambda s, axis: tuple(n for i, n in enumerate(s) if i != axis), lambda x, axis: np.argmax(x, axis), "int32"
    ),
    "top_k": Op(lambda s, k: [(*s[:-1], k)] * 2, _top_k),  # values and int32 indices of the last axis, descending
    # ---- arrangement
    "reshape": Op(_reshape_shape, lambda x, shape: x.reshape(shape)),
    "transpose": Op(lambda s, perm: tuple(s[p] for p in perm), lambda x, perm: x.transpose(perm)),
    "concat": Op(_concat_shape, lambda *xs, axis: np.concatenate(xs, axis)),
    "slice": Op(
        lambda s, begin, end, strides: tuple(
            len(range(b, e, st)) for b, e, st in zip(begin, end, strides, strict=True)
        ),
        _slice,
    ),
    "pad": Op(
        lambda s, pads, mode, value: tuple(
            n + sum(p) for n, p in zip(s, pads, strict=True)
        ),  # mode: constant, reflect, edge
        lambda x, pads, mode, value: (
            np.pad(x, pads, constant_values=value) if mode == "constant" else np.pad(x, pads, mode=mode)
        ),
    ),
    "tile": Op(lambda s, reps: tuple(n * r for n, r in zip(s, reps, strict=True)), lambda x, reps: np.tile(x, reps)),
    "reverse": Op(lambda s, axes: s, lambda x, axes: np.flip(x, axes)),
    "gather": Op(
        lambda s, i, axis: s[:axis] + i + s[axis + 1 :], lambda x, i, axis: np.take(x, i, axis)
    ),  # indices: int32
    "space_to_depth": Op(lambda s, block: (s[0], s[1] // block, s[2] // block, s[3] * block**2), _space_to_depth),
    "depth_to_space": Op(lambda s, block: (s[0], s[1] * block, s[2] * block, s[3] // block**2), _depth_to_space),
    "resize": Op(lambda s, size, mode: (s[0], *size, s[3]), _resize),  # mode: bilinear, nearest
    # ---- matrix work; bias may be None
    "matmul": Op(_matmul_shape, _matmul),
    "dense": Op(lambda s, w, b: (*s[:-1], w[0]), _dense),  # x (...,in), weight (out,in), bias (out,)
    "conv2d": Op(_conv2d_shape, _conv2d),  # kernel (kh,kw,in/groups,out); pads ((top,bottom),(left,right))
    "depthwise_conv2d": Op(
        lambda s, k, b, strides, pads, dilation: (s[0], *_window_shape(s, k[:2], strides, dilation, pads), k[2] * k[3]),
        _depthwise,
    ),
    "max_pool2d": _pool("max"),
    "avg_pool2d": _pool("avg"),  # padding does not count
}
