"""Rectified-flow algebra, written once.

    x_t = (1 - sigma) x0 + sigma eps        sigma = t / 1000
    v   = eps - x0                          what the networks predict
    x0  = x_t - sigma v

t is [B] (one level a sample) or [B, F] (one a latent frame), in 0..1000, float32 or better: bfloat16 would turn
t = 933 into 932, which is another row of the schedule. x is [B, F, ...]. The algebra runs in float32, or in float64
where an input has it, and is cast back to the dtype of the first argument.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from model.timesteps import TIME, warp

Time = TypeVar("Time", float, Tensor)


def sigma(t: Time) -> Time:
    """Noise level in [0, 1] of timestep t."""
    if isinstance(t, Tensor):
        assert t.dtype not in (torch.bfloat16, torch.float16), f"timesteps in {t.dtype} are other timesteps"
        t = t if t.dtype == torch.float64 else t.float()
    return t / TIME


def shift_time(t: Time, shift: float) -> Time:
    """Timestep warped by the shift s: sigma' = s sigma / (1 + (s - 1) sigma). Keeps 0 and 1000 where they are."""
    return warp(sigma(t), shift)


def add_noise(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - sigma) x0 + sigma eps."""
    s, x, e = _aligned(t, x0, eps)
    return ((1 - s) * x + s * e).to(x0.dtype)


def x0_from_v(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x0 = x_t - sigma v."""
    s, x, v = _aligned(t, x_t, v)
    return (x - s * v).to(x_t.dtype)


def v_from_x0(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """v = (x_t - x0) / sigma; t must not be 0, where x_t says nothing of v."""
    s, x, x0 = _aligned(t, x_t, x0)
    return ((x - x0) / s).to(x_t.dtype)


def v_target(x0: Tensor, eps: Tensor) -> Tensor:
    """v = eps - x0, the regression target of flow matching."""
    dtype = torch.promote_types(torch.promote_types(x0.dtype, eps.dtype), torch.float32)
    return (eps.to(dtype) - x0.to(dtype)).to(x0.dtype)


def euler_v(x: Tensor, v: Tensor, t: float, t_next: float) -> Tensor:
    """An Euler step of dx/dsigma = v."""
    return x + v * ((t_next - t) / TIME)


def euler_x0(x: Tensor, x0: Tensor, t: float, t_next: float) -> Tensor:
    """The same by x0: x = x0 + sigma v, so a step scales the noise that is left."""
    return x0 + (x - x0) * (t_next / t)


def integrate(
    step: Callable[[Tensor, float, float], Tensor], x: Tensor, grid: Sequence[float], kept: Sequence[float]
) -> Tensor:
    """[B, kept, ...]: x [B, ...] at the timesteps `kept` of the falling `grid`; step(x, t, t_next) goes one on."""
    states = []
    for t, t_next in zip(grid, [*grid[1:], None], strict=True):
        if t in kept:
            states.append(x)
        if t_next is not None:
            x = step(x, t, t_next)
    return torch.stack(states, dim=1)


def _aligned(t: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigma(t) shaped to broadcast over x, and x and y, all in float32 or better."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    s = sigma(t)
    assert tuple(s.shape) == tuple(x.shape[: s.ndim]) or s.ndim == 0, f"t {list(t.shape)} for x {list(x.shape)}"
    return s.reshape(s.shape + (1,) * (x.ndim - s.ndim)).to(dtype), x.to(dtype), y.to(dtype)
