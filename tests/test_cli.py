"""The command line: every verb on real files, and one clear line for every mistake."""

import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
from PIL import Image

import keras_vits
from keras_vits import cli

ROOT = pathlib.Path(__file__).parents[1]
JAX = os.environ | {"KERAS_BACKEND": "jax"}  # which a new process loads in half of the time of PyTorch
MODEL = "vit_tiny_patch16_224"
TINY = "--image-size 16 --set patch_size=4 --set width=24 --set depth=1 --set heads=2 --set mlp_hidden=48".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the .keras file of a tiny model that has seen some digits."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", MODEL, *TINY, "--limit", "64", "--epochs", "1", "--out", str(folder)])
    assert stopped.value.code == 0
    return folder


@pytest.mark.once
def test_help_is_quick_and_imports_no_keras():
    code = (
        "import sys\n"
        "from keras_vits import cli\n"
        "try:\n    cli.main(sys.argv[1:])\n"
        "except SystemExit as e:\n    code = e.code\n"
        "heavy = {'keras', 'numpy', 'jax', 'tensorflow', 'torch', 'coremltools'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for verb in "list train export quantize verify benchmark report bundle predict demo".split():
        assert f" {verb} " in done.stdout


@pytest.mark.once
def test_help_names_every_recipe():
    from keras_vits import cli
    from keras_vits.edge.quantize.recipes import RECIPES

    told = dict(re.findall(r"(\w+): ([\w, ]+)\.", cli._files.recipes_by_target()))
    formats = dict.fromkeys(format for recipe in RECIPES.values() for format in recipe.formats)
    assert set(told) == set(formats)
    for format, names in told.items():
        assert names.split(", ") == [name for name, recipe in RECIPES.items() if format in recipe.formats]


@pytest.mark.once
def test_version(run):
    code, out, _ = run("--version")
    assert (code, out) == (0, f"keras-vits {keras_vits.__version__}\n")


@pytest.mark.once
def test_no_verb_shows_the_help_alone(run):
    code, out, err = run()
    assert code == 2 and "Usage: keras-vits" in out + err and "Error" not in out + err


@pytest.mark.once
@pytest.mark.parametrize("verb", "list train export quantize verify benchmark report bundle predict demo".split())
def test_every_verb_has_help_with_an_example(run, verb):
    code, out, err = run(verb, "--help")
    assert code == 0 and not err
    assert f"keras-vits {verb}" in " ".join(out.split()) and "Example" in out and "--backend" in out


def test_list(run):
    code, out, _ = run("list", "mobilevit_*")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if "mobilevit_" in line] == [
        "mobilevit_s",
        "mobilevit_xs",
        "mobilevit_xxs",
    ]


@pytest.mark.once
def test_from_training_to_report(run, trained, tmp_path, short_timing):
    model = trained / f"{MODEL}.keras"
    assert sorted(path.name for path in trained.iterdir()) == [model.name, f"{model.name}.json"]  # and no checkpoint

    code, out, _ = run("export", model, "--to", "litert", "--out", tmp_path)
    float32 = tmp_path / f"{MODEL}_float32.tflite"
    assert code == 0 and f"{float32}  " in out and float32.is_file()

    code, _, _ = run("quantize", float32, "static_int8", "--calibration", "digits")
    int8 = tmp_path / f"{MODEL}_static_int8.tflite"
    assert code == 0 and int8.is_file()

    code, out, _ = run("verify", float32, int8, "--against", model, "--data", "digits", "--limit", 20)
    assert code == 0 and "on 20 pictures" in out

    code, out, _ = run("benchmark", float32, int8, "--threads", 1, "--profile", tmp_path / "time")
    assert code == 0 and "host: " in out and out.count("cpu") >= 2
    drawn = sorted((tmp_path / "time").iterdir())
    assert [path.stem for path in drawn] == [float32.stem, int8.stem] and all(str(path) in out for path in drawn)

    page = tmp_path / "page" / "report.html"
    code, out, _ = run("report", float32, int8, "--against", model, "--data", "digits", "--limit", 20, "--out", page)
    assert code == 0 and page.is_file()
    rows = json.loads(page.with_suffix(".json").read_text())["rows"]
    assert [row["recipe"] for row in rows] == ["float32", "static_int8"] and all(r["latency_median_ms"] for r in rows)


