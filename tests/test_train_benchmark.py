"""benchmarks/train.py: what is measured, and what becomes a row."""

import os
import pathlib
import subprocess
import sys

import pytest
import recording
import train

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.once


def test_models_take_the_image_sizes_they_are_measured_at():
    import keras_vits
    from keras_vits._util import keras_private

    with keras_private.values_later():
        for name in set(train.PARTS["tokens"][0]) - {train.ATTENTION}:
            assert all(keras_vits.create(name, image_size=side).cfg.image_size == (side, side) for side in train.SIDES)


STAND_IN = """
import json, sys, time
order = json.loads(sys.stdin.readline())
if order["library"] == "timm" and {broken!r} == "start":
    raise ImportError("no timm here")
print(json.dumps(dict(parameters=7, version="1", library_version="2")), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if order["library"] == "timm" and asked["mode"] == {broken!r}:
        raise MemoryError("not enough of it")
    ms = dict(infer=10, train=40, gemm=2)[asked["mode"]] * (1 if order["library"] == "timm" else 2)
    print(json.dumps(dict(ms=[ms] * asked["steps"], peak_memory_bytes=1000)), flush=True)
"""


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Code -> nothing: every child process runs it."""
    monkeypatch.setattr(train, "HERE", tmp_path)
    return (tmp_path / "train_worker.py").write_text


@pytest.fixture
def children(child, monkeypatch):
    """(mode in which timm fails, or "start") -> rows of timm and of two runners of ours; every child is a stand-in."""

    def measured(broken=None, code=STAND_IN, **more):
        child(code.format(broken=broken))
        monkeypatch.setattr(train, "count_macs", lambda model, image_size: 1e9)
        names = "timm", "keras_vits, JAX", "keras_vits, TensorFlow"
        runners = [train.Runner(n, "mixer_s16_224", "cpu", 1, image_size=224, batch=4) for n in names]
        return {(row["runner"], row["mode"]): row for row in train.measure(runners, seconds=0.2, **more)}

    return measured


def test_rows_of_runners_in_turns(children):
    rows = children()
    assert len(rows) == 6 and not any(row.get("error") for row in rows.values())
    theirs, ours = rows["timm", "train"], rows["keras_vits, JAX", "train"]
    assert (theirs["median_ms"], ours["median_ms"]) == (40, 80)
    assert (theirs["images_per_second"], ours["images_per_second"]) == (100, 50)
    assert [ours[key] for key in ("ratio_q1", "ratio", "ratio_q3")] == [0.5] * 3 and theirs["ratio"] == 1
    assert ours["flops_per_second"] == 3 * rows["keras_vits, JAX", "infer"]["flops_per_second"] / 4 == 6e9 * 50
    assert {row["gemm_flops_per_second"] for row in rows.values()} == {2 * 2048**3 / 2e-3}  # the fastest process'
    assert (ours["tokens"], ours["first_step_s"], ours["peak_memory_bytes"]) == (196, 0.08, 1000)
    assert set(ours) <= set(train.FIELDS) and (ours["library"], ours["library_version"]) == ("keras", "2")


def test_a_runner_that_fails_is_a_row_with_its_error(children):
    rows = children("train")
    assert rows["timm", "infer"]["ratio"] == 1
    assert rows["timm", "train"]["error"] == "its process ended with code 1: MemoryError: not enough of it"
    assert (
        rows["keras_vits, JAX", "train"]["images_per_second"] == 50 and "ratio" not in rows["keras_vits, JAX", "train"]
    )

    rows = children("start", modes=("infer",))
    assert rows["timm", "infer"]["error"] == "its process ended with code 1: ImportError: no timm here"
    assert rows["keras_vits, TensorFlow", "infer"]["median_ms"] == 20


def test_networks_that_differ_are_refused(children):
    with pytest.raises(ValueError, match=r"mixer_s16_224 are not the same network, by their parameters: \{'timm': 5, "):
        children(code=STAND_IN.replace("parameters=7", "parameters=len(order['backend'])"))


def test_a_record_replaces_its_part_model_and_device_only(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "RECORD", tmp_path / "train.jsonl")
    key = dict(part="speed", model="mixer_s16_224", device="A")
    others = [key | changed for changed in (dict(part="batch"), dict(model="mobilevit_s"), dict(device="B"))]
    train.record([key | dict(runner=name) for name in "ab"] + others)
    train.record([key | dict(runner="c")])
    found = [tuple(row[k] for k in ("part", "model", "device", "runner")) for row in recording.read(train.RECORD)]
    assert found == [
        ("speed", "mobilevit_s", "A", None),
        ("speed", "mixer_s16_224", "A", "c"),
        ("speed", "mixer_s16_224", "B", None),
        ("batch", "mixer_s16_224", "A", None),
    ]
    assert all(list(row) == train.FIELDS for row in recording.read(train.RECORD))


def test_attention_layers_alone(child):
    """A row for each layer and size: the exponent is of the rounds, the time of a whole batch is their median's."""
    seconds = {"softmax": {1024: [2, 1, 3], 4096: [32, 16, 48]}, "kernel": {1024: [1, 1, 1], 4096: [4, 4, 4]}}
    facts = dict(seconds=seconds, version="1", library_version="2")
    child(f"import json\nprint(json.dumps({facts!r}), flush=True)\n")
    options = train.parsed(["--part", "tokens", "--models", "attention", "--device", "cpu"])
    rows = train.measure_part("tokens", "attention", options)
    found = [tuple(row[key] for key in ("runner", "tokens", "batch", "median_ms")) for row in rows]
    assert found == [
        ("softmax", 1024, 8, 16e3),
        ("softmax", 4096, 2, 64e3),
        ("kernel", 1024, 16, 16e3),
        ("kernel", 4096, 4, 16e3),
    ]
    assert [row["exponent"] for row in rows] == pytest.approx([2, 2, 1, 1])


