"""LiteRT.js in a browser: headless Chromium on this machine, or whatever opens the page that is served here.

    browser              the Chromium or Chrome of this machine
    browser:serve        the page on 127.0.0.1, e.g. for a phone on a cable: `adb reverse tcp:PORT tcp:PORT`
    browser:HOST[:PORT]  the page on another address of this machine, 0.0.0.0 for all, for any phone in its network

The page (browser_page/) does one order after another: it posts an answer and gets the next order back. All that it says
is checked before it is believed, and every request without the random token in its address is refused. Several threads
and WebGPU need a secure page, which for a browser is HTTPS or the address 127.0.0.1: in a network there is one thread.
"""

import contextlib
import dataclasses
import datetime
import http.server
import importlib.util
import json
import math
import os
import pathlib
import queue
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings

import numpy as np

from keras_vits._util.progress import progress
from keras_vits.preprocess import Preprocessing

from ..evidence.benchmark import check
from ..records import DeviceError, DeviceWarning, cpu_name
from ..selftest import generated, tolerance
from ..targets import litert
from .host import ROUND_SECONDS, WARMUP_RUNS, Child, rounds

THREADS = (1, 2)
ACCELERATORS = ("wasm", "webgpu")
FORMATS = ("litert",)

PACKAGE = "@litertjs/core"
VERSION = "2.5.3"  # that this release was tested with, as examples/web
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
PAGE = pathlib.Path(__file__).with_name("browser_page")
TYPES = {".html": "text/html", ".js": "text/javascript", ".wasm": "application/wasm"}
SILENCE_SECONDS = 120  # a page that says nothing for so long is gone; the longest a model may take to compile
OPEN_SECONDS = 600  # for somebody to open the page that is served
POST_BYTES = 1 << 24

# Starts a browser with a profile of its own and ends it with its stdin: with the process that wants it, however that
# ends. The browser's own processes are one group.
WATCH = """
import os, signal, subprocess, sys, tempfile, threading
with tempfile.TemporaryDirectory(prefix="keras_vits_", ignore_cleanup_errors=True) as profile:
    browser = subprocess.Popen([*sys.argv[1:], "--user-data-dir=" + profile], stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, start_new_session=True,
                               env={**os.environ, "TMPDIR": profile})  # it leaves folders there when it is killed
    def end():
        if hasattr(os, "killpg"):
            try:
                os.killpg(browser.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        else:
            browser.kill()
    threading.Thread(target=lambda: (sys.stdin.read(), end()), daemon=True).start()
    code = browser.wait()
    end()
sys.exit(code if code >= 0 else 128 - code)
"""


def measure(artifacts, where, *, threads, accelerators, min_runs, min_seconds, warmup_seconds):
    """See `edge.benchmark`; `where` is `None` for the browser of this machine, `"serve"`, or HOST[:PORT]."""
    options = dict(
        threads=threads,
        accelerators=accelerators,
        min_runs=min_runs,
        min_seconds=min_seconds,
        warmup_seconds=warmup_seconds,
    )
    if where is not None:
        if not (sys.stderr.isatty() and importlib.util.find_spec("rich")):
            raise DeviceError(
                "Nobody would see the address of the page: run this on a terminal with rich installed, or call "
                "browser.serve(artifacts, on_url=print)."
            )
        return serve(artifacts, *address(where), **options)
    command = [chromium(), *_flags(accelerators)]
    with _Server(artifacts, "127.0.0.1", 0) as server, _Browser([*command, server.url]) as browser:
        return _measured(server, artifacts, "browser", SILENCE_SECONDS, browser, **options)


