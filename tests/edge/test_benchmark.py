"""benchmark measures what it says, on small LiteRT files written here by hand and on a .keras file."""

import dataclasses
import os
import signal
import subprocess
import sys

import flatbuffers
import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from families import FAMILIES

from keras_vits._util.progress import progress
from keras_vits.edge import artifact as artifacts
from keras_vits.edge.devices import host, turns
from keras_vits.edge.evidence.benchmark import benchmark
from keras_vits.edge.records import DeviceWarning, Latency, ratio
from keras_vits.specs import InputSpec, OutputSpec

pytestmark = pytest.mark.once

QUICK = dict(threads=1, min_runs=50, min_seconds=0.2, warmup_seconds=0.05)


def dense_chain(path, depth, width=256, rows=256):
    """An artifact (1,rows,width) -> the same: `depth` dense layers, one after the other, in a .tflite file."""
    graph, model = schema.SubGraphT(), schema.ModelT()
    model.version, model.subgraphs, model.buffers = 3, [graph], [schema.BufferT()]
    graph.tensors, graph.operators = [], []

    def tensor(name, shape, data=None):
        t = schema.TensorT()
        t.name, t.shape, t.type, t.buffer = name, np.array(shape, np.int32), schema.TensorType.FLOAT32, 0
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(data.tobytes(), np.uint8)
            model.buffers.append(buffer)
            t.buffer = len(model.buffers) - 1
        graph.tensors.append(t)
        return len(graph.tensors) - 1

    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FULLY_CONNECTED
    code.version = 5
    model.operatorCodes = [code]
    kernel = np.eye(width, dtype=np.float32)
    first = last = tensor("image", (1, rows, width))
    for i in range(depth):
        op, options = schema.OperatorT(), schema.FullyConnectedOptionsT()
        options.keepNumDims = True
        output = tensor(f"y{i}", (1, rows, width))
        op.inputs = np.array([last, tensor(f"kernel{i}", (width, width), kernel), -1], np.int32)
        op.outputs, op.builtinOptions = np.array([output], np.int32), options
        op.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
        graph.operators.append(op)
        last = output
    graph.inputs, graph.outputs = np.array([first], np.int32), np.array([last], np.int32)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return describe(path, "litert", (1, rows, width))


def describe(path, format, shape, **fields):
    spec = InputSpec(name="image", shape=shape)
    return artifacts.make(
        path,
        format=format,
        recipe="float32",
        model=path.stem,
        inputs=(spec,),
        outputs=(OutputSpec(name="logits", kind="logits"),),
        **fields,
    )


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    return [dense_chain(folder / f"depth_{depth}.tflite", depth) for depth in (2, 8)]


@pytest.fixture(scope="module")
def measured(chains):
    return benchmark(chains, **QUICK)


def test_numbers_fit_together(chains, measured):
    for artifact, speed in zip(chains, measured, strict=True):
        assert isinstance(speed, Latency)
        assert speed.artifact_path == artifact.path
        assert 0 < speed.p10_ms <= speed.median_ms <= speed.p90_ms <= speed.p99_ms
        assert speed.runs >= 50
        assert speed.runs * speed.p99_ms >= 200  # min_seconds
        assert speed.load_ms > 0
        assert speed.threads == 1
        assert speed.device == "host"
        assert speed.cpu
        assert speed.runtime.startswith(("ai_edge_litert ", "tflite_runtime ", "tensorflow"))
        assert min(speed.round_ms) > 0
    assert len({(speed.started, len(speed.round_ms)) for speed in measured}) == 1


class Taker(turns.Timed):
    """Takes turns without running anything; from turn `breaks` on, it cannot."""

    def __init__(self, log, name, ms=10.0, breaks=None):
        super().__init__()
        self.log, self.name, self.ms, self.breaks = log, name, ms, breaks

    def __str__(self):
        return self.name

    def run(self, runs, seconds=0.0):
        if self.breaks is not None and len(self.rounds) >= self.breaks:
            raise turns.FailedError("it is broken")
        self.log.append(self.name)
        return [self.ms] * max(runs, int(seconds * 1e3 / self.ms))


