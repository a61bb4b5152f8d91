"""benchmarks/train.py and the page: what is measured, what becomes a row, and what is shown of it."""

import html
import importlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.once


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("train")


@pytest.fixture
def page(train):
    return importlib.import_module("page")


def test_models_take_the_image_sizes_they_are_measured_at(train):
    import keras_vits
    from keras_vits.checkpoints import assign as weights

    with weights.values_later():
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
def child(train, monkeypatch, tmp_path):
    """Code -> nothing: every child process runs it."""
    monkeypatch.setattr(train, "HERE", tmp_path)
    return (tmp_path / "train_worker.py").write_text


@pytest.fixture
def children(child, train, monkeypatch):
    """(mode in which timm fails, or "start") -> rows of timm and of two runners of ours; every child is a stand-in."""

    def measured(broken=None, code=STAND_IN, **more):
        child(code.format(broken=broken))
        monkeypatch.setattr(train, "count_macs", lambda model, image_size: 1e9)
        names = "timm", "keras_vits, JAX", "keras_vits, TensorFlow"
        runners = [train.Runner(n, "mixer_s16_224", "cpu", 1, image_size=224, batch=4) for n in names]
        return {(row["runner"], row["mode"]): row for row in train.measure(runners, seconds=0.2, **more)}

    return measured


def test_rows_of_runners_in_turns(children, train):
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


def test_a_record_replaces_its_part_model_and_device_only(train, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "RECORD", tmp_path / "train.jsonl")
    key = dict(part="speed", model="mixer_s16_224", device="A")
    others = [key | changed for changed in (dict(part="batch"), dict(model="mobilevit_s"), dict(device="B"))]
    train.record([key | dict(runner=name) for name in "ab"] + others)
    train.record([key | dict(runner="c")])
    found = [tuple(row[k] for k in ("part", "model", "device", "runner")) for row in train.rows()]
    assert found == [
        ("speed", "mobilevit_s", "A", None),
        ("speed", "mixer_s16_224", "A", "c"),
        ("speed", "mixer_s16_224", "B", None),
        ("batch", "mixer_s16_224", "A", None),
    ]
    assert all(list(row) == train.FIELDS for row in train.rows())


def test_attention_layers_alone(child, train):
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


def test_a_batch_is_shared_among_virtual_devices(train):
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
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", code, str(ROOT / "benchmarks")]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_exponent(train):
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
def test_mistakes_on_the_command_line(train, arguments, words, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="2"):
        train.parsed(arguments)
    assert words in capsys.readouterr().err


# ---------------------------------------------------------------- what is shown


def made_rows(train):
    """Rows of every part, each figure of them different, on a CPU and on a GPU."""
    tick = itertools.count(1)
    found = []

    def add(part, model, runner, mode="infer", batch=8, tokens=196, devices=1, gpu=False, **more):
        n = next(tick)
        figures = dict(median_ms=1000 / n, images_per_second=batch * n, first_step_s=n / 7, peak_memory_bytes=n * 10**7)
        figures |= dict(ratio=n / 20, ratio_q1=n / 25, ratio_q3=n / 15)
        figures |= dict(flops_per_second=n * 1e9, gemm_flops_per_second=2e11)
        place = (
            dict(device="NVIDIA Some GPU", dtype="bfloat16") if gpu else dict(device="A CPU, 2 cores", dtype="float32")
        )
        made = dict(
            benchmark="train", threads=2, date="2030-01-02", commit="abc1234", command="python benchmarks/train.py"
        )
        row = dict(part=part, model=model, runner=runner, mode=mode, batch=batch, tokens=tokens, devices=devices)
        versions = dict(backend="jax", runtime="jax", runtime_version="1.2", library="keras", library_version="3.4")
        found.append(dict.fromkeys(train.FIELDS) | made | place | versions | row | figures | more)

    for gpu, runner, mode in itertools.product((False, True), train.RUNNERS, train.MODES):
        add("speed", "vit_tiny_patch16_224", runner, mode, gpu=gpu)
    nothing = dict.fromkeys(("median_ms", "images_per_second", "ratio", "flops_per_second"))
    found[2] |= nothing | dict(error="not enough | memory")
    for runner, tokens in itertools.product(
        ("softmax", "kernel", "favor", "efficient", "separable"), (256, 1024, 4096)
    ):
        add("tokens", train.ATTENTION, runner, tokens=tokens, exponent=1.23)
    for runner, tokens in itertools.product(("timm", "keras_vits, JAX"), (196, 784)):
        add("tokens", "vit_tiny_patch16_224", runner, tokens=tokens, batch=1)
    for runner, mode, batch in itertools.product(("timm", "keras_vits, JAX"), train.MODES, (1, 8, 64)):
        add("batch", "vit_tiny_patch16_224", runner, mode, batch)
    for mode, devices in itertools.product(train.MODES, (1, 2, 4)):
        add("devices", "vit_tiny_patch16_224", train.SHARED, mode, devices=devices)
    return found


