"""What a user sees on the terminal and gets from a pipe: ours alone, whole, and in its place."""

import contextlib
import csv
import dataclasses
import fcntl
import io
import json
import os
import pathlib
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
from PIL import Image

import keras_vits
from keras_vits import edge
from keras_vits._util import progress, terminal

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[2]
MODEL = "vit_tiny_patch16_224"
SIZES = dict(image_size=16, patch_size=4, width=24, depth=1, heads=2, mlp_hidden=48)
TINY = ["--image-size", "16", *(f"--set={name}={value}" for name, value in SIZES.items() if name != "image_size")]
LONG = "a_name_that_is_longer_than_eighty_columns_of_a_terminal_" * 2
EVIL = "red\x1b[31m\x1b]0;title\x07\r\n\u202egpj.png"  # colour, the window's title, line breaks, another direction

# Runs every verb twice in one process, into files and on a terminal, with a bar from the first moment on.
DRIVER = """
import json, os, sys
from keras_vits import cli
from keras_vits._util import progress
from keras_vits.edge.devices import host
from keras_vits.edge.evidence import benchmark
progress.DELAY_SECONDS = 0.0
host.PROCESSES = 1
benchmark.benchmark.__kwdefaults__.update(min_runs=3, min_seconds=0.02, warmup_seconds=0.01)
verbs, terminal = json.loads(sys.argv[1]), int(sys.argv[2])
codes, files = [], [os.open(name, os.O_CREAT | os.O_WRONLY) for name in ("stdout", "stderr")]
for arguments in verbs:
    for folder, streams in (("piped", files), ("shown", [terminal, terminal])):
        os.chdir(folder)
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
        try:
            cli.main(arguments)
        except SystemExit as e:
            codes.append(e.code)
        sys.stdout.flush()
        os.chdir("..")
with open("codes.json", "w") as file:
    json.dump([codes, "tensorflow" in sys.modules], file)
"""


def environment(**more):
    ours = ("TF_CPP_MIN_LOG_LEVEL", "COLUMNS", "NO_COLOR", "FORCE_COLOR")
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    return kept | {"KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT), "TERM": "xterm"} | more


def verbs():
    """Every verb once, in the order in which they are used."""
    model, float32, int8 = f"out/{MODEL}.keras", f"out/{MODEL}_float32.tflite", f"out/{MODEL}_static_int8.tflite"
    yield ["train", MODEL, *TINY, "--data", "photos", "--epochs", "3"]
    yield ["export", model, "--to", "litert", "--to", "onnx", "--to", "coreml"]
    yield ["quantize", float32, "static_int8", "--calibration", "photos/cat"]
    yield ["verify", float32, int8, f"out/{MODEL}_float32.onnx", "--against", model, "--data", "photos"]
    yield ["benchmark", float32]
    yield ["report", int8, "--against", model, "--data", "photos"]
    yield ["bundle", float32, "--platform", "web", "--out", "bundle"]
    yield ["predict", "photos", "--model", float32]
    yield ["list", "mobilevit_*", "--pretrained"]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """(stdout, stderr, what was sent to a terminal of 400 columns, folder) of every verb."""
    at = tmp_path_factory.mktemp("everything")
    for mode in ("piped", "shown"):
        for i, name in enumerate((f"cat/{LONG}.png", "cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png", "dog/5.png")):
            picture(at / mode / "photos" / name, i)
        (at / mode / "photos" / "dog" / "broken.jpg").write_bytes(b"no image")
    command = lambda terminal: [sys.executable, "-c", DRIVER, json.dumps(list(verbs())), str(terminal)]
    code, sent = on_a_terminal(command, at, 400)
    assert code == 0, sent
    assert json.loads((at / "codes.json").read_text())[0] == [0] * 2 * len(list(verbs())), sent
    return (at / "stdout").read_text(), (at / "stderr").read_text(), sent, at


def on_a_terminal(command, at, columns=80, **more):
    """Everything that a command sends to a terminal."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = command(child) if callable(command) else command
    process = subprocess.Popen(
        command, cwd=at, env=environment(**more), stdin=child, stdout=child, stderr=child, pass_fds=[child]
    )
    os.close(child)
    sent = b""
    with contextlib.suppress(OSError):  # at its end
        while part := os.read(parent, 1 << 16):
            sent += part
    os.close(parent)
    return process.wait(), sent.decode()


def screen(sent):
    """The lines that a terminal of any width shows in the end."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+|\x1b", sent):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\x1b[2K":
            lines[row] = ""
        elif re.fullmatch(r"\x1b\[\d*A", token):
            row -= int(token[2:-1] or 1)
        elif re.fullmatch(r"\x1b\[(\?25[lh]|[\d;]*m)", token):
            pass  # the cursor, colours
        else:
            assert token[0] != "\x1b", f"an unknown escape sequence: {token!r}"
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines]


