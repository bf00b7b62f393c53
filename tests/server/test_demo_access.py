"""Who may come in to the demo, under which names, and what visitors of bad will can hold: over real sockets."""

import asyncio
import http.client
import json
import socket
import threading
import time

import pytest
from test_demo import PLAY, TOKEN, fetch, opened, pipe, serve, visit  # noqa: F401  (fixtures)
from test_demo_image import RED, post
from websockets.asyncio.client import connect

import demo
from configs.errors import UserError
from server.demo_app import MAX_UPLOAD, AccessPolicy, Limits, address, bound_socket, check_access
from server.player import Player

QUERY = "?token=open%20sesame%20123"
UPGRADE = (
    f"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {'A' * 22}==\r\n"
)
MALFORMED = ["[", "[::1", "]", "::1]", "a:b:c", "a:99999999", "\xff", "\xe4\xf6", "a b", "//", "http://", "@", "%"]


@pytest.fixture
def tracebacks(caplog):
    """Those that the server has logged since the test began."""
    return lambda: [record.exc_text for record in caplog.records if record.exc_info]


def until(condition, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("token", ["1+1=2 for all", "a&b#c?d/e%41", "p\u00e4ss w\u00f6rd \u4e2d\u6587"])
def test_the_printed_address_opens_the_page_with_any_token(serve, token):  # noqa: F811
    printed = address("127.0.0.1", serve(token=token), token)
    assert opened(printed)[0] == 200 and opened(printed[:-1])[0] == 403

    async def script():
        async with connect(printed.replace("http://", "ws://").replace("/?", "/stream?")) as line:
            return json.loads(await line.recv())["type"]

    assert asyncio.run(script()) == "hello"


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "[::1]", "localhost"])
def test_every_address_of_this_machine_may_be_listened_at(serve, host):  # noqa: F811
    try:
        bound_socket(host, 0).close()
    except UserError:
        pytest.skip(f"no {host} on this machine")
    check_access(host, None)
    printed = address(host, serve(host=host), None)
    assert opened(printed)[0] == opened(printed, Origin=printed[:-1])[0] == 200
    assert opened(printed, Host="evil.example")[0] == opened(printed, Origin="http://127.0.0.3")[0] == 403


def test_what_listens_at_all_addresses_prints_one_that_opens():
    for host in ("0.0.0.0", "::", ""):
        assert address(host, 7860, TOKEN) == f"http://localhost:7860/{QUERY}"


