"""The demo's server, over real sockets: playing, driving, visitors who misbehave, and who is let in."""

import asyncio
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from functools import partial

import av
import pytest
import uvicorn
from PIL import Image
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

import demo
from configs.errors import UserError
from pipeline import DiagonalPipeline
from pipeline.stream import StreamSession
from server.demo_app import SOCKET, Limits, bound_socket, check_access, hello, make_app
from server.messages import read_message
from server.player import new_session

PROMPT, OTHER = "a red circle moves right", "a blue square moves up"
PLAY = {"type": "play", "prompt": PROMPT, "seed": 1, "steps": [2, 1], "context": "last_step", "seconds": 600}
TOKEN = "open sesame 123"


@pytest.fixture(scope="module")
def pipe(tiny_assets):
    return DiagonalPipeline.from_config(tiny_assets / "tiny.yaml")


@pytest.fixture(scope="module")
def serve(pipe):
    """`serve(**of make_app) -> port`; all are stopped in the end."""
    running = []

    def start(host: str = "127.0.0.1", **options) -> int:
        listener = bound_socket(host, 0)
        app = make_app(pipe, **options)
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, log_level="error", timeout_graceful_shutdown=1, **SOCKET)
        )
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        start.app, start.server, start.listener = app, server, listener
        return listener.getsockname()[1]

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


class Visitor:
    """A well-behaved page without a screen."""

    def __init__(self, line):
        self.line, self.heard, self.sent = line, [], 0

    async def send(self, **message) -> None:
        await self.line.send(json.dumps(message))

    async def until(self, kind: str) -> dict:
        """The next message of this type; chunks on the way are kept."""
        while True:
            data = await asyncio.wait_for(self.line.recv(), 120)
            message = json.loads(data) if isinstance(data, str) else self.chunk(data)
            if message["type"] == "chunk":
                self.heard.append(message)
                self.sent += len(message["frames"])
                await self.send(type="shown", frames=self.sent)
            if message["type"] == kind:
                return message

    @staticmethod
    def chunk(data: bytes) -> dict:
        size = int.from_bytes(data[:4], "big")
        head, at, parts = json.loads(data[4 : 4 + size]), 4 + size, []
        for n in head["sizes"]:
            parts.append(data[at : at + n])
            at += n
        assert at == len(data)
        return head | {"frames": parts[1:]}

    async def chunks(self, n: int) -> list[dict]:
        return [await self.until("chunk") for _ in range(n)]

    async def play(self, **changes) -> None:
        self.sent = 0
        await self.send(**PLAY | changes)
        await self.until("take")
        self.sent = 0


def visit(port: int, script, query: str = ""):
    async def run():
        async with connect(f"ws://127.0.0.1:{port}/stream{query}", max_size=None) as line:
            visitor = Visitor(line)
            visitor.hello = await visitor.until("hello")
            return await script(visitor)

    return asyncio.run(run())


def fetch(port: int, path: str, **headers) -> tuple[int, bytes]:
    return opened(f"http://127.0.0.1:{port}/{path}", **headers)


def opened(url: str, **headers) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.fixture(scope="module")
def port(serve):
    return serve()


def test_a_video_is_played_changed_rewound_and_taken_home(port):
    async def script(me):
        await me.play()
        first = await me.chunks(4)
        assert [len(c["frames"]) for c in first] == [9, 12, 12, 12] and [c["chunk"] for c in first] == [0, 1, 2, 3]
        assert Image.open(io.BytesIO(first[0]["frames"][0])).size == (48, 32)
        await me.send(type="say", prompt=OTHER, switch="recache")
        await me.until("said")
        while (await me.until("chunk"))["prompt"] != OTHER:
            pass
        await me.send(type="rewind", chunk=2)
        await me.until("take")
        me.sent = 0
        again = await me.chunks(2)
        assert [c["chunk"] for c in again] == [2, 3] and again[0]["frames"] == first[2]["frames"], "the same again"
        await me.send(type="rewind", chunk=2, prompt=OTHER, seed=8)
        await me.until("take")
        me.sent = 0
        branch = await me.chunks(2)
        assert branch[0]["frames"] != again[0]["frames"] and branch[0]["prompt"] == OTHER and branch[0]["seed"] == 8
        await me.send(type="stop")
        await me.until("stopped")
        name = me.hello["visitor"]
        status, video = await asyncio.to_thread(fetch, port, f"clip/{name}.mp4")
        with av.open(io.BytesIO(video)) as file:
            frames = sum(1 for _ in file.decode(video=0))
        status, record = await asyncio.to_thread(fetch, port, f"clip/{name}.json")
        chunks = json.loads(record)["chunks"]
        assert status == 200 and frames == 12 * len(chunks) - 3
        assert [c["seed"] for c in chunks[:3]] == [1, 1, 8]
        return name

    name = visit(port, script)
    assert fetch(port, f"clip/{name}.mp4")[0] == 404, "gone with its visitor"


