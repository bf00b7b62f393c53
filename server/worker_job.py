"""A job within a worker: a whole video, a chunk at a time, in the turns that streams leave."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue
from typing import TYPE_CHECKING, Any

import numpy as np

from server.encoding import thumbnail
from server.worker_messages import JobSpec
from utils.video import VideoWriter

if TYPE_CHECKING:
    from server.worker_process import WorkerProcess

THUMBNAIL = 480  # pixels across, of a finished video


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
        return self.cancelled or not self._frames.full()

    def make(self) -> bool:
        """Make the next chunk; False when all are made or the job was cancelled."""
        with suppress(JobCancelled):  # of the writer, which may know first
            if not self.cancelled:
                return next(self._chunks, None) is not None
            self._chunks.close()
        return False

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
            while (frames := self._frames.get()) is not None and not self.cancelled:
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
