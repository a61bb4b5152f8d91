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
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from keras_vits._util import jsons
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


class _Part(msgspec.Struct, rename="camel"):
    """Of a report; what it holds beyond these fields is not read."""


class _Preferred(_Part):
    device_type: dict[str, msgspec.Raw] = {}


class _Usage(_Part):
    preferred: _Preferred = msgspec.field(default_factory=_Preferred)


class _Cost(_Part):
    weight: float = 0.0


class _Operation(_Part):
    device_usage: _Usage = msgspec.field(default_factory=_Usage)
    cost: _Cost = msgspec.field(default_factory=_Cost)
    blocks: list[_Block] = []


class _Block(_Part):
    operations: list[_Operation] = []


class _Function(_Part):
    block: _Block = msgspec.field(default_factory=_Block)


class _Functions(_Part):
    functions: dict[str, _Function] = {}


class _Program(_Part):
    version: _Functions = msgspec.field(default_factory=_Functions, name="_0")


class _Structure(_Part):
    program: _Program = msgspec.field(default_factory=_Program)


class _Step(_Part):
    samples: list[float]


class _Predictions(_Step):
    start_time: float


class _RunConfig(_Part):
    experiment_iterations: int = 1


class _Results(_Part):
    predict: _Predictions
    load: _Step
    compile: _Step | None = None
    perf_run_config: _RunConfig = msgspec.field(default_factory=_RunConfig)
    model_structure: _Structure = msgspec.field(default_factory=_Structure)


class _Metadata(_Part):
    file_name: str
    size: int


class _DeviceInfo(_Part):
    model_name: str
    system: str = msgspec.field(name="osNameAndVersionWithoutBuildNumber")


class _Report(_Part):
    model_metadata: _Metadata
    device_info: _DeviceInfo
    compute_unit: int
    device_results: _Results


class _Versioned(_Part):
    json_version: Any = None


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
        own = [report for report in reports if _load(report).model_metadata.file_name == artifact.path.stem]
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
    path = pathlib.Path(path)
    report = _load(path)
    name, size = report.model_metadata.file_name, report.model_metadata.size
    if (name, size) != (artifact.path.stem, artifact.size_bytes):
        raise ValueError(
            f"{path.name} is a report of a file {name} of {size} bytes, and {artifact.path.name} has "
            f"{artifact.size_bytes}: measure this one in Xcode."
        )
    if report.compute_unit not in UNITS:
        raise ValueError(
            f"{path.name} was made with the compute units {report.compute_unit!r}; known are "
            f"{', '.join(map(str, UNITS))}."
        )
    model, system = report.device_info.model_name, report.device_info.system
    results = report.device_results
    ms, load_ms = _milliseconds(path, results.predict, "predict"), _milliseconds(path, results.load, "load")
    p10, median, p90, p99 = (float(p) for p in np.percentile(ms, [10, 50, 90, 99]))
    count = results.perf_run_config.experiment_iterations
    rounds = ms.reshape(count, -1) if count > 0 and len(ms) % count == 0 else ms[None]
    environment = {"os": system, "first_load_ms": float(load_ms[0])}
    if results.compile is not None:
        environment["compile_ms"] = float(np.median(_milliseconds(path, results.compile, "compile")))
    try:
        started = EPOCH + datetime.timedelta(seconds=results.predict.start_time)
    except OverflowError:
        raise ValueError(
            f"{path.name} was begun {results.predict.start_time:g} s after 2001, which is no time: run the test again."
        ) from None
    return Latency(
        artifact_path=artifact.path,
        device=f"ios:{model}",
        cpu=model,  # a report does not name the chip
        runtime=f"Core ML on {system}",
        accelerator=UNITS[report.compute_unit],
        threads=None,
        runs=len(ms),
        median_ms=median,
        p10_ms=p10,
        p90_ms=p90,
        p99_ms=p99,
        load_ms=float(np.median(load_ms)),
        round_ms=tuple(float(r.mean()) for r in rounds),
        started=started.isoformat(timespec="milliseconds"),
        environment=environment | _shares(results.model_structure),
    )


def _load(path: pathlib.Path) -> _Report:
    file = path / "report.json" if path.is_dir() else path
    try:
        content = file.read_bytes()
        version = msgspec.json.decode(content, type=_Versioned).json_version
        if version != JSON_VERSION:
            raise ValueError(
                f"{file} is not a performance report of layout {JSON_VERSION}: its jsonVersion is {version!r}."
            )
        return msgspec.json.decode(content, type=_Report)
    except OSError as e:
        raise ValueError(f"{file} cannot be read ({e.strerror}): name a .mlperf folder that Xcode exported.") from None
    except msgspec.ValidationError as e:
        raise ValueError(f"{file} is no report of a test that came to its end ({e}): run the test again.") from None
    except jsons.ERRORS:
        raise ValueError(f"{file} is not JSON: name a .mlperf folder that Xcode exported.") from None


def _milliseconds(path: pathlib.Path, step: _Step, name: str) -> np.ndarray:
    if not step.samples:
        raise ValueError(f"{path.name} has no times in deviceResults.{name}.samples: run the test again.")
    if min(step.samples) < 0 or not math.isfinite(1e3 * max(step.samples)):
        raise ValueError(f"{path.name} has times in deviceResults.{name}.samples that are none: run the test again.")
    return 1e3 * np.array(step.samples)


def _shares(structure: _Structure) -> dict[str, float]:
    """Where the operations of a report run; {} where it does not say."""
    counts, costs = collections.Counter(), collections.Counter()
    blocks = [function.block for function in structure.program.version.functions.values()]
    while blocks:
        for operation in blocks.pop().operations:
            blocks += operation.blocks
            for kind in operation.device_usage.preferred.device_type:
                counts[UNIT_NAMES.get(kind, kind)] += 1
                costs[UNIT_NAMES.get(kind, kind)] += operation.cost.weight
    if not counts:
        return {}
    shares = {"operations": counts.total()}
    for label, found in (("operations", counts), ("cost", costs)):
        if found.total():
            shares |= {f"{label}_{name}": found[name] / found.total() for name in (*UNIT_NAMES.values(), *found)}
    return shares