def test_turns_are_taken_in_a_changing_order():
    log = []
    turns.take_turns([Taker(log, i) for i in range(5)], turns.Goal(rounds=12), random=np.random.default_rng(0))
    orders = [tuple(log[i : i + 5]) for i in range(0, len(log), 5)]
    assert len(orders) == 12 and all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len(set(orders)) > 6
    log.clear()
    turns.take_turns([Taker(log, i) for i in range(5)], turns.Goal(rounds=3))
    assert log == [0, 1, 2, 3, 4] * 3  # as given


def test_turns_end_when_every_one_has_enough():
    fast, slow = Taker([], "fast", ms=1.0), Taker([], "slow", ms=50.0)
    for one in (fast, slow):
        one.warm_up(0.2)
    assert (fast.runs, slow.runs) == (100, 2)  # of a tenth of a second
    turns.take_turns([fast, slow], turns.Goal(runs=10, seconds=0.3))
    assert len(fast.rounds) == len(slow.rounds) == 5  # ten runs of the slow one
    slow = Taker([], "slow", ms=500.0)
    turns.take_turns([slow], turns.Goal(runs=10**6, seconds=0.1))
    assert sum(map(len, slow.rounds)) == 3  # more than ten times the seconds
    assert slow.times == dict(runs=3, median_ms=500, p10_ms=500, p90_ms=500, p99_ms=500, round_ms=(500, 500, 500))


def test_one_that_fails_leaves_the_others_alone():
    good, bad = Taker([], "good"), Taker([], "bad", breaks=2)
    with pytest.warns(DeviceWarning, match="bad was left out: it is broken") as said:
        turns.take_turns([good, bad], turns.Goal(rounds=5))
    assert (len(good.rounds), len(bad.rounds), len(said)) == (5, 2, 1)
    assert good.failure is None and bad.failure


def test_a_round_that_does_not_count_is_taken_again():
    kept, log = iter([True, False, False, True]), []
    turns.take_turns([Taker(log, "a"), Taker(log, "b")], turns.Goal(rounds=2), keeps=lambda: next(kept))
    assert log == ["a", "b"] * 4


def test_four_times_the_work_takes_four_times_as_long(tmp_path):
    # Runs of less than a millisecond are seldom interrupted by what else the machine is doing, and few weights fit in
    # a cache that others use, too.
    chains = [dense_chain(tmp_path / f"depth_{depth}.tflite", depth, width=64, rows=512) for depth in (2, 8)]
    short, long = benchmark(chains, threads=1, min_seconds=2.0)
    assert 4 / 2**0.5 < ratio(long, short) < 4 * 2**0.5  # nearer to 4 than to 2 or 8
    assert ratio(short, long) == pytest.approx(1 / ratio(long, short), rel=0.05)
    assert ratio(long, long) == 1


def test_memory_is_that_of_the_runtime_and_the_file_alone(chains, measured):
    held = np.ones(50_000_000, np.float32)  # the parent's memory, 200 MB, is not the child's
    speed = benchmark(chains[0], **QUICK)
    assert held[-1] == 1
    assert speed.baseline_memory_bytes < speed.peak_memory_bytes < 150e6  # Keras and a backend alone are more
    assert measured[1].peak_memory_bytes > measured[0].peak_memory_bytes


def test_a_keras_file_is_measured_on_its_backend(tmp_path):
    model = FAMILIES[0].create()
    path = tmp_path / "tiny.keras"
    model.save(path)
    backend = "jax"  # whichever runs here
    artifact = describe(path, "keras", (1, *model.input_shape[1:]), tools={"backend": backend})
    speed = benchmark(artifact, **QUICK)
    assert speed.runtime == f"keras {keras.__version__} on {backend}"
    assert speed.runs >= 50


def test_a_slow_file_is_run_less_often(chains):
    speed = benchmark(chains[1], threads=1, min_runs=10**6, min_seconds=0.05, warmup_seconds=0)
    assert speed.runs < 10**6


@pytest.mark.parametrize("seconds, processes", [(0, 1), (1.5, host.PROCESSES)])
def test_no_process_is_started_that_has_nothing_to_measure(chains, monkeypatch, seconds, processes):
    started = spy_on_processes(monkeypatch)
    benchmark(chains[0], threads=1, min_runs=1, min_seconds=seconds, warmup_seconds=0.05)
    assert len(started) == processes


