"""The devices behind Core ML: a Mac, for which a stand-in computes here, and reports of Xcode's, written by hand."""

import dataclasses
import json
import types

import keras
import numpy as np
import pytest

from keras_vits.edge import artifact as artifacts
from keras_vits.edge import coreml
from keras_vits.edge.devices import ios, macos
from keras_vits.edge.evidence.benchmark import benchmark
from keras_vits.edge.records import DeviceError, DeviceWarning

pytestmark = pytest.mark.once

QUICK = dict(min_runs=20, min_seconds=0.1, warmup_seconds=0.02)
STAND_IN = """\
# coremltools as it is on a Mac, in so far as it runs models: its other parts are the real ones.
import enum, importlib.machinery, pathlib, platform, sys, time, types

here = pathlib.Path(__file__).parents[1]
real = importlib.machinery.PathFinder.find_spec("coremltools", [p for p in sys.path if pathlib.Path(p) != here])
__path__ += real.submodule_search_locations
import numpy as np
from coremltools import proto

SECONDS = {"CPU_ONLY": 0.008, "CPU_AND_NE": 0.002, "ALL": 0.002}
ComputeUnit = enum.Enum("ComputeUnit", "ALL CPU_AND_GPU CPU_ONLY CPU_AND_NE")


class MLModel:
    def __init__(self, path, compute_units):
        if compute_units.name not in SECONDS:
            raise RuntimeError(f"{compute_units.name} has no such operation")
        self.seconds = SECONDS[compute_units.name]

    def predict(self, images):
        time.sleep(self.seconds)
        return {"dense": np.zeros((1, 5), np.float32)}


models = types.SimpleNamespace(MLModel=MLModel)
sys.platform = "darwin"
platform.mac_ver = lambda: ("15.1", ("", "", ""), "arm64")
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A Core ML artifact."""
    image = keras.Input((8, 8, 3))
    model = keras.Model(image, keras.layers.Dense(5, name="dense")(keras.layers.Flatten()(image)), name="tiny")
    return coreml.export(model, tmp_path_factory.mktemp("apple"))


# ---------------------------------------------------------------- macOS


@pytest.fixture
def mac(tmp_path, monkeypatch):
    """Makes this machine a Mac with Apple's processor to macos.py and to the processes it starts."""
    (tmp_path / "coremltools").mkdir()
    (tmp_path / "coremltools" / "__init__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(macos, "sys", types.SimpleNamespace(platform="darwin"))
    system = types.SimpleNamespace(mac_ver=lambda: ("15.1", ("", "", ""), "arm64"), machine=lambda: "arm64")
    monkeypatch.setattr(macos, "platform", system)


def test_each_compute_unit_is_measured_and_one_that_fails_is_left_out(package, mac):
    units = ("cpu", "cpu_and_gpu", "all")
    with pytest.warns(DeviceWarning, match=r"tiny_float16.mlpackage on cpu_and_gpu: .*CPU_AND_GPU has no such") as said:
        cpu, every = benchmark(package, device="macos", accelerators=units, **QUICK)
    assert len(said) == 1
    assert (cpu.accelerator, every.accelerator) == ("cpu", "all")
    assert cpu.median_ms >= 8 and 2 <= every.median_ms  # what the stand-in sleeps
    assert every.median_ms < cpu.median_ms
    for speed in (cpu, every):
        assert (speed.device, speed.threads, speed.artifact_path) == ("macos", None, package.path)
        assert speed.runtime == "Core ML on macOS 15.1"
        assert speed.runs >= 20 and speed.load_ms > 0 and speed.environment.pop("first_load_ms") > 0
        assert speed.environment == {"macos": "15.1", "machine": "arm64"}
    assert (cpu.started, len(cpu.round_ms)) == (every.started, len(every.round_ms))  # in turns


def test_a_mac_on_which_nothing_runs(package, mac):
    with pytest.warns(DeviceWarning), pytest.raises(DeviceError, match="none of the files on any compute unit"):
        benchmark(package, device="macos", accelerators="cpu_and_gpu", **QUICK)


def test_a_mac_with_an_intel_processor_has_no_neural_engine(mac, monkeypatch):
    assert macos._present() == macos.ACCELERATORS
    monkeypatch.setattr(macos.platform, "machine", lambda: "x86_64")
    assert macos._present() == ("cpu", "cpu_and_gpu", "all")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(device="macos"), "Core ML runs on macOS only: measure on a Mac"),
        (dict(device="macos:studio"), "takes no address; received 'studio'"),
        (dict(device="macos", threads=4), "Core ML chooses its threads by itself"),
        (dict(device="macos", accelerators="npu"), "macos has no accelerator 'npu'. It has: cpu, cpu_and_gpu"),
    ],
)
def test_what_a_mac_refuses(package, arguments, message, monkeypatch):
    monkeypatch.setattr(macos, "sys", types.SimpleNamespace(platform="linux"))
    with pytest.raises(ValueError, match=message):
        benchmark(package, **arguments)