@pytest.mark.once
def test_verify_names_what_half_precision_costs(run, trained, tmp_path):
    model, file = trained / f"{MODEL}.keras", tmp_path / f"{MODEL}_float32.tflite"
    run("export", model, "--out", tmp_path)
    against = ("--against", model, "--data", "digits")
    code, out, err = run("verify", file, *against, "--half")
    assert (code, err) == (0, "") and "on 8 pictures" in out and "in half precision with sums in float32" in out
    lines = [line for line in out.splitlines() if line.strip()]
    at = next(i for i, line in enumerate(lines) if "Layer in half precision" in line)
    assert lines[at].split() == "Layer in half precision Largest Overflow Vanish Loses dB Costs dB".split()
    assert lines[at - 1] == file.name
    rows = [line for line in lines[at + 1 :] if re.search(r"\([A-Z_0-9]+\)", line)]
    layers = {layer.name for layer in keras_vits.load(model).layers}
    assert len(rows) >= 3 and all(line.split()[0].split("/")[0] in layers for line in rows), out
    code, out, _ = run("verify", file, *against, "--half", "--limit", 2)
    assert code == 0 and "on 2 pictures" in out
    code, out, _ = run("verify", file, *against, "--limit", 2)
    assert code == 0 and "half precision" not in out
    code, out, err = run("verify", model, *against, "--half")
    assert (code, out, err.count("\n")) == (2, "", 1) and "cannot be run operation by operation" in err


@pytest.mark.once
@pytest.mark.parametrize("options", [(), ("--pixels",), ("--head", "softmax")])
def test_predict_tells_the_same_with_every_file(run, trained, tmp_path, options):
    import keras_vits
    from keras_vits.training import data

    model = trained / f"{MODEL}.keras"
    picture = tmp_path / "digit.png"
    held_out = data.load("digits", keras_vits.load(model).preprocessing).validation
    Image.fromarray(held_out.pixels()[0]).save(picture)

    def labels(file):
        code, out, _ = run("predict", picture, "--model", file, "--top", 10)
        lines = [line.split() for line in out.splitlines() if "%" in line]
        assert code == 0 and len(lines) == 10
        assert sum(float(p.rstrip("%")) for _, p in lines) == pytest.approx(100, abs=0.6)
        return {name: float(p.rstrip("%")) for name, p in lines}

    run("export", model, "--out", tmp_path, *options)
    expected, found = labels(model), labels(tmp_path / f"{MODEL}_float32.tflite")
    assert found == pytest.approx(expected, abs=0.11)


@pytest.mark.once  # that every backend resumes is in test_training.py
def test_interrupted_training_keeps_its_checkpoint_and_resumes(run, tmp_path, monkeypatch):
    from keras_vits.training import fit

    command = ["train", MODEL, *TINY, "--limit", 64, "--epochs", 3, "--out", tmp_path]
    say = fit.Say.on_epoch_end

    def interrupt(self, epoch, logs=None):
        say(self, epoch, logs)
        if epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit.Say, "on_epoch_end", interrupt)
        code, _, err = run(*command)
    checkpoint = tmp_path / f"{MODEL}.checkpoint.keras"
    assert code == 130 and err.count("\n") == 1 and str(checkpoint) in err and "--resume" in err
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.name]

    code, out, _ = run(*command, "--resume")
    assert code == 0 and "epoch  3/3" in out and "epoch  2/3" not in out
    assert (tmp_path / f"{MODEL}.keras").is_file()


@pytest.mark.once
def test_unreadable_pictures_are_named_and_counted(run, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (20, 20), (50 * i, 0, 0)).save(tmp_path / "photos" / name / f"{i}.png")
    broken = tmp_path / "photos" / "a" / "broken.jpg"
    broken.write_bytes(b"no image")
    code, out, err = run("train", MODEL, *TINY, "--data", tmp_path / "photos", "--epochs", 1, "--out", tmp_path / "out")
    assert code == 0 and "Training vit_tiny_patch16_224 on 8 pictures, 2 held out" in out
    assert err == f"Skipped 1 unreadable image: {broken}\n"