def test_branches_are_kept(port):
    """Each may be gone back to and taken home: the same chunks, and on along its own prompt and seed."""

    async def script(me):
        async def rewind(**message):
            await me.send(type="rewind", **message)
            take = await me.until("take")
            me.sent = 0
            return take, await me.chunks(3)

        await me.play(seed=1)
        first = await me.chunks(5)
        _, other = await rewind(chunk=2, prompt=OTHER, seed=8)
        take, again = await rewind(chunk=3, take=1)
        assert take["takes"] == [1, 2, 3] and [c["take"] for c in other + again] == [2] * 3 + [3] * 3
        assert [c["frames"] for c in again[:2]] == [c["frames"] for c in first[3:]], "the first one, as it was"
        _, branch = await rewind(chunk=2, take=2)
        assert [c["frames"] for c in branch] == [c["frames"] for c in other], "the branch, from its first chunk on"
        assert {(c["prompt"], c["seed"]) for c in branch} == {(OTHER, 8)}
        _, start = await rewind(chunk=0, take=1)
        assert [c["frames"] for c in start] == [c["frames"] for c in first[:3]]
        await me.send(type="stop")
        await me.until("stopped")
        path, kept = f"clip/{me.hello['visitor']}.json", {}
        for take in range(1, 6):
            status, record = await asyncio.to_thread(fetch, port, f"{path}?take={take}")
            kept[take] = [(c["chunk"], c["prompt"], c["seed"]) for c in json.loads(record)["chunks"]]
        assert kept[1][:5] == [(k, PROMPT, 1) for k in range(5)]
        assert kept[2][:4] == [(0, PROMPT, 1), (1, PROMPT, 1), (2, OTHER, 8), (3, OTHER, 8)]
        assert kept[3][:4] == kept[1][:4] and kept[4][:4] == kept[2][:4] and kept[5][:3] == kept[1][:3]
        assert (await asyncio.to_thread(fetch, port, f"{path}?take=77"))[0] == 409
        await me.send(type="rewind", chunk=1, take=77)
        assert "not kept" in (await me.until("error"))["message"]
        for _ in range(8):
            take, _ = await rewind(chunk=0)
        assert len(take["takes"]) == 8 and take["takes"][-1] == 13, "the newest"
        await me.play()
        await me.send(type="rewind", chunk=2, take=2)
        assert "not kept" in (await me.until("error"))["message"], "a new video begins with nothing"

    visit(port, script)


def test_pictures_are_not_compressed_again(port):
    async def script(me):
        return me.line.response.headers

    assert "Sec-WebSocket-Extensions" not in visit(port, script)


def test_visitors_one_after_the_other_share_a_session(serve):
    """Its cache, and on a GPU its graphs; what one has played is nothing to the next."""
    port = serve()

    async def script(me, **changes):
        player = serve.app.state.players[me.hello["visitor"]]
        await me.play(**changes)
        made = await me.chunks(3)
        await me.send(type="stop")
        await me.until("stopped")
        assert all({*kept.text.prompts} == {changes["prompt"]} for kept in player.snapshots.values())
        assert {*player.snapshots} <= {(1, k) for k in range(1, 6)} and (1, 1) in player.snapshots
        await me.send(type="rewind", chunk=7)
        assert "is not kept any more" in (await me.until("error"))["message"]
        return id(player.session), [c["frames"] for c in made]

    async def longer(me):
        player = serve.app.state.players[me.hello["visitor"]]
        for prompt, count in ((PROMPT, 8), (OTHER, 2)):
            await me.play(prompt=prompt)
            await me.chunks(count)
        await me.send(type="stop")
        await me.until("stopped")
        assert player.snapshots and all({*kept.text.prompts} == {OTHER} for kept in player.snapshots.values())

    visit(port, longer)
    once, other, again = (visit(port, partial(script, prompt=prompt)) for prompt in (PROMPT, OTHER, PROMPT))
    assert once == again and other[0] == once[0] and other[1] != once[1]


