"""Sampling with a bidirectional network in many steps, as the teacher does."""

import torch
from torch import Tensor

from model.denoiser import ScoreModel
from model.flow import euler_x0, integrate, shift_time


def euler_grid(steps: int, shift: float) -> Tensor:
    """Timesteps [steps + 1] from 1000 to 0, even in un-warped time, then shifted."""
    return shift_time(torch.linspace(1000.0, 0.0, steps + 1), shift)


@torch.no_grad()
def sample(
    score: ScoreModel, noise: Tensor, text: Tensor, null_text: Tensor, *, steps: int = 50, shift: float, guidance: float
) -> Tensor:
    """Integrate dx/dsigma = v from noise [B, F, C, H, W] to latents of that shape with Euler's method.

    text, null_text: [B, L, D]; `guidance` s is that of cond + s (cond - uncond); 0 runs the conditional branch alone.
    """

    def step(x: Tensor, t: float, t_next: float) -> Tensor:
        times = torch.full((x.shape[0],), t, device=x.device)
        x0 = score.guided_x0(x, times, text, null_text, guidance) if guidance else score.x0(x, times, text)
        return euler_x0(x, x0, t, t_next)

    return integrate(step, noise, euler_grid(steps, shift).tolist(), [0.0])[:, 0]