def without_numbers(lines):
    """What is the same in every run."""
    text = re.sub(r"\d+", "#", "\n".join(line.rstrip() for line in lines))
    return re.sub(r"[ ─━]+", " ", re.sub(r"#(\.#)?%?", "#", text)).splitlines()


SKIPPED = "Skipped 1 unreadable image: photos/dog/broken.jpg"


def test_in_a_pipe_every_verb_prints_ours_alone_and_names_are_whole(everything):
    out, err, _, at = everything
    assert set(err.splitlines()) == {SKIPPED}
    assert "\x1b" not in out and f"photos/cat/{LONG}.png" in out and "photos/dog/3.png" in out
    for line in out.splitlines():
        assert not re.search(r"tensorflow|xnnpack|absl|warning|onednn|cuda|INFO|[EWI]0000", line, re.IGNORECASE), line
    suffixes = (".tflite", ".onnx", ".mlpackage", ".keras")
    names = [path.name for path in (at / "piped" / "out").iterdir() if path.suffix in suffixes]
    assert len(names) == 5 and all(name in out for name in names)
    assert out.count("  epoch ") == 3 and "after 3 epochs" in out


def test_on_jax_tensorflow_is_not_even_imported(everything):
    assert json.loads((everything[3] / "codes.json").read_text())[1] is False


def test_on_a_terminal_the_lines_are_those_of_the_pipe_and_the_bar_is_gone(everything):
    out, _, sent, _ = everything
    for words in ("Training vit_tiny", "Running", "Loading", "Quantizing", "Classifying"):
        assert words in sent, words
    shown = [line for line in without_numbers(screen(sent)) if line.strip()]
    told = without_numbers([SKIPPED])[0]
    assert told in shown
    assert [line for line in shown if line != told] == [
        line for line in without_numbers(out.splitlines()) if line.strip()
    ]


def run_in(columns, code, at, **more):
    return on_a_terminal([sys.executable, "-c", code], at, columns, **more)


LINES = """
import sys, time
from keras_vits._util import progress
progress.DELAY_SECONDS = 0.0
for i in progress.progress(range(6), "Outer \\x1b[31m [red]" + "x" * 90):
    for j in progress.progress(range(3), "Inner"):
        time.sleep(0.01)
    print(f"line {i}")
    print(f"error {i}", file=sys.stderr)
    print("half ", end="")
    print("whole")
print("end", end="")
"""


@pytest.mark.parametrize("columns", [40, 80])
def test_lines_stand_above_the_bar_whole(tmp_path, columns):
    code, sent = run_in(columns, LINES, tmp_path)
    expected = [line for i in range(6) for line in (f"line {i}", f"error {i}", "half whole")]
    assert code == 0 and screen(sent) == [*expected, "end"]
    assert "Inner" in sent and r"Outer \x1b[31m [red]" in sent and "\x1b[31m [red]" not in sent
    assert sent.rindex("\x1b[?25h") > sent.rindex("\x1b[?25l")  # the cursor is there again


