"""A phone or tablet behind `adb`: CPU, GPU and NNAPI, each run of a file in a process of LiteRT's `benchmark_model`.

    adb devices -l                     which device
    adb shell getprop                  its chip, ABIs and Android version
    adb push benchmark_model, files    into a folder of its own in /data/local/tmp, then compared by SHA-256
    the self-test pictures             must give what they give here, before any time is taken
    turns A B C A B C ...              a turn that made the device hot is repeated after a pause
    adb shell rm -rf the folder        also after errors and Ctrl-C

The user provides `benchmark_model`; nothing is downloaded. Flags and output are those of google-ai-edge/LiteRT,
tflite/tools/benchmark, as read at commits 7d88950 (benchmark_model.cc) and 01d971c (benchmark_tflite_model.cc). It
prints the median and the mean of its runs, but no percentile that a `Latency` has: these are `None`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import os
import pathlib
import re
import secrets
import shlex
import shutil
import struct
import subprocess
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_vits._util import files
from keras_vits._util.progress import progress

from ..artifact import Artifact
from ..records import DeviceError, DeviceWarning, Latency
from ..selftest import self_test
from ..targets import litert
from .turns import PATIENCE, WARMUP_RUNS, Contestant, FailedError, Goal, attempt, take_turns

THREADS = (1, 2, 4)
ACCELERATORS = ("cpu", "gpu", "nnapi")
FORMATS = ("litert",)
VARIABLE = "KERAS_VITS_BENCHMARK_MODEL"  # names the benchmark_model to use
ELF = {(1, 40): "armeabi-v7a", (2, 183): "arm64-v8a", (1, 3): "x86", (2, 62): "x86_64", (2, 243): "riscv64"}
STATES = {  # of a device that adb sees and cannot use -> what to do
    "unauthorized": "has not allowed this computer to debug it: unlock it and accept 'Allow USB debugging?'",
    "offline": "is offline: unplug it and plug it in again",
    "no": "may not be opened by this user: give it USB permissions (on Linux, install Android's udev rules)",
}
TURNS = 5  # of every file, in which `min_runs` and `min_seconds` are divided
ANSWER_SECONDS = 60  # until a device that does not answer is given up
START_SECONDS = 120  # until a benchmark_model that takes longer than it may is given up: GPUs compile for long
BYTES_PER_SECOND = 1e6  # a push that is slower is given up
HOT_DEGREES = 5.0  # Celsius over the start: a turn that ends so hot is repeated ...
COOL_DEGREES = 2.0  # ... once the device has cooled down to so much over the start
COOL_SECONDS = 300  # of waiting in all; then times are taken hot, with a warning
LOOK_SECONDS = 10  # between two looks at the temperature


def measure(
    artifacts: Sequence[Artifact],
    where: str | None,
    *,
    threads: tuple[int, ...],
    accelerators: tuple[str, ...] | None,
    min_runs: int,
    min_seconds: float,
    warmup_seconds: float,
) -> list[Latency]:
    """See `edge.benchmark`; `where` is the device's serial number, and may be `None` where there is one only.

    Raises:
        DeviceError: no adb, no such device, no `benchmark_model` that it can run, or it went away; `.results` holds
            what was measured by then. An artifact that fails on one accelerator is left out, with a `DeviceWarning`.
    """
    adb = shutil.which("adb")
    if adb is None:
        raise DeviceError("adb is not installed: install Android's platform tools and put adb on the PATH.")
    device = _Device(adb, _serial(adb, where))
    device.look()
    binary, abi = _binary(device)
    tests = [_SelfTest(artifact) for artifact in progress(artifacts, "Preparing")]
    ways = [
        _Way(device, test, number, accelerator, count, (min_runs, min_seconds, warmup_seconds))
        for number, test in enumerate(tests)
        for accelerator in accelerators or device.accelerators()
        for count in (threads if accelerator == "cpu" else (max(threads),))
    ]
    record = {
        "device": f"android:{device.serial}",
        "cpu": device.chip,
        "runtime": f"benchmark_model {files.sha256(binary)[:12]}",
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    }
    about = {"model": device.model, "android": device.android, "abi": abi}
    session = _Session(device, ways)
    try:
        with tempfile.TemporaryDirectory() as folder, device:
            device.install(binary, tests, pathlib.Path(folder))
            session.check(pathlib.Path(folder))
            session.measure()
    except DeviceError as e:
        e.results = tuple(session.results(record, about))
        raise
    return session.results(record, about)


# ---------------------------------------------------------------- what is run


class _SelfTest:
    """What a file gives here on the pictures that every bundle tests itself with.

    Attributes:
        artifact: the file.
        inputs: list of arrays as the file takes them, its batch filled with pictures.
        expected: first output on each of them, (N,...).
        tolerance: `"cpu"` and `"gpu"` -> the largest difference of a number on the device that is accepted.
        flags: of `benchmark_model`, that say what the file takes.
    """

    def __init__(self, artifact: Artifact):
        self.artifact = artifact
        runner, spec = litert.load(artifact), artifact.input
        test = self_test(artifact, runner)
        self.inputs, first = test.batches, test.outputs[0]
        self.expected = first.values.reshape(len(self.inputs), -1, *first.values.shape[1:])
        self.tolerance = first.tolerance
        self.flags = {"input_layer": spec.name, "input_layer_shape": ",".join(map(str, spec.stored_shape))}
        signatures = runner.interpreter.get_signature_list()
        if len(signatures) > 1:
            self.flags["signature_to_run_for"] = next(iter(signatures))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Turn:
    """What one process of `benchmark_model` printed."""

    runs: int
    median_ms: float
    mean_ms: float
    load_ms: float


class _Way(Contestant[_Turn]):
    """One file with one accelerator and one number of threads; those of a GPU serve the operations it leaves over."""

    def __init__(
        self,
        device: _Device,
        test: _SelfTest,
        number: int,
        accelerator: str,
        threads: int,
        least: tuple[int, float, float],
    ):
        super().__init__()
        self.device, self.test, self.number = device, test, number
        self.accelerator, self.threads, self.least = accelerator, threads, least
        self.memory: dict[str, int] = {}
        self.environment: dict[str, str] = {}
        self.flags = {"graph": f"{number}.tflite", "num_threads": threads, **test.flags}
        if accelerator != "cpu":
            self.flags[f"use_{accelerator}"] = "true"

    def __str__(self) -> str:
        threads = f" with {self.threads} thread" + "s" * (self.threads > 1) if self.accelerator == "cpu" else ""
        return f"{self.test.artifact.path.name} on {self.accelerator}{threads}"

    def fail(self, reason: str) -> None:
        self.failure = f"{self}: {reason}"
        warnings.warn(f"{self} of {self.device} was left out: {reason}.", DeviceWarning, stacklevel=5)

    def run(self, picture: int, seconds: float, **flags: Any) -> str:
        """What `benchmark_model` prints; a `FailedError` if it fails, or did not use the accelerator."""
        flags = {**self.flags, "input_layer_value_files": f"{self._input}:{self.number}_{picture}.bin", **flags}
        text = self.device.run(flags, f"running {self}", seconds)
        if self.accelerator != "cpu":
            # Without it the tool falls back to the CPU, and a flag that it does not know is a warning only.
            applied = re.search(rf"Explicitly applied {self.accelerator.upper()} delegate.*", text)
            if not applied:
                raise FailedError(_reason(text, "its delegate was not applied"))
            kernels = re.search(r"partially executed by the delegate w/ (\d+)", applied[0])
            self.environment["delegated"] = f"in {kernels[1]} parts" if kernels else "whole"
        return text

    @property
    def _input(self) -> str:
        return self.test.artifact.input.name

    def check(self, folder: pathlib.Path) -> None:
        """Compares the outputs of all pictures with those of this machine; measures memory on the way."""
        once = {"num_runs": 1, "min_secs": 0, "warmup_runs": 0, "warmup_min_secs": 0}
        names = [f"{i}.out" for i in range(len(self.test.inputs))]
        for picture, name in enumerate(names):
            flags = {"output_filepath": name, "report_peak_memory_footprint": "true"}
            text = self.run(picture, START_SECONDS, **once, **flags)
        self.device.pull(names, folder, f"checking {self}")
        expected = self.test.expected
        size = expected[0].nbytes
        content = [(folder / name).read_bytes() for name in names]
        if any(len(c) < size for c in content):
            raise FailedError("its output is incomplete")
        found = np.stack([np.frombuffer(c[:size], expected.dtype).reshape(expected.shape[1:]) for c in content])
        error = float(np.abs(found.astype(float) - expected).max())
        allowed = self.test.tolerance["cpu" if self.accelerator == "cpu" else "gpu"]
        if not error <= allowed:  # NaN
            raise FailedError(f"its outputs differ from this machine's by {error:.3g}, and {allowed:.3g} is allowed")
        peak, delta = (
            re.search(pattern, text) for pattern in (r"periodic monitoring: ([\d.e+]+)", r"overall=([\d.e+]+)")
        )
        if peak and delta:  # in MiB: the largest resident memory, and how much it has grown since the start
            bytes_of = lambda mib: round(mib * 2**20)
            self.memory = {
                "peak_memory_bytes": bytes_of(float(peak[1])),
                "baseline_memory_bytes": bytes_of(float(peak[1]) - float(delta[1])),
            }

    def turn(self) -> None:
        runs, seconds, warmup_seconds = self.least
        seconds /= TURNS
        most = max(PATIENCE * seconds, warmup_seconds)
        flags = {"num_runs": math.ceil(runs / TURNS), "min_secs": f"{seconds:g}", "max_secs": f"{most:g}"}
        flags |= {"warmup_runs": WARMUP_RUNS, "warmup_min_secs": f"{warmup_seconds:g}"}
        text = self.run(0, START_SECONDS + 2 * most, **flags)
        timings = re.search(r"Init: ([\d.e+]+),.*Inference \(avg\): ([\d.e+]+)", text)
        counts = re.findall(r"count=(\d+).* median=([\d.e+]+)", text)  # of the warm-up, then of what counts
        if not timings or not counts:
            raise FailedError("it printed no median: build a benchmark_model from the current LiteRT sources")
        median, mean, load = (float(us) / 1e3 for us in (counts[-1][1], timings[2], timings[1]))
        self.rounds.append(_Turn(runs=int(counts[-1][0]), median_ms=median, mean_ms=mean, load_ms=load))


class _Session:
    """The ways of one call, and what was measured of them."""

    def __init__(self, device: _Device, ways: Sequence[_Way]):
        self.device, self.ways = device, ways
        self.before: float | None = None  # degrees
        self.after: float | None = None
        self.hottest: float | None = None  # of a round that was kept though it was hot
        self.left = float(COOL_SECONDS)

    def check(self, folder: pathlib.Path) -> None:
        """Compares outputs, of every way."""
        self.before = self.device.temperature()
        for way in progress(self.ways, "Checking"):
            attempt(way, way.check, folder)

    def measure(self) -> None:
        """Takes times in turns; a round that ended hot is taken again as long as there is time left to cool down."""
        take_turns(self.ways, Goal(rounds=TURNS), keeps=self._keeps)
        if all(way.failure for way in self.ways):
            raise DeviceError(f"{self.device} could run nothing of it: {self.ways[-1].failure}.")
        if self.hottest is not None:
            warnings.warn(
                f"{self.device} began at {self.before:g} degrees Celsius, reached {self.hottest:g} and did not cool "
                f"down in {COOL_SECONDS} s: its times may be those of a slowed processor.",
                DeviceWarning,
                stacklevel=4,
            )

    def _keeps(self) -> bool:
        """Whether a round counts; waits, where it does not."""
        self.after = self.device.temperature()
        if not self._is_hot(HOT_DEGREES):
            return True
        if self.left <= 0:
            self.hottest = max(self.after, self.hottest or self.after)
            return True
        while self._is_hot(COOL_DEGREES) and self.left > 0:
            time.sleep(LOOK_SECONDS)
            self.left -= LOOK_SECONDS
            self.after = self.device.temperature()
        return False

    def _is_hot(self, degrees: float) -> bool:
        return self.before is not None and self.after is not None and self.after > self.before + degrees

    def results(self, record: Mapping[str, Any], about: Mapping[str, Any]) -> list[Latency]:
        """A `Latency` of each way that was measured; a round that was not completed does not count."""
        live = [way for way in self.ways if not way.failure]
        complete = max(1, min((len(way.rounds) for way in live), default=1))
        degrees = {"temperature_before_c": self.before, "temperature_after_c": self.after}
        degrees = {name: value for name, value in degrees.items() if value is not None}
        found = []
        for way in live:
            if turns := way.rounds[:complete]:
                found.append(
                    Latency(
                        artifact_path=way.test.artifact.path,
                        accelerator=way.accelerator,
                        threads=way.threads,
                        runs=sum(turn.runs for turn in turns),
                        median_ms=float(np.median([turn.median_ms for turn in turns])),
                        load_ms=float(np.median([turn.load_ms for turn in turns])),
                        round_ms=tuple(turn.mean_ms for turn in turns),
                        environment={**about, **degrees, **way.environment},
                        **way.memory,
                        **record,
                    )
                )
        return found


# ---------------------------------------------------------------- the device


class _HangError(DeviceError):
    """A command that did not end in time."""


class _Device:
    """A device behind adb, and our folder on it, which is removed when the `with` block ends."""

    def __init__(self, adb: str, serial: str):
        self.adb, self.serial = adb, serial
        self.folder = f"/data/local/tmp/keras_vits.{secrets.token_hex(4)}"

    def __str__(self) -> str:
        return f"The device {self.serial}"

    def __enter__(self) -> _Device:
        return self

    def __exit__(self, *_: object) -> None:
        for _ in range(2):
            with contextlib.suppress(DeviceError):
                if self.shell(f"{self._kill()}; rm -rf {self.folder}", "cleaning up")[0] == 0:
                    return
        warnings.warn(
            f"{self} may still have the folder {self.folder}: remove it with `adb -s {self.serial} shell rm -rf "
            f"{self.folder}`.",
            DeviceWarning,
            stacklevel=4,
        )

    def look(self) -> None:
        """Reads what the device says of itself."""
        status, text = self.shell("getprop", "reading its properties")
        if status:
            raise DeviceError(f"{self} does not tell its properties ({_words(text)}): restart it and run again.")
        known = dict(re.findall(r"^\[(.*?)\]: \[(.*?)\]\r?$", text, re.MULTILINE))
        chip = " ".join(filter(None, (known.get("ro.soc.manufacturer"), known.get("ro.soc.model"))))
        self.chip = chip or known.get("ro.board.platform") or known.get("ro.hardware") or "unknown"
        self.model = known.get("ro.product.model", "unknown")
        self.android = known.get("ro.build.version.release", "unknown")
        self.abis = (known.get("ro.product.cpu.abilist") or known.get("ro.product.cpu.abi") or "unknown").split(",")
        number = lambda name: int(known[name]) if known.get(name, "").isdigit() else 0
        self.has_gpu = number("ro.opengles.version") >= 0x30001  # OpenGL ES 3.1: what the delegate falls back to
        self.has_nnapi = number("ro.build.version.sdk") >= 27  # Android 8.1

    def accelerators(self) -> list[str]:
        """The names of what is there."""
        return [name for name in ACCELERATORS if getattr(self, f"has_{name}", True)]

    def temperature(self) -> float | None:
        """Degrees Celsius of the skin, which phones are throttled by, or else of the battery; `None` if unknown."""
        text = self.shell("dumpsys thermalservice; dumpsys battery", "reading its temperature")[1]
        now = text.rpartition("Current temperatures from HAL:")[2]
        skin = [float(value) for value in re.findall(r"mValue=([\d.]+), mType=3", now)]
        battery = re.search(r"^\s*temperature: (\d+)", text, re.MULTILINE)
        return max(skin) if any(skin) else int(battery[1]) / 10 if battery else None

    def install(self, binary: pathlib.Path, tests: Sequence[_SelfTest], folder: pathlib.Path) -> None:
        """Pushes everything, and compares hashes."""
        doing = f"making {self.folder}"
        status, text = self.shell(f"mkdir {self.folder}", doing)
        if status:
            raise DeviceError(f"{self} has no room for files of adb ({_words(text)}): check its /data/local/tmp.")
        hashes = {"benchmark_model": files.sha256(binary)}
        self.push([binary], "benchmark_model")
        for number, test in enumerate(progress(tests, "Pushing")):
            self.push([test.artifact.path], f"{number}.tflite")
            hashes[f"{number}.tflite"] = test.artifact.sha256
            pictures = [folder / f"{number}_{i}.bin" for i in range(len(test.inputs))]
            for path, content in zip(pictures, test.inputs, strict=True):
                path.write_bytes(content.tobytes())
                hashes[path.name] = files.sha256(path)
            self.push(pictures, "")
        command = f"cd {self.folder} && chmod 755 benchmark_model && sha256sum {' '.join(hashes)}"
        status, text = self.shell(command, "comparing hashes")
        if status:
            raise DeviceError(f"{self} could not hash what it was sent ({_words(text)}): run again.")
        found = {name: value for value, name in re.findall(r"^([0-9a-f]{64})\s+\*?(\S+)", text, re.MULTILINE)}
        for name, value in hashes.items():
            if found.get(name) != value:
                what = tests[int(name.split(".")[0])].artifact.path.name if name.endswith(".tflite") else name
                raise DeviceError(f"{self} received another {what} than was sent: check cable and storage, run again.")

    def push(self, paths: Sequence[pathlib.Path], name: str) -> None:
        """Copies files into our folder, one of them by another name."""
        size = sum(path.stat().st_size for path in paths)
        doing = f"copying {paths[0].name}" + f" and {len(paths) - 1} more" * (len(paths) > 1)
        seconds = ANSWER_SECONDS + size / BYTES_PER_SECOND
        code, text = self._ask(["push", *map(str, paths), f"{self.folder}/{name}"], doing, seconds)
        if code and "No space left" in text:
            raise DeviceError(f"{self} has no space for {size / 1e6:.1f} MB ({paths[0].name}): delete something on it.")
        if code:
            raise self._lost(doing, text)

    def pull(self, names: Sequence[str], folder: pathlib.Path, doing: str) -> None:
        """Copies files from our folder."""
        paths = [f"{self.folder}/{name}" for name in names]
        code, text = self._ask(["pull", *paths, str(folder)], doing, ANSWER_SECONDS)
        if code:
            raise self._lost(doing, text)

    def run(self, flags: Mapping[str, Any], doing: str, seconds: float) -> str:
        """What `benchmark_model` prints; a `FailedError` if it fails or does not end."""
        command = shlex.join(["./benchmark_model", *(f"--{name}={value}" for name, value in flags.items())])
        started = f"{{ {command} & echo $! >pid; wait $!; s=$?; rm pid; exit $s; }}"
        try:
            status, text = self.shell(f"cd {self.folder} && {started}", doing, seconds)
        except _HangError:
            self.shell(self._kill(), doing)
            raise FailedError(f"it did not end within {seconds:.0f} s") from None
        if 128 < status < 160:
            raise FailedError(f"it crashed (signal {status - 128})")
        if status:
            raise FailedError(_reason(text, f"it ended with code {status}"))
        return text

    def shell(self, command: str, doing: str, seconds: float | None = None) -> tuple[int, str]:
        """(exit status, output) of a command on the device. The status is printed: old versions of adb lose it."""
        text = self._ask(["shell", f"({command}) 2>&1; echo status=$?"], doing, seconds or ANSWER_SECONDS)[1]
        output, _, status = text.rstrip().rpartition("status=")
        if not status.isdigit():
            raise self._lost(doing, text)
        return int(status), output

    def _kill(self) -> str:
        """A command that ends a `benchmark_model` that is still running there, as after Ctrl-C here."""
        return f"[ ! -f {self.folder}/pid ] || kill -9 $(cat {self.folder}/pid)"

    def _ask(self, arguments: Sequence[str], doing: str, seconds: float) -> tuple[int, str]:
        try:
            return _adb(self.adb, ["-s", self.serial, *arguments], seconds)
        except subprocess.TimeoutExpired:
            raise _HangError(
                f"{self} did not answer within {seconds:.0f} s while {doing}: restart it, run again."
            ) from None

    def _lost(self, doing: str, text: str) -> DeviceError:
        """The error of a command that adb could not carry out."""
        state = ""
        with contextlib.suppress(DeviceError):
            state = self._ask(["get-state"], doing, ANSWER_SECONDS)[1].strip()
        if state == "device":
            return DeviceError(f"{self} is there, but adb failed while {doing} ({_words(text)}): run again.")
        return DeviceError(f"{self} went away while {doing} ({_words(text)}): plug it in and run again.")


def _adb(adb: str, arguments: Sequence[str], seconds: float) -> tuple[int, str]:
    """(exit code, output and errors)"""
    done = subprocess.run(
        [adb, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )
    return done.returncode, done.stdout


def _serial(adb: str, where: str | None) -> str:
    """The serial number of the device to use."""
    try:
        code, text = _adb(adb, ["devices", "-l"], ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        raise DeviceError("adb does not answer: run `adb kill-server` and try again.") from None
    if code:
        raise DeviceError(f"adb cannot list its devices ({_words(text)}): run `adb kill-server` and try again.")
    found = dict(re.findall(r"^(\S+)[ \t]+(\w+)", text.partition("List of devices attached")[2], re.MULTILINE))
    ready = [serial for serial, state in found.items() if state == "device"]
    if not found:
        raise DeviceError("adb sees no device: plug one in and switch on USB debugging in its developer options.")
    if where and where not in found:
        raise DeviceError(f"There is no device {where}: adb sees {' and '.join(found)}.")
    if not where and len(ready) > 1:
        raise DeviceError(f"adb sees {' and '.join(ready)}: choose one, as in device='android:{ready[0]}'.")
    serial = where or (ready or list(found))[0]
    if serial not in ready:
        state = found[serial]
        what = STATES.get(state, f"is in the state '{state}': start Android on it")
        raise DeviceError(f"The device {serial} {what}, then run again.")
    return serial


def _binary(device: _Device) -> tuple[pathlib.Path, str]:
    """(path of `benchmark_model`, its ABI)"""
    cache = pathlib.Path.home() / ".cache" / "keras_vits" / "benchmark_model"
    named = os.environ.get(VARIABLE)
    known = [pathlib.Path(named)] if named else [cache / abi / "benchmark_model" for abi in device.abis]
    path = next((path for path in known if path.is_file()), None)
    if path is None:
        raise DeviceError(
            f"There is no benchmark_model at {known[0]}: put LiteRT's, built for {device.abis[0]}, into "
            f"{cache / device.abis[0]} with its SHA-256 in benchmark_model.sha256 beside it, or name it in {VARIABLE}; "
            "nothing is downloaded."
        )
    recorded = path.with_name(path.name + ".sha256")
    if not named and not recorded.is_file():
        raise DeviceError(f"{path} has no {recorded.name} beside it: write its SHA-256 into one.")
    if recorded.is_file() and recorded.read_text().split()[:1] != [files.sha256(path)]:
        raise DeviceError(f"The SHA-256 of {path} is not the one in {recorded.name}: get the file again.")
    with open(path, "rb") as file:
        head = file.read(20)
    elf = head[:4] == b"\x7fELF" and len(head) == 20
    abi = ELF.get((head[4], struct.unpack_from("<H", head, 18)[0]), "another processor") if elf else "no Android device"
    if abi not in device.abis:
        raise DeviceError(
            f"{path} is built for {abi}, and {device.serial} runs {', '.join(device.abis)}: get that one."
        )
    return path, abi


def _words(text: str) -> str:
    """The last line that says something, for an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("adb: ").removeprefix("error: ").rstrip(".") if lines else "it said nothing"


def _reason(text: str, otherwise: str) -> str:
    """Why `benchmark_model` failed: what it called an error, or what it says of a delegate."""
    for pattern in (
        r"^(?:ERROR|FATAL): (?!Benchmarking failed)(.+)",
        r"^(?:INFO|WARN): (.*(?:unsupported|Though|Unconsumed).*)",
    ):
        if found := re.search(pattern, text, re.MULTILINE):
            return found[1].strip().rstrip(".")
    return otherwise
