"""Running .tflite files: the interpreter of whichever package is installed, and what is read of a file in it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits._util.progress import progress
from keras_vits._util.terminal import quiet
from keras_vits.graph.ir import histogram
from keras_vits.specs import InputSpec

from ...artifact import Artifact, check
from .._batches import join, split
from .packages import INSTALL, require

PACKAGES = (  # (module, package), the first one that is installed runs files
    ("ai_edge_litert", "ai-edge-litert"),
    ("tflite_runtime", "tflite-runtime"),
    ("tensorflow.lite", "tensorflow"),
)


def load(artifact: Artifact, threads: int = 2) -> Runner:
    """A `Runner` of an artifact.

    Args:
        artifact: of a .tflite file.
        threads: for the interpreter.

    Raises:
        ValueError: see `Runner`, or the file is not the one that was written.
    """
    check(artifact)
    return Runner(artifact.path, threads, artifact.inputs, artifact.output_names)


def interpreter_class() -> tuple[Any, str]:
    """The LiteRT interpreter class and its "package version": ai_edge_litert, else tflite_runtime, else TensorFlow.

    Raises:
        ImportError: none of them is installed.
    """
    for module, package in PACKAGES:
        try:
            with quiet():
                cls = importlib.import_module(
                    f"{module}.interpreter" if module != "tensorflow.lite" else "tensorflow"
                ).__dict__
            cls = cls["Interpreter"] if "Interpreter" in cls else cls["lite"].Interpreter
            return cls, f"{module} {_version(package)}"
        except (ImportError, KeyError):
            continue
    raise ImportError(f"No LiteRT interpreter is installed: {INSTALL}")


@functools.cache  # Python looks through all installed packages for it
def _version(package: str) -> str:
    return importlib.metadata.version(package)


def opened(path: str | pathlib.Path, **options: Any) -> tuple[Any, str]:
    """(interpreter of a file, with its tensors; "package version" of the runtime).

    Args:
        path: of the file.
        **options: of the interpreter.

    Raises:
        ValueError: the runtime cannot run the file.
    """
    path = pathlib.Path(path)
    head = b""
    if path.is_file():
        with open(path, "rb") as file:
            head = file.read(8)
    if head[4:] != b"TFL3":
        raise ValueError(f"{path} is not a .tflite file: {'it does not start like one' if head else 'no such file'}.")
    try:
        return _allocated(path, **options)
    except (ValueError, RuntimeError) as e:
        raise ValueError(
            f"{path} cannot be run: the file is truncated or damaged ({_first_line(e)}). Export it again."
        ) from None


def _allocated(path: pathlib.Path, **options: Any) -> tuple[Any, str]:
    cls, runtime = interpreter_class()
    # TensorFlow's, taken where no other is there, is deprecated; all of them tell stderr of XNNPACK
    with warnings.catch_warnings(action="ignore"), quiet(show_failure=False):
        interpreter = cls(model_path=str(path), **options)
        interpreter.allocate_tensors()
    return interpreter, runtime


def _first_line(e: Exception) -> str:
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__


def checked(path: str | pathlib.Path) -> str:
    """The runtime's "package version", after it has accepted a file that was just written.

    Raises:
        ValueError: it refuses an operation, which is named with its layer.
    """
    path = pathlib.Path(path)
    try:
        return _allocated(path, experimental_op_resolver_type=_without_delegates())[1]
    except (ValueError, RuntimeError) as e:
        raise ValueError(
            f"{interpreter_class()[1]} refuses {_refused(path, str(e))} of the file that was to be written "
            f"({_first_line(e)}): nothing was written. Compute that layer by other operations, and report this."
        ) from None


def _refused(path: pathlib.Path, said: str) -> str:
    """The operation that the runtime names by its number, with its layer."""
    from .flatbuffer import File

    found = re.search(r"[Nn]ode number (\d+) \((\w+)\)", said)
    if found is None:
        return "an operation"
    file, number = File(path.read_bytes()), int(found[1])
    if number >= len(file.main.operators):
        return f"the operation {found[2]}"
    layer = file.name(file.main.operators[number].outputs[0]).rpartition("/")[0]
    return f"the operation {found[2]} in layer {layer!r}"


def of_bytes(content: bytes, keep: bool = False) -> Any:
    """An interpreter of a file's bytes.

    Args:
        content: of the file.
        keep: whether it keeps every tensor, and runs slowly.
    """
    options = dict(experimental_op_resolver_type=_without_delegates(), experimental_preserve_all_tensors=True)
    # "preserve_all_tensors is for debugging": it is what it is for
    with warnings.catch_warnings(action="ignore"):
        return _opened(content, num_threads=2, **(options if keep else {}))


def alone(content: bytes) -> Any:
    """An interpreter of a file's bytes that leaves nothing to XNNPACK."""
    return _opened(content, show_failure=False, experimental_op_resolver_type=_without_delegates())


def _opened(content: bytes, show_failure: bool = True, **options: Any) -> Any:
    with quiet(show_failure=show_failure):
        interpreter = interpreter_class()[0](model_content=content, **options)
        interpreter.allocate_tensors()
    return interpreter


def set_inputs(interpreter: Any, arrays: Sequence[np.ndarray]) -> None:
    """Gives an interpreter an array for each of its inputs, in the file's order."""
    for detail, array in zip(interpreter.get_input_details(), arrays, strict=True):
        interpreter.set_tensor(detail["index"], array)


