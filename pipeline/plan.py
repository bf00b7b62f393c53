"""The plan of an inference run: jobs, checked before weights are loaded."""

import json
import os
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from omegaconf import OmegaConf

from configs.errors import UserError
from configs.geometry import Geometry, pixel_frames
from configs.load import to_dict
from configs.schema import Config, InferenceConfig
from model.fast.student import FastPlan
from model.weights.load import WeightCheck, check_weights
from pipeline.conditioning import read_conditioning
from pipeline.live import partial_name
from pipeline.preflight import check_inference
from pipeline.provenance import fingerprint
from pipeline.sequence_parallel import SETTING, rank_devices
from pipeline.story import Story, planned_stories
from utils.device import gpu_memory, pick_device, pick_dtype
from utils.distributed import Ranks
from utils.files import check_writable, safe_name, short_hash, translate_os_errors
from utils.machine import free_space, size_text
from utils.seeds import sample_seed
from utils.video import FILE_KINDS

PIPE = "-"  # as an output: standard output
FORMAT_OF_SUFFIX = {".y4m": "y4m", ".raw": "raw", ".rgb": "raw"}  # endings of what is no container
SUFFIX_OF = {"fmp4": ".mp4", "y4m": ".y4m", "raw": ".raw"}

RECORD_BYTES = 4_000  # of the JSON beside a video, at least
MAX_VIDEOS = 1_000_000  # of one run


