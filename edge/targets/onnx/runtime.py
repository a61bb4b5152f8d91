"""Runs an .onnx file with ONNX Runtime on this machine's CPU."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits._util.progress import progress
from keras_vits._util.terminal import quiet
from keras_vits.graph.ir import histogram
from keras_vits.specs import InputSpec

from ...artifact import Artifact, check
from .._batches import join, split
from .writer import EXTRA, onnx

DTYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}


def onnxruntime() -> Any:
    """The onnxruntime package."""
    try:
        with quiet():  # it looks for GPUs, and says what it does not find
            import onnxruntime as package
    except ImportError as e:
        raise ImportError(f"onnxruntime is needed to quantize and run .onnx files ({e}): {EXTRA}") from None
    package.set_default_logger_severity(3)  # its warnings are of its own optimizations
    return package


def versions() -> dict[str, str]:
    """Name -> version of what writes and runs the files."""
    return {"onnx": onnx().__version__, "onnxruntime": onnxruntime().__version__}


def session(content: str | bytes, threads: int = 2) -> Any:
    """An inference session of a file's path or bytes; a `ValueError` for a file that ONNX Runtime cannot run."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # it writes to stderr what its errors say, too
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as e:  # its errors have no common class
        lacks = re.search(r"implementation for (\w+)\(\d+\) node with name '([^']*)'", str(e))
        if lacks:
            raise ValueError(f"ONNX Runtime's CPU has no {lacks[1]} of this type, which {lacks[2]!r} needs.") from None
        what = content if isinstance(content, str) else "The file"
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ValueError(f"{what} cannot be run: it is truncated, damaged, or not an .onnx file ({reason}).") from None


def save(path: pathlib.Path, model: Any) -> None:
    """Writes an `onnx.ModelProto` that ONNX Runtime accepts to a path that has not its name yet."""
    content = model.SerializeToString(deterministic=True)
    session(content)
    path.write_bytes(content)


def load(artifact: Artifact, threads: int = 2) -> Runner:
    """A `Runner` of an artifact; a `ValueError` for a file that is not the one that was written."""
    check(artifact)
    return Runner(artifact.path, threads, artifact.inputs, artifact.output_names)


class Runner:
    """Runs an .onnx file on this machine's CPU.

    Args:
        path: of the file.
        threads: for one operation.
        specs: the artifact's `InputSpec`s; without them, arrays are taken as the file takes them.
        outputs: names of the outputs in the file's order; the file's own by default.

    Attributes:
        runtime: name and version of the package that runs it.
        verified_by: what a check by this runner rests on.

    Raises:
        ValueError: the file is not an .onnx file, is truncated, or holds an operation that the runtime lacks.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        threads: int = 2,
        specs: Sequence[InputSpec] = (),
        outputs: Sequence[str] = (),
    ) -> None:
        path = pathlib.Path(path)
        if not path.is_file():
            raise ValueError(f"{path} is not an .onnx file: no such file.")
        self.path, self.specs = path, tuple(specs)
        self.session = session(str(path), threads)
        self.runtime = f"onnxruntime {onnxruntime().__version__}"
        self.verified_by = self.runtime
        self.inputs = self.session.get_inputs()
        self.outputs = tuple(outputs) or tuple(output.name for output in self.session.get_outputs())

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """One run: an array of the file's shape and dtype for each input -> outputs in the file's order.

        Raises:
            ValueError: arrays of other shapes or dtypes, or a file whose operations do not fit each other.
        """
        try:
            return self.session.run(None, {i.name: x for i, x in zip(self.inputs, inputs, strict=True)})
        except Exception as e:  # its errors have no common class
            reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
            raise ValueError(f"{self.path} cannot be run on these inputs: {reason}") from None

    def predict(self, inputs: np.ndarray | Mapping[str, np.ndarray]) -> np.ndarray | dict[str, np.ndarray]:
        """See `targets._protocol.Runner`; the last batch is padded with zeros."""
        if unknown := sorted({i.type for i in self.inputs} - set(DTYPES)):
            raise ValueError(f"{self.path} takes {', '.join(unknown)}; files take {', '.join(DTYPES)}.")
        dtypes = [DTYPES[i.type] for i in self.inputs]
        count, batches = split(inputs, self.specs, dtypes, self.inputs[0].shape[0], self.path.name)
        runs = progress(batches, f"Running {self.path.name}")
        return join(self.outputs, count, len(batches[0][0]), [self.run(*arrays) for arrays in runs])

    def histogram(self) -> dict[str, int]:
        """Number of operations in the file by name, most frequent first."""
        return histogram(node.op_type for node in onnx().load(str(self.path), load_external_data=False).graph.node)


def run(order: Mapping[str, Any]) -> Any:
    """See `Target.run`."""
    ort = onnxruntime()

    def load_it() -> tuple[Any, str]:
        opened = session(order["path"], order["threads"])
        names = [i.name for i in opened.get_inputs()]
        invoke = lambda *arrays: opened.run(None, dict(zip(names, arrays, strict=True)))
        return invoke, f"onnxruntime {ort.__version__}"

    return load_it
