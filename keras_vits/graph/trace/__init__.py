"""Keras model -> Graph on any backend, by running the model once on symbolic tensors.

Keras sends every call that sees a `KerasTensor` to `symbolic_call`. The model is fed with `Traced` tensors, a
KerasTensor that knows its Value in a Graph, and while it runs (a) a primitive `keras.ops` operation appends nodes to
the Graph, (b) a layer runs its own `call`, so a custom layer written with `keras.ops` needs no entry here, (c)
backend functions called on Traced tensors go to the `keras.ops` function of the same name, and (d) no Keras node is
recorded, so the model is not changed. Calls that see no Traced tensor, another thread's for instance, go through
untouched.

This is the one file that touches Keras' private hooks. `check_keras` names any that an unknown Keras lacks.
"""

import contextlib
import importlib
import itertools
import math
import string
import threading

import keras
import numpy as np

from keras_vits.graph.ir import Builder, Value
from keras_vits.graph.ops import same_padding

HOOKS = {  # module -> the names in it that tracing replaces or reads
    "keras.src.ops.operation": ("Operation",),
    "keras.src.layers.layer": ("Layer", "Node"),
    "keras.src.backend.common.keras_tensor": ("KerasTensor",),
    "keras.src.backend.common.variables": ("AutocastScope",),
    "keras.src.backend": ("numpy", "nn", "math", "core", "image", "linalg", "convert_to_tensor", "cast", "shape"),
    "keras.src.tree": ("flatten", "map_structure"),
}
METHODS = (
    "keras.src.ops.operation.Operation.symbolic_call",
    "keras.src.layers.layer.Layer.symbolic_call",
    "keras.src.backend.common.variables.AutocastScope.maybe_cast",
)

_lock = threading.RLock()  # the hooks are replaced for the whole process: one trace at a time


def check_keras():
    """Raises an ImportError that names what is missing when this Keras lacks a hook that tracing needs."""
    missing = []
    for module, names in HOOKS.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            missing.append(module)
            continue
        missing += [f"{module}.{name}" for name in names if not hasattr(found, name)]
    for name in () if missing else METHODS:
        module, cls, method = name.rsplit(".", 2)
        if not hasattr(getattr(importlib.import_module(module), cls), method):
            missing.append(name)
    if missing:
        raise ImportError(
            f"Keras {keras.__version__} lacks {', '.join(missing)}, which tracing a model needs. Install one that this "
            'release was tested with: pip install "keras>=3.15,<3.16"'
        )


def trace(model, batch=1):
    """Runs the model once on symbolic tensors and returns what it computed, in inference mode.

    Args:
        model: a built `keras.Model` made by the functional API (every `VisionModel`, `keras.applications`, keras-hub).
        batch: B, the static batch size of the Graph.

    Returns:
        A `Graph` with static shapes, float32 constants and our layer names; the same, operation by operation, on
        TensorFlow, JAX and PyTorch.

    Raises:
        ValueError: the model has no functional inputs, an image axis of unknown size, or an operation without an
            entry in the table (named with its layer).
        ImportError: this Keras lacks a hook that tracing needs.
    """
    check_keras()
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise ValueError(
            f"Only a keras.Model with functional inputs can be traced; received {type(model).__name__}. "
            "Wrap it: keras.Model(inputs, model(inputs))."
        )
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be a positive integer; received {batch!r}.")
    tracer = _Tracer(model.name)

    def feed(tensor):
        shape = (batch, *tensor.shape[1:])
        if None in shape:
            raise ValueError(
                f"Input {tensor.name!r} has an axis of unknown size {tensor.shape}: give the model a fixed image size."
            )
        return tracer.wrap(tracer.build.input(tensor.name, shape, _dtype(tensor.dtype)))

    with _lock, tracer.hooks():
        outputs = model(keras.tree.map_structure(feed, model.input), training=False)
    for tensor in keras.tree.flatten(outputs):
        tracer.build.graph.outputs.append(tracer.value(tensor))
    return tracer.build.graph


def _dtype(dtype):
    dtype = keras.backend.standardize_dtype(dtype)
    return "float32" if "float" in dtype else dtype if dtype in ("bool", "uint8") else "int32"


KEPT = ("cond", "is_tensor", "map", "scan", "vectorized_map")  # of the backend: these take functions, or tell types


