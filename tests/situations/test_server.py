"""The server of the page that measures in a browser, met by strangers: floods, slow talkers, foreign host names."""

import contextlib
import json
import socket
import threading
import time

import pytest

from keras_vits.edge.devices import browser_server

pytestmark = pytest.mark.once

ABOUT = {"agent": "Phone/1.0", "browser": "", "device": "", "platform": "Linux", "cores": 8, "isolated": True}
ABOUT |= {"gpu": "", "software_gpu": False}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server without artifacts, and a folder that looks as if LiteRT.js were installed in it."""
    package = tmp_path / "npm" / "node_modules" / "@litertjs" / "core"
    package.mkdir(parents=True)
    (package / "package.json").write_text('{"version": "9.9.9"}')
    monkeypatch.setenv("KERAS_VITS_WEB", str(tmp_path / "npm"))
    with browser_server.Server([], "127.0.0.1", 0) as server:
        yield server


def connect(server):
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=10)


def request(server, path="", method="GET", host="127.0.0.1", headers=(), body=b"", token=True):
    """A request as bytes; `host` may be a list of several."""
    hosts = [host] if isinstance(host, str) else host
    lines = [f"{method} /{server.token}/{path} HTTP/1.1" if token else f"{method} /{path} HTTP/1.1"]
    lines += [f"Host: {name}" for name in hosts]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def answer(connection):
    """All that comes until the connection is closed."""
    content = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            content += part
    return content


def ask(server, *arguments, **options):
    """(status, body) of a request."""
    with connect(server) as connection:
        connection.sendall(request(server, *arguments, **options))
        head, _, body = answer(connection).partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def seconds_until_closed(connection, drip):
    """How long a connection lives on which a byte comes every tenth of a second."""
    started = time.monotonic()
    connection.settimeout(0.1)
    while time.monotonic() - started < 8:
        try:
            connection.sendall(drip)
            if not connection.recv(1 << 16):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - started


def test_silent_connections_take_no_more_than_their_room_and_the_page_is_served(server):
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        for _ in range(4 * browser_server.STRANGERS):
            stack.enter_context(connect(server))
        for _ in range(3):
            status, body = ask(server)
            assert status == 200 and b"page.js" in body
        deadline = time.monotonic() + 5
        while threading.active_count() - before > browser_server.STRANGERS + 1 and time.monotonic() < deadline:
            time.sleep(0.05)  # the threads of those that were hung up on end
        assert threading.active_count() - before <= browser_server.STRANGERS + 1
        assert len(server.strangers) <= browser_server.STRANGERS
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before and not server.strangers


def test_a_page_at_work_is_not_hung_up_on_by_a_flood(server):
    about = json.dumps(ABOUT).encode()
    with connect(server) as page, contextlib.ExitStack() as stack:
        page.sendall(request(server, "open", "POST", headers=[f"Content-Length: {len(about)}"], body=about))
        opened = server.opened(5, None, "Waiting")
        for _ in range(2 * browser_server.STRANGERS):
            stack.enter_context(connect(server))
        threading.Timer(0.2, opened.end, ["Done."]).start()
        assert b"Done." in answer(page)


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nX-Slow: "], ids=["first line", "header"])
def test_slow_headers_are_not_waited_for(server, monkeypatch, begun):
    monkeypatch.setattr(browser_server, "HEAD_SECONDS", 0.5)
    with connect(server) as slow:
        slow.sendall(begun)
        assert 0.3 < seconds_until_closed(slow, b"a") < 3


def test_a_slow_body_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(browser_server, "BODY_SECONDS", 0.5)
    with connect(server) as slow:
        slow.sendall(request(server, "open", "POST", headers=["Content-Length: 1000"]))
        assert 0.3 < seconds_until_closed(slow, b" ") < 3
    assert server.page is None


@pytest.mark.parametrize("length", ["99999999999999999999", "16777217", "-1", "+5", "1_0", " ", "٣", "5, 5"])
def test_a_body_of_no_sensible_length_is_refused_at_once(server, length):
    with connect(server) as connection:
        connection.sendall(request(server, "open", "POST", headers=[f"Content-Length: {length}"]))
        assert answer(connection).split()[1] == b"400"


@pytest.mark.parametrize("headers", [["Transfer-Encoding: chunked"], ["Content-Length: 2", "Content-Length: 2"], []])
def test_a_body_must_tell_its_length_once(server, headers):
    assert ask(server, "open", "POST", headers=headers)[0] == 400


def test_who_has_no_token_posts_nothing(server):
    assert ask(server, "open", "POST", headers=["Content-Length: 1000000"], token=False)[0] == 403
    assert server.page is None


FOREIGN = ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "127.0.0.1@evil.example", "",
           "localhost.evil.example", "[::1", "127.0.0.1:port", "127.0.0.1:1:1", "127.0.0.2:{port}"]  # fmt: skip


@pytest.mark.parametrize("host", [*FOREIGN, [], ["127.0.0.1", "evil.example"], ["localhost", "localhost"]])
def test_a_request_for_another_host_is_refused_even_with_the_token(server, host):
    named = [name.format(port=server.server_port) for name in ([host] if isinstance(host, str) else host)]
    about = json.dumps(ABOUT).encode()
    for method, path in (("GET", ""), ("POST", "open")):
        status, body = ask(server, path, method, named, [f"Content-Length: {len(about)}"], about)
        assert status == 403 and b"not the address that was shown" in body
    assert server.page is None


@pytest.mark.parametrize(
    "host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:9999", "localhost", "[::1]:{port}", "pc.local:{port}"]
)
def test_a_request_for_this_machine_is_answered(server, host):
    server.hosts.add("pc.local")  # as where it is served on a name
    assert ask(server, host=host.format(port=server.server_port))[0] == 200
    assert ask(server, host="pc.local:1")[0] == 403


def test_the_shown_address_and_the_one_that_is_reached_are_answered(tmp_path, monkeypatch, server):
    monkeypatch.setattr(browser_server, "_reachable", lambda host: "192.0.2.7")
    with browser_server.Server([], "0.0.0.0", 0) as everywhere:
        assert everywhere.url.startswith("http://192.0.2.7:")
        for host in ("192.0.2.7", "127.0.0.1"):
            assert ask(everywhere, host=f"{host}:{everywhere.server_port}")[0] == 200
        assert ask(everywhere, host=f"192.0.2.8:{everywhere.server_port}")[0] == 403
