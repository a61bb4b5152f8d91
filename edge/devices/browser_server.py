"""The server of the page that measures in a browser, and what passes between the two.

The page (browser_page/) does one order after another: it posts an answer and gets the next order back. All that it says
is checked before it is used, and every request without the random token in its address is refused. Whoever has no token
is not waited for: there are few connections for strangers, and little time. A request that names another host is
refused, too: a page of a foreign site whose name server gives this machine's address (DNS rebinding) could read the
answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import io
import json
import math
import os
import pathlib
import queue
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

from keras_vits._util import jsons
from keras_vits._util.progress import progress
from keras_vits._util.terminal import counted

from ..artifact import Artifact
from ..records import DeviceError, Latency
from ..selftest import self_test
from ..targets._protocol import target
from .chromium import Browser
from .turns import FailedError

PACKAGE = "@litertjs/core"
VERSION = "2.5.3"  # that this release was tested with, as examples/web
PAGE = pathlib.Path(__file__).with_name("browser_page")
TYPES = {".html": "text/html", ".js": "text/javascript", ".wasm": "application/wasm"}
SILENCE_SECONDS = 120.0  # a page that says nothing for so long is gone; the longest a model may take to compile
POST_BYTES = 1 << 24
STRANGERS = 32  # connections that have not shown the token yet; the oldest makes room for a new one
HEAD_SECONDS = 10.0  # for a request's first line and headers, all together
BODY_SECONDS = 60.0  # for what a page posts, some kilobytes
OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")  # that no foreign name server can give to a page
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\s:,@\[\]]+)(:(?P<port>[0-9]{1,5}))?")


class LeftError(Exception):
    """The page was closed, or another one was opened."""


def package() -> pathlib.Path:
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


# ---------------------------------------------------------------- what a page says


class _Said(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A page's words: these fields, of these types, and no others."""


class About(_Said, frozen=True):
    """What a page posts to `open`: the browser's name for itself, and what it has.

    Attributes:
        agent: its user agent.
        browser: name and version, or "".
        device: name of the phone, or "".
        platform: of its system.
        cores: of its processor.
        isolated: whether the page may have several threads.
        gpu: what it says of its GPU, "" where it has no WebGPU.
        software_gpu: whether the CPU does the GPU's work.
    """

    agent: str
    browser: str
    device: str
    platform: str
    cores: int
    isolated: bool
    gpu: str
    software_gpu: bool


Amount = Annotated[float, msgspec.Meta(ge=0)]


class Loaded(_Said, frozen=True):
    """The answer to `load`; whole: whether the accelerator runs all of the model."""

    load_ms: Amount
    whole: bool


class Checked(_Said, frozen=True):
    """The answer to `check`: output name -> the largest difference, `None` for NaN."""

    errors: dict[str, Amount | None]


class Ran(_Said, frozen=True):
    """The answer to `run`."""

    ms: Annotated[list[Amount], msgspec.Meta(min_length=1)]


class Dropped(_Said, frozen=True):
    """The answer to `drop`."""


class Failed(_Said, frozen=True):
    """The answer to what went wrong."""

    error: str


ANSWERS: dict[str, type[_Said]] = {"load": Loaded, "check": Checked, "run": Ran, "drop": Dropped}


class _Package(msgspec.Struct, frozen=True):
    """What is read of an npm package's package.json."""

    version: str


class _Posted(msgspec.Struct, frozen=True):
    session: int
    answer: msgspec.Raw = msgspec.Raw(b"")


def _plain(text: str) -> str:
    """A text on one line and of a length to show."""
    return "".join(c if c.isprintable() else " " for c in text)[:300].strip()


def _answered(task: str, answer: bytes) -> _Said:
    """An answer to a task; `msgspec.ValidationError` if it is none."""
    with contextlib.suppress(msgspec.ValidationError):
        return Failed(error=_plain(msgspec.json.decode(answer, type=Failed).error))
    said = msgspec.json.decode(answer, type=ANSWERS[task])
    if isinstance(said, Ran) and not all(map(math.isfinite, said.ms)):
        raise msgspec.ValidationError("not finite")
    return said


