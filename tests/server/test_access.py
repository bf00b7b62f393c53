"""Keys, cookies, names and origins; and what visitors of bad will can hold of the HTTP side, over real sockets."""

import http.client
import http.cookies
import json
import logging
import os
import socket
import time
from contextlib import ExitStack, suppress

import pytest
from api_case import ALICE, BOB, KEYS, Running, until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from configs.errors import UserError
from server.access import COOKIE, VARIABLE, AccessPolicy, Keys, address, check_access, read_keys
from server.errors import ApiError

HEAD = "POST /v1/videos HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Running(tmp_path_factory.mktemp("jobs")) as running:
        yield running


def write(path, text: str, mode: int = 0o600) -> str:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return str(path)


def test_keys_come_from_a_file_and_the_environment_which_forgets_them(tmp_path):
    environ = {VARIABLE: f"{BOB}, carol {'c' * 20}"}
    as_windows_writes = f"\ufeffalice {ALICE}\r\n# of the team\n\n"
    keys = read_keys(write(tmp_path / "keys", as_windows_writes), environ)
    assert keys.owner(ALICE) == "alice" and keys.owner("c" * 20) == "carol" and not environ
    assert keys.owner(BOB).startswith("key-") and BOB not in keys.owner(BOB)
    assert keys.owner(ALICE[:-1]) is keys.owner("") is keys.owner("\udcff\u00e9") is None
    assert not read_keys(None, {})


@pytest.mark.parametrize(
    "text, mode, said",
    [
        (f"alice {ALICE}", 0o644, "chmod 600"), (f"alice {ALICE}", 0o640, "chmod 600"), ("", 0o600, "holds no key"),
        ("short", 0o600, "16 to 200"), (f"alice {ALICE} {BOB}", 0o600, "16 to 200"),
        (f"alice {ALICE}\nalice {BOB}", 0o600, "there already"), (f"a {ALICE}\nb {ALICE}", 0o600, "there already"),
        ("\u00fc" * 20, 0o600, "16 to 200"), (f"../x/ {ALICE}", 0o600, "16 to 200"),
    ],
)  # fmt: skip
def test_a_file_of_keys_that_cannot_be_is_a_sentence_without_keys(tmp_path, text, mode, said):
    with pytest.raises(UserError, match=said) as refused:
        read_keys(write(tmp_path / "keys", text, mode), {})
    assert ALICE not in str(refused.value) and BOB not in str(refused.value)


def test_other_hosts_need_keys():
    for host, origins in (("0.0.0.0", []), ("::", []), ("example.org", []), ("127.0.0.1", ["https://a.example"])):
        with pytest.raises(UserError, match="--keys_file"):
            check_access(host, Keys({}), origins)
        check_access(host, KEYS, origins)
    for origin in ("*", "https://a.example/page", "a.example"):
        with pytest.raises(UserError, match="no origin"):
            check_access("127.0.0.1", KEYS, [origin])
    check_access("::1", Keys({}))
    assert address("::", 80) == "http://localhost:80/" and address("::1", 80) == "http://[::1]:80/"


def test_a_cookie_is_signed_expires_and_ends_with_its_key():
    cookie = KEYS.cookie("alice")
    assert KEYS.cookie_owner(cookie) == "alice" and ALICE not in cookie
    assert KEYS.cookie_owner(cookie.replace("alice", "bob")) is None
    assert KEYS.cookie_owner(KEYS.cookie("alice", now=time.time() - 13 * 3600)) is None
    assert Keys({"alice": BOB}).cookie_owner(cookie) is None
    for forged in ("", "|", "alice", "alice||", "alice|9999999999|", "alice|x|y", "alice|1e9|\u00e9", "\0|1|2"):
        assert KEYS.cookie_owner(forged) is None


ME = "https://me-7860.example.dev"