def mistakes():
    yield "unknown model", ["train", "mobilvit_xs"], "Did you mean 'mobilevit_xs'"
    yield "unknown hyper-parameter", ["train", MODEL, "--set", "colour=1"], "has no hyper-parameter colour"
    yield "no hyper-parameter", ["train", MODEL, "--set", "colour"], "--set takes name=value"
    yield "image size", ["train", MODEL, "--image-size", "100"], "multiples of 16"
    yield "wrong channels", ["train", MODEL, *TINY, "--set", "in_channels=2"], "channels"
    yield "no folder", ["train", MODEL, "--data", "nowhere"], "No such folder: nowhere"
    yield "one class", ["train", MODEL, "--data", "one"], "one class, 'a'"
    yield "no images", ["demo", "--data", "empty"], "no subfolders with images"
    yield "nothing to resume", ["train", MODEL, *TINY, "--resume"], "no checkpoint to resume from"
    yield "no such model file", ["export", "nothing.keras"], "No such file: nothing.keras"
    yield "damaged model file", ["export", "text.keras"], "truncated or not a .keras file"
    yield "no such artifact", ["quantize", "nothing.tflite", "float16"], "No such file: nothing.tflite"
    yield "artifact alone", ["benchmark", "text.keras"], "has no text.keras.json beside it"
    yield (
        "unwritable",
        ["train", MODEL, *TINY, "--limit", "20", "--epochs", "1", "--out", "text.keras/x"],
        "Cannot write",
    )
    yield "no pattern", ["list", "resnet*"], "No model fits 'resnet*'"
    yield "usage: option", ["train", MODEL, "--colour"], "--out). See keras-vits train --help."
    yield "usage: number", ["train", MODEL, "--epochs", "many"], "epochs"
    yield "usage: range", ["train", MODEL, "--epochs", "0"], "epochs"
    yield "usage: argument", ["train"], "Missing argument"
    yield "usage: verb", ["trian"], "No such command"


@pytest.mark.once
@pytest.mark.parametrize(("arguments", "words"), [pytest.param(a, w, id=name) for name, a, w in mistakes()])
def test_a_mistake_gives_one_line_and_exit_code_2(run, tmp_path, monkeypatch, arguments, words):
    (tmp_path / "one" / "a").mkdir(parents=True)
    (tmp_path / "empty" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "a" / "1.png")
    (tmp_path / "text.keras").write_text("no zip file")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(*arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert words in err and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.once
def test_an_unknown_recipe_lists_the_known_ones(run, trained, tmp_path):
    run("export", trained / f"{MODEL}.keras", "--out", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run("quantize", tmp_path / f"{MODEL}_float32.tflite", "int3")
    assert code == 2 and "static_int8" in err and err.count("\n") == 1
    code, _, err = run("quantize", tmp_path / f"{MODEL}_float32.tflite", "static_int8")
    assert code == 2 and "needs calibration" in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.once
def test_in_a_process_of_its_own_it_is_one_line_too(tmp_path):
    arguments = ["train", MODEL, *TINY, "--limit", "20", "--resume"]
    code = "from keras_vits import cli; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, env=JAX
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


def test_debug_shows_the_traceback(run):
    code, _, err = run("train", "no_such\x1b[2Jmodel", "--debug")
    first, *_, last = err.splitlines()
    assert code == 2 and first.startswith("Traceback") and last.startswith("Error: Unknown model")
    assert "\x1b" not in err and r"no_such\x1b[2Jmodel" in err


def test_an_error_of_ours_is_told_apart(run, monkeypatch):
    monkeypatch.setattr("keras_vits.models._registry.variants", lambda: 1 / 0)
    code, _, err = run("list")
    assert code == 1 and err.startswith("Internal error: ZeroDivisionError") and err.count("\n") == 1


def test_a_missing_backend_names_the_extra(monkeypatch):
    monkeypatch.setattr(cli._app.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[torch\]"'):
        cli.use_backend(cli._app.Backend.torch)


@pytest.mark.once
@pytest.mark.parametrize("arguments", [["demo"], ["test"], ["test", "BACKEND=jax"]])
def test_make_runs_what_the_readme_says(arguments, tmp_path):
    for file in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "BACKEND"))}

    def dry(*extra):
        done = subprocess.run(
            ["make", "-n", *arguments, *extra], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    fresh = dry()
    extra = arguments[0]
    assert "-m venv .venv" in fresh and f'-c constraints.txt -e ".[{extra}]"' in fresh
    if extra == "demo":
        assert ".venv/bin/keras-vits demo --backend jax" in fresh
    else:
        assert f"for backend in {'jax' if len(arguments) > 1 else 'torch jax tensorflow'};" in fresh
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    (tmp_path / ".venv" / f".{extra}").touch()
    assert "install" not in dry() and "venv .venv" not in dry()  # a second run installs nothing


EXAMPLES = sorted(
    p for p in (ROOT / "examples").glob("*.py") if p.name != "make_bundle.py"
)  # which test_bundle.py runs


@pytest.mark.once
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_examples(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example), "--smoke"])
    runpy.run_path(str(example), run_name="__main__")
    assert "%" in capsys.readouterr().out and len(example.read_text().splitlines()) < 60


