"""Worker processes with the tiny model: streams, jobs, and one that is killed."""

import asyncio
import io
import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from live_case import OTHER, PROMPT, spawn_thread
from PIL import Image

from configs.errors import UserError
from model.schedule import Schedule
from pipeline.stream import ChunkResult
from server.controls import Control
from server.costs import HEADROOM, Costs, later_nfe
from server.limits import Limits
from server.worker_job import Job
from server.worker_messages import JobSpec, ModelSource, Video
from server.workers import JobFailed, Refused, Worker, WorkerDied, WorkerPool, WorkerSession
from utils.video import read_video

pytestmark = pytest.mark.slow

LIMIT_S = 900  # of a test: where a machine is busy a worker takes minutes to start
OPEN = Control("open", 1, prompt=PROMPT, seed=1)


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def pool(runner, tiny_assets):
    """Two processes, started once."""
    pool = WorkerPool(ModelSource(str(tiny_assets / "tiny.yaml")), 2, Limits(streams=4))
    runner.run(pool.start())
    yield pool
    processes = [worker._process for worker in pool.workers]
    runner.run(pool.stop())
    assert not any(process.is_alive() for process in processes)


async def chunks(session: WorkerSession, count: int) -> list[Video]:
    """The next chunks; each counts as shown at once."""
    found = []
    while len(found) < count:
        item = await asyncio.wait_for(anext(session), 120)
        if isinstance(item, Video) and item.header["kind"] == "fragment":
            found.append(item)
            end = item.header["frame"] + item.header["frames"]
            session.control(Control("shown", take=item.header["take"], frame=end))
    return found


def test_a_worker_that_is_killed_takes_its_own_streams_alone_and_comes_back(pool, runner):
    async def script():
        one, other = pool.open(OPEN), pool.open(OPEN)
        assert {one.worker, other.worker} == {0, 1}, "to the worker with the most time to spare"
        assert [w["sessions"] for w in pool.status()] == [1, 1] and pool.status()[one.worker]["gpu_memory"] == 0
        first = await chunks(one, 2), await chunks(other, 2)
        assert [c.payload for c in first[0]] == [c.payload for c in first[1]], "the same on any worker"
        job = asyncio.create_task(consume(pool, JobSpec(PROMPT, frames=9 + 12 * 1000)))
        while not pool.workers[one.worker].jobs and not pool.workers[other.worker].jobs:
            await asyncio.sleep(0.01)
        if pool.workers[other.worker].jobs:
            one, other = other, one
        os.kill(pool.status()[one.worker]["pid"], signal.SIGKILL)
        items = [item async for item in one]
        assert items[-1]["type"] == "ended" and items[-1]["reason"] == "worker" and one.lost
        with pytest.raises(WorkerDied, match="exit code -9"):
            await job
        assert pool.status()[one.worker]["state"] == "restarting"
        again = pool.open(OPEN)
        assert again.worker == other.worker, "the only one that is ready"
        after = await chunks(other, 6)
        assert [c.header["chunk"] for c in after] == list(range(2, 8)), "no lost frame"
        while pool.status()[one.worker]["state"] != "ready":
            await asyncio.sleep(0.1)
        assert pool.status()[one.worker]["restarts"] == 1
        back = pool.open(OPEN)
        assert back.worker == one.worker and (await chunks(back, 2))[0].payload == first[0][0].payload
        for session in (other, again, back):
            session.close()
        assert [w["sessions"] for w in pool.status()] == [0, 0]

    runner.run(asyncio.wait_for(script(), LIMIT_S))


async def consume(pool: WorkerPool, spec: JobSpec, path=os.devnull + ".mp4") -> list[dict]:
    return [event async for event in pool.run_job(spec, path)]


def test_a_job_is_made_in_the_turns_that_streams_leave(pool, runner, tmp_path):
    async def script():
        sessions = [pool.open(OPEN), pool.open(OPEN)]
        made = asyncio.gather(*(chunks(session, 6) for session in sessions))
        schedule = replace(pool.schedule, timesteps_by_chunk=((1000.0,),))
        spec = JobSpec(OTHER, seed=3, frames=33, schedule=schedule, image=np.zeros((32, 48, 3), np.uint8))
        events = await consume(pool, spec, tmp_path / "x.mp4")
        await made
        for session in sessions:
            session.close()
        return events

    *progress, done = runner.run(asyncio.wait_for(script(), LIMIT_S))
    assert [(e["chunk"], e["chunks"]) for e in progress] == [(1, 3), (2, 3), (3, 3)]
    assert done["type"] == "done" and done["frames"] == 33 and "not trained to begin" in done["warnings"][0]
    assert Image.open(io.BytesIO(done["thumbnail"])).width == 480 and len(read_video(tmp_path / "x.mp4")) == 33
    assert os.listdir(tmp_path) == ["x.mp4"]


