"""Android devices, with a stand-in for adb."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import sys
import time
import types
import warnings

import adb_stand_in
import keras
import numpy as np
import pytest
from android_document import DOCUMENT, transcript

import keras_vits
from keras_vits import edge
from keras_vits.edge import selftest
from keras_vits.edge.devices import android
from keras_vits.edge.records import DeviceError, DeviceWarning, ratio

pytestmark = pytest.mark.once
SERIAL = "R58M123"
HERE = pathlib.Path(__file__).parent
# As `python adb_stand_in.py`, without compiling it each time.
IMPORT = "import sys; sys.path[:0] = sys.argv[1:2]; import adb_stand_in; sys.exit(adb_stand_in.main(sys.argv[2:]))"
QUICK = dict(min_runs=10, min_seconds=0.01, warmup_seconds=0.0)
SHORT = dict(threads=1, accelerators=("cpu", "gpu"), **QUICK)  # the run that is failed at each of its steps
STEPS = 19  # of it, as `test_a_run_has_so_many_steps` checks
PROPERTIES = adb_stand_in.DEVICE["properties"]


class StandIn:
    """A folder with `adb` and `benchmark_model`, and environment variables by which they are found.

    Attributes:
        root: the stand-in's folder; `root / "fs"` is the device's file system.
        binary: a file that has the head of an Android program.
    """

    def __init__(self, folder, memory, setenv):
        self.root, self.binary, self.setenv = folder / "device", folder / "benchmark_model", setenv
        for path in (self.root, folder / "bin", folder / "home"):
            path.mkdir(parents=True)
        adb = folder / "bin" / "adb"
        adb.write_text(f"#!/bin/sh\nexec '{sys.executable}' -I -S -c '{IMPORT}' '{HERE}' \"$@\"\n")
        adb.chmod(0o755)
        self.binary.write_bytes(adb_stand_in.elf("arm64-v8a"))
        setenv("PATH", f"{adb.parent}:{os.environ['PATH']}")
        setenv("HOME", str(folder / "home"))
        setenv("ADB_STAND_IN", str(self.root))
        setenv("ADB_STAND_IN_MEMORY", str(memory))
        setenv("ADB_STAND_IN_FAIL", "")
        setenv(android.VARIABLE, str(self.binary))
        self.device()

    def device(self, **settings):
        """Says what the device is like."""
        self.setenv("ADB_STAND_IN_DEVICE", json.dumps(settings) if settings else "")

    def fail(self, step, how):
        self.setenv("ADB_STAND_IN_FAIL", f"{step}:{how}")

    def log(self):
        return (self.root / "log").read_text().splitlines() if (self.root / "log").exists() else []

    def left(self):
        """What lies in the device's /data/local/tmp."""
        return list((self.root / "fs/data/local/tmp").glob("*"))


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return tmp_path_factory.mktemp("memory")


def pictures(patch, count):
    """Self-tests have so many pictures, of ten."""
    patch.setattr(selftest, "PICTURES", count)


@pytest.fixture
def phone(tmp_path, memory, monkeypatch):
    """Two turns, one picture."""
    monkeypatch.setattr(android, "TURNS", 2)
    pictures(monkeypatch, 1)
    return StandIn(tmp_path, memory, monkeypatch.setenv)


def tiny(folder, **options):
    keras.utils.set_random_seed(0)
    size = dict(image_size=(24, 32), patch_size=8, width=24, depth=1, heads=2, mlp_hidden=48, num_classes=7)
    model = keras_vits.create("vit_tiny_patch16_224", **size)
    model.set_weights([np.random.default_rng(i).normal(0, 0.3, w.shape) for i, w in enumerate(model.weights)])
    return edge.litert.export(model, folder, **{"name": "tiny", **options})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("artifact"))


def measure(artifacts, device="android", **options):
    return edge.benchmark(artifacts, device=device, **{**QUICK, **options})


@contextlib.contextmanager
def warned():
    """Yields the list of the texts of warnings."""
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeviceWarning)
        yield texts
    texts += [str(w.message) for w in caught if issubclass(w.category, DeviceWarning)]


def one_sentence(text):
    return bool(re.fullmatch(r"[^\n]+[^.\n]\.", text)) and len(text) < 600 and "Traceback" not in text