# ---------------------------------------------------------------- iOS


def operation(name, device=None, weight=None, blocks=()):
    """An operation as a report has it; a constant has no device."""
    found = {"operatorName": name, "inputs": {}, "outputs": [{"name": name, "type": {}}], "blocks": list(blocks)}
    if device:
        kind = {"deviceType": {device: {}}}
        found |= {"cost": {"weight": weight}, "deviceUsage": {"preferred": kind, "supported": [kind]}}
    return found


def report(artifact, unit=2):
    """A report as Xcode writes it, three rounds of four predictions."""
    inner = {"operations": [operation("ios17.mul", "gpu", 0.1)]}
    operations = [
        operation("const"),
        operation("ios17.conv", "neuralEngine", 0.5),
        operation("ios17.linear", "neuralEngine", 0.3),
        operation("ios17.cond", "cpu", 0.1, [inner]),
    ]
    return {
        "jsonVersion": 1,
        "deviceResultVersion": 4,
        "deviceInfo": {
            "modelName": "iPhone 16 Pro",
            "osNameAndVersionWithoutBuildNumber": "iOS 26.5.2",
            "displayName": "Ada's phone",
            "serialNumber": "XSERIALX",
            "deviceID": "00008140-XID",
            "deviceType": {"iPhone": {}},
        },
        "modelMetadata": {
            "fileName": artifact.path.stem,
            "size": artifact.size_bytes,
            "modelUrl": "file:///Users/ada/tiny.mlpackage",
        },
        "computeUnit": unit,
        "deviceResults": {
            "compile": {"samples": [0.07, 0.05, 0.06], "numOperations": 3},
            "load": {"samples": [2.1, 0.022, 0.021, 1.8, 0.02], "numOperations": 3},
            "perfRunConfig": {"predictionCount": 4, "experimentIterations": 3, "loadCount": 3},
            "predict": {
                "startTime": 808242772.5,
                "samples": [0.025, 0.012, 0.012, 0.012, 0.015, 0.013, 0.013, 0.013, 0.022, 0.014, 0.014, 0.014],
                "numOperations": 4,
            },
            "modelStructure": {"program": {"_0": {"functions": {"main": {"block": {"operations": operations}}}}}},
        },
    }


def save(folder, content, name="tiny-phone.mlperf"):
    path = folder / name
    path.mkdir(parents=True)
    (path / "report.json").write_text(json.dumps(content))
    return path


def test_a_report_becomes_a_latency(package, tmp_path):
    path = save(tmp_path, report(package))
    speed = ios.read_report(path, package)
    assert (speed.device, speed.cpu, speed.accelerator) == ("ios:iPhone 16 Pro", "iPhone 16 Pro", "all")
    assert (speed.runtime, speed.threads, speed.runs) == ("Core ML on iOS 26.5.2", None, 12)
    assert speed.median_ms == pytest.approx(13.5)
    assert speed.p99_ms == pytest.approx(np.percentile([12] * 3 + [13] * 3 + [14] * 3 + [15, 22, 25], 99))
    assert speed.load_ms == pytest.approx(22)
    assert speed.round_ms == pytest.approx((15.25, 13.5, 16))
    assert speed.peak_memory_bytes is None and speed.baseline_memory_bytes is None
    assert speed.started == "2026-08-12T15:52:52.500+00:00"
    known = speed.environment
    assert known["os"] == "iOS 26.5.2"
    assert (known["first_load_ms"], known["compile_ms"]) == pytest.approx((2100, 60))
    assert known["operations"] == 4
    shares = {key: value for key, value in known.items() if key.startswith(("operations_", "cost_"))}
    assert shares == pytest.approx(
        {
            "operations_cpu": 0.25,
            "operations_gpu": 0.25,
            "operations_neural_engine": 0.5,
            "cost_cpu": 0.1,
            "cost_gpu": 0.1,
            "cost_neural_engine": 0.8,
        }
    )
    said = repr(dataclasses.asdict(speed))
    assert not any(secret in said for secret in ("Ada", "ada/", "XSERIALX", "XID"))
    assert ios.read_report(path / "report.json", package) == speed


