"""Every private hook of Keras that this package uses, in one place.

Keras has no public way to run a model on tensors of one's own, to give a variable its first value, or to follow its
functional graph. Whatever does stands here, as a small function or context manager; no other file of keras_vits or
edge names `keras.src` or a private attribute of Keras' classes (a test sees to it). `check` names what an unknown
Keras lacks, once, before the first use.
"""

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras

HOOKS = {  # module -> the names in it that are replaced or read
    "keras.src.ops.operation": ("Operation.symbolic_call",),
    "keras.src.layers.layer": ("Layer.symbolic_call", "Node"),
    "keras.src.backend.common.keras_tensor": ("KerasTensor",),
    "keras.src.backend.common.variables": (
        "AutocastScope.maybe_cast",
        "Variable._deferred_initialize",
    ),
    "keras.src.backend.common.global_state": ("get_global_attribute", "set_global_attribute"),
    "keras.src.backend": ("numpy", "nn", "math", "core", "image", "linalg", "convert_to_tensor", "cast", "shape"),
    "keras.src.models.functional": ("Functional._run_through_graph", "Functional._standardize_inputs"),
    "keras.src.layers": ("Layer._flatten_layers",),
}
SPACES = ("numpy", "nn", "math", "core", "image", "linalg")  # of the backend, whose functions keras.ops calls
KEPT = ("cond", "is_tensor", "map", "scan", "vectorized_map")  # of them: these take functions, or tell types
PENDING = "uninitialized_variables"  # Keras' list of the variables that its next scope would initialize


def check() -> None:
    """Raises an ImportError that names what is missing when this Keras lacks a hook of HOOKS."""
    missing = []
    for module, names in HOOKS.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            missing.append(module)
            continue
        missing += [f"{module}.{name}" for name in names if not _has(found, name)]
    if missing:
        raise ImportError(
            f"Keras {keras.__version__} lacks {', '.join(missing)}, which keras_vits needs. Install one that this "
            'release was tested with: pip install "keras>=3.15,<3.16"'
        )


_check_once = functools.cache(check)


def _has(holder: Any, dotted: str) -> bool:
    for name in dotted.split("."):
        if not hasattr(holder, name):
            return False
        holder = getattr(holder, name)
    return True


# ---------------------------------------------------------------- variables


@contextlib.contextmanager
def values_later() -> Iterator[None]:
    """Variables that are made here have no values until `set_value` or `initialize` gives them one."""
    _check_once()
    from keras.src.backend.common import global_state

    waiting = list(global_state.get_global_attribute(PENDING) or ())
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:  # off Keras' list: otherwise its next scope would initialize them, also those of a model that failed
        global_state.set_global_attribute(PENDING, waiting)


def has_value(variable: keras.Variable) -> bool:
    """Whether the variable has its first value."""
    return variable._value is not None


def set_value(variable: keras.Variable, value: Any) -> None:
    """Assigns an array to a variable, also as its first value; it then belongs to the variable (PyTorch shares it)."""
    if has_value(variable):
        variable.assign(value)
        return
    _check_once()
    variable._initializer = lambda shape, dtype=None: keras.ops.convert_to_tensor(value, dtype)
    variable._deferred_initialize()


def initialize(model: keras.Model) -> None:
    """Gives the variables of a model that still have no value their initial one."""
    for variable in model.variables:
        if not has_value(variable):
            _check_once()
            variable._deferred_initialize()


# ---------------------------------------------------------------- functional models


def flatten_layers(layer: keras.Layer, include_self: bool = True) -> list[keras.Layer]:
    """All layers inside a layer, at any depth, behind the layer itself."""
    return list(layer._flatten_layers(include_self=include_self))


def run_operations(model: keras.Model, inputs: Any, operation_fn: Callable[[Any], Any]) -> Any:
    """Runs a functional model's graph on inputs, with `operation_fn(operation)` called in place of each operation."""
    return model._run_through_graph(model._standardize_inputs(inputs), operation_fn=operation_fn)


