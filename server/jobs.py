"""The job queue, between the HTTP API, the store and the workers.

A job waits until a worker is free. Scheduling between keys is fair by seconds of video, not by number of jobs: the next
job is the oldest of the key that has been served least. Workers give live sessions priority over jobs.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.schema import ScheduleConfig
from model.schedule import Schedule
from server.errors import ApiError, storage_error
from server.job_store import (
    DONE,
    FAILED,
    IMAGE,
    MAX_ATTEMPTS,
    QUEUED,
    RUNNING,
    THUMBNAIL,
    VIDEO,
    Job,
    JobRequest,
    JobStore,
)  # fmt: skip
from server.metrics import Metrics
from server.worker_messages import NO_ROOM, JobSpec
from server.workers import JobFailed, Refused, WorkerDied, WorkerPool
from utils.files import DiskFull, atomic_path
from utils.logs import get_logger
from utils.pictures import read_picture

log = get_logger(__name__)
STORAGE = (sqlite3.Error, OSError, UserError)  # what the store raises where the disk cannot be written
LOOK_SECONDS = 1.0  # between checks for a free worker, without other events
LOOK_AT_DISK_SECONDS = 10.0  # between looks at the disk, as long as it can be written
TIDY_SECONDS = 60.0  # between removals of expired jobs


class JobQueue:
    """Runs on the event loop. The store has its own thread, so that disk access does not delay live streams."""

    def __init__(self, store: JobStore, pool: WorkerPool, metrics: Metrics):
        self.store, self.pool, self.metrics = store, pool, metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._running: dict[str, tuple[Job, asyncio.Task]] = {}
        self._progress: dict[str, int] = {}  # percent
        self._unsaved: dict[str, tuple[str | None, str]] = {}  # how jobs ended, as long as the disk does not take it
        self.fault: Exception | None = None  # why jobs cannot be stored now
        self._looked = 0.0  # when that was looked at
        self._ended_by_us: dict[str, str] = {}  # why a running job's task was cancelled: "cancelled" or "stopping"
        self._turn, self._served = 0.0, {}  # of the newest job, and by owner: see _next
        self._wake = asyncio.Event()
        self._stopping, self._tidied = False, time.monotonic()
        self._scheduler: asyncio.Task | None = None

    async def _on_disk(self, method: Callable[..., Any], *values: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, method, *values)

    async def _write(self, method: Callable[..., Any], *values: Any) -> Any:
        """For a client, who gets an ApiError if the disk cannot be written."""
        try:
            return await self._on_disk(method, *values)
        except STORAGE as error:
            self._say(error)
            raise storage_error(error) from error

    async def _settle(self, id: str, code: str | None = None, message: str = "") -> None:
        """Store how a job ended (JobStore.finish). On a disk that cannot be written it is kept, shown, and tried again.
        """
        try:
            await self._on_disk(self.store.finish, id, code, message)
        except STORAGE as error:
            self._say(error)
            self._unsaved[id] = code, message
        else:
            self._unsaved.pop(id, None)

    async def _put_back(self, id: str, *, counted: bool) -> None:
        """JobStore.put_back. On a disk that cannot be written, `recover` does it later."""
        try:
            await self._on_disk(lambda: self.store.put_back(id, counted=counted))
        except STORAGE as error:
            self._say(error)

    def _say(self, error: Exception) -> None:
        """Log why jobs cannot be stored, once, and keep it for /health."""
        if str(error) != str(self.fault):
            log.warning(f"jobs cannot be taken up ({error}); this is tried again each second")
        self.fault = error

    async def _look(self) -> None:
        """Find out whether jobs can be stored."""
        try:
            await self._on_disk(lambda: self.store.check_room(table=self.fault is not None))
        except STORAGE as error:
            self._say(error)
        else:
            self.fault = None
        self._looked = time.monotonic()

    def _as_ended(self, job: Job) -> Job:
        """The job as it is, whatever the disk says."""
        if job.id not in self._unsaved or job.status not in (QUEUED, RUNNING):
            return job
        code, message = self._unsaved[job.id]
        error = None if code is None else {"code": code, "message": message}
        return replace(job, status=FAILED if code else DONE, completed_at=time.time(), error=error)

    async def start(self) -> None:
        """Recover the jobs of an earlier server, and start scheduling."""
        try:
            await self._on_disk(self.store.recover)
        except STORAGE as error:  # the disk is full: it is done as soon as there is room
            self._say(error)
            self._tidied = -TIDY_SECONDS
        self._scheduler = asyncio.create_task(self._schedule())

    async def stop(self, grace_seconds: float) -> None:
        """Stop scheduling. Running jobs have `grace_seconds` to finish; the next server repeats the others."""
        self._stopping = True
        self._wake.set()
        await self._scheduler
        if self._running:
            await asyncio.wait([task for _, task in self._running.values()], timeout=grace_seconds)
        for id in list(self._running):
            await self._end(id, "stopping")
        for id, ended in list(self._unsaved.items()):
            await self._settle(id, *ended)
        await self._on_disk(self.store.close)
        self._thread.shutdown()

    async def create(
        self, owner: str, request: JobRequest, digest: str, idempotency_key: str | None, image: bytes | None
    ) -> tuple[Job, bool]:
        """See JobStore.add. Raises ApiError if jobs cannot be stored."""
        if self._stopping:
            raise ApiError(503, "the server is being stopped; try again soon", code="stopping")
        await self._look()
        if self.fault:
            raise storage_error(self.fault)
        job, new = await self._write(self.store.add, owner, request, digest, idempotency_key, image)
        self._wake.set()
        return job, new

    async def get(self, owner: str, id: str) -> Job:
        return self._as_ended(await self._on_disk(self.store.get, owner, id))

    async def page(self, owner: str, after: str | None, limit: int, newest_first: bool) -> tuple[list[Job], bool]:
        jobs, more = await self._on_disk(self.store.page, owner, after, limit, newest_first)
        return [self._as_ended(job) for job in jobs], more

    async def counts(self) -> dict[str, int]:
        return await self._on_disk(self.store.counts)

    def progress(self, job: Job) -> int:
        """Percent."""
        return 100 if job.status == DONE else self._progress.get(job.id, 0)

    def file(self, job: Job, ending: str) -> Path:
        return self.store.path(job.id, ending)

    async def cancel(self, owner: str, id: str) -> Job:
        """Cancel a job and return it, as failed. Raises ApiError if it had ended before."""
        job = await self.get(owner, id)
        await self._settle(id, "cancelled", "the video was cancelled")
        await self._end(id, "cancelled")  # after the row is written, so that it is not started in between
        ended = await self.get(owner, id)
        if job.status not in (QUEUED, RUNNING) or ended.status == DONE:
            raise ApiError(400, f"the video is {ended.status} already; only what waits or runs can be cancelled")
        return ended

    async def remove(self, owner: str, id: str) -> None:
        """Delete a job and its files, and stop it if it runs."""
        await self.get(owner, id)
        await self._write(self.store.remove, id)
        await self._end(id, "cancelled")
        await self._write(self.store.remove, id)  # files written in the meantime

    async def _end(self, id: str, reason: str) -> None:
        """Cancel the task of a running job and wait for its end."""
        if id in self._running:
            self._ended_by_us[id] = reason
            task = self._running[id][1]
            task.cancel()
            await asyncio.wait([task])

    async def _schedule(self) -> None:
        """Start jobs until the server stops; retries after errors of the disk."""
        while not self._stopping:
            self._wake.clear()
            if self.fault or time.monotonic() - self._looked > LOOK_AT_DISK_SECONDS:
                await self._look()
            try:
                for id, ended in list(self._unsaved.items()):
                    await self._settle(id, *ended)
                await self._tidy()
                if not self.fault:
                    await self._start_jobs()
            except STORAGE as error:
                self._say(error)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), LOOK_SECONDS)

    async def _start_jobs(self) -> None:
        while self._free_workers() and (job := self._next(await self._on_disk(self.store.heads))) is not None:
            if self._stopping or not await self._on_disk(self.store.begin, job.id):
                return
            task = asyncio.create_task(self._run(job))
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # which has been logged
            self._running[job.id] = job, task

    async def _tidy(self) -> None:
        if time.monotonic() - self._tidied > TIDY_SECONDS:
            await self._on_disk(self.store.expire)
            await self._on_disk(self.store.recover, {*self._running, *self._unsaved})
            self._tidied = time.monotonic()

    def _free_workers(self) -> int:
        """One job runs on a worker at a time."""
        return max(0, sum(worker["state"] == "ready" for worker in self.pool.status()) - len(self._running))

    def _next(self, heads: Mapping[str, Job]) -> Job | None:
        """The job whose owner is first in turn, by start-time fair queueing over seconds of video.

        The start tag of an owner is the end of the seconds of video that were started for it, but not less than the tag
        of the newest running job, so that idle owners do not accumulate credit.
        """
        if not heads:
            return None
        turns = {owner: max(self._turn, self._served.get(owner, 0.0)) for owner in heads}
        job = min(heads.values(), key=lambda job: (turns[job.owner], job.number))
        self._turn = turns[job.owner]
        self._served[job.owner] = self._turn + job.request.seconds
        self._served = {owner: end for owner, end in self._served.items() if end > self._turn}
        return job

    async def _run(self, job: Job) -> None:
        begin, outcome = time.monotonic(), "failed"
        self.metrics.job_wait.observe(max(0.0, time.time() - job.created_at))
        try:
            await self._make(job)
            await self._settle(job.id)
            self.metrics.job_run.observe(time.monotonic() - begin)
            outcome = DONE
        except JobFailed as error:
            await self._settle(job.id, error.code, str(error))
        except DiskFull as error:
            log.error(str(error))
            await self._settle(job.id, "storage", NO_ROOM)
        except Refused:  # its worker went while it was handed over
            outcome = "put_back"
            await self._put_back(job.id, counted=False)
        except WorkerDied:
            if job.attempts + 1 < MAX_ATTEMPTS:
                outcome = "put_back"
                await self._put_back(job.id, counted=True)
            else:
                message = f"the worker process ended {job.attempts + 1} times while it made this video"
                await self._settle(job.id, "worker_died", message)
        except asyncio.CancelledError:
            outcome = self._ended_by_us.get(job.id, "stopping")
            if outcome == "cancelled":
                await self._settle(job.id, "cancelled", "the video was cancelled")
            else:
                outcome = "put_back"
                await self._put_back(job.id, counted=False)
        except Exception:
            log.exception("a job broke off")
            await self._settle(job.id, "server_error", "the server's log says why")
            raise
        finally:
            if outcome != "put_back":
                self.metrics.jobs_finished.labels(outcome).inc()
            for kept in (self._running, self._progress, self._ended_by_us):
                kept.pop(job.id, None)
            self._wake.set()

    async def _make(self, job: Job) -> None:
        """Video and thumbnail of a job."""
        spec = await asyncio.to_thread(self._spec, job)
        async with aclosing(self.pool.run_job(spec, self.store.path(job.id, VIDEO))) as events:
            async for event in events:
                if event["type"] == "progress":
                    self._progress[job.id] = min(99, 100 * event["chunk"] // max(1, event["chunks"]))
                else:
                    thumbnail = event["thumbnail"]
        await asyncio.to_thread(_write, self.store.path(job.id, THUMBNAIL), thumbnail)

    def _spec(self, job: Job) -> JobSpec:
        """For the workers. JobFailed where the server does not make such a video any more."""
        request, image, video = job.request, None, self.pool.config.video
        if request.size != (video.height, video.width):  # of a job that an earlier server took
            raise JobFailed(f"the server makes {video.width}x{video.height} pixels by now; create the video again")
        schedule = None
        if request.schedule is not None:
            schedule = Schedule.from_config(ScheduleConfig(preset=request.schedule), self.pool.config.stream)
        if request.image:
            image = read_picture(self.store.path(job.id, IMAGE), request.size)
        return JobSpec(request.prompt, request.seed, request.num_frames, schedule, image, request.lora)


def _write(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