def test_a_batch_is_shared_among_virtual_devices():
    """The worker's own loader with two devices: images and outputs lie on both, and the answer is that of one."""
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
import train_worker, numpy as np, keras, keras_vits
small = dict(image_size=32, width=16, depth=1, num_classes=9)
train_worker.KERAS_MODELS["keras_vits"] = lambda *_: keras_vits.create("mixer_s16_224", **small)
order = dict(library="keras_vits", model="", gpu=False, compiled=False, gemm=8, devices=2)
images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype("float32")
steps, _ = train_worker.keras_loader(order, images, np.zeros(4, int))
model = next(c.cell_contents for c in steps["infer"].__closure__ if isinstance(c.cell_contents, keras.Model))
placed = next(c.cell_contents for c in steps["infer"].__closure__ if not isinstance(c.cell_contents, keras.Model))
assert [shard.data.shape[0] for shard in placed.addressable_shards] == [2, 2]
assert len(model.weights[0].value.sharding.device_set) == 2
logits = steps["infer"]()
keras.distribution.set_distribution(None)
np.testing.assert_allclose(logits, np.array(model(images)), rtol=1e-4, atol=1e-5)
loss = -np.log(np.exp(logits)[:, 0] / np.exp(logits).sum(-1)).mean()
np.testing.assert_allclose(steps["train"](), loss, rtol=1e-3)
assert (steps["gemm"]() == 8).all()
"""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", code, str(ROOT / "benchmarks")]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_exponent():
    assert train.exponent({n: [3 * n**1.5, n**1.5, 2 * n**1.5] for n in (10, 20, 40)}, 10) == pytest.approx(1.5)
    assert train.exponent({10: [1e9], 20: [2.0], 40: [4.0]}, 20) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], "must be a positive integer; received 0"),
        (["--models", "vit"], "invalid choice: 'vit'"),
        (["--part", "memory"], "invalid choice: 'memory'"),
        (["--models", "attention"], "--models attention has the layers alone, which only --part tokens measures"),
        (["--device", "gpu"], "--device gpu needs an NVIDIA GPU"),
    ],
)
def test_mistakes_on_the_command_line(arguments, words, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="2"):
        train.parsed(arguments)
    assert words in capsys.readouterr().err


def test_every_recorded_row_says_how_it_was_made():
    rows = recording.read(train.RECORD)
    assert rows and all(list(row) == train.FIELDS for row in rows)
    facts = "device runtime runtime_version threads date commit command".split()
    assert all(row[key] for row in rows for key in facts)
    assert all((row["error"] is None) == (row["images_per_second"] is not None) for row in rows)
    for row in rows:
        if row["images_per_second"]:
            assert row["median_ms"] == pytest.approx(1e3 * row["batch"] / row["images_per_second"])
