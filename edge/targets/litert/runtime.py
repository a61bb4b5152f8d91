"""Running .tflite files: the interpreter of whichever package is installed, and what is read of a file in it."""

from __future__ import annotations

import importlib
import importlib.metadata
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits.graph.ir import histogram
from keras_vits.specs import InputSpec

from ...artifact import Artifact
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
        ValueError: see `Runner`.
    """
    return Runner(artifact.path, threads, artifact.inputs, artifact.output_names)


def interpreter_class() -> tuple[Any, str]:
    """The LiteRT interpreter class and its "package version": ai_edge_litert, else tflite_runtime, else TensorFlow.

    Raises:
        ImportError: none of them is installed.
    """
    for module, package in PACKAGES:
        try:
            cls = importlib.import_module(
                f"{module}.interpreter" if module != "tensorflow.lite" else "tensorflow"
            ).__dict__
            cls = cls["Interpreter"] if "Interpreter" in cls else cls["lite"].Interpreter
            return cls, f"{module} {importlib.metadata.version(package)}"
        except (ImportError, KeyError):
            continue
    raise ImportError(f"No LiteRT interpreter is installed: {INSTALL}")


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
    cls, runtime = interpreter_class()
    try:
        with warnings.catch_warnings(action="ignore"):  # TensorFlow's, taken where no other is there, is deprecated
            interpreter = cls(model_path=str(path), **options)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ValueError(
            f"{path} cannot be run: the file is truncated or damaged ({reason}). Export it again."
        ) from None
    return interpreter, runtime


def checked(path: str | pathlib.Path) -> str:
    """The runtime's "package version", after it has accepted a file.

    Raises:
        ValueError: see `opened`.
    """
    return opened(path, experimental_op_resolver_type=_without_delegates())[1]


def of_bytes(content: bytes, keep: bool = False) -> Any:
    """An interpreter of a file's bytes.

    Args:
        content: of the file.
        keep: whether it keeps every tensor, and runs slowly.
    """
    options = dict(experimental_op_resolver_type=_without_delegates(), experimental_preserve_all_tensors=True)
    with warnings.catch_warnings(action="ignore"):  # "preserve_all_tensors is for debugging": it is what it is for
        interpreter = interpreter_class()[0](model_content=content, num_threads=2, **(options if keep else {}))
    interpreter.allocate_tensors()
    return interpreter


def outputs(interpreter: Any, images: Sequence[np.ndarray]) -> np.ndarray:
    """The first output of an interpreter for every batch, in one float64 array."""
    image, output = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    found = []
    for batch in images:
        interpreter.set_tensor(image, batch)
        interpreter.invoke()
        found.append(interpreter.get_tensor(output).astype(np.float64))
    return np.concatenate(found)


def _without_delegates() -> Any:
    return require("ai_edge_litert.interpreter").OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES


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
        self.interpreter, self.runtime = opened(path, num_threads=threads)
        self.verified_by = self.runtime
        self.inputs = self.interpreter.get_input_details()
        self.specs = tuple(inputs)
        count = len(self.interpreter.get_output_details())
        self.outputs = tuple(outputs) or tuple(f"output_{i}" for i in range(count))
        self.signature = next(iter(self.interpreter.get_signature_list()), None)

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """One invocation: arrays of the file's shapes and dtypes -> outputs in the file's order."""
        for detail, array in zip(self.inputs, arrays, strict=True):
            self.interpreter.set_tensor(detail["index"], array)
        self.interpreter.invoke()
        return [self.interpreter.get_tensor(o["index"]) for o in self.interpreter.get_output_details()]

    def predict(self, inputs: np.ndarray | Mapping[str, np.ndarray]) -> np.ndarray | dict[str, np.ndarray]:
        """Runs any number N of examples, padding the last batch with zeros.

        Args:
            inputs: the array (N,...) of the one input, images as (N,H,W,C), or name -> array.

        Returns:
            The array (N,...) of the one output, or name -> array where the file has several.
        """
        count, batches = self.batches(inputs)
        return join(self.outputs, count, [self.run(*arrays) for arrays in batches])

    def batches(self, inputs: np.ndarray | Mapping[str, np.ndarray]) -> tuple[int, list[list[np.ndarray]]]:
        """N, and the arrays of each invocation as the file takes them, the last one padded with zeros."""
        dtypes = [detail["dtype"] for detail in self.inputs]
        return split(inputs, self.specs, dtypes, int(self.inputs[0]["shape"][0]))

    def partitions(self) -> int:
        """Number of XNNPACK partitions; 1 means that the whole file runs on it."""
        return sum(op["op_name"] == "DELEGATE" for op in self.interpreter._get_ops_details())

    def histogram(self) -> dict[str, int]:
        """Number of operations in the file by name, most frequent first."""
        names = (op["op_name"] for op in self.interpreter._get_ops_details())
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
