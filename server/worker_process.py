"""What runs in a worker's process: one pipeline, whose streams make chunks in turns, and jobs in the turns they leave.

Threads: the main one runs the model, and nothing else does; `reader` takes messages in, and breaks off a chunk that is
not wanted any more; `waiter` waits for chunks in the order in which they were made; a few lanes encode and send, one
stream always in the same lane, so that what a client gets is in order.
"""

import os
import signal
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from statistics import median
from typing import Any

import numpy as np
import torch

from configs.errors import UserError
from configs.geometry import pixel_frames
from configs.schema import CONTEXTS, SWITCHES
from model.schedule import PRESETS, Schedule
from pipeline.async_decoder import prefetch
from pipeline.diagonal import DiagonalPipeline
from pipeline.provenance import commit, versions
from pipeline.sequence_parallel import ParallelStudent
from pipeline.stream import StreamSession
from server.adapters import Adapters
from server.controls import VIDEO, Control, bounds
from server.costs import HEADROOM, Costs, later_nfe
from server.encoding import FragmentEncoder
from server.limits import MAX_MESSAGE, MAX_PROMPT, MAX_SEED, MAX_TAKES, MAX_UPLOAD, Limits
from server.worker_job import Job
from server.worker_messages import NO_ROOM, STOP_SECONDS, ModelSource
from server.worker_stream import BREAKING_OFF, Stream
from utils import exits
from utils.device import pick_device
from utils.files import DiskFull
from utils.logs import console, get_logger
from utils.prompts import read_prompts

log = get_logger(__name__)
LANES = 4  # a single thread would hold up a GPU
IN_FLIGHT = 2  # chunks that are queued on a GPU: one that it makes, and one more so that it never waits
MEMORY_MARGIN = 2 * 2**30  # bytes of a GPU that are left free of streams


