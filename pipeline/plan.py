"""What a run of inference will do, decided and checked before anything heavy is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from configs.errors import UserError
from configs.geometry import Geometry
from configs.load import to_dict
from configs.schema import Config
from model.fast.student import FastPlan
from model.weights.files import resolve
from model.weights.load import WeightCheck, check_weights
from pipeline.preflight import check_inference
from pipeline.provenance import fingerprint
from pipeline.start import read_start
from utils.device import gpu_memory, pick_device, pick_dtype
from utils.distributed import Ranks
from utils.files import check_writable, safe_name, short_hash
from utils.machine import size_text
from utils.prompts import check_prompt, read_prompts
from utils.seeds import sample_seed

MAX_VIDEOS = 1_000_000  # of one run


@dataclass(frozen=True)
class Job:
    """One clip to be made: sample `sample` of prompt number `index`."""

    index: int
    prompt: str
    sample: int
    seed: int
    video: Path

    @property
    def sheet(self) -> Path:
        return self.video.with_suffix(".png")

    @property
    def record(self) -> Path:
        return self.video.with_suffix(".json")

    @property
    def finished(self) -> bool:
        return all(path.exists() for path in (self.video, self.sheet, self.record))


@dataclass(frozen=True)
class Plan:
    """This process's jobs, those to do and those that an earlier run has finished, and what they will run on."""

    config: Config
    ranks: Ranks
    jobs: list[Job]
    finished: list[Job]
    weights: tuple[WeightCheck, ...]
    device: torch.device
    dtype: torch.dtype
    start: np.ndarray | None = None  # pixels uint8 [T, H, W, 3] that every video begins with

    def summary(self) -> str:
        """One line: how many videos, where, on what."""
        folder = self.config.inference.output_folder
        precision = str(self.dtype).removeprefix("torch.")
        line = f"{_count(len(self.jobs))} to make in {folder} on {self.device} ({precision})"
        if self.finished:
            line += f"; {_count(len(self.finished))} already there (--overwrite makes them again)"
        if self.ranks.world > 1:
            line += f"; this is process {self.ranks.rank} of {self.ranks.world}, the others make theirs"
        return line

    def describe(self) -> str:
        """Everything that was decided, as text: settings, weights, files."""
        settings = {name: value for name, value in to_dict(self.config).items() if name != "training"}
        weights = [f"{check.role:<14}{check.path}  {size_text(check.size)}  {check.kind}" for check in self.weights]
        files = [f"{job.video}  seed {job.seed}" for job in self.jobs]
        files += [f"{job.video}  seed {job.seed}  already there" for job in self.finished]
        parts = [OmegaConf.to_yaml(OmegaConf.create(settings)).rstrip(), *weights, "", self.summary(), *files]
        return "\n".join(parts)


def make_plan(
    config: Config, prompts: Sequence[str] | None = None, ranks: Ranks | None = None, *, endless: bool = False
) -> Plan:
    """Check everything that can be checked without loading weights. `prompts`: instead of the configured file.

    endless: of videos without an end, whose length cannot be too short for what they begin with.
    All jobs are shared out before finished ones are left out: processes that start at different times see different
    files, and would otherwise disagree about who makes what.

    Raises UserError for the first thing that is wrong; nothing has been written then.
    """
    ranks = ranks or Ranks()
    Geometry.from_config(config).num_chunks(config.video.num_latent_frames)
    if prompts is None:
        prompts = read_prompts(resolve(config.inference.prompts))
    else:
        prompts = [check_prompt(prompt, "--prompt") for prompt in prompts]
    names, length = config.inference, None if endless else config.video.num_latent_frames
    start = read_start(config, *(Path(x).expanduser() if x else None for x in (names.image, names.video)), length)
    folder = check_writable(Path(config.inference.output_folder).expanduser(), "inference.output_folder")
    device = pick_device(config.device, ranks.local_rank)
    FastPlan.from_config(config.inference, device)
    dtype = pick_dtype(config.inference.precision, device)
    weights = tuple(check_weights(config.model))
    check_inference(config, gpu_memory(device))
    jobs = ranks.share(plan_jobs(config, prompts, folder, fingerprint(config, weights)))
    finished = [] if config.inference.overwrite else [job for job in jobs if job.finished]
    done = set(finished)
    return Plan(config, ranks, [job for job in jobs if job not in done], finished, weights, device, dtype, start)


def check_count(prompts: int, samples: int) -> None:
    """Refuse more videos than can be planned at once."""
    if prompts * samples > MAX_VIDEOS:
        raise UserError(
            f"inference.num_samples={samples} of {prompts:,} prompts are {prompts * samples:,} videos, and one run "
            f"plans {MAX_VIDEOS:,} at most; give fewer, or a part of the prompts at a time"
        )


def plan_jobs(config: Config, prompts: Sequence[str], folder: Path, settings: str) -> list[Job]:
    """The jobs of a run, prompt by prompt. A job's seed does not depend on the prompt's place in the file.

    A file's name ends in a hash of all that makes the video what it is: prompt, seed, sample and `settings` (schedule,
    sizes, weights). No two different videos share a name, and one of another schedule is not taken for finished.
    """
    check_count(len(prompts), config.inference.num_samples)
    jobs = {}
    for index, prompt in enumerate(prompts):
        for sample in range(config.inference.num_samples):
            seed = sample_seed(config.seed, sample)
            digest = short_hash(prompt, seed, sample, settings)
            words = f"{index:04d}-{sample}" if config.inference.save_with_index else f"{safe_name(prompt)}-{seed}"
            video = folder / f"{words}-{digest}.mp4"
            jobs.setdefault(video, Job(index, prompt, sample, seed, video))  # a prompt given twice is one video
    return list(jobs.values())


def _count(videos: int) -> str:
    return f"{videos} video{'s' * (videos != 1)}"
