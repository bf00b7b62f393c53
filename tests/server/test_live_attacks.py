"""Clients of bad will, and those that have bad luck, at the live protocol: nobody else loses a frame."""

import asyncio
import gc
import json
import os
import socket
import threading
import time

import pytest
from api_case import until
from live_case import OTHER, PROMPT, Visitor, pipe, serve, visit  # noqa: F401  (fixtures)
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from configs.errors import UserError
from pipeline.stream import StreamSession
from server.controls import Control
from server.limits import MAX_MESSAGE
from server.live import Connection, Gone
from server.worker_process import WorkerProcess
from server.worker_stream import Stream

UPGRADE = (
    f"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {'A' * 22}==\r\n"
)


@pytest.fixture(scope="module")
def port(serve):  # noqa: F811
    return serve()


@pytest.fixture
def tracebacks(caplog):
    """Those that the server has logged since the test began."""
    return lambda: [record.exc_text for record in caplog.records if record.exc_info]


def test_sixteen_clients_of_whom_some_are_slow_vanish_or_talk_nonsense(serve, tracebacks):  # noqa: F811
    """Each good one gets what it would get alone; in the end nothing of any is held."""
    port = serve()
    live = serve.live

    async def good(me):
        await me.open()
        made = await me.chunks(8)
        assert [c["chunk"] for c in made] == list(range(8)), "no chunk lost or repeated"
        return [c["parts"] for c in made]

    async def slow(me):
        me.auto_shown = False
        await me.open()
        await asyncio.sleep(1)

    async def vanishes(me):
        await me.open()
        await me.chunks(1)
        me.line.transport.abort()

    async def branches(me):
        await me.open(prompt=OTHER)
        for _ in range(4):
            await me.chunks(1)
            await me.send("branch", chunk=0, seed=2)
            await me.send("pause")
            await me.send("resume")
        await me.chunks(1)

    async def nonsense(me):
        junk = ["", "{", "[]", "null", '{"type": 3}', '{"type": "open", "id": 1}', "[" * 5000, "\0"]
        junk.append('{"type": "seek", "id": 1, "chunk": 7}')
        for i in range(1000):
            await me.line.send(junk[i % len(junk)])
        with pytest.raises(ConnectionClosed, match="without sense"):
            while True:
                await me.next()

    async def all_of_them():
        async def one(script):
            async with connect(f"ws://127.0.0.1:{port}/v1/live", max_size=None) as line:
                me = Visitor(line)
                await me.next()
                try:
                    return await script(me)
                except ConnectionClosed:
                    return None

        scripts = [good] * 8 + [slow] * 2 + [vanishes] * 2 + [branches] * 2 + [nonsense] * 2
        return await asyncio.gather(*(one(script) for script in scripts))

    results = asyncio.run(all_of_them())
    assert all(parts == results[0] for parts in results[:8]) and results[0], "each the same as all"
    assert until(lambda: not live.connections) and until(lambda: not live.pool.workers[0].sessions)
    assert not tracebacks()


def test_who_does_not_read_is_cut_off(serve, monkeypatch):  # noqa: F811
    """The place is free again, and the connection with all that waited in it is gone."""
    monkeypatch.setattr("server.protocols.SEND_SECONDS", 0.5)
    port = serve(visitors=1)
    live, running = serve.live, serve.server.server_state.connections
    listener = serve.server.servers[0].sockets[0]
    with socket.socket() as line:
        os_level = socket.fromfd(listener.fileno(), socket.AF_INET, socket.SOCK_STREAM)
        os_level.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # which its connections inherit
        os_level.close()
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(("127.0.0.1", port))
        line.sendall(f"GET /v1/live HTTP/1.1\r\nHost: localhost\r\n{UPGRADE}\r\n".encode())
        assert until(lambda: live.connections)
        question = json.dumps({"type": "describe", "id": 1, "schedule": {"steps": [4, 3, 2, 1] * 3}}).encode()
        frame = bytes([0x81, 0x80 | len(question)]) + bytes(4) + question  # masked with zeros
        threading.Thread(target=ask_for_ever, args=(line, frame), daemon=True).start()
        assert until(lambda: not live.connections, 60), "the place is free"
        assert until(lambda: not running), "and nothing is kept for who will not read it"
    visit(port, lambda me: me.open())


def ask_for_ever(line: socket.socket, frame: bytes) -> None:
    try:
        while True:
            line.sendall(frame)
    except OSError:
        return