@pytest.mark.parametrize(
    "keys, local, origins, headers, comes_in",
    [
        (Keys({}), True, [], {"host": "localhost:1"}, True),
        (Keys({}), True, [], {"host": "[::1]:1", "origin": "http://[::1]:1"}, True),
        (Keys({}), True, [], {"host": "evil.example"}, False),
        (Keys({}), True, [], {"host": ""}, False),
        (Keys({}), True, [], {"host": "a b"}, False),
        (Keys({}), True, [], {"host": "localhost", "origin": "http://evil.example"}, False),
        (Keys({}), True, [], {"host": "localhost", "origin": "null"}, False),
        # a proxy that puts its upstream into Host: with keys, by what it says of the public name
        (KEYS, True, [], {"origin": ME, "x-forwarded-host": "me-7860.example.dev, inner:80"}, True),
        (KEYS, True, [], {"origin": "https://evil.example", "x-forwarded-host": "me-7860.example.dev"}, False),
        (Keys({}), True, [], {"origin": ME, "x-forwarded-host": "me-7860.example.dev"}, False),
        (KEYS, True, [], {"origin": ME}, False),
        (KEYS, True, [ME], {"origin": ME}, True),
        (KEYS, True, [ME], {"origin": ME.replace("https", "http")}, False),
        # and one that passes the public name on
        (KEYS, True, [ME], {"origin": ME, "host": "me-7860.example.dev"}, True),
        (KEYS, True, [], {"origin": ME, "host": "me-7860.example.dev"}, False),
        (KEYS, False, [], {"host": "any.example"}, True),
    ],
)
def test_names_and_origins(keys, local, origins, headers, comes_in):
    policy = AccessPolicy(keys, local, origins)
    try:
        policy.check_place({"host": "127.0.0.1:7860"} | headers)
    except ApiError as error:
        assert not comes_in and error.status == 403 and error.message.isascii() and len(error.message) <= 120
    else:
        assert comes_in


