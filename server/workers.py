"""Worker processes, seen from the front: one pipeline in each, which the front itself never loads.

    pool = WorkerPool(ModelSource("configs/tiny.yaml"), workers=2)
    await pool.start()                                  # until all are warm; UserError where one cannot be
    session = await pool.open(control)                  # Refused where no worker can keep its rate
    async for item in session: ...                      # dict: an event; Video: a piece of video
    async for event in pool.run_job(spec, path): ...    # a whole video, in the turns that live streams leave
    await pool.stop()

A stream stays where it began. A worker that dies takes its own streams and jobs with it, which are told, and is started
again, after a delay that grows while it keeps dying.
"""

import asyncio
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from configs.errors import UserError
from model.schedule import Schedule
from server.controls import Control
from server.costs import HEADROOM, Costs, later_nfe
from server.limits import Limits
from server.worker_messages import STOP_SECONDS, JobSpec, ModelSource, Video
from utils.logs import get_logger

log = get_logger(__name__)
STEADY_SECONDS = 60.0  # that a worker must have run for its deaths to be forgotten
LONGEST_DELAY = 60.0  # before a worker is started again
LOAD_SECONDS = 1800.0  # that it has to load its model and to warm up
RETRY_SECONDS = 10  # that a client is asked to wait where it is refused


class Refused(Exception):
    """A stream that no worker can keep at its rate beside what it runs; the message says why."""

    def __init__(self, reason: str, retry_after: int = RETRY_SECONDS):
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


class JobFailed(Exception):
    """A video that could not be made; the message is a sentence for who asked for it."""

    def __init__(self, message: str, code: str = "generation_failed"):
        super().__init__(message)
        self.code = code


class WorkerDied(Exception):
    """The worker's process ended while it made a video: the job may be run again."""


class WorkerSession:
    """One stream, on the worker where it began. An asynchronous iterator of what it sends: events and video.

    It ends after `close`, and when its worker has died, whose last word is an `ended` event.
    """

    def __init__(self, worker: "Worker", number: int):
        self._worker, self.number = worker, number
        self.schedule: Schedule  # that it was let in with, or has changed to
        self._costliest: Schedule  # since `open`
        self.lost = False  # its worker has died
        self._items: asyncio.Queue[dict | Video | None] = asyncio.Queue()  # bounded by flow control

    @property
    def worker(self) -> int:
        """Number of the worker."""
        return self._worker.number

    @property
    def share(self) -> float:
        """Of the worker's time, by what it measures now."""
        return self._worker.costs.share(self.schedule)

    def control(self, control: Control) -> None:
        """Hand on a checked control. Refused where a schedule cannot be kept at its rate; nothing has changed then."""
        if control.type == "open":
            schedule = self._costliest = control.schedule or self._worker.pool.schedule
        elif control.type in ("seek", "branch"):  # to a chunk of any schedule that there was
            schedule = control.schedule or self._costliest
        else:
            schedule = control.schedule
        if schedule is not None:
            self._worker.admit(self, schedule)
            self._costliest = max(self._costliest, schedule, key=self._worker.costs.share)
        self._worker.send("control", self.number, control)

    def close(self) -> None:
        """End the stream within one step, and give its place to others."""
        if self._worker.sessions.pop(self.number, None):
            self._worker.send("close", self.number)
        self._items.put_nowait(None)

    def put(self, item: dict | Video | None) -> None:
        """Of the worker: what it sent; None = no more comes."""
        self._items.put_nowait(item)

    def __aiter__(self) -> "WorkerSession":
        return self

    async def __anext__(self) -> dict | Video:
        item = await self._items.get()
        if item is None:
            raise StopAsyncIteration
        return item


