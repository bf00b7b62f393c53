"""What the tests of the live server share: a server whose workers are threads of the test, and clients for it.

Import `pipe` and `serve` as fixtures. Workers as processes of their own are tested in test_workers.py.
"""

import asyncio
import json
import os
import socket
import threading
import time
from concurrent.futures import Future

import pytest
import uvicorn
from fastapi import FastAPI
from websockets.asyncio.client import connect

from pipeline import DiagonalPipeline
from server.errors import add_handlers
from server.limits import MAX_MESSAGE, MAX_UPLOAD, Limits
from server.live import IMAGE, LiveServer
from server.middleware import BoundedBodies
from server.protocols import HTTPProtocol, WebSocketProtocol
from server.worker_messages import ModelSource
from server.worker_process import run
from server.workers import Worker, WorkerPool

PROMPT, OTHER = "a red circle moves right", "a blue square moves up"
STREAMS = 64  # on a machine whose speed is not the test's concern


class ThreadedWorker(threading.Thread):
    """Stands for a worker's process."""

    pid, exitcode = None, 0

    def kill(self) -> None:
        raise AssertionError("the worker did not stop by itself")


@pytest.fixture(scope="module")
def pipe(tiny_assets):
    return DiagonalPipeline.from_config(tiny_assets / "tiny.yaml")


@pytest.fixture(scope="module")
def serve(pipe, tiny_assets):
    """`serve(**of Limits) -> port`; all are stopped in the end. `serve.live` is the newest LiveServer."""
    running = []

    class Source(ModelSource):
        def load(self, rank: int) -> DiagonalPipeline:
            return pipe

    def start(**limits) -> int:
        patch = pytest.MonkeyPatch()
        patch.setattr(Worker, "_spawn", spawn_thread)
        given = Limits(**{"streams": STREAMS, "visitors": STREAMS} | limits)
        pool = WorkerPool(Source(str(tiny_assets / "tiny.yaml")), 1, given)
        start.live = live = LiveServer(pool, given)
        app = FastAPI()
        add_handlers(app)
        app.add_middleware(BoundedBodies, large={IMAGE.format(session="[^/]+"): MAX_UPLOAD})
        app.include_router(live.router())
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                port=0,
                log_config=None,
                log_level="error",
                timeout_graceful_shutdown=1,
                http=HTTPProtocol,
                ws=WebSocketProtocol,
                ws_per_message_deflate=False,
                ws_max_size=MAX_MESSAGE,
                ws_max_queue=16,
            )  # fmt: skip
        )

        async def serving() -> None:
            await pool.start()
            await server.serve()
            await pool.stop()

        ended = Future()

        def run_server() -> None:
            try:
                ended.set_result(asyncio.run(serving()))
            except BaseException as error:
                ended.set_exception(error)

        threading.Thread(target=run_server, daemon=True).start()
        running.append((server, ended))
        while not server.started:
            assert not ended.done(), ended.exception()
            time.sleep(0.01)
        patch.undo()
        start.server = server
        return server.servers[0].sockets[0].getsockname()[1]

    yield start
    for server, _ in running:
        server.should_exit = True
    for _, ended in running:
        ended.result(120)


def spawn_thread(worker: Worker, line) -> ThreadedWorker:
    theirs = os.dup(line.fileno())  # which the front closes
    arguments = (type(line)(theirs), worker.pool.source, worker.number, worker.pool.limits, os.getppid())
    thread = ThreadedWorker(target=run_in_thread, args=arguments, daemon=True)
    thread.start()
    return thread


def run_in_thread(*arguments) -> None:
    """A worker without what only a process's main thread may do."""
    patch = pytest.MonkeyPatch()
    patch.setattr("server.worker_process.signal.signal", lambda *ignored: None)
    patch.setattr("server.worker_process.console", lambda **ignored: None)
    run(*arguments)
    with socket.socket(fileno=os.dup(arguments[0].fileno())) as line:
        line.shutdown(socket.SHUT_RDWR)  # as a process's end does


class Visitor:
    """A client that says what a test tells it to, frame by frame of the protocol."""

    def __init__(self, line):
        self.line, self.heard, self.ids = line, [], 0
        self.auto_shown = True

    async def send(self, type: str, **fields) -> int:
        self.ids += 1
        await self.line.send(json.dumps({"type": type, "id": self.ids} | fields))
        return self.ids

    async def next(self) -> dict:
        """The next message; of a binary one the header, with its `parts`. What is video counts as shown at once."""
        data = await asyncio.wait_for(self.line.recv(), 120)
        message = json.loads(data) if isinstance(data, str) else self.video(data)
        if "kind" in message and self.auto_shown:
            end = message["frame"] + message["frames"]
            await self.line.send(json.dumps({"type": "shown", "take": message["take"], "frame": end}))
        self.heard.append(message)
        return message

    async def until(self, *kinds: str, id: int | None = None) -> dict:
        """The next message of one of these types (of video: `init`, `fragment`, `jpeg`), for a control by its id."""
        while True:
            message = await self.next()
            if message.get("type", message.get("kind")) in kinds and (id is None or message.get("id") == id):
                return message

    @staticmethod
    def video(data: bytes) -> dict:
        size = int.from_bytes(data[:4], "little")
        head, at, parts = json.loads(data[4 : 4 + size]), 4 + size, []
        for n in head["sizes"]:
            parts.append(data[at : at + n])
            at += n
        assert at == len(data)
        return head | {"parts": parts}

    async def open(self, **fields) -> dict:
        """The `take` message."""
        id = await self.send("open", **{"prompt": PROMPT, "seed": 1, "schedule": {"steps": [2, 1]}} | fields)
        return await self.until("take", "error", "refused", id=id)

    async def chunks(self, n: int) -> list[dict]:
        return [await self.until("fragment", "jpeg") for _ in range(n)]


def visit(port: int, script):
    """What the coroutine function `script(visitor)` returns."""

    async def one():
        async with connect(f"ws://127.0.0.1:{port}/v1/live", max_size=None) as line:
            me = Visitor(line)
            me.hello = await me.next()
            return await script(me)

    return asyncio.run(one())