def hears_of_clones(cls: type) -> type:
    """A class of functional models whose `_cloned(made, outputs)` is called when one of them is cloned.

    `keras.models.clone_model` runs the model's graph with a function that gives a layer in place of each, and passes
    the results to a constructor. In between we are told `made`: layer -> the layer in its place, and the `outputs`.
    """

    def _run_through_graph(self: Any, inputs: Any, operation_fn: Any = None, call_fn: Any = None) -> Any:
        run = super(cls, self)._run_through_graph
        if operation_fn is None:
            return run(inputs, call_fn=call_fn)
        made: dict[Any, Any] = {}
        outputs = run(inputs, operation_fn=lambda layer: made.setdefault(layer, operation_fn(layer)), call_fn=call_fn)
        if isinstance(outputs, keras.KerasTensor) and call_fn is None:
            self._cloned(made, outputs)
        return outputs

    cls._run_through_graph = _run_through_graph
    return cls


# ---------------------------------------------------------------- tracing

_lock = threading.RLock()  # the hooks are replaced for the whole process: one trace at a time


def traced_type() -> type:
    """A subclass of KerasTensor whose instances are made of a Value and know it as `traced_value`."""
    _check_once()
    from keras.src.backend.common.keras_tensor import KerasTensor

    class Traced(KerasTensor):
        """A symbolic tensor that knows its Value."""

        def __init__(self, value: Any) -> None:
            super().__init__(value.shape, dtype=value.dtype, record_history=False)
            self.traced_value = value

    return Traced


def is_primitive(operation: Any) -> bool:
    """Whether the operation is one of keras.ops itself, not a user's or a layer's that is made of them."""
    return type(operation).__module__.startswith("keras.src.ops")


@contextlib.contextmanager
def intercepted(
    concerned: Callable[..., bool],
    operation: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any],
    layer: Callable[[keras.Layer, tuple[Any, ...], dict[str, Any]], Any],
) -> Iterator[None]:
    """Calls of Keras' operations and layers that concern us go to the given functions, all others through untouched.

    A backend's function goes to the `keras.ops` function of its name, which makes an operation of it; no Keras node is
    recorded, so that the model does not change; and in this thread a mixed policy's compute dtype does not round
    variables.

    Args:
        concerned: (*anything) -> whether a tensor of ours is among the arguments, at any depth.
        operation: (operation, args, kwargs) -> what it gives.
        layer: (layer, args, kwargs) -> what it gives.

    Raises:
        ImportError: this Keras lacks a hook.
    """
    check()
    from keras.src import backend
    from keras.src.backend.common.variables import AutocastScope
    from keras.src.layers import layer as layer_module
    from keras.src.layers.layer import Layer
    from keras.src.ops.operation import Operation

    undo = []

    def replace(holder: Any, name: str, new: Any) -> None:
        undo.append((holder, name, getattr(holder, name)))
        setattr(holder, name, new)

    def reroute(holder: Any, name: str, target: Callable[..., Any]) -> None:
        original = getattr(holder, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            return target(*args, **kwargs) if concerned(args, kwargs) else original(*args, **kwargs)

        replace(holder, name, function)

    with _lock:
        operation_call, layer_call, node = Operation.symbolic_call, Layer.symbolic_call, layer_module.Node
        maybe_cast, thread = AutocastScope.maybe_cast, threading.get_ident()

        def on_operation(called: Any, *args: Any, **kwargs: Any) -> Any:
            if not concerned(args, kwargs):
                return operation_call(called, *args, **kwargs)
            return operation(called, args, kwargs)

        def on_layer(called: keras.Layer, *args: Any, **kwargs: Any) -> Any:
            if not concerned(args, kwargs):
                return layer_call(called, *args, **kwargs)
            return layer(called, args, kwargs)

        def on_node(*args: Any, **kwargs: Any) -> Any:
            return None if concerned(args, kwargs) else node(*args, **kwargs)

        def on_autocast(scope: Any, value: Any) -> Any:
            return value if threading.get_ident() == thread else maybe_cast(scope, value)

        try:
            for space in SPACES:
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