class Worker:
    """One process, from the front. All but its two threads runs on the event loop."""

    def __init__(self, pool: "WorkerPool", number: int):
        self.pool, self.number = pool, number
        self.state = "warming"  # or "ready", "restarting", "stopped"
        self.about: dict[str, Any] = {}  # of the model, once it is ready
        self.costs: Costs | None = None
        self.memory = 0  # bytes of the GPU that are allocated
        self.fault: UserError | None = None  # why it cannot be started
        self.sessions: dict[int, WorkerSession] = {}
        self.jobs: dict[int, asyncio.Queue] = {}
        self.restarts = self.hangs = 0
        self.settled = asyncio.Event()  # ready, or cannot be
        self._deaths = 0
        self._since = 0.0
        self.loop: asyncio.AbstractEventLoop  # that it was launched on
        self._process: multiprocessing.process.BaseProcess | None = None
        self._gone = asyncio.Event()  # it has ended; its reader alone waits for it, since two can miss the exit code
        self._outbox: SimpleQueue | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._patience = 0.0  # seconds for which it may still say nothing

    @property
    def capacity(self) -> int:
        """Streams with the configured schedule that it can keep at their rate; 1 at least."""
        if self.costs is None:
            return 0
        measured = max(1, int(HEADROOM / self.costs.share(self.pool.schedule)))
        return min(self.about["most_streams"], self.pool.limits.streams or measured)

    @property
    def load(self) -> float:
        """Share of its time that its streams take."""
        return sum(session.share for session in self.sessions.values())

    def status(self) -> dict[str, Any]:
        nfe = later_nfe(self.pool.schedule)
        return {
            "worker": self.number,
            "state": self.state,
            "device": self.about.get("device"),
            "pid": self._process.pid if self._process else None,
            "sessions": len(self.sessions),
            "jobs": len(self.jobs),
            "load": self.load,
            "capacity": self.capacity if self.state == "ready" else 0,
            "chunk_seconds": self.costs.seconds(nfe) if self.costs else None,
            "gpu_memory": self.memory,
            "restarts": self.restarts,
            "hangs": self.hangs,
        }

    def launch(self) -> None:
        """Start the process; it reports when it is warm."""
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = self._spawn(theirs)
        theirs.close()
        self._gone.clear()
        self._outbox = SimpleQueue()
        self.loop = asyncio.get_running_loop()
        threading.Thread(target=self._write, args=(ours, self._outbox), daemon=True).start()
        threading.Thread(target=self._read, args=(ours, self._outbox), daemon=True).start()
        self._patience = LOAD_SECONDS
        self._watch(self._process)

    def _spawn(self, line: Connection) -> multiprocessing.process.BaseProcess:
        arguments = (line, self.pool.source, self.number, self.pool.limits, os.getpid())
        process = multiprocessing.get_context("spawn").Process(
            target=begin, args=arguments, name=f"worker-{self.number}", daemon=True
        )
        process.start()
        return process

    def _watch(self, process: multiprocessing.process.BaseProcess) -> None:
        """Kill the process if it says nothing for longer than it may, which it tells itself (`alive`): then it hangs.

        Counted in ticks, which do not come while this process is itself held up.
        """
        if self.state == "stopped" or self._gone.is_set() or process is not self._process:
            return
        tick = self.pool.limits.silent_seconds / 10
        self._patience -= tick
        if self._patience > 0:
            self.loop.call_later(tick, self._watch, process)
            return
        self.hangs += 1
        log.warning(f"worker {self.number} says nothing any more; it is killed")
        process.kill()

    def send(self, *message: Any) -> None:
        """Queue a message for the process."""
        self._outbox.put(message)

    def _write(self, line: Connection, outbox: SimpleQueue) -> None:
        while (message := outbox.get()) is not None:
            try:
                line.send(message)
            except OSError:  # the process has ended, which the reader notices
                return

    def _read(self, line: Connection, outbox: SimpleQueue) -> None:
        try:
            while True:
                self._call(self._heard, *line.recv())
        except (EOFError, OSError):
            outbox.put(None)
            self._process.join()
            line.close()
            self._call(self._ended)

    def _call(self, function: Callable, *arguments: Any) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function, *arguments)

    def _heard(self, kind: str, number: int, content: Any = None, measured: dict[str, Any] | None = None) -> None:
        match kind:
            case "ready":
                self.about, self.costs = content["about"], content["costs"]
                self.state, self.memory, self._since = "ready", content["memory"], time.monotonic()
                self._patience = self.pool.limits.silent_seconds
                self.settled.set()
            case "alive":
                self._patience = content
            case "failed":
                self.fault = UserError(content)
                self.settled.set()
            case "event" | "video":
                if measured:
                    self._measure(measured)
                if number in self.sessions:
                    self.sessions[number].put(content)
            case "job":
                if number in self.jobs:
                    self.jobs[number].put_nowait(content)

    def _measure(self, measured: dict[str, Any]) -> None:
        """Take in what making a chunk has shown."""
        self.costs.learn(measured["seconds"], measured["nfe"])
        self.memory = measured["memory"]
        self.pool.observe("chunk_seconds", self.number, measured["seconds"])
        if measured["first_frame"] is not None:
            self.pool.observe("first_frame_seconds", self.number, measured["first_frame"])
        if measured["late"] > 0:
            self.pool.observe("late_seconds", self.number, measured["late"])

    def _ended(self) -> None:
        """The process is gone: tell those who were on it, and start it again."""
        self._gone.set()
        stopping = self.state == "stopped"
        message = "the process that made this stream has ended and is started again; open a new one"
        for session in self.sessions.values():
            session.put(
                {
                    "type": "ended",
                    "reason": "worker",
                    "message": "the server stops" if stopping else message,
                }
            )
            session.lost = True
            session.put(None)
        for job in self.jobs.values():
            job.put_nowait(WorkerDied(f"worker {self.number} ended with exit code {self._process.exitcode}"))
        self.sessions, self.jobs = {}, {}
        self.costs, self.memory = None, 0
        code = self._process.exitcode
        if not self._since and not self.fault:  # what never ran is wrong from the start
            self.fault = UserError(f"worker {self.number} ended with exit code {code} while it loaded the model")
        if stopping or not self._since:
            self.settled.set()
            return
        ran_well = self.state == "ready" and time.monotonic() - self._since > STEADY_SECONDS
        self._deaths = 1 if ran_well else self._deaths + 1
        delay = min(LONGEST_DELAY, 2.0 ** (self._deaths - 1))
        self.state = "restarting"
        self.restarts += 1
        log.warning(f"worker {self.number} ended with exit code {code}; it is started again in {delay:g} s")
        self._timer = asyncio.get_running_loop().call_later(delay, self.launch)

    def admit(self, session: WorkerSession, schedule: Schedule) -> None:
        """Reserve what a stream of this schedule takes; Refused where that leaves others, or itself, too little.

        A stream alone is let in whatever it takes.
        """
        share = self.costs.share(schedule)
        others = [other for other in self.sessions.values() if other is not session]
        load = sum(other.share for other in others)
        most = self.about["most_streams"]
        if self.pool.limits.streams:
            most = min(most, self.pool.limits.streams)
        elif others and load + share > HEADROOM:
            raise Refused(
                f"the streams that run take {load:.0%} of a worker's time and this one would take {share:.0%}; all of "
                f"them would not keep {self.costs.fps} frames a second; try again later, or fewer steps"
            )
        if len(others) >= most:
            reason = f"no room for another stream: a worker takes {most} at once, which run already; try again later"
            raise Refused(reason)
        session.schedule = schedule
        self.sessions[session.number] = session

    async def stop(self) -> None:
        """End the process, by force where it does not listen."""
        self.state = "stopped"
        if self._timer:
            self._timer.cancel()
        if self._process is None:
            return
        self.send("stop", 0)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._gone.wait(), STOP_SECONDS)
        if not self._gone.is_set():
            self._process.kill()
            await self._gone.wait()


