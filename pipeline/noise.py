"""Noise of a batch of streams; that of each stream depends only on its own seed.

Noise is drawn on the CPU in float32, sample by sample, and copied to the device. A video is therefore the same on any
device, in any batch, with any number of processes, and whatever was generated before it.
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
        """Initial noise of chunk `chunk`."""
        if self._ahead is not None and self._ahead[0] == chunk:
            return self._ahead[1].to(self.device, self.dtype, non_blocking=True)
        return self._draw("initial", chunk)

    def prefetch(self, chunk: int) -> None:
        """Draw `initial(chunk)` in advance while the GPU is busy; does nothing on a CPU."""
        if self.device.type == "cuda":
            self._ahead = (chunk, self._on_host("initial", chunk))

    def renoise(self, chunk: int, step: int) -> Tensor:
        """Fresh noise with which the prediction of step `step` - 1 is noised to the timestep of step `step` >= 1."""
        return self._draw("renoise", chunk, step)

    def context(self, chunk: int) -> Tensor:
        """Noise of the extra pass of `context: renoise`."""
        return self._draw("context", chunk)

    def _draw(self, *names: str | int) -> Tensor:
        return self._on_host(*names).to(self.device, self.dtype, non_blocking=True)

    def _on_host(self, *names: str | int) -> Tensor:
        noise = torch.stack([torch.randn(self._shape, generator=generator(seed, *names)) for seed in self.seeds])
        if self.device.type == "cuda":
            noise = noise.pin_memory()  # from pageable memory the copy would wait for the GPU
        return noise