class Page:
    """A browser's page: `ask` gives it an order and returns its answer.

    Attributes:
        about: what it says of its browser.
        browser: the process it lives in, if that is one of ours.
    """

    def __init__(self, server: Server, session: int, about: About):
        self.server, self.session, self.about = server, session, about
        self.browser: Browser | None = None
        self.expecting: str | None = None
        self.orders: queue.Queue[dict[str, Any]] = queue.Queue()
        self.answers: queue.Queue[_Said | None] = queue.Queue()

    def ask(self, **order: Any) -> Any:
        """The answer to an order, one of `ANSWERS` by its task.

        Raises:
            FailedError: the page could not do it.
            LeftError: it was closed, or another one was opened.
            DeviceError: it does not answer.
        """
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
            raise LeftError
        if isinstance(answer, Failed):
            raise FailedError(answer.error)
        return answer

    def end(self, message: str, found: Iterable[Latency] = ()) -> None:
        """Tells it that there is nothing more to do, and what was found."""
        lines = [
            f"{r.artifact_path.name}, {r.accelerator}, {counted(r.threads or 1, 'thread')}: {r.median_ms:.2f} ms"
            for r in found
        ]
        self.orders.put({"end": message, "found": lines})


# ---------------------------------------------------------------- the server


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """Names of the served files of one artifact.

    Attributes:
        file: of the artifact.
        images: of its self-test.
        outputs: output name -> file of what is expected.
        tolerances: output name -> `"cpu"` and `"gpu"` -> the error allowed.
    """

    file: str
    images: str
    outputs: Mapping[str, str]
    tolerances: Mapping[str, Mapping[str, float]]


