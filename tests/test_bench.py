"""benchmarks/run.py: its table is complete, its rows are right, and what fails becomes a row."""

import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODEL = "mobilevitv2_100"

pytestmark = pytest.mark.once


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The module, with a cache of its own."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import run

    monkeypatch.setattr(run, "CACHE", tmp_path / "cache")
    return run


@pytest.fixture
def suite(run):
    return sys.modules["suite"]


def row(suite, contestant, ratio, sqnr_db=120.0, model=MODEL, **more):
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


def test_table_is_complete(run, suite):
    loaders, exporters = sys.modules["run_worker"].LOADERS, run.export_worker.EXPORTERS
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


def test_environments_are_pinned(run, suite):
    for environment in suite.ENVIRONMENTS:
        lines = [x for x in run.requirements(environment).read_text().splitlines() if not x.startswith("#")]
        assert lines and all("==" in line for line in lines)
        assert "torch==2.13.0" in lines
        shared = dict(line.split("==") for line in run.requirements("main").read_text().splitlines() if "==" in line)
        for package, version in (line.split("==") for line in lines):
            if package in ("timm", "numpy", "ai-edge-litert"):
                assert version == shared[package], "the same everywhere"


def test_smoke_run(run, suite, tmp_path, monkeypatch, capsys):
    """Exports, checks and measures; the next run takes the files as they are; what cannot be exported has a row."""
    broken = suite.File(suffix=".tflite", exporter="ai_edge_quantizer", needs="weights", options={"recipe": "no_such"})
    monkeypatch.setitem(suite.FILES, "ours_aeq_dynamic_int8", broken)
    record = tmp_path / "peers.jsonl"
    arguments = ["--smoke", "--models", MODEL, "--threads", "1", "--record", str(record)]
    arguments += ["--contestants", "timm", "ours_aeq_dynamic_int8"]
    run.main(arguments)
    printed = capsys.readouterr().out
    ours, timm, none = rows = run.read(record)
    assert [r["contestant"] for r in rows] == ["ours_float32", "timm", "ours_aeq_dynamic_int8"]
    keys = set(row(suite, "timm", 1))
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
    assert "failed: AttributeError" in printed and "| timm, PyTorch | torch 2.13.0 | 1." not in printed

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


def test_record_replaces_rows(run, suite, tmp_path):
    path = tmp_path / "peers.jsonl"
    run.record(path, [row(suite, "timm", 3.0), row(suite, "ours_float32", 1.0)])
    run.record(path, [row(suite, "timm", 2.0), row(suite, "timm", 5.0, threads=1)])
    assert [(r["contestant"], r["threads"], r["ratio"]) for r in run.read(path)] == [
        ("timm", 1, 5.0),
        ("ours_float32", 2, 1.0),
        ("timm", 2, 2.0),
    ]


def test_section_judges_the_targets(run, suite, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RECORD", tmp_path / "peers.jsonl")
    assert run.section() == []
    found = []
    for model, peer in zip(suite.MODELS, (1.3, 1.3, 1.3, 1.2, 1.05, 1.0), strict=True):
        found += [
            row(suite, "ours_float32", 1.0, model=model),
            row(suite, "onnx_float32", peer, model=model),
            row(suite, "timm", 2.0, model=model),
            row(suite, "ours_static_int8", 0.2, 20.0, model=model),  # fast, but not the same answers
            row(suite, "ours_dynamic_int8", 0.35, 40.0, model=model),
            row(suite, "onnx_static_int8", 0.45, 10.0, model=model),
            row(suite, "ours_aeq_dynamic_int8", 0.3, 35.0, model=model),  # our own file: no peer
            row(suite, "gemm_float32", 1.0, None, model=model, gflops=400.0),
            failed(run, row(suite, "litert_torch", 1.0, model=model), "RuntimeError: a | b"),
        ]
    run.record(run.RECORD, found)
    verdicts = run.verdicts(run.read(run.RECORD))
    assert verdicts["mobilevit_s"] == {
        "float32": pytest.approx(1 / 1.3),
        "best_float32": "onnx_float32",
        "int8": 0.35,
        "best_int8": "ours_dynamic_int8",
        "int8_to_peer": pytest.approx(0.35 / 0.45),
        "best_peer_int8": "onnx_static_int8",
    }
    text = "\n".join(run.section())
    assert (
        "| mobilevit_s | 0.77, met (timm, ONNX Runtime) | 0.35, met (keras_vits, LiteRT dynamic int8) | 0.78, missed"
        in text
    )
    assert "| efficientvit_b1 | 1.00, missed (timm, ONNX Runtime) |" in text
    assert "At most 0.8 of the fastest float32 peer on 3 models of 3: met." in text
    assert "failed: RuntimeError: a / b" in text
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
