"""An iPhone or iPad behind Xcode, which measures a Core ML file, operated by a person, and exports a report.

`write_steps` writes what the person does, `read_report` reads the report: a folder `<file>-<name of the phone>.mlperf`
with a report.json. Apple documents what Xcode shows ("Analyzing a Core ML model's performance in Xcode", on
developer.apple.com; "Optimize your Core ML usage", WWDC22) and not what it exports. What is read of it is known from
two reports, of an iPhone 16 Pro with iOS 26.5 and an iPad Air M2 with iPadOS 18.7, that their owners published beside
the figures that Xcode showed (github.com/troobit/medata, github.com/D0NMEGA/Cortex):

    jsonVersion                            1
    modelMetadata.fileName                 name of the file without .mlpackage
    modelMetadata.size                     bytes of all files in it
    deviceInfo.modelName                   "iPhone 16 Pro"
    deviceInfo.osNameAndVersionWithoutBuildNumber    "iOS 26.5.2"
    computeUnit                            number of an MLComputeUnits of Core ML
    deviceResults.predict.samples          seconds of every prediction; the first of each round is one without warm-up
    deviceResults.predict.startTime        seconds since 2001-01-01 UTC, Apple's reference date
    deviceResults.load.samples             seconds; Xcode shows the median, and the first is one that prepares the file
    deviceResults.compile.samples          seconds; optional here
    deviceResults.perfRunConfig            experimentIterations: number of rounds; optional here
    deviceResults.modelStructure.program._0.functions.*.block.operations    optional here; of each operation
        deviceUsage.preferred.deviceType   an object of one key: "neuralEngine", "gpu" or "cpu"; a constant has none
        cost.weight                        estimated share of the whole model's time
        blocks                             operations inside it

A report also holds the phone's serial number and name, which are not read.
"""

from __future__ import annotations

import collections
import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits._util.files import writing

from ..artifact import Artifact
from ..records import DeviceError, Latency

THREADS = (1,)
ACCELERATORS = ("cpu", "cpu_and_gpu", "cpu_and_ne", "all")
FORMATS = ("coreml",)
UNITS = {0: "cpu", 1: "cpu_and_gpu", 2: "all", 3: "cpu_and_ne"}  # MLComputeUnits -> our name
NAMES = {"cpu": "CPU only", "cpu_and_gpu": "CPU and GPU", "cpu_and_ne": "CPU and Neural Engine", "all": "All"}
UNIT_NAMES = {"cpu": "cpu", "gpu": "gpu", "neuralEngine": "neural_engine"}  # a report's name -> ours
EPOCH = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)
JSON_VERSION = 1

STEPS = """# {file} on an iPhone or iPad

Xcode measures it on any iPhone or iPad with iOS 16 or newer. You need a Mac with Xcode and a cable.

1. Connect the phone, unlock it, and trust the Mac. Under Settings, Privacy & Security, turn Developer Mode on.
2. Open `{file}` with Xcode: double-click it, or `xed {file}`.
3. Choose the tab **Performance** and press **+** below the list of reports.
4. Choose the phone, press **Next**, choose the compute units ({units}), press **Run Test**,
   and keep the phone unlocked until the report appears.
5. Repeat steps 3 and 4 for every choice of compute units that you want to compare.
6. Export each report to a folder of your choice. It is itself a folder that ends in `.mlperf`, with a `report.json`.
7. Import them, on any computer that has `{file}` and `{file}.json`:

       keras-vits benchmark {file} --device ios:FOLDER

A report holds the phone's serial number, its name and paths of the Mac. The import reads none of them; do not publish
the `.mlperf` folders themselves.

The file these steps are for: {size_bytes} bytes, sha256 {sha256}.
"""


def write_steps(artifact: Artifact, folder: str | pathlib.Path | None = None) -> pathlib.Path:
    """Writes what to do in Xcode to measure an artifact, as `<file>.xcode.md`.

    Args:
        artifact: an `Artifact` of the format `"coreml"`.
        folder: where to write; beside the file by default.

    Returns:
        The path of what was written.

    Raises:
        ValueError: another format, or a folder that cannot be written.
    """
    if artifact.format not in FORMATS:
        raise ValueError(
            f"{artifact.path.name} is of the format {artifact.format}, and Xcode measures: {', '.join(FORMATS)}."
        )
    path = pathlib.Path(folder or artifact.path.parent) / f"{artifact.path.name}.xcode.md"
    units = ", ".join(f"**{name}**" for name in NAMES.values())
    text = STEPS.format(file=artifact.path.name, units=units, size_bytes=artifact.size_bytes, sha256=artifact.sha256)
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def measure(
    artifacts: Sequence[Artifact], where: str | None, *, accelerators: Sequence[str] | None, **_: Any
) -> list[Latency]:
    """Imports what Xcode measured; the other arguments of `edge.benchmark` were up to Xcode.

    Args:
        artifacts: list of `Artifact`.
        where: path of a report, or of a folder of reports, `"ios:out/reports"`.
        accelerators: which reports to take; all by default.

    Returns:
        A `Latency` of every report, artifact by artifact, in the order of `ACCELERATORS`.

    Raises:
        DeviceError: no path is given, or it holds no report of one of the artifacts.
        ValueError: see `read_report`.
    """
    if where is None:
        raise DeviceError(
            "Only Xcode can measure on an iPhone: do what keras_vits.edge.devices.ios.write_steps(artifact) writes "
            "down, and name the folder of its reports: device='ios:FOLDER'."
        )
    path = pathlib.Path(where)
    reports = [path] if path.suffix == ".mlperf" or path.is_file() else sorted(path.glob("*.mlperf"))
    found = []
    for artifact in artifacts:
        own = [report for report in reports if _file_name(report) == artifact.path.stem]
        speeds = [read_report(report, artifact) for report in own]
        speeds = [speed for speed in speeds if speed.accelerator in (accelerators or ACCELERATORS)]
        if not speeds:
            raise DeviceError(
                f"{path} holds no report of {artifact.path.name} (.mlperf): export one from Xcode.", found
            )
        found += sorted(speeds, key=lambda speed: (speed.device, ACCELERATORS.index(speed.accelerator)))
    return found