def test_what_a_report_may_lack_and_hold_beyond(package, tmp_path):
    content = report(package, unit=3)
    for key in ("compile", "perfRunConfig", "modelStructure"):
        del content["deviceResults"][key]
    content["new"] = content["deviceResults"]["new"] = {"samples": []}
    speed = ios.read_report(save(tmp_path, content), package)
    assert speed.accelerator == "cpu_and_ne"
    assert speed.environment == {"os": "iOS 26.5.2", "first_load_ms": pytest.approx(2100)}
    assert len(speed.round_ms) == 1


def without(*keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (without("jsonVersion"), "not a performance report of layout 1: its jsonVersion is None"),
        (lambda content: content.update(jsonVersion=2), "its jsonVersion is 2"),
        (without("deviceInfo", "modelName"), r"missing required field `modelName` - at `\$\.deviceInfo`"),
        (without("deviceResults", "predict"), r"missing required field `predict` - at `\$\.deviceResults`"),
        (lambda content: content["modelMetadata"].update(size="5"), r"Expected `int`, got `str` - at .*size"),
        (lambda content: content.update(deviceResults=[]), r"Expected `object`, got `array` - at .*deviceResults"),
        (lambda content: content["deviceResults"]["load"].update(samples=[]), r"no times in deviceResults\.load"),
        (lambda content: content.update(computeUnit=7), "compute units 7; known are 0, 1, 2, 3"),
        (lambda content: content["modelMetadata"].update(size=5), r"of 5 bytes, and tiny_float16\.mlpackage has \d+"),
        (lambda content: content["modelMetadata"].update(fileName="other"), "report of a file other of"),
    ],
)
def test_a_report_that_is_refused(package, tmp_path, change, message):
    content = report(package)
    change(content)
    with pytest.raises(ValueError, match=message):
        ios.read_report(save(tmp_path, content), package)


def test_no_report(package, tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        ios.read_report(tmp_path / "nothing.mlperf", package)
    (tmp_path / "text.json").write_text("no JSON")
    with pytest.raises(ValueError, match="is not JSON"):
        ios.read_report(tmp_path / "text.json", package)


def test_benchmark_imports_reports(package, tmp_path):
    with pytest.raises(DeviceError, match=r"Only Xcode can measure.*write_steps"):
        benchmark(package, device="ios")
    with pytest.raises(DeviceError, match=r"holds no report of tiny_float16\.mlpackage"):
        benchmark(package, device=f"ios:{tmp_path}")
    for name, unit in (("a", 2), ("b", 0), ("c", 3)):
        path = save(tmp_path, report(package, unit), f"{name}.mlperf")
    found = benchmark(package, device=f"ios:{tmp_path}")
    assert [speed.accelerator for speed in found] == ["cpu", "cpu_and_ne", "all"]
    assert benchmark(package, device=f"ios:{path}", accelerators="cpu_and_ne").accelerator == "cpu_and_ne"
    with pytest.raises(DeviceError, match="holds no report"):
        benchmark(package, device=f"ios:{path}", accelerators="cpu")


def test_the_steps_name_the_file_and_what_to_do(package, tmp_path):
    path = ios.write_steps(package, tmp_path)
    assert path == tmp_path / "tiny_float16.mlpackage.xcode.md"
    text = path.read_text()
    for part in (
        "**Performance**",
        "**Run Test**",
        "`tiny_float16.mlpackage`",
        package.sha256,
        "CPU and Neural Engine",
    ):
        assert part in text
    assert "keras-vits benchmark tiny_float16.mlpackage --device ios:" in text
    assert artifacts.load(package.path) == package  # nothing was written into the package
    with pytest.raises(ValueError, match="is of the format litert, and Xcode measures: coreml"):
        ios.write_steps(dataclasses.replace(package, format="litert"))
