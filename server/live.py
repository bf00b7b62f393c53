"""The live protocol over WebSockets: messages in, video out, never more than the client has shown.

Nothing here runs the model: a connection checks what its client says, and passes it to the worker of its stream.
docs/live-protocol.md describes the messages.
"""

import asyncio
import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response, WebSocket, WebSocketDisconnect

from configs.errors import UserError
from server.access import NOBODY
from server.controls import Control, MessageError, Reader
from server.errors import ApiError
from server.limits import MAX_MESSAGE, Limits
from server.worker_messages import Video
from server.workers import Refused, WorkerPool, WorkerSession
from utils.logs import get_logger
from utils.pictures import read_picture

log = get_logger(__name__)
PROTOCOL = 1
IMAGE = "/v1/live/{session}/image"
NORMAL, NO_TEXT, POLICY, TOO_BIG, TRY_LATER = 1000, 1003, 1008, 1009, 1013  # close codes
RATE, BURST = 200, 400  # messages a second that are read of a connection, and at once
MAX_ERRORS = 1000  # messages without sense that are answered before the line is cut


class Gone(Exception):
    """The client has left, or did not read for so long that the connection was cut (server/protocols.py)."""


class Closed(Exception):
    """The server closes the connection with this code and reason."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code, self.reason = code, reason


@contextmanager
def gone_if_closed() -> Iterator[None]:
    """Around calls of a WebSocket: Gone in place of what Starlette and uvicorn raise for one that is closed."""
    try:
        yield
    except (WebSocketDisconnect, RuntimeError, OSError) as error:
        raise Gone from error


class LiveServer:
    """All connections, by their names. Who may come in is for the application's middleware to say."""

    def __init__(self, pool: WorkerPool, limits: Limits):
        self.pool, self.limits = pool, limits
        self.reader = Reader(pool.config, limits.max_seconds)
        self.connections: dict[str, Connection] = {}
        self.uploads: set[str] = set()  # connections whose picture is on its way
        self.decoding = asyncio.Lock()  # one picture is unpacked at a time

    def router(self) -> APIRouter:
        """The routes of the protocol."""
        router = APIRouter()
        router.add_api_websocket_route("/v1/live", self.live)
        router.add_api_route(IMAGE, self.image, methods=["POST"], status_code=204, include_in_schema=False)
        return router

    async def live(self, socket: WebSocket) -> None:
        """One connection, from its beginning to its end. `state.owner`: whose it is, where there are keys."""
        owner = socket.scope.get("state", {}).get("owner", NOBODY)
        with suppress(Gone):
            with gone_if_closed():
                await socket.accept()
                if len(self.connections) >= self.limits.visitors:
                    text = f"{self.limits.visitors} visitors are here already; try again later"
                    return await socket.close(TRY_LATER, text)
                own = sum(connection.owner == owner for connection in self.connections.values())
                if owner != NOBODY and own >= self.limits.streams_per_key:
                    text = f"this key has {own} live streams; close one, or try again later"
                    return await socket.close(TRY_LATER, text)
                if self.pool.about is None:
                    return await socket.close(TRY_LATER, "the model is being loaded; try again in a moment")
            name = secrets.token_urlsafe(16)
            connection = self.connections[name] = Connection(socket, self, name, owner)
            try:
                await connection.run()
            finally:
                del self.connections[name]

    async def image(self, session: str, request: Request) -> Response:
        """Keep the picture that was sent for the videos of a connection."""
        connection = self.connections.get(session)
        if connection is None:
            raise ApiError(404, "there is no such session; it lasts as long as its connection")
        with self._upload(session):
            content = await request.body()  # bounded by the application's middleware
            async with self.decoding:
                try:
                    size = self.pool.config.video.height, self.pool.config.video.width
                    connection.picture = await asyncio.to_thread(read_picture, content, size)
                except UserError as error:
                    raise ApiError(422, str(error), param="image", code="invalid_image") from error
        return Response(status_code=204)

    @contextmanager
    def _upload(self, session: str) -> Iterator[None]:
        """One a connection, and no more than there may be connections, whether or not those are still here."""
        if session in self.uploads or len(self.uploads) >= self.limits.visitors:
            raise ApiError(429, "another picture is still on its way; wait until it is there")
        self.uploads.add(session)
        try:
            yield
        finally:
            self.uploads.remove(session)


