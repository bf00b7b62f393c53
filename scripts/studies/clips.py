"""Measures of the ablation: clips of many captions, generated in batches and compared with rendered ones.

Captions are balanced over all attributes; every row uses the same captions, seeds and noise. A full caption leaves the
start position open; for the spread of headings a second set states neither direction nor speed. Columns are 95%
`Interval`s: Wilson's for shares, the normal one for means, a bootstrap's for sets.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from configs.geometry import Geometry, pixel_frames
from configs.schema import Config
from model.codec import Codec
from model.denoiser import ScoreModel, Student
from model.schedule import Schedule
from model.text import TextEncoder
from model.weights.load import load_score, load_student, load_text_encoder
from pipeline.async_decoder import to_frames
from pipeline.bidirectional import sample
from pipeline.networks import load_codec
from pipeline.noise import NoiseSource
from pipeline.stream import StreamSession
from scripts.quality.tiny_features import (
    clip_features,
    frechet_distance,
    heading_spread,
    saturation_drift,
    start_spread,
)
from trainer.tiny.measures import measure, score_measured
from trainer.tiny.world import OPEN, TinyWorld, caption
from utils.clip_measures import motion_energy, seam_score
from utils.device import pick_dtype
from utils.intervals import Z95, Interval, mean_interval
from utils.progress import progress_bar
from utils.seeds import sample_seed

Maker = Callable[[Sequence[str], Sequence[int], int], Tensor]  # prompts, seeds, latent frames -> uint8 [B, T, 3, H, W]
Measured = dict[str, Tensor]
TEACHER_STEPS = 50
DRAWS = 200  # of a bootstrap
SCORED = (
    *("colour", "shape", "direction", "axis", "sign", "background"),
    *("speed", "speed_ratio", "consistency", "all"),
)


@dataclass(frozen=True, eq=False)
class System:
    """What rows share: codec, text encoder, sizes."""

    config: Config
    codec: Codec
    text: TextEncoder
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(cls, config: Config, device: torch.device) -> "System":
        names, dtype = config.model, pick_dtype(config.inference.precision, device)
        text = load_text_encoder(names.text_encoder, names.tokenizer, names.text_tokens, device, dtype)
        return cls(config, load_codec(names, device, dtype), text, device, dtype)

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry.from_config(self.config)

    def student(self, path, schedule: Schedule) -> Maker:
        """Makes clips as inference does."""
        network = Student(load_student(path, self.device, self.dtype))
        session = StreamSession.from_config(self.config, network, self.codec, self.text, schedule)

        def make(prompts: Sequence[str], seeds: Sequence[int], frames: int) -> Tensor:
            played = session.play(prompts, seeds, self.geometry.num_chunks(frames))
            return torch.cat([result.wait().frames for result in played], dim=1).movedim(-1, 2)

        return make

    def teacher(self, path) -> Maker:
        """Makes clips with the teacher, in 50 Euler steps."""
        score, null = ScoreModel(load_score(path, self.device, self.dtype)), self.text([""])
        options = {"shift": self.config.schedule.shift, "guidance": self.config.training.flow.guidance}

        @torch.no_grad()
        def make(prompts: Sequence[str], seeds: Sequence[int], frames: int) -> Tensor:
            source = NoiseSource(seeds, self.geometry, self.device, torch.float32)
            noise = torch.cat([source.initial(k) for k in range(self.geometry.num_chunks(frames))], dim=1)
            text = self.text(list(prompts))
            latents = sample(score, noise, text, null.expand_as(text), steps=TEACHER_STEPS, **options)
            return to_frames(self.codec.decode(latents)).movedim(-1, 2)

        return make


def cpu_seconds(make: Maker, prompt: str, frames: int) -> float:
    """Seconds of one CPU core for one clip; `make` computes on the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        make([prompt], [0], frames)  # first calls choose kernels
        begin = time.process_time()
        make([prompt], [0], frames)
        return time.process_time() - begin
    finally:
        torch.set_num_threads(threads)