class _Tracer:
    """Holds the Graph being built and replaces Keras' hooks while the model runs."""

    def __init__(self, name):
        from keras.src.backend.common.keras_tensor import KerasTensor

        self.build = Builder(name)
        self.path = []  # names of the layers being called
        self.keep = []  # constants' sources stay alive, so that their id() stays theirs

        class Traced(KerasTensor):
            """A symbolic tensor that knows its Value."""

            def __init__(self, value):
                super().__init__(value.shape, dtype=value.dtype, record_history=False)
                self.traced_value = value

        self.Traced = Traced

    # ---- values

    def wrap(self, result):
        if isinstance(result, (list, tuple)):
            return [self.wrap(r) for r in result]
        return self.Traced(result)

    def is_traced(self, x):
        return isinstance(x, self.Traced)

    def any_traced(self, *found):
        """Whether a symbolic tensor is among these, or in their lists, tuples and dicts."""
        return any(
            self.is_traced(x)
            or (isinstance(x, (list, tuple)) and self.any_traced(*x))
            or (isinstance(x, dict) and self.any_traced(*x.values()))
            for x in found
        )

    def array(self, x, dtype=None):
        """A constant (a variable, a backend tensor or numbers) in numpy; copied, unless nothing can write to it."""
        ours = False
        if not isinstance(x, (int, float, bool, list, tuple, np.ndarray, np.generic)):
            x = keras.ops.convert_to_numpy(x)
            ours = x.flags.owndata  # a copy already, not a view of the backend's memory
        x = np.asarray(x)
        dtype = dtype or ("bool" if x.dtype == np.bool_ else "int32" if x.dtype.kind in "iu" else "float32")
        return x.astype(dtype, copy=x.flags.writeable and not ours)

    def value(self, x, like=None, name="constant"):
        """The Value of a Traced tensor, or a constant one; bare numbers take the dtype of `like`."""
        if isinstance(x, Value):
            return x
        if self.is_traced(x):
            return x.traced_value
        array = self.array(x)
        if like is not None and array.dtype != np.bool_:
            array = array.astype(like.dtype)
        return self.constant(array, x, name)

    def constant(self, array, source=None, name="constant", form=""):
        """A constant, one Value for each source (a variable, say) and form of it."""
        name = getattr(source, "name", None) or name
        if source is None or isinstance(source, (int, float, bool)):
            return self.build.constant(array, name)
        self.keep.append(source)
        return self.build.constant(array, name, key=(id(source), form, array.dtype.name))

    # ---- hooks

    @contextlib.contextmanager
    def hooks(self):
        from keras.src import backend
        from keras.src.backend.common.variables import AutocastScope
        from keras.src.layers import layer as layer_module
        from keras.src.layers.layer import Layer
        from keras.src.ops.operation import Operation

        undo = []

        def replace(holder, name, new):
            undo.append((holder, name, getattr(holder, name)))
            setattr(holder, name, new)

        operation_call, layer_call, node = Operation.symbolic_call, Layer.symbolic_call, layer_module.Node
        maybe_cast, thread = AutocastScope.maybe_cast, threading.get_ident()

        def on_operation(operation, *args, **kwargs):
            if not self.any_traced(args, kwargs):
                return operation_call(operation, *args, **kwargs)
            return self.operation(operation, args, kwargs)

        def on_layer(layer, *args, **kwargs):
            if not self.any_traced(args, kwargs):
                return layer_call(layer, *args, **kwargs)
            return self.layer(layer, args, kwargs)

        def on_node(*args, **kwargs):
            return None if self.any_traced(args, kwargs) else node(*args, **kwargs)

        def on_autocast(scope, value):  # a mixed policy's compute dtype must not round the weights
            return value if threading.get_ident() == thread else maybe_cast(scope, value)

        def reroute(holder, name, target):
            original = getattr(holder, name)

            def function(*args, **kwargs):
                return target(*args, **kwargs) if self.any_traced(args, kwargs) else original(*args, **kwargs)

            replace(holder, name, function)

        try:
            for space in ("numpy", "nn", "math", "core", "image", "linalg"):
                module = getattr(backend, space)
                public = getattr(keras.ops, space) if space in ("image", "linalg") else keras.ops
                for name in dir(module):
                    function, target = getattr(module, name), getattr(public, name, None)
                    plain = callable(function) and not isinstance(function, type) and not name.startswith("_")
                    if plain and callable(target) and name not in KEPT:
                        reroute(module, name, target)
            for name in ("convert_to_tensor", "cast", "shape"):
                reroute(backend, name, getattr(keras.ops, name))
            replace(Operation, "symbolic_call", on_operation)
            replace(Layer, "symbolic_call", on_layer)
            replace(layer_module, "Node", on_node)
            replace(AutocastScope, "maybe_cast", on_autocast)
            yield
        finally:
            for holder, name, original in reversed(undo):
                setattr(holder, name, original)

    def layer(self, layer, args, kwargs):
        self.path.append(layer.name)
        before, self.build.layer = self.build.layer, "/".join(self.path[1:])
        try:
            special = LAYERS.get(type(layer).__name__)
            return special(self, layer, *args, **kwargs) if special else layer.call(*args, **kwargs)
        finally:
            self.path.pop()
            self.build.layer = before

    def operation(self, operation, args, kwargs):
        name = type(operation).__name__
        special = OPERATIONS.get(name)
        if special is None:
            if type(operation).__module__.startswith("keras.src.ops"):
                where = (
                    f"layer {'/'.join(self.path[1:])!r}" if len(self.path) > 1 else f"model {self.build.graph.name!r}"
                )
                raise ValueError(
                    f"The operation {name} in {where} has no translation to a phone's graph; use an operation that has."
                )
            return operation.call(*args, **kwargs)  # a composite: it runs on keras.ops itself
        try:
            return self.wrap(special(self, operation, *args, **kwargs))
        except UnsupportedError as e:
            where = "/".join(self.path[1:])
            raise ValueError(
                f"The operation {name} in layer {where!r} cannot be translated to a phone's graph: {e}."
            ) from None


