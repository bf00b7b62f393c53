"""Output files of inference: for each prompt and sample a video, its contact sheet, and a JSON with its metadata. The
JSON is written last, so a clip that has one is complete.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from configs.load import to_dict
from model.weights.load import WeightCheck
from pipeline.diagonal import DiagonalPipeline
from pipeline.live import Recording, open_stream_output
from pipeline.plan import Job
from pipeline.provenance import commit, versions, weight_hashes
from utils.files import DiskFull, atomic_path, write_json_atomic
from utils.logs import get_logger
from utils.progress import progress_bar
from utils.tables import aligned
from utils.video import VideoWriter, clip_sheet, sheet_frames, shrink
from utils.video_live import LiveWriter

log = get_logger(__name__)


@dataclass(frozen=True)
class RenderedClip:
    """A finished job and its timings in seconds."""

    job: Job
    frames: int = 0  # pixel frames
    total: float = 0.0
    first_frames: float = 0.0  # time to the first chunk's frames
    num_chunks: int = 0
    chunks: Sequence[dict[str, float]] = ()  # ChunkResult.timings, and `write`; none of a video without end
    code: int = 0  # the program's exit code where a signal other than Ctrl-C has ended a video without end

    def line(self) -> str:
        return (
            f"{self.job.video or 'standard output'}  {self.frames} frames in {self.total:.1f} s "
            f"({self.frames / self.total:.0f} FPS, first frames after {self.first_frames:.2f} s)"
        )


def render(
    pipe: DiagonalPipeline,
    job: Job,
    weights: Sequence[WeightCheck],
    position: int = 0,
    conditioning: Tensor | None = None,
) -> RenderedClip:
    """Generate one video. Frames are written as they arrive, and files appear when all of them are complete.

    An endless video can be played while it is written, and ends with Ctrl-C or SIGTERM (pipeline/live.py).
    conditioning: latents [1, F, C, h, w] that it begins with.
    position: line of the progress bar, if several processes share a terminal.
    """
    video = pipe.config.video
    making = _Making(pipe, job, conditioning, position)
    size = video.height, video.width
    if job.piped:
        with open_stream_output(job.video) as out, LiveWriter(out, video.fps, size, job.kind) as writer:
            making.run(writer)
        return making.clip()
    if job.endless:
        return _record(making, weights)
    with ExitStack() as files:  # which get their names at its end: all or none, the video first
        record, sheet, file = (
            path and files.enter_context(atomic_path(path)) for path in (job.record, job.sheet, job.video)
        )
        if job.kind is None:
            with VideoWriter(file, video.fps, size) as writer:
                making.run(writer)
        else:
            with open(file, "wb") as out, LiveWriter(out, video.fps, size, job.kind) as writer:
                making.run(writer)
        if sheet:
            with atomic_path(sheet) as temporary:
                making.sheet().save(temporary, compress_level=1)  # a quarter of the default's time, 7% more bytes
        write_json_atomic(record, clip_metadata(pipe, making.clip(), weights))
    return making.clip()


def _record(making: "_Making", weights: Sequence[WeightCheck]) -> RenderedClip:
    """Record an endless video to a file. It gets its final name unless it ends with an error."""
    pipe, job, video = making.pipe, making.job, making.pipe.config.video
    recording = Recording(job.video, clip_metadata(pipe, making.clip(), weights))
    writer = LiveWriter(recording.partial, video.fps, (video.height, video.width), job.kind)
    well = False
    try:
        with writer:
            making.run(writer)
        well = True
    except DiskFull as error:
        well = True
        raise DiskFull(
            f"the disk of {job.video} is full; the video ends there, whole, after {writer.frames_written} frames"
        ) from error
    finally:
        making.frames = writer.frames_written
        if not writer.frames_written:
            recording.remove()
        elif well:
            recording.finish(clip_metadata(pipe, making.clip(), weights))
    return making.clip()


class _Making:
    """Generates the video of a job into a writer and collects timings and thumbnails."""

    def __init__(self, pipe: DiagonalPipeline, job: Job, conditioning: Tensor | None, position: int):
        self.pipe, self.job, self.conditioning, self.position = pipe, job, conditioning, position
        self.begin = time.perf_counter()
        self.frames, self.first_frames, self.num_chunks, self.code = 0, 0.0, 0, 0
        self.chunks: list[dict[str, float]] = []
        self._shown = frozenset() if job.endless or not job.sheet else frozenset(sheet_frames(pipe.num_pixel_frames))
        self._thumbnails: list[np.ndarray] = []
        self._borders: list[int] = []

    def run(self, writer: VideoWriter | LiveWriter) -> None:
        """Generate the whole video; an endless one until Ctrl-C or SIGTERM."""
        pipe, job = self.pipe, self.job
        length = None if job.endless else pipe.num_chunks()
        total = None if job.endless else pipe.num_pixel_frames
        with progress_bar(job.prompt, total, "frame", self.position) as bar:
            try:
                for (frames,), spans in pipe.stream_story(job.story, job.seed, length, self.conditioning):
                    arrived = time.perf_counter()
                    self.first_frames = self.first_frames or arrived - self.begin
                    writer.write(frames)
                    self._keep(frames)
                    bar.update(len(frames))
                    if not job.endless:
                        self.chunks.append(spans | {"write": time.perf_counter() - arrived})
                    self.num_chunks += 1
            except (KeyboardInterrupt, SystemExit) as end:  # SystemExit: SIGTERM or a closed terminal (utils/exits.py)
                if not job.endless:
                    raise
                self.code = end.code if isinstance(end, SystemExit) else 0
                log.info("stopped")

    def _keep(self, frames: np.ndarray) -> None:
        self._borders.append(self.frames)
        own = [i for i in range(len(frames)) if self.frames + i in self._shown]
        if own:
            self._thumbnails.append(shrink(frames[own]))
        self.frames += len(frames)

    def sheet(self) -> Image.Image:
        """The contact sheet."""
        shown, borders = sheet_frames(self.frames), self._borders[1:]
        story, video = self.job.story, self.pipe.config.video
        times = story.times(self.pipe.config.stream.chunk_frames, video.fps)
        facts = f"seed {self.job.seed}, {self.frames} frames, {video.fps} a second"
        title = [f"{time:.1f} s: {prompt}" for time, prompt in zip(times, story.prompts, strict=True)]
        title = [*title, facts] if len(title) > 1 else [f"{self.job.prompt} ({facts})"]
        return clip_sheet(np.concatenate(self._thumbnails), shown, borders, title)

    def clip(self) -> RenderedClip:
        seconds = time.perf_counter() - self.begin
        return RenderedClip(
            self.job, self.frames, seconds, self.first_frames, self.num_chunks, tuple(self.chunks), self.code
        )


def clip_metadata(pipe: DiagonalPipeline, clip: RenderedClip, weights: Sequence[WeightCheck]) -> dict[str, Any]:
    """Contents of a video's JSON, with which it can be reproduced."""
    job = clip.job
    times = job.story.times(pipe.config.stream.chunk_frames, pipe.config.video.fps)
    story = zip(job.story.frames, times, job.story.prompts, strict=True)
    parts = [{"latent_frame": frame, "seconds": time, "prompt": prompt} for frame, time, prompt in story]
    return {
        "prompt": job.prompt,
        **({"story": parts} if len(parts) > 1 or job.endless else {}),
        "seed": job.seed,
        "sample": job.sample,
        "video": job.video.name,
        "digest": job.digest,
        "frames": clip.frames,
        "schedule": pipe.schedule.to_dict(),
        "warnings": pipe.warnings(job.story.prompts),
        "nfe": pipe.schedule.nfe(clip.num_chunks),
        "timings_s": {"total": clip.total, "first_frames": clip.first_frames, "chunks": clip.chunks},
        "weights_sha256": weight_hashes(tuple(weights)),
        "device": str(pipe.session.device),
        "dtype": str(pipe.session.dtype).removeprefix("torch."),
        "versions": versions(),
        "commit": commit(),
        "config": {name: value for name, value in to_dict(pipe.config).items() if name != "training"},
    }


def profile_table(clips: Sequence[RenderedClip]) -> str:
    """Milliseconds of each span, one line per chunk, averaged over `clips`, and their sum."""
    names = {name for clip in clips for chunk in clip.chunks for name in chunk}
    steps = sorted(name for name in names if name.startswith("step"))
    columns = [name for name in ("text", *steps, "context", "queue", "decode", "write") if name in names]
    rows, total = [["chunk", *columns, "sum", "(ms)"]], dict.fromkeys([*columns, "sum"], 0.0)

    def row(label: str, means: dict[str, float]) -> list[str]:
        return [label, *(f"{means[name]:.1f}" if name in means else "" for name in total), ""]

    for k, chunks in enumerate(zip(*(clip.chunks for clip in clips), strict=True)):
        means = {name: 1000 * float(np.mean([chunk[name] for chunk in chunks])) for name in chunks[0]}
        means["sum"] = sum(means.values())
        total = {name: seconds + means.get(name, 0.0) for name, seconds in total.items()}
        rows.append(row(str(k), means))
    return aligned([*rows, row("all", total)])