@dataclass(frozen=True)
class Job:
    """One video to be generated: sample `sample` of story `index`."""

    index: int
    story: Story
    sample: int
    seed: int
    video: Path | None  # None = standard output
    digest: str  # hash of everything that determines the video
    kind: str | None = None  # a format of utils/video_live.py; None = a file that is written atomically
    endless: bool = False
    named: bool = False  # the user gave the file's name; no contact sheet then

    @property
    def prompt(self) -> str:
        """The story's first prompt."""
        return self.story.prompts[0]

    @property
    def piped(self) -> bool:
        """Whether the output is a pipe or a device and not a file."""
        return self.video is None or (os.path.exists(self.video) and not os.path.isfile(self.video))

    @property
    def sheet(self) -> Path | None:
        return None if self.named else self.video.with_suffix(".png")

    @property
    def record(self) -> Path:
        return self.video.with_suffix(".json")

    @property
    def finished(self) -> bool:
        """Whether an earlier run has generated it."""
        if self.piped:
            return False
        if self.named:
            return self.video.exists() and self._earlier().get("digest") == self.digest
        return all(path.exists() for path in (self.video, self.sheet, self.record))

    def check_output_path(self, overwrite: bool) -> None:
        """Raise a UserError if the user's output path cannot be written, or would overwrite another video."""
        if self.piped:
            return
        check_writable(self.video.parent, "--output")
        longest = partial_name(self.video, 100).with_suffix(".json") if self.endless else self.record
        with translate_os_errors(self.video, every=True), suppress(FileNotFoundError):
            os.lstat(longest)
        owner = self._earlier().get("video")
        if os.path.lexists(self.record) and owner != self.video.name:
            whose = f"is of {owner}" if isinstance(owner, str) else "is not of such a video"
            raise UserError(f"--output={self.video} would replace {self.record}, which {whose}; choose another name")
        if os.path.lexists(self.video) and not self.finished and not overwrite:
            raise UserError(f"--output={self.video} is there and is another video; choose another name, or --overwrite")

    def _earlier(self) -> dict[str, Any]:
        """The JSON beside the video, or {} if it is missing or unreadable."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}


@dataclass(frozen=True)
class Plan:
    """The jobs of this process, to do and finished by an earlier run, and what they run on."""

    config: Config
    ranks: Ranks
    jobs: list[Job]
    finished: list[Job]
    weights: tuple[WeightCheck, ...]
    device: torch.device
    dtype: torch.dtype
    conditioning: np.ndarray | None = None  # pixels uint8 [T, H, W, 3] that every video begins with

    @property
    def piped(self) -> bool:
        """Whether a video goes to standard output."""
        return any(job.video is None for job in self.jobs)

    def summary(self) -> str:
        """One line: how many videos, where, on what; and that a configured folder is not the place."""
        places = {str(job.video or "a pipe") for job in self.jobs + self.finished if job.named}
        folder = " ".join(places) or self.config.inference.output_folder
        precision = str(self.dtype).removeprefix("torch.")
        line = f"{_count(len(self.jobs))} to make in {folder} on {self.device} ({precision})"
        if self.finished:
            line += f"; {_count(len(self.finished))} already there (--overwrite makes them again)"
        configured = self.config.inference.output_folder
        if places and configured != InferenceConfig().output_folder:
            line += f"; inference.output_folder={configured} has no effect"
        if self.ranks.world > 1:
            line += f"; this is process {self.ranks.rank} of {self.ranks.world}, the others make theirs"
        return line

    def describe(self) -> str:
        """The plan as text: settings, weights, files."""
        settings = {name: value for name, value in to_dict(self.config).items() if name != "training"}
        weights = [f"{check.role:<14}{check.path}  {size_text(check.size)}  {check.kind}" for check in self.weights]
        files = [f"{job.video or PIPE}  seed {job.seed}" for job in self.jobs]
        files += [f"{job.video}  seed {job.seed}  already there" for job in self.finished]
        parts = [OmegaConf.to_yaml(OmegaConf.create(settings)).rstrip(), *weights, "", self.summary(), *files]
        return "\n".join(parts)


def make_plan(
    config: Config,
    prompts: Sequence[str] | None = None,
    ranks: Ranks | None = None,
    *,
    endless: bool = False,
    output: str | None = None,
    kind: str | None = None,
) -> Plan:
    """Make the plan and check everything that can be checked without loading weights.

    prompts: replace the configured file.
    endless: videos have no end.
    output: the file of a single video, PIPE for standard output; None = files in the output folder, named by the job.
    kind: a format of utils/video_live.py; None = by the file's suffix.
    Jobs are distributed to processes before finished ones are removed, since processes that start at different times
    see different files and would otherwise disagree about the distribution.

    Raises UserError for the first problem; nothing has been written then.
    """
    ranks = ranks or Ranks()
    Geometry.from_config(config).num_chunks(config.video.num_latent_frames)
    stories = planned_stories(config, prompts, endless=endless)
    if endless and not output:
        if sys.stdout.isatty() or _is_file(sys.stdout):
            place = "a terminal" if sys.stdout.isatty() else "a file, which would fill the disk"
            raise UserError(f"--num_output_frames=0 would stream without end to {place}; give --output FILE, or a pipe")
        output = PIPE
    names, length = config.inference, None if endless else config.video.num_latent_frames
    conditioning = read_conditioning(
        config, *(Path(x).expanduser() if x else None for x in (names.image, names.video)), length
    )
    folder = Path(config.inference.output_folder).expanduser()
    if output is None:
        check_writable(folder, "inference.output_folder")
    degree = config.inference.sequence_parallel
    device = pick_device(config.device, ranks.local_rank * degree)
    FastPlan.from_config(config.inference, device)
    Geometry.from_config(config).check_shares(SETTING, degree)
    rank_devices(device, degree)
    dtype = pick_dtype(config.inference.precision, device)
    weights = tuple(check_weights(config.model))
    check_inference(config, gpu_memory(device))
    settings = fingerprint(config, weights)
    if output is None:
        jobs = plan_jobs(config, stories, folder, settings, kind)
    else:
        jobs = [plan_output(config, stories, output, settings, kind, endless)]
    jobs = ranks.share(jobs)
    for job in jobs if output else ():
        job.check_output_path(config.inference.overwrite)
    finished = [] if config.inference.overwrite else [job for job in jobs if job.finished]
    done = set(finished)
    jobs = [job for job in jobs if job not in done]
    check_room(config, jobs, ranks)
    return Plan(config, ranks, jobs, finished, weights, device, dtype, conditioning)


def _is_file(stream: TextIO) -> bool:
    """Whether a stream is redirected to an ordinary file."""
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except OSError:  # closed, or not a file of the operating system
        return False


def check_room(config: Config, jobs: Sequence[Job], ranks: Ranks) -> None:
    """Raise a UserError if the disk is too small for the videos. jobs: those of this rank; others have as many."""
    videos = [job for job in jobs if not (job.piped or job.endless)]
    if not videos:
        return
    folder, need = videos[0].video.parent, ranks.world * sum(least_bytes(config, job) for job in videos)
    free = free_space(folder)
    if need > free:
        raise UserError(
            f"{_count(ranks.world * len(videos))} need {size_text(need)} at least and {size_text(free)} are free in "
            f"{folder}; make room, or choose another place"
        )


def least_bytes(config: Config, job: Job) -> int:
    """Bytes of a video on disk: exact for uncompressed formats, otherwise a lower estimate."""
    pixels = pixel_frames(config.video.num_latent_frames) * config.video.height * config.video.width
    return {"raw": 3 * pixels, "y4m": 3 * pixels // 2}.get(job.kind, pixels // 100) + RECORD_BYTES


def check_count(prompts: int, samples: int) -> None:
    """Raise a UserError for more than MAX_VIDEOS videos."""
    if prompts * samples > MAX_VIDEOS:
        raise UserError(
            f"inference.num_samples={samples} of {prompts:,} prompts are {prompts * samples:,} videos, and one run "
            f"plans {MAX_VIDEOS:,} at most; give fewer, or a part of the prompts at a time"
        )


def plan_jobs(
    config: Config, stories: Sequence[Story], folder: Path, settings: str, kind: str | None = None
) -> list[Job]:
    """The jobs of a run, story by story. A job's seed does not depend on the position of the prompt in the file.

    File names end in a hash of everything that determines the video: prompts, seed, sample and `settings` (schedule,
    sizes, weights). Different videos thus have different names, and a video with another schedule does not count as
    finished.
    """
    check_count(len(stories), config.inference.num_samples)
    jobs = {}
    for index, story in enumerate(stories):
        for sample in range(config.inference.num_samples):
            seed = sample_seed(config.seed, sample)
            digest = _digest(story, seed, sample, settings)
            words = f"{index:04d}-{sample}"
            if not config.inference.save_with_index:
                words = f"{safe_name(story.prompts[0])}-{seed}"
            video = folder / f"{words}-{digest}{SUFFIX_OF.get(kind, '.mp4')}"
            jobs.setdefault(video, Job(index, story, sample, seed, video, digest, kind))  # given twice is one video
    return list(jobs.values())


def plan_output(
    config: Config, stories: Sequence[Story], output: str, settings: str, kind: str | None, endless: bool
) -> Job:
    """The job of `--output`. Raises UserError if there is more than one video, or for an unknown suffix."""
    asked = len(stories) * config.inference.num_samples
    if asked > 1:
        raise UserError(
            f"--output={output} holds one video and {asked} were asked for; give one prompt and one sample, or "
            f"--output_folder"
        )
    video = None if output == PIPE else Path(output).expanduser()
    if video is not None and os.path.isdir(video):
        raise UserError(f"--output={output} is a folder; give a file, or --output_folder")
    ending = "" if video is None else video.suffix.lower()
    if ending == ".json":
        raise UserError(f"--output={output} is where the video's own JSON goes; end it in another way")
    own = FORMAT_OF_SUFFIX.get(ending) or ("fmp4" if ending == ".mp4" else ending if ending in FILE_KINDS else None)
    if kind and own not in (None, kind):
        raise UserError(
            f"--output={output} does not end as --format={kind} does; end it in {SUFFIX_OF[kind]}, or leave that out"
        )
    kind = kind or FORMAT_OF_SUFFIX.get(ending) or ("fmp4" if video is None or (endless and ending == ".mp4") else None)
    if kind is None and (endless or ending not in FILE_KINDS):
        known = [*SUFFIX_OF.values()] if endless else [*FILE_KINDS, *FORMAT_OF_SUFFIX]
        raise UserError(
            f"--output={output} has no known ending; end it in {', '.join(known[:-1])} or {known[-1]}, or give --format"
        )
    seed = sample_seed(config.seed, 0)
    digest = _digest(stories[0], seed, 0, settings, *(["endless"] if endless else []))
    return Job(0, stories[0], 0, seed, video, digest, kind, endless, named=True)


def _digest(story: Story, seed: int, sample: int, settings: str, *more: str) -> str:
    return short_hash(*story.prompts, *story.frames[1:], seed, sample, settings, *more)


def _count(videos: int) -> str:
    return f"{videos} video{'s' * (videos != 1)}"
