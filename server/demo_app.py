"""The demo's server: a page, a WebSocket, two downloads and one upload, all bounded in number, bytes and time.

No path or address that a visitor names is ever opened; a picture that one sends is decoded in memory, within limits.
"""

import asyncio
import hmac
import io
import ipaddress
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from fastapi import FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.staticfiles import StaticFiles

from configs.errors import UserError
from configs.schema import CONTEXTS, SWITCHES
from pipeline.diagonal import DiagonalPipeline
from server.connection import POLICY, Connection, Gone, gone_if_closed
from server.messages import MAX_PROMPT, MAX_SEED, bounds
from server.player import Player, SessionManager
from server.protocols import HTTPProtocol, WebSocketProtocol
from utils.pictures import read_picture
from utils.prompts import read_prompts

STATIC = Path(__file__).parent / "static"
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")  # name and port, in small letters
ANY_ADDRESS = ("0.0.0.0", "::", "")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
# Of uvicorn. JPEGs get no smaller by compression, and trying takes longer than an H100 takes to make them.
SOCKET = {"http": HTTPProtocol, "ws": WebSocketProtocol, "ws_per_message_deflate": False}
MEDIA = {"mp4": "video/mp4", "json": "application/json"}
TRY_LATER = 1013  # close code
MAX_UPLOAD = 8 * 2**20  # bytes of a picture
UPLOAD_SECONDS = 30.0  # that one may take to arrive
PIECE = 2**18  # bytes of a download that are handed over at once


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one visitor may use; each field is an option of demo.py, or fixed."""

    visitors: int = 8  # at once
    max_seconds: float = 600.0  # of one video
    idle_seconds: float = 600.0  # without a message before the line is closed
    ahead_seconds: float = 3.0  # of video that is sent before it is shown
    rewind_bytes: int = 256 * 2**20  # of host memory for one visitor's snapshots

    def __post_init__(self):
        for name, low, high in (("visitors", 1, 1000), ("max_seconds", 1, 86_400), ("idle_seconds", 0.1, 86_400)):
            value = vars(self)[name]
            if not low <= value <= high:
                raise UserError(f"--{name}={value} is out of range; give a number from {low:g} to {high:g}")


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_access(host: str, token: str | None, origins: Sequence[str] = ()) -> None:
    """Refuse to be open to a network without a token. origins: addresses at which a proxy shows the page."""
    if not is_loopback(host) and not token:
        raise UserError(f"--host={host} can be reached from other machines; give --token TEXT, or use 127.0.0.1")
    if token is not None and len(token) < 8:
        raise UserError(f"--token has {len(token)} characters, which is easy to guess; give at least 8")
    if token is not None and not token.isprintable():
        raise UserError("--token has characters that cannot be printed; give letters and digits")
    for origin in origins:
        scheme, _, place = origin.partition("://")
        if scheme not in ("http", "https") or not HOST.fullmatch(place):
            raise UserError(f"--allow_origin={origin} is no origin; give scheme and host only, https://demo.example.org")
        if not token:
            raise UserError(f"--allow_origin={origin} can be reached from other machines; give --token TEXT as well")


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket; UserError where the port is taken or the address is not ours."""
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # two sockets may be bound to one port as long as neither listens
    except (OSError, OverflowError, TypeError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else "no such port or host"
        raise UserError(f"--port={port} on {host} cannot be used ({reason}); give another --port or --host") from error
    return listener


def address(host: str, port: int, token: str | None) -> str:
    """What to open in a browser."""
    host = host.strip("[]")
    name = "localhost" if host in ANY_ADDRESS else f"[{host}]" if ":" in host else host
    query = "?token=" + quote(token, safe="") if token else ""
    return f"http://{name}:{port}/{query}"


class AccessPolicy:
    """Who may come in.

    The token is asked for, and a page may use the server only from the server's own address: by the Host header, by
    `origins`, or behind a proxy that keeps the token's secret, by X-Forwarded-Host, which no other site's page can set.
    local: only names of this machine are answered to, and those of `origins`.
    """

    def __init__(self, token: str | None, local: bool, origins: Sequence[str] = ()):
        self.token, self.local, self.origins = token, local, frozenset(origins)
        self.names = {origin.partition("://")[2] for origin in origins}

    def refusal(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str | None:
        """None for who may, else a sentence that says why not."""
        host = headers.get("host", "").lower()
        name = HOST.fullmatch(host)
        if name is None:
            return "Host is malformed; open the address that was printed when the server started"
        if self.local and not is_loopback(name[1]) and host not in self.names:
            return f"host={name[1][:60]} is not this machine; open the page as localhost, or see --allow_origin"
        if self.token is not None and not hmac.compare_digest(query.get("token", "").encode(), self.token.encode()):
            return "token is wrong or missing; open the address that was printed when the server started"
        origin = headers.get("origin")
        if origin is not None and not self._own(origin.lower(), host, headers.get("x-forwarded-host", "")):
            return "another site's page may not use this server; open its own page, or start it with --allow_origin"
        return None

    def _own(self, origin: str, host: str, forwarded: str) -> bool:
        """Whether `origin` is that of this server's page."""
        place = origin.partition("://")[2]
        names = {host} if self.token is None else {host, *(name.strip() for name in forwarded.lower().split(","))}
        return origin in self.origins or (HOST.fullmatch(place) is not None and place in names)


class Uploads:
    """Uploads that have not arrived: one a visitor, and no more than there may be visitors."""

    def __init__(self, most: int):
        self.most, self.running = most, set()

    @contextmanager
    def one(self, visitor: str) -> Iterator[None]:
        """An upload of `visitor`; refused where another one is under way."""
        if visitor in self.running or len(self.running) >= self.most:
            raise HTTPException(429, "another picture is still on its way; wait until it is there")
        self.running.add(visitor)
        try:
            yield
        finally:
            self.running.remove(visitor)


def make_app(
    pipe: DiagonalPipeline,
    *,
    warm: bool = False,
    token: str | None = None,
    local: bool = True,
    origins: Sequence[str] = (),
    limits: Limits | None = None,
) -> FastAPI:
    """The application.

    warm: play a clip first, so that the first visitor does not wait for compiling and CUDA graphs. token, local,
    origins: see Door.
    """
    limits, door = limits or Limits(), AccessPolicy(token, local, origins)
    lobby = SessionManager(pipe, limits.rewind_bytes, warm)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    uploads = Uploads(limits.visitors)
    decoding, encoding = asyncio.Lock(), asyncio.Lock()  # one picture is unpacked, one video packed at a time
    players = app.state.players = lobby.players

    @app.middleware("http")
    async def guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        free = request.scope["path"].startswith("/static/")  # holds nothing but the page's own files
        reason = None if free else door.refusal(request.headers, request.query_params)
        response = await go_on(request) if reason is None else Response(reason, 403, media_type="text/plain")
        response.headers.update(HEADERS)
        return response

    @app.get("/")
    async def page() -> Response:
        return Response((STATIC / "index.html").read_bytes(), media_type="text/html; charset=utf-8")

    @app.get("/clip/{visitor}.{kind}")
    async def clip(visitor: str, kind: str, take: int | None = None) -> Response:
        if visitor not in players or kind not in MEDIA:
            raise HTTPException(404, "there is no such clip; it lasts as long as its page is open")
        return await download(players[visitor], kind, take, encoding)

    @app.post("/image/{visitor}")
    async def image(visitor: str, request: Request) -> Response:
        if visitor not in players:
            raise HTTPException(404, "there is no such visitor; reload the page")
        with uploads.one(visitor):
            await take_picture(players[visitor], request, decoding)
        return Response(status_code=204)

    @app.websocket("/stream")
    async def stream(line: WebSocket) -> None:
        reason = door.refusal(line.headers, line.query_params)
        with suppress(Gone):
            with gone_if_closed():
                await line.accept()
                if reason is not None:
                    return await line.close(POLICY, reason[:120])
                if len(players) >= limits.visitors:
                    return await line.close(TRY_LATER, f"{limits.visitors} visitors are here already; try again later")
            with lobby.visitor() as (name, player):
                await Connection(line, player, lobby.worker, limits).run(hello(pipe, name, limits))

    app.mount("/static", StaticFiles(directory=STATIC))
    return app


async def take_picture(player: Player, request: Request, decoding: asyncio.Lock) -> None:
    """Keep the picture that was sent for the videos of `player`. decoding: held while one is unpacked."""
    content, video = await body(request), player.pipe.config.video
    async with decoding:
        try:
            player.image = await asyncio.to_thread(read_picture, content, (video.height, video.width))
        except UserError as error:
            raise HTTPException(422, str(error)) from error


async def body(request: Request) -> bytes:
    """What was sent; refused as soon as it is too much, takes too long, or is broken off."""
    content, more = io.BytesIO(), True  # gives its bytes without a copy
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise HTTPException(400, "image was broken off; send it again")
                content.write(message.get("body", b""))
                more = message.get("more_body", False)
                if content.tell() > MAX_UPLOAD:
                    raise HTTPException(413, f"image has more than {MAX_UPLOAD:,} bytes; make it smaller")
    except TimeoutError as error:
        raise HTTPException(408, f"image took more than {UPLOAD_SECONDS:g} s to arrive; make it smaller") from error
    return content.getvalue()


async def download(player: Player, kind: str, take: int | None, encoding: asyncio.Lock) -> Response:
    """What `player` made, as a file: a take's video, or how it was made. encoding: held while a video is packed."""
    try:
        if kind == "json":
            content = json.dumps(player.record(take), indent=2).encode()
        else:
            async with encoding:
                content = await asyncio.to_thread(player.video, take)
    except UserError as error:
        raise HTTPException(409, str(error)) from error
    headers = {"Content-Disposition": f'attachment; filename="diagonal.{kind}"', "Content-Length": str(len(content))}
    return StreamingResponse(pieces(content), media_type=MEDIA[kind], headers=headers)


async def pieces(content: bytes) -> AsyncIterator[memoryview]:
    """`content` in parts, each of which has its own deadline to be read."""
    for first in range(0, len(content), PIECE):
        yield memoryview(content)[first : first + PIECE]


def hello(pipe: DiagonalPipeline, name: str, limits: Limits) -> dict:
    """What a page needs to know before anything is played."""
    config = pipe.config
    rows = pipe.schedule.timesteps_by_chunk
    most_steps, most_rows = bounds(pipe.schedule)
    return {
        "visitor": name,
        "model": config.name,
        "device": str(pipe.session.device),
        "fps": config.video.fps,
        "height": config.video.height,
        "width": config.video.width,
        "steps": [len(row) for row in rows],
        "context": pipe.schedule.default_context,
        "switch": config.stream.switch,
        "contexts": CONTEXTS,
        "switches": SWITCHES,
        "max_steps": most_steps,
        "max_rows": most_rows,
        "max_seed": MAX_SEED,
        "max_prompt": MAX_PROMPT,
        "max_seconds": limits.max_seconds,
        "max_upload": MAX_UPLOAD,
        "image": config.model.codec != "taehv",
        "trained_image_start": bool(pipe.card.get("trained_image_start")),
        "examples": _examples(config.inference.prompts),
    }


def _examples(path: str) -> list[str]:
    """A few prompts to begin with, from the configuration's own file."""
    try:
        return read_prompts(path)[:8]
    except UserError:
        return ["a red circle moves right"]
