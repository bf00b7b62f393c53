"""One visitor's stream: a session of its own, its past to go back to, and its pictures to take home.

All visitors share one worker thread, which owns the model and makes one chunk at a time in the order of asking; a
visitor asks for the next chunk only when it has the one before, so turns are fair.
"""

import io
import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256

import imageio.v3 as iio
import numpy as np
from PIL import Image
from torch import Tensor

from configs.errors import UserError
from model.schedule import Schedule
from pipeline.diagonal import DiagonalPipeline
from pipeline.provenance import commit, versions
from pipeline.snapshot import Snapshot
from pipeline.stream import StreamSession
from server.messages import Play, Rewind, Say
from utils.video_live import LiveWriter

QUALITY = 92  # of JPEG
THUMB = 96  # pixels across
_ENCODERS = ThreadPoolExecutor(4, thread_name_prefix="jpeg")  # a single thread would hold up a GPU
MAX_KEPT = 800  # chunks whose pictures are kept for the download: ten minutes at 16 frames a second
MAX_TAKES = 8  # a video and its branches that are kept


@dataclass
class Costs:
    """Running means of what things take, seconds; shared by all visitors, written by the worker."""

    step: float | None = None
    decode: float | None = None

    def learn(self, timings: dict[str, float]) -> None:
        for name, value in timings.items():
            if name.startswith("step") or name == "context":
                self.step = value if self.step is None else 0.9 * self.step + 0.1 * value
            elif name == "decode":
                self.decode = value if self.decode is None else 0.9 * self.decode + 0.1 * value

    def fps(self, schedule: Schedule, chunk: int, frames: int) -> float | None:
        """Frames a second that the schedule's chunk `chunk` would run at; None before anything was measured."""
        if self.step is None or self.decode is None:
            return None
        return frames / (self.step * (schedule.nfe(chunk + 1) - schedule.nfe(chunk)) + self.decode)


@dataclass(frozen=True)
class MadeChunk:
    """What is sent of a chunk."""

    take: int
    chunk: int
    prompt: str
    switch: str  # how the prompt came in, if it did here
    seed: int
    jpegs: list[bytes] = field(repr=False)
    thumb: bytes = field(repr=False)
    seconds: float  # of making it
    rewindable: bool
    timings: dict[str, float]

    def packet(self) -> bytes:
        """Length of the head (4 bytes, big-endian), the head as JSON, the thumbnail, the frames."""
        head = {
            "type": "chunk", "take": self.take, "chunk": self.chunk, "prompt": self.prompt, "seed": self.seed,
            "sizes": [len(self.thumb), *map(len, self.jpegs)], "seconds": self.seconds, "rewindable": self.rewindable,
        }  # fmt: skip
        text = json.dumps(head).encode()
        return len(text).to_bytes(4, "big") + text + self.thumb + b"".join(self.jpegs)


def new_session(pipe: DiagonalPipeline) -> StreamSession:
    """One beside that of `pipe`, with the same networks."""
    base = pipe.session
    return StreamSession.from_config(pipe.config, base.student, base.codec, base.text_encoder)