class UnsupportedError(Exception):
    """What of an operation has no translation."""


# ---------------------------------------------------------------- translations: (tracer, operation, *inputs) -> Value

OPERATIONS = {}
LAYERS = {}  # layers whose own call does not go through keras.ops


def translates(*names):
    def register(function):
        for name in names:
            OPERATIONS[name] = function
        return function

    return register


def _axes(axis, rank):
    """Sorted non-negative axes; None means all."""
    if axis is None:
        return tuple(range(rank))
    return tuple(sorted(a % rank for a in ([axis] if isinstance(axis, int) else axis)))


def _pair(x, n=2):
    return (int(x),) * n if isinstance(x, int) else tuple(int(i) for i in x)


def _binary(op):
    def translate(t, operation, a, b):
        like = t.value(a) if t.is_traced(a) else t.value(b)
        a, b = t.value(a, like), t.value(b, like)
        if a.dtype != b.dtype:
            target = "float32" if "float32" in (a.dtype, b.dtype) else "int32"
            a, b = (v if v.dtype == target else t.build("cast", v, dtype=target) for v in (a, b))
        return t.build(op, a, b)

    return translate


for _name, _op in {
    "Add": "add",
    "Subtract": "sub",
    "Multiply": "mul",
    "Divide": "div",
    "TrueDivide": "div",
    "FloorDivide": "floor_div",
    "Mod": "mod",
    "Power": "pow",
    "Maximum": "maximum",
    "Minimum": "minimum",
    "Equal": "equal",
    "NotEqual": "not_equal",
    "Greater": "greater",
    "GreaterEqual": "greater_equal",
    "Less": "less",
    "LessEqual": "less_equal",
    "LogicalAnd": "logical_and",
    "LogicalOr": "logical_or",
}.items():
    OPERATIONS[_name] = _binary(_op)


def _unary(op):
    return lambda t, operation, x: t.build(op, t.value(x))


for _name, _op in {
    "Absolute": "abs",
    "Abs": "abs",
    "Negative": "neg",
    "Exp": "exp",
    "Log": "log",
    "Sqrt": "sqrt",
    "Rsqrt": "rsqrt",
    "Square": "square",
    "Sin": "sin",
    "Cos": "cos",
    "Tanh": "tanh",
    "Erf": "erf",
    "Floor": "floor",
    "Ceil": "ceil",
    "Round": "round",
    "Sign": "sign",
    "LogicalNot": "logical_not",
    "Sigmoid": "sigmoid",
    "Relu": "relu",
    "Relu6": "relu6",
    "Silu": "silu",
    "Softplus": "softplus",
    "HardSigmoid": "hard_sigmoid",
    "HardSilu": "hard_swish",
}.items():
    OPERATIONS[_name] = _unary(_op)

