"""Making the teacher's ODE trajectories (trainer/pairs.py says how they are kept)."""

import torch
from torch import Tensor

from configs.geometry import Geometry
from configs.schema import Config
from model.denoiser import Score
from model.schedule import Schedule
from model.sequence import SequenceGroup
from pipeline.noise import NoiseSource
from trainer.build import frozen_text_encoder
from trainer.causal_ode import trajectory_grid
from trainer.players import frozen_teacher
from trainer.prompt_bank import training_prompts
from utils.device import pick_dtype
from utils.seeds import stable_hash


class TrajectoryMaker:
    """Integrates dx/dsigma = v with Euler's method, guided, for one prompt at a time.

    The grid is even in un-warped time, then shifted by `schedule.shift`, with every timestep of the schedule among it.
    """

    def __init__(self, config: Config, device: torch.device, *, steps: int = 48, guidance: float | None = None):
        self.config, self.device = config, device
        self.guidance = config.training.distill.guidance if guidance is None else guidance
        self.geometry = Geometry.from_config(config)
        self.chunks = self.geometry.num_chunks(config.video.num_latent_frames)
        schedule = Schedule.from_config(config.schedule, config.stream)
        rows = [schedule.row(k) for k in range(self.chunks)]
        self.grid = trajectory_grid(rows, 1000.0 / steps, config.schedule.shift)
        self.timesteps = sorted({1000.0, *(t for row in rows for t in row)}, reverse=True) + [0.0]
        self.prompts = training_prompts(config)
        self.encoder = frozen_text_encoder(config, device)
        self.null = self.encoder([config.training.distill.negative_prompt])
        self.teacher = Score(frozen_teacher(config, device, SequenceGroup()))
        self.dtype = pick_dtype(config.training.precision, device)

    @torch.no_grad()
    def make(self, index: int) -> Tensor:
        """float32 [S, F, C, H, W]: states of prompt `index` at `timesteps`. A function of (seed, index)."""
        seed = stable_hash(self.config.seed, "trajectory", index)
        noise = NoiseSource([seed], self.geometry, self.device, torch.float32)
        x = torch.cat([noise.initial(k) for k in range(self.chunks)], dim=1)
        text, kept = self.encoder([self.prompts[index]]), []
        for t, t_next in zip(self.grid, [*self.grid[1:], None], strict=True):
            if t in self.timesteps:
                kept.append(x[0])
            if t_next is not None:
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    x0 = self.teacher.guided_x0(x, t, text, self.null, self.guidance)
                x = x0 + (x - x0) * (t_next / t)  # x = x0 + sigma v
        return torch.stack(kept)