def test_times_of_two_calls_have_no_ratio(chains, measured):
    other = dataclasses.replace(measured[0], started="2000-01-01")
    with pytest.raises(ValueError, match="not measured together"):
        ratio(measured[1], other)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(device="toaster"), "Unknown device 'toaster'. Known: host"),
        (dict(threads=0), "threads must be a positive integer; received 0"),
        (dict(min_runs=2.5), "min_runs must be a positive integer; received 2.5"),
    ],
)
def test_a_mistake_is_named(chains, arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark(chains, **{**QUICK, **arguments})


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="list of artifacts is empty"):
        benchmark([])


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML runs there")
def test_core_ml_needs_a_mac(chains):
    with pytest.raises(ValueError, match=r"depth_2\.tflite is a Core ML model, which can run on macOS only"):
        benchmark(dataclasses.replace(chains[0], format="coreml"))


def test_a_changed_file_is_refused(tmp_path):
    artifact = dense_chain(tmp_path / "net.tflite", 1)
    artifact.path.write_bytes(artifact.path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or was changed"):
        benchmark(artifact, **QUICK)


def test_a_file_that_cannot_run_says_why_and_leaves_no_process(tmp_path, chains, monkeypatch):
    started = spy_on_processes(monkeypatch)
    path = tmp_path / "broken.tflite"
    path.write_bytes(b"\0\0\0\0TFL3" + bytes(100))
    broken = describe(path, "litert", (1, 4, 4))
    with pytest.raises(
        ValueError, match=r"broken\.tflite could not be measured, its process ended with code -?\d+: \S"
    ):
        benchmark([chains[0], broken], **QUICK)
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_a_process_that_is_killed_is_named(chains, monkeypatch):
    started = spy_on_processes(monkeypatch)
    turn = host.Child.turn

    def kill_then_turn(child):
        if child.artifact is chains[1]:
            os.kill(child.worker.process.pid, signal.SIGKILL)
        turn(child)

    monkeypatch.setattr(host.Child, "turn", kill_then_turn)
    with pytest.raises(ValueError, match=r"depth_8\.tflite could not be measured, its process ended with code -9"):
        benchmark(chains, **QUICK)
    assert all(process.poll() is not None for process in started)


def test_ctrl_c_leaves_no_process(chains, monkeypatch):
    started = spy_on_processes(monkeypatch)

    def interrupt(child):
        raise KeyboardInterrupt

    monkeypatch.setattr(host.Child, "turn", interrupt)
    with pytest.raises(KeyboardInterrupt):
        benchmark(chains, **QUICK)
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_a_child_ends_with_its_parent(chains):
    process = subprocess.Popen(
        [sys.executable, "-P", str(host.WORKER)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.poll() is None
    process.stdin.close()  # as when the parent is killed
    process.wait(timeout=20)


def spy_on_processes(monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    return started


# ---------------------------------------------------------------- progress


class Terminal:
    """A stderr that says whether it is a terminal and keeps what is written."""

    def __init__(self, tty):
        self.tty, self.text = tty, ""

    def isatty(self):
        return self.tty

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("tty, seconds, shown", [(True, 3, True), (True, 0.1, False), (False, 3, False)])
def test_progress_shows_on_a_terminal_and_only_when_it_takes_long(monkeypatch, tty, seconds, shown):
    pytest.importorskip("rich")
    terminal, clock = Terminal(tty), iter(np.arange(100) * seconds)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("keras_vits._util.progress.time", type("Clock", (), {"monotonic": lambda: next(clock)}))
    assert list(progress(range(4), "Counting")) == [0, 1, 2, 3]
    assert ("Counting" in terminal.text) == shown


def test_progress_without_rich_is_silent(monkeypatch):
    terminal, clock = Terminal(True), iter(range(0, 1000, 10))
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr("keras_vits._util.progress.time", type("Clock", (), {"monotonic": lambda: next(clock)}))
    assert list(progress(iter("abc"), "Reading")) == ["a", "b", "c"]
    assert terminal.text == ""


def test_progress_is_lazy_and_stops_with_its_loop():
    seen = []
    for item in progress((seen.append(i) or i for i in range(10)), "Counting", total=10):
        if item == 2:
            break
    assert seen == [0, 1, 2]