class Server(http.server.ThreadingHTTPServer):
    """Serves the page, LiteRT.js, the artifacts and their self-tests until the `with` block ends.

    Attributes:
        url: of the page, with the token without which everything is refused.
        hosts: names and addresses that a request may be for, beside `OWN_NAMES`.
        runtime: name and version of what the page runs.
        tests: path of an artifact -> what is served of it.
    """

    request_queue_size = 2 * STRANGERS

    def __init__(self, artifacts: Sequence[Artifact], host: str, port: int):
        npm = package()
        self.runtime = f"LiteRT.js {msgspec.json.decode((npm / 'package.json').read_bytes(), type=_Package).version}"
        self.files: dict[str, pathlib.Path | bytes] = {"": PAGE / "index.html"}
        self.files |= {file.name: file for file in PAGE.iterdir()}
        for name, folder in (("core", npm), ("wasm-utils", npm.with_name("wasm-utils"))):
            for file in (*folder.glob("dist/*.js"), *folder.glob("wasm/*")):
                self.files[f"{name}/{file.relative_to(folder).as_posix()}"] = file
        self.tests = {}
        for number, artifact in enumerate(progress(artifacts, "Computing what is right")):
            self.tests[artifact.path] = self._test(number, artifact)
        self.token = secrets.token_hex(8)
        self.sessions = 0
        self.page: Page | None = None
        self.arrivals: queue.Queue[Page] = queue.Queue()
        self.lock = threading.Lock()
        self.strangers: dict[socket.socket, None] = {}  # in the order in which they came
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as e:
            raise DeviceError(
                f"The page cannot be served on {host}:{port} ({e}): give an address of this machine and a free port."
            ) from None
        reachable = _reachable(host)
        self.hosts = {host.lower(), reachable.lower()}
        self.url = f"http://{reachable}:{self.server_port}/{self.token}/"

    def _test(self, number: int, artifact: Artifact) -> Served:
        test = self_test(artifact, target(artifact.format).load(artifact))
        file, images = f"{number}.tflite", f"{number}.images"
        names = {output.name: f"{number}.{i}.output" for i, output in enumerate(test.outputs)}
        self.files |= {file: artifact.path.absolute(), images: np.stack(test.batches).tobytes()}
        self.files |= {names[output.name]: output.values.tobytes() for output in test.outputs}
        tolerances = {output.name: output.tolerance for output in test.outputs}
        return Served(file=file, images=images, outputs=names, tolerances=tolerances)

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            if self.page:
                self.page.end("The measurement has ended.")
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread for a connection. Where there are too many strangers, the oldest is hung up on."""
        with self.lock:
            self.strangers[request] = None
            surplus = list(self.strangers)[:-STRANGERS]
            for one in surplus:
                del self.strangers[one]
        for one in surplus:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # its thread ends with it
        super().process_request(request, client_address)

    def knows(self, request: socket.socket) -> None:
        """This connection is no stranger's: it has shown the token, or is at its end."""
        with self.lock:
            self.strangers.pop(request, None)

    def shutdown_request(self, request: Any) -> None:
        self.knows(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closes its connection is no error."""

    def join(self, about: About) -> Page:
        """A new `Page`, to which the orders go from now on."""
        with self.lock:
            if self.page:
                self.page.answers.put(None)
                self.page.end("Another page was opened, which goes on with it.")
            self.sessions += 1
            self.page = Page(self, self.sessions, about)
            self.arrivals.put(self.page)
            return self.page

    def opened(self, seconds: float, browser: Browser | None, waiting: str) -> Page:
        """The page that was opened last, when there is one.

        Raises:
            DeviceError: there is none within so many seconds.
        """
        deadline = time.monotonic() + seconds

        def until_there_is_one() -> Iterator[None]:
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
        page = self.arrivals.get()
        while not self.arrivals.empty():
            page = self.arrivals.get()
        page.browser = browser
        return page


def _reachable(host: str) -> str:
    """The address at which others find this machine, if it listens on all of its own."""
    if host not in ("", "0.0.0.0"):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, contextlib.suppress(OSError):
        s.connect(("192.0.2.1", 9))  # sends nothing: it only asks which of the addresses would be used
        return s.getsockname()[0]
    return socket.gethostname()


class _Incoming(io.RawIOBase):
    """What a connection brings until a deadline, however slowly it comes."""

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection = connection
        self.allow(seconds)

    def allow(self, seconds: float) -> None:
        """Sets the deadline, from now on."""
        self.deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = SILENCE_SECONDS  # of a connection that takes nothing
    server: Server

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.incoming = _Incoming(self.connection, HEAD_SECONDS)
        self.rfile = io.BufferedReader(self.incoming)

    def is_for_us(self) -> bool:
        """Whether the request names this server: by a name of this machine, or by the address where it arrived."""
        named = HOST.fullmatch(",".join(self.headers.get_all("Host", ())).lower())
        if not named:
            return False
        if named["name"] in OWN_NAMES:
            return True  # at any port: one of another machine may lead here
        ours = {*self.server.hosts, self.connection.getsockname()[0]}
        return named["name"] in ours and int(named["port"] or 80) == self.server.server_port

    def path_behind_the_token(self) -> str | None:
        """What is asked for, or `None`, answered, to somebody without the token or for another host."""
        if not self.is_for_us():
            self.reply(403, b"This is not the address that was shown.")
            return None
        parts = self.path.partition("?")[0].split("/", 2)  # "", the token, the rest
        if len(parts) == 3 and secrets.compare_digest(parts[1].encode(), self.server.token.encode()):
            self.server.knows(self.connection)
            self.incoming.allow(BODY_SECONDS)
            return parts[2]
        self.reply(403, b"Open the whole address that was shown, with the slash at its end: this one is not it.")
        return None

    def reply(self, status: int, content: bytes | pathlib.Path, kind: str = "text/plain") -> None:
        self.connection.settimeout(self.timeout)
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

    def do_GET(self) -> None:
        name = self.path_behind_the_token()
        if name is None:
            return
        content = self.server.files.get(name)
        if content is None:
            return self.reply(404, b"There is no such file.")
        suffix = content.suffix if isinstance(content, pathlib.Path) else ""
        self.reply(200, content, TYPES.get(suffix, "application/octet-stream"))

    def do_POST(self) -> None:
        name = self.path_behind_the_token()
        if name is None:
            return
        try:
            page = self.posted(name, self.body())
        except (ValueError, *jsons.ERRORS):
            return self.reply(400, b"This is not what was asked for.")
        if page is None:
            return self.reply(409, b"Another page was opened, which goes on with it.")
        if name == "left":
            return self.reply(204, b"")
        self.reply(200, json.dumps({"session": page.session, **page.orders.get()}).encode(), "application/json")

    def body(self) -> bytes:
        """What was posted.

        Raises:
            ValueError: it does not say its length once and in digits, or is too long.
        """
        told = self.headers.get_all("Content-Length", ())
        length = told[0] if len(told) == 1 else ""
        if not (length.isascii() and length.isdigit()) or len(length) > 9 or int(length) > POST_BYTES:
            raise ValueError
        return self.rfile.read(int(length))

    def posted(self, name: str, content: bytes) -> Page | None:
        """The page that posted, its answer delivered; `None` if another one has taken over.

        Raises:
            ValueError, msgspec.MsgspecError: it is not what was asked for.
        """
        server = self.server
        if name == "open":
            about = msgspec.json.decode(content, type=About)
            texts = {key: _plain(value) for key, value in msgspec.structs.asdict(about).items() if type(value) is str}
            return server.join(msgspec.structs.replace(about, **texts))
        with server.lock:
            page = server.page
            if name not in ("answer", "left"):
                raise ValueError
            posted = msgspec.json.decode(content, type=_Posted)
            if page is None or posted.session != page.session:
                return None
            if name == "left":
                page.answers.put(None)
                return page
            if page.expecting is None:
                raise ValueError
            answer = _answered(page.expecting, bytes(posted.answer))
            page.expecting = None
            page.answers.put(answer)
            return page

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""