def run(line: Connection, source: ModelSource, number: int, limits: Limits, parent: int) -> None:
    """The process's whole life. What cannot be loaded is told as one sentence."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of a terminal's processes; the front says stop
    if os.getppid() != parent:  # it has ended while this one started
        return
    console(quiet=number > 0)
    try:
        config = source.config()
        device = pick_device(config.device, number * config.inference.sequence_parallel)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # for streams, events and graphs that name none
        pipe = source.load(number)
        worker = WorkerProcess(line, pipe, limits, Adapters(pipe, source.loras))
        worker.warm_up()
    except Exception as error:
        explained = exits.explain(error)
        if explained is None:
            raise
        line.send(("failed", 0, explained[0].removeprefix("error: ")))
        return
    try:
        worker.serve()
    finally:
        pipe.close()


def new_session(pipe: DiagonalPipeline) -> StreamSession:
    """One beside that of `pipe`, with the same networks."""
    base = pipe.session
    return StreamSession.from_config(pipe.config, base.student, base.codec, base.text_encoder)


class WorkerProcess:
    """The pipeline, who uses it, and whose turn it is."""

    def __init__(self, line: Connection, pipe: DiagonalPipeline, limits: Limits, adapters: Adapters):
        self.line, self.pipe, self.limits, self.adapters = line, pipe, limits, adapters
        video = pipe.config.video
        self.fps, size = video.fps, (video.height, video.width)
        self.encoder = FragmentEncoder(self.fps, size)
        self.on_gpu = pipe.session.device.type == "cuda"
        self.streams: OrderedDict[int, Stream] = OrderedDict()  # by their last turn
        self.jobs: OrderedDict[int, Job] = OrderedDict()
        self.inbox: SimpleQueue[tuple] = SimpleQueue()
        self.stopped = threading.Event()
        self.spare: list[StreamSession] = []
        self.waiter = ThreadPoolExecutor(1, thread_name_prefix="waiter")
        self.writers = ThreadPoolExecutor(8, thread_name_prefix="writer")
        self.lanes = cycle([ThreadPoolExecutor(1, thread_name_prefix=f"lane-{i}") for i in range(LANES)])
        self.costs: Costs
        self._in_flight = 0
        self._last_made = 0.0
        self._promised = 0.0  # until when the front has been told that it may hear nothing
        self._beat = limits.silent_seconds / 5
        self._sending = threading.Lock()

    # talking to the front

    def send(self, kind: str, number: int, *content: Any) -> None:
        """From any thread."""
        with self._sending:
            try:
                self.line.send((kind, number, *content))
            except OSError:  # the front has ended
                self.inbox.put(("stop", 0, 0.0))

    def read(self) -> None:
        """The reader: messages into the inbox. The front's end is that of this process."""
        try:
            while True:
                kind, number, *content = self.line.recv()
                stream, job = self.streams.get(number), self.jobs.get(number)
                if stream and (kind == "close" or (kind == "control" and content[0].type in BREAKING_OFF)):
                    stream.session.cancel()
                if job and kind == "cancel":
                    job.cancelled = True
                    job.session.cancel()
                self.inbox.put((kind, number, time.perf_counter(), *content))
        except (EOFError, OSError):
            self.inbox.put(("stop", 0, 0.0))
            if not self.stopped.wait(STOP_SECONDS):
                os._exit(1)

    def wake(self) -> None:
        """Let the main thread look again whose turn it is."""
        self.inbox.put(("wake", 0, 0.0))

    def made(self, begin: float) -> float:
        """On the waiter: a chunk that was begun then is there. Seconds that it took of the model's time."""
        now = time.perf_counter()
        seconds, self._last_made = now - max(begin, self._last_made), now
        self.inbox.put(("made", 0, now))
        return seconds

    # the main thread

    def serve(self) -> None:
        """Until the front says stop or is gone."""
        threading.Thread(target=self.read, name="reader", daemon=True).start()
        while True:
            turn = self._turn()
            self._promise(turn)
            try:
                kind, number, arrived, *content = self.inbox.get(timeout=0 if turn else self._beat)
            except Empty:
                if turn:
                    self._make(turn)
                continue
            if kind == "stop":
                return self._stop()
            self._handle(kind, number, arrived, content)

    def _promise(self, turn: Stream | Job | None) -> None:
        """Say every few seconds for how long the front may hear nothing before it takes this process for hung: for long
        in a chunk, which may have to be compiled. Not while chunks are waited for: it is they that have to come."""
        seconds = self.limits.silent_seconds
        if turn:
            seconds = 6 * seconds + 20 * self.costs.seconds(bounds(self.pipe.schedule)[0] + 1)
        elif self._in_flight:
            return
        until = time.perf_counter() + seconds
        if abs(until - self._promised) > self._beat:
            self._promised = until
            self.send("alive", 0, seconds)

    def _stop(self) -> None:
        """Let go of what threads wait for: the process ends when they have finished what they are at."""
        self.stopped.set()
        for job in self.jobs.values():
            job.abandon()

    def _turn(self) -> Stream | Job | None:
        """Whose turn it is to make a chunk: the stream whose player needs it first, so that who has just come is not
        late beside those with a reserve. Of streams with more than enough, and of jobs, which go before these, the one
        whose last turn is the longest ago."""
        if self._in_flight >= IN_FLIGHT:
            return None
        enough = time.perf_counter() + self.limits.ahead_seconds
        streams = (stream for stream in self.streams.values() if stream.wants_chunk)
        first = min(streams, key=lambda stream: min(stream.due, enough), default=None)
        if first and first.due < enough:
            return first
        return next((job for job in self.jobs.values() if job.wants_chunk), first)

    def _make(self, turn: Stream | Job) -> None:
        """One chunk."""
        own = self.streams if isinstance(turn, Stream) else self.jobs
        own.move_to_end(turn.number)
        try:
            self.adapters.use(turn.lora)
            more = turn.make()
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("a chunk could not be made")
            if not self._usable():
                raise  # the front starts another process
            self._fault(turn, error)
            return
        if isinstance(turn, Stream):
            self._in_flight += more
        elif not more:
            self._finish(turn)

    def _fault(self, turn: Stream | Job, error: Exception) -> None:
        said = str(error) if isinstance(error, UserError) else "the server could not go on; its log says why"
        if isinstance(turn, Stream):
            turn.end("fault", said)
        else:
            code = "generation_failed"
            if isinstance(error, DiskFull):
                log.error(str(error))
                said, code = NO_ROOM, "storage"
            self.send("job", turn.number, {"type": "failed", "message": said, "code": code})
            self._finish(turn)

    def _usable(self) -> bool:
        """Whether the GPU still computes, after an error, and the other GPUs that share the student."""
        student = self.pipe.session.student
        if isinstance(student, ParallelStudent) and student.ranks.failure:
            return False
        try:
            torch.zeros(1, device=self.pipe.session.device).add_(1).cpu()
        except RuntimeError:
            return False
        return True

    def _finish(self, job: Job) -> None:
        del self.jobs[job.number]
        self.spare.append(job.session)

    def _handle(self, kind: str, number: int, arrived: float, content: list[Any]) -> None:
        match kind:
            case "made":
                self._in_flight -= 1
            case "control":
                self._control(number, content[0], arrived)
            case "close":
                if number in self.streams:
                    self.streams.pop(number).close()
            case "fault":
                stream, (take, error) = self.streams.get(number), content
                if stream and stream.take == take and stream.playing:
                    self._fault(stream, error)
            case "job":
                spec, output = content[0]
                self.jobs[number] = Job(self, number, spec, Path(output))
            case "cancel":
                if number in self.jobs:
                    self.jobs[number].cancelled = True

    def _control(self, number: int, control: Control, arrived: float) -> None:
        if number not in self.streams:
            if control.type != "open":  # a late word for a stream of the process before this one
                return
            self.streams[number] = Stream(self, number)
        try:
            self.streams[number].act(control, arrived)
        except UserError as error:
            self.send("event", number, {"type": "error", "id": control.id, "message": str(error)})

    def spare_session(self) -> StreamSession:
        """One that somebody has left, or a new one: as many are kept as there were at once."""
        return self.spare.pop() if self.spare else new_session(self.pipe)

    @property
    def memory(self) -> int:
        """Bytes of the GPU that are allocated."""
        return torch.cuda.memory_allocated(self.pipe.session.device) if self.on_gpu else 0

    def describe(self, schedule: Schedule) -> dict[str, Any]:
        """What a schedule costs, for people."""
        chunks = self.pipe.num_chunks()
        table = schedule.table(chunks, self.pipe.geometry)
        return {"table": table, "nfe": schedule.nfe(chunks), "chunks": chunks, "fps": self.costs.rate(schedule)}

    # before the first client

    def warm_up(self) -> None:
        """Play what clients will play, so that none waits for compiling and CUDA graphs, and measure it."""
        session = self.spare_session()
        self._play(session)
        before = self.memory
        times, spans = self._play(session)
        seconds = float(median(np.diff(times)[-3:]))
        schedule = self.pipe.schedule
        step = median(value for name, value in spans.items() if name.startswith("step"))
        decode = min(spans["decode"] / step, 4.0) if step > 0 else 1.0
        frames = self.pipe.geometry.chunk_frames * 4
        self.costs = Costs(seconds / (later_nfe(schedule) + decode), decode, frames, self.fps)
        self.spare.append(session)
        about = self._about(self._most_streams(before))
        self.send("ready", 0, {"about": about, "costs": self.costs, "memory": self.memory})

    def _play(self, session: StreamSession) -> tuple[list[float], dict[str, float]]:
        """Play until chunks cost the same; when each was there, and the spans of the last one."""
        geometry, times = self.pipe.geometry, []
        chunks = max(len(self.pipe.schedule.timesteps_by_chunk), geometry.window_chunks or self.pipe.num_chunks()) + 4
        ahead = IN_FLIGHT - 1 if session.async_decoder.overlap else 0
        for result in prefetch(session.play("a prompt", 0, chunks), ahead):
            frames = result.wait().frames[0].numpy()
            if not self.on_gpu:  # where encoding takes the model's time
                self.encoder.encode(frames, 0)
            times.append(time.perf_counter())
        return times, result.timings

    def _most_streams(self, before: int) -> int:
        """Streams that there is memory for; on a GPU, sessions for as many as it can play are made ready."""
        most = self.limits.visitors
        if not self.on_gpu:
            return most
        second = new_session(self.pipe)
        self._play(second)
        self.spare.append(second)
        free, _ = torch.cuda.mem_get_info(self.pipe.session.device)
        most = min(most, 2 + max(0, free - MEMORY_MARGIN) // max(1, self.memory - before))
        wanted = self.limits.streams or int(HEADROOM / self.costs.share(self.pipe.schedule))
        for _ in range(min(most, wanted) - 2):
            self.spare.append(new_session(self.pipe))
            self._play(self.spare[-1])
        return most

    def _about(self, most_streams: int) -> dict[str, Any]:
        """The model, as `hello` says it, and what the front needs to know."""
        pipe, config, schedule = self.pipe, self.pipe.config, self.pipe.schedule
        most_steps, most_rows = bounds(schedule)
        chunk = pipe.geometry.chunk_frames
        hello = {
            "model": config.name,
            "device": str(pipe.session.device),
            "fps": self.fps,
            "height": config.video.height,
            "width": config.video.width,
            "first_frames": pixel_frames(chunk),
            "chunk_frames": 4 * chunk,
            "video": VIDEO,
            "mime": self.encoder.mime,
            "steps": [len(row) for row in schedule.timesteps_by_chunk],
            "context": schedule.context,
            "switch": config.stream.switch,
            "presets": list(PRESETS),
            "contexts": CONTEXTS,
            "switches": SWITCHES,
            "image": config.model.codec != "taehv",
            "trained_image_start": bool(pipe.card.get("trained_image_start")),
            "examples": _examples(config.inference.prompts),
            "versions": versions() | {"commit": commit()},
            "limits": {
                "seconds": self.limits.max_seconds,
                "ahead_seconds": self.limits.ahead_seconds,
                "idle_seconds": self.limits.idle_seconds,
                "prompt": MAX_PROMPT,
                "seed": MAX_SEED,
                "steps": most_steps,
                "rows": most_rows,
                "message": MAX_MESSAGE,
                "image": MAX_UPLOAD,
                "takes": MAX_TAKES,
            },
        }
        return {
            "hello": hello,
            "device": hello["device"],
            "most_streams": most_streams,
            "clip_chunks": pipe.num_chunks(),
            "geometry": pipe.geometry,
        }


def _examples(path: str) -> list[str]:
    """A few prompts to begin with, from the configuration's own file."""
    try:
        return read_prompts(path)[:8]
    except UserError:
        return ["a red circle moves right"]