def made_peers():
    """Rows of every contestant with every model, as run.py records them; one of them failed."""
    suite, tick, found = importlib.import_module("suite"), itertools.count(1), []
    for model, threads, (name, contestant) in itertools.product(suite.MODELS[:2], (1, 2), suite.CONTESTANTS.items()):
        n = next(tick)
        figures = dict(median_ms=n, p90_ms=n + 1, ratio=0.2 + n / 20, ratio_q1=0.18 + n / 22, ratio_q3=0.25 + n / 19)
        figures |= dict(peak_memory_bytes=n * 10**6, size_bytes=n * 10**5, load_ms=n, sqnr_db=40.0, gflops=9.0 + n)
        figures |= dict(baseline_memory_bytes=n * 10**5, cores_used=1.5)
        row = dict(benchmark="peers", model=model, contestant=name, runtime="r", runtime_version="1", threads=threads)
        row |= dict(recipe=contestant.recipe, device="A CPU", date="2030-01-02", commit="abc1234", command="run.py")
        found.append({**row, **figures, "error": None})
        if name == "litert_torch":
            found[-1] |= dict.fromkeys(figures) | {"error": "its process ended with code 1: <b> is not known"}
    return found


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cells(text):
    """Texts of the tables' cells, in their order."""
    return [re.sub(r"<[^>]*>", "", found) for found in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", text)]


def test_tables_are_the_rows(train, page):
    """Every row is found in the Markdown as it was made, and all of the Markdown's cells in the HTML."""
    rows = made_rows(train)
    markdown = train.tables(rows)
    text = "\n".join(markdown)
    assert [line for line in markdown if line.startswith("### ")] == [
        "### Speed of vit_tiny_patch16_224",
        "### Speed of vit_tiny_patch16_224, NVIDIA Some GPU",
        "### Tokens: attention",
        "### Tokens: vit_tiny_patch16_224",
        "### Batch size: vit_tiny_patch16_224",
        "### Devices: vit_tiny_patch16_224",
    ]
    assert text.count("Recorded on 2030-01-02 at commit abc1234 by `python benchmarks/train.py`: ") == 6
    assert "NVIDIA Some GPU, 2 threads; bfloat16; batch 8; keras 3.4, jax 1.2." in text
    assert "| timm | 16.0 | 0.10 (0.08 to 0.13) | 8.0 | 0.05 (0.04 to 0.07) | 20 | 10 | 0.3 | 2.0 | 1% |" in markdown
    assert "| timm, torch.compile | 32.0 | 0.20 (0.16 to 0.27) |  |  | 40 | 30 | 0.6 | 4.0 | 2% |" in markdown
    assert "- timm, torch.compile, infer, failed: not enough | memory" in markdown
    assert any(re.fullmatch(r"\| softmax (\| [\d.]+ ){3}\| 1.23 \|", line) for line in markdown)
    tokens = [row for row in rows if row["part"] == "tokens" and row["runner"] == "timm"]
    ms = [1e3 / row["images_per_second"] for row in tokens]
    p = np.log(ms[1] / ms[0]) / np.log(4)
    assert f"| timm | {ms[0]:.2f} | {ms[1]:.2f} | {p:.2f} |" in markdown
    one = next(row for row in rows if row["part"] == "batch" and row["batch"] == 64)
    assert f" {one['images_per_second']:.1f} / {one['peak_memory_bytes'] / 1e6:.0f} |" in text
    shared = next(row for row in rows if row["devices"] == 4)
    assert f"| 4 | infer | {shared['images_per_second']:.1f} | {shared['ratio']:.2f} (" in text

    said = [line for line in markdown if line.startswith("|") and not line.startswith("|---")]
    expected = [cell.strip() for line in said for cell in line[1:-1].split("|")]
    assert cells(page.html(markdown)) == expected


def test_a_gpu_is_missed_only_where_there_is_none(train, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "RECORD", tmp_path / "train.jsonl")
    rows = made_rows(train)
    write(train.RECORD, rows)
    assert "No GPU" not in "\n".join(train.section())
    write(train.RECORD, [row for row in rows if not train.on_gpu(row)])
    assert "No GPU was at hand" in "\n".join(train.section())


def test_plots_of_training(train, page, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "RECORD", tmp_path / "train.jsonl")
    write(train.RECORD, made_rows(train))
    drawn = page.html(train.section(), page.train_figures)
    captions = [html.unescape(re.sub("<.*?>", "", c)) for c in re.findall("<figcaption>(.*?)</figcaption>", drawn)]
    assert captions == [
        "Arithmetic rate in GFLOP/s A CPU, 2 cores",
        "Arithmetic rate in GFLOP/s NVIDIA Some GPU",
        *["Training speed / timm's, right is faster", "Inference speed / timm's, right is faster"] * 2,
        "Time against tokens ms for one sample",
        "Time against tokens ms for one image",
        *["Training images per second", "Inference images per second"] * 2,
    ]
    assert drawn.count("one matrix product") == 2
    assert drawn.count("<polyline") == 5 + 2 + 2 * 2 + 2


def test_plots_of_peers(train, page, monkeypatch, tmp_path):
    """For every model a bar for each contestant, the fastest first, of two threads; who failed is last, with why."""
    monkeypatch.setattr(page.run, "RECORD", tmp_path / "peers.jsonl")
    rows = made_peers()
    write(page.run.RECORD, rows)
    drawn = page.html(page.run.section(), page.peers_figures)
    models, contestants = page.run.MODELS[:2], page.CONTESTANTS
    figures = [figure.split("</figure>")[0] for figure in drawn.split("<figure>")[1:]]
    assert len(figures) == 3 and all(model in figures[0] for model in models)
    assert "one matrix product, int8" in figures[0]
    for model, figure in zip(models, figures[1:], strict=True):
        these = [row for row in rows if (row["model"], row["threads"]) == (model, 2)]
        these = [row for row in these if contestants[row["contestant"]].role != "gemm"]
        for row in these:
            assert html.escape(page.clipped(contestants[row["contestant"]].label)) in figure
            assert row["error"] or f">{row['ratio']:.2f}</text>" in figure
        order = [float(v) for v in re.findall(r'class="ink" text-anchor="start">([\d.]+)</text>', figure)]
        assert order == sorted(order) and len(order) == len(these) - 1
        assert "failed: its process ended with code 1: &lt;b&gt; is not known" in figure
        assert figure.count('class="fill0"') == 3


def test_page_is_whole_without_peers(page, monkeypatch, tmp_path):
    monkeypatch.setattr(page.run, "RECORD", tmp_path / "peers.jsonl")
    text = page.text()
    assert "Training and inference</h2>" in text and "The LiteRT graph</h2>" in text
    links = re.findall(r'<a href="#([^"]+)"', text)
    assert len(links) == 5 and all(text.count(f'id="{link}"') == 1 for link in links)
    assert not re.search(r'(src|href)="(https?:)?//|url\(', text)  # of itself alone


def test_every_recorded_row_says_how_it_was_made(train):
    rows = train.rows()
    assert rows and all(list(row) == train.FIELDS for row in rows)
    facts = "device runtime runtime_version threads date commit command".split()
    assert all(row[key] for row in rows for key in facts)
    assert all((row["error"] is None) == (row["images_per_second"] is not None) for row in rows)
    for row in rows:
        if row["images_per_second"]:
            assert row["median_ms"] == pytest.approx(1e3 * row["batch"] / row["images_per_second"])
