"""THE denoising loop. Inference and training walk a chunk's row of the schedule with this code and no other.

Diagonal Distillation, arXiv 2603.09488: predict the clean chunk, noise the prediction again to the next, lower
timestep, predict again. Each prediction writes the chunk's keys and values over those of the step before, so the cache
is left with those of the *noisy* input at the row's last timestep, and that is what the next chunk sees
(diagonal forcing; `context: last_step`). The other context policies make one more pass.

Legend: B streams, f latent frames a chunk; latents are `[B, f, C, H, W]`; timesteps lie in [0, 1000].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.cache import GraphCache, StreamCache
from model.causal_wan import TextKV
from model.denoiser import Student, as_timestep
from model.flow import add_noise


def denoise_chunk(
    student: Student,
    noise: Tensor,
    row: Sequence[float],
    *,
    cache: StreamCache | GraphCache,
    chunk: int,
    text: TextKV | Tensor,
    renoise: Callable[[int], Tensor],
    exit_at: int | None = None,
    grad: bool = False,
) -> Tensor:
    """Clean latents `[B, f, C, H, W]` of chunk `chunk`, from its `noise` along `row` = (t_1 > ... > t_n).

    renoise: gives the fresh noise of step i (0-based, i >= 1).
    exit_at: index of the last step that runs; None = the row's last, which is all that inference does.
    grad: record a graph for the step at `exit_at`; the steps before it never have one.
    """
    last = len(row) - 1 if exit_at is None else exit_at
    x_t = noise
    for step in range(last + 1):
        with torch.set_grad_enabled(grad and step == last):
            x0 = student.x0(x_t, as_timestep(row[step], noise), text, cache.begin(chunk), chunk * noise.shape[1])
        if step < last:
            x_t = add_noise(x0, renoise(step + 1), as_timestep(row[step + 1], noise))
    return x0


def leave_context(
    student: Student,
    x0: Tensor,
    *,
    level: float | None,
    cache: StreamCache | GraphCache,
    chunk: int,
    text: TextKV | Tensor,
    eps: Callable[[], Tensor],
) -> None:
    """Put into the cache what later chunks see of chunk `chunk`, whose clean latents `[B, f, C, H, W]` are `x0`.

    level: `Schedule.context_timestep(chunk)`. None (last_step): the cache already holds it. 0 (clean): one pass over
    x0 itself. Above 0 (renoise): one pass over x0 noised to `level` with `eps()`, drawn only then.
    Records a graph if the caller has gradients enabled.
    """
    if level is None:
        return
    t = as_timestep(level, x0)
    x_t = add_noise(x0, eps(), t) if level > 0 else x0
    student.x0(x_t, t, text, cache.begin(chunk), chunk * x0.shape[1])
