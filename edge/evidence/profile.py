"""Where the time goes: how long each operation of a .tflite file takes on this machine, by our layers' names.

The times are those of the runtime's own profiler, which is reached through its C functions (profile_worker.py) because
its Python package does not show it. XNNPACK, which takes whole files, is in it with every operator that it runs: the
file runs as it always does, in one partition, with all that XNNPACK fuses, and nothing is cut into pieces to be timed.

What the profiler gives is a list of XNNPACK's operators in their order, by XNNPACK's names, without a word on where
they come from. To bring them home, one run is made of a file in which every kind of operation that the artifact has
stands alone, between markers: it tells what each becomes. The artifact's operations, so translated, and the operators
that ran are then the same list but for what was fused, and their longest common subsequence tells where that is: what
lies between two operations that agree is one operator for all of them, named `"DEQUANTIZE+GELU+QUANTIZE"`.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import itertools
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import numpy as np

from keras_vits._util.process import Worker, WorkerError
from keras_vits._util.progress import progress

from .. import artifact as artifacts
from ..artifact import Artifact
from ..targets import litert
from ..targets._protocol import names, target
from ..targets.litert.flatbuffer import File

OLDEST = (2, 1, 6)  # ai-edge-litert whose C functions take what profile_worker.py gives them
WORKER = pathlib.Path(__file__).with_name("profile_worker.py")
WARMUP_RUNS = 5
MARKERS = ("FLOOR", "CEIL", "COS", "SIN")
NODE, OPERATOR = 2, 8  # the profiler's types of events: an operation of the file, and one within a delegate
TRACED = 0.5  # of the operators that ran, at least, must be the ones expected


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperationTime:
    """An operation of the file, or several that the runtime made one of.

    Attributes:
        name: of its output tensor, which begins with our layer's name.
        op: TFLite's name of it, `"MUL+MEAN"` for what was fused.
        layer: our name of the layer, `"block_3/attention/qkv"`, the innermost one that all that was fused lies in.
        ms: time of it in a run, the mean of the middle half of all runs.
        share: of the time of all operations.
    """

    name: str
    op: str
    layer: str
    ms: float
    share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """Where the time of a run goes.

    Attributes:
        artifact_path: of the file that was measured.
        runtime: name and version of what ran the file.
        threads: how many the runtime was allowed.
        runs: how many were timed.
        total_ms: median time of a run, by a clock around it, the profiler being on.
        covered: which part of a run's time by that clock its operations' times add up to, the median of all runs. The
            rest lies between them, or is lost because the profiler rounds each down to a whole microsecond: 1 to 5
            percent where operations take some tens of microseconds on average, half where they take one or two.
        operations: an `OperationTime` for each, in the order they run in. An operation that the runtime does away
            with (a padding that becomes the next convolution's own, say) takes no time and is not among them.
    """

    artifact_path: pathlib.Path
    runtime: str
    threads: int
    runs: int
    total_ms: float
    covered: float
    operations: tuple[OperationTime, ...]

    @property
    def operations_ms(self) -> float:
        """What the operations' times add up to; well below `total_ms` where other work kept interrupting the runs."""
        return sum(operation.ms for operation in self.operations)

    def by_layer(self, depth: int = 2) -> dict[str, float]:
        """Layer -> ms, in the order they run in.

        Args:
            depth: how many parts of a name to tell apart: 2 for `"block_3/attention"`, 1 for `"block_3"`.
        """
        return self._summed(lambda operation: shortened(operation.layer, depth))

    def by_op(self) -> dict[str, float]:
        """TFLite's name of an operation -> ms, the longest first."""
        return dict(sorted(self._summed(lambda operation: operation.op).items(), key=lambda item: -item[1]))

    def _summed(self, key: Callable[[OperationTime], str]) -> dict[str, float]:
        found: dict[str, float] = {}
        for operation in self.operations:
            found[key(operation)] = found.get(key(operation), 0.0) + operation.ms
        return found

    def plot(self, path: str | pathlib.Path | None = None, depth: int = 2) -> str | pathlib.Path:
        """Draws where the time goes: a bar for each layer, of its kinds of operations.

        Args:
            path: of a `.png` or `.svg` file to write; `None` for an `<svg>` element in the report's colours.
            depth: as of `by_layer`.

        Returns:
            The path, or the element.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: a path with another suffix, or that cannot be written.
        """
        from .profile_plot import plot

        return plot(self, path, depth)


def profile(artifact: Artifact, threads: int = 1, runs: int = 50) -> Profile:
    """Measures each operation of a .tflite file on this machine, in a process of its own, on noise.

    Args:
        artifact: a LiteRT `Artifact`.
        threads: how many the runtime may use.
        runs: how many runs to time.

    Returns:
        A `Profile`.

    Raises:
        ImportError: ai-edge-litert is not installed.
        ValueError: an artifact that is no .tflite file or not the file that was written, a runtime without the
            profiler, a process that died, or a profile whose operators cannot be told.
    """
    for name, value in (("threads", threads), ("runs", runs)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer; received {value!r}.")
    if not target(artifact.format).traits.profiled:
        known = " and ".join(target(name).suffix for name in names() if target(name).traits.profiled)
        raise ValueError(f"{artifact.path.name} is of the format {artifact.format}: only {known} files are profiled.")
    artifacts.check(artifact)
    library, runtime = _library()
    content = File(artifact.path.read_bytes())
    specimens = _Specimens(content)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "specimens.tflite"
        path.write_bytes(specimens.bytes())
        files = [
            dict(path=str(path), threads=1, warmup=0, runs=1),
            dict(path=str(artifact.path.absolute()), threads=threads, warmup=WARMUP_RUNS, runs=runs),
        ]
        name = artifact.path.name
        with Worker([sys.executable, "-P", str(WORKER)], os.environ) as worker:
            worker.tell(library=str(library), files=files)
            specimens.learn(_answer(worker, name))
            _answer(worker, name)  # their times
            events = _answer(worker, name)
            measured = [_answer(worker, name) for _ in progress(range(runs), "Profiling")]
    count = len(content.main.operators)
    chosen = [i for i, (_, kind, node) in enumerate(events) if kind == OPERATOR or (kind == NODE and node < count)]
    total_ms, ms = np.array([t for t, _ in measured]), np.array([us for _, us in measured])[:, chosen] / 1e3
    middle = np.sort(ms, axis=0)[runs // 4 : runs - runs // 4].mean(0)
    return Profile(
        artifact_path=artifact.path,
        runtime=runtime,
        threads=threads,
        runs=runs,
        total_ms=float(np.median(total_ms)),
        covered=float(np.median(ms.sum(1) / total_ms)),
        operations=_operations(content, specimens, [events[i] for i in chosen], middle, name),
    )


def shortened(layer: str, depth: int) -> str:
    """The first parts of a layer's name."""
    return "/".join(layer.split("/")[:depth])


def _library() -> tuple[pathlib.Path, str]:
    """(path of LiteRT's library, "package version" of it); a `ValueError` if it is too old or not there."""
    package = litert.require("ai_edge_litert")
    version = importlib.metadata.version("ai-edge-litert")
    advice = f'pip install "ai-edge-litert>={".".join(map(str, OLDEST))}"'
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < OLDEST:
        raise ValueError(f"ai-edge-litert {version} is too old to profile a file: {advice}.")
    folder = pathlib.Path(cast(str, package.__file__)).parent
    found = [path for suffix in ("so", "dylib", "dll") for path in folder.glob(f"libLiteRt.{suffix}")]
    if not found:
        raise ValueError(f"ai-edge-litert {version} comes without libLiteRt, which has the profiler: {advice}.")
    return found[0], f"ai_edge_litert {version}"


def _answer(worker: Worker, name: str) -> Any:
    """The worker's next line; `name`: of the file, for messages."""
    try:
        answer = worker.answer()
    except WorkerError as e:
        raise ValueError(f"{name} could not be profiled, {e}") from None
    if isinstance(answer, dict):
        raise ValueError(f"{name} could not be profiled by this ai-edge-litert: {answer['error']}.")
    return answer


# ---------------------------------------------------------------- what each kind of operation becomes


class _Specimens:
    """A file with one operation of each kind that a file has, each alone, and markers between them.

    Args:
        file: a `File`.
    """

    def __init__(self, file: File):
        self.file, S = file, file.S
        self.constant = {op.outputs[0]: op for op in file.main.operators if all(map(self._is_constant, op.inputs))}
        self.numbers: dict[Any, int] = {}  # key of an operation -> which of the specimens it is
        self.became: list[list[str]] = []  # the names of what each became
        self.model, self.graph = S.ModelT(), S.SubGraphT()
        self.model.version, self.model.subgraphs, self.model.buffers = 3, [self.graph], [S.BufferT()]
        self.model.operatorCodes = list(file.model.operatorCodes)
        self.graph.tensors, self.graph.operators, self.graph.inputs, self.graph.outputs = [], [], [], []
        self._add_marker()
        for op in file.main.operators:
            if op.outputs[0] not in self.constant and self.key(op) not in self.numbers:
                self.numbers[self.key(op)] = len(self.numbers)
                self._add(op)
                self._add_marker()

    def key(self, operator: Any) -> Hashable:
        """Equal for operations that become the same."""

        def described(tensor: int) -> Hashable:
            if tensor < 0:
                return None
            t = self.file.main.tensors[tensor]
            return tuple(t.shape), t.type, self._is_constant(tensor), tensor in self.constant

        options = operator.builtinOptions
        fields = repr(sorted((k, np.asarray(v).tolist()) for k, v in vars(options).items())) if options else ""
        tensors = tuple(map(described, (*operator.inputs, *operator.outputs)))
        return operator.opcodeIndex, len(operator.inputs), tensors, fields

    def _is_constant(self, tensor: int) -> bool:
        data = tensor >= 0 and self.file.model.buffers[self.file.main.tensors[tensor].buffer].data
        return tensor < 0 or (data is not False and data is not None and len(data) > 0)

    def _add_marker(self) -> None:
        S, kinds = self.file.S, {self.file.builtin(op) for op in self.file.main.operators}
        kind = next((kind for kind in MARKERS if kind not in kinds), None)
        if kind is None:
            raise ValueError(f"A file that has all of {', '.join(MARKERS)} cannot be profiled: none can mark a place.")
        if not self.graph.tensors:
            code = S.OperatorCodeT()
            code.builtinCode = code.deprecatedBuiltinCode = getattr(S.BuiltinOperator, kind)
            code.version = 1
            self.model.operatorCodes.append(code)
            self.graph.inputs.append(self._marker_tensor())
        marker = S.OperatorT()
        marker.opcodeIndex = len(self.model.operatorCodes) - 1
        marker.inputs, marker.outputs = np.array([0], np.int32), np.array([self._marker_tensor()], np.int32)
        self.graph.outputs.append(marker.outputs[0])
        self.graph.operators.append(marker)

    def _marker_tensor(self) -> int:
        tensor = self.file.S.TensorT()
        tensor.name, tensor.shape = f"marker_{len(self.graph.tensors)}", np.array([1, 8], np.int32)
        tensor.type, tensor.buffer = self.file.S.TensorType.FLOAT32, 0
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def _add(self, operator: Any) -> None:
        """Adds a copy of an operation, with what makes its constants before it."""
        new = {-1: -1}
        for made in dict.fromkeys(t for t in operator.inputs if t in self.constant):
            self._copy(self.constant[made], new)
        self._copy(operator, new)
        self.graph.outputs += [new[tensor] for tensor in operator.outputs]

    def _copy(self, operator: Any, new: dict[int, int]) -> None:
        for tensor in dict.fromkeys((*operator.inputs, *operator.outputs)):
            if tensor in new:
                continue
            copied = copy.copy(self.file.main.tensors[tensor])
            buffer, copied.buffer = self.file.model.buffers[copied.buffer], 0
            if self._is_constant(tensor):
                self.model.buffers.append(buffer)
                copied.buffer = len(self.model.buffers) - 1
            elif tensor in operator.inputs:
                self.graph.inputs.append(len(self.graph.tensors))
            new[tensor] = len(self.graph.tensors)
            copied.name = f"tensor_{new[tensor]}"  # the runtime dies of two inputs of one name
            self.graph.tensors.append(copied)
        copied = copy.copy(operator)
        copied.inputs = np.array([new[t] for t in operator.inputs], np.int32)
        copied.outputs = np.array([new[t] for t in operator.outputs], np.int32)
        self.graph.operators.append(copied)

    def bytes(self) -> bytes:
        return bytes(self.file.tools.convert_object_to_bytearray(self.model))

    def learn(self, events: Sequence[tuple[str, int, int]]) -> None:
        """Takes from the events of a run of this file what each specimen became."""
        names = [name for name, kind, _ in events if kind == OPERATOR]
        count, marker = len(self.numbers), names[0] if names else ""
        if names.count(marker) != count + 1:
            raise ValueError("This ai-edge-litert's profile of single operations cannot be read: markers are missing.")
        for name in names[:-1]:
            if name == marker:
                self.became.append([])
            else:
                self.became[-1].append(name)

    def operators(self, operator: Any) -> Sequence[str]:
        """Names of what an operation becomes, if the runtime's delegate takes it; () for one of constants."""
        return () if operator.outputs[0] in self.constant else self.became[self.numbers[self.key(operator)]]


# ---------------------------------------------------------------- which operation an operator comes from


def _operations(
    file: File,
    specimens: _Specimens,
    events: Sequence[tuple[str, int, int]],
    ms: np.ndarray,
    filename: str,
) -> tuple[OperationTime, ...]:
    """The `OperationTime`s of events [(name, type, node), ...] with their times."""
    alone = {node for _, kind, node in events if kind == NODE}
    order = _executed(file, alone)
    expected = []  # (name, or number of an operation that runs alone; number of the operation)
    for i in order:
        expected += [(name, i) for name in ((i,) if i in alone else specimens.operators(file.main.operators[i]))]
    ran = [name if kind == OPERATOR else node for name, kind, node in events]
    pairs = common([name for name, _ in expected], ran)
    if len(pairs) < TRACED * len(ran):
        raise ValueError(
            f"{filename} ran as {len(ran)} operators, of which only {len(pairs)} could be traced back to its "
            f"operations: this version of ai-edge-litert cannot be read."
        )
    found: dict[tuple[int, ...], float] = {}  # numbers of operations -> ms
    for begin, end in zip([(-1, -1), *pairs], [*pairs, (len(expected), len(ran))], strict=True):
        between = tuple(dict.fromkeys(i for _, i in expected[begin[0] + 1 : end[0]]))
        nearest = expected[min(end[0], len(expected) - 1)][1]
        for j in range(begin[1] + 1, min(end[1] + 1, len(ran))):
            key = (nearest,) if j == end[1] or not between else between
            found[key] = found.get(key, 0.0) + ms[j]
    total = sum(found.values()) or 1.0
    return tuple(
        OperationTime(
            name=file.name(file.main.operators[key[-1]].outputs[0]),
            op="+".join(file.builtin(file.main.operators[i]) for i in key),
            layer=_layer([file.name(file.main.operators[i].outputs[0]) for i in key]),
            ms=float(time),
            share=float(time / total),
        )
        for key, time in found.items()
    )


def _layer(tensors: Sequence[str]) -> str:
    """The innermost layer that all of the tensors lie in, or the last one's if there is none."""
    layers = [(name.rpartition("/")[0] or name).split("/") for name in tensors]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*layers, strict=False))
    return "/".join([part for part, *_ in same] or layers[-1])


def _executed(file: File, alone: set[int]) -> list[int]:
    """Numbers of the operations in the order they run in.

    The runtime takes turns between what its delegate runs and what runs alone: each time all that is ready, in the
    order of the file.
    """
    made = {tensor for op in file.main.operators for tensor in op.outputs}
    left = dict(enumerate(file.main.operators))
    order: list[int] = []
    while left:
        kind, before = None, -1
        while len(order) > before:
            before = len(order)
            for i, op in list(left.items()):
                if made.isdisjoint(op.inputs) and kind in (None, i in alone):
                    kind = i in alone
                    order.append(i)
                    made -= set(op.outputs)
                    del left[i]
    return order


def common(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[tuple[int, int]]:
    """The longest common subsequence of two lists: [(place in a, place in b), ...]."""
    number: dict[Hashable, int] = {}
    codes = np.array([number.setdefault(item, len(number)) for item in b], np.int32)
    lengths = np.zeros((len(a) + 1, len(b) + 1), np.int32)  # [i, j]: of a[:i] and b[:j]
    for i, item in enumerate(a):
        longer = lengths[i, :-1] + (codes == number.get(item, -1))
        lengths[i + 1, 1:] = np.maximum.accumulate(np.maximum(lengths[i, 1:], longer))
    pairs, i, j = [], len(a), len(b)
    while i and j:
        if number.get(a[i - 1], -1) == codes[j - 1]:  # then taking both is never worse
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif lengths[i - 1, j] >= lengths[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]
