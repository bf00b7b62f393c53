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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, Full, Queue, SimpleQueue
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from configs.geometry import pixel_frames
from configs.schema import CONTEXTS, SWITCHES
from model.schedule import PRESETS, Schedule
from pipeline.async_decoder import prefetch
from pipeline.diagonal import DiagonalPipeline
from pipeline.provenance import commit, versions
from pipeline.sequence_parallel import ParallelStudent
from pipeline.snapshot import Snapshot
from pipeline.stream import ChunkResult, StreamSession
from server.adapters import Adapters
from server.controls import VIDEO, Control, bounds
from server.encoding import FragmentEncoder, jpeg, thumbnail
from server.limits import MAX_KEPT, MAX_MESSAGE, MAX_PROMPT, MAX_SEED, MAX_TAKES, MAX_UPLOAD, Limits
from server.workers import HEADROOM, STOP_SECONDS, Costs, JobSpec, ModelSource, Video, later_nfe
from utils import exits
from utils.device import pick_device
from utils.logs import console, get_logger
from utils.prompts import read_prompts
from utils.video import VideoWriter

log = get_logger(__name__)
LANES = 4  # a single thread would hold up a GPU
IN_FLIGHT = 2  # chunks that are queued on a GPU: one that it makes, and one more so that it never waits
BREAKING_OFF = ("open", "seek", "branch", "set_image")  # controls for which the chunk that is being made is for nobody
MAX_WAITING = 64  # controls of one stream that wait for its next chunk
THUMBNAIL = 480  # pixels across, of a finished video
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


@dataclass(frozen=True)
class Chunk:
    """A chunk that was made, and what under."""

    take: int
    chunk: int
    frame: int  # its first
    prompt: str
    switch: str  # how the prompt came in, if it did here
    seed: int
    schedule: Schedule = field(repr=False)

    @property
    def place(self) -> tuple[int, int]:
        return self.take, self.chunk

    @property
    def nfe(self) -> int:
        return len(self.schedule.timesteps(self.chunk)) + (self.schedule.context_timestep(self.chunk) is not None)


@dataclass(frozen=True)
class Turn:
    """What is known of a chunk when it is queued, for the receipts and measurements that follow it."""

    begin: float  # when it was begun
    room: float  # since when it could have been
    asked: float | None  # when the control that began its take arrived, of a take's first chunk
    seekable: bool
    receipts: tuple[tuple[int, list[str]], ...]  # ids that it shows, with the warnings of their prompts