OPERATIONS.update(
    Gelu=lambda t, o, x: t.build("gelu", t.value(x), approximate=bool(o.approximate)),
    Elu=lambda t, o, x: t.build("elu", t.value(x), alpha=float(o.alpha)),
    LeakyRelu=lambda t, o, x: t.build("leaky_relu", t.value(x), alpha=float(o.negative_slope)),
    Clip=lambda t, o, x: t.build("clip", t.value(x), low=float(o.x_min), high=float(o.x_max)),
    Reciprocal=lambda t, o, x: t.build("div", t.value(1.0), t.value(x)),
    Log1p=lambda t, o, x: t.build("log", t.build("add", t.value(x), t.value(1.0))),
    StopGradient=lambda t, o, x: t.value(x),
    Copy=lambda t, o, x: t.value(x),
    Softmax=lambda t, o, x: t.build("softmax", t.value(x), axis=o.axis % len(x.shape)),
    SpaceToDepth=lambda t, o, x: t.build("space_to_depth", channels_last(o, x, t), block=int(o.block_size)),
    DepthToSpace=lambda t, o, x: t.build("depth_to_space", channels_last(o, x, t), block=int(o.block_size)),
    Argmax=lambda t, o, x: t.build("argmax", t.value(x), axis=o.axis % len(x.shape)),
    TopK=lambda t, o, x: list(t.build("top_k", t.value(x), k=int(o.k))),
    Reshape=lambda t, o, x: reshape(t, t.value(x), o.newshape),
    Ravel=lambda t, o, x: reshape(t, t.value(x), (-1,)),
    Transpose=lambda t, o, x: transpose(t, t.value(x), o.axes or range(len(x.shape))[::-1]),
    Tile=lambda t, o, x: t.build("tile", t.value(x), reps=tuple(int(r) for r in o.repeats)),
    Flip=lambda t, o, x: t.build("reverse", t.value(x), axes=_axes(o.axis, len(x.shape))),
)


def channels_last(operation, x, t):
    if keras.backend.image_data_format() != "channels_last" or operation.data_format == "channels_first":
        raise UnsupportedError("it is channels first; keras_vits is channels last throughout")
    return t.value(x)


def reshape(t, x, shape):
    shape = [-1 if d is None else int(d) for d in shape]
    if -1 in shape:
        shape[shape.index(-1)] = math.prod(x.shape) // max(1, -math.prod(shape))
    return x if tuple(shape) == x.shape else t.build("reshape", x, shape=tuple(shape))


def transpose(t, x, perm):
    perm = tuple(int(p) % len(x.shape) for p in perm)
    return x if perm == tuple(range(len(perm))) else t.build("transpose", x, perm=perm)


@translates("Cast", "ConvertToTensor", "SaturateCast")
def _(t, o, x, **_):
    x = t.value(x)
    target = x.dtype if o.dtype is None else _dtype(o.dtype)
    return x if x.dtype == target else t.build("cast", x, dtype=target)


@translates("Where")
def _(t, o, condition, a=None, b=None):
    like = t.value(a) if t.is_traced(a) else t.value(b) if t.is_traced(b) else None
    return t.build("where", t.value(condition), t.value(a, like), t.value(b, like))


def _reduction(op):
    return lambda t, o, x: t.build(op, t.value(x), axes=_axes(o.axis, len(x.shape)), keepdims=bool(o.keepdims))


for _name, _op in dict(Mean="mean", Sum="sum", Max="max", Min="min", Amax="max", Amin="min", Prod="prod").items():
    OPERATIONS[_name] = _reduction(_op)


def _moments(t, x, axes, keepdims):
    mean = t.build("mean", x, axes=axes, keepdims=True)
    variance = t.build("mean", t.build("square", t.build("sub", x, mean)), axes=axes, keepdims=keepdims)
    return mean if keepdims else reshape(t, mean, variance.shape), variance


@translates("Moments")
def _(t, o, x):
    return list(_moments(t, t.value(x), _axes(o.axes, len(x.shape)), bool(o.keepdims)))