def test_the_server_is_full_and_a_worker_is(serve):  # noqa: F811
    port = serve(visitors=2, streams=1)

    async def script(me):
        await me.open()

        async def second():
            async with connect(f"ws://127.0.0.1:{port}/v1/live") as line:
                other = Visitor(line)
                await other.next()
                refused = await other.open()
                with pytest.raises(ConnectionClosed, match="2 visitors are here") as closed:
                    async with connect(f"ws://127.0.0.1:{port}/v1/live") as third:
                        await third.recv()
                return refused, closed.value.rcvd.code

        return await second()

    refused, code = visit(port, script)
    assert refused["type"] == "refused" and "takes 1 at once, which run already" in refused["reason"]
    assert refused["retry_after"] > 0
    assert code == 1013


def test_the_idle_are_let_go(serve):  # noqa: F811
    port = serve(idle_seconds=0.2)
    ended = visit(port, lambda me: me.until("ended"))
    assert ended["reason"] == "idle" and "idle for" in ended["message"]


@pytest.mark.parametrize("message, code", [(b"\0", 1003), ("x" * (MAX_MESSAGE + 1), 1009)])
def test_what_is_no_text_or_too_long_ends_the_connection(port, message, code):
    async def script(me):
        await me.line.send(message)
        with pytest.raises(ConnectionClosed) as closed:
            await me.next()
        return closed.value.rcvd.code

    assert visit(port, script) == code


@pytest.mark.parametrize("fault, said", [(UserError, "chunk 2 has latents"), (RuntimeError, "its log says why")])
def test_a_fault_of_a_stream_is_told_and_others_go_on(port, monkeypatch, tracebacks, fault, said):
    make = StreamSession._next

    def broken(session, *args):
        if session._noise.seeds[0] == 13 and session.chunk == 2:
            raise fault("chunk 2 has latents that are not finite; use inference.precision=bfloat16")
        return make(session, *args)

    monkeypatch.setattr(StreamSession, "_next", broken)

    async def script(me):
        await me.open(seed=13)
        ended = await me.until("ended")
        await me.open(seed=1)
        return ended, await me.chunks(3)

    async def other(me):
        await me.open()
        return await me.chunks(6)

    async def both():
        return await asyncio.gather(asyncio.to_thread(visit, port, script), asyncio.to_thread(visit, port, other))

    (ended, chunks), others = asyncio.run(both())
    assert ended["reason"] == "fault" and said in ended["message"] and len(chunks) == 3 and len(others) == 6
    assert len(tracebacks()) == (fault is RuntimeError)


@pytest.mark.parametrize("last_words", ["close", "open", "nothing"])
def test_who_leaves_leaves_no_traceback(port, serve, tracebacks, last_words):  # noqa: F811
    """Even with a chunk on its way: it cannot be sent, and then nothing else can."""

    async def leave(seconds: float):
        line = await connect(f"ws://127.0.0.1:{port}/v1/live", max_size=None)
        me = Visitor(line)
        await me.next()
        await me.open()
        await me.chunks(1)
        await asyncio.sleep(seconds)
        if last_words != "nothing":
            await me.send(last_words, prompt=PROMPT)
        await line.close()

    for seconds in (0, 0.03, 0.06):
        asyncio.run(leave(seconds))
    assert not tracebacks()


def test_who_leaves_before_the_first_receipt_leaves_nothing(serve, tracebacks, monkeypatch):  # noqa: F811
    port = serve()
    say = Connection.say

    async def gone(connection, kind, **values):
        if kind == "ack":
            raise Gone
        await say(connection, kind, **values)

    async def script(me):
        await me.send("open", prompt=PROMPT)
        with pytest.raises(ConnectionClosed):
            await me.next()

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "say", gone)
        visit(port, script)
    assert until(lambda: not serve.live.connections) and not serve.live.pool.workers[0].sessions
    assert not tracebacks()


def test_a_late_word_for_a_stream_that_is_gone_makes_none(serve):  # noqa: F811
    """`shown` of a client whose worker has just been replaced, for one."""
    port = serve()

    async def script(me):
        await me.open()
        await me.chunks(1)
        worker, before = serve.live.pool.workers[0], streams()
        for number in range(1000, 1100):
            worker.send("control", number, Control("shown", take=1, frame=9))
        await me.chunks(2)
        return streams() - before

    def streams() -> int:
        return sum(type(thing) is Stream for thing in gc.get_objects())

    assert visit(port, script) <= 0