def answer(server, head: str, body: bytes = b"", seconds: float = 100) -> bytes:
    """What comes back until the server closes or has nothing more to say; b"" where it only closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as line, suppress(ConnectionError):
        with suppress(ConnectionError):  # it may answer, and close, before it has all
            line.sendall(head.encode("latin-1") + b"\r\n" + body)
        return line.recv(65536)
    return b""


def test_a_browser_gets_a_cookie_for_its_key(server):
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=100)
    line.request("POST", "/session", headers={"Authorization": f"Bearer {ALICE}", "Origin": server.url})
    got = line.getresponse()
    assert got.status == 204 and not got.read()
    cookie = http.cookies.SimpleCookie(got.headers["Set-Cookie"])[COOKIE]
    assert cookie["httponly"] and cookie["samesite"] == "strict" and not cookie["secure"]
    headers = {"Cookie": f"{COOKIE}={cookie.coded_value}"}
    for more, status in (({}, 200), ({"Origin": "http://evil.example"}, 403), ({"Authorization": "Bearer x"}, 401)):
        line.request("GET", "/v1/videos", headers=headers | more)
        got = line.getresponse()
        got.read()
        assert got.status == status
    line.request("POST", "/session", headers={"Authorization": f"Bearer {ALICE}", "X-Forwarded-Proto": "https"})
    assert "secure" in line.getresponse().headers["Set-Cookie"].lower()


def test_keys_are_in_no_log(server, caplog):
    caplog.set_level(logging.DEBUG)
    for path in ("/v1/videos", f"/v1/videos?key={ALICE}", f"/{ALICE}", "/metrics"):
        answer(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ALICE}\r\n")
    answer(server, f"GARBAGE {ALICE}\r\n")
    assert ALICE not in caplog.text and VARIABLE not in os.environ


MALFORMED = ["[", "[::1", "]", "::1]", "a:b:c", "a:99999999", "\xff", "\xe4\xf6", "a b", "//", "http://", "@", "%"]


def test_no_header_and_no_path_is_a_fault_of_the_server(server, caplog):
    pairs = [(bad, "http://x", "x") for bad in MALFORMED] + [("localhost", bad, bad) for bad in MALFORMED]
    heads = [
        f"GET {path} HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nCookie: {cookie}\r\nAuthorization: {cookie}\r\n"
        for path in ("/", "/v1/videos", "/health")
        for host, origin, cookie in pairs
    ]
    paths = ["/static/%00", "/%ff", f"/static/{'a' * 5000}", "/static/../../app.py", "/static/%2e%2e/app.py", "//",
             "/v1/videos/../../x", "/v1/videos/%2e%2e%2fjobs.sqlite", "/openapi.json?%ff=%00"]  # fmt: skip
    heads += [f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ALICE}\r\n" for path in paths]
    heads += ["GET / HTTP/1.0\r\n", "GET / HTTP/1.1\r\n", f"GET / HTTP/1.1\r\nHost: localhost\r\nX: {'a' * 99_999}\r\n"]
    heads += [f"{HEAD}Authorization: Bearer {ALICE}\r\nContent-Length: {bad}\r\n" for bad in ("-1", "x", "9" * 30)]
    for head in heads:
        got = answer(server, head)
        assert got.startswith(b"HTTP/1.1 ") and int(got[9:12]) < 500, (head, got)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=a"])
@pytest.mark.parametrize("body", [b"5\r\nhello\r\nZZ\r\n", b"5\r\nhello\r\n"], ids=["broken", "broken off"])
def test_a_body_that_breaks_in_the_middle_is_no_fault_of_the_server(server, caplog, kind, body):
    head = f"{HEAD}Authorization: Bearer {ALICE}\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=100) as line:
        line.sendall(head.encode())
        time.sleep(0.1)
        line.sendall(body)
        if b"ZZ" in body:
            assert line.recv(4096).startswith(b"HTTP/1.1 400")
    assert until(lambda: not server.server.server_state.tasks)
    assert not [record for record in caplog.records if record.exc_info]


def test_headers_and_bodies_have_deadlines(server, monkeypatch):
    """Whoever sends a byte now and then is cut off, and others are served meanwhile."""
    monkeypatch.setattr("server.protocols.HEADER_SECONDS", 3.0)  # in which a whole one arrives on a slow machine, too
    monkeypatch.setattr("server.middleware.BODY_SECONDS", 3.0)
    slow_body = f"{HEAD}Authorization: Bearer {ALICE}\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{"
    whole = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for begin, end in ((HEAD, b""), ("", b""), (whole + HEAD, b""), (slow_body, b"HTTP/1.1 408")):
        with socket.create_connection(("127.0.0.1", server.port), timeout=100) as line:
            line.sendall(begin.encode())
            if begin.startswith(whole):
                first = line.recv(65536)
                while b"workers" not in first:
                    more = line.recv(65536)
                    assert more, first
                    first += more
            stop, got = time.monotonic() + 100, None
            line.settimeout(0.1)
            while time.monotonic() < stop:
                try:
                    if begin:
                        line.sendall(b"X")
                    if (got := line.recv(65536)) or got == b"":
                        break
                except TimeoutError:
                    continue
                except ConnectionError:
                    got = b""
                    break
            assert got is not None and got.startswith(end) and bool(got) == bool(end), (begin, got)
    assert answer(server, whole.removesuffix("\r\n")).startswith(b"HTTP/1.1 200")


def test_connections_are_bounded(server, monkeypatch):
    monkeypatch.setattr("server.protocols.MAX_CONNECTIONS", 5)
    lines = [socket.create_connection(("127.0.0.1", server.port), timeout=100) for _ in range(8)]
    assert until(lambda: len(server.server.server_state.connections) == 5)
    for line in lines:
        line.close()
    assert until(lambda: not server.server.server_state.connections)
    assert answer(server, "GET /health HTTP/1.1\r\nHost: localhost\r\n").startswith(b"HTTP/1.1 200")


def test_large_bodies_that_have_not_arrived_are_bounded_by_key(server):
    def begin(key: str) -> socket.socket:
        line = socket.create_connection(("127.0.0.1", server.port), timeout=100)
        head = f"{HEAD}Authorization: Bearer {key}\r\nContent-Type: application/json\r\nContent-Length: 9000000\r\n\r\n"
        line.sendall(head.encode() + b" " * 70_000)
        return line

    def refused() -> bool:
        """Whether one more is refused; it waits for the rest of the body as long as the others are not seen."""
        with suppress(TimeoutError, ConnectionError), begin(ALICE) as line:  # it may close before it has all
            line.settimeout(1)
            return b"429" in line.recv(4096)[:20]
        return False

    lines = [begin(ALICE) for _ in range(4)]
    assert until(refused)
    body = b'{"prompt": "a red circle"}'
    kinds = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    for key in (ALICE, BOB):  # small ones are no uploads
        assert answer(server, f"{HEAD}Authorization: Bearer {key}\r\n{kinds}", body).startswith(b"HTTP/1.1 200")
    for line in lines:
        line.close()


def test_a_key_has_so_many_live_streams_and_no_more(tmp_path):
    """Another key has its own, a closed one is free again, and without keys it does not count."""

    def greeting(running, key, stack):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        line = connect(f"ws://127.0.0.1:{running.port}/v1/live", additional_headers=headers)
        return json.loads(stack.enter_context(line).recv(100))["type"]

    for name, keys in (("keys", KEYS), ("none", Keys({}))):
        with Running(tmp_path / name, keys=keys) as running, ExitStack() as others:
            running.pool.about = {"hello": {}}
            alice, bob = (ALICE, BOB) if keys else (None, None)
            with ExitStack() as one:
                assert greeting(running, alice, one) == "hello"
                assert [greeting(running, alice, others) for _ in range(3)] == ["hello"] * 3
                if keys:
                    with pytest.raises(ConnectionClosed, match="this key has 4 live streams; close one") as closed:
                        greeting(running, alice, others)
                    assert closed.value.rcvd.code == 1013
            assert greeting(running, bob, others) == greeting(running, alice, others) == "hello"