@translates("Var")
def _(t, o, x):
    return _moments(t, t.value(x), _axes(o.axis, len(x.shape)), bool(o.keepdims))[1]


@translates("Std")
def _(t, o, x):
    return t.build("sqrt", _moments(t, t.value(x), _axes(o.axis, len(x.shape)), bool(o.keepdims))[1])


@translates("Norm")
def _(t, o, x):
    if o.ord not in (None, 2, "fro") or o.axis is None:
        raise UnsupportedError("only the 2-norm along given axes is")
    x = t.value(x)
    return t.build(
        "sqrt", t.build("sum", t.build("square", x), axes=_axes(o.axis, len(x.shape)), keepdims=bool(o.keepdims))
    )


@translates("Normalize")
def _(t, o, x):  # x * rsqrt(max(sum(x^2), epsilon^2))
    if o.order != 2:
        raise UnsupportedError("only the 2-norm is")
    x, epsilon = t.value(x), keras.backend.epsilon() if o.epsilon is None else o.epsilon
    total = t.build("sum", t.build("square", x), axes=_axes(o.axis, len(x.shape)), keepdims=True)
    return t.build("mul", x, t.build("rsqrt", t.build("maximum", total, t.value(float(epsilon) ** 2))))


@translates("LayerNorm")
def _(t, o, x, gamma=None, beta=None):
    x, axes = t.value(x), _axes(o.axis, len(x.shape))
    epsilon = float(keras.backend.epsilon() if o.epsilon is None else o.epsilon)
    wide = [n if i in axes else 1 for i, n in enumerate(x.shape)]

    def affine(v):
        if v is None or axes == (len(x.shape) - 1,) or len(v.shape) == len(x.shape):
            return None if v is None else t.value(v)
        return t.constant(t.array(v).reshape(wide), v, form="wide")

    gamma, beta = affine(gamma), affine(beta)
    if not o.rms_scaling:
        return t.build("layer_norm", x, gamma, beta, axes=axes, epsilon=epsilon)
    y = t.build("mul", x, _inverse_root(t, _moments(t, x, axes, True)[1], epsilon))
    return y if gamma is None else t.build("mul", y, gamma)


@translates("RMSNorm")
def _(t, o, x, scale=None):
    x, epsilon = t.value(x), float(keras.backend.epsilon() if o.epsilon is None else o.epsilon)
    y = t.build(
        "mul",
        x,
        _inverse_root(
            t, t.build("mean", t.build("square", x), axes=_axes(o.axis, len(x.shape)), keepdims=True), epsilon
        ),
    )
    return y if scale is None else t.build("mul", y, t.value(scale))


def _inverse_root(t, x, epsilon):
    return t.build("rsqrt", t.build("add", x, t.value(epsilon)))


@translates("BatchNorm")
def _(t, o, x, mean, variance, offset=None, scale=None):
    x = t.value(x)
    shape = [n if i == o.axis % len(x.shape) else 1 for i, n in enumerate(x.shape)]
    shape = shape[-1:] if o.axis % len(x.shape) == len(x.shape) - 1 else shape
    mean, variance = (t.array(v).astype(np.float64) for v in (mean, variance))
    k = (1.0 if scale is None else t.array(scale)) / np.sqrt(variance + o.epsilon)
    c = (0.0 if offset is None else t.array(offset)) - mean * k
    y = t.build("mul", x, t.constant(k.reshape(shape), name="scale"))
    return t.build("add", y, t.constant(c.reshape(shape), name="offset"))


@translates("ExpandDims")
def _(t, o, x):
    x = t.value(x)
    axes = _axes(o.axis, len(x.shape) + (1 if isinstance(o.axis, int) else len(o.axis)))
    rest = iter(x.shape)
    return reshape(t, x, [1 if i in axes else next(rest) for i in range(len(x.shape) + len(axes))])


@translates("Squeeze")
def _(t, o, x):
    x = t.value(x)
    axes = [i for i, n in enumerate(x.shape) if n == 1] if o.axis is None else _axes(o.axis, len(x.shape))
    return reshape(t, x, [n for i, n in enumerate(x.shape) if i not in axes])


@translates("Swapaxes")
def _(t, o, x):
    perm = list(range(len(x.shape)))
    a, b = o.axis1 % len(perm), o.axis2 % len(perm)
    perm[a], perm[b] = perm[b], perm[a]
    return transpose(t, t.value(x), perm)