@pytest.mark.parametrize("options", [{}, {"token": TOKEN, "local": False}], ids=["local", "token"])
def test_no_header_and_no_path_is_a_fault_of_the_server(serve, options, tracebacks):  # noqa: F811
    """Refused with 4xx, or served: never 500 and a traceback."""
    port, query = serve(**options), QUERY if options else ""
    pairs = [(bad, "x") for bad in MALFORMED] + [("localhost", bad) for bad in MALFORMED]
    heads = [
        f"GET {path}{query} HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nX-Forwarded-Host: {origin}\r\n{more}\r\n"
        for path, more in (("/", ""), ("/static/app.js", ""), ("/stream", UPGRADE))
        for host, origin in pairs
    ]
    paths = ["/static/%00", "/%ff", f"/static/{'a' * 5000}", "/clip/%00.mp4", "/clip/a.b.mp4", "//", "/static//"]
    heads += [f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n" for path in (*paths, "/?token=%ff", f"/{query}")]
    heads += [f"GET /{query} HTTP/1.0\r\n\r\n", f"GET /{query} HTTP/1.1\r\n\r\n"]
    for head in heads:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as line:
            line.sendall(head.encode("latin-1"))
            answer = line.recv(4096)
        assert answer.startswith(b"HTTP/1.1 ") and int(answer[9:12]) < 500, (head, answer)
    assert not tracebacks()


ME = "https://me-7860.example.dev"


@pytest.mark.parametrize(
    "token, origins, headers, comes_in",
    [
        # a proxy that puts its upstream into Host: with the token, by what it says of the public name
        (TOKEN, [], {"origin": ME, "x-forwarded-host": "me-7860.example.dev"}, True),
        (TOKEN, [], {"origin": ME, "x-forwarded-host": "me-7860.example.dev, inner:80"}, True),
        (TOKEN, [], {"origin": "https://evil.example", "x-forwarded-host": "me-7860.example.dev"}, False),
        (None, [], {"origin": ME, "x-forwarded-host": "me-7860.example.dev"}, False),
        (TOKEN, [], {"origin": "null", "x-forwarded-host": ""}, False),
        (TOKEN, [], {"origin": ME}, False),
        (TOKEN, [ME], {"origin": ME}, True),
        (TOKEN, [ME], {"origin": ME.replace("https", "http")}, False),
        (TOKEN, [ME], {"origin": "https://evil.example"}, False),
        # and one that passes the public name on
        (TOKEN, [ME], {"origin": ME, "host": "me-7860.example.dev"}, True),
        (TOKEN, [], {"origin": ME, "host": "me-7860.example.dev"}, False),
    ],
)
def test_behind_a_proxy(token, origins, headers, comes_in):
    door, headers = AccessPolicy(token, True, origins), {"host": "127.0.0.1:7860"} | headers
    reason = door.refusal(headers, {"token": TOKEN})
    assert (reason is None) == comes_in
    assert comes_in or ("--allow_origin" in reason and len(reason) <= 120 and reason.isascii())
    assert door.refusal(headers, {"token": "guess"}) is not None or token is None


@pytest.mark.parametrize("what", ["stream", "download"])
def test_who_does_not_read_is_cut_off(serve, monkeypatch, what):  # noqa: F811
    """The place is free again, and the connection with all that waited in it is gone."""
    monkeypatch.setattr("server.protocols.SEND_SECONDS", 0.5)
    monkeypatch.setattr(Player, "video", lambda self, take: b"x" * 2**25)
    port = serve(limits=Limits(visitors=1))
    serve.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # which its connections inherit
    players, running = serve.app.state.players, serve.server.server_state.connections
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(("127.0.0.1", port))
        line.sendall(f"GET /stream HTTP/1.1\r\nHost: localhost\r\n{UPGRADE}\r\n".encode())
        assert until(lambda: players)
        if what == "download":
            with socket.socket() as deaf:
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                deaf.connect(("127.0.0.1", port))
                deaf.sendall(f"GET /clip/{next(iter(players))}.mp4 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert until(lambda: len(running) == 2) and until(lambda: len(running) == 1)
            return
        question = json.dumps({"type": "schedule", "steps": [4, 3, 2, 1] * 3}).encode()
        frame = bytes([0x81, 0x80 | len(question)]) + bytes(4) + question  # masked with zeros
        asker = threading.Thread(target=ask_for_ever, args=(line, frame), daemon=True)
        asker.start()
        assert until(lambda: not players, 60), "the place is free"
        assert until(lambda: not running), "and nothing is kept for who will not read it"
    visit(port, lambda me: me.play())


def ask_for_ever(line: socket.socket, frame: bytes) -> None:
    try:
        while True:
            line.sendall(frame)
    except OSError:
        return


def test_unfinished_uploads_are_bounded(serve, tracebacks):  # noqa: F811
    """One a visitor, as many as visitors in all, whether or not those are still here; the time is bounded, too."""
    port = serve(limits=Limits(visitors=2))

    def begin(visitor: str) -> http.client.HTTPConnection:
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        line.putrequest("POST", f"/image/{visitor}")
        line.putheader("Content-Length", str(MAX_UPLOAD))
        line.endheaders()
        line.send(b"x" * 70_000)
        return line

    async def leave(me):
        lines.append(begin(me.hello["visitor"]))
        await asyncio.sleep(0.3)

    async def script(me):
        path = f"image/{me.hello['visitor']}"
        lines.append(begin(me.hello["visitor"]))
        await asyncio.sleep(0.3)
        answers = [await asyncio.to_thread(post, port, path, RED) for _ in range(3)]
        lines.pop().close()
        await asyncio.sleep(0.3)
        return answers, await asyncio.to_thread(post, port, path, RED)

    lines = []
    answers, after = visit(port, script)
    assert [status for status, _ in answers] == [429] * 3 and "wait" in answers[0][1] and after[0] == 204
    for _ in range(2):
        visit(port, leave)
    assert visit(port, lambda me: asyncio.to_thread(post, port, f"image/{me.hello['visitor']}", RED))[0] == 429
    for line in lines:
        line.close()
    time.sleep(0.3)
    assert not tracebacks(), "an upload that is broken off is no fault"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--visitors", "0"], "--visitors=0 "), (["--visitors", "-3"], "--visitors=-3 "),
        (["--visitors", "1000000"], "--visitors=1000000 "), (["--idle_seconds", "nan"], "idle_seconds: invalid"),
        (["--idle_seconds", "0"], "--idle_seconds=0.0 "), (["--max_seconds", "inf"], "max_seconds: invalid"),
        (["--max_seconds", "-1"], "--max_seconds=-1.0 "), (["--port", "99999"], "--port=99999 "),
        (["--host", "0.0.0.0"], "--token"), (["--host", "::"], "--token"), (["--host", "\u00fc" * 70], "--token"),
        (["--host", "\u00fc" * 70, "--token", TOKEN], "cannot be used"), (["--token", "12\u200b\n45678"], "--token"),
        (["--allow_origin", "https://a.example"], "--token"), (["--allow_origin", "*", "--token", TOKEN], "no origin"),
        (["--allow_origin", "https://a.example/page", "--token", TOKEN], "no origin"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_sentence_before_anything_is_loaded(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.diagonal.DiagonalPipeline.from_config", None)
    monkeypatch.setattr("sys.argv", ["demo.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        demo.exits.run(demo.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


def test_a_second_server_on_a_port_is_refused_before_it_loads(monkeypatch, capsys):
    """The first one may still be loading: its port is taken from the start."""
    with bound_socket("127.0.0.1", 0) as first:
        port = str(first.getsockname()[1])
        monkeypatch.setattr("pipeline.diagonal.DiagonalPipeline.from_config", None)
        monkeypatch.setattr("sys.argv", ["demo.py", "--port", port])
        with pytest.raises(SystemExit) as stop:
            demo.exits.run(demo.main)
    assert stop.value.code == 2 and f"--port={port}" in capsys.readouterr().err


@pytest.mark.parametrize("fault, said", [(UserError, "chunk 2 has latents"), (RuntimeError, "its log says why")])
def test_a_fault_of_the_session_is_told_and_others_go_on(serve, monkeypatch, tracebacks, fault, said):  # noqa: F811
    """Latents that are no numbers, for one: the visitor reads the sentence, may play again, and nobody else is hit."""
    port, make = serve(), Player.next

    def broken(self):
        if self.seed == 13 and self.session.chunk == 2:
            raise fault("chunk 2 has latents that are not finite; use inference.precision=bfloat16")
        return make(self)

    monkeypatch.setattr(Player, "next", broken)

    async def script(me):
        await me.play(seed=13)
        await me.chunks(2)
        told = await me.until("error")
        await me.play(seed=1)
        return told, await me.chunks(3)

    async def both():
        other = asyncio.to_thread(visit, port, lambda me: me.play(), "")
        return await asyncio.gather(asyncio.to_thread(visit, port, script), other)

    (told, chunks), _ = asyncio.run(both())
    assert told["over"] and said in told["message"] and len(chunks) == 3
    assert len(tracebacks()) == (fault is RuntimeError)


@pytest.mark.parametrize("last_words", ["stop", "play", "nothing"])
def test_who_leaves_leaves_no_traceback(serve, monkeypatch, tracebacks, last_words):  # noqa: F811
    """Even with a chunk on its way: it cannot be sent, and then nothing else can."""
    port, make = serve(), Player.next

    def slow(self):
        made = make(self)
        time.sleep(0.2)
        return made

    monkeypatch.setattr(Player, "next", slow)

    async def leave(seconds: float):
        line = await connect(f"ws://127.0.0.1:{port}/stream", max_size=None)
        await line.send(json.dumps(PLAY))
        while isinstance(await line.recv(), str):
            pass
        await asyncio.sleep(seconds)
        if last_words != "nothing":
            await line.send(json.dumps(PLAY | {"type": last_words}))
        await line.close()

    for seconds in (0, 0.05, 0.1):
        asyncio.run(leave(seconds))
    assert until(lambda: not serve.app.state.players)
    assert not tracebacks()
