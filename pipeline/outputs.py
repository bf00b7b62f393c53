"""What inference leaves behind: for each prompt and sample a video, its contact sheet, and a JSON that says how it was
made. The JSON is written last, so that a clip that has one is whole.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from configs.load import to_dict
from model.weights.load import WeightCheck
from pipeline.diagonal import DiagonalPipeline
from pipeline.plan import Job
from pipeline.provenance import versions, weight_hashes
from utils.files import atomic_path, write_json_atomic
from utils.progress import progress_bar
from utils.video import VideoWriter, contact_sheet, shrink


@dataclass(frozen=True)
class Clip:
    """A finished job and where its time went, all in seconds."""

    job: Job
    frames: int  # pixel frames
    total: float
    first_frames: float  # until the first chunk's frames were there
    chunks: list[dict[str, float]]  # pipeline.stream.ChunkResult.timings, and `write`

    def line(self) -> str:
        return (
            f"{self.job.video}  {self.frames} frames in {self.total:.1f} s "
            f"({self.frames / self.total:.0f} FPS, first frames after {self.first_frames:.2f} s)"
        )


def render(
    pipe: DiagonalPipeline, job: Job, weights: Sequence[WeightCheck], position: int = 0, start: Tensor | None = None
) -> Clip:
    """Make one clip: frames are written as they arrive, and files appear only when they are whole.

    start: latents that it begins with.
    position: line of the progress bar, where several processes share a terminal.
    """
    video_config = pipe.config.video
    begin = time.perf_counter()
    chunks, thumbnails, borders, first_frames = [], [], [], 0.0
    with (
        progress_bar(job.prompt, pipe.num_pixel_frames, "frame", position) as bar,
        VideoWriter(job.video, video_config.fps, (video_config.height, video_config.width)) as video,
    ):
        for (frames,), spans in pipe.chunks([job.prompt], [job.seed], start=start):
            arrived = time.perf_counter()
            first_frames = first_frames or arrived - begin
            borders.append(video.frames_written)
            video.write(frames)
            thumbnails.append(shrink(frames))
            bar.update(len(frames))
            chunks.append(spans | {"write": time.perf_counter() - arrived})
    with atomic_path(job.sheet) as temporary:
        contact_sheet(np.concatenate(thumbnails), chunk_borders=borders[1:]).save(temporary)
    clip = Clip(job, video.frames_written, time.perf_counter() - begin, first_frames, chunks)
    write_json_atomic(job.record, describe(pipe, clip, weights))
    return clip


def describe(pipe: DiagonalPipeline, clip: Clip, weights: Sequence[WeightCheck]) -> dict[str, Any]:
    """Contents of a clip's JSON: enough to make it again."""
    job = clip.job
    return {
        "prompt": job.prompt,
        "seed": job.seed,
        "sample": job.sample,
        "video": job.video.name,
        "frames": clip.frames,
        "schedule": pipe.schedule.to_dict(),
        "nfe": pipe.schedule.nfe(len(clip.chunks)),
        "timings_s": {"total": clip.total, "first_frames": clip.first_frames, "chunks": clip.chunks},
        "weights_sha256": weight_hashes(tuple(weights)),
        "device": str(pipe.session.device),
        "dtype": str(pipe.session.dtype).removeprefix("torch."),
        "versions": versions(),
        "config": to_dict(pipe.config),
    }


def profile_table(clips: Sequence[Clip]) -> str:
    """Milliseconds of each span, one line a chunk, mean over `clips`, and their sum."""
    names = {name for clip in clips for chunk in clip.chunks for name in chunk}
    steps = sorted(name for name in names if name.startswith("step"))
    columns = [name for name in ("text", *steps, "context", "decode", "write") if name in names]
    rows, total = [], dict.fromkeys([*columns, "sum"], 0.0)
    for k, chunks in enumerate(zip(*(clip.chunks for clip in clips), strict=True)):
        means = {name: 1000 * float(np.mean([chunk[name] for chunk in chunks])) for name in chunks[0]}
        means["sum"] = sum(means.values())
        total = {name: seconds + means.get(name, 0.0) for name, seconds in total.items()}
        rows.append((str(k), means))
    rows.append(("all", total))
    lines = ["  ".join(["chunk ", *(f"{name:>8}" for name in total), "(ms)"])]
    for label, means in rows:
        cells = (f"{means[name]:>8.1f}" if name in means else " " * 8 for name in total)
        lines.append("  ".join([label.ljust(6), *cells]).rstrip())
    return "\n".join(lines)