class Player:
    """Methods but `say` and `cancel` run on the worker.

    A take is what was made since a `play` or a `rewind`. Its video begins with the chunks before it of the take that it
    went on from, which is kept: going back and on by another prompt or seed is a branch, and takes nothing away.
    """

    def __init__(self, pipe: DiagonalPipeline, session: StreamSession, costs: Costs, rewind_bytes: int):
        self.pipe, self.session, self.costs, self.rewind_bytes = pipe, session, costs, rewind_bytes
        self.snapshots: OrderedDict[tuple[int, int], Snapshot] = OrderedDict()  # by take, and the chunk that comes next
        self.take = 0  # the newest
        self.takes: dict[int, list[MadeChunk]] = {}  # the whole video of each
        self.seed, self.switch = 0, session.switch
        self.image: np.ndarray | None = None  # uint8 [H, W, 3], what was uploaded last
        self.begun_with: np.ndarray | None = None  # of the present video
        self.conditioning_warnings: list[str] = []
        self._start: Tensor | None = None  # its latents
        self._chunks = iter(())
        self._lock = threading.Lock()  # over `takes`, which a download reads from another thread

    def play(self, message: Play) -> None:
        """Start a new video."""
        if message.image and self.image is None:
            raise UserError("image=true, but no picture was uploaded; choose one first")
        self.begun_with = self.image if message.image else None
        self.conditioning_warnings = []
        self._start = None if self.begun_with is None else self._encode(self.begun_with)
        self.session.schedule = message.schedule
        self.snapshots.clear()
        with self._lock:
            self.take, self.takes = self.take + 1, {self.take + 1: []}
        self._from_the_start(message.prompt, message.seed)

    def _encode(self, image: np.ndarray) -> Tensor:
        latents = self.pipe.encode(image[None])
        self.conditioning_warnings = self.pipe.conditioning_warnings
        return latents

    def _from_the_start(self, prompt: str, seed: int) -> None:
        self.seed, self.switch = seed, self.session.switch
        self._chunks = self.session.play(prompt, seed, None, self._start)

    def rewind(self, message: Rewind) -> None:
        """Go on from before a chunk as it was made, or by another prompt or seed where one is given."""
        video = self.takes.get(self.take if message.take is None else message.take, [])
        there = next((made for made in video if made.chunk == message.chunk), None)
        place = (there.take, there.chunk) if there else None
        if there is None or there.chunk and place not in self.snapshots:
            raise UserError(f"chunk={message.chunk} is not kept any more; rewind to one of the thumbnails shown")
        with self._lock:
            self.take += 1
            self.takes[self.take] = [made for made in video if made.chunk < there.chunk]
        seed = there.seed if message.seed is None else message.seed
        if there.chunk == 0:
            self._from_the_start(message.prompt or there.prompt, seed)
        else:
            self._go_on(self.snapshots[place], message.prompt or there.prompt, there.switch, seed)
        self._forget()

    def _go_on(self, snapshot: Snapshot, prompt: str, switch: str, seed: int) -> None:
        self.session.restore(snapshot)
        self.seed, self.switch = seed, switch
        if seed != snapshot.seeds[0]:
            self.session.reseed(seed)
        if prompt != snapshot.text.prompts[0]:
            self.session.set_prompt(prompt, switch)
        self._chunks = self.session.resume()

    def _forget(self) -> None:
        """Let the oldest takes go where there are too many, or too many chunks, and what only they needed."""
        with self._lock:
            while len(self.takes) > MAX_TAKES or (len(self.takes) > 1 and len(self._places()) > MAX_KEPT):
                del self.takes[min(self.takes)]
            self.takes[self.take] = self.takes[self.take][-MAX_KEPT:]
        needed = {*self._places(), (self.take, self.session.chunk)}
        for place in [place for place in self.snapshots if place not in needed]:
            del self.snapshots[place]

    def _places(self) -> set[tuple[int, int]]:
        """Take and number of every chunk that is kept."""
        return {(made.take, made.chunk) for video in self.takes.values() for made in video}

    def say(self, message: Say) -> None:
        self.switch = message.switch
        self.session.set_prompt(message.prompt, message.switch)

    def cancel(self) -> None:
        self.session.cancel()

    def next(self) -> MadeChunk | None:
        """The next chunk; None where it was cancelled."""
        begin = time.perf_counter()
        if self.session.chunk and self.session.cache_bytes <= self.rewind_bytes // 2:
            self._keep()
        result = next(self._chunks, None)
        if result is None:
            return None
        frames, timings = result.wait().frames[0].numpy(), result.timings
        self.costs.learn(timings)
        jpegs = list(_ENCODERS.map(_jpeg, frames))
        thumb = _jpeg(_small(frames[len(frames) // 2]), 80)
        place, seconds = (self.take, result.chunk), time.perf_counter() - begin
        rewindable = result.chunk == 0 or place in self.snapshots
        made = MadeChunk(*place, result.prompts[0], self.switch, self.seed, jpegs, thumb, seconds, rewindable, timings)
        with self._lock:
            self.takes[self.take] = [*self.takes[self.take], made]
        self._forget()
        return made

    def _keep(self) -> None:
        """A snapshot of now, on the host; the oldest ones go where there are too many."""
        self.snapshots[self.take, self.session.chunk] = self.session.snapshot("cpu")
        size = self.session.cache_bytes
        while len(self.snapshots) * size > self.rewind_bytes:
            self.snapshots.popitem(last=False)

    def chunks(self, take: int | None = None) -> list[MadeChunk]:
        """The video of a take, None: of the newest. UserError where there is none."""
        with self._lock:
            video = self.takes.get(self.take if take is None else take)
        if video is None and self.takes:
            raise UserError(f"take={take} is not kept any more; choose one of those shown")
        if not video:
            raise UserError("nothing has been played; press Play first")
        return video

    def video(self, take: int | None = None) -> bytes:
        """What was made, as MP4."""
        made = self.chunks(take)
        config, out = self.pipe.config.video, io.BytesIO()
        with LiveWriter(out, config.fps, (config.height, config.width)) as writer:
            for chunk in made:
                writer.write(np.stack([iio.imread(jpeg, plugin="pillow") for jpeg in chunk.jpegs]))
        return out.getvalue()

    def record(self, take: int | None = None) -> dict:
        """How what was made can be made again."""
        made = self.chunks(take)
        return {
            "chunks": [{"chunk": m.chunk, "prompt": m.prompt, "seed": m.seed, "timings_s": m.timings} for m in made],
            "schedule": self.session.schedule.to_dict(),
            "image_sha256": None if self.begun_with is None else sha256(self.begun_with.tobytes()).hexdigest(),
            "switch": self.session.switch,
            "fps": self.pipe.config.video.fps,
            "versions": versions(),
            "commit": commit(),
        }


class SessionManager:
    """Who is here, and the one thread that runs the model.

    A session that a visitor has left goes to a later one, for its cache and its CUDA graphs: as many are kept, with all
    that they carry, as there were visitors at once.
    """

    def __init__(self, pipe: DiagonalPipeline, rewind_bytes: int, warm: bool):
        self.pipe, self.rewind_bytes, self.costs = pipe, rewind_bytes, Costs()
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.players: dict[str, Player] = {}
        self._spare: list[StreamSession] = []
        if warm:
            self.worker.submit(self._warm_up).result()

    def _warm_up(self) -> None:
        """Play a clip where clips will be played: compiling, CUDA graphs, what a thread sets up once."""
        session = new_session(self.pipe)
        list(session.play("a prompt", 0, self.pipe.num_chunks()))
        self._spare.append(session)

    @contextmanager
    def visitor(self) -> Iterator[tuple[str, Player]]:
        """A new name and player, until the visitor goes."""
        name = secrets.token_urlsafe(16)
        session = self._spare.pop() if self._spare else new_session(self.pipe)
        self.players[name] = Player(self.pipe, session, self.costs, self.rewind_bytes)
        try:
            yield name, self.players[name]
        finally:
            del self.players[name]
            self._spare.append(session)


def _jpeg(frame: np.ndarray, quality: int = QUALITY) -> bytes:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "jpeg", quality=quality, subsampling=0)
    return out.getvalue()


def _small(frame: np.ndarray) -> np.ndarray:
    height = max(1, round(frame.shape[0] * THUMB / frame.shape[1]))
    return np.asarray(Image.fromarray(frame).resize((THUMB, height)))