# ---------------------------------------------------------------- names that are taken


def never(*arguments, **options):
    raise AssertionError("the work began")


@pytest.mark.once
def test_export_and_quantize_refuse_a_taken_name_before_the_work(run, trained, tmp_path, monkeypatch):
    floats = [f"{MODEL}_float32.tflite", f"{MODEL}_float32.onnx", f"{MODEL}_float16.mlpackage"]
    export = ["export", trained / f"{MODEL}.keras", "--to=litert", "--to=onnx", "--to=coreml", "--out", tmp_path]
    quantized = [("static_int8.tflite", 0), ("dynamic_int8.onnx", 1), ("int8.mlpackage", 2)]
    commands = [("quantize", tmp_path / floats[i], name.split(".")[0], "--calibration=digits") for name, i in quantized]
    assert run(*export)[0] == 0
    for command in commands[:1]:
        assert run(*command)[0] == 0
    for name, _ in quantized[1:]:  # whoever made them
        (tmp_path / f"{MODEL}_{name}").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr("keras_vits.graph.trace.trace", never)
        patch.setattr("keras_vits.training.data.load", never)
        for name, command in [
            (floats[0], export),
            *((f"{MODEL}_{q}", c) for (q, _), c in zip(quantized, commands, strict=True)),
        ]:
            code, out, err = run(*command)
            assert (code, out, err.count("\n")) == (2, "", 1), err
            assert f"{tmp_path / name} is there already: --overwrite replaces it" in err
        for format, name in zip(("onnx", "coreml"), floats[1:], strict=True):
            code, _, err = run("export", trained / f"{MODEL}.keras", "--to", format, "--out", tmp_path)
            assert code == 2 and f"{tmp_path / name} is there already" in err and "another --out keeps it" in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert run(*export[:3], "--out", tmp_path, "--overwrite")[0] == 0
    assert run(*commands[0], "--overwrite")[0] == 0


@pytest.mark.once
def test_a_quantized_file_is_told_apart_from_a_taken_name(run, trained, tmp_path):
    run("export", trained / f"{MODEL}.keras", "--out", tmp_path)
    run("quantize", tmp_path / f"{MODEL}_float32.tflite", "dynamic_int8")
    code, _, err = run("quantize", tmp_path / f"{MODEL}_dynamic_int8.tflite", "dynamic_int8")
    assert code == 2 and "Only a float32 LiteRT artifact can be quantized" in err


@pytest.mark.once
def test_a_second_training_replaces_nothing_of_the_first(run, trained, tmp_path, monkeypatch):
    command = ["train", MODEL, *TINY, "--limit", 20, "--epochs", 1]
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = (tmp_path / f"{MODEL}.keras").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("keras_vits.training.fit.fit", never)
        code, out, err = run(*command, "--out", tmp_path)
        assert (code, out) == (2, "")
        assert err == (
            f"Error: {tmp_path / MODEL}.keras is there already: --overwrite replaces it, another --out keeps it.\n"
        )
        (tmp_path / "b").mkdir()
        kept = tmp_path / "b" / f"{MODEL}.checkpoint.keras"
        kept.write_bytes(b"of another training")
        code, _, err = run(*command, "--out", tmp_path / "b")
        assert code == 2 and err.startswith(f"Error: {kept} keeps the last epoch of a training that was not finished: ")
        assert "--resume continues it, --overwrite begins anew." in err and err.count("\n") == 1
        (tmp_path / "c").mkdir()
        mine = tmp_path / "c" / f"{MODEL}.keras.json"
        mine.write_text("{}")
        for verb in (command, ["demo", "--model", MODEL]):
            code, _, err = run(*verb, "--out", tmp_path / "c")
            assert code == 2 and f"{mine} is there already" in err
        for folder, message in ((tmp_path, "is there already: --overwrite"), (tmp_path / "b", "was not finished")):
            code, _, err = run("demo", "--model", MODEL, "--out", folder)
            assert code == 2 and message in err and err.count("\n") == 1
    assert (tmp_path / f"{MODEL}.keras").read_bytes() == before and kept.read_bytes() == b"of another training"
    code, _, err = run(*command, "--out", tmp_path, "--overwrite")
    assert code == 0, err
    assert (tmp_path / f"{MODEL}.keras").read_bytes() != before
