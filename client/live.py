"""One live stream: controls out, chunks of video in."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI

PROTOCOL = 1
NEW_TAKES = ("open", "seek", "branch", "set_image")  # controls that begin a take
MAX_FRAME = 2**28  # bytes of one binary frame that is read


class LiveError(Exception):
    """The server could not do what it was asked for, or cannot be reached; the message is its sentence."""


class Refused(LiveError):
    """No room for the stream at its rate. retry_after: seconds after which to try again."""

    def __init__(self, reason: str, retry_after: float):
        super().__init__(reason)
        self.retry_after = retry_after


class StreamEnded(LiveError):
    """The stream broke off. reason: `fault`, `worker` or `idle`, or `closed` where the connection did."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Place:
    """From which chunk and frame on a control shows. warnings: what of a new prompt the model does not see."""

    take: int
    chunk: int
    frame: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Receipt:
    """A control that the server has understood. `await receipt.applied`: from where on it shows; LiveError if it never
    does, as a later take or the end of the video came first.

    Awaited in the task that reads the chunks it may wait for ever: the server makes no more while it is that far ahead.
    """

    id: int
    applied: asyncio.Future[Place] = field(repr=False)


@dataclass(frozen=True)
class Chunk:
    """One chunk of video; `header` has all that the server says of it (docs/live-protocol.md)."""

    header: Mapping[str, Any]
    init: bytes = field(repr=False)  # the take's initialisation segment; empty where the video is JPEG
    parts: tuple[bytes, ...] = field(repr=False)  # a fragment, or one JPEG a frame
    thumbnail: bytes = field(repr=False)  # JPEG

    @property
    def data(self) -> bytes:
        """The fragment: `init + data` plays by itself."""
        return b"".join(self.parts)

    @property
    def take(self) -> int:
        return self.header["take"]

    @property
    def chunk(self) -> int:
        return self.header["chunk"]

    @property
    def frame(self) -> int:
        """Number of its first frame in the video."""
        return self.header["frame"]

    @property
    def frames(self) -> int:
        return self.header["frames"]

    @property
    def prompt(self) -> str:
        return self.header["prompt"]