def test_a_job_that_is_cancelled_or_cannot_be_leaves_no_file(pool, runner, tmp_path):
    async def script():
        events = pool.run_job(JobSpec(PROMPT, frames=9 + 12 * 1000), tmp_path / "x.mp4")
        assert (await anext(events))["chunk"] == 1
        await events.aclose()
        with pytest.raises(JobFailed, match="whole number of chunks"):
            await consume(pool, JobSpec(PROMPT, frames=13), tmp_path / "x.mp4")
        with pytest.raises(JobFailed, match="cannot"):
            await consume(pool, JobSpec(PROMPT, frames=9), "/proc/none/x.mp4")
        await consume(pool, JobSpec(PROMPT, frames=9), tmp_path / "y.mp4")
        while len(os.listdir(tmp_path)) > 1:  # the writer of the cancelled one ends by itself
            await asyncio.sleep(0.01)

    runner.run(asyncio.wait_for(script(), LIMIT_S))
    assert os.listdir(tmp_path) == ["y.mp4"]


def test_a_job_that_is_cancelled_while_its_frames_are_written_ends_without_a_fault(tmp_path, monkeypatch):
    """The writer holds the last frames and the queue is full: the job gets its turn all the same, and waits for no
    encoding of frames that nobody wants."""
    begun, go_on, written = threading.Event(), threading.Event(), []

    class SlowWriter:
        frames_written = 0

        def __init__(self, *arguments):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return False

        def write(self, frames):
            written.append(frames)
            begun.set()
            assert go_on.wait(60)

    result = SimpleNamespace(wait=lambda: SimpleNamespace(frames=[torch.zeros(9, 32, 48, 3, dtype=torch.uint8)]))
    session = SimpleNamespace(
        play=lambda *arguments: (SimpleNamespace(chunk=c, wait=result.wait) for c in range(3)), cancel=lambda: None
    )
    video = SimpleNamespace(fps=16, height=32, width=48)
    pipe = SimpleNamespace(
        num_chunks=lambda frames: 3, warnings=lambda prompts: [], schedule=None, config=SimpleNamespace(video=video)
    )
    told, writers = [], ThreadPoolExecutor(1)
    worker = SimpleNamespace(
        spare_session=lambda: session,
        pipe=pipe,
        writers=writers,
        wake=lambda: None,
        send=lambda *said: told.append(said),
    )
    monkeypatch.setattr("server.worker_job.VideoWriter", SlowWriter)
    job = Job(worker, 1, JobSpec(PROMPT), tmp_path / "x.mp4")
    assert job.make() and begun.wait(60) and job.make() and job.make() and not job.wants_chunk
    job.cancelled = True
    assert job.wants_chunk
    threading.Timer(0.3, go_on.set).start()
    assert not job.make(), "no error of the writer's comes out"
    writers.shutdown()
    assert len(written) == 1 and [event["type"] for _, _, event in told] == 3 * ["progress"]