class Stream:
    """One client's video and its branches. All but what says so runs on the main thread.

    A take is what was made since `open`, `seek`, `branch` or `set_image`. Its video begins with the chunks before it of
    the take that it went on from, which is kept: going back is a branch, and takes nothing away.
    """

    def __init__(self, worker: "WorkerProcess", number: int):
        self.worker, self.number, self.lora = worker, number, None
        self.pipe, self.session = worker.pipe, worker.spare_session()
        self.lane = next(worker.lanes)
        self.take = 0  # the newest
        self.takes: dict[int, list[Chunk]] = {}  # the whole video of each
        self.snapshots: OrderedDict[tuple[int, int], Snapshot] = OrderedDict()  # by take, and the chunk that comes next
        self.seed, self.switch, self.video = 0, self.session.switch, "fmp4"
        self.playing = self.paused = False
        self.frame = self.shown = 0  # the next to be made, and to be shown
        self.last: float = 0  # frames that the video may have
        self._start: Tensor | None = None  # latents that it begins with
        self._start_warnings: list[str] = []
        self._chunks: Iterator[ChunkResult] = iter(())
        self._asked_for: tuple[Control, float] | None = None  # the take to begin, and when it was
        self._changes: dict[str, Control] = {}  # of the next chunk: the newest of each type
        self._receipts: list[int] = []  # ids of what the next chunk will show
        self._pauses: list[int] = []  # ids of pauses that are to be told
        self._asked: float | None = None
        self._room = 0.0
        self._clock = 0.0  # when frame 0 would have been shown, had the take been shown from its beginning
        self._paused_at = 0.0
        self._prompt = ""  # of the next chunk
        self._due, self._length = 0.0, 0.0  # of the last chunk that was sent; the lane's own

    # what the client asks for

    def act(self, control: Control, arrived: float) -> None:
        """Take in a control, for the next turn: until then the newest of each kind counts, so that a client who sends
        many has no more of the model's time than one who sends few. UserError where it cannot be done."""
        if control.type == "shown":
            if control.take == self.take:
                self.shown = max(self.shown, min(control.frame, self.frame))
        elif control.type in BREAKING_OFF:
            self._ask_for_take(control, arrived)
        elif not (self.playing or self._asked_for):
            raise UserError("nothing is playing; open a video, or seek to a chunk of one that has ended")
        elif control.type == "pause":
            if not self.paused:
                self.paused, self._paused_at = True, arrived
            self._pauses.append(control.id)
            if not self._asked_for:
                self._tell_pauses()
        elif control.type == "resume":
            self._clock += arrived - self._paused_at if self.paused else 0.0
            self.paused = False
            self._receipts.append(control.id)
        else:
            if len(self._receipts) >= MAX_WAITING:
                raise UserError(f"{MAX_WAITING} controls wait for the next chunk; wait for their receipts")
            self._changes[control.type] = control
            self._receipts.append(control.id)
        self._note_room()

    def _ask_for_take(self, control: Control, arrived: float) -> None:
        """In place of one that was asked for before and has not begun."""
        if control.type != "open" and not (self.takes or self._asked_for):
            raise UserError("nothing has been opened; send open first")
        if control.type in ("seek", "branch"):
            self._place(control)
        if control.type == "set_image":
            if self._asked_for and self._asked_for[0].type == "open":
                control = replace(self._asked_for[0], id=control.id, image=control.image)
        else:
            self._changes = {}
        self._asked_for, self._receipts, self._pauses, self.paused = (control, arrived), [], [], False

    def _tell_pauses(self) -> None:
        place = {"take": self.take, "chunk": self.session.chunk, "frame": self.frame}
        for id in self._pauses:
            self._say("applied", id=id, **place, warnings=[])
        self._pauses = []

    # what a turn does of it

    def _begin_take(self) -> bool:
        """Begin the take that was asked for; False where it cannot be, which is told."""
        (control, arrived), self._asked_for = self._asked_for, None
        begin = {"open": self._open, "set_image": self._set_image}
        try:
            begin.get(control.type, self._go_back)(control, arrived)
        except UserError as error:
            self._say("error", id=control.id, message=str(error))
            return False
        self._tell_pauses()
        return True

    def _change(self) -> list[tuple[int, list[str]]]:
        """Do to the next chunk what was asked for; ids of all that it shows, with the warnings of a prompt."""
        changes, self._changes = self._changes, {}
        if schedule := changes.get("set_schedule"):
            self.session.schedule = schedule.schedule
        if seed := changes.get("set_seed"):
            self.seed = seed.seed
            self.session.reseed(self.seed)
        warnings = []
        if prompt := changes.get("set_prompt"):
            self.switch, self._prompt = prompt.switch or self.session.switch, prompt.prompt
            self.session.set_prompt(self._prompt, self.switch)
            warnings = self.pipe.prompt_warnings(self._prompt)
        return [(id, warnings if prompt and id == prompt.id else []) for id in self._receipts]

    def _set_image(self, control: Control, arrived: float) -> None:
        self._set_start(control.image)
        self._change()
        self._begin(control.id, arrived, None, 0)
        self._from_the_start(self._prompt, self.seed)
        self._announce(control.id, None)

    def _open(self, control: Control, arrived: float) -> None:
        self._set_start(control.image)
        self.video = control.video or VIDEO[0]
        seconds = self.worker.limits.max_seconds if control.seconds is None else control.seconds
        self.last = round(seconds * self.worker.fps)
        self.session.schedule = control.schedule or self.pipe.schedule
        self.snapshots.clear()
        self.takes.clear()
        self._begin(control.id, arrived, None, 0)
        self._from_the_start(control.prompt, control.seed or 0)
        self._announce(control.id, None)

    def _set_start(self, image: np.ndarray | None) -> None:
        """Videos begin with this picture from now on, uint8 [H, W, 3]; None = with nothing."""
        self._start = None if image is None else self.pipe.encode(image[None])
        self._start_warnings = [] if image is None else self.pipe.conditioning_warnings

    def _from_the_start(self, prompt: str, seed: int) -> None:
        self.seed, self.switch, self._prompt = seed, self.pipe.config.stream.switch, prompt
        self._chunks = self.session.play(prompt, seed, None, self._start)

    def _go_back(self, control: Control, arrived: float) -> None:
        """A take from before a chunk on, as it was made or with what is given in place of that."""
        parent, there = self._place(control)
        self._begin(control.id, arrived, self.takes[parent], there.chunk)
        prompt, seed = control.prompt or there.prompt, there.seed if control.seed is None else control.seed
        self.session.schedule = control.schedule or there.schedule
        if there.chunk == 0:
            self._from_the_start(prompt, seed)
        else:
            snapshot = self.snapshots[there.place]
            self.session.restore(snapshot)
            self.seed, self.switch, self._prompt = seed, there.switch, prompt
            if seed != snapshot.seeds[0]:
                self.session.reseed(seed)
            if prompt != snapshot.text.prompts[0]:
                self.session.set_prompt(prompt, self.switch)
            self._chunks = self.session.resume()
        self._forget()
        self._announce(control.id, parent)

    def _place(self, control: Control) -> tuple[int, Chunk]:
        """The take and its chunk that a control names."""
        take = self.take if control.take is None else control.take
        there = next((made for made in self.takes.get(take, ()) if made.chunk == control.chunk), None)
        if there is None or (there.chunk and there.place not in self.snapshots):
            raise UserError(f"chunk={control.chunk} of take {take} is not kept; seek to one that is seekable")
        return take, there

    def _begin(self, id: int, arrived: float, video: list[Chunk] | None, chunk: int) -> None:
        """A new take whose first chunk is `chunk`, on from `video`."""
        self.take += 1
        self.takes[self.take] = [made for made in video or () if made.chunk < chunk]
        self.frame = self.shown = pixel_frames(chunk * self.pipe.geometry.chunk_frames)
        self.playing = True
        self._receipts, self._asked, self._room = [id, *self._receipts], arrived, arrived
        self._clock = time.perf_counter() - self.frame / self.worker.fps

    def _announce(self, id: int, parent: int | None) -> None:
        warnings = [*self._start_warnings, *self.pipe.prompt_warnings(self._prompt)]
        self._say(
            "take", id=id, take=self.take, parent=parent, chunk=self.session.chunk, frame=self.frame,
            takes=list(self.takes), prompt=self._prompt, seed=self.seed, warnings=warnings,
            **self.worker.describe(self.session.schedule),
        )  # fmt: skip

    # turns

    @property
    def wants_chunk(self) -> bool:
        ahead = self.worker.limits.ahead_seconds * self.worker.fps
        return bool(self._asked_for) or (self.playing and not self.paused and self.frame - self.shown <= ahead)

    @property
    def hurried(self) -> bool:
        """Whether it is further than a player needs it: its client takes chunks as fast as they are made."""
        made = self.frame / self.worker.fps - (time.perf_counter() - self._clock)
        return made > self.worker.limits.ahead_seconds and not self._asked_for

    def make(self) -> bool:
        """Queue the next chunk; whether there is one, which a break-off prevents."""
        begin = time.perf_counter()
        if self._asked_for and not (self._begin_take() and self.wants_chunk):
            return False
        receipts = self._change()
        if self.session.chunk and self.session.cache_bytes <= self.worker.limits.rewind_bytes // 2:
            self._keep()
        result = next(self._chunks, None)
        if result is None:  # broken off; what was asked for of this chunk goes for it still
            self._chunks = self.session.resume()
            return False
        made = Chunk(
            self.take, result.chunk, self.frame, result.prompts[0], self.switch, self.seed, self.session.schedule
        )
        self.takes[self.take] = [*self.takes[self.take], made]
        self._forget()
        seekable = made.chunk == 0 or made.place in self.snapshots
        turn = Turn(begin, self._room, self._asked, seekable, tuple(receipts))
        self._receipts, self._asked = [], None
        self.frame += result.frames.shape[1]
        self.worker.waiter.submit(self._guarded, self._arrived, result, made, turn)
        if self.frame >= self.last:
            self.end("length", f"{self.last / self.worker.fps:.0f} s are the most that this video may last")
        self._room = 0.0
        self._note_room()
        return True

    def _note_room(self) -> None:
        """Remember since when the next chunk could be made."""
        if not self._room and self.wants_chunk:
            self._room = time.perf_counter()

    def end(self, reason: str, message: str) -> None:
        """No more chunks come, unless the client goes back."""
        self.playing = False
        self._say("ended", reason=reason, message=message)

    def close(self) -> None:
        """Give the session to whoever comes next: its cache, and on a GPU its graphs."""
        self.playing, self._asked_for = False, None
        self.take = -1  # what is on its way is for nobody
        self.snapshots.clear()
        self.worker.spare.append(self.session)

    def _keep(self) -> None:
        """A snapshot of now, on the host; the oldest ones go where there are too many."""
        self.snapshots[self.take, self.session.chunk] = self.session.snapshot("cpu")
        while len(self.snapshots) * self.session.cache_bytes > self.worker.limits.rewind_bytes:
            self.snapshots.popitem(last=False)

    def _forget(self) -> None:
        """Let the oldest takes go where there are too many, or too many chunks, and what only they needed."""
        while len(self.takes) > MAX_TAKES or (len(self.takes) > 1 and len(self._places()) > MAX_KEPT):
            del self.takes[min(self.takes)]
        self.takes[self.take] = self.takes[self.take][-MAX_KEPT:]
        needed = {*self._places(), (self.take, self.session.chunk)}
        for place in [place for place in self.snapshots if place not in needed]:
            del self.snapshots[place]

    def _places(self) -> set[tuple[int, int]]:
        """Take and number of every chunk that is kept."""
        return {made.place for video in self.takes.values() for made in video}

    # what is sent

    def _say(self, kind: str, **values: Any) -> None:
        """An event, after all chunks that were made before it."""
        self.worker.waiter.submit(self.lane.submit, self.worker.send, "event", self.number, {"type": kind, **values})

    def _guarded(self, step: Callable, what: Any, made: Chunk, *arguments: Any) -> None:
        """A step of a chunk on the waiter or in the lane: what goes wrong there ends the stream, and is told."""
        try:
            step(what, made, *arguments)
        except Exception as error:
            if self.worker.stopped.is_set() and not isinstance(error, UserError):
                return  # pools take no more work
            self.worker.inbox.put(("fault", self.number, 0.0, made.take, error))
            if not isinstance(error, UserError):
                log.exception("a stream broke off")
                raise

    def _arrived(self, result: ChunkResult, made: Chunk, turn: Turn) -> None:
        """On the waiter: until the chunk is there."""
        try:
            frames = result.wait().frames[0].numpy()
        finally:
            seconds = self.worker.made(turn.begin)
        self.lane.submit(self._guarded, self._send, frames, made, turn, seconds)

    def _send(self, frames: np.ndarray, made: Chunk, turn: Turn, seconds: float) -> None:
        """In the lane: encode a chunk and send it, with the receipts of what it shows."""
        if made.take != self.take:
            return
        begin = time.perf_counter()
        place = {"take": made.take, "chunk": made.chunk, "frame": made.frame}
        if self.video == "jpeg":
            parts = [jpeg(frame) for frame in frames]
        else:
            parts = [self.worker.encoder.encode(frames, made.frame)]
            if turn.asked is not None:
                init = self.worker.encoder.init
                header = {"kind": "init", **place, "frames": 0, "sizes": [len(init)]}
                self.worker.send("video", self.number, Video(header, init))
        parts.append(thumbnail(frames))
        now = time.perf_counter()
        header = {
            "kind": "jpeg" if self.video == "jpeg" else "fragment",
            **place,
            "frames": len(frames),
            "sizes": [len(part) for part in parts],
            "prompt": made.prompt,
            "seed": made.seed,
            "steps": len(made.schedule.timesteps(made.chunk)),
            "nfe": made.nfe,
            "wait_ms": round(1000 * (turn.begin - turn.room), 1),
            "make_ms": round(1000 * (begin - turn.begin), 1),
            "encode_ms": round(1000 * (now - begin), 1),
            "seekable": turn.seekable,
        }
        measured = {
            "seconds": seconds,
            "nfe": made.nfe,
            "first_frame": None if turn.asked is None else now - turn.asked,
            "late": self._late(now, turn, len(frames)),
            "memory": self.worker.memory,
        }
        self.worker.send("video", self.number, Video(header, b"".join(parts)), measured)
        for id, warnings in turn.receipts:
            self.worker.send("event", self.number, {"type": "applied", "id": id, **place, "warnings": warnings})

    def _late(self, now: float, turn: Turn, frames: int) -> float:
        """Seconds that a chunk comes after a player needed it, which shows each one for its length.

        A client that takes its time, or pauses, moves what comes after: late is what could have been begun in time.
        """
        if turn.asked is not None:
            self._due = now
        else:
            self._due = max(self._due, turn.room) + self._length
        self._length = frames / self.worker.fps
        return max(0.0, now - self._due)