def test_a_terminal_that_obeys_nothing_is_sent_nothing_to_obey(tmp_path):
    code, sent = run_in(80, LINES.replace("\\x1b[31m", ""), tmp_path, TERM="dumb")
    assert code == 0 and "\x1b" not in sent and sent.count("line ") == 6


def test_without_colour_there_is_none(tmp_path):
    code, sent = run_in(80, LINES.replace("\\x1b[31m", ""), tmp_path, NO_COLOR="1")
    assert code == 0 and "Outer" in sent and not re.search(r"\x1b\[[\d;]*3\d", sent)


def test_work_that_takes_long_shows_a_bar_within_its_first_item(tmp_path):
    code = """
import time
from keras_vits._util import progress
progress.DELAY_SECONDS = 0.2
for _ in progress.progress([0], "One file"):
    time.sleep(0.8)
with progress.working("One step"):
    time.sleep(0.8)
for _ in progress.progress([0], "A short one"):
    pass
with progress.working("whole verb", when_idle=True), progress.working("its part"):
    time.sleep(0.8)
"""
    code, sent = run_in(80, code, tmp_path)
    assert code == 0 and "One file" in sent and "0/1" in sent and "One step" in sent and "A short one" not in sent
    assert "its part" in sent and "whole verb" not in sent.partition("its part")[2] and screen(sent) == [""]


def test_native_words_are_kept_back_and_shown_when_something_fails(tmp_path):
    code = """
import os
from keras_vits._util.terminal import quiet
with quiet(), quiet():
    os.write(2, b"noise\\n")
os.write(2, b"between\\n")
try:
    with quiet(show_failure=False):
        os.write(2, b"told by the exception\\n")
        raise ValueError
except ValueError:
    pass
try:
    with quiet():
        os.write(2, b"real \\x1b[2J trouble\\n")
        raise RuntimeError
except RuntimeError:
    raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "between\nreal \\x1b[2J trouble\n")


# ---------------------------------------------------------------- names from elsewhere


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünï 漢字.png", "plain ünï 漢字.png"),
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("\u202egpj.exe\u2066", r"\u202egpj.exe\u2066"),
        ("bytes \udcff", r"bytes \udcff"),
        ("\u2028\ufeff", r"\u2028\ufeff"),
        ("👩\u200d💻 می\u200cخواهم", "👩\u200d💻 می\u200cخواهم"),
        ("Bildschirmfoto 1.23\u202fPM", "Bildschirmfoto 1.23\u202fPM"),
        (pathlib.PurePosixPath("x\x07"), r"x\x07"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text, shown):
    assert terminal.visible(text) == shown


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The .keras file of a tiny model with class names from elsewhere."""
    names = ["cat", "dog\x1b[31m", "two\x07lines"]
    net = keras_vits.create(MODEL, **SIZES, num_classes=3, class_names=names)
    return edge.keras_file.export(net, tmp_path_factory.mktemp("model"), name="m").path


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (20, 24, 3), "uint8")
    Image.fromarray(pixels).save(path, "png")
    return path


def test_escape_sequences_in_names_are_shown_and_not_sent(run, model, tmp_path):
    evil = picture(tmp_path / EVIL)
    (tmp_path / f"none {EVIL}").write_bytes(b"no image")
    code, out, err = run("predict", tmp_path, "--model", model)
    for sent in (out, err):
        assert code == 0 and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", sent)
        assert r"red\x1b[31m\x1b]0;title\x07\r\n\u202egpj.png" in sent
    assert r"dog\x1b[31m" in out and r"two\x07lines" in out and err.count("\n") == 1
    for arguments in (["predict", evil], ["export", evil], ["train", evil], ["quantize", evil, evil], ["list", evil]):
        code, out, err = run(*arguments, *(["--model", evil] if arguments[0] == "predict" else []))
        assert code == 2 and err.count("\n") == 1 and r"\x1b[31m" in err
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out + err)


