"""One WebSocket: messages in, chunks out, never more of them than the visitor's screen can use."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from configs.errors import UserError
from configs.geometry import pixel_frames
from model.schedule import Schedule
from server.messages import MAX_MESSAGE, Ack, Message, Play, Rewind, Say, ScheduleQuery, read_message
from server.player import Player
from utils.logs import get_logger

log = get_logger(__name__)
POLICY, TOO_BIG = 1008, 1009  # close codes of RFC 6455
MAX_ERRORS = 1000  # messages without sense that are answered before the line is cut


class Gone(Exception):
    """The visitor has left, or did not read for so long that the connection was cut (server/protocols.py)."""


@contextmanager
def gone_if_closed() -> Iterator[None]:
    """Around calls of a WebSocket: Gone in place of what Starlette and uvicorn raise for one that is closed."""
    try:
        yield
    except (WebSocketDisconnect, RuntimeError, OSError) as error:
        raise Gone from error


class Connection:
    """Runs on the event loop; what touches the model goes through `pool`."""

    def __init__(self, socket: WebSocket, player: Player, pool: ThreadPoolExecutor, limits):
        self.socket, self.player, self.pool, self.limits = socket, player, pool, limits
        self._stream: asyncio.Task | None = None
        self._room = asyncio.Event()
        self._shown = self._sent = 0  # frames of this take
        self._frames_allowed = 0
        self._errors = 0
        self._stopping = False

    async def run(self, hello: dict[str, Any]) -> None:
        """Until the visitor goes (Gone, or a return), is idle for too long, or sends too much that makes no sense."""
        try:
            await self._say("hello", **hello)
            while self._errors < MAX_ERRORS:
                try:
                    message = await asyncio.wait_for(self.socket.receive(), self.limits.idle_seconds)
                except TimeoutError:
                    await self._say("idle", message=f"idle for {self.limits.idle_seconds:g} s: closed; reload to go on")
                    return await self._close("idle")
                if message["type"] == "websocket.disconnect":
                    return
                await self._answer(message.get("text"))
            await self._close("too many messages without sense")
        finally:
            await self._stop()

    async def _answer(self, text: str | None) -> None:
        try:
            if text is None or len(text) > MAX_MESSAGE:
                raise UserError("message is no text, or too long; send JSON")
            await self._act(read_message(text, self.player.pipe.config, self.limits.max_seconds))
        except UserError as error:
            self._errors += 1
            await self._say("error", message=str(error))

    async def _act(self, message: Message) -> None:
        match message:
            case Play():
                await self._stop()
                self._frames_allowed = round(message.seconds * self.player.pipe.config.video.fps)
                await self._begin(self.player.play, message, 0)
            case Rewind():
                await self._stop()
                chunks = pixel_frames(message.chunk * self.player.pipe.geometry.chunk_frames)
                await self._begin(self.player.rewind, message, chunks)
            case Say():
                if self._stream is None or self._stream.done():
                    raise UserError("nothing is playing; press Play first")
                self.player.say(message)
                warnings = self.player.pipe.prompt_warnings(message.prompt)
                await self._say("said", prompt=message.prompt, warnings=warnings)
            case Ack(frames):
                self._shown = max(self._shown, min(frames, self._sent))
                self._room.set()
            case ScheduleQuery(schedule):
                await self._say("schedule", **self._describe(schedule))
            case _:
                await self._stop()
                await self._say("stopped")

    async def _begin(self, start: Callable[[Any], None], message: Message, frames: int) -> None:
        """A new take: `start` on the worker, then chunks. `frames`: those that the video has before it."""
        await asyncio.get_running_loop().run_in_executor(self.pool, start, message)
        self._shown = self._sent = 0
        shown = {"take": self.player.take, "takes": list(self.player.takes), "frames": frames}
        of_prompt = self.player.pipe.prompt_warnings(message.prompt) if message.prompt else []
        warnings = [*self.player.conditioning_warnings, *of_prompt]
        await self._say("take", **shown, warnings=warnings, **self._describe(self.player.session.schedule))
        self._stream = asyncio.create_task(self._play(frames))

    async def _play(self, frames: int) -> None:
        """Make chunks and send them, at most `ahead_seconds` before they are shown."""
        loop, fps = asyncio.get_running_loop(), self.player.pipe.config.video.fps
        try:
            while frames < self._frames_allowed and not self._stopping:
                self._room.clear()
                if self._sent - self._shown > self.limits.ahead_seconds * fps:
                    await self._room.wait()
                    continue
                made = await loop.run_in_executor(self.pool, self.player.next)
                if made is None:
                    return
                frames += len(made.jpegs)
                self._sent += len(made.jpegs)
                with gone_if_closed():
                    await self.socket.send_bytes(made.packet())
            if not self._stopping:
                await self._say("end", message=f"{frames / fps:.0f} s are the most that a video may last; press Play")
        except UserError as error:  # what was made is no picture
            await self._say("error", message=str(error), over=True)
        except Gone:
            pass
        except Exception:
            log.exception("a stream broke off")
            with suppress(Gone):
                await self._say("error", message="the server could not go on; its log says why", over=True)
            raise

    async def _stop(self) -> None:
        """End the running stream, within one step, and wait until the worker has let go of it."""
        task, self._stream = self._stream, None
        if task is None:
            return
        self._stopping = True
        self.player.cancel()
        self._room.set()
        begin = time.monotonic()
        await asyncio.wait([task])
        self._stopping = False
        if not task.cancelled():
            task.exception()  # which has been logged, and told to the visitor
        log.debug(f"stopped after {time.monotonic() - begin:.3f} s")

    def _describe(self, schedule: Schedule) -> dict[str, Any]:
        """The schedule as the page shows it: table, evaluations of a clip, predicted frames a second."""
        pipe, costs = self.player.pipe, self.player.costs
        clip = pipe.num_chunks()
        frames = pipe.geometry.chunk_frames * 4
        return {
            "table": schedule.table(clip, pipe.geometry),
            "nfe": schedule.nfe(clip),
            "chunks": clip,
            "predicted_fps": costs.fps(schedule, len(schedule.timesteps_by_chunk) - 1, frames),
        }

    async def _say(self, kind: str, **values: Any) -> None:
        with gone_if_closed():
            await self.socket.send_text(json.dumps({"type": kind, **values}))

    async def _close(self, reason: str) -> None:
        with gone_if_closed():
            await self.socket.close(POLICY, reason)