def serve(
    artifacts,
    host="127.0.0.1",
    port=0,
    *,
    on_url=None,
    threads=THREADS,
    accelerators=None,
    min_runs=50,
    min_seconds=2.0,
    warmup_seconds=0.5,
    patience_seconds=OPEN_SECONDS,
):
    """Serves the page that measures artifacts, until one browser that opened it has done so.

    The page that was opened last is the one that is measured; one that is closed or loaded again begins anew.

    Args:
        artifacts: LiteRT `Artifact`s.
        host: name or IPv4 address to listen on; `"0.0.0.0"` for all of this machine's. Whoever knows the page's address
            can read the artifacts, nobody else can.
        port: to listen on; 0 takes a free one.
        on_url: called with the address to open, once the page is there; by default it stands before the progress bar.
        threads: tuple of how many to use on the CPU.
        accelerators: tuple of `ACCELERATORS`; by default all that the browser has.
        min_runs, min_seconds, warmup_seconds: as of `edge.benchmark`.
        patience_seconds: how long to wait for somebody to open the page.

    Returns:
        A list of `Latency`, as `edge.benchmark` gives it.

    Raises:
        DeviceError: the address cannot be used; nobody opened the page in time, or it fell silent; nothing could be
            measured. What fails alone, or gives other outputs than on this machine, is a `DeviceWarning`.
        ValueError: an artifact that cannot run there, or is not the file that was written.
    """
    check(artifacts, sys.modules[__name__], "browser", threads, accelerators, min_runs)
    where = f"browser:{'serve' if host == '127.0.0.1' else host}"
    with _Server(artifacts, host, port) as server:
        if on_url:
            on_url(server.url)
        return _measured(
            server,
            artifacts,
            where,
            patience_seconds,
            waiting="Waiting for the page to be opened" if on_url else f"Open {server.url}",
            threads=threads,
            accelerators=accelerators,
            min_runs=min_runs,
            min_seconds=min_seconds,
            warmup_seconds=warmup_seconds,
        )


def address(where):
    """(host, port) to listen on of the text `"serve"`, HOST or HOST:PORT.

    Raises:
        ValueError: it is none of them.
    """
    host, colon, port = ("127.0.0.1" if where == "serve" else where).partition(":")
    if not host or (colon and not port.isdecimal()):
        raise ValueError(f"Behind 'browser:' stands serve, HOST or HOST:PORT; received {where!r}.")
    return host, int(port or 0)


def chromium():
    """Path of Chromium or Chrome: the environment variable CHROME (it may name a script that adds options), or what the
    PATH has.

    Raises:
        DeviceError: there is none.
    """
    named = os.environ.get("CHROME")
    for name in [named] if named else [*NAMES, MAC]:
        if path := shutil.which(name):
            return path
    if named:
        raise DeviceError(f"The environment variable CHROME names {named}, which is not a program: correct it.")
    raise DeviceError(
        "There is no Chromium or Chrome: install one, or set the environment variable CHROME to its path."
    )


def package():
    """Folder of the npm package @litertjs/core, beside whose folder its dependencies lie.

    Raises:
        DeviceError: it is not installed.
    """
    cache = pathlib.Path.home() / ".cache" / "keras_vits" / "web"
    named = os.environ.get("KERAS_VITS_WEB")
    folders = (
        [pathlib.Path(named)] if named else [pathlib.Path(__file__).resolve().parents[2] / ".cache" / "web", cache]
    )
    for folder in folders:
        if (folder / "node_modules" / PACKAGE / "package.json").is_file():
            return folder / "node_modules" / PACKAGE
    raise DeviceError(
        f"LiteRT.js is not in {folders[-1]}: npm install --ignore-scripts --prefix {folders[-1]} {PACKAGE}@{VERSION}"
    )


def _flags(accelerators):
    flags = "--headless --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    flags += " --disable-sync --disable-breakpad --disable-dev-shm-usage"
    flags += " --disable-background-timer-throttling --disable-renderer-backgrounding"
    if getattr(os, "geteuid", lambda: 1)() == 0:
        flags += " --no-sandbox"  # Chromium refuses to start as root otherwise
    flags += " --disable-gpu" if accelerators and "webgpu" not in accelerators else " --enable-unsafe-webgpu"
    return flags.split()


# ---------------------------------------------------------------- what the page is asked for


class _FailedError(Exception):
    """What the page says went wrong with one model."""


class _LeftError(Exception):
    """The page was closed, or another one was opened."""