class Job:
    """A whole video, a chunk at a time."""

    def __init__(self, worker: "WorkerProcess", number: int, spec: JobSpec, output: Path):
        self.worker, self.number, self.output, self.lora = worker, number, output, spec.lora
        self.session = worker.spare_session()
        self.begin = time.perf_counter()
        self.cancelled = False
        self._spec = spec
        self._frames: Queue[np.ndarray | None] = Queue(2)
        self._chunks = self._making()
        self._made = 0

    @property
    def wants_chunk(self) -> bool:
        return not self._frames.full()

    def make(self) -> bool:
        """Make the next chunk; False when all are made or the job was cancelled."""
        if self.cancelled:
            self._chunks.close()
            return False
        return next(self._chunks, None) is not None

    def abandon(self) -> None:
        """End it from outside its turns: its file does not appear."""
        self.cancelled = True
        with suppress(Empty):
            while True:
                self._frames.get_nowait()
        self._frames.put_nowait(None)

    def _making(self) -> Iterator[int]:
        worker, spec = self.worker, self._spec
        chunks = worker.pipe.num_chunks(spec.frames)
        start = None if spec.image is None else worker.pipe.encode(spec.image[None])
        warnings = worker.pipe.warnings([spec.prompt])
        self.session.schedule = spec.schedule or worker.pipe.schedule
        writing = worker.writers.submit(self._write)
        try:
            for result in self.session.play(spec.prompt, spec.seed, chunks, start):
                self._give(result.wait().frames[0].numpy(), writing)
                self._tell({"type": "progress", "chunk": result.chunk + 1, "chunks": chunks})
                self._made = result.chunk + 1
                yield result.chunk
        finally:
            self._give(None, writing)
        if self._made == chunks:
            frames, picture = writing.result()
            self._tell(
                {
                    "type": "done",
                    "frames": frames,
                    "seconds": time.perf_counter() - self.begin,
                    "warnings": warnings,
                    "thumbnail": picture,
                }
            )

    def _give(self, frames: np.ndarray | None, writing) -> None:
        """Hand frames to the writer, as long as it runs."""
        while not writing.done():
            try:
                return self._frames.put(frames, timeout=0.1)
            except Full:
                continue
        writing.result()  # what has stopped it

    def _write(self) -> tuple[int, bytes]:
        """On a thread of its own: frames into the file, which appears when it is whole. Their number, and a JPEG."""
        video, picture = self.worker.pipe.config.video, b""
        with VideoWriter(self.output, video.fps, (video.height, video.width)) as writer:
            while (frames := self._frames.get()) is not None:
                picture = picture or thumbnail(frames, THUMBNAIL)
                writer.write(frames)
                self.worker.wake()
            if self.cancelled:
                raise JobCancelled
        return writer.frames_written, picture

    def _tell(self, event: dict[str, Any]) -> None:
        self.worker.send("job", self.number, event)


class JobCancelled(Exception):
    """The video is not wanted any more: its file does not appear."""


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
            try:
                kind, number, arrived, *content = self.inbox.get(block=turn is None)
            except Empty:
                self._make(turn)
                continue
            if kind == "stop":
                return self._stop()
            self._handle(kind, number, arrived, content)

    def _stop(self) -> None:
        """Let go of what threads wait for: the process ends when they have finished what they are at."""
        self.stopped.set()
        for job in self.jobs.values():
            job.abandon()

    def _turn(self) -> Stream | Job | None:
        """Whose turn it is to make a chunk: streams in the order of their last turns, before jobs in the same."""
        if self._in_flight >= IN_FLIGHT:
            return None
        streams = [stream for stream in self.streams.values() if stream.wants_chunk]
        if not self.jobs:
            return next(iter(streams), None)
        urgent = [stream for stream in streams if not stream.hurried]
        return next(iter([*urgent, *(job for job in self.jobs.values() if job.wants_chunk), *streams]), None)

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
            self.send("job", turn.number, {"type": "failed", "message": said})
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
        for result in prefetch(session.play("a prompt", 0, chunks), IN_FLIGHT - 1 if self.on_gpu else 0):
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
            "context": schedule.default_context,
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