def test_a_full_disk_ends_a_job_and_no_stream(pool, runner, tmp_path):
    """A limit on the size of files, in the workers alone, is told like a full disk."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(files: int) -> None:
        for worker in pool.workers:
            resource.prlimit(worker._process.pid, resource.RLIMIT_FSIZE, (files, unlimited[1]))

    async def script():
        sessions = [pool.open(OPEN), pool.open(OPEN)]
        for session in sessions:
            await chunks(session, 1)
        limit(64)
        try:
            with pytest.raises(JobFailed, match="^the server's disk is full") as failed:
                await consume(pool, JobSpec(PROMPT, frames=81), tmp_path / "x.mp4")
            assert failed.value.code == "storage" and not os.listdir(tmp_path)
            for session in sessions:
                await chunks(session, 2)
                session.close()
        finally:
            limit(unlimited[0])
        await consume(pool, JobSpec(PROMPT, frames=9), tmp_path / "y.mp4")

    runner.run(asyncio.wait_for(script(), LIMIT_S))
    assert os.listdir(tmp_path) == ["y.mp4"]


def test_what_cannot_be_loaded_is_a_sentence(runner, tiny_assets, monkeypatch):
    monkeypatch.setattr(Worker, "_spawn", spawn_thread)
    pool = WorkerPool(ModelSource(str(tiny_assets / "tiny.yaml"), ("model.student=none",)), 1)
    with pytest.raises(UserError, match="none"):
        runner.run(pool.start())
    assert not pool.workers[0]._process.is_alive()
    with pytest.raises(UserError, match="--workers=0"):
        WorkerPool(ModelSource("configs/tiny.yaml"), 0)


def test_streams_are_let_in_as_long_as_they_can_be_kept(tiny_assets):
    """By what a chunk costs: cheaper schedules, more streams; a schedule that would be too much is refused."""
    pool = WorkerPool(ModelSource(str(tiny_assets / "tiny.yaml")), 1)
    with pytest.raises(Refused, match="being loaded"):
        pool.open(OPEN)
    worker: Worker = pool.workers[0]
    nfe = later_nfe(pool.schedule)
    worker.state, worker.about = "ready", {"most_streams": 100}
    worker.costs = Costs(evaluation=0.2 / (nfe + 1), decode=1.0, frames=12, fps=16)  # 0.2 s a chunk of 0.75 s
    worker.send = lambda *message: None
    assert worker.capacity == int(HEADROOM * 0.75 / 0.2) == 3
    sessions = [pool.open(OPEN) for _ in range(3)]
    with pytest.raises(Refused, match="run take 80%.*this one would take 27%; .* not keep 16 frames a second"):
        pool.open(OPEN)
    dear = replace(pool.schedule, timesteps_by_chunk=(tuple(range(900, 0, -70)),))
    with pytest.raises(Refused):
        sessions[0].control(Control("set_schedule", 2, schedule=dear))
    assert worker.load == pytest.approx(0.8), "nothing has changed"
    sessions[0].close()
    pool.open(OPEN)
    cheap = Schedule(timesteps_by_chunk=((1000.0,),))
    for session in list(worker.sessions.values()):
        session.control(Control("set_schedule", 2, schedule=cheap))
    assert worker.load == pytest.approx(0.8 * 2 / (nfe + 1))
    for session in list(worker.sessions.values()):
        session.close()
    alone = pool.open(replace(OPEN, schedule=dear))
    assert worker.load > HEADROOM, "a stream alone is let in, however slow"
    for _ in range(200):
        worker.costs.learn(0.4, nfe)
    assert worker.load > 2 * HEADROOM, "what runs is counted by what it takes now"
    alone.close()
    for _ in range(200):
        worker.costs.learn(0.05, nfe)
    assert worker.capacity >= 12, "the machine was faster than at the start"


def test_deaths_are_answered_ever_later(tiny_assets, monkeypatch):
    delays = []

    async def script():
        monkeypatch.setattr(
            asyncio.get_running_loop(), "call_later", lambda delay, call: delays.append(delay), raising=False
        )
        pool = WorkerPool(ModelSource(str(tiny_assets / "tiny.yaml")), 1)
        worker = pool.workers[0]
        worker._process = type("Process", (), {"exitcode": -9})()
        worker.state, worker._since = "ready", time.monotonic()
        for _ in range(9):
            worker._ended()
        worker.state, worker._since = "ready", time.monotonic() - 3600
        worker._ended()

    asyncio.run(script())
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60, 1]


def test_a_worker_that_hangs_is_killed_and_started_again(runner, tiny_assets):
    """As one that is stopped by a signal does: its stream is told, and another is let in."""
    pool = WorkerPool(ModelSource(str(tiny_assets / "tiny.yaml")), 1, Limits(streams=2, silent_seconds=5))

    async def script():
        await pool.start()
        await asyncio.sleep(8)
        assert pool.status()[0]["hangs"] == 0, "who has nothing to do still says so"
        session = pool.open(OPEN)
        await chunks(session, 2)
        os.kill(pool.status()[0]["pid"], signal.SIGSTOP)
        items = [item async for item in session]
        assert items[-1]["type"] == "ended" and items[-1]["reason"] == "worker"
        while pool.status()[0]["state"] != "ready":
            await asyncio.sleep(0.1)
        assert pool.status()[0]["hangs"] == pool.status()[0]["restarts"] == 1
        await chunks(pool.open(OPEN), 2)
        await pool.stop()

    runner.run(asyncio.wait_for(script(), LIMIT_S))


def test_a_chunk_that_never_comes_is_a_hang_and_a_front_that_was_held_up_is_none(runner, tiny_assets):
    pool = WorkerPool(Hanging(str(tiny_assets / "tiny.yaml")), 1, Limits(streams=2, silent_seconds=4))

    async def script():
        await pool.start()
        time.sleep(6)  # noqa: ASYNC251  the event loop stands still
        await asyncio.sleep(0.5)
        assert pool.status()[0]["hangs"] == 0
        items = [item async for item in pool.open(OPEN)]
        assert items[-1]["reason"] == "worker" and pool.status()[0]["hangs"] == 1
        await pool.stop()

    runner.run(asyncio.wait_for(script(), LIMIT_S))


class Hanging(ModelSource):
    """The second chunk of a stream never comes, as from a GPU that does not answer. Loaded in the worker's process."""

    def load(self, rank: int):
        wait = ChunkResult.wait

        def stuck(result):
            if result.prompts[0] == PROMPT and result.chunk == 1:
                time.sleep(3600)
            return wait(result)

        ChunkResult.wait = stuck
        return super().load(rank)
