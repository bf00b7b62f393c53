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

import numpy as np
from PIL import Image
from torch import Tensor

from configs.errors import UserError
from model.schedule import Schedule
from pipeline.diagonal import DiagonalPipeline
from pipeline.provenance import versions
from pipeline.snapshot import Snapshot
from pipeline.start import encode_start
from pipeline.stream import StreamSession
from server.messages import Play, Rewind, Say
from utils.video_live import LiveWriter

QUALITY = 92  # of JPEG
THUMB = 96  # pixels across
_ENCODERS = ThreadPoolExecutor(4, thread_name_prefix="jpeg")  # a single thread would hold up a GPU
MAX_KEPT = 800  # chunks whose pictures are kept for the download: ten minutes at 16 frames a second


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

    chunk: int
    prompt: str
    seed: int
    jpegs: list[bytes] = field(repr=False)
    thumb: bytes = field(repr=False)
    seconds: float  # of making it
    rewindable: bool
    timings: dict[str, float]

    def packet(self, take: int) -> bytes:
        """Length of the head (4 bytes, big-endian), the head as JSON, the thumbnail, the frames."""
        head = {
            "type": "chunk", "take": take, "chunk": self.chunk, "prompt": self.prompt, "seed": self.seed,
            "sizes": [len(self.thumb), *map(len, self.jpegs)], "seconds": self.seconds, "rewindable": self.rewindable,
        }  # fmt: skip
        text = json.dumps(head).encode()
        return len(text).to_bytes(4, "big") + text + self.thumb + b"".join(self.jpegs)


def new_session(pipe: DiagonalPipeline) -> StreamSession:
    """One beside that of `pipe`, with the same networks."""
    base = pipe.session
    return StreamSession.from_config(pipe.config, base.student, base.codec, base.text_encoder)


class Player:
    """Methods but `say` and `cancel` run on the worker."""

    def __init__(self, pipe: DiagonalPipeline, session: StreamSession, costs: Costs, rewind_bytes: int):
        self.pipe, self.session, self.costs, self.rewind_bytes = pipe, session, costs, rewind_bytes
        self.snapshots: OrderedDict[int, Snapshot] = OrderedDict()  # by the chunk that comes next
        self.made: list[MadeChunk] = []
        self.seed, self.prompt = 0, ""
        self.image: np.ndarray | None = None  # uint8 [H, W, 3], what was uploaded last
        self.begun_with: np.ndarray | None = None  # of the present video
        self._chunks = iter(())
        self._lock = threading.Lock()  # over `made`, which a download reads from another thread

    def play(self, message: Play) -> None:
        """Start a new video."""
        if message.image and self.image is None:
            raise UserError("image=true, but no picture was uploaded; choose one first")
        self.begun_with = self.image if message.image else None
        start = None if self.begun_with is None else self._encode(self.begun_with)
        self.session.schedule = message.schedule
        self.seed, self.prompt = message.seed, message.prompt
        self.snapshots.clear()
        with self._lock:
            self.made = []
        self._chunks = self.session.play(message.prompt, message.seed, None, start)

    def _encode(self, image: np.ndarray) -> Tensor:
        return encode_start(self.session.codec, image[None], self.pipe.geometry, self.session.device)

    def rewind(self, message: Rewind) -> None:
        """Go on from before chunk `message.chunk`, by another prompt or seed where one is given."""
        if message.chunk not in self.snapshots:
            raise UserError(f"chunk={message.chunk} is not kept any more; rewind to one of the thumbnails shown")
        self.session.restore(self.snapshots[message.chunk])
        for later in [k for k in self.snapshots if k > message.chunk]:
            del self.snapshots[later]
        with self._lock:
            self.made = [made for made in self.made if made.chunk < message.chunk]
        if message.seed is not None:
            self.seed = message.seed
            self.session.reseed(message.seed)
        if message.prompt is not None:
            self.session.say(message.prompt)
        self._chunks = self.session.resume()

    def say(self, message: Say) -> None:
        self.session.say(message.prompt, message.switch)

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
        made = MadeChunk(
            result.chunk, result.prompts[0], self.seed, jpegs, thumb, time.perf_counter() - begin,
            result.chunk in self.snapshots, timings,
        )  # fmt: skip
        with self._lock:
            self.made = [*self.made, made][-MAX_KEPT:]
        return made

    def _keep(self) -> None:
        """A snapshot of now, on the host; the oldest ones go where there are too many."""
        self.snapshots[self.session.chunk] = self.session.snapshot("cpu")
        size = self.session.cache_bytes
        while len(self.snapshots) * size > self.rewind_bytes:
            self.snapshots.popitem(last=False)

    def video(self) -> bytes:
        """What was made, as MP4."""
        with self._lock:
            made = list(self.made)
        if not made:
            raise UserError("nothing has been played; press Play first")
        config, out = self.pipe.config.video, io.BytesIO()
        with LiveWriter(out, config.fps, (config.height, config.width)) as writer:
            for chunk in made:
                writer.write(np.stack([np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in chunk.jpegs]))
        return out.getvalue()

    def record(self) -> dict:
        """How what was made can be made again."""
        with self._lock:
            made = list(self.made)
        return {
            "chunks": [{"chunk": m.chunk, "prompt": m.prompt, "seed": m.seed, "timings_s": m.timings} for m in made],
            "schedule": self.session.schedule.to_dict(),
            "image_sha256": None if self.begun_with is None else sha256(self.begun_with.tobytes()).hexdigest(),
            "switch": self.session.switch,
            "fps": self.pipe.config.video.fps,
            "versions": versions(),
        }


class Lobby:
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