def read_report(path: str | pathlib.Path, artifact: Artifact) -> Latency:
    """What Xcode measured, as a `Latency`.

    Args:
        path: of the `.mlperf` folder that Xcode exported, or of its report.json.
        artifact: the `Artifact` of the file that was measured.

    Returns:
        A `Latency` of the device `"ios:<model of the phone>"`. `load_ms` is the median, of a file that the phone has
        prepared already. In `environment`: `os`; `first_load_ms`, with the preparation; `compile_ms` on the phone;
        `operations`, how many there are; `operations_cpu`, `operations_gpu` and `operations_neural_engine`, the shares
        of them that Core ML planned for each; `cost_cpu` and so on, the same weighted by their estimated time.

    Raises:
        ValueError: no report, one of another layout (what is missing is named), of another file, or of an older export.
    """
    path, data = pathlib.Path(path), _load(path)
    get = lambda *keys: _get(path, data, *keys)
    name, size = get("modelMetadata", "fileName"), get("modelMetadata", "size")
    if (name, size) != (artifact.path.stem, artifact.size_bytes):
        raise ValueError(
            f"{path.name} is a report of a file {name} of {size} bytes, and {artifact.path.name} has "
            f"{artifact.size_bytes}: measure this one in Xcode."
        )
    unit = get("computeUnit")
    if unit not in UNITS:
        raise ValueError(
            f"{path.name} was made with the compute units {unit!r}; known are {', '.join(map(str, UNITS))}."
        )
    model, system = get("deviceInfo", "modelName"), get("deviceInfo", "osNameAndVersionWithoutBuildNumber")
    results = get("deviceResults")
    ms, load_ms = (np.array(_samples(path, data, step)) for step in ("predict", "load"))
    median, p90, p99 = (float(p) for p in np.percentile(ms, [50, 90, 99]))
    rounds = results.get("perfRunConfig", {}).get("experimentIterations", 1)
    rounds = ms.reshape(rounds, -1) if len(ms) % rounds == 0 else ms[None]
    environment = {"os": system, "first_load_ms": float(load_ms[0])}
    if "compile" in results:
        environment["compile_ms"] = float(np.median(_samples(path, data, "compile")))
    started = EPOCH + datetime.timedelta(seconds=get("deviceResults", "predict", "startTime"))
    return Latency(
        artifact_path=artifact.path,
        device=f"ios:{model}",
        cpu=model,  # a report does not name the chip
        runtime=f"Core ML on {system}",
        accelerator=UNITS[unit],
        threads=None,
        runs=len(ms),
        median_ms=median,
        p90_ms=p90,
        p99_ms=p99,
        load_ms=float(np.median(load_ms)),
        round_ms=tuple(float(r.mean()) for r in rounds),
        started=started.isoformat(timespec="milliseconds"),
        environment=environment | _shares(results),
    )


def _load(path: pathlib.Path) -> dict[str, Any]:
    file = path / "report.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"{file} cannot be read ({e.strerror}): name a .mlperf folder that Xcode exported.") from None
    except ValueError:
        raise ValueError(f"{file} is not JSON: name a .mlperf folder that Xcode exported.") from None
    version = data.get("jsonVersion") if isinstance(data, dict) else None
    if version != JSON_VERSION:
        raise ValueError(
            f"{file} is not a performance report of layout {JSON_VERSION}: its jsonVersion is {version!r}."
        )
    return data


def _file_name(path: pathlib.Path) -> str:
    return _get(path, _load(path), "modelMetadata", "fileName")


def _get(path: pathlib.Path, data: Any, *keys: str) -> Any:
    """A field of a report."""
    for key in keys:
        if not isinstance(data, dict) or key not in data:
            raise ValueError(f"{path.name} has no {'.'.join(keys)}: it is no report of a test that came to its end.")
        data = data[key]
    return data


def _samples(path: pathlib.Path, data: Any, step: str) -> list[float]:
    """Milliseconds."""
    samples = _get(path, data, "deviceResults", step, "samples")
    if not samples:
        raise ValueError(f"{path.name} has no times in deviceResults.{step}.samples: run the test again.")
    return [1e3 * seconds for seconds in samples]


def _shares(results: Mapping[str, Any]) -> dict[str, float]:
    """Where the operations of a report run; {} where it does not say."""
    functions = results.get("modelStructure", {}).get("program", {}).get("_0", {}).get("functions", {})
    counts, costs = collections.Counter(), collections.Counter()
    blocks = [function.get("block", {}) for function in functions.values()]
    while blocks:
        for operation in blocks.pop().get("operations", ()):
            blocks += operation.get("blocks", ())
            for kind in operation.get("deviceUsage", {}).get("preferred", {}).get("deviceType", ()):
                counts[UNIT_NAMES.get(kind, kind)] += 1
                costs[UNIT_NAMES.get(kind, kind)] += operation.get("cost", {}).get("weight", 0.0)
    if not counts:
        return {}
    shares = {"operations": counts.total()}
    for label, found in (("operations", counts), ("cost", costs)):
        if found.total():
            shares |= {f"{label}_{name}": found[name] / found.total() for name in (*UNIT_NAMES.values(), *found)}
    return shares