@pytest.mark.parametrize("switch", ["cut", "recache", "blend"])
def test_what_is_said_before_the_first_chunk_goes_for_that(serve, monkeypatch, switch):
    port, make = serve(), StreamSession._next
    heard = threading.Event()

    def slow(self, *args):
        assert heard.wait(60)
        return make(self, *args)

    monkeypatch.setattr(StreamSession, "_next", slow)

    async def script(me):
        heard.clear()
        await me.play()
        await me.send(type="say", prompt=OTHER, switch=switch)
        await me.until("said")
        heard.set()
        changed = await me.chunks(3)
        await me.play(prompt=OTHER)
        return changed, await me.chunks(3)

    for _ in range(2):  # by a new session, and by one that another visitor has left
        changed, other = visit(port, script)
        assert [chunk["prompt"] for chunk in changed] == [OTHER] * 3
        assert (changed[0]["frames"] == other[0]["frames"]) == (switch != "blend")


def test_a_warm_server_has_played_where_it_will_play(serve, monkeypatch):
    threads, play = set(), StreamSession.play

    def watched(self, *args):
        threads.add((id(self), threading.current_thread().name))
        return play(self, *args)

    monkeypatch.setattr(StreamSession, "play", watched)
    port = serve(warm=True)
    assert len(threads) == 1, "before anybody has come"

    async def script(me):
        await me.play()
        await me.chunks(1)

    visit(port, script)
    assert len(threads) == 1, "by the same thread and session"


@pytest.mark.parametrize(
    "settings",
    [
        ["schedule={preset: self_forcing}"],
        ["schedule={preset: release}", "stream.context_by_chunk={0: clean}"],
        ["schedule.first=990", "schedule.last=300", "schedule.shift=3"],
        ["schedule={timesteps: [[1000, 400], [990, 300]]}", "stream.context=renoise", "stream.context_timestep=50"],
        ["schedule.steps=9" + "1" * 14],
    ],
)
def test_the_page_plays_what_inference_plays(tiny_assets, settings):
    """What the page asks for at first, the sliders and the policy that it is told, is the configured schedule."""
    pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", *settings)
    told = hello(pipe, "name", Limits())
    asked = {key: told[key] for key in ("steps", "context")}
    for values in (asked, {"steps": told["steps"]}):
        message = read_message(json.dumps({"type": "play", "prompt": PROMPT} | values), pipe.config, 600)
        assert message.schedule == pipe.schedule


def test_visitors_have_sessions_as_configured(tiny_assets, monkeypatch):
    settings = ["inference.overlap=false", "stream.switch=cut", "stream.switch_chunks=2"]
    pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", *settings)
    told = []
    monkeypatch.setattr("pipeline.stream.AsyncDecoder", lambda *options: told.append(options))
    ours = new_session(pipe)
    assert (ours.switch, ours.switch_chunks) == ("cut", 2) and told == [(pipe.session.device, False)]


def test_the_schedule_is_predicted(port):
    async def script(me):
        await me.send(type="schedule", steps=[4, 3, 2], context="clean")
        return await me.until("schedule")

    answer = visit(port, script)
    assert answer["nfe"] == 4 + 3 + 2 and answer["chunks"] == 2 and "clean" in answer["table"]


def test_nothing_is_made_far_ahead_of_what_is_shown(serve):
    port = serve(limits=Limits(ahead_seconds=1.0))

    async def script(me):
        await me.play()
        got = 0
        try:
            while True:
                # a second of silence is the end, once there is enough
                data = await asyncio.wait_for(me.line.recv(), 60 if got < 16 else 1)
                got += len(me.chunk(data)["frames"])
        except TimeoutError:
            pass
        assert 16 <= got <= 16 + 12 + 12
        await me.send(type="stop")
        await me.until("stopped")

    visit(port, script)


def test_eight_visitors_one_slow_one_gone_one_with_garbage(serve):
    port = serve()
    players = serve.app.state.players

    async def good(line):
        me = Visitor(line)
        await me.until("hello")
        await me.play()
        made = await me.chunks(12)
        assert [c["chunk"] for c in made] == list(range(12)), "no chunk lost or repeated"
        return [f for c in made for f in c["frames"]]

    async def slow(line):
        me = Visitor(line)
        await me.play()
        await asyncio.sleep(1)

    async def gone(line):
        me = Visitor(line)
        await me.play()
        await me.chunks(1)
        line.transport.abort()

    async def garbage(line):
        me = Visitor(line)
        await me.until("hello")
        junk = ["", "{", "[]", "null", '{"type": 3}', '{"type": "play"}', "[" * 5000, b"\0"]
        junk.append('{"type": "rewind", "chunk": 7}')
        for i in range(500):
            await line.send(junk[i % len(junk)])
            assert "message" in await me.until("error")
        await me.play()
        await me.chunks(1)

    async def all_of_them():
        async def one(script):
            async with connect(f"ws://127.0.0.1:{port}/stream", max_size=None) as line:
                try:
                    return await script(line)
                except ConnectionClosed:
                    return None

        return await asyncio.gather(*(one(s) for s in (good, good, good, good, good, slow, gone, garbage)))

    results = asyncio.run(all_of_them())
    assert all(frames == results[0] and len(frames) == 141 for frames in results[:5]), "each the same as alone"
    deadline = time.monotonic() + 60
    while players and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not players, "what visitors held is let go"