def failing(artifact, **options):
    """The error of a run that fails."""
    with pytest.raises(DeviceError) as caught:
        measure(artifact, **options)
    assert one_sentence(str(caught.value))
    return caught.value


def test_every_way_is_measured_and_nothing_is_left(phone, artifact, monkeypatch):
    pictures(monkeypatch, 2)
    int8 = edge.litert.quantize(artifact, "dynamic_int8")
    found = measure([artifact, int8])
    ways = [("cpu", 1), ("cpu", 2), ("cpu", 4), ("gpu", 4), ("nnapi", 4)]
    assert [(s.artifact_path, s.accelerator, s.threads) for s in found] == [
        (file.path, *way) for file in (artifact, int8) for way in ways
    ]
    digest = hashlib.sha256(phone.binary.read_bytes()).hexdigest()
    for speed in found:
        assert speed.device == f"android:{SERIAL}"
        assert speed.cpu == "Google Tensor G3"
        assert speed.runtime == f"benchmark_model {digest[:12]}"
        assert speed.runs >= 10
        assert len(speed.round_ms) == 2
        assert 0 < speed.median_ms < 1000 and min(speed.round_ms) > 0
        assert speed.p90_ms is None and speed.p99_ms is None
        assert speed.load_ms > 0
        assert (speed.peak_memory_bytes, speed.baseline_memory_bytes) == (14.5 * 2**20, 8.25 * 2**20)
        assert speed.environment["android"] == "14"
        assert speed.environment["abi"] == "arm64-v8a"
        assert speed.environment["temperature_before_c"] == speed.environment["temperature_after_c"] == 31
        assert speed.environment.get("delegated") == (None if speed.accelerator == "cpu" else "whole")
    assert ratio(found[0], found[1]) > 0
    assert phone.left() == []
    asked = [line for line in phone.log() if "--num_runs=5" in line]
    graphs = [(re.search(r"graph=(\d)", line)[1], "gpu" in line, "nnapi" in line) for line in asked]
    assert graphs[:10] == graphs[10:]  # in turns
    assert len(set(graphs)) == 6


def test_times_are_those_that_the_tool_printed(phone, artifact, memory):
    speed = measure(artifact, threads=1, accelerators="cpu")
    answers = [json.loads(path.read_text()) for path in memory.glob("*.json")]
    times = [answer[1] for answer in answers]
    medians = {sorted(t)[len(t) // 2] / 1e3 for t in times}
    assert speed.median_ms in medians  # both turns got the same answer
    assert speed.round_ms[0] == pytest.approx(speed.round_ms[1])
    assert any(speed.runs == 2 * len(t) and np.mean(t) / 1e3 == pytest.approx(speed.round_ms[0], 1e-4) for t in times)


@pytest.mark.parametrize(
    "options",
    [
        dict(uint8_input=True, head="softmax"),
        dict(batch=2),
        dict(layout="nchw"),
        dict(head="top_k", top_k=3),
        dict(features=["pool"], signatures={"classify": ["logits"], "embed": ["pool"]}),
    ],
    ids=lambda options: "_".join(options),
)
def test_every_kind_of_file_is_checked(phone, tmp_path, options):
    with warned() as texts:
        measure(tiny(tmp_path, **options), threads=1, accelerators="cpu")
    assert texts == []
    assert phone.left() == []


def test_a_wrong_output_has_no_time(phone, artifact):
    phone.device(wrong="gpu")
    with warned() as texts:
        found = measure(artifact, **SHORT)
    assert [speed.accelerator for speed in found] == ["cpu"]
    assert len(texts) == 1 and one_sentence(texts[0])
    assert re.search(r"tiny_float32\.tflite on gpu .* outputs differ from this machine's by .* is allowed", texts[0])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(crash="gpu"), r"it crashed \(signal 11\)"),
        (dict(refuses="gpu"), "Though GPU delegate is explicitly applied"),
        (dict(absent="gpu"), "Unconsumed cmdline flags: --use_gpu=true"),
    ],
    ids=["crash", "refuses", "absent"],
)
def test_a_delegate_that_fails_is_left_out_and_the_others_go_on(phone, artifact, settings, reason):
    phone.device(**settings)
    with warned() as texts:
        found = measure(artifact, threads=1)
    assert [speed.accelerator for speed in found] == ["cpu", "nnapi"]
    assert len(texts) == 1 and one_sentence(texts[0])
    assert re.search(rf"tiny_float32\.tflite on gpu of The device {SERIAL} was left out: {reason}", texts[0])
    assert phone.left() == []