class Connection:
    """One client. Two tasks: what it says, and what its stream sends."""

    def __init__(self, socket: WebSocket, server: LiveServer, name: str, owner: str):
        self.socket, self.server, self.name, self.owner = socket, server, name, owner
        self.picture: np.ndarray | None = None  # uint8 [H, W, 3], what was uploaded last
        self.session: WorkerSession | None = None
        self._sending: asyncio.Task | None = None
        self._take, self._sent = 0, 0  # the newest take, and its frames that have gone out
        self._errors = 0
        self._next = 0.0  # when a message may be read, had none been saved up

    async def run(self) -> None:
        """Until the client goes (Gone, or a return), is idle for too long, or sends too much that makes no sense."""
        try:
            hello = self.server.pool.about["hello"]
            await self.say("hello", protocol=PROTOCOL, session=self.name, **hello)
            while (text := await self._receive()) is not None:
                await self._answer(text)
        except Closed as error:
            with gone_if_closed():
                await self.socket.close(error.code, error.reason)
        finally:
            if self.session:
                self.session.close()
                if self._sending:
                    await asyncio.wait([self._sending])

    async def _receive(self) -> str | None:
        """The next text, no sooner than RATE allows; None where the client has closed."""
        now = asyncio.get_running_loop().time()
        self._next = max(self._next, now - BURST / RATE) + 1 / RATE
        await asyncio.sleep(max(0.0, self._next - now))
        seconds = self.server.limits.idle_seconds
        try:
            message = await asyncio.wait_for(self.socket.receive(), seconds)
        except TimeoutError:
            text = f"idle for {seconds:g} s: closed; connect again to go on"
            await self.say("ended", reason="idle", message=text)
            raise Closed(POLICY, "idle") from None
        if message["type"] == "websocket.disconnect":
            return None
        if message.get("text") is None:
            raise Closed(NO_TEXT, "messages are text; send JSON")
        if len(message["text"]) > MAX_MESSAGE:
            raise Closed(TOO_BIG, f"a message has at most {MAX_MESSAGE:,} bytes")
        return message["text"]

    async def _answer(self, text: str) -> None:
        try:
            await self._act(self.server.reader.read(text))
        except MessageError as error:
            await self._error(error.id, str(error))

    async def _error(self, id: int | None, sentence: str) -> None:
        await self.say("error", id=id, message=sentence)
        self._errors += 1
        if self._errors >= MAX_ERRORS:
            raise Closed(POLICY, "too many messages without sense")

    async def _act(self, control: Control) -> None:
        match control.type:
            case "shown":
                if self.session and not self.session.lost and control.take == self._take:
                    self.session.control(replace(control, frame=min(control.frame, self._sent)))
            case "describe":
                await self._refusable(control, self._describe)
            case "close":
                await self.say("ack", id=control.id)
                raise Closed(NORMAL, "closed")
            case _:
                if control.image:
                    if self.picture is None:
                        raise MessageError("image=true, but no picture was uploaded; send one first", control.id)
                    control = replace(control, image=self.picture)
                elif control.image is not None:
                    control = replace(control, image=None)
                await self._refusable(control, self._pass_on)

    async def _refusable(self, control: Control, act: Callable) -> None:
        """Do it, or say why the workers cannot."""
        try:
            await act(control)
        except Refused as error:
            if control.type == "open":
                await self.say("refused", id=control.id, reason=error.reason, retry_after=error.retry_after)
            else:
                await self.say("error", id=control.id, message=error.reason)

    async def _describe(self, control: Control) -> None:
        await self.say("schedule", id=control.id, **self.server.pool.describe(control.schedule))

    async def _pass_on(self, control: Control) -> None:
        """To the worker; the receipt that it was understood goes out before anything that the worker has to say."""
        if self.session is None or self.session.lost:
            if control.type != "open":
                raise MessageError("nothing has been opened; send open first", control.id)
            self.session = self.server.pool.open(control)
            await self._acknowledge(control)
            self._sending = asyncio.create_task(self._send(self.session))
        else:
            self.session.control(control)
            await self._acknowledge(control)

    async def _acknowledge(self, control: Control) -> None:
        await self.say("ack", id=control.id)

    async def _send(self, session: WorkerSession) -> None:
        """What the stream sends, to the client, until either is at its end."""
        with suppress(Gone):
            async for item in session:
                if isinstance(item, Video):
                    head = json.dumps(item.header).encode()
                    with gone_if_closed():
                        await self.socket.send_bytes(len(head).to_bytes(4, "little") + head + item.payload)
                    self._sent = item.header["frame"] + item.header["frames"]
                    continue
                if item["type"] == "take":
                    self._take, self._sent = item["take"], item["frame"]
                with gone_if_closed():
                    await self.socket.send_text(json.dumps(item))

    async def say(self, kind: str, **values: Any) -> None:
        with gone_if_closed():
            await self.socket.send_text(json.dumps({"type": kind, **values}))