def test_markup_and_emoji_codes_in_names_stay_letters(run, model, tmp_path):
    name = picture(tmp_path / "[red]:smile:[/].png")
    code, out, _ = run("predict", name, "--model", model)
    assert code == 0 and str(name) in out


# ---------------------------------------------------------------- predict


@pytest.fixture
def photos(tmp_path):
    """Eight pictures in a folder, of which two are none, and files that are not for us."""
    for i, name in enumerate(("b.png", "a.jpg", "deep/er/c.webp", "deep/d.PNG", "z,\"'.png", "ü.png")):
        picture(tmp_path / "photos" / name, i)
    (tmp_path / "photos" / "bad.png").write_bytes(b"")
    (tmp_path / "photos" / "deep" / "worse.jpg").write_bytes(b"GIF89a")
    picture(tmp_path / "photos" / ".thumbnails" / "a.png")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    os.mkfifo(tmp_path / "photos" / "pipe.png")
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    return tmp_path / "photos"


GOOD = ["a.jpg", "b.png", "deep/d.PNG", "deep/er/c.webp", "z,\"'.png", "ü.png"]


def test_predict_takes_a_folder_and_writes_csv(run, model, photos, tmp_path):
    code, out, err = run("predict", photos, "--model", model, "--format", "csv", "--top", 2)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and list(rows[0]) == ["path", "rank", "label", "probability"]
    assert [row["path"] for row in rows] == [str(photos / name) for name in GOOD for _ in range(2)]
    assert [row["rank"] for row in rows] == ["1", "2"] * len(GOOD)
    assert err == f"Skipped 2 unreadable images: {photos / 'bad.png'}, {photos / 'deep' / 'worse.jpg'}\n"
    expected = keras_vits.predict(keras_vits.load(model), [photos / name for name in GOOD], 2)
    assert [row["label"] for row in rows] == [one.label for each in expected for one in each]
    assert np.allclose([float(row["probability"]) for row in rows], [p.probability for e in expected for p in e], 1e-4)

    file = tmp_path / "new" / "labels.csv"
    code, told, _ = run("predict", photos, "--model", model, "--top", 2, "--out", file)
    assert code == 0 and told == f"{file}\n" and file.read_bytes().decode() == out


def test_predict_writes_one_json_array(run, model, photos, tmp_path):
    file = tmp_path / "labels.json"
    code, _, err = run("predict", photos / "a.jpg", photos, "--model", model, "--out", file)
    found = json.loads(file.read_text())
    assert code == 0, err
    assert [one["path"] for one in found] == [str(photos / name) for name in GOOD]
    for one in found:
        assert [label["rank"] for label in one["labels"]] == [1, 2, 3]
        assert sum(label["probability"] for label in one["labels"]) == pytest.approx(1)
        assert {label["label"] for label in one["labels"]} == {"cat", "dog\x1b[31m", "two\x07lines"}
    code, out, _ = run("predict", photos, "--model", model, "--format", "json")
    assert json.loads(out) == found
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # nothing half-written is left


def test_predict_gives_the_same_table_on_the_terminal_and_in_a_file(run, model, photos, tmp_path):
    code, out, _ = run("predict", photos, "--model", model)
    assert code == 0 and all(str(photos / name) in out for name in GOOD)
    run("predict", photos, "--model", model, "--out", tmp_path / "labels.txt")
    assert (tmp_path / "labels.txt").read_text() == out