def test_where_nothing_runs_it_says_so(phone, artifact):
    phone.device(crash="gpu")
    with warned():
        error = failing(artifact, threads=1, accelerators="gpu")
    assert "could run nothing" in str(error) and "it crashed" in str(error)
    assert error.results == ()


def test_a_part_of_the_model_on_the_delegate_is_noted(phone, artifact):
    phone.device(partial="gpu")
    cpu, gpu = measure(artifact, **SHORT)
    assert "delegated" not in cpu.environment
    assert gpu.environment["delegated"] == "in 3 parts"


def test_accelerators_that_are_not_there_are_not_tried(phone, artifact):
    phone.device(properties={**PROPERTIES, "ro.build.version.sdk": "26", "ro.opengles.version": "196608"})
    found = measure(artifact, threads=(1, 2))
    assert [(speed.accelerator, speed.threads) for speed in found] == [("cpu", 1), ("cpu", 2)]


@pytest.mark.parametrize(
    ("properties", "name"),
    [
        ({"ro.board.platform": "kona", "ro.hardware": "qcom"}, "kona"),
        ({"ro.hardware": "ranchu"}, "ranchu"),
        ({}, "unknown"),
    ],
)
def test_the_chip_of_older_devices(phone, artifact, properties, name):
    kept = {key: value for key, value in PROPERTIES.items() if not key.startswith("ro.soc")}
    phone.device(properties={**kept, **properties})
    assert measure(artifact, threads=1, accelerators="cpu").cpu == name


# ---------------------------------------------------------------- temperature


@pytest.fixture
def pauses(monkeypatch):
    """Seconds that were waited."""
    waited = []
    monkeypatch.setattr(android, "time", types.SimpleNamespace(sleep=waited.append))
    return waited


def turns(phone):
    return sum("--num_runs=5" in line for line in phone.log())


def test_a_hot_turn_is_repeated_when_the_device_has_cooled_down(phone, artifact, pauses):
    phone.device(skin=[31.0, 36.5, 34.0, 32.5, 33.0])  # before, after a turn, twice while it cools, from then on
    speed = measure(artifact, threads=1, accelerators="cpu")
    assert pauses == [android.LOOK_SECONDS] * 2
    assert turns(phone) == 3
    assert len(speed.round_ms) == 2
    assert speed.environment["temperature_before_c"] == 31
    assert speed.environment["temperature_after_c"] == 33


def test_a_device_that_stays_hot_is_waited_for_so_long_and_no_longer(phone, artifact, pauses, monkeypatch):
    monkeypatch.setattr(android, "LOOK_SECONDS", 100)
    phone.device(skin=[31.0, 45.0])
    with warned() as texts:
        speed = measure(artifact, threads=1, accelerators="cpu")
    assert sum(pauses) == android.COOL_SECONDS
    assert len(texts) == 1 and one_sentence(texts[0])
    assert "reached 45 and did not cool down" in texts[0]
    assert len(speed.round_ms) == 2


@pytest.mark.parametrize(("settings", "degrees"), [(dict(skin=[]), 28.5), (dict(skin=[], battery=None), None)])
def test_the_battery_tells_where_the_skin_does_not(phone, artifact, settings, degrees):
    phone.device(**settings)
    assert measure(artifact, threads=1, accelerators="cpu").environment.get("temperature_after_c") == degrees


# ---------------------------------------------------------------- what is missing


