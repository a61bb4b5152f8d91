"""benchmarks/gpu.sh: its dry run, and that what fails is a row."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.once


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


def test_a_dry_run_measures_timm_and_ours(gpu, tmp_path):
    environment = {**os.environ, "GPU_DRY_RUN": "1", "PYTHON": sys.executable, "WHEELS": str(tmp_path), "COMMIT": "abc"}
    command = [ROOT / "benchmarks" / "gpu.sh", "--part", "device", "speed", "--runners", "timm", "keras_vits, JAX"]
    done = subprocess.run(
        [*command, "--record", tmp_path / "gpu.jsonl"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert all(list(row) == gpu.FIELDS and row["commit"] == "abc" for row in rows)
    assert not [row["error"] for row in rows if row["error"]]
    device, speed, profiles = ([row for row in rows if row["part"] == p] for p in ("device", "speed", "profile"))
    assert [row["backend"] for row in device] == ["torch", "jax"]
    assert {(row["runner"], row["mode"]) for row in speed} == {
        (runner, mode) for runner in ("timm", "keras_vits, JAX") for mode in ("train", "infer")
    }
    assert len({row["parameters"] for row in speed}) == 1 and all(row["median_ms"] > 0 for row in speed)
    assert all(row["gemm_flops_per_second"] and row["ratio"] for row in speed)
    assert [row["runner"] for row in profiles] == ["timm", "keras_vits, JAX"] and all(
        row["kernels"] for row in profiles
    )


STAND_IN = """
import json, sys
order = json.loads(sys.stdin.readline())
if order["library"] == "timm":
    raise ImportError("no timm here")
print(json.dumps(dict(parameters=7, version="1", library_version="2")), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["mode"] == "train":
        print(json.dumps(dict(error="OutOfMemoryError: not enough of it")), flush=True)
    else:
        print(json.dumps(dict(ms=[10], peak_memory_bytes=1, first_step_ms=5)), flush=True)
"""


def test_what_fails_is_a_row_with_its_reason(gpu, monkeypatch, tmp_path):
    (tmp_path / "gpu_worker.py").write_text(STAND_IN)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu, "DRY_RUNNERS", ("timm", "keras_vits, PyTorch"))
    options = gpu.parsed(["--smoke", "--part", "speed", "--record", str(tmp_path / "gpu.jsonl")])
    gpu.Bench(options).run()
    rows = [json.loads(line) for line in options.record.read_text().splitlines()]
    found = {(row["runner"], row["mode"]): row["error"] or row["median_ms"] for row in rows if row["part"] == "speed"}
    missing = "its process ended with code 1: ImportError: no timm here"
    assert found == {
        ("timm", "train"): missing,
        ("timm", "infer"): missing,
        ("keras_vits, PyTorch", "train"): "OutOfMemoryError: not enough of it",
        ("keras_vits, PyTorch", "infer"): 10,
    }


def test_what_there_is_no_time_for_is_a_row(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "STOP", -1)
    monkeypatch.setattr(gpu.Bench, "prepare", lambda self, job, orders=(): setattr(job, "ready", True))
    options = gpu.parsed(["--smoke", "--part", "device", "speed", "--record", str(tmp_path / "gpu.jsonl")])
    gpu.Bench(options).run()
    rows = [json.loads(line) for line in options.record.read_text().splitlines()]
    assert {row["error"] for row in rows} == {"left out: the time was over"}
    assert len(rows) == 2 + 2 * len(gpu.DRY_RUNNERS)
