"""benchmarks/run.py: its table is complete, its rows are right, and what fails becomes a row."""

import dataclasses
import json
import subprocess
import types

import numpy as np
import pytest
import recording
import run as run_module
import run_worker
import suite
from rendering import peers

MODEL = "mobilevitv2_100"

pytestmark = pytest.mark.once


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The module, with a cache of its own."""
    monkeypatch.setattr(run_module, "CACHE", tmp_path / "cache")
    return run_module


def row(contestant, ratio, sqnr_db=120.0, model=MODEL, **more):
    """A recorded row, 10 ms of ours being 1."""
    return {
        "benchmark": "peers",
        "model": model,
        "contestant": contestant,
        "runtime": "runtime",
        "runtime_version": "1.0",
        "recipe": suite.CONTESTANTS[contestant].recipe,
        "device": "a processor",
        "threads": 2,
        "date": "2026-01-01",
        "commit": "abc",
        "command": "python benchmarks/run.py",
        "median_ms": 10 * ratio,
        "p90_ms": 11 * ratio,
        "ratio": ratio,
        "ratio_q1": ratio - 0.01,
        "ratio_q3": ratio + 0.01,
        "peak_memory_bytes": 90_000_000,
        "baseline_memory_bytes": 40_000_000,
        "size_bytes": 20_000_000,
        "load_ms": 5.0,
        "sqnr_db": sqnr_db,
        "gflops": 100 / ratio,
        "cores_used": 2.0,
        "error": None,
        **more,
    }


def failed(run, row, error):
    return {**row, **dict.fromkeys(run.FIGURES), "runtime": None, "runtime_version": None, "error": error}


def test_table_is_complete(run):
    loaders, exporters = run_worker.LOADERS, run.export_worker.EXPORTERS
    assert set(suite.MODELS) == {
        "vit_tiny_patch16_224",
        "vit_small_patch16_224",
        "mobilevit_s",
        "mobilevitv2_100",
        "mixer_s16_224",
        "efficientvit_b1",
    }
    order = list(suite.FILES)
    for name, file in suite.FILES.items():
        assert (file.exporter or name) in exporters
        assert not file.needs or order.index(file.needs) < order.index(name), "made before what it is made from"
    for name, contestant in suite.CONTESTANTS.items():
        assert suite.file_of(name) in suite.FILES
        assert contestant.loader in loaders
        assert contestant.recipe in suite.GEMM
        assert set(contestant.models) <= set(suite.MODELS)
    assert {suite.file_of(name) for name in suite.CONTESTANTS} | {"weights"} == set(suite.FILES)
    assert {thing.environment for table in (suite.FILES, suite.CONTESTANTS) for thing in table.values()} == set(
        suite.ENVIRONMENTS
    )
    assert {contestant.backend for contestant in suite.CONTESTANTS.values()} >= {"jax", "tensorflow", "torch"}


def test_environments_are_pinned(run):
    for environment in suite.ENVIRONMENTS:
        lines = [x for x in run.requirements(environment).read_text().splitlines() if not x.startswith("#")]
        assert lines and all("==" in line for line in lines)
        assert "torch==2.13.0" in lines
        shared = dict(line.split("==") for line in run.requirements("main").read_text().splitlines() if "==" in line)
        for package, version in (line.split("==") for line in lines):
            if package in ("timm", "numpy", "ai-edge-litert"):
                assert version == shared[package], "the same everywhere"


def test_smoke_run(run, tmp_path, monkeypatch, capsys):
    """Exports, checks and measures; the next run takes the files as they are; what cannot be exported has a row."""
    broken = suite.FILES["ours_dynamic_int8"]
    for name in ("weights", "ours_float32"):  # the backend that the exporter of timm's weights has imported anyway
        monkeypatch.setitem(suite.FILES, name, dataclasses.replace(suite.FILES[name], backend="torch"))
    broken = dataclasses.replace(broken, backend="torch", options={"recipe": "no_such"})
    monkeypatch.setitem(suite.FILES, "ours_aeq_dynamic_int8", broken)
    record = tmp_path / "peers.jsonl"
    arguments = ["--smoke", "--models", MODEL, "--threads", "1", "--record", str(record)]
    arguments += ["--contestants", "timm", "ours_aeq_dynamic_int8"]
    run.main(arguments)
    printed = capsys.readouterr().out
    ours, timm, none = rows = recording.read(record)
    assert [r["contestant"] for r in rows] == ["ours_float32", "timm", "ours_aeq_dynamic_int8"]
    keys = set(row("timm", 1))
    for r in rows:
        assert set(r) == keys
        assert (r["benchmark"], r["model"], r["threads"]) == ("peers", MODEL, 1)
        assert r["command"] == " ".join(["python benchmarks/run.py", *arguments])
        assert r["device"] and r["date"]
    for r in (ours, timm):
        assert r["error"] is None
        assert r["sqnr_db"] > 90
        assert 0 < r["median_ms"] <= r["p90_ms"]
        assert r["peak_memory_bytes"] > r["baseline_memory_bytes"] > 1e7
        assert r["size_bytes"] > 4 * 4.8e6  # of 4.9 M parameters
        assert r["cores_used"] < 1.5, "it was allowed one thread"
    assert ours["ratio"] == ours["ratio_q1"] == ours["ratio_q3"] == 1
    assert timm["ratio"] > 0
    macs = json.loads((run.CACHE / "files" / f"{MODEL}_64" / "weights.json").read_text())["macs"]
    assert ours["gflops"] == pytest.approx(2e-6 * macs / ours["median_ms"], rel=1e-3)
    assert none["median_ms"] is none["ratio"] is None
    assert "no_such" in none["error"]
    assert "failed: ValueError" in printed
    assert f"{MODEL}, 1 threads, timm, PyTorch: {timm['median_ms']:.2f} ms" in printed

    file = run.CACHE / "files" / f"{MODEL}_64" / "ours_float32.tflite"
    before = file.stat().st_mtime_ns
    made = run.make({"ours_float32"}, MODEL, 64)
    assert file.stat().st_mtime_ns == before and made["ours_float32"]["path"] == str(file)
    monkeypatch.setattr(run, "OWN_SOURCES", ("keras_vits/layers",))  # other sources: another stamp
    assert run.kept(file.with_suffix(".json"), run.stamp(suite.FILES["ours_float32"], "ours_float32", 64, "")) is None


def test_wrong_answers_are_not_timed(run, tmp_path):
    """A float32 contestant whose outputs are not timm's has an error, and no time."""
    folder = tmp_path / "weights"
    folder.mkdir()
    np.save(folder / "expected.npy", np.ones((1, 3)))
    runner = run.Runner.__new__(run.Runner)
    runner.name, runner.gemm, runner.weights, runner.facts = "timm", False, folder, {}
    answer = np.ones((1, 3))
    runner.worker = types.SimpleNamespace(ask=lambda do, path: np.save(path, answer))
    runner.check()
    assert runner.facts["sqnr_db"] == run.MOST_DB
    answer = np.array([[1, 1, 1.1]])
    with pytest.raises(ValueError, match=r"its outputs are not timm's: SQNR 24\.8 dB"):
        runner.check()
    answer = np.array([[1, 1, np.nan]])
    with pytest.raises(ValueError, match="not finite"):
        runner.check()