def test_without_adb(artifact, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "adb is not installed: install" in str(failing(artifact))


@pytest.mark.parametrize(
    ("devices", "where", "message"),
    [
        ({}, "", "adb sees no device: plug one in"),
        ({SERIAL: "unauthorized"}, "", f"{SERIAL} has not allowed this computer .* accept 'Allow USB debugging"),
        ({SERIAL: "offline"}, "", f"{SERIAL} is offline: unplug it"),
        ({SERIAL: "no permissions"}, "", f"{SERIAL} may not be opened by this user"),
        ({SERIAL: "recovery"}, "", f"{SERIAL} is in the state 'recovery': start Android"),
        ({SERIAL: "device", "B2": "device"}, "", f"adb sees {SERIAL} and B2: choose one, .*'android:{SERIAL}'"),
        ({SERIAL: "device"}, "B2", f"There is no device B2: adb sees {SERIAL}"),
        ({SERIAL: "device", "B2": "unauthorized"}, "B2", "B2 has not allowed this computer"),
    ],
)
def test_a_device_that_cannot_be_used(phone, artifact, devices, where, message):
    phone.device(devices=devices)
    assert re.search(message, str(failing(artifact, device=f"android:{where}" if where else "android")))


def test_one_of_several_devices(phone, artifact):
    phone.device(devices={SERIAL: "device", "192.168.1.5:5555": "device", "C3": "unauthorized"})
    speed = measure(artifact, device="android:192.168.1.5:5555", threads=1, accelerators="cpu")
    assert speed.device == "android:192.168.1.5:5555"
    assert all(line.startswith("adb -s 192.168.1.5:5555 ") for line in phone.log()[1:])
    phone.device(devices={"C3": "unauthorized", SERIAL: "device"})  # only one of them can be used
    assert measure(artifact, threads=1, accelerators="cpu").device == f"android:{SERIAL}"


def test_the_binary_is_found_in_the_cache_and_its_hash_is_checked(phone, artifact, monkeypatch):
    monkeypatch.delenv(android.VARIABLE)
    folder = pathlib.Path.home() / ".cache/keras_vits/benchmark_model/arm64-v8a"
    error = str(failing(artifact))
    assert f"put LiteRT's, built for arm64-v8a, into {folder}" in error and android.VARIABLE in error
    folder.mkdir(parents=True)
    (folder / "benchmark_model").write_bytes(phone.binary.read_bytes())
    assert "has no benchmark_model.sha256 beside it" in str(failing(artifact))
    recorded = folder / "benchmark_model.sha256"
    recorded.write_text("0" * 64)
    assert "is not the one in benchmark_model.sha256" in str(failing(artifact))
    recorded.write_text(hashlib.sha256(phone.binary.read_bytes()).hexdigest() + "  benchmark_model\n")
    assert measure(artifact, threads=1, accelerators="cpu").environment["abi"] == "arm64-v8a"
    assert not any("mkdir" in line for line in phone.log()[:6])  # nothing is touched before that


def test_a_binary_that_the_device_cannot_run(phone, artifact):
    phone.binary.write_bytes(adb_stand_in.elf("x86_64"))
    error = str(failing(artifact))
    assert f"is built for x86_64, and {SERIAL} runs arm64-v8a, armeabi-v7a, armeabi" in error
    phone.binary.write_bytes(b"MZ" + bytes(60))
    assert "is built for no Android device" in str(failing(artifact))
    phone.binary.write_bytes(adb_stand_in.elf("armeabi-v7a"))
    assert measure(artifact, threads=1, accelerators="cpu").environment["abi"] == "armeabi-v7a"
    phone.binary.unlink()
    assert f"no benchmark_model at {phone.binary}" in str(failing(artifact))


def test_a_tool_without_a_median_is_too_old(phone, artifact):
    phone.device(median=False)
    with warned():
        assert "printed no median" in str(failing(artifact, threads=1, accelerators="cpu"))


# ---------------------------------------------------------------- failures in the middle


@pytest.fixture(scope="module")
def good_run(artifact, memory, tmp_path_factory):
    """The commands of the run that the tests below let fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(android, "TURNS", 2)
        pictures(patch, 1)
        phone = StandIn(tmp_path_factory.mktemp("good"), memory, patch.setenv)
        measure(artifact, **SHORT)
        return phone.log()


def plain(lines):
    """Commands without what is different in each run: our folder on the device, and where files lie here."""
    lines = [re.sub(r"keras_vits\.\w+", "keras_vits.1a2b3c4d", line) for line in lines]
    lines = [re.sub(r"(?<=\.out) (?!/data/)\S+$", " .", line) for line in lines]
    return [re.sub(r"(?<= )/(?!data/)\S*/", "", line) for line in lines]


def test_a_run_has_so_many_steps(good_run):
    assert len(good_run) == STEPS


def run(artifact):
    """(records, error or None, all messages) of the short run."""
    error = None
    with warned() as texts:
        try:
            found = measure(artifact, **SHORT)
        except DeviceError as e:
            error, found = e, list(e.results)
    messages = [*texts, str(error)] if error else texts
    assert all(map(one_sentence, messages)), messages
    return found, error, messages


@pytest.mark.parametrize("how", ["gone", "refused"])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_failure_at_any_step(phone, artifact, good_run, step, how):
    phone.fail(step, how)
    found, error, messages = run(artifact)
    assert plain(phone.log()[:step]) == plain(good_run[:step])  # until then all was well
    times = [i for i, line in enumerate(good_run, 1) if "--num_runs=5" in line]
    taken = sum(i < step for i in times)
    if error:
        assert [speed.accelerator for speed in found] == ["cpu", "gpu"][:taken]
        assert all(len(speed.round_ms) == (2 if taken == 4 else 1) for speed in found)
    if how == "gone":
        assert (error is None) == (step == STEPS)
        assert "adb sees no device" in messages[0] if step == 1 else SERIAL in messages[0]
        if step == STEPS:
            assert "may still have the folder" in messages[0]
    else:
        assert phone.left() == []
        unmoved = "dumpsys" in good_run[step - 1] or step == STEPS  # no temperature; cleaned up at the second try
        assert bool(messages) == (not unmoved)
        assert len(messages) <= 1
    if error is None:
        assert found and all(len(speed.round_ms) == 2 for speed in found)


def steps(good_run, *words):
    return [i for i, line in enumerate(good_run, 1) if all(word in line for word in words)]


def test_adb_fails_while_the_device_is_there(phone, artifact, good_run):
    for step in (steps(good_run, " push ")[0], steps(good_run, "--max_secs")[-1], STEPS):
        (phone.root / "log").unlink(missing_ok=True)
        phone.fail(step, "error")
        found, error, _ = run(artifact)
        assert phone.left() == []
        assert (error is None) == (step == STEPS)
        assert error is None or "is there, but adb failed while" in str(error)
        assert len(found) == (0 if step < 9 else 2)


def test_no_space(phone, artifact, good_run):
    phone.fail(steps(good_run, " push ", "tiny")[0], "full")
    error = failing(artifact, **SHORT)
    assert re.search(rf"{SERIAL} has no space for .* MB \(tiny_float32\.tflite\): delete something", str(error))
    assert phone.left() == []


def test_a_file_that_arrives_with_another_byte(phone, artifact, good_run):
    for step, name in zip(
        steps(good_run, " push "), ("benchmark_model", "tiny_float32.tflite", "0_0.bin"), strict=True
    ):
        (phone.root / "log").unlink(missing_ok=True)
        phone.fail(step, "corrupt")
        assert f"{SERIAL} received another {name} than was sent" in str(failing(artifact, **SHORT))
        assert phone.left() == []


def test_a_command_that_hangs(phone, artifact, good_run, monkeypatch):
    monkeypatch.setattr(android, "ANSWER_SECONDS", 4)
    phone.fail(steps(good_run, "sha256sum")[0], "hang")
    assert f"{SERIAL} did not answer within 4 s while comparing hashes" in str(failing(artifact, **SHORT))
    assert phone.left() == []


def test_a_run_that_hangs_is_ended_on_the_device(phone, artifact, good_run, monkeypatch):
    monkeypatch.setattr(android, "START_SECONDS", 4)
    phone.fail(steps(good_run, "--max_secs", "use_gpu")[0], "stuck")
    found, error, messages = run(artifact)
    assert error is None
    assert [speed.accelerator for speed in found] == ["cpu"]
    assert "tiny_float32.tflite on gpu" in messages[0] and "did not end within 4 s" in messages[0]
    assert phone.left() == []
    process = int((phone.root / "stuck").read_text())
    for _ in range(100):
        if not pathlib.Path(f"/proc/{process}").exists():
            return
        time.sleep(0.05)
    pytest.fail("benchmark_model is still running")


@pytest.mark.parametrize("words", [(" push ", "tiny"), ("--max_secs", "use_gpu")], ids=["push", "run"])
def test_ctrl_c_leaves_nothing(phone, artifact, good_run, words):
    phone.fail(steps(good_run, *words)[0], "interrupt")
    with pytest.raises(KeyboardInterrupt):
        measure(artifact, **SHORT)
    assert "rm -rf" in phone.log()[-1]
    assert phone.left() == []


# ---------------------------------------------------------------- the document


def test_the_document_is_what_a_run_asks(tmp_path, memory):
    """tools/generate.py writes it."""
    assert DOCUMENT.read_text(encoding="utf-8") == transcript(tmp_path, memory)
