"""The device "browser": pages that lie and break, without a browser; LiteRT.js in Chromium where both are found."""

import contextlib
import http.client
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

import numpy as np
import pytest

import keras_vits
from keras_vits import edge
from keras_vits.edge.devices import browser, browser_server, chromium

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[2]
QUICK = dict(min_runs=4, min_seconds=0.02, warmup_seconds=0.01)
AGENT = {"agent": "Phone/1.0", "browser": "", "device": "", "platform": "Linux armv8l", "cores": 8}
AGENT |= {"isolated": True, "gpu": "", "software_gpu": False}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    tiny = dict(image_size=(24, 32), patch_size=8, width=24, depth=1, heads=2, mlp_hidden=48, num_classes=4)
    model = keras_vits.create("vit_tiny_patch16_224", **tiny)
    model.set_weights([np.random.default_rng(i).normal(0, 0.3, w.shape) for i, w in enumerate(model.weights)])
    options = dict(batch=3, head="top_k", top_k=2, layout="nchw")
    plain, other = edge.litert.export(model, folder), edge.litert.export(model, folder, name="other", **options)
    return [plain, edge.litert.quantize(plain, "dynamic_int8"), other]


# ---------------------------------------------------------------- without a browser


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A folder that looks as if LiteRT.js 9.9.9 were installed in it."""
    package = tmp_path / "npm" / "node_modules" / "@litertjs" / "core"
    (package / "wasm").mkdir(parents=True)
    (package / "package.json").write_text('{"version": "9.9.9"}')
    (package / "wasm" / "litert.wasm").write_bytes(b"\0asm")
    monkeypatch.setenv("KERAS_VITS_WEB", str(tmp_path / "npm"))
    return tmp_path / "npm"


class Phone:
    """Opens the served page and does what it is told, its own way where `replies` has one: task -> answer(order)."""

    def __init__(self, url, about=AGENT, **replies):
        self.url, self.about, self.replies = urllib.parse.urlsplit(url), about, replies
        self.orders, self.last = [], None

    def request(self, method, path, content=None):
        connection = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=20)
        connection.request(method, path, content)
        response = connection.getresponse()
        return response.status, response.read(), response.headers

    def post(self, name, content):
        status, body, _ = self.request("POST", self.url.path + name, json.dumps(content))
        return status, json.loads(body) if status == 200 else body

    def get(self, name):
        status, body, _ = self.request("GET", self.url.path + name)
        assert status == 200
        return body

    def open(self):
        status, order = self.post("open", self.about)
        assert status == 200
        self.session = order.pop("session")
        return order

    def answer(self, order):
        self.orders.append(order)
        default = {
            "load": lambda order: {"load_ms": 7, "whole": True},
            "check": lambda order: {"errors": {output["name"]: 0 for output in order["expected"]}},
            "run": lambda order: {"ms": [2.0 + order["model"]] * order["runs"]},
            "drop": lambda order: {},
        }
        return self.replies.get(order["task"], default[order["task"]])(order)

    def work(self):
        order = self.open()
        while "task" in order:
            _, order = self.post("answer", {"session": self.session, "answer": self.answer(order)})
        self.last = order
        return self


def serve(artifacts, visit, **options):
    """What `browser.serve` returns or raises, and what `visit(url)` does meanwhile, which is given back too."""
    visited = {}

    def on_url(url):
        def go():
            try:
                visited["value"] = visit(url)
            except BaseException as e:
                visited["error"] = e

        visited["thread"] = threading.Thread(target=go, daemon=True)
        visited["thread"].start()

    try:
        found = browser.serve(artifacts, on_url=on_url, **{**QUICK, "patience_seconds": 20, **options})
    finally:
        visited["thread"].join(20)
        if "error" in visited:
            raise visited["error"]
    return found, visited["value"]


def test_a_phone_posts_its_result(artifacts, npm):
    found, phone = serve(artifacts[:2], lambda url: Phone(url).work())
    assert [(f.artifact_path, f.accelerator, f.threads) for f in found] == [
        (artifact.path, "wasm", threads) for artifact in artifacts[:2] for threads in (1, 2)
    ]
    for number, one in enumerate(found):
        assert one.median_ms == one.p99_ms == 2 + number and one.load_ms == 7 and one.runs >= 4
        assert one.runtime == "LiteRT.js 9.9.9" and one.device == "browser:serve" and one.cpu == "Linux armv8l, 8 cores"
        assert one.environment == {"browser": "", "user_agent": "Phone/1.0"} and one.peak_memory_bytes is None
    assert edge.ratio(found[1], found[0]) == 1.5  # of the same turns
    assert "result was sent" in phone.last["end"] and len(phone.last["found"]) == 4
    tasks = [order["task"] for order in phone.orders]
    assert tasks[:8] == ["load", "check"] * 4 and set(tasks[8:]) == {"run"}  # no time before the outputs are right
    turns = [order["model"] for order in phone.orders[12:]]
    assert all(sorted(turns[i : i + 4]) == [0, 1, 2, 3] for i in range(0, len(turns), 4))


def test_the_expected_outputs_are_the_hosts(artifacts, npm):
    seen = []

    def check(order):
        outputs = [np.frombuffer(phone.get(output["file"]), "float32") for output in order["expected"]]
        seen.append(
            (np.frombuffer(phone.get(order["images"]), "float32").reshape(-1, *order["input"]["shape"]), outputs)
        )
        return {"errors": {output["name"]: 0 for output in order["expected"]}}

    def visit(url):
        nonlocal phone
        phone = Phone(url, check=check)
        phone.work()

    phone = None
    serve(artifacts, visit, threads=(1,))
    for artifact, (images, outputs) in zip(artifacts, seen, strict=True):
        assert images.shape[1:] == artifact.input.stored_shape
        runner = edge.litert.load(artifact)
        expected = np.stack([runner.run(batch)[0] for batch in images])
        assert len(outputs) == 1 and np.array_equal(outputs[0].reshape(expected.shape), expected)
    assert len(seen[2][0]) * 3 == 12  # ten pictures in whole batches of three


def test_nobody_without_the_token_gets_or_posts_anything(artifacts, npm):
    def visit(url):
        phone = Phone(url)
        token = phone.url.path.strip("/")
        assert len(token) == 16
        for path in ("/", "/index.html", "/0.tflite", f"/{token}", f"/{token[:-1]}x/0.tflite", "//0.tflite", "/ü/"):
            path = urllib.parse.quote(path)
            assert phone.request("GET", path)[0] == phone.request("POST", path, "{}")[0] == 403
        assert phone.request("POST", f"/{token[::-1]}x/open", json.dumps(AGENT))[0] == 403
        for path in ("../../etc/passwd", "/etc/passwd", "core/../../npm/package.json", "browser.py"):
            assert phone.request("GET", phone.url.path + path)[0] == 404
        assert phone.get("0.tflite") == artifacts[0].path.read_bytes()
        assert b"page.js" in phone.get("") and phone.get("core/wasm/litert.wasm") == b"\0asm"
        headers = phone.request("GET", phone.url.path)[2]
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin" and headers["Content-Type"] == "text/html"
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        return phone.work()

    found, _ = serve(artifacts[:1], visit)
    assert len(found) == 2


def test_garbage_is_refused_and_nothing_is_lost(artifacts, npm):
    def visit(url):
        phone = Phone(url)
        for bad in (None, 1, [], {}, {**AGENT, "cores": "8"}, {**AGENT, "more": 1}, AGENT | {"isolated": 1}):
            assert phone.post("open", bad)[0] == 400
        for raw in (b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5000):
            assert phone.request("POST", f"{phone.url.path}open", raw)[0] == 400
        order = phone.open()
        while "task" in order:
            session, good = phone.session, phone.answer(order)
            bad = [None, [], {}, {"error": 3}, {"ms": []}, {"ms": ["1"]}, {"ms": [-1]}, {"ms": [True]}, {"ms": 1}]
            bad += [
                {"ms": [float("nan")]},
                {"ms": [10**400]},
                {"load_ms": 1},
                {"errors": {"logits": "0"}},
                {**good, "x": 1},
            ]
            for answer in bad if len(phone.orders) < 8 else ():
                if not (answer == {} and order["task"] == "drop"):
                    assert phone.post("answer", {"session": session, "answer": answer})[0] == 400, (order, answer)
            assert phone.post("answer", {"answer": good})[0] == 400
            assert phone.post("elsewhere", {"session": session, "answer": good})[0] == 400
            assert phone.post("answer", {"session": session + 1, "answer": good})[0] == 409
            _, order = phone.post("answer", {"session": session, "answer": good})
        return phone

    found, _ = serve(artifacts[:1], visit)
    assert [(f.median_ms, f.threads) for f in found] == [(2, 1), (3, 2)]


def test_an_answer_counts_once(artifacts, npm):
    with browser_server.Server(artifacts[:1], "127.0.0.1", 0) as server:
        phone, again = Phone(server.url), {"session": 1, "answer": {"ms": [2]}}
        threading.Thread(target=phone.work, daemon=True).start()
        page = server.opened(20, None, "Waiting")
        assert phone.post("answer", again)[0] == 400  # nothing was asked yet
        assert page.ask(task="run", model=0, runs=2, seconds=0).ms == [2, 2]
        assert phone.post("answer", again)[0] == 400
        assert page.ask(task="run", model=0, runs=3, seconds=0).ms == [2, 2, 2]


def test_a_page_that_is_closed_or_opened_twice_begins_anew(artifacts, npm):
    def visit(url):
        first, second, third = Phone(url), Phone(url), Phone(url)
        order = first.open()
        taken = threading.Thread(target=lambda: first.__setattr__("last", first.post("answer", stale)), daemon=True)
        stale = {"session": first.session, "answer": first.answer(order)}
        second.open()
        taken.start()
        taken.join(20)
        assert first.last[0] == 409 and b"Another page" in first.last[1]
        assert second.post("left", {"session": second.session})[0] == 204
        return third.work()

    found, phone = serve(artifacts[:1], visit, threads=(1,))
    assert len(found) == 1 and [order["task"] for order in phone.orders][:2] == ["load", "check"]


@pytest.mark.parametrize(("error", "message"), [(0.9, r"differs by 0\.9 .* allowed"), (None, "differs by NaN")])
def test_outputs_that_differ_get_no_time(artifacts, npm, error, message):
    phone = dict(check=lambda order: {"errors": {"logits": error if order["model"] == 0 else 0}})
    with pytest.warns(edge.DeviceWarning, match=rf"float32\.tflite on wasm was not measured: .* logits {message}"):
        found, phone = serve(artifacts[:2], lambda url: Phone(url, **phone).work(), threads=(1,))
    assert [f.artifact_path for f in found] == [artifacts[1].path]
    assert not [order for order in phone.orders if order["task"] == "run" and order["model"] == 0]


def test_what_fails_leaves_the_others_alone(artifacts, npm):
    def run(order):
        late = order["model"] == 1 and order["seconds"] == 0
        return {"error": "memory access\nout of bounds"} if late else {"ms": [1] * order["runs"]}

    def load(order):
        return {"error": "it is refused"} if order["model"] == 2 else {"load_ms": 1, "whole": False}

    with pytest.warns(edge.DeviceWarning) as warned:
        found, _ = serve(artifacts, lambda url: Phone(url, run=run, load=load).work(), threads=(1,))
    assert [f.artifact_path for f in found] == [artifacts[0].path]
    assert sorted(str(w.message).split("measured: ")[1] for w in warned) == [
        "it is refused",
        "memory access out of bounds",
    ]
    broken = lambda order: {"error": "broken"}
    with pytest.warns(edge.DeviceWarning), pytest.raises(edge.DeviceError, match=r"could run nothing: .*: broken"):
        serve(artifacts, lambda url: Phone(url, run=broken).work())


def test_only_what_the_browser_has_is_measured(artifacts, npm):
    def measured(about, **options):
        found, _ = serve(artifacts[:1], lambda url: Phone(url, AGENT | about).work(), **options)
        return [(f.accelerator, f.threads) for f in found], found[-1].environment

    with pytest.warns(edge.DeviceWarning, match="one thread only.*adb reverse"):
        assert measured({"isolated": False})[0] == [("wasm", 1)]
    with pytest.warns(edge.DeviceWarning, match="no WebGPU adapter"):
        assert measured({}, accelerators=("wasm", "webgpu"))[0] == [("wasm", 1), ("wasm", 2)]
    ways, environment = measured({"gpu": "arm\x1b[31m valhall"})
    assert ways == [("wasm", 1), ("wasm", 2), ("webgpu", 1)]
    assert environment["gpu"] == "arm [31m valhall" and environment["on_gpu"] == "all of it"
    emulated = {"gpu": "swiftshader", "software_gpu": True}
    assert measured(emulated)[0] == [("wasm", 1), ("wasm", 2)]
    with pytest.warns(edge.DeviceWarning, match="through swiftshader"):
        assert measured(emulated, accelerators=("webgpu",))[0] == [("webgpu", 1)]
    with (
        pytest.warns(edge.DeviceWarning),
        pytest.raises(edge.DeviceError, match="could run nothing: it has nothing of what was asked for"),
    ):
        measured({}, accelerators=("webgpu",))


def test_a_page_that_falls_silent_is_given_up_with_the_results_so_far(artifacts, npm, monkeypatch):
    monkeypatch.setattr(browser_server, "SILENCE_SECONDS", 1.5)

    def visit(url):
        def run(order):
            if order["model"] == 1 and order["seconds"] == 0:
                raise ConnectionError
            return {"ms": [30.0] * order["runs"]}

        with contextlib.suppress(ConnectionError):
            Phone(url, run=run).work()

    with pytest.raises(edge.DeviceError, match=r"has not answered for 1\.5 seconds") as gone:
        serve(artifacts[:1], visit, min_runs=3)
    assert [(f.threads, f.median_ms) for f in gone.value.results] == [(1, 30)]
    with pytest.raises(edge.DeviceError, match=r"Nobody has opened the page within 0\.3 seconds"):
        serve(artifacts[:1], lambda url: None, patience_seconds=0.3)


def test_where_it_is_served(artifacts, npm, monkeypatch):
    assert browser.address("serve") == ("127.0.0.1", 0) and browser.address("0.0.0.0") == ("0.0.0.0", 0)
    assert browser.address("pc.local:8000") == ("pc.local", 8000)
    for bad in ("serve:x", ":8000", "pc:", "::1"):
        with pytest.raises(ValueError, match=r"serve, HOST or HOST:PORT; received"):
            browser.address(bad)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(edge.DeviceError, match="cannot be served on"):
        browser.serve(artifacts[:1], port=taken.getsockname()[1])
    with pytest.raises(edge.DeviceError, match=r"cannot be served on 127\.0\.0\.1:70000"):
        browser.serve(artifacts[:1], port=70000)
    with pytest.raises(edge.DeviceError, match=r"Nobody would see the address.*on_url=print"):
        edge.benchmark(artifacts[0], device="browser:serve")
    with pytest.raises(ValueError, match="has no accelerator 'npu'"):
        browser.serve(artifacts[:1], accelerators=("npu",))

    called = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(browser, "serve", lambda *a, **k: called.append((a[1:], k["threads"])) or [])
    edge.benchmark(artifacts[:1], device="browser:0.0.0.0:8000", threads=1)
    assert called == [(("0.0.0.0", 8000), (1,))]


def test_what_is_missing_is_named(artifacts, npm, monkeypatch, tmp_path):
    monkeypatch.setenv("CHROME", "/no/such/chrome")
    with pytest.raises(edge.DeviceError, match="CHROME names /no/such/chrome, which is not a program"):
        edge.benchmark(artifacts[0], device="browser")
    monkeypatch.delenv("CHROME")
    monkeypatch.setattr(chromium, "MAC", "/no/such/chrome")
    with monkeypatch.context() as patch, pytest.raises(edge.DeviceError, match="There is no Chromium or Chrome"):
        patch.setenv("PATH", str(tmp_path))
        chromium.chromium()
    monkeypatch.setenv("KERAS_VITS_WEB", str(tmp_path / "empty"))
    command = f"npm install --ignore-scripts --prefix {tmp_path}/empty @litertjs/core@{browser_server.VERSION}"
    with pytest.raises(edge.DeviceError, match=f"LiteRT.js is not in {tmp_path}/empty: {command}$"):
        browser_server.package()
    assert json.loads((ROOT / "examples/web/package.json").read_text())["dependencies"] == {
        browser_server.PACKAGE: browser_server.VERSION
    }


def stand_in(folder, monkeypatch, script):
    """A program that is taken for the browser, and leaves its process number in a file."""
    program = folder / "chrome"
    program.write_text(f"#!/bin/sh\necho $$ > {folder}/pid\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("CHROME", str(program))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (folder / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))


def is_gone(folder, seconds=10):
    """Whether the stand-in ended, and its profile is removed."""
    pid, deadline = int((folder / "pid").read_text()), time.monotonic() + seconds
    while time.monotonic() < deadline:
        status = pathlib.Path(f"/proc/{pid}/stat")
        if (not status.exists() or ") Z" in status.read_text()) and not list((folder / "tmp").glob("keras_vits_*")):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc, which only Linux has")
def test_a_browser_that_crashes_or_hangs_is_named_and_ended(artifacts, npm, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "echo one >&2; echo 'no usable sandbox' >&2; exit 3")
    with pytest.raises(edge.DeviceError, match="The browser ended with code 3: no usable sandbox"):
        edge.benchmark(artifacts[0], device="browser")
    assert is_gone(tmp_path)
    (tmp_path / "chrome").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\necho 'GPU is stuck' >&2\nsleep 60 & wait\n")
    monkeypatch.setattr(browser_server, "SILENCE_SECONDS", 2.5)
    with pytest.raises(
        edge.DeviceError, match=r"not opened the page within 2\.5 seconds\. Its last words: GPU is stuck"
    ):
        edge.benchmark(artifacts[0], device="browser")
    assert is_gone(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc, which only Linux has")
def test_a_browser_ends_with_the_process_that_started_it(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "sleep 60 & wait")
    command = [sys.executable, "-I", "-c", chromium.WATCH, str(tmp_path / "chrome")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    assert list((tmp_path / "tmp").glob("keras_vits_*")) and process.poll() is None
    process.stdin.close()  # as when the process that started it is killed
    assert process.wait(20) == 128 + 9 and is_gone(tmp_path)


# ---------------------------------------------------------------- in Chromium


@pytest.fixture
def real_browser():
    """Skips where the real browser or LiteRT.js is missing."""
    for find, what in (
        (chromium.chromium, "Chromium"),
        (browser_server.package, "@litertjs/core (.ci/run installs it)"),
    ):
        try:
            find()
        except edge.DeviceError as e:
            pytest.skip(f"{what} is not installed: {e}")


def test_files_run_in_chromium_as_they_do_here(real_browser, artifacts, monkeypatch, capfd):
    """But for one, of which we expect something else here."""
    before = threading.active_count()
    errors, ask, self_test = [], browser_server.Page.ask, browser_server.self_test

    def spy(page, **order):
        answer = ask(page, **order)
        errors.extend(getattr(answer, "errors", {}).values())
        return answer

    def other(artifact, runner):
        test = self_test(artifact, runner)
        if artifact is artifacts[0]:
            values = test.named["logits"].values
            values[7, 2] += 1e-3 * np.abs(values).max()
        return test

    monkeypatch.setattr(browser_server.Page, "ask", spy)
    monkeypatch.setattr(browser_server, "self_test", other)
    with pytest.warns(edge.DeviceWarning, match=r"_float32\.tflite on wasm.* was not measured: .* logits differs by"):
        found = edge.benchmark(artifacts, device="browser", accelerators="wasm", **QUICK)
    assert [(f.artifact_path, f.accelerator, f.threads) for f in found] == [
        (artifact.path, "wasm", threads) for artifact in artifacts[1:] for threads in (1, 2)
    ]
    version = json.loads((browser_server.package() / "package.json").read_text())["version"]
    for one in found:
        assert one.device == "browser" and one.runtime == f"LiteRT.js {version}"
        assert 0 < one.median_ms <= one.p90_ms <= one.p99_ms and one.load_ms > 0 and one.runs >= 4
        assert "Chrom" in one.environment["user_agent"] and len(one.round_ms) == len(found[0].round_ms)
    assert len(errors) == 6 and 0 < max(errors[2:])  # compared with the host's, which are not the browser's own
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before
    assert not capfd.readouterr().out


@pytest.mark.filterwarnings("ignore:webgpu:keras_vits.edge.DeviceWarning")
def test_webgpu_gives_the_same_in_chromium(real_browser, artifacts):
    """On a GPU, or on one that Chromium emulates."""
    try:
        found = edge.benchmark(artifacts[0], device="browser", threads=1, accelerators="webgpu", **QUICK)
    except edge.DeviceError as e:
        if "nothing of what was asked for" not in str(e):
            raise
        pytest.skip("this Chromium has no WebGPU adapter, not even an emulated one")
    assert found.accelerator == "webgpu" and found.median_ms > 0
    assert found.environment["gpu"] and found.environment["on_gpu"] == "all of it"
