"""Runs of inference that grow: stories, and streams without an end, to files or a pipe."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from configs.errors import UserError
from configs.load import to_dict
from configs.schema import Config
from model.weights.files import resolve
from pipeline.diagonal import DiagonalPipeline
from pipeline.plan import check_count
from pipeline.story import Story, holds_stories, play_story, read_stories
from utils.files import safe_name, short_hash, write_json_atomic
from utils.logs import get_logger
from utils.prompts import read_prompts
from utils.seeds import sample_seed
from utils.video_live import KINDS, LiveWriter

log = get_logger(__name__)
PIPE = "-"  # as a target: standard output
SUFFIXES = {".mp4": "fmp4", ".y4m": "y4m", ".raw": "raw", ".rgb": "raw"}


@dataclass(frozen=True)
class LiveJob:
    """One video that grows."""

    story: Story
    seed: int
    target: str  # a path, or PIPE
    kind: str

    @property
    def record(self) -> Path | None:
        return None if self.target == PIPE else Path(self.target).with_suffix(".json")


def plan_live(config: Config, prompts: list[str] | None, endless: bool, output: str | None, kind: str | None):
    """Jobs of a story file or of an endless stream; None where this is an ordinary run of finished clips.

    Raises UserError for a bad story, several videos for one output, or an endless stream with nowhere to go.
    """
    names = config.inference
    stories = prompts is None and holds_stories(resolve(names.prompts))
    if not (stories or endless or output):
        return None
    if stories:
        length = None if endless else config.video.num_latent_frames
        given = read_stories(resolve(names.prompts), config.video.fps, length, names.switch_frame_indices)
    else:
        given = [Story((prompt,), (0,)) for prompt in prompts or read_prompts(resolve(names.prompts))]
    if endless and not output and sys.stdout.isatty():
        raise UserError("--num_output_frames=0 streams without end to a terminal; give --output FILE, or a pipe")
    output = output or (PIPE if endless else None)
    if output and (len(given) > 1 or names.num_samples > 1):
        asked = len(given) * max(1, names.num_samples)
        raise UserError(
            f"--output={output} holds one video and {asked} were asked for; give one --prompt and one sample"
        )
    check_count(len(given), names.num_samples)
    jobs = []
    for story in given:
        for sample in range(names.num_samples):
            seed = sample_seed(config.seed, sample)
            settings = (str(to_dict(config)["schedule"]), str(to_dict(config)["stream"]), names.image, names.video)
            digest = short_hash(str(story), seed, *settings)
            name = f"{safe_name(story.prompts[0])}-{seed}-{digest}.{'mp4' if kind in (None, 'fmp4') else kind}"
            target = output or str(Path(names.output_folder).expanduser() / name)
            jobs.append(LiveJob(story, seed, target, _kind(target, kind)))
    return jobs


def _kind(target: str, kind: str | None) -> str:
    if kind is None:
        kind = SUFFIXES.get(Path(target).suffix.lower(), "fmp4" if target == PIPE else "")
    if kind not in KINDS:
        raise UserError(f"--output={target} has no known ending; end it in .mp4, .y4m or .raw, or give --format")
    return kind


@contextmanager
def standard_output() -> Iterator[BinaryIO]:
    """Standard output for the video alone: whatever else is printed goes to standard error meanwhile."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(own), "wb") as out:
            yield out
    except BrokenPipeError:
        log.info("the reader has gone")
    finally:
        os.dup2(own, 1)
        os.close(own)


def run_live(pipe: DiagonalPipeline, job: LiveJob, num_chunks: int | None, start: Tensor | None = None) -> int:
    """Play `job` into its target, chunk by chunk; frames written. Ctrl-C and a reader that goes end it well."""
    if job.target == PIPE:
        with standard_output() as out:
            return _write(pipe, job, out, num_chunks, start)
        return 0  # the reader has gone
    return _write(pipe, job, job.target, num_chunks, start)


def _write(
    pipe: DiagonalPipeline, job: LiveJob, target: str | BinaryIO, num_chunks: int | None, start: Tensor | None
) -> int:
    video = pipe.config.video
    begin, written = time.perf_counter(), 0
    with LiveWriter(target, video.fps, (video.height, video.width), job.kind) as writer:
        try:
            for result in play_story(pipe.session, job.story, job.seed, num_chunks, start):
                writer.write(result.wait().frames[0].numpy())
        except KeyboardInterrupt:
            if num_chunks is not None:
                raise
            log.info("stopped")
        written = writer.frames_written
    if job.record:
        seconds = time.perf_counter() - begin
        write_json_atomic(job.record, describe(pipe, job, written, seconds))
    return written


def describe(pipe: DiagonalPipeline, job: LiveJob, frames: int, seconds: float) -> dict:
    """Contents of the JSON beside the video."""
    story = zip(job.story.frames, job.story.prompts, strict=True)
    return {
        "story": [{"latent_frame": frame, "prompt": prompt} for frame, prompt in story],
        "seed": job.seed,
        "video": Path(job.target).name,
        "frames": frames,
        "schedule": pipe.schedule.to_dict(),
        "seconds": seconds,
        "config": to_dict(pipe.config),
    }