def _measured(server, artifacts, device, patience_seconds, browser=None, waiting="Starting the browser", **options):
    """A `Latency` of everything, by the first page that stays until the end."""
    while True:
        page = server.opened(patience_seconds, browser, waiting)
        try:
            found = _in_turns(page, artifacts, device, **options)
        except _LeftError:
            continue
        except BaseException as e:
            page.end(f"It could not be measured. {e}")
            raise
        page.end("Done, the result was sent: this page can be closed.", found)
        return found


def _in_turns(page, artifacts, device, *, threads, accelerators, min_runs, min_seconds, warmup_seconds):
    models = [
        _Model(page, number, *combination)
        for number, combination in enumerate(_combinations(page, artifacts, threads, accelerators))
    ]
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    try:
        for model in progress(models, "Loading"):
            model.attempt(model.load)
        for model in progress(models, "Warming up"):
            model.attempt(model.warm_up, warmup_seconds)
        estimate = math.ceil(min_seconds / ROUND_SECONDS)
        estimate = max([estimate, *(math.ceil(min_runs / model.runs) for model in models if not model.failure)])
        for order in progress(rounds(models, min_runs, min_seconds), "Measuring", estimate):
            for i in order:
                models[i].attempt(models[i].measure)
        error = None
    except DeviceError as e:
        error = e
    enough = [model for model in models if not model.failure and model.has_enough(min_runs, min_seconds)]
    found = [model.latency(device=device, started=started) for model in enough]
    if error:
        raise DeviceError(str(error), found)
    if not found:
        why = next((model.failure for model in models if model.failure), "it has nothing of what was asked for.")
        raise DeviceError(f"{device} could run nothing: {why}")
    return found


def _combinations(page, artifacts, threads, accelerators):
    """(artifact, accelerator, threads) of all that can be measured; warns of what was asked for and cannot be."""
    ways = []
    for accelerator in accelerators or ACCELERATORS:
        if accelerator == "wasm":
            ways += [(accelerator, count) for count in threads if count == 1 or page.about["isolated"]]
        elif page.about["gpu"] and (accelerators or not page.about["software_gpu"]):
            ways.append((accelerator, 1))
            if page.about["software_gpu"]:
                _warn(f"webgpu is the CPU here, through {page.about['gpu']}: its times say nothing of a GPU.")
        elif accelerators:
            _warn(
                "webgpu cannot be measured: the browser has no WebGPU adapter, or shows none to a page without HTTPS."
            )
    if not page.about["isolated"] and "wasm" in (accelerators or ACCELERATORS) and max(threads) > 1:
        _warn(
            "wasm can be measured with one thread only: a browser gives several to a page by HTTPS or from 127.0.0.1 "
            "(a phone on a cable: adb reverse tcp:PORT tcp:PORT)."
        )
    return [(artifact, *way) for artifact in artifacts for way in ways]


def _warn(message):
    warnings.warn(message, DeviceWarning, stacklevel=2)