@translates("Moveaxis")
def _(t, o, x):
    n = len(x.shape)
    source, destination = ([a % n for a in ([v] if isinstance(v, int) else v)] for v in (o.source, o.destination))
    moved = dict(zip(destination, source, strict=True))
    rest = iter(i for i in range(n) if i not in source)
    return transpose(t, t.value(x), [moved[i] if i in moved else next(rest) for i in range(n)])


@translates("BroadcastTo")
def _(t, o, x):
    x, shape = t.value(x), tuple(int(d) for d in o.shape)
    x = reshape(t, x, [1] * (len(shape) - len(x.shape)) + list(x.shape))
    return (
        x if x.shape == shape else t.build("tile", x, reps=tuple(d // n for d, n in zip(shape, x.shape, strict=True)))
    )


def _list(t, xs):
    like = next(t.value(x) for x in xs if t.is_traced(x))
    return [t.value(x, like) for x in xs]


@translates("Concatenate")
def _(t, o, xs):
    xs = _list(t, xs)
    return t.build("concat", *xs, axis=o.axis % len(xs[0].shape))


@translates("Stack")
def _(t, o, xs):
    xs = _list(t, xs)
    axis = o.axis % (len(xs[0].shape) + 1)
    shape = (*xs[0].shape[:axis], 1, *xs[0].shape[axis:])
    return t.build("concat", *(reshape(t, x, shape) for x in xs), axis=axis)


def cut(t, x, axis, begin, end):
    """x[begin:end] along one axis."""
    n = len(x.shape)
    if (begin, end) == (0, x.shape[axis]):
        return x
    return t.build(
        "slice",
        x,
        begin=tuple(begin if i == axis else 0 for i in range(n)),
        end=tuple(end if i == axis else x.shape[i] for i in range(n)),
        strides=(1,) * n,
    )


@translates("Split")
def _(t, o, x):
    x, axis, parts = t.value(x), o.axis % len(x.shape), o.indices_or_sections
    n = x.shape[axis]
    edges = [n // parts * i for i in range(parts + 1)] if isinstance(parts, int) else [0, *(int(p) for p in parts), n]
    return [cut(t, x, axis, a, b) for a, b in itertools.pairwise(edges)]


@translates("Unstack")
def _(t, o, x):
    x, axis = t.value(x), o.axis % len(x.shape)
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    return [reshape(t, cut(t, x, axis, i, i + 1), shape) for i in range(x.shape[axis])]


@translates("GetItem")
def _(t, o, x, key):
    x = t.value(x)
    key = list(key) if isinstance(key, (list, tuple)) else [key]
    if any(not (k is None or k is Ellipsis or isinstance(k, (int, np.integer, slice))) for k in key):
        raise UnsupportedError("it indexes with something other than numbers, slices, None and ...")
    used = sum(k is not None and k is not Ellipsis for k in key)
    if Ellipsis in key:
        i = key.index(Ellipsis)
        key[i : i + 1] = [slice(None)] * (len(x.shape) - used)
    else:
        key += [slice(None)] * (len(x.shape) - used)
    begin, end, strides, shape, axis = [], [], [], [], 0
    for k in key:
        if k is None:
            shape.append(1)
            continue
        n = x.shape[axis]
        a, b, s = k.indices(n) if isinstance(k, slice) else (int(k) % n, int(k) % n + 1, 1)
        if s < 0:
            raise UnsupportedError("it slices backwards; use keras.ops.flip")
        begin, end, strides = [*begin, a], [*end, b], [*strides, s]
        if isinstance(k, slice):
            shape.append(len(range(a, b, s)))
        axis += 1
    if list(zip(begin, end, strides, strict=True)) != [(0, n, 1) for n in x.shape]:
        x = t.build("slice", x, begin=tuple(begin), end=tuple(end), strides=tuple(strides))
    return reshape(t, x, shape)


@translates("Take")
def _(t, o, x, indices):
    x, axis = t.value(x), o.axis
    if axis is None:
        x, axis = reshape(t, x, (-1,)), 0
    axis %= len(x.shape)
    if t.is_traced(indices):
        return t.build("gather", x, t.value(indices), axis=axis)
    indices = t.array(indices, np.int32)
    return t.build(
        "gather", x, t.constant(np.where(indices < 0, indices + x.shape[axis], indices), name="indices"), axis=axis
    )


@translates("Roll")
def _(t, o, x):
    x = t.value(x)
    if o.axis is None:
        raise UnsupportedError("it rolls without an axis")
    for shift, axis in zip(_pair(o.shift, 1), _pair(o.axis, 1), strict=True):
        axis, n = axis % len(x.shape), x.shape[axis]
        if shift % n:
            x = t.build("concat", cut(t, x, axis, n - shift % n, n), cut(t, x, axis, 0, n - shift % n), axis=axis)
    return x


@translates("Repeat")
def _(t, o, x):
    if o.axis is None or not isinstance(o.repeats, int):
        raise UnsupportedError("it repeats without an axis or by unequal counts")
    x, axis = t.value(x), o.axis % len(x.shape)
    wide = reshape(t, x, (*x.shape[: axis + 1], 1, *x.shape[axis + 1 :]))
    tiled = t.build("tile", wide, reps=tuple(o.repeats if i == axis + 1 else 1 for i in range(len(wide.shape))))
    return reshape(t, tiled, [n * o.repeats if i == axis else n for i, n in enumerate(x.shape)])


@translates("Pad")
def _(t, o, x, constant_values=None):
    x = t.value(x)
    pads = o.pad_width if len(o.pad_width) == len(x.shape) else tuple(o.pad_width) * len(x.shape)
    if o.mode not in ("constant", "reflect", "edge"):
        raise UnsupportedError(f"mode {o.mode!r} is not constant, reflect or edge")
    pads = tuple((int(a), int(b)) for a, b in pads)
    return (
        t.build("pad", x, pads=pads, mode=o.mode, value=float(constant_values or 0))
        if any(a or b for a, b in pads)
        else x
    )


@translates("Resize")
def _(t, o, x):
    if o.interpolation not in ("bilinear", "nearest"):
        raise UnsupportedError(f"interpolation {o.interpolation!r} is not bilinear or nearest")
    size = _pair(o.size)
    shrinks = any(s < n for s, n in zip(size, x.shape[1:3], strict=True))
    if (o.antialias and shrinks) or o.crop_to_aspect_ratio or o.pad_to_aspect_ratio:
        raise UnsupportedError("antialiasing, cropping and padding to the aspect ratio are not available")
    return t.build("resize", channels_last(o, x, t), size=size, mode=o.interpolation)


# ---- matrix work


def dense(t, x, kernel):
    """x (...,I) times a constant kernel (I,O)."""
    return t.build("dense", x, t.constant(t.array(kernel).T, kernel, "kernel", "transposed"), None)


@translates("Matmul")
def _(t, o, a, b):
    if t.is_traced(a) and not t.is_traced(b) and len(b.shape) == 2:
        return dense(t, t.value(a), b)
    return t.build("matmul", t.value(a), t.value(b))


@translates("Dot")
def _(t, o, a, b):
    if len(b.shape) != 2:
        raise UnsupportedError("only a dot product with a matrix is")
    return OPERATIONS["Matmul"](t, o, a, b)


@translates("Einsum")
def _(t, o, *operands, **_):
    subscripts = o.subscripts.replace(" ", "")
    if len(operands) != 2 or "->" not in subscripts:
        raise UnsupportedError(f"{subscripts!r} is not of the form 'a,b->c'")
    inputs, out = subscripts.split("->")
    terms = inputs.split(",")
    if "..." in subscripts:
        free = [c for c in string.ascii_letters if c not in subscripts]
        extra = [
            len(x.shape) - len(term.replace("...", "")) if "..." in term else 0
            for term, x in zip(terms, operands, strict=True)
        ]
        letters = "".join(free[: max(extra)])
        terms = [term.replace("...", letters[len(letters) - n :]) for term, n in zip(terms, extra, strict=True)]
        out = out.replace("...", letters)
    (ta, tb), (a, b) = terms, operands
    size = {c: n for term, x in zip(terms, operands, strict=True) for c, n in zip(term, x.shape, strict=True)}
    if any(term.count(c) > 1 for term in (ta, tb) for c in term):
        raise UnsupportedError(f"{subscripts!r} repeats an index within an operand")
    batch = [c for c in ta if c in tb and c in out]
    inner = [c for c in ta if c in tb and c not in out]
    rows, columns = [c for c in ta if c not in tb], [c for c in tb if c not in ta]
    total = lambda cs: math.prod(size[c] for c in cs)
    ordered = batch + rows + columns
    if not t.is_traced(b) and not batch:
        weight = t.array(b).transpose([tb.index(c) for c in columns + inner]).reshape(total(columns), total(inner))
        x = transpose(t, t.value(a), [ta.index(c) for c in rows + inner])
        x = reshape(t, x, [*(size[c] for c in rows), total(inner)])
        y = t.build("dense", x, t.constant(weight, b, "kernel", subscripts), None)
    else:
        x = transpose(t, t.value(a), [ta.index(c) for c in batch + rows + inner])
        y = transpose(t, t.value(b), [tb.index(c) for c in batch + inner + columns])
        lead = [size[c] for c in batch]
        y = t.build(
            "matmul",
            reshape(t, x, [*lead, total(rows), total(inner)]),
            reshape(t, y, [*lead, total(inner), total(columns)]),
        )
    y = reshape(t, y, [size[c] for c in ordered])
    return transpose(t, y, [ordered.index(c) for c in out])


@translates("DotProductAttention")
def _(t, o, query, key, value, bias=None, mask=None, scale=None):
    if o.is_causal or o.attn_logits_soft_cap is not None:
        raise UnsupportedError("causal and soft-capped attention are not available")
    q, k, v = (transpose(t, t.value(x), (0, 2, 1, 3)) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    scores = t.build("matmul", t.build("mul", q, t.value(float(scale))), k, transpose_b=True)
    if bias is not None:
        scores = t.build("add", scores, t.value(bias))
    if mask is not None:
        scores = t.build("where", t.value(mask), scores, t.value(-1e9))
    return transpose(t, t.build("matmul", t.build("softmax", scores, axis=3), v), (0, 2, 1, 3))


# ---- windows


def _window(t, o, x, size, dilation=1):
    x = channels_last(o, x, t)
    if len(x.shape) != 4:
        raise UnsupportedError(f"only 2-D images are; the input has shape {x.shape}")
    strides, dilation = _pair(o.strides or size), _pair(dilation)
    pads = same_padding(x.shape[1:3], size, strides, dilation) if o.padding == "same" else ((0, 0), (0, 0))
    return x, dict(strides=strides, pads=pads, dilation=dilation)


@translates("Conv")
def _(t, o, x, kernel):
    groups = x.shape[-1] // kernel.shape[-2]
    x, attrs = _window(t, o, x, tuple(kernel.shape[:2]), o.dilation_rate)
    return t.build("conv2d", x, t.constant(t.array(kernel), kernel, "kernel"), None, groups=groups, **attrs)


@translates("DepthwiseConv")
def _(t, o, x, kernel):
    x, attrs = _window(t, o, x, tuple(kernel.shape[:2]), o.dilation_rate)
    return t.build("depthwise_conv2d", x, t.constant(t.array(kernel), kernel, "kernel"), None, **attrs)


@translates("SeparableConv")
def _(t, o, x, depthwise_kernel, pointwise_kernel):
    y = OPERATIONS["DepthwiseConv"](t, o, x, depthwise_kernel)
    kernel = t.constant(t.array(pointwise_kernel), pointwise_kernel, "kernel")
    return t.build("conv2d", y, kernel, None, strides=(1, 1), pads=((0, 0), (0, 0)), dilation=(1, 1), groups=1)


def _pool(op):
    def translate(t, o, x):
        size = _pair(o.pool_size)
        x, attrs = _window(t, o, x, size)
        return t.build(op, x, size=size, strides=attrs["strides"], pads=attrs["pads"])

    return translate


OPERATIONS.update(MaxPool=_pool("max_pool2d"), AveragePool=_pool("avg_pool2d"))


def _rescaling(t, layer, x, **_):
    x = t.value(x)
    x = x if x.dtype == "float32" else t.build("cast", x, dtype="float32")
    scaled = t.build("mul", x, t.value(np.asarray(layer.scale, np.float32)))
    return t.wrap(t.build("add", scaled, t.value(np.asarray(layer.offset, np.float32))))


LAYERS["Rescaling"] = _rescaling