def test_errors_tell_no_paths_of_this_machine(run):
    error = f"{run.HERE.parent}/.cache/bench/onnx/lib/convert.py:400: no"
    (row,) = run.rows(MODEL, {"litert_torch": {"error": error}}, threads=2, command="python benchmarks/run.py")
    assert row["error"] == ".cache/bench/onnx/lib/convert.py:400: no" and row["median_ms"] is None


def test_environments_are_built_once(run, monkeypatch):
    """One that cannot be built says why, is not taken for built, and is built when it can be."""
    commands, stderr = [], "WARNING: slow\nERROR: No matching distribution found for onnx\n"

    def fake(command, **_):
        commands.append(command)
        failed = stderr and "pip" in command
        (run.CACHE / "onnx").mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(command, int(bool(failed)), "", stderr)

    monkeypatch.setattr(run.subprocess, "run", fake)
    with pytest.raises(ValueError, match="onnx could not be built: ERROR: No matching distribution"):
        run.build("onnx")
    stderr = ""
    run.build("onnx")
    assert len(commands) == 4
    assert commands[-1][0] == run.python("onnx") and commands[-1][-1].endswith("requirements/onnx.txt")
    run.build("onnx")
    assert len(commands) == 4


def test_record_replaces_rows(run, tmp_path):
    path = tmp_path / "peers.jsonl"
    run.record(path, [row("timm", 3.0), row("ours_float32", 1.0)])
    run.record(path, [row("timm", 2.0), row("timm", 5.0, threads=1)])
    assert [(r["contestant"], r["threads"], r["ratio"]) for r in recording.read(path)] == [
        ("timm", 1, 5.0),
        ("ours_float32", 2, 1.0),
        ("timm", 2, 2.0),
    ]


