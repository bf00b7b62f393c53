"""Noise of a batch of streams, each a function of its own seed.

Drawn on the CPU in float32, sample by sample, and copied: a video is the same on any device, in any batch, on any
number of processes, and whatever was generated before it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from configs.geometry import Geometry
from utils.seeds import generator


class NoiseSource:
    """Standard normal noise `[B, f, C, H, W]` for the chunks of B streams, f latent frames a chunk."""

    def __init__(self, seeds: Sequence[int], geometry: Geometry, device: torch.device | str, dtype: torch.dtype):
        self.seeds = tuple(seeds)
        self.device, self.dtype = torch.device(device), dtype
        self._shape = geometry.latent_shape(1, geometry.chunk_frames)[1:]
        self._ahead: tuple[int, Tensor] | None = None  # of a chunk to come, still on the host

    def initial(self, chunk: int) -> Tensor:
        """What chunk `chunk` is denoised from."""
        if self._ahead is not None and self._ahead[0] == chunk:
            return self._ahead[1].to(self.device, self.dtype, non_blocking=True)
        return self._draw("initial", chunk)

    def prefetch(self, chunk: int) -> None:
        """Draw what `initial(chunk)` will be asked for while a GPU is busy; on a CPU nothing would be gained."""
        if self.device.type == "cuda":
            self._ahead = (chunk, self._on_host("initial", chunk))

    def renoise(self, chunk: int, step: int) -> Tensor:
        """Fresh noise that takes the prediction of step `step` - 1 to the timestep of step `step` >= 1."""
        return self._draw("renoise", chunk, step)

    def context(self, chunk: int) -> Tensor:
        """Noise of the extra pass that `context: renoise` makes."""
        return self._draw("context", chunk)

    def _draw(self, *names: str | int) -> Tensor:
        return self._on_host(*names).to(self.device, self.dtype, non_blocking=True)

    def _on_host(self, *names: str | int) -> Tensor:
        noise = torch.stack([torch.randn(self._shape, generator=generator(seed, *names)) for seed in self.seeds])
        if self.device.type == "cuda":
            noise = noise.pin_memory()  # from pageable memory the copy would wait for the GPU
        return noise
