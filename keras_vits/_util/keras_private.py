"""Every private hook of Keras that this package uses, in one place.

Keras has no public way to run a model on tensors of one's own, to give a variable its first value, or to follow its
functional graph. Whatever does stands here, as a small function or context manager; no other file of keras_vits or
edge names `keras.src` or a private attribute of Keras' classes (a test sees to it). `check` names what an unknown
Keras lacks, once, before the first use.
"""

import contextlib
import functools
import importlib
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_vits._util.scratch import redirected

FUNCTIONS = ("convert_to_tensor", "cast", "shape")  # of the backend itself
FUSED_RNN = ("lstm", "gru", "bidirectional_lstm", "bidirectional_gru")  # of a backend; Keras does without them, too
HOOKS = {  # module -> the names in it that are replaced or read
    "keras.src.ops.operation": ("Operation.symbolic_call",),
    "keras.src.layers.layer": ("Layer.symbolic_call", "Node"),
    "keras.src.backend.common.keras_tensor": ("KerasTensor",),
    "keras.src.backend.common.variables": (
        "AutocastScope.maybe_cast",
        "Variable._deferred_initialize",
        "Variable.assign",
    ),
    "keras.src.backend.common.stateless_scope": ("in_stateless_scope",),
    "keras.src.backend.common.global_state": ("get_global_attribute", "set_global_attribute"),
    "keras.src.backend": ("numpy", "nn", "math", "core", "image", "linalg", "random", "rnn", *FUNCTIONS, *FUSED_RNN),
    "keras.src.random.seed_generator": ("SeedGenerator.next",),
    "keras.src.models.functional": ("Functional._run_through_graph", "Functional._standardize_inputs"),
    "keras.src.layers": ("Layer._flatten_layers",),
    "keras.src.utils.module_utils": ("tensorflow._available",),
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


@contextlib.contextmanager
def values_at_the_end(check: Callable[[list[keras.Variable]], None]) -> Iterator[None]:
    """Variables that are made here get their first values at the end, after `check` has seen all of them.

    Where whoever called wants them later (`values_later`, a `keras.StatelessScope`), they get none here either.
    """
    _check_once()
    from keras.src.backend.common import global_state
    from keras.src.backend.common.stateless_scope import in_stateless_scope

    waiting = list(global_state.get_global_attribute(PENDING) or ())
    made = lambda: list(global_state.get_global_attribute(PENDING) or ())[len(waiting) :]
    if in_stateless_scope():
        yield
        check(made())
        return
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
            variables = made()
            check(variables)
    finally:
        global_state.set_global_attribute(PENDING, waiting)
    for variable in variables:
        variable._deferred_initialize()


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


# ---------------------------------------------------------------- saving


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Keras saves without importing TensorFlow, which it does wherever that is installed, to ask whether a value in the
    configuration is one of TensorFlow's. Where nobody has imported it, none is: six seconds of CPU and its start-up
    messages, in the middle of a training on JAX or PyTorch, are for nothing."""
    from keras.src.utils import module_utils

    lazy = module_utils.tensorflow
    if "tensorflow" in sys.modules or vars(lazy).get("_available", True) is not None:
        yield
        return
    lazy._available = False
    try:
        yield
    finally:
        lazy._available = None


@contextlib.contextmanager
def temporary_files() -> Iterator[None]:
    """What Keras puts into temporary folders while it saves or loads lies in ours, which the next process removes if
    this one is killed."""
    with redirected("keras.src.saving.saving_lib") as folder:
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def save_model(model: keras.Model, path: pathlib.Path) -> None:
    """Writes a .keras file to a path that has not its name yet."""
    with without_tensorflow(), temporary_files():
        keras.saving.save_model(model, path)


def writes_legacy_file() -> bool:
    """Whether a configuration is asked for to be written to Keras' legacy `.h5`."""
    _check_once()
    from keras.src.backend.common import global_state

    return bool(global_state.get_global_attribute("use_legacy_config", False))


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


class UnchangedError(ValueError):
    """An error that Keras passes on as it is: to others it adds the arguments of the layer that was called."""

    _keras_call_info_injected = True


def traced_type() -> type:
    """A subclass of KerasTensor whose instances are made of a Value and know it as `traced_value`.

    To the right of a backend's tensor or a numpy array it takes the operation over: JAX and numpy would ask for its
    numbers, if it had the method for that.
    """
    _check_once()
    from keras.src.backend.common.keras_tensor import KerasTensor

    class Traced(KerasTensor):
        """A symbolic tensor that knows its Value, and its type in Keras, which may be narrower."""

        __array_ufunc__ = None

        def __init__(self, value: Any, dtype: str | None = None) -> None:
            super().__init__(value.shape, dtype=dtype or value.dtype, record_history=False)
            self.traced_value = value

        @property
        def __jax_array__(self) -> Any:
            raise AttributeError("A symbolic tensor has no numbers.")

        __hash__ = object.__hash__

        def __eq__(self, other: Any) -> Any:
            """Of entries, as in every backend; a KerasTensor would compare objects, and say False."""
            if other is None or isinstance(other, (str, tuple, list, dict)):
                return NotImplemented
            return keras.ops.equal(self, other)

    return Traced


def is_primitive(operation: Any) -> bool:
    """Whether the operation is one of keras.ops itself, not a user's or a layer's that is made of them."""
    return _is_of(type(operation), "keras.src.ops.")


def is_own_layer(layer: keras.Layer) -> bool:
    """Whether the layer's class is one that Keras itself has, not one derived from it or of the same name."""
    return _is_of(type(layer), "keras.src.layers.")


def _is_of(cls: type, package: str) -> bool:
    """Whether a class is what a module of the package has under its name."""
    module = sys.modules.get(cls.__module__) if cls.__module__.startswith(package) else None
    return getattr(module, cls.__name__, None) is cls


def functional(model: keras.Model) -> Any:
    """The functional model that a model is, or that a `Sequential` which knows its input holds; otherwise `None`."""
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if getattr(model, "inputs", None) else None


def _no_fused_rnn(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError  # Keras then runs the cell step by step


def _nothing_dropped(inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Dropout's mask, which a recurrent cell makes in inference, too, and then does not use."""
    return inputs


def _no_state(variable: keras.Variable, value: Any) -> None:
    raise UnchangedError(
        f"The variable {variable.path!r} is written to whenever the model runs, and a file keeps nothing between two "
        "runs. Build that layer without a state of its own (stateful=False)."
    )


@contextlib.contextmanager
def intercepted(
    concerned: Callable[..., bool],
    operation: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any],
    layer: Callable[[keras.Layer, tuple[Any, ...], dict[str, Any]], Any],
    recurrence: Callable[..., Any],
) -> Iterator[None]:
    """Calls of Keras' operations and layers that concern us go to the given functions, all others through untouched.

    A backend's function goes to the `keras.ops` function of its name, which makes an operation of it, also where a
    preprocessing layer asks for it by the backend's name; a recurrent layer's loop over time goes to `recurrence`; no
    Keras node is recorded and no seed moves on, so that the model does not change; and in this thread a mixed policy's
    compute dtype does not round variables.

    Args:
        concerned: (*anything) -> whether a tensor of ours is among the arguments, at any depth.
        operation: (operation, args, kwargs) -> what it gives.
        layer: (layer, args, kwargs) -> what it gives.
        recurrence: with the arguments of Keras' own `backend.rnn`, and its result.

    Raises:
        ImportError: this Keras lacks a hook.
        ValueError: a layer writes what was computed to a variable.
    """
    check()
    from keras.src import backend
    from keras.src.backend.common.variables import AutocastScope, Variable
    from keras.src.layers import layer as layer_module
    from keras.src.layers.layer import Layer
    from keras.src.ops.operation import Operation
    from keras.src.random.seed_generator import SeedGenerator

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
        maybe_cast, next_seed, thread = AutocastScope.maybe_cast, SeedGenerator.next, threading.get_ident()

        def leaves(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
            return lambda tensor, other: NotImplemented if concerned(other) else compare(tensor, other)

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

        def on_seed(generator: Any, *args: Any, **kwargs: Any) -> Any:  # some layers draw in inference, for nothing
            return generator.state.value if threading.get_ident() == thread else next_seed(generator, *args, **kwargs)

        try:
            for space in SPACES:
                module = getattr(backend, space)
                public = getattr(keras.ops, space) if space in ("image", "linalg") else keras.ops
                for name in dir(module):
                    function, target = getattr(module, name), getattr(public, name, None)
                    plain = callable(function) and not isinstance(function, type) and not name.startswith("_")
                    if plain and callable(target) and name not in KEPT:
                        reroute(module, name, target)
            own = importlib.import_module(f"keras.src.backend.{backend.backend()}")  # what preprocessing layers call
            for name in FUNCTIONS:
                reroute(backend, name, getattr(keras.ops, name))
                reroute(own, name, getattr(keras.ops, name))
            reroute(backend, "rnn", recurrence)
            for name in FUSED_RNN:
                reroute(backend, name, _no_fused_rnn)
            reroute(backend.random, "dropout", _nothing_dropped)
            reroute(Variable, "assign", _no_state)
            replace(Operation, "symbolic_call", on_operation)
            replace(Layer, "symbolic_call", on_layer)
            replace(layer_module, "Node", on_node)
            replace(AutocastScope, "maybe_cast", on_autocast)
            replace(SeedGenerator, "next", on_seed)
            if keras.backend.backend() == "tensorflow":  # it converts what stands to the right of a comparison
                tensor = type(backend.convert_to_tensor(0.0))
                for name in ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"):
                    holder = next(cls for cls in tensor.__mro__ if name in vars(cls))
                    replace(holder, name, leaves(getattr(holder, name)))
            yield
        finally:
            for holder, name, original in reversed(undo):
                setattr(holder, name, original)