def test_a_contestant_that_fails_in_its_turns_leaves_them(run, monkeypatch):
    """The others take all theirs, whoever else drops out, and in another order each time."""
    log = []

    class Stand(run.Runner):
        def __init__(self, name, *_):
            self.name, self.gemm, self.turns, self.cpu_ms, self.facts = name, False, [], 1.0, {}

        __enter__ = lambda self: self
        __exit__ = load = check = warm_up = restart = ready = lambda self, *_: None

        def measure(self):
            log.append(self.name)
            if self.name == "timm" and len(self.turns) == 2:
                raise ValueError("it ran out of memory")
            self.turns.append(np.array([2.0]))

    monkeypatch.setattr(run, "Runner", Stand)
    names = ["ours_float32", "timm", "keras_export"]
    made = {name: {"size_bytes": 1} for name in ("ours_float32", "weights", "keras_export")}
    made["weights"]["macs"] = 1
    found = run.measure(MODEL, names, made, image_size=None, threads=1, rounds=7)
    assert found["timm"]["error"] == "it ran out of memory" and "median_ms" not in found["timm"]
    assert found["keras_export"]["ratio"] == 1 and found["ours_float32"]["median_ms"] == 2
    assert (log.count("timm"), log.count("ours_float32"), log.count("keras_export")) == (3, 7, 7)
    assert log != names * 3 + [names[0], names[2]] * 4


def test_section_compares_with_the_fastest_peer(run, monkeypatch):
    assert peers.section([]) == []
    found = []
    for model, peer in zip(suite.MODELS, (1.3, 1.3, 1.3, 1.2, 1.05, 1.0), strict=True):
        found += [
            row("ours_float32", 1.0, model=model),
            row("onnx_float32", peer, model=model),
            row("timm", 2.0, model=model),
            row("ours_static_int8", 0.2, 20.0, model=model),  # fast, but not the same answers
            row("ours_dynamic_int8", 0.35, 40.0, model=model),
            row("onnx_static_int8", 0.45, 10.0, model=model),
            row("ours_aeq_dynamic_int8", 0.3, 35.0, model=model),  # our own file: no peer
            row("gemm_float32", 1.0, None, model=model, gflops=400.0),
            failed(run, row("litert_torch", 1.0, model=model), "RuntimeError: a | b"),
        ]
    assert peers.verdicts(found)["mobilevit_s"] == {
        "float32": pytest.approx(1 / 1.3),
        "best_float32": "onnx_float32",
        "int8": 0.35,
        "best_int8": "ours_dynamic_int8",
        "int8_to_peer": pytest.approx(0.35 / 0.45),
        "best_peer_int8": "onnx_static_int8",
    }
    text = "\n".join(peers.section(found))
    summary = "| mobilevit_s | 0.77 (timm, ONNX Runtime) | 0.35 (keras_vits, LiteRT dynamic int8) | 0.78 (timm, ONNX "
    assert summary in text
    assert "| efficientvit_b1 | 1.00 (timm, ONNX Runtime) |" in text
    assert "- timm, litert-torch, LiteRT, failed: RuntimeError: a | b" in text
    assert "| 100 (25%) |" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", "0"], "must be a positive integer; received 0"),
        (["--rounds", "many"], "must be a positive integer; received many"),
        (["--models", "vit"], "invalid choice: 'vit'"),
        (["--contestants", "ours"], "invalid choice: 'ours'"),
    ],
)
def test_mistakes_on_the_command_line(run, arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.parsed(arguments)
    assert words in capsys.readouterr().err