class _Model(Child):
    """An artifact in a frame of the page.

    Attributes:
        runs: that make a turn.
        failure: why it is measured no more, or `None`.
    """

    def __init__(self, page, number, artifact, accelerator, threads):
        super().__init__(artifact, threads, accelerator)
        self.page, self.number, self.failure = page, number, None

    def attempt(self, step, *arguments):
        """Does a step, unless one failed before; if this one fails, warns and gives the model up."""
        if self.failure:
            return
        try:
            step(*arguments)
        except _FailedError as e:
            threads = f", {self.threads} threads" if self.threads > 1 else ""
            self.failure = f"{self.artifact.path.name} on {self.accelerator}{threads} was not measured: {e}"
            _warn(self.failure)
            with contextlib.suppress(_FailedError):
                self._ask(task="drop")

    def _ask(self, **order):
        return self.page.ask(model=self.number, **order)

    def load(self):
        """Loads the file and compares its outputs on the self-test's images with this machine's."""
        files = self.page.server.tests[self.artifact.path]
        order = dict(name=self.artifact.path.name, file=files.file, accelerator=self.accelerator, threads=self.threads)
        loaded = self._ask(task="load", **order)
        spec = self.artifact.input
        given = dict(name=spec.name, shape=spec.stored_shape, dtype=spec.dtype)
        expected = [dict(name=name, file=file) for name, file in files.outputs.items()]
        errors = self._ask(task="check", input=given, images=files.images, expected=expected)["errors"]
        compared = [name for name in files.outputs if name in errors]  # it may have signatures with different outputs
        if not compared:
            raise _FailedError(f"it gives none of the outputs {', '.join(files.outputs)}.")
        for name in compared:
            error, allowed = errors[name], files.tolerances[name]["cpu" if self.accelerator == "wasm" else "gpu"]
            if error is None or error > allowed:
                error = "NaN" if error is None else f"{error:.2g}"
                raise _FailedError(
                    f"its output {name} differs by {error} from this machine's, {allowed:.2g} is allowed."
                )
        self.loads.append(dict(load_ms=loaded["load_ms"], runtime=self.page.server.runtime))
        self.whole = loaded["whole"]

    def warm_up(self, seconds):
        ms = self._ask(task="run", runs=WARMUP_RUNS, seconds=seconds)["ms"]
        mean = np.mean(ms[1:] or ms)  # the first run may compile, for seconds
        self.runs = max(1, round(ROUND_SECONDS * 1e3 / max(mean, 0.01)))

    def measure(self):
        self.rounds.append(np.array(self._ask(task="run", runs=self.runs, seconds=0)["ms"]))

    def has_enough(self, min_runs, min_seconds):
        return bool(self.failure) or super().has_enough(min_runs, min_seconds)

    def latency(self, **common):
        about = self.page.about
        environment = {"browser": about["browser"], "user_agent": about["agent"]}
        if self.accelerator == "webgpu":
            environment |= {"gpu": about["gpu"], "on_gpu": "all of it" if self.whole else "a part of it"}
        local = cpu_name() if self.page.browser else f"{about['device'] or about['platform']}, {about['cores']} cores"
        return dataclasses.replace(super().latency(**common), cpu=local, environment=environment)


# ---------------------------------------------------------------- the server and the browser


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SelfTest:
    """Names of the served files of one artifact, and `"cpu"` and `"gpu"` -> the error allowed, of each output."""

    file: str
    images: str
    outputs: dict
    tolerances: dict


