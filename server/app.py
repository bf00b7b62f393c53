"""The demo's server: a page, a WebSocket, two downloads and one upload.

No path or address that a visitor names is ever opened; a picture that one sends is decoded in memory, within limits.
"""

import asyncio
import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.staticfiles import StaticFiles

from configs.errors import UserError
from configs.schema import CONTEXTS, SWITCHES
from pipeline.diagonal import DiagonalPipeline
from server.messages import MAX_PROMPT, MAX_SEED, bounds
from server.player import Lobby, Player
from server.visit import POLICY, Visit
from utils.pictures import read_picture
from utils.prompts import read_prompts

STATIC = Path(__file__).parent / "static"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
# Of uvicorn. JPEGs get no smaller by compression, and trying takes longer than an H100 takes to make them.
SOCKET = {"ws": "websockets-sansio", "ws_per_message_deflate": False}
MEDIA = {"mp4": "video/mp4", "json": "application/json"}
TRY_LATER = 1013  # close code
MAX_UPLOAD = 8 * 2**20  # bytes of a picture
UPLOAD_SECONDS = 30.0  # that one may take to arrive


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one visitor may use."""

    visitors: int = 8  # at once
    max_seconds: float = 600.0  # of one video
    idle_seconds: float = 600.0  # without a message before the line is closed
    ahead_seconds: float = 3.0  # of video that is sent before it is shown
    rewind_bytes: int = 256 * 2**20  # of host memory for one visitor's snapshots


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_access(host: str, token: str | None) -> None:
    """Refuse to be open to a network without a token."""
    if not is_loopback(host) and not token:
        raise UserError(f"--host={host} can be reached from other machines; give --token TEXT, or use 127.0.0.1")
    if token is not None and len(token) < 8:
        raise UserError(f"--token has {len(token)} characters, which is easy to guess; give at least 8")


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket; UserError where the port is taken or the address is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else "no such port"
        raise UserError(f"--port={port} on {host} cannot be used ({reason}); give another --port or --host") from error
    return listener


class Door:
    """Who may come in."""

    def __init__(self, token: str | None, local: bool):
        self.token, self.local = token, local

    def refusal(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str | None:
        """None for who may, else a sentence that says why not."""
        host = urlsplit(f"//{headers.get('host', '')}")
        if self.local and host.hostname not in LOOPBACK:
            return f"host={str(host.hostname)[:60]} is not this machine; open the page as localhost"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host.netloc:
            return "another site's page may not use this server; open its own page"
        if self.token is not None and not hmac.compare_digest(query.get("token", "").encode(), self.token.encode()):
            return "token is wrong or missing; open the address that was printed when the server started"
        return None


def make_app(
    pipe: DiagonalPipeline,
    *,
    warm: bool = False,
    token: str | None = None,
    local: bool = True,
    limits: Limits | None = None,
) -> FastAPI:
    """The application.

    warm: play a clip first, so that the first visitor does not wait for compiling and CUDA graphs. local: only names of
    this machine are answered to, which keeps other sites' scripts out.
    """
    limits, door = limits or Limits(), Door(token, local)
    lobby = Lobby(pipe, limits.rewind_bytes, warm)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    decoding = asyncio.Lock()  # one picture at a time is unpacked
    players = app.state.players = lobby.players

    @app.middleware("http")
    async def guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        free = request.url.path.startswith("/static/")  # holds nothing but the page's own files
        reason = None if free else door.refusal(request.headers, request.query_params)
        response = await go_on(request) if reason is None else Response(reason, 403, media_type="text/plain")
        response.headers.update(HEADERS)
        return response

    @app.get("/")
    async def page() -> Response:
        return Response((STATIC / "index.html").read_bytes(), media_type="text/html; charset=utf-8")

    @app.get("/clip/{visitor}.{kind}")
    async def clip(visitor: str, kind: str) -> Response:
        if visitor not in players or kind not in MEDIA:
            raise HTTPException(404, "there is no such clip; it lasts as long as its page is open")
        return await download(players[visitor], kind)

    @app.post("/image/{visitor}")
    async def image(visitor: str, request: Request) -> Response:
        if visitor not in players:
            raise HTTPException(404, "there is no such visitor; reload the page")
        await take_picture(players[visitor], request, decoding)
        return Response(status_code=204)

    @app.websocket("/stream")
    async def stream(line: WebSocket) -> None:
        reason = door.refusal(line.headers, line.query_params)
        await line.accept()
        if reason is not None:
            await line.close(POLICY, reason[:120])
            return
        if len(players) >= limits.visitors:
            await line.close(TRY_LATER, f"{limits.visitors} visitors are here already; try again later")
            return
        with lobby.visitor() as (name, player):
            await line.send_text(json.dumps(hello(pipe, name, limits)))
            await Visit(line, player, lobby.worker, limits).run()

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
    """What was sent; refused as soon as it is too much or takes too long."""
    content = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > MAX_UPLOAD:
                    raise HTTPException(413, f"image has more than {MAX_UPLOAD:,} bytes; make it smaller")
    except TimeoutError as error:
        raise HTTPException(408, f"image took more than {UPLOAD_SECONDS:g} s to arrive; make it smaller") from error
    return bytes(content)


async def download(player: Player, kind: str) -> Response:
    """What `player` made, as a file: its video, or how it was made."""
    try:
        if kind == "json":
            content = json.dumps(player.record(), indent=2).encode()
        else:
            content = await asyncio.to_thread(player.video)
    except UserError as error:
        raise HTTPException(409, str(error)) from error
    headers = {"Content-Disposition": f'attachment; filename="diagonal.{kind}"'}
    return Response(content, media_type=MEDIA[kind], headers=headers)


def hello(pipe: DiagonalPipeline, name: str, limits: Limits) -> dict:
    """What a page needs to know before anything is played."""
    config = pipe.config
    rows = pipe.schedule.rows
    most_steps, most_rows = bounds(pipe.schedule)
    return {
        "type": "hello",
        "visitor": name,
        "model": config.name,
        "device": str(pipe.session.device),
        "fps": config.video.fps,
        "height": config.video.height,
        "width": config.video.width,
        "steps": [len(row) for row in rows],
        "context": pipe.schedule.policy,
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
