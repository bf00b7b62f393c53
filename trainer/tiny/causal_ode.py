"""Stage `causal_ode`: regress a few-step causal student on trajectories of a many-step causal one.

The teacher is a teacher-forced causal student. Given the clean real past of each chunk it integrates dx/dsigma = v
from noise, guided, for all chunks of a clip at once; the student sees the past as diagonal forcing will show it and
learns x_t -> x0 at the timesteps of the chunk's schedule row (ODE regression of CausVid, arXiv 2412.07772, sec. 4.3,
with trajectories rolled out causally).

    L = mean | x0(x_t, t) - x_0 |^2    over the trajectory's states (x_t, t) of the row and its end x_0
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from configs.schema import Config
from model.flow import euler_v, integrate, shift_time, x0_from_v
from trainer.build import causal_student
from trainer.tiny.data import draw
from trainer.tiny.flow import WHOLE, TeacherForcing
from utils.device import pick_dtype
from utils.distributed import Ranks
from utils.seeds import generator


def trajectory_grid(rows: list[tuple[float, ...]], interval: float, shift: float) -> list[float]:
    """Timesteps from 1000 to 0: every `interval` of un-warped time, and each timestep of `rows`."""
    even = shift_time(torch.arange(1000.0, -1e-6, -interval), shift).tolist()
    near = [t for t in even if all(abs(t - known) > 1e-3 for row in rows for known in row)]
    return sorted({*near, *(t for row in rows for t in row), 0.0}, reverse=True)


class CausalODE(TeacherForcing):
    """Trajectories are made ahead for `training.flow.ode_clips` clips and kept at the timesteps that rows use."""

    name = "causal_ode"

    def __init__(self, config: Config, device: torch.device, ranks: Ranks):
        super().__init__(config, device, ranks)
        rows = [self.schedule.timesteps(k) for k in range(self.chunks)]
        self.grid = trajectory_grid(rows, config.training.flow.ode_interval, config.schedule.shift)
        self.kept = sorted({t for row in rows for t in row}, reverse=True) + [0.0]
        self.kept_t = torch.tensor(self.kept, device=device)
        self.row_states = (self.rows[..., None] == self.kept_t).long().argmax(-1)  # [chunks, steps]: places in `kept`
        self.states = self._trajectories()

    @torch.no_grad()
    def _trajectories(self) -> Tensor:
        """float16 [N, states, F, C, h, w]: the teacher's states at `kept` for the first clips of the bank."""
        teacher = causal_student(self.config, "teacher").to(self.device).eval()
        clips = min(self.config.training.flow.ode_clips, len(self.bank.latents))
        size = min(clips, 4 * self.config.training.micro_batch)
        dtype = pick_dtype(self.config.training.precision, self.device)
        parts = []
        for i in tqdm(range(0, clips, size), desc="teacher trajectories", leave=False):
            index = torch.arange(i, min(i + size, clips), device=self.device)
            rng = generator(self.config.seed, "ode", i, device=self.device)
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                parts.append(self._trajectory(teacher, index, rng))
        return torch.cat(parts)

    def _trajectory(self, teacher, index: Tensor, rng: torch.Generator) -> Tensor:
        past, text = self.bank.batch(index)
        clean = torch.zeros(past.shape[:2], device=self.device)

        def step(x: Tensor, t: float, t_next: float) -> Tensor:
            v = self._guided(teacher, past, clean, x, torch.full_like(clean, t), text)
            return euler_v(x, v, t, t_next)

        return integrate(step, self._noise(past, rng), self.grid, self.kept).half()

    def plan(self, step: int) -> str:
        return WHOLE

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        rng = self._rng(step, micro)
        name, size = step * self.micro_batches + micro, self.config.training.micro_batch
        index = draw(len(self.states), size, self.config.seed, name, self.ranks.rank, self.device)
        x0, text = self.bank.batch(index)
        past, past_t, _ = self._context(x0, rng)
        share = torch.rand(len(index), self.chunks, generator=rng, device=self.device)
        column = (share * self.row_lengths).long()
        chunks = torch.arange(self.chunks, device=self.device)
        state = self.row_states[chunks, column].repeat_interleave(self.geometry.chunk_frames, dim=1)  # [B, F]
        frames = torch.arange(state.shape[1], device=self.device)
        return {
            "past": past, "past_t": past_t, "t": self.kept_t[state], "text": text,
            "x_t": self.states[index[:, None], state, frames].float(),
            "target": self.states[index, -1].float(),
        }  # fmt: skip

    def loss(self, past, past_t, x_t, t, target, text) -> dict[str, Tensor]:
        v = self._v(self.module, past, past_t, x_t, t, text)
        return {"loss": F.mse_loss(x0_from_v(x_t, v.float(), t), target)}