def test_cycles_of_connecting_playing_and_leaving_leave_nothing(serve):  # noqa: F811
    port = serve(visitors=2)
    worker = serve.live.pool.workers[0]

    async def cycles(count: int) -> None:
        for i in range(count):
            async with connect(f"ws://127.0.0.1:{port}/v1/live", max_size=None) as line:
                me = Visitor(line)
                await me.next()
                await me.open(seed=i)
                await me.chunks(1)
                await me.send("branch", chunk=0, prompt=OTHER)

    def held() -> tuple[int, int, int]:
        assert until(lambda: not worker.sessions and not serve.live.connections)
        gc.collect()
        sessions = sum(type(thing) is StreamSession for thing in gc.get_objects())
        return len(os.listdir("/proc/self/fd")), threading.active_count(), sessions

    asyncio.run(cycles(5))
    before = held()
    asyncio.run(cycles(25))
    # descriptors, threads, sessions: sockets and threads may close after the connections have ended
    assert until(lambda: all(b <= a + 1 for a, b in zip(before, held(), strict=True))), (before, held())


def test_many_controls_cost_the_model_as_much_as_one(port, monkeypatch):
    """The newest of each kind counts at the next chunk; all get their receipts, and too many an error."""
    said, begun, make, play = [], [], StreamSession.set_prompt, StreamSession.play
    monkeypatch.setattr(StreamSession, "set_prompt", lambda self, *args: (said.append(args), make(self, *args))[1])
    gate = threading.Event()
    gate.set()

    def noted(session, *args):
        begun.append(args)
        assert gate.wait(100)
        return play(session, *args)

    monkeypatch.setattr(StreamSession, "play", noted)

    async def script(me):
        await me.open()
        await me.chunks(1)
        await me.until("applied", id=await me.send("pause"))
        ids = [await me.send("set_prompt", prompt=f"{OTHER} {i}") for i in range(70)]
        await me.until("error", id=ids[-1])
        await me.send("resume")
        errors = {m["id"] for m in me.heard if m.get("type") == "error"}
        assert len(errors) == 6 and "64 controls wait" in me.heard[-1]["message"]
        applied = [await me.until("applied") for _ in range(65)]
        assert [m["id"] for m in applied[:64]] == ids[:64] and len({m["chunk"] for m in applied}) == 1
        before = len(begun)
        gate.clear()
        ids = [await me.send("branch", chunk=0, seed=i) for i in range(60)]  # fewer than may wait
        await me.until("ack", id=ids[-1])
        gate.set()
        await me.until("take", id=ids[-1])
        (made,) = await me.chunks(1)
        return made, len(begun) - before

    made, takes = visit(port, script)
    assert len(said) == 1 and said[0][0] == f"{OTHER} 63"
    assert made["seed"] == 59 and takes < 40, "those that were overtaken have not begun"


def test_who_has_just_come_goes_before_those_with_a_reserve(port, monkeypatch):
    """A recorder takes chunks as fast as they are made, until a player comes that has nothing yet."""
    turns, make = [], WorkerProcess._make

    def noted(worker, turn):
        turns.append(turn.number)
        make(worker, turn)

    async def script(recorder):
        await recorder.open(seconds=600)
        await recorder.chunks(40)  # half a minute of reserve
        reading = asyncio.create_task(read(recorder))
        async with connect(f"ws://127.0.0.1:{port}/v1/live", max_size=None) as line:
            me = Visitor(line)
            await me.next()
            await me.open()
            await me.chunks(4)
        reading.cancel()

    async def read(recorder):
        while True:
            await recorder.chunks(1)

    monkeypatch.setattr(WorkerProcess, "_make", noted)
    visit(port, script)
    player = max(turns)
    first = turns.index(player)
    assert first >= 40 and turns[first : first + 4] == [player] * 4


def test_a_take_that_was_broken_off_before_its_first_chunk_can_be_gone_back_to(port, monkeypatch):
    """Its chunk is made as it would have been: the second of two branches goes on from the first."""
    begin = Stream._begin_take

    def slowly(stream):
        seed = stream._asked_for[0].seed
        begun = begin(stream)
        if seed == 7:
            time.sleep(1)  # the client hears of the take, and asks for the next one
        return begun

    monkeypatch.setattr(Stream, "_begin_take", slowly)

    async def script(me):
        await me.open()
        await me.chunks(2)
        await me.until("take", id=await me.send("branch", chunk=0, seed=7))
        answer = await me.until("take", "error", id=await me.send("branch", chunk=0, prompt=OTHER))
        return answer, (await me.chunks(1))[0]

    take, chunk = visit(port, script)
    assert take["type"] == "take" and take["parent"] == 2, take
    assert (chunk["take"], chunk["chunk"], chunk["seed"], chunk["prompt"]) == (3, 0, 7, OTHER)