@pytest.mark.parametrize(
    "message",
    [
        "x", "[]", "{}", '{"type": "play", "prompt": 3}', '{"type": "play", "prompt": " ", "steps": [2]}',
        json.dumps(PLAY | {"steps": [9]}), json.dumps(PLAY | {"steps": []}), json.dumps(PLAY | {"steps": [2] * 13}),
        json.dumps(PLAY | {"steps": [True]}), json.dumps(PLAY | {"seed": -1}), json.dumps(PLAY | {"seed": 1.5}),
        json.dumps(PLAY | {"seconds": 1e9}), json.dumps(PLAY | {"seconds": float("nan")}),
        json.dumps(PLAY | {"context": "../x"}), json.dumps(PLAY | {"prompt": "x" * 2001}),
        json.dumps({"type": "say", "prompt": "x", "switch": ["cut"]}), json.dumps({"type": "rewind", "chunk": "0"}),
        json.dumps({"type": ["play"]}), json.dumps(PLAY | {"prompt": "\ud800"}), "9" * 5000,
    ],
)  # fmt: skip
def test_a_message_without_sense_is_a_sentence(message, pipe):
    with pytest.raises(UserError) as error:
        read_message(message, pipe.config, 600)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


def test_only_who_knows_the_token_gets_in(serve):
    port = serve(token=TOKEN)
    assert fetch(port, "")[0] == fetch(port, "?token=wrong")[0] == fetch(port, "clip/x.mp4")[0] == 403
    assert fetch(port, "?token=open%20sesame%20123")[0] == 200 and fetch(port, "static/app.js")[0] == 200

    async def script(me):
        return me.hello

    assert visit(port, script, "?token=open%20sesame%20123")["type"] == "hello"
    with pytest.raises(ConnectionClosed, match="token is wrong"):
        visit(port, script, "?token=guess")


def test_other_sites_and_other_names_are_kept_out(port):
    assert fetch(port, "", Host="evil.example")[0] == 403
    assert fetch(port, "", Origin="http://evil.example")[0] == 403
    status, page = fetch(port, "")
    assert status == 200 and b"<canvas" in page
    for path in ("static/../app.py", "static/%2e%2e/app.py", "clip/..%2fx.mp4"):
        assert fetch(port, path)[0] == 404


def test_the_house_is_full(serve):
    port = serve(limits=Limits(visitors=1))

    async def script(me):
        with pytest.raises(ConnectionClosed, match="1 visitors are here"):
            async with connect(f"ws://127.0.0.1:{port}/stream") as second:
                await second.recv()

    visit(port, script)


def test_the_idle_are_let_go(serve):
    port = serve(limits=Limits(idle_seconds=0.2))
    assert "idle for" in visit(port, lambda me: me.until("idle"))["message"]


def test_what_cannot_be_served_is_refused_at_the_start(monkeypatch, capsys):
    with pytest.raises(UserError, match="--token"):
        check_access("0.0.0.0", None)
    with pytest.raises(UserError, match="easy to guess"):
        check_access("0.0.0.0", "abc")
    check_access("0.0.0.0", TOKEN)
    for host in ("localhost", "127.0.0.1", "::1"):
        check_access(host, None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot be used"):
            bound_socket("127.0.0.1", taken.getsockname()[1])
    monkeypatch.setattr("sys.argv", ["demo.py", "--host", "0.0.0.0"])
    with pytest.raises(SystemExit) as stop:
        demo.exits.run(demo.main)
    assert stop.value.code == 2 and "--token" in capsys.readouterr().err


def test_what_is_no_picture_ends_in_a_sentence_and_the_next_video_plays(serve, monkeypatch):
    whole = StreamSession._next

    def broken(session, *args):
        result = whole(session, *args)
        if result.chunk == 1:
            result.finite.fill_(False)
        return result

    async def script(visitor: Visitor):
        with monkeypatch.context() as patch:
            patch.setattr(StreamSession, "_next", broken)
            await visitor.play()
            error = await visitor.until("error")
        await visitor.play()
        return error, visitor.heard, await visitor.chunks(3)

    error, before, after = visit(serve(), script)
    assert "chunk 1 holds NaN or infinity" in error["message"] and error["over"]
    assert [chunk["chunk"] for chunk in before[:1]] == [0] and [chunk["chunk"] for chunk in after] == [0, 1, 2]
