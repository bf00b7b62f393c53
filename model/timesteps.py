"""The scale of timesteps and its shift, for numbers and tensors alike; needs no torch."""

from typing import TypeVar

TIME = 1000.0  # timestep of pure noise

Sigma = TypeVar("Sigma")  # a float or a tensor


def warp(sigma: Sigma, shift: float) -> Sigma:
    """Timestep of noise level sigma warped by the shift s: sigma' = s sigma / (1 + (s - 1) sigma)."""
    return TIME * shift * sigma / (1 + (shift - 1) * sigma)
