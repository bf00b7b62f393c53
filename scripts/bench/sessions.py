"""Live streams through workers and sockets, as clients see them: time to first frame, late frames, frames a second."""

import asyncio
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import uvicorn
from fastapi import FastAPI

from client import LiveClient
from configs.errors import UserError
from pipeline.diagonal import DiagonalPipeline
from scripts.bench.live import random_pipeline
from server.access import bound_socket
from server.costs import HEADROOM
from server.limits import Limits
from server.live import LiveServer
from server.protocols import SOCKET
from server.worker_messages import ModelSource
from server.workers import Worker, WorkerPool

PROMPT = "a red circle moves right"
APART = 0.5  # seconds from one client's arrival to the next


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
    encode_ms: list[float] = field(default_factory=list)  # of each chunk


async def watch(url: str, seed: int, seconds: float) -> Watched:
    """A client that shows frames at the video's rate from the first one on, and waits where one is not there."""
    watched = Watched()
    async with LiveClient(url, paced=True) as live:
        begin, due, fps = time.perf_counter(), None, live.hello["fps"]
        showing: set[asyncio.Task] = set()
        await live.open(PROMPT, seed=seed, seconds=seconds)
        async for chunk in live:
            now = time.perf_counter()
            if due is None:
                watched.first, due = now - begin, now
            elif now > due:
                watched.late_frames += min(chunk.frames, 1 + int((now - due) * fps))
                watched.worst, due = max(watched.worst, now - due), now
            due += chunk.frames / fps
            watched.frames += chunk.frames
            watched.encode_ms.append(chunk.header["encode_ms"])
            showing.add(asyncio.create_task(_shown_at(live, chunk, due)))
        await asyncio.gather(*showing)
    return watched


async def _shown_at(live: LiveClient, chunk, due: float) -> None:
    await asyncio.sleep(due - time.perf_counter())
    await live.shown(chunk)


async def paced(url: str, workers: list[Worker], sessions: int, seconds: float) -> dict[str, Any]:
    """`sessions` clients at the video's rate, each for `seconds` of video, APART from each other."""

    async def one(number: int) -> Watched:
        await asyncio.sleep(number * APART)
        return await watch(url, number, seconds)

    begin, busy = time.perf_counter(), sum(cpu_seconds(worker) for worker in workers)
    clients = await asyncio.gather(*(one(number) for number in range(sessions)))
    wall, busy = time.perf_counter() - begin, sum(cpu_seconds(worker) for worker in workers) - busy
    return {
        "frames": sum(watched.frames for watched in clients),
        "late_frames": sum(watched.late_frames for watched in clients),
        "late_streams": sum(watched.late_frames > 0 for watched in clients),
        "worst_late_ms": 1000 * max(watched.worst for watched in clients),
        "first_frame_ms": 1000 * median(watched.first for watched in clients),
        "slowest_first_ms": 1000 * max(watched.first for watched in clients),
        "encode_ms_a_chunk": median(ms for watched in clients for ms in watched.encode_ms),
        "cores_of_workers": busy / wall,
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
    per_client = await asyncio.gather(*(one(number) for number in range(sessions)))
    wall = time.perf_counter() - begin
    frames = sum(made for made, _, _ in per_client)
    return {
        "fps": frames / wall,
        "fps_of_slowest": min(made for made, _, _ in per_client) / wall,
        "streams_at_rate": frames / wall / per_client[0][2],
        "bytes_a_second_of_video": sum(size for _, size, _ in per_client) / (frames / per_client[0][2]),
    }


def sessions(url: str, pool: WorkerPool, counts: list[int], seconds: float) -> Iterator[dict[str, Any]]:
    """Figures of each number of sessions at the video's rate, from the smallest up to the first with late frames, and
    then of the last one as fast as they come.

    Of several workers, all are measured, and then the first alone, with its share of the sessions.
    """
    share = pool.workers[0].costs.share(pool.schedule)
    yield {
        "chunk_seconds": [worker["chunk_seconds"] for worker in pool.status()],
        "let_in_by_one": max(1, int(HEADROOM / share)),
        **memory(pool.workers),
    }
    for number in sorted({len(pool.workers), 1}, reverse=True):
        for worker in pool.workers[number:]:
            asyncio.run_coroutine_threadsafe(worker.stop(), worker.loop).result()
        workers = pool.workers[:number]
        for count in sorted({math.ceil(count * number / len(pool.workers)) for count in counts}):
            figures = asyncio.run(paced(url, workers, count, seconds))
            yield {f"{number}_workers.{count}.paced": figures}
            if figures["late_frames"]:
                break
        yield {f"{number}_workers.{count}.saturating": asyncio.run(saturating(url, count, seconds))}
        yield {f"{number}_workers.after": memory(workers)}


def memory(workers: list[Worker]) -> dict[str, list[int]]:
    """Bytes that each worker holds."""
    return {
        "gpu_bytes": [worker.memory for worker in workers],
        "host_bytes": [int(of_process(worker, "statm").split()[1]) * os.sysconf("SC_PAGE_SIZE") for worker in workers],
    }


def cpu_seconds(worker: Worker) -> float:
    """That its process has computed, all threads together."""
    user, system = of_process(worker, "stat").rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def of_process(worker: Worker, what: str) -> str:
    return Path(f"/proc/{worker.status()['pid']}/{what}").read_text()