def _self_test(artifact):
    """Images (N,...) as the file takes them, and its float outputs on this machine by name, (N,...) too."""
    spec, pixels = artifact.input, generated(artifact.input.shape[1:])
    batch = spec.shape[0]
    pixels = pixels[np.arange(-(-len(pixels) // batch) * batch) % len(pixels)]  # whole batches
    if spec.dtype == "float32" and artifact.preprocessing:
        pixels = Preprocessing(**artifact.preprocessing).normalize(pixels)
    elif spec.dtype == "float32":
        pixels = (pixels / 127.5 - 1).astype(np.float32)
    images, runner = spec.as_stored(pixels), litert.load(artifact)
    found = [runner.run(images[i : i + batch]) for i in range(0, len(images), batch)]
    outputs = dict(zip(artifact.output_names, map(np.concatenate, zip(*found, strict=True)), strict=True))
    return images, {name: values for name, values in outputs.items() if values.dtype == np.float32}


class _Page:
    """A browser's page: `ask` gives it an order and returns its answer.

    Attributes:
        about: what it says of its browser, see `ABOUT`.
    """

    def __init__(self, server, session, about):
        self.server, self.session, self.about = server, session, about
        self.browser, self.expecting = None, None
        self.orders, self.answers = queue.Queue(), queue.Queue()

    def ask(self, **order):
        self.expecting = order["task"]
        self.orders.put(order)
        deadline = time.monotonic() + SILENCE_SECONDS
        while True:
            with contextlib.suppress(queue.Empty):
                answer = self.answers.get(timeout=0.2)
                break
            if self.browser:
                self.browser.check()
            if time.monotonic() > deadline:
                last = f" Its last words: {self.browser.last_words()}" if self.browser else ""
                raise DeviceError(f"The browser has not answered for {SILENCE_SECONDS:g} seconds.{last}")
        if answer is None:
            raise _LeftError
        if "error" in answer:
            raise _FailedError(answer["error"])
        return answer

    def end(self, message, found=()):
        """Tells it that there is nothing more to do, and what was found."""
        lines = [f"{r.artifact_path.name}, {r.accelerator}, {r.threads} threads: {r.median_ms:.2f} ms" for r in found]
        self.orders.put({"end": message, "found": lines})


# What a page posts to `open`, and in answer to each task.
ABOUT = {"agent": str, "browser": str, "device": str, "platform": str, "cores": int}
ABOUT |= {"isolated": bool, "gpu": str, "software_gpu": bool}
ANSWERS = {
    "load": lambda a: set(a) == {"load_ms", "whole"} and _is_time(a["load_ms"]) and type(a["whole"]) is bool,
    "check": lambda a: (
        set(a) == {"errors"}
        and isinstance(a["errors"], dict)
        and all(e is None or _is_time(e) for e in a["errors"].values())
    ),
    "run": lambda a: set(a) == {"ms"} and isinstance(a["ms"], list) and a["ms"] and all(map(_is_time, a["ms"])),
    "drop": lambda a: not a,
}


def _is_time(value):
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _plain(fields):
    """The same with all texts on one line and of a length to show."""
    clean = lambda v: "".join(c if c.isprintable() else " " for c in v)[:300].strip() if isinstance(v, str) else v
    return {key: clean(value) for key, value in fields.items()}


class _Server(http.server.ThreadingHTTPServer):
    """Serves the page, LiteRT.js, the artifacts and their self-tests until the `with` block ends.

    Attributes:
        url: of the page, with the token without which everything is refused.
        runtime: name and version of what the page runs.
        tests: path of an artifact -> `_SelfTest`.
    """

    def __init__(self, artifacts, host, port):
        npm = package()
        self.runtime = f"LiteRT.js {json.loads((npm / 'package.json').read_text(encoding='utf-8'))['version']}"
        self.files = {"": PAGE / "index.html"} | {file.name: file for file in PAGE.iterdir()}
        for name, folder in (("core", npm), ("wasm-utils", npm.with_name("wasm-utils"))):
            for file in (*folder.glob("dist/*.js"), *folder.glob("wasm/*")):
                self.files[f"{name}/{file.relative_to(folder).as_posix()}"] = file
        self.tests = {}
        for number, artifact in enumerate(progress(artifacts, "Computing what is right")):
            self.tests[artifact.path] = self._test(number, artifact)
        self.token = secrets.token_hex(8)
        self.sessions, self.page, self.arrivals, self.lock = 0, None, queue.Queue(), threading.Lock()
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as e:
            raise DeviceError(
                f"The page cannot be served on {host}:{port} ({e}): give an address of this machine and a free port."
            ) from None
        self.url = f"http://{_reachable(host)}:{self.server_port}/{self.token}/"

    def _test(self, number, artifact):
        images, outputs = _self_test(artifact)
        files = {f"{number}.tflite": artifact.path.absolute(), f"{number}.images": images.tobytes()}
        names = {name: f"{number}.{i}.output" for i, name in enumerate(outputs)}
        self.files |= files | {names[name]: values.tobytes() for name, values in outputs.items()}
        file, images = files
        tolerances = {name: tolerance(artifact, values) for name, values in outputs.items()}
        return _SelfTest(file=file, images=images, outputs=names, tolerances=tolerances)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        with self.lock:
            if self.page:
                self.page.end("The measurement has ended.")
        self.shutdown()
        self.server_close()

    def handle_error(self, request, address):
        """A browser that hangs up is none."""

    def join(self, about):
        """A new `_Page`, to which the orders go from now on."""
        with self.lock:
            if self.page:
                self.page.answers.put(None)
                self.page.end("Another page was opened, which goes on with it.")
            self.sessions += 1
            self.page = _Page(self, self.sessions, about)
            self.arrivals.put(self.page)
            return self.page

    def opened(self, seconds, browser, waiting):
        """The page that was opened last, when there is one."""
        deadline = time.monotonic() + seconds

        def until_there_is_one():
            while self.arrivals.empty():
                if browser:
                    browser.check()
                if time.monotonic() > deadline:
                    last = f" Its last words: {browser.last_words()}" if browser else ""
                    who = "The browser has not" if browser else "Nobody has"
                    raise DeviceError(f"{who} opened the page within {seconds:g} seconds.{last}")
                time.sleep(0.05)
                yield

        for _ in progress(until_there_is_one(), waiting):
            pass
        while not self.arrivals.empty():
            page = self.arrivals.get()
        page.browser = browser
        return page


def _reachable(host):
    """The address at which others find this machine, if it listens on all of its own."""
    if host not in ("", "0.0.0.0"):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, contextlib.suppress(OSError):
        s.connect(("192.0.2.1", 9))  # sends nothing: it only asks which of the addresses would be used
        return s.getsockname()[0]
    return socket.gethostname()


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = SILENCE_SECONDS  # of a connection on which nothing comes

    def path_behind_the_token(self):
        """What is asked for, or `None`, answered, to somebody without the token."""
        parts = self.path.partition("?")[0].split("/", 2)  # "", the token, the rest
        if len(parts) == 3 and secrets.compare_digest(parts[1].encode(), self.server.token.encode()):
            return parts[2]
        self.reply(403, b"Open the whole address that was shown, with the slash at its end: this one is not it.")

    def reply(self, status, content, kind="text/plain"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        size = content.stat().st_size if isinstance(content, pathlib.Path) else len(content)
        self.send_header("Content-Length", str(size))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")  # these three give the page threads
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        if isinstance(content, pathlib.Path):
            with open(content, "rb") as f:
                shutil.copyfileobj(f, self.wfile)
        else:
            self.wfile.write(content)

    def do_GET(self):
        name = self.path_behind_the_token()
        if name is None:
            return
        content = self.server.files.get(name)
        if content is None:
            return self.reply(404, b"There is no such file.")
        suffix = content.suffix if isinstance(content, pathlib.Path) else ""
        self.reply(200, content, TYPES.get(suffix, "application/octet-stream"))

    def do_POST(self):
        name = self.path_behind_the_token()
        if name is None:
            return
        try:
            size = int(self.headers["Content-Length"])
            posted = json.loads(self.rfile.read(size)) if 0 <= size <= POST_BYTES else None
            page = self.posted(name, posted)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            return self.reply(400, b"This is not what was asked for.")
        if page is None:
            return self.reply(409, b"Another page was opened, which goes on with it.")
        if name == "left":
            return self.reply(204, b"")
        self.reply(200, json.dumps({"session": page.session, **page.orders.get()}).encode(), "application/json")

    def posted(self, name, posted):
        """The page that posted, its answer delivered; `None` if another one has taken over."""
        server = self.server
        if name == "open":
            if set(posted) != set(ABOUT) or any(type(posted[key]) is not kind for key, kind in ABOUT.items()):
                raise ValueError
            return server.join(_plain(posted))
        with server.lock:
            page = server.page
            if name not in ("answer", "left") or type(posted["session"]) is not int:
                raise ValueError
            if page is None or posted["session"] != page.session:
                return None
            if name == "left":
                page.answers.put(None)
                return page
            answer = posted["answer"]
            failed = isinstance(answer, dict) and set(answer) == {"error"} and isinstance(answer["error"], str)
            if page.expecting is None or not (failed or ANSWERS[page.expecting](answer)):
                raise ValueError
            page.expecting = None
            page.answers.put(_plain(answer))
            return page

    def log_message(self, *_):
        """Nothing is printed."""


class _Browser:
    """A process that ends with the `with` block, and with this process however that ends."""

    def __init__(self, command):
        self.command = command

    def __enter__(self):
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", WATCH, *self.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the browser
        )
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def check(self):
        """Raises `DeviceError` if it has ended."""
        if (code := self.process.poll()) is not None:
            raise DeviceError(f"The browser ended with code {code}: {self.last_words()}")

    def last_words(self):
        """The last line that it wrote to stderr."""
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().decode(errors="replace").split("\n")]
        return next(filter(None, reversed(lines)), "it left no message")
