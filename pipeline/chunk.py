"""The denoising loop of a chunk, which inference and training share.

Diagonal Distillation, arXiv 2603.09488: predict the clean chunk, noise the prediction to the next lower timestep, and
predict again. Each step overwrites the chunk's keys and values of the step before. The cache thus keeps those of the
*noisy* input at the last timestep, and the next chunk attends to them (diagonal forcing; `context: last_step`). The
other context modes need one more pass.

A stream can start from conditioning frames (an image or a clip), whose latents are given. A chunk that consists only of
them makes a single pass, `update_cache` at the timestep of the context. If only the first frames of a chunk are given,
they enter every step at the timestep of the context, as in the chunks before, and each frame has its own timestep; the
other frames are denoised. An image is latent frame 0 of chunk 0, which is one pixel frame, and frames 1 and 2 are
generated in the same chunk. (If the image were repeated to fill the chunk, every video would begin with half a second
without motion, unlike the clips of the training.)

Legend: B streams, f latent frames a chunk; latents are `[B, f, C, H, W]`; timesteps lie in [0, 1000].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.cache import GraphCache, StreamCache
from model.causal_wan import TextKV
from model.denoiser import Student, as_timestep
from model.flow import add_noise


@dataclass(frozen=True, eq=False)
class ConditioningFrames:
    """The given first g < f frames of a chunk, clean and at the timestep of the context."""

    latents: Tensor  # clean, [B, g, C, H, W]
    noisy: Tensor  # at `timestep`
    timestep: float

    @classmethod
    def at_timestep(cls, latents: Tensor, timestep: float, eps: Callable[[], Tensor]) -> "ConditioningFrames":
        """Conditioning frames noised to `timestep`. eps: returns the noise [B, f, C, H, W] of the chunk's context."""
        frames = latents.shape[1]
        noisy = add_noise(latents, eps()[:, :frames], as_timestep(timestep, latents)) if timestep > 0 else latents
        return cls(latents, noisy, timestep)

    def insert(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Input [B, f, C, H, W] of a step at t [B] with these frames in their place, and its timesteps [B, f]."""
        g = self.latents.shape[1]
        times = t[:, None].repeat(1, x_t.shape[1])
        times[:, :g] = self.timestep
        return torch.cat([self.noisy, x_t[:, g:]], dim=1), times

    def restore(self, x0: Tensor) -> Tensor:
        """`x0` with these frames in their place."""
        return torch.cat([self.latents, x0[:, self.latents.shape[1] :]], dim=1)


def denoise_chunk(
    student: Student,
    noise: Tensor,
    timesteps: Sequence[float],
    *,
    cache: StreamCache | GraphCache,
    chunk: int,
    text: TextKV | Tensor,
    renoise: Callable[[int], Tensor],
    conditioning: ConditioningFrames | None = None,
    exit_at: int | None = None,
    grad: bool = False,
) -> Tensor:
    """Clean latents `[B, f, C, H, W]` of chunk `chunk`, from its `noise` along `timesteps` = (t_1 > ... > t_n).

    renoise: returns the fresh noise of step i (0-based, i >= 1).
    conditioning: the chunk's first frames, if they are given; no gradient reaches them.
    exit_at: index of the last step that runs; None = the last one, as in inference.
    grad: record an autograd graph for the step at `exit_at`; the steps before it never have one.
    """
    last = len(timesteps) - 1 if exit_at is None else exit_at
    x_t = noise
    for step in range(last + 1):
        t = as_timestep(timesteps[step], noise)
        if conditioning is not None:
            x_t, t = conditioning.insert(x_t, t)
        with torch.set_grad_enabled(grad and step == last):
            x0 = student.x0(x_t, t, text, cache.begin(chunk), chunk * noise.shape[1])
            x0 = x0 if conditioning is None else conditioning.restore(x0)
        if step < last:
            x_t = add_noise(x0, renoise(step + 1), as_timestep(timesteps[step + 1], noise))
    return x0


def update_cache(
    student: Student,
    x0: Tensor,
    *,
    context_timestep: float | None,
    cache: StreamCache | GraphCache,
    chunk: int,
    text: TextKV | Tensor,
    eps: Callable[[], Tensor],
) -> None:
    """Write the context of chunk `chunk` to the cache: the keys and values that later chunks attend to.

    context_timestep: that of the schedule. None (last_step): the cache already holds it. 0 (clean): one pass over x0
    itself. Above 0 (renoise): one pass over x0 noised to `context_timestep` with `eps()`, drawn only then.
    Records a graph if the caller has gradients enabled.
    """
    if context_timestep is None:
        return
    t = as_timestep(context_timestep, x0)
    x_t = add_noise(x0, eps(), t) if context_timestep > 0 else x0
    student.x0(x_t, t, text, cache.begin(chunk), chunk * x0.shape[1])