class LiveClient:
    """A connection with one stream; an asynchronous context manager, and an asynchronous iterator of its chunks.

    Iterating ends with the video's length, or after `close`, and raises StreamEnded where the stream broke off. It goes
    on past the end of a take where another one has been asked for. Each chunk that is asked for tells the server that
    those before it have been shown; with `paced` this is left to calls of `shown`.

    url: where the server listens, `http://127.0.0.1:7860`. key: an API key. Raises LiveError where the server cannot be
    reached or does not let us in.
    """

    def __init__(self, url: str, key: str | None = None, *, paced: bool = False):
        self.url, self.paced = url.rstrip("/"), paced
        self.hello: Mapping[str, Any] = {}
        self.takes: dict[int, Mapping[str, Any]] = {}  # `take` messages by take, the kept ones
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._socket: ClientConnection | None = None
        self._reader: asyncio.Task | None = None
        self._items: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
        self._answers: dict[int, asyncio.Future[Mapping[str, Any]]] = {}
        self._applied: dict[int, asyncio.Future[Place]] = {}
        self._next_id = 1
        self._init = b""
        self._last: Chunk | None = None  # that was given out
        self._asked: int | None = None  # id of the newest control that begins a take, until the take begins
        self._over = False  # the newest take has its length

    async def __aenter__(self) -> "LiveClient":
        scheme, place, path, _, _ = urlsplit(self.url)
        if scheme not in ("http", "https") or not place:
            raise LiveError(f"{self.url} is no address of a server; give one such as http://127.0.0.1:8000")
        address = urlunsplit(("wss" if scheme == "https" else "ws", place, f"{path}/v1/live", "", ""))
        try:
            self._socket = await connect(address, additional_headers=self._headers, max_size=MAX_FRAME)
            self.hello = json.loads(await self._socket.recv())
        except ConnectionClosed as error:
            raise LiveError(error.rcvd.reason if error.rcvd else "the server has hung up") from error
        except (OSError, InvalidHandshake, InvalidURI, TimeoutError) as error:
            raise LiveError(f"{self.url} cannot be reached ({error}); check the address and the key") from error
        if self.hello["protocol"] != PROTOCOL:
            await self._socket.close()
            raise LiveError(f"{self.url} speaks protocol {self.hello['protocol']}, and this client {PROTOCOL}")
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._socket.close()
        await self._reader

    async def open(
        self,
        prompt: str,
        *,
        seed: int = 0,
        seconds: float | None = None,
        schedule: Mapping[str, Any] | None = None,
        image: str | PathLike | bytes | None = None,
        video: str = "fmp4",
    ) -> Receipt:
        """Begin a video; a second call replaces the first one. Refused where there is no room.

        seconds: its length, None = as long as the server allows. schedule: {"preset": name} or {"steps": [4, 3, 2]},
        and "context". image: a picture that it begins with, a file or its bytes. video: "fmp4" or "jpeg".
        """
        if image is not None:
            await self.upload(image)
        asked = {"prompt": prompt, "seed": seed, "seconds": seconds, "schedule": schedule, "video": video}
        self._forget()
        return await self._control("open", **asked, image=image is not None)

    async def set_prompt(self, prompt: str, switch: str | None = None) -> Receipt:
        """A new prompt from the next chunk on. switch: what happens to the past (`hello["switches"]`)."""
        return await self._control("set_prompt", prompt=prompt, switch=switch)

    async def set_seed(self, seed: int) -> Receipt:
        """Noise of the next chunks from another seed."""
        return await self._control("set_seed", seed=seed)

    async def set_schedule(self, schedule: Mapping[str, Any]) -> Receipt:
        """Other steps from the next chunk on; LiveError where the server could not keep the rate."""
        return await self._control("set_schedule", schedule=schedule)

    async def set_image(self, image: str | PathLike | bytes | None) -> Receipt:
        """Begin again, as a new take, with a picture (None: without)."""
        if image is not None:
            await self.upload(image)
        self._forget()
        return await self._control("set_image", image=image is not None)

    async def pause(self) -> Receipt:
        return await self._control("pause")

    async def resume(self) -> Receipt:
        return await self._control("resume")

    async def seek(self, chunk: int, take: int | None = None) -> Receipt:
        """Go on from a chunk as it was, in a new take. Chunks of the one before that have not been read are dropped."""
        return await self._control("seek", chunk=chunk, take=take)

    async def branch(
        self,
        chunk: int,
        take: int | None = None,
        *,
        prompt: str | None = None,
        seed: int | None = None,
        schedule: Mapping[str, Any] | None = None,
    ) -> Receipt:
        """The same with another prompt, seed or schedule: a branch of the same past."""
        return await self._control("branch", chunk=chunk, take=take, prompt=prompt, seed=seed, schedule=schedule)

    async def describe(self, schedule: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a schedule costs: `table`, `nfe`, `chunks`, `fps`."""
        return await self._ask("describe", schedule=schedule)

    async def close(self) -> None:
        """End the stream; iterating ends as well."""
        with suppress(StreamEnded):
            await self._control("close")

    async def shown(self, chunk: Chunk) -> None:
        """Tell the server that a chunk has been shown, so that it makes more."""
        message = {"type": "shown", "take": chunk.take, "frame": chunk.frame + chunk.frames}
        with suppress(ConnectionClosed):  # which the next chunk says
            await self._socket.send(json.dumps(message))

    async def upload(self, image: str | PathLike | bytes) -> None:
        """Send a picture for `open` and `set_image`, which call this themselves."""
        content = image if isinstance(image, bytes) else await asyncio.to_thread(Path(image).read_bytes)
        async with httpx.AsyncClient(headers=self._headers, timeout=60) as http:
            try:
                answer = await http.post(f"{self.url}/v1/live/{self.hello['session']}/image", content=content)
            except httpx.HTTPError as error:
                raise LiveError(f"the picture could not be sent ({error})") from error
        if answer.status_code != 204:
            raise LiveError(_sentence(answer))

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        if self._last is not None and not self.paced:
            await self.shown(self._last)
        item = await self._items.get()
        while item is None and self._asked is not None:  # the end of a take that another one follows
            item = await self._items.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        self._last = item
        return item

    async def _control(self, kind: str, **fields: Any) -> Receipt:
        number = self._next_id
        applied = self._applied[number] = asyncio.get_running_loop().create_future()
        applied.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody has to wait for it
        if kind in NEW_TAKES:
            self._asked = number
        try:
            await self._ask(kind, **fields)
        except BaseException:
            self._applied.pop(number, None)
            self._will_not_begin(number)
            raise
        return Receipt(number, applied)

    async def _ask(self, kind: str, **fields: Any) -> Mapping[str, Any]:
        """Send a control and wait for its answer."""
        number, self._next_id = self._next_id, self._next_id + 1
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        given = {name: value for name, value in fields.items() if value is not None}
        try:
            await self._socket.send(json.dumps({"type": kind, "id": number, **given}))
            return await answer
        except ConnectionClosed as error:
            raise StreamEnded("closed", "the connection is closed; connect again") from error
        finally:
            self._answers.pop(number, None)

    def _forget(self) -> None:
        """Drop chunks that nobody will look at."""
        while not self._items.empty():
            self._items.get_nowait()
        self._last = None

    async def _read(self) -> None:
        """Until the connection ends: everything that the server says."""
        reason = "the server has hung up"
        normal = False
        try:
            async for data in self._socket:
                self._heard(json.loads(data)) if isinstance(data, str) else self._seen(data)
            normal = True
        except ConnectionClosed as error:
            close = error.rcvd or error.sent  # sent: of this side, where the server has not answered its pings
            reason = close.reason if close and close.reason else reason
        over = StreamEnded("closed", reason)
        for waiting in (*self._answers.values(), *self._applied.values()):
            self._reject(waiting, over)
        self._asked = None
        self._items.put_nowait(None if normal else over)

    def _heard(self, message: Mapping[str, Any]) -> None:
        kind, number = message["type"], message.get("id")
        match kind:
            case "ack" | "schedule":
                self._resolve(self._answers, number, message)
            case "applied":
                place = Place(message["take"], message["chunk"], message["frame"], tuple(message["warnings"]))
                self._resolve(self._applied, number, place)
            case "refused":
                self._fail(number, Refused(message["reason"], message["retry_after"]))
            case "error":
                self._fail(number, LiveError(message["message"]))
            case "take":
                self._forget()
                self._never(LiveError("a later take began before it showed"), number)
                self._over = False
                if self._asked == number:
                    self._asked = None
                kept = {take: self.takes[take] for take in message["takes"] if take in self.takes}
                self.takes = kept | {message["take"]: message}
            case "ended":
                broken = StreamEnded(message["reason"], message["message"])
                self._over = message["reason"] == "length"
                self._never(broken, self._asked)
                self._items.put_nowait(None if self._over else broken)

    def _never(self, why: LiveError, before: int | None) -> None:
        """Controls with ids below `before` (None: all) that do not show yet never will."""
        for number in [number for number in self._applied if before is None or number < before]:
            self._reject(self._applied.pop(number), why)

    def _will_not_begin(self, number: int | None) -> None:
        """The take that this control asked for; where the one before it is over, iterating ends."""
        if number is not None and number == self._asked:
            self._asked = None
            if self._over:
                self._items.put_nowait(None)

    @staticmethod
    def _reject(future: asyncio.Future, why: LiveError) -> None:
        if not future.done():
            future.set_exception(why)

    def _resolve(self, waiting: dict[int, asyncio.Future], number: int, value: Any) -> None:
        future = waiting.pop(number, None)
        if future and not future.done():
            future.set_result(value)

    def _fail(self, number: int | None, error: LiveError) -> None:
        """The server does not do what it was asked for, at once or after it was understood."""
        self._will_not_begin(number)
        for waiting in (self._answers, self._applied):
            future = waiting.pop(number, None)
            if future and not future.done():
                return future.set_exception(error)

    def _seen(self, data: bytes) -> None:
        size = int.from_bytes(data[:4], "little")
        header, at, parts = json.loads(data[4 : 4 + size]), 4 + size, []
        for length in header["sizes"]:
            parts.append(data[at : at + length])
            at += length
        if header["kind"] == "init":
            self._init = parts[0]
            return
        init = self._init if header["kind"] == "fragment" else b""
        self._items.put_nowait(Chunk(header, init, tuple(parts[:-1]), parts[-1]))


def _sentence(answer: httpx.Response) -> str:
    """What the server says of why it did not do something."""
    try:
        said = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = answer.text
    return f"{said or answer.reason_phrase} ({answer.status_code})"