def outputs(interpreter: Any, images: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Every output of floating-point numbers of an interpreter for every batch, each in one float64 array."""
    details = [d for d in interpreter.get_output_details() if np.dtype(d["dtype"]).kind == "f"]
    found = []
    for arrays in images:
        set_inputs(interpreter, arrays)
        interpreter.invoke()
        found.append([interpreter.get_tensor(d["index"]).astype(np.float64) for d in details])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def _without_delegates() -> Any:
    return require("ai_edge_litert.interpreter").OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Says of which file the interpreter complains: of inputs that do not fit, or of operations and names in it."""
    try:
        yield
    except (ValueError, RuntimeError) as e:  # of names that are no text, too
        reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise ValueError(f"{path} cannot be run on what it was given: {reason}") from None


class Runner:
    """Runs a .tflite file on the host with XNNPACK.

    Args:
        path: of the file.
        threads: for the interpreter.
        inputs: the artifact's `InputSpec`s; without them, arrays are taken as the file takes them.
        outputs: names of the outputs in the file's order; `output_{i}` by default.

    Attributes:
        runtime: name and version of the package that runs it.
        verified_by: what a check by this runner rests on.

    Raises:
        ValueError: the file is not a .tflite file, is truncated, or holds an operation that the runtime lacks.
    """

    def __init__(
        self, path: str | pathlib.Path, threads: int = 2, inputs: Sequence[InputSpec] = (), outputs: Sequence[str] = ()
    ) -> None:
        self.path = pathlib.Path(path)
        self.interpreter, self.runtime = opened(path, num_threads=threads)
        self.file = pathlib.Path(path).name
        self.verified_by = self.runtime
        self.specs = tuple(inputs)
        with _naming(self.path):
            self.inputs = self.interpreter.get_input_details()
            count = len(self.interpreter.get_output_details())
            self.signature = next(iter(self.interpreter.get_signature_list()), None)
        self.outputs = tuple(outputs) or tuple(f"output_{i}" for i in range(count))

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """One invocation: arrays of the file's shapes and dtypes -> outputs in the file's order.

        Raises:
            ValueError: arrays of other shapes or dtypes, or a file whose operations do not fit each other.
        """
        with _naming(self.path):
            set_inputs(self.interpreter, arrays)
            self.interpreter.invoke()
            return [self.interpreter.get_tensor(o["index"]) for o in self.interpreter.get_output_details()]

    def predict(self, inputs: np.ndarray | Mapping[str, np.ndarray]) -> np.ndarray | dict[str, np.ndarray]:
        """Runs any number N of examples, padding the last batch with zeros.

        Args:
            inputs: the array (N,...) of the one input, images as (N,H,W,C), or name -> array.

        Returns:
            The array (N,...) of the one output, or name -> array where the file has several.

        Raises:
            ValueError: see `_batches.checked`.
        """
        count, batches = self.batches(inputs)
        runs = progress(batches, f"Running {self.path.name}")
        return join(self.outputs, count, len(batches[0][0]), [self.run(*arrays) for arrays in runs])

    def batches(self, inputs: np.ndarray | Mapping[str, np.ndarray]) -> tuple[int, list[list[np.ndarray]]]:
        """N, and the arrays of each invocation as the file takes them, the last one padded with zeros."""
        dtypes = [detail["dtype"] for detail in self.inputs]
        return split(inputs, self.specs, dtypes, int(self.inputs[0]["shape"][0]), self.file)

    def partitions(self) -> int:
        """Number of XNNPACK partitions; what none of them computes tells `outside`."""
        return sum(op["op_name"] == "DELEGATE" for op in self.interpreter._get_ops_details())

    def outside(self) -> dict[str, int]:
        """Number of operations by name that are in no XNNPACK partition; {}: the whole file runs on it."""
        steps = self.interpreter._get_ops_details()  # the file's operations, then a DELEGATE for each partition
        made = {int(i): step for step in steps if step["op_name"] != "DELEGATE" for i in step["outputs"]}
        inside: set[int] = set()
        for part in steps:
            if part["op_name"] == "DELEGATE":
                given, wanted = set(map(int, part["inputs"])), list(map(int, part["outputs"]))
                while wanted:
                    step = made.get(wanted.pop())
                    if step is not None and step["index"] not in inside:
                        inside.add(step["index"])
                        wanted += [i for i in map(int, step["inputs"]) if i not in given]
        return histogram(s["op_name"] for s in steps if s["op_name"] != "DELEGATE" and s["index"] not in inside)

    def histogram(self) -> dict[str, int]:
        """Number of operations in the file by name, most frequent first."""
        with _naming(self.path):
            names = [op["op_name"] for op in self.interpreter._get_ops_details()]
        return histogram(name for name in names if name != "DELEGATE")


# ---------------------------------------------------------------- in the process that measures


def run(order: Mapping[str, Any]) -> Callable[[], tuple[Callable[..., Any], str]]:
    """See `Target.run`."""
    cls = importlib.import_module(order["interpreter"]).Interpreter

    def load() -> tuple[Callable[..., Any], str]:
        interpreter = cls(model_path=order["path"], num_threads=order["threads"])
        interpreter.allocate_tensors()
        inputs, outputs = (
            [d["index"] for d in f()] for f in (interpreter.get_input_details, interpreter.get_output_details)
        )

        def invoke(*arrays: np.ndarray) -> list[np.ndarray]:
            for index, array in zip(inputs, arrays, strict=True):
                interpreter.set_tensor(index, array)
            interpreter.invoke()
            return [interpreter.get_tensor(i) for i in outputs]

        return invoke, order["runtime"]

    return load


def order(artifact: Artifact) -> dict[str, str]:
    """What `run` has to be told beside path and threads; see `Traits.order`."""
    interpreter, runtime = interpreter_class()
    return {"interpreter": interpreter.__module__, "runtime": runtime}