def test_predict_refuses_what_it_cannot_do_in_one_sentence(run, model, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}

    def refused(*arguments):
        code, out, err = run("predict", *arguments, "--model", model)
        assert code == 2 and err.count("\n") == 1 and not out, (out, err)
        return err

    assert "There are no pictures in" in refused(tmp_path / "empty")
    assert "does not exist" in refused(tmp_path / "nowhere.png")
    assert "neither a file nor a folder" in refused(photos / "pipe.png")
    assert "is not a readable picture" in refused(photos / "bad.png")
    assert "Neither are the other 1." in refused(photos / "bad.png", photos / "deep" / "worse.jpg")
    assert "does not say what to write" in refused(photos, "--out", tmp_path / "labels.xls")
    assert "is a folder" in refused(photos, "--out", photos, "--format", "csv")
    assert "would be overwritten" in refused(photos, "--out", photos / "a.jpg", "--format", "csv")
    assert "would be overwritten" in refused(photos, "--out", model, "--format", "json")
    bad = refused(photos / "bad.png", "--out", tmp_path / "labels.csv")
    assert "not a readable picture" in bad and not (tmp_path / "labels.csv").exists()
    assert before == {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- words


def test_one_is_not_several_and_zero_has_no_sign(run, tmp_path):
    for name in "ab":
        for i in range(2):
            picture(tmp_path / "photos" / name / f"{i}.png", i)
    few = ["--data", tmp_path / "photos", "--epochs", 1, "--limit", 1]
    code, out, err = run("train", MODEL, *TINY, *few, "--out", tmp_path / "o")
    assert code == 0, err
    assert code == 0 and "on 1 picture, 1 held out" in out and out.rstrip().endswith("after 1 epoch")
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [f"{MODEL}.keras", f"{MODEL}.keras.json"]
    assert terminal.counted(0, "picture") == "0 pictures" and terminal.counted(2, "picture") == "2 pictures"

    from keras_vits.edge.quantize.calibration import CalibrationWarning, batches

    spec = keras_vits.load(tmp_path / "o" / f"{MODEL}.keras").input_specs[0]
    preprocessing = dict(mean=(0.0,) * 3, std=(1.0,) * 3, channel_order="rgb")
    spec = dataclasses.replace(spec, preprocessing=preprocessing)
    images = np.random.default_rng(0).uniform(8, 9, (2, *spec.shape[1:])).astype("float32")
    with pytest.warns(CalibrationWarning, match=r"outside of this model's 0 to 1:"):
        list(batches(images, [spec], "reading"))


def test_no_verb_shows_the_help_alone(run):
    code, out, err = run()
    assert code == 2 and "Usage: keras-vits" in out and not err
    assert run("--help")[:2] == (0, out)


# ---------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("seconds", [0.05, 0.5, 1.5])
def test_ctrl_c_says_stopped_whenever_it_comes(tmp_path, seconds):
    """While modules are imported and after that."""
    code = "from keras_vits import cli; print('ready', flush=True); cli.main()"
    command = [sys.executable, "-c", code, "export", "vit_tiny_patch16_224", "--out", str(tmp_path)]
    with subprocess.Popen(
        command, env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if "random weights" not in line]
    assert (process.returncode, out, lines) == (130, "", ["Stopped."])
    assert not list(tmp_path.iterdir())


def test_ctrl_c_within_a_verb_is_one_line(run, monkeypatch):
    monkeypatch.setattr("keras_vits.list_models", lambda *_: signal.raise_signal(signal.SIGINT), raising=False)
    assert run("list") == (130, "", "Stopped.\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_is_left_alone_where_it_is_to_be_ignored(run, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run("list", "mobilevit_*")[0] == 0 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_an_exception_left_on_the_terminal_is_taken_away_before_the_error(tmp_path):
    code = """
import time
from keras_vits import cli, _util
from keras_vits._util import progress
from keras_vits.cli import _models
import keras_vits
progress.DELAY_SECONDS = 0.0
def fail(*_):
    for _ in progress.progress(range(3), "Counting"):
        time.sleep(0.3)
        raise ValueError("No such thing.")
keras_vits.list_models = fail
cli.main(["list"])
"""
    code, sent = run_in(80, code, tmp_path)
    assert code == 2 and "Counting" in sent and screen(sent) == ["Error: No such thing.", ""]
    assert progress._display.live is None