class Bench:
    """Captions and seeds, and the rendered clips that a row's are compared with.

    clips, long_clips: captions for clips of the configured length and of `long_frames` latent frames; open_clips:
    captions that state neither direction nor speed, of the configured length.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        *,
        clips: int,
        open_clips: int,
        long_clips: int,
        long_frames: int,
        batch: int,
        seed: int,
    ):
        self.device, self.batch = device, batch
        self.frames, self.long_frames = config.video.num_latent_frames, long_frames
        self.clips, self.long_clips = clips, long_clips
        geometry = Geometry.from_config(config)
        geometry.num_chunks(long_frames)
        chunks = range(1, geometry.num_chunks(max(self.frames, long_frames)))
        self.borders = [pixel_frames(k * geometry.chunk_frames) for k in chunks]
        self.world = TinyWorld(config.video.height, config.video.width)
        self.scenes = self.world.scenes(seed, max(clips, long_clips), balanced=True)
        self.prompts = [caption(scene) for scene in self.scenes]
        open_scenes = self.world.scenes(seed, open_clips, balanced=True)
        self.open_prompts = [caption(scene, without=OPEN) for scene in open_scenes]
        self.seeds = [sample_seed(seed, i) for i in range(max(len(self.scenes), open_clips))]
        self.rng = np.random.default_rng([seed, 1])

    @cached_property
    def rendered(self) -> Measured:
        """Clips of the same captions with other starts and sizes: what distance and motion are compared with."""
        scenes = [self.world.place(vars(scene), self.rng) for scene in self.scenes[: self.clips]]

        def make(first: int, last: int) -> Tensor:
            pixels = self.world.render(scenes[first:last], pixel_frames(self.frames), device=self.device)
            return ((pixels + 1) * 127.5).round().to(torch.uint8)

        return self._describe("rendered clips", make, self.clips)

    def columns(self, make: Maker, *, endless: bool) -> dict[str, Interval]:
        """All that is measured of a row, by name. endless: it can go on past the length it was trained at."""
        measured = self._made("clips", make, self.prompts[: self.clips], self.frames)
        scores = score_measured(self.prompts[: self.clips], measured).columns
        columns = {name: scores[name] for name in SCORED}
        columns["motion"] = mean_interval(measured["motion"] / self.rendered["motion"].mean())
        there = self.rendered["features"]
        columns["frechet"] = bootstrap(lambda some: frechet_distance(some["features"], there), measured)
        measured["expected"] = self.world.expected_starts(self.scenes[: self.clips])
        columns["start_spread"] = bootstrap(lambda some: start_spread(some, some["expected"]), measured)
        free = self._made("captions without a direction", make, self.open_prompts, self.frames)
        columns["heading_spread"] = bootstrap(heading_spread, free)
        columns["seam"] = mean_interval(measured["seam"])
        columns["drift"] = mean_interval(measured["drift"])
        if endless and self.long_clips:
            long = self._made("long clips", make, self.prompts[: self.long_clips], self.long_frames)
            columns["long_drift"] = mean_interval(long["drift"])
        return columns

    def _made(self, what: str, make: Maker, prompts: Sequence[str], frames: int) -> Measured:
        def some(first: int, last: int) -> Tensor:
            return make(prompts[first:last], self.seeds[first:last], frames).to(self.device)

        return self._describe(what, some, len(prompts))

    def _describe(self, what: str, make: Callable[[int, int], Tensor], count: int) -> Measured:
        """What `count` clips show, a batch in memory at a time; on the CPU."""
        parts = []
        with progress_bar(what, count, "clip") as bar:
            for first in range(0, count, self.batch):
                parts.append(describe(make(first, min(first + self.batch, count)), self.borders))
                bar.update(len(parts[-1]["seam"]))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def describe(clips: Tensor, borders: Sequence[int]) -> Measured:
    """`measure` of clips [B, T, 3, H, W], with features, seam, motion and saturation drift; on the CPU."""
    measured = measure(clips)
    measured |= {
        "features": clip_features(clips),
        "seam": seam_score(clips, borders),
        "motion": motion_energy(clips),
        "drift": saturation_drift(measured),
    }
    return {name: value.cpu() for name, value in measured.items()}


def bootstrap(figure: Callable[[Measured], float], measured: Measured) -> Interval:
    """`figure` of a set of clips, give or take 1.96 standard deviations of it over sets drawn from these with repeats.

    Not the percentiles: repeats make a distance larger and a spread smaller, which would shift them.
    """
    count = len(next(iter(measured.values())))
    rng = torch.Generator().manual_seed(0)
    draws = [torch.randint(count, (count,), generator=rng) for _ in range(DRAWS)]
    values = np.array([figure({name: x[index] for name, x in measured.items()}) for index in draws])
    half = Z95 * float(np.nanstd(values, ddof=1)) if np.isfinite(values).sum() > 1 else float("nan")
    value = figure(measured)
    return Interval(value, value - half, value + half, count)
