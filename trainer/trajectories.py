"""Integration of the teacher's ODE trajectories (trainer/pairs.py stores them)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from configs.geometry import Geometry
from configs.schema import Config
from model.cache import StreamCache
from model.causal_wan import TextKV
from model.denoiser import ScoreModel, Student
from model.flow import euler_v, euler_x0, integrate, shift_time
from model.schedule import Schedule
from pipeline.chunk import update_cache
from pipeline.noise import NoiseSource
from trainer.build import causal_student, frozen_text_encoder
from trainer.distill.networks import frozen_teacher
from trainer.parallel.apply import ParallelPlan
from trainer.prompt_bank import training_prompts
from utils.device import pick_dtype
from utils.seeds import stable_hash


def trajectory_grid(rows: list[tuple[float, ...]], interval: float, shift: float) -> list[float]:
    """Timesteps from 1000 to 0: every `interval` of un-warped time, and each timestep of `rows`."""
    even = shift_time(torch.arange(1000.0, -1e-6, -interval), shift).tolist()
    near = [t for t in even if all(abs(t - known) > 1e-3 for row in rows for known in row)]
    return sorted({*near, *(t for row in rows for t in row), 0.0}, reverse=True)


class TrajectoryMaker:
    """Integrates dx/dsigma = v with Euler's method, guided.

    The grid is even in un-warped time, then shifted by `schedule.shift`; it contains every timestep of the schedule.
    """

    causal = False

    def __init__(self, config: Config, device: torch.device, *, steps: int = 48, guidance: float | None = None):
        self.config, self.device = config, device
        self.guidance = config.training.distill.guidance if guidance is None else guidance
        self.geometry = Geometry.from_config(config)
        self.chunks = self.geometry.num_chunks(config.video.num_latent_frames)
        schedule = Schedule.from_config(config.schedule, config.stream)
        rows = [schedule.timesteps(k) for k in range(self.chunks)]
        self.grid = trajectory_grid(rows, 1000.0 / steps, config.schedule.shift)
        self.timesteps = sorted({1000.0, *(t for row in rows for t in row)}, reverse=True) + [0.0]
        self.prompts = training_prompts(config)
        self.encoder = frozen_text_encoder(config, device)
        self.null = self.encoder([config.training.distill.negative_prompt])
        self.teacher = self._load()
        self.geometry = self.geometry.for_network(self.teacher.model.config)
        self.dtype = pick_dtype(config.training.precision, device)

    def _load(self) -> ScoreModel | Student:
        return ScoreModel(frozen_teacher(self.config, ParallelPlan(self.config.training, self.device))[0])

    def _noise(self, indices: Sequence[int]) -> list[Tensor]:
        """Initial noise of each chunk [B, f, C, H, W] of prompts `indices`."""
        seeds = [stable_hash(self.config.seed, "trajectory", index) for index in indices]
        noise = NoiseSource(seeds, self.geometry, self.device, torch.float32)
        return [noise.initial(k) for k in range(self.chunks)]

    def _text(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, D] of prompts `indices`, and of the negative prompt."""
        text = self.encoder([self.prompts[index] for index in indices])
        return text, self.null.expand_as(text)

    @torch.no_grad()
    def make(self, indices: Sequence[int]) -> Tensor:
        """float32 [B, S, F, C, H, W]: states of prompts `indices` at `timesteps`.

        Each depends on (seed, index) only, up to rounding.
        """
        x = torch.cat(self._noise(indices), dim=1)
        text, null = self._text(indices)

        def step(x: Tensor, t: float, t_next: float) -> Tensor:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                x0 = self.teacher.guided_x0(x, t, text, null, self.guidance)
            return euler_x0(x, x0, t, t_next)

        return integrate(step, x, self.grid, self.timesteps)


class CausalTrajectoryMaker(TrajectoryMaker):
    """Trajectories rolled out chunk by chunk by a causal many-step teacher (of stage `teacher_forcing`), each chunk
    conditioned on the clean ends of earlier ones. A student that is regressed on them is trained on contexts like those
    of its own rollouts.
    """

    causal = True

    def _load(self) -> Student:
        return Student(causal_student(self.config, "teacher").to(self.device).eval().requires_grad_(False))

    @torch.no_grad()
    def make(self, indices: Sequence[int]) -> Tensor:
        text = torch.cat(self._text(indices)[: 2 if self.guidance else 1])  # both branches of guidance
        streams = len(text)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            text = self.teacher.model.text_kv(text)
            dtype = text[0][1].dtype
            cache = self.teacher.new_cache(self.geometry, streams, self.chunks, dtype)
            noise = enumerate(self._noise(indices))
            return torch.cat([self._chunk(k, x, text, cache) for k, x in noise], dim=2)

    def _chunk(self, chunk: int, x: Tensor, text: TextKV, cache: StreamCache) -> Tensor:
        """States [B, S, f, C, H, W] of one chunk from its noise; writes the keys of the clean end to the cache."""
        copies = (len(text[0][0]) // len(x), 1, 1, 1, 1)

        def step(x: Tensor, t: float, t_next: float) -> Tensor:
            v = self.teacher.v(x.repeat(copies), t, text, cache.begin(chunk), chunk * x.shape[1])
            v = v[: len(x)] + self.guidance * (v[: len(x)] - v[-len(x) :])
            return euler_v(x, v, t, t_next)

        states = integrate(step, x, self.grid, self.timesteps)
        place = {"cache": cache, "chunk": chunk, "text": text}
        update_cache(self.teacher, states[:, -1].repeat(copies), context_timestep=0.0, eps=lambda: x, **place)
        return states
