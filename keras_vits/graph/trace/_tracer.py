"""The Graph being built while a model runs, and the tables of what is translated to it."""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import keras
import numpy as np

from keras_vits._util import keras_private
from keras_vits.graph.ir import Builder, Value
from keras_vits.graph.ops import promote

from .recurrence import recurrence

# Name of a class of keras.ops itself -> (tracer, operation, *inputs) -> the Value, or Values, that it gives.
OPERATIONS: dict[str, Callable[..., Any]] = {}
# Name of a class of keras.layers itself whose call does not go through keras.ops -> (tracer, layer, *inputs) ->
# symbolic tensors.
LAYERS: dict[str, Callable[..., Any]] = {}

# Types of Keras that a Graph has a wider one for, int32 -> the numbers they hold. The tracer keeps to them: sums and
# products wrap around as Keras' do.
NARROW = {
    "int8": (-(2**7), 2**7 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "uint16": (0, 2**16 - 1),
    "uint32": (0, 2**32 - 1),
}
WRAPPING = frozenset(  # operations that may give what their narrow type does not hold
    "Add Subtract Multiply Power Negative Absolute Abs Square FloorDivide Cast SaturateCast Matmul Dot Einsum".split()
)
WITHOUT_EFFECT = frozenset({"name", "flash_attention", "sparse", "ragged"})  # arguments that change no number


class UnsupportedError(Exception):
    """What of an operation has no translation."""


class RefusedError(keras_private.UnchangedError):
    """The sentence that names the operation or layer which cannot be traced."""


def _registers(table: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    def named(*names: str) -> Callable[..., Any]:
        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            for name in names:
                if name in table:
                    raise ValueError(f"{name} is translated twice: by {table[name].__name__} and {function.__name__}.")
                table[name] = function
            return function

        return register

    return named


translates = _registers(OPERATIONS)  # a decorator, given the names of Keras' operations
translates_layer = _registers(LAYERS)


def graph_dtype(dtype: Any) -> str:
    """The type in a Graph of what has this type in Keras."""
    dtype = keras.backend.standardize_dtype(dtype)
    return "float32" if "float" in dtype else dtype if dtype in ("bool", "uint8") else "int32"


def narrow(dtype: Any) -> str | None:
    """A type of Keras that is narrower than its type in a Graph; `None` if it is not."""
    dtype = keras.backend.standardize_dtype(dtype)
    return dtype if dtype in NARROW else None


def axes_of(axis: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Sorted non-negative axes; None means all."""
    if axis is None:
        return tuple(range(rank))
    return tuple(sorted(a % rank for a in ([axis] if isinstance(axis, int) else axis)))


def pair(x: int | Sequence[int], n: int = 2) -> tuple[int, ...]:
    """n integers, of one or of a sequence."""
    return (int(x),) * n if isinstance(x, int) else tuple(int(i) for i in x)


class Tracer:
    """Holds the Graph being built; translations make its nodes with `build` and read Keras' tensors with `value`.

    Args:
        name: of the model.
        weightless: whether variables are taken as zeros: views of one number, which take no memory.
    """

    def __init__(self, name: str, weightless: bool = False) -> None:
        self.build = Builder(name)
        self.weightless = weightless
        self.path: list[str] = []  # names of the layers being called
        self.keep: list[Any] = []  # constants' sources stay alive, so that their id() stays theirs
        self.traced = keras_private.traced_type()

    # ---- values

    def wrap(self, result: Any) -> Any:
        """Symbolic tensors of Values, or lists of them."""
        if isinstance(result, (list, tuple)):
            return [self.wrap(r) for r in result]
        return self.traced(result)

    def is_traced(self, x: Any) -> bool:
        return isinstance(x, self.traced)

    def any_traced(self, *found: Any) -> bool:
        """Whether a symbolic tensor is among these, or in their lists, tuples and dicts."""
        return any(
            self.is_traced(x)
            or (isinstance(x, (list, tuple)) and self.any_traced(*x))
            or (isinstance(x, dict) and self.any_traced(*x.values()))
            for x in found
        )

    def array(self, x: Any, dtype: Any = None) -> np.ndarray:
        """A constant (a variable, a backend tensor or numbers) in numpy; copied, unless nothing can write to it."""
        ours = False
        if self.weightless and isinstance(x, keras.Variable):
            x = np.broadcast_to(np.zeros((), "float32"), x.shape)
        elif not isinstance(x, (int, float, bool, list, tuple, np.ndarray, np.generic)):
            x = keras.ops.convert_to_numpy(x)
            ours = x.flags.owndata  # a copy already, not a view of the backend's memory
        x = np.asarray(x)
        kept = x.dtype.name if x.dtype in (np.bool_, np.uint8) else None
        if x.dtype.kind in "iu" and x.dtype.itemsize > 2 and x.size:
            held = np.iinfo(np.int32)
            if x.min() < held.min or x.max() > held.max:
                raise UnsupportedError(f"it reads whole numbers from {x.min()} to {x.max()}, and int32 is the widest")
        dtype = dtype or kept or ("int32" if x.dtype.kind in "iu" else "float32")
        return x.astype(dtype, copy=x.flags.writeable and not ours)

    def value(self, x: Any) -> Value:
        """The Value of a symbolic tensor, or a constant one."""
        if isinstance(x, Value):
            return x
        return x.traced_value if self.is_traced(x) else self.constant(self.array(x), x)

    def operands(self, *xs: Any, least: str = "bool") -> list[Value]:
        """The Values of operands, all of the type that Keras' promotion gives them, or of the type `least` if that is
        wider. Python's numbers are weak: an integer takes the others' type unless they are bool, and a float makes
        integers float32. Arrays and tensors bring their own type."""
        read = [x if isinstance(x, Value) else x.traced_value if self.is_traced(x) else self.array(x) for x in xs]
        strong = [str(r.dtype) for x, r in zip(xs, read, strict=True) if type(x) not in (int, float)]
        target = promote(least, *strong)
        if any(type(x) is float for x in xs):
            target = "float32"
        elif target == "bool" and any(type(x) is int for x in xs):
            target = "int32"
        if target == "uint8" and any(type(x) is int and not 0 <= x <= 255 for x in xs):
            raise UnsupportedError(
                "its operand of uint8 makes the other, a number, uint8, which holds 0 to 255: cast it"
            )
        return [
            self.cast(r, target) if isinstance(r, Value) else self.constant(r.astype(target, copy=False), x)
            for x, r in zip(xs, read, strict=True)
        ]

    def floats(self, x: Any) -> Value:
        """The Value of an operand of what computes in floats only."""
        return self.operands(x, least="float32")[0]

    def constant(self, array: np.ndarray, source: Any = None, name: str = "constant", form: str = "") -> Value:
        """A constant, one Value for each source (a variable, say) and form of it."""
        name = getattr(source, "name", None) or name
        if source is None or isinstance(source, (int, float, bool)):
            return self.build.constant(array, name)
        self.keep.append(source)
        return self.build.constant(array, name, key=(id(source), form, array.dtype.name))

    # ---- steps that several translations take; each does nothing where nothing changes

    def cast(self, x: Value, dtype: str) -> Value:
        return x if x.dtype == dtype else self.build("cast", x, dtype=dtype)

    def reshape(self, x: Value, shape: Sequence[int | None]) -> Value:
        """One entry of the shape may be -1 or None: what remains."""
        sizes = [-1 if d is None else int(d) for d in shape]
        if -1 in sizes:
            sizes[sizes.index(-1)] = math.prod(x.shape) // max(1, -math.prod(sizes))
        return x if tuple(sizes) == x.shape else self.build("reshape", x, shape=tuple(sizes))

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        perm = tuple(int(p) % len(x.shape) for p in perm)
        return x if perm == tuple(range(len(perm))) else self.build("transpose", x, perm=perm)

    def cut(self, x: Value, axis: int, begin: int, end: int) -> Value:
        """x[begin:end] along one axis."""
        n = len(x.shape)
        if (begin, end) == (0, x.shape[axis]):
            return x
        return self.build(
            "slice",
            x,
            begin=tuple(begin if i == axis else 0 for i in range(n)),
            end=tuple(end if i == axis else x.shape[i] for i in range(n)),
            strides=(1,) * n,
        )

    def image(self, operation: Any, x: Any) -> Value:
        """The feature map (B,H,W,C) that an operation with a data format takes."""
        if keras.backend.image_data_format() != "channels_last" or operation.data_format == "channels_first":
            raise UnsupportedError("it is channels first; keras_vits is channels last throughout")
        x = self.value(x)
        if len(x.shape) != 4:
            raise UnsupportedError(f"only 2-D images are; the input has shape {x.shape}")
        return x

    # ---- what Keras calls

    def hooks(self) -> contextlib.AbstractContextManager[None]:
        """While it is open, calls that see a symbolic tensor of this tracer come here."""
        return keras_private.intercepted(self.any_traced, self.operation, self.layer, recurrence)

    def layer(self, layer: keras.Layer, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self.path.append(layer.name)
        before, self.build.layer = self.build.layer, "/".join(self.path[1:])
        special = LAYERS.get(type(layer).__name__) if keras_private.is_own_layer(layer) else None
        try:
            return special(self, layer, *args, **kwargs) if special else layer.call(*args, **kwargs)
        except (keras_private.UnchangedError, MemoryError):
            raise
        except Exception as e:
            why = (
                "its call asks for the numbers of its input, or hands it to functions that are not Keras'; write it "
                "with keras.ops"
            )
            why = f"{e}" if isinstance(e, UnsupportedError) else why
            raise RefusedError(
                f"The {self.where()} of class {type(layer).__name__} cannot be translated to a phone's graph: {why}."
            ) from e
        finally:
            self.path.pop()
            self.build.layer = before

    def where(self) -> str:
        """What is being called, in words."""
        return f"layer {'/'.join(self.path[1:])!r}" if len(self.path) > 1 else f"model {self.build.graph.name!r}"

    def operation(self, operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not keras_private.is_primitive(operation):
            return operation.call(*args, **kwargs)  # a composite: it runs on keras.ops itself
        cls = type(operation)
        translation = OPERATIONS.get(cls.__name__)
        if translation is None:
            raise RefusedError(
                f"The operation {cls.__name__} in {self.where()} has no translation to a phone's graph; use an "
                "operation that has."
            )
        if kwargs:
            args, kwargs = _by_place(cls, operation, args, kwargs)
        read = _Read(operation)
        try:
            result = translation(self, read, *args, **kwargs)
            read.check()
            return self._typed(operation, args, kwargs, result)
        except (keras_private.UnchangedError, MemoryError):
            raise
        except Exception as e:
            why = f"{e}" if isinstance(e, (UnsupportedError, ValueError)) else "its arguments are not what it takes"
            raise RefusedError(
                f"The operation {cls.__name__} in {self.where()} cannot be translated to a phone's graph: "
                f"{why.rstrip('.')}."
            ) from (None if isinstance(e, UnsupportedError) else e)

    def _typed(self, operation: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Any:
        """The symbolic tensors of Values, of the types that Keras gives them.

        Of int32 and float32 a Graph's own types are Keras'. Of others Keras is asked: what it gives may be narrower
        than what the translation computed in.
        """
        given, name = [x for x in _each((args, kwargs)) if self.is_traced(x)], type(operation).__name__
        plain = all(x.dtype in ("float32", "int32") for x in given)
        if plain and not (name.endswith("Cast") and narrow(operation.dtype)):
            return self.wrap(result)
        if name in ("Subtract", "Negative") and any(x.dtype == "uint32" for x in given):
            raise UnsupportedError(
                "its operand is of uint32, a sum of uint8, which wraps around below 0: cast it to int32"
            )
        specs = keras.tree.flatten(operation.compute_output_spec(*args, **kwargs))
        if not isinstance(result, (list, tuple)):
            return self._as_typed(result, specs[0].dtype, name)
        return [self._as_typed(value, spec.dtype, name) for value, spec in zip(result, specs, strict=True)]

    def _as_typed(self, value: Value, dtype: str, name: str) -> Any:
        if value.dtype != "int32" or dtype == "int32" or ("int" not in dtype and dtype != "bool"):
            return self.wrap(value)
        if dtype in ("uint8", "bool"):
            return self.wrap(self.cast(value, dtype))
        if dtype in NARROW and dtype != "uint32" and name in WRAPPING:
            low, high = NARROW[dtype]
            shifted = self.build("add", value, self.value(-low)) if low else value
            value = self.build("mod", shifted, self.value(high - low + 1))
            value = self.build("add", value, self.value(low)) if low else value
        return self.traced(value, narrow(dtype))


def _each(given: Any) -> Iterator[Any]:
    """What is in lists and dictionaries of any depth. Keras' own function walks through PyTorch's there, which takes a
    tenth of the time of tracing."""
    if isinstance(given, dict):
        given = given.values()
    elif not isinstance(given, (list, tuple)):
        yield given
        return
    for one in given:
        yield from _each(one)


class _Read:
    """An operation whose attributes are noted as a translation reads them, so that none of its arguments is ignored."""

    def __init__(self, operation: Any) -> None:
        self._operation, self._found = operation, set()

    def __getattr__(self, name: str) -> Any:
        self._found.add(name)
        return getattr(self._operation, name)

    def check(self) -> None:
        """Raises an `UnsupportedError` for an argument that is not the default one and that nothing has read."""
        for name, default in _arguments(type(self._operation)).items():
            if name in self._found:
                continue
            value = getattr(self._operation, name, default)
            if value is not default and not (type(value) is type(default) and value == default):
                raise UnsupportedError(f"its argument {name}={value!r} has no translation")


@functools.cache
def _arguments(cls: type) -> dict[str, Any]:
    """Name -> default of what the class of an operation is made with and what changes its result."""
    found = list(inspect.signature(cast(Any, cls).__init__).parameters.values())[1:]
    return {p.name: p.default for p in found if p.name not in WITHOUT_EFFECT and p.kind is not p.VAR_KEYWORD}


@functools.cache
def _signature(cls: Any) -> inspect.Signature:
    return inspect.signature(cls.call)


def _by_place(cls: type, operation: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call in the order of Keras' signature, and what has no place in it."""
    bound = _signature(cls).bind(operation, *args, **kwargs)
    bound.apply_defaults()
    return bound.args[1:], bound.kwargs
