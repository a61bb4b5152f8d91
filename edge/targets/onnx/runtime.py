"""Runs an .onnx file with ONNX Runtime on this machine's CPU."""

import pathlib
import re

import numpy as np

from ... import artifact as artifacts
from ...artifact import Artifact, InputSpec
from ...graph import histogram
from .writer import EXTRA, onnx


def onnxruntime():
    """The onnxruntime package."""
    try:
        import onnxruntime as package
    except ImportError as e:
        raise ImportError(f"onnxruntime is needed to quantize and run .onnx files ({e}): {EXTRA}") from None
    package.set_default_logger_severity(3)  # its warnings are of its own optimizations
    return package


def versions() -> dict[str, str]:
    """Name -> version of what writes and runs the files."""
    return {"onnx": onnx().__version__, "onnxruntime": onnxruntime().__version__}


def session(content, threads=2):
    """An inference session of a file's path or bytes; a `ValueError` for a file that ONNX Runtime cannot run."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # its errors have no common class
        lacks = re.search(r"implementation for (\w+)\(\d+\) node with name '([^']*)'", str(e))
        if lacks:
            raise ValueError(f"ONNX Runtime's CPU has no {lacks[1]} of this type, which {lacks[2]!r} needs.") from None
        what = content if isinstance(content, str) else "The file"
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ValueError(f"{what} cannot be run: it is truncated, damaged, or not an .onnx file ({reason}).") from None


def save(path: pathlib.Path, model) -> None:
    """Writes an `onnx.ModelProto` whole, after ONNX Runtime has accepted it."""
    content = model.SerializeToString(deterministic=True)
    session(content)
    with artifacts.writing(path) as temporary:
        temporary.write_bytes(content)


def load(artifact: Artifact, threads: int = 2) -> "Runner":
    """A `Runner` of an artifact."""
    return Runner(artifact.path, threads, artifact.input)


class Runner:
    """Runs an .onnx file on this machine's CPU.

    Args:
        path: of the file.
        threads: for one operation.
        spec: the artifact's `InputSpec`, for a file that does not take images as (B,H,W,C).

    Attributes:
        runtime: name and version of the package that runs it.
        verified_by: what a check by this runner rests on.

    Raises:
        ValueError: the file is not an .onnx file, is truncated, or holds an operation that the runtime lacks.
    """

    def __init__(self, path: str | pathlib.Path, threads: int = 2, spec: InputSpec | None = None):
        path = pathlib.Path(path)
        if not path.is_file():
            raise ValueError(f"{path} is not an .onnx file: no such file.")
        self.path = path
        self.session = session(str(path), threads)
        self.runtime = f"onnxruntime {onnxruntime().__version__}"
        self.verified_by = self.runtime
        self.inputs = self.session.get_inputs()
        self.dtype = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int32)": np.int32}[
            self.inputs[0].type
        ]
        self.as_stored = spec.as_stored if spec else np.asarray

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """One run: an array of the file's shape and dtype for each input -> outputs in the file's order."""
        return self.session.run(None, {i.name: x for i, x in zip(self.inputs, inputs, strict=True)})

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Images (N,H,W,C), any N -> the first output (N,...), padding the last batch with zeros."""
        images = np.asarray(images, self.dtype)
        batch = self.inputs[0].shape[0]
        found = []
        for i in range(0, len(images), batch):
            chunk = images[i : i + batch]
            padded = np.concatenate([chunk, np.zeros((batch - len(chunk), *chunk.shape[1:]), chunk.dtype)])
            found.append(self.run(self.as_stored(padded))[0][: len(chunk)])
        return np.concatenate(found)

    def histogram(self) -> dict[str, int]:
        """Number of operations in the file by name, most frequent first."""
        return histogram(node.op_type for node in onnx().load(str(self.path), load_external_data=False).graph.node)
