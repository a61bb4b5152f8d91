"""profile says where the time goes: by our layers' names, of what really ran, and of all of it."""

import dataclasses
import importlib.metadata
import os
import pathlib
import sys
import xml.etree.ElementTree as ElementTree

import keras
import numpy as np
import pytest
from families import FAMILIES

from keras_vits import edge, layers
from keras_vits._util.process import Worker
from keras_vits.edge.evidence.profile import common, profile

pytestmark = pytest.mark.once

module = sys.modules["keras_vits.edge.evidence.profile"]  # `edge.profile` is the function
SMALL = {  # families, with operations that take long enough to be timed
    "vit": dict(image_size=112, width=192, heads=3, mlp_hidden=768),
    "mobilevit": dict(image_size=192, widths=(16, 32, 32), final_width=64),
}
RUNS = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Family -> (the model, its file)."""
    folder, found = tmp_path_factory.mktemp("profile"), {}
    for family in FAMILIES:
        if family.name in SMALL:
            model = family.create(**SMALL[family.name])
            found[family.name] = model, edge.litert.export(model, folder)
    return found


@pytest.fixture(scope="module")
def measured(files):
    return {name: profile(file, runs=RUNS) for name, (_, file) in files.items()}


def chain(folder, blocks, name):
    """The file of a model image (1,14,14,64) -> the same, of blocks {name: layer}, one after the other."""
    image = x = keras.Input((14, 14, 64))
    for layer in blocks:
        x = layer(x)
    return edge.litert.export(keras.Model(image, x, name=name), folder)


@pytest.mark.parametrize("name", SMALL)
def test_times_are_of_our_layers(files, measured, name):
    model, file = files[name]
    found = measured[name]
    assert (found.artifact_path, found.threads, found.runs) == (file.path, 1, RUNS)
    assert found.runtime == f"ai_edge_litert {importlib.metadata.version('ai-edge-litert')}"
    ours = [layer.name for layer in model.layers]
    blocks = list(found.by_layer(depth=1))
    assert set(blocks) <= set(ours) and {"stem", "head"} < set(blocks)
    assert blocks == sorted(blocks, key=ours.index)  # they run in this order
    inner = {layer.rpartition("/")[2] for layer in found.by_layer() if "block_1/" in layer}
    assert inner >= ({"attention", "mlp", "norm1", "norm2"} if name.startswith("vit") else {"expand", "depthwise"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.threads = 2


@pytest.mark.parametrize("name", SMALL)
def test_the_parts_are_the_whole(files, measured, name):
    found = measured[name]
    assert all(operation.ms >= 0 for operation in found.operations)
    assert sum(operation.share for operation in found.operations) == pytest.approx(1)
    for parts in (found.by_layer(), found.by_layer(depth=1), found.by_op()):
        assert sum(parts.values()) == pytest.approx(found.operations_ms)
    assert found.covered <= 1
    # Where other work interrupts, the clock runs on between operations: hence the median of some profiles.
    again = [profile(files[name][1], runs=RUNS) for _ in range(4)]
    assert np.median([one.covered for one in (found, *again)]) > 0.75
    assert found.operations_ms < 1.1 * found.total_ms


def test_every_operation_is_found_again(files, measured):
    """Nothing but what XNNPACK is known to fuse or to do away with: two of LayerNorm, and paddings of convolutions."""
    for name, (_, file) in files.items():
        runner = edge.litert.load(file)
        expected, found = runner.histogram(), {}
        assert (runner.partitions(), runner.outside()) == (1, {})
        for operation in measured[name].operations:
            for kind in operation.op.split("+"):
                found[kind] = found.get(kind, 0) + 1
        assert {kind: n for kind, n in expected.items() if found.get(kind) != n} in ({}, {"PAD": expected.get("PAD")})
        assert {operation.op for operation in measured[name].operations if "+" in operation.op} == {"MUL+MEAN"}


def test_time_is_where_the_work_is(measured):
    times = measured["vit"].by_layer()
    assert times["block_0/mlp"] > 10 * times["block_0/norm2"]
    assert next(iter(measured["vit"].by_op())) == "FULLY_CONNECTED"  # the longest comes first


@pytest.mark.parametrize("heavy", [0, 2])
def test_a_heavier_block_shows(tmp_path, heavy):
    blocks = [layers.Mlp(8192 if i == heavy else 128, name=f"block_{i}") for i in range(4)]
    times = profile(chain(tmp_path, blocks, "chain"), runs=RUNS).by_layer(depth=1)
    assert list(times) == [f"block_{i}" for i in range(4)]
    others = [ms for name, ms in times.items() if name != f"block_{heavy}"]
    assert times[f"block_{heavy}"] > 5 * max(others)


def test_what_the_delegate_leaves_alone(tmp_path):
    """Partitions run when their inputs are there, not in the order of the file: two gathers, and a branch beside."""
    image = keras.Input((14, 14, 64))
    take = lambda name: keras.layers.Lambda(lambda x: keras.ops.take(x, np.arange(13, -1, -1), axis=1), name=name)
    x = take("first_take")(layers.Mlp(64, name="before")(image))
    x = take("second_take")(layers.Mlp(4096, name="between")(x))
    y = layers.Mlp(64, name="beside")(image)
    file = edge.litert.export(keras.Model(image, keras.layers.Add(name="sum")([x, y]), name="taken"), tmp_path)
    assert edge.litert.load(file).partitions() == 3
    found = profile(file, threads=2, runs=RUNS)
    assert [operation.op for operation in found.operations].count("GATHER") == 2
    times = found.by_layer(depth=1)
    assert set(times) == {"before", "first_take", "between", "second_take", "beside", "sum"}
    assert list(times).index("beside") < list(times).index("first_take")
    assert times["between"] > 4 * max(times["before"], times["beside"])


def test_what_is_fused_is_named_so(tmp_path):
    file = edge.litert.export(next(family for family in FAMILIES if family.name == "vit").create(), tmp_path)
    images = np.random.default_rng(0).uniform(-1, 1, (2, *file.input.shape[1:])).astype("float32")
    found = profile(edge.litert.quantize(file, "static_int8", calibration=images), runs=4)
    fused = {operation.layer for operation in found.operations if operation.op == "DEQUANTIZE+GELU+QUANTIZE"}
    assert fused == {"block_0/mlp", "block_1/mlp"}
    halved = profile(edge.litert.quantize(file, "float16"), runs=4)  # its weights pass through a DEQUANTIZE
    parts = lambda found: [(operation.layer, operation.op) for operation in found.operations]
    assert parts(halved) == parts(profile(file, runs=1))


def test_common_is_the_longest():
    random = np.random.default_rng(0)
    for _ in range(50):
        a, b = (random.integers(0, 4, random.integers(0, 12)).tolist() for _ in range(2))
        pairs = common(a, b)
        assert [a[i] for i, _ in pairs] == [b[j] for _, j in pairs]
        assert pairs == sorted(pairs) and len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
        longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                longest[i + 1][j + 1] = longest[i][j] + 1 if x == y else max(longest[i][j + 1], longest[i + 1][j])
        assert len(pairs) == longest[-1][-1]


# ---------------------------------------------------------------- the drawing


def test_plot(measured, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the plot: pip install matplotlib")
    found = measured["vit"]
    element = found.plot()
    texts = {node.text for node in ElementTree.fromstring(element.replace("xlink:", "")).iter("{*}text")} | {
        node.text for node in ElementTree.fromstring(element.replace("xlink:", "")).iter("text")
    }
    assert {*found.by_layer(), "FULLY_CONNECTED", "other operations"} <= texts
    assert "var(--series0)" in element and "#0202" not in element and "<?xml" not in element
    assert found.plot() == element
    assert found.plot(tmp_path / "new" / "time.png").read_bytes().startswith(b"\x89PNG")
    assert "var(--" not in found.plot(tmp_path / "time.svg", depth=1).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"\.png or \.svg file; received 'time\.pdf'"):
        found.plot(tmp_path / "time.pdf")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "time.png", "time.svg"]


# ---------------------------------------------------------------- what goes wrong


@pytest.fixture
def file(files):
    return files["vit"][1]


@pytest.mark.parametrize("options", [dict(threads=0), dict(runs=0), dict(runs=2.5)])
def test_bad_arguments(file, options):
    with pytest.raises(ValueError, match="must be a positive integer; received"):
        profile(file, **options)


def test_other_files_are_refused(file, tmp_path):
    other = dataclasses.replace(file, format="coreml", path=tmp_path / "m.mlpackage")
    with pytest.raises(ValueError, match=r"m\.mlpackage is of the format coreml: only \.tflite files"):
        profile(other)
    changed = tmp_path / file.path.name
    changed.write_bytes(file.path.read_bytes()[:-1])
    (tmp_path / f"{file.path.name}.json").write_bytes(file.path.with_name(f"{file.path.name}.json").read_bytes())
    with pytest.raises(ValueError, match="is truncated or was changed"):
        profile(dataclasses.replace(file, path=changed))


def test_a_runtime_without_the_profiler(file, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.1.0")
    with pytest.raises(
        ValueError, match=r'2\.1\.0 is too old to profile a file: pip install "ai-edge-litert>=2\.1\.6"'
    ):
        profile(file)
    monkeypatch.undo()
    other = next(pathlib.Path(np.__file__).parent.rglob("_multiarray_umath*.so"))  # a library, but not this one
    monkeypatch.setattr(module, "_library", lambda: (other, "another"))
    with pytest.raises(
        ValueError, match="could not be profiled by this ai-edge-litert: its library has no LiteRtCreate"
    ):
        profile(file)
    monkeypatch.setattr(module, "_library", lambda: (tmp_path / "libLiteRt.so", "another"))
    with pytest.raises(ValueError, match=r"could not be profiled by this ai-edge-litert: .*libLiteRt\.so"):
        profile(file)


def test_a_process_that_dies(file, monkeypatch, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text("import os, sys\nprint('no memory left', file=sys.stderr, flush=True)\nos.abort()\n")
    monkeypatch.setattr(module, "WORKER", worker)
    with pytest.raises(
        ValueError, match=r"vit_tiny.* could not be profiled, its process ended with code -6: no memory"
    ):
        profile(file)


def test_a_file_that_the_runtime_refuses(tmp_path, file):
    """The worker's own check of what the functions return."""
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(b"\0\0\0\0TFL3" + b"\0" * 64)
    library, _ = module._library()
    with Worker([sys.executable, "-P", str(module.WORKER)], os.environ) as worker:
        worker.tell(library=str(library), files=[dict(path=str(broken), threads=1, warmup=0, runs=1)])
        with pytest.raises(ValueError, match=r"broken\.tflite could not be profiled.*(LiteRt\w+ returned status|code)"):
            module._answer(worker, "broken.tflite")


def test_operators_that_nobody_knows(file, monkeypatch):
    monkeypatch.setattr(module._Specimens, "operators", lambda self, operator: ("Unheard Of",))
    with pytest.raises(ValueError, match=r"operators, of which only 0 could be traced back to its operations"):
        profile(file, runs=1)