def begin(line: Connection, source: ModelSource, number: int, limits: Limits, parent: int) -> None:
    """Of the new process. The model's half is imported there alone."""
    from server.worker_process import run

    run(line, source, number, limits, parent)


class WorkerPool:
    """Workers, one a GPU; on a CPU as many as are asked for."""

    def __init__(self, source: ModelSource, workers: int = 1, limits: Limits | None = None):
        if not 1 <= workers <= 64:
            raise UserError(f"--workers={workers} is out of range; give a number from 1 to 64")
        self.source, self.limits = source, limits or Limits()
        self.config = source.config()
        self.schedule = Schedule.from_config(self.config.schedule, self.config.stream)
        self.workers = [Worker(self, number) for number in range(workers)]
        # called with a name (chunk_seconds, first_frame_seconds, late_seconds), a worker's number and a value
        self.observe: Callable[[str, int, float], None] = lambda name, worker, value: None
        self._numbers = itertools.count(1)

    async def start(self) -> None:
        """Start all workers and wait until they are warm. UserError where one cannot load its model."""
        for worker in self.workers:
            worker.launch()
        await asyncio.gather(*(worker.settled.wait() for worker in self.workers))
        for worker in self.workers:
            if worker.fault:
                await self.stop()
                raise worker.fault

    async def stop(self) -> None:
        """End all processes; streams and jobs are told as if their workers had died."""
        await asyncio.gather(*(worker.stop() for worker in self.workers))

    def status(self) -> list[dict[str, Any]]:
        """Of each worker: state, sessions, jobs, load, capacity (streams), chunk_seconds, gpu_memory, restarts, hangs,
        device, pid."""
        return [worker.status() for worker in self.workers]

    @property
    def ready(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.state == "ready"]

    @property
    def about(self) -> dict[str, Any] | None:
        """The model, as `hello` describes it; None while no worker is ready."""
        return next((worker.about for worker in self.ready), None)

    def describe(self, schedule: Schedule) -> dict[str, Any]:
        """What a schedule costs, for people. Refused while no worker is ready."""
        worker = self._least_loaded()
        chunks = worker.about["clip_chunks"]
        return {
            "table": schedule.table(chunks, worker.about["geometry"]),
            "nfe": schedule.nfe(chunks),
            "chunks": chunks,
            "fps": worker.costs.rate(schedule),
        }

    def open(self, control: Control) -> WorkerSession:
        """Begin a stream on the worker with the most time to spare; Refused, with the reason, where none has enough."""
        session = WorkerSession(self._least_loaded(), next(self._numbers))
        session.control(control)
        return session

    def _least_loaded(self) -> Worker:
        if not self.ready:
            raise Refused("the model is being loaded; try again in a moment")
        return min(self.ready, key=lambda worker: (worker.load, len(worker.jobs)))

    async def run_job(self, spec: JobSpec, output: Path) -> AsyncIterator[dict[str, Any]]:
        """Make a whole video at `output`, which is written whole or not at all.

        Yields {"type": "progress", "chunk", "chunks"} after each chunk, and in the end {"type": "done", "frames",
        "seconds", "warnings", "thumbnail": bytes of a JPEG}. JobFailed: a sentence why not; WorkerDied; Refused while
        no worker is ready. Closing the iterator ends the job within one step.
        """
        ready = self.ready
        if not ready:
            raise Refused("the model is being loaded; try again in a moment")
        worker = min(ready, key=lambda worker: (len(worker.jobs), worker.load))
        number = next(self._numbers)
        events = worker.jobs[number] = asyncio.Queue()
        worker.send("job", number, (spec, str(output)))
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                if event["type"] == "failed":
                    raise JobFailed(event["message"], event["code"])
                yield event
                if event["type"] == "done":
                    return
        finally:
            if worker.jobs.pop(number, None):
                worker.send("cancel", number)
