"""One client's video within a worker: its takes, the controls that change it, and how each chunk is sent."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from configs.errors import UserError
from configs.geometry import pixel_frames
from model.schedule import Schedule
from pipeline.snapshot import Snapshot
from pipeline.stream import ChunkResult
from server.controls import VIDEO, Control
from server.encoding import jpeg, thumbnail
from server.limits import MAX_KEPT, MAX_TAKES
from server.worker_messages import Video
from utils.logs import get_logger

if TYPE_CHECKING:
    from server.worker_process import WorkerProcess

log = get_logger(__name__)
BREAKING_OFF = ("open", "seek", "branch", "set_image")  # controls for which the chunk that is being made is for nobody
MAX_WAITING = 64  # controls of one stream that wait for its next chunk


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
        return len(self.schedule.timesteps(self.chunk)) + (self.schedule.context_timestep is not None)


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
        self._first: Chunk | None = None  # of the newest take, which may have been broken off before it was made
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
        self._clock = 0.0  # when a player would have shown frame 0, had it shown all and waited for nothing since
        self._paused_at = 0.0
        self._turned = 0.0  # when its last turn began
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
        chunks = *self.takes.get(take, ()), *([self._first] if self._first and self._first.take == take else ())
        there = next((made for made in chunks if made.chunk == control.chunk), None)
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
        self._first = self._next_chunk(self.session.chunk, self._prompt)
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
    def due(self) -> float:
        """When a player that shows each frame for its length needs the next chunk. A new take is needed at once, but no
        sooner than a chunk's length after the last turn: who asks often takes no more than who plays."""
        if self._asked_for:
            return max(self._asked_for[1], self._turned + self.pipe.geometry.chunk_frames * 4 / self.worker.fps)
        return self._clock + self.frame / self.worker.fps

    def make(self) -> bool:
        """Queue the next chunk; whether there is one, which a break-off prevents."""
        begin = self._turned = time.perf_counter()
        if self._asked_for:
            if not (self._begin_take() and self.wants_chunk):
                return False
        else:
            self._clock += max(0.0, begin - self.due)  # the player has waited for it
        receipts = self._change()
        if self.session.chunk and self.session.cache_bytes <= self.worker.limits.rewind_bytes // 2:
            self._keep()
        result = next(self._chunks, None)
        if result is None:  # broken off; what was asked for of this chunk goes for it still
            self._chunks = self.session.resume()
            return False
        made = self._next_chunk(result.chunk, result.prompts[0])
        self.takes[self.take] = [*self.takes[self.take], made]
        self._forget()
        seekable = made.chunk == 0 or made.place in self.snapshots
        turn = Turn(begin, self._room, self._asked, seekable, tuple(receipts))
        self._receipts, self._asked = [], None
        self.frame = pixel_frames(self.session.chunk * self.pipe.geometry.chunk_frames)
        self.worker.waiter.submit(self._guarded, self._arrived, result, made, turn)
        if self.frame >= self.last:
            self.end("length", f"{self.last / self.worker.fps:.0f} s are the most that this video may last")
        self._room = 0.0
        self._note_room()
        return True

    def _next_chunk(self, chunk: int, prompt: str) -> Chunk:
        return Chunk(self.take, chunk, self.frame, prompt, self.switch, self.seed, self.session.schedule)

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
