"""Live streams through workers and sockets, as clients see them: time to first frame, late frames, frames a second."""

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import uvicorn
from fastapi import FastAPI

from client import LiveClient
from configs.errors import UserError
from pipeline.diagonal import DiagonalPipeline
from scripts.bench.live import random_pipeline
from server.access import bound_socket
from server.limits import Limits
from server.live import LiveServer
from server.protocols import SOCKET
from server.workers import ModelSource, WorkerPool

PROMPT = "a red circle moves right"


@dataclass(frozen=True)
class BenchSource(ModelSource):
    """What the configuration names, or random weights of a size."""

    size: str | None = None

    def load(self, rank: int) -> DiagonalPipeline:
        if self.size is None:
            return super().load(rank)
        return random_pipeline(self.config(), self.size, rank)


@contextmanager
def live_server(source: ModelSource, workers: int, streams: int) -> Iterator[tuple[str, WorkerPool]]:
    """The address of a server of the live protocol in this process, with `workers` of their own, and their pool.

    streams: that each worker takes, whether or not it keeps them at their rate.
    """
    limits = Limits(visitors=max(8, 2 * streams * workers), streams=streams, max_seconds=86_400)
    pool = WorkerPool(source, workers, limits)
    app, listener = FastAPI(), bound_socket("127.0.0.1", 0)
    app.include_router(LiveServer(pool, limits).router())
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=2, **SOCKET))
    faults: list[UserError] = []

    async def serving() -> None:
        try:
            await pool.start()
            await server.serve([listener])
            await pool.stop()
        except UserError as error:
            faults.append(error)

    thread = threading.Thread(target=lambda: asyncio.run(serving()), daemon=True)
    thread.start()
    try:
        while not server.started:
            for fault in faults:
                raise fault
            assert thread.is_alive(), "the server could not be started"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", pool
    finally:
        server.should_exit = True
        thread.join(30)


async def first_frames(url: str, plays: int) -> dict[str, Any]:
    """Milliseconds from `open` to the first frame, of one stream after the other."""
    waits = []
    async with LiveClient(url) as live:
        for seed in range(plays):
            begin = time.perf_counter()
            await live.open(PROMPT, seed=seed, seconds=1)
            async for chunk in live:
                if chunk.chunk == 0:
                    waits.append(1000 * (time.perf_counter() - begin))
    return {"plays": plays, "first_frame_ms": median(waits), "slowest_ms": max(waits)}


@dataclass
class Watched:
    """What one client saw."""

    frames: int = 0
    first: float = 0.0  # seconds until the first frame was there
    late_frames: int = 0
    worst: float = 0.0  # seconds that a frame was late


async def watch(url: str, seed: int, seconds: float) -> Watched:
    """A client that shows frames at the video's rate from the first one on, and waits where one is not there."""
    found = Watched()
    async with LiveClient(url, paced=True) as live:
        begin, due, fps = time.perf_counter(), None, live.hello["fps"]
        showing: set[asyncio.Task] = set()
        await live.open(PROMPT, seed=seed, seconds=seconds)
        async for chunk in live:
            now = time.perf_counter()
            if due is None:
                found.first, due = now - begin, now
            elif now > due:
                found.late_frames += min(chunk.frames, 1 + int((now - due) * fps))
                found.worst, due = max(found.worst, now - due), now
            due += chunk.frames / fps
            found.frames += chunk.frames
            showing.add(asyncio.create_task(_shown_at(live, chunk, due)))
        await asyncio.gather(*showing)
    return found


async def _shown_at(live: LiveClient, chunk, due: float) -> None:
    await asyncio.sleep(due - time.perf_counter())
    await live.shown(chunk)


async def paced(url: str, sessions: int, seconds: float, apart: float = 0.3) -> dict[str, Any]:
    """`sessions` clients at the video's rate, each for `seconds` of video, `apart` seconds one after the other."""

    async def one(number: int) -> Watched:
        await asyncio.sleep(number * apart)
        return await watch(url, number, seconds)

    found = await asyncio.gather(*(one(number) for number in range(sessions)))
    return {
        "frames": sum(watched.frames for watched in found),
        "late_frames": sum(watched.late_frames for watched in found),
        "worst_late_ms": 1000 * max(watched.worst for watched in found),
        "first_frame_ms": 1000 * median(watched.first for watched in found),
        "slowest_first_ms": 1000 * max(watched.first for watched in found),
    }


async def saturating(url: str, sessions: int, seconds: float) -> dict[str, Any]:
    """`sessions` clients that take chunks as fast as they come, for `seconds`: frames a second of all, and of the
    slowest; bytes a second of video."""
    end = time.perf_counter() + seconds

    async def one(number: int) -> tuple[int, int, int]:
        frames = size = 0
        async with LiveClient(url) as live:
            await live.open(PROMPT, seed=number)
            async for chunk in live:
                frames, size = frames + chunk.frames, size + len(chunk.data)
                if time.perf_counter() > end:
                    return frames, size, live.hello["fps"]

    begin = time.perf_counter()
    found = await asyncio.gather(*(one(number) for number in range(sessions)))
    wall = time.perf_counter() - begin
    frames = sum(made for made, _, _ in found)
    return {
        "fps": frames / wall,
        "fps_of_slowest": min(made for made, _, _ in found) / wall,
        "streams_at_rate": frames / wall / found[0][2],
        "bytes_a_second_of_video": sum(size for _, size, _ in found) / (frames / found[0][2]),
    }


def sessions(url: str, pool: WorkerPool, counts: list[int], seconds: float) -> Iterator[dict[str, Any]]:
    """Figures of each number of sessions at the video's rate, and then of the largest as fast as they come.

    Of several workers, all are measured, and then the first alone, with its share of the sessions.
    """
    yield {"chunk_seconds": [worker["chunk_seconds"] for worker in pool.status()]}
    for workers in sorted({len(pool.workers), 1}, reverse=True):
        for worker in pool.workers[workers:]:
            asyncio.run_coroutine_threadsafe(worker.stop(), worker.loop).result()
        shares = sorted({math.ceil(count * workers / len(pool.workers)) for count in counts})
        for count in shares:
            yield {f"{workers}_workers.{count}.paced": asyncio.run(paced(url, count, seconds))}
        result = asyncio.run(saturating(url, shares[-1], seconds))
        yield {f"{workers}_workers.{shares[-1]}.saturating": result}
