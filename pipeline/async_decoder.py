"""Decoding of latents to frames in host memory, in parallel with the denoising of the next chunk.

On a GPU a chunk is decoded, converted to uint8 and copied to pinned memory on a second CUDA stream, while the next
chunk is denoised on the current one. All work is queued. `prefetch` keeps one more chunk in the queue than the caller
waits for, so that the GPU never waits for the reader of the frames. Whether all values are finite is computed on the
device and copied with the frames; `ChunkResult.wait` checks it.

On a CPU with more than one core another thread decodes. It computes with as many of torch's threads as the caller does,
so frames are the same, bit by bit.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from model.codec import DecoderStream
from utils.device import available_cpus, side_stream, side_thread
from utils.timers import SpanTimer

T = TypeVar("T")


class AsyncDecoder:
    """Where chunks are decoded.

    overlap: beside the denoising of the next chunk, which one core cannot do; the attribute says whether it is so.
    """

    def __init__(self, device: torch.device, overlap: bool = True):
        gpu = device.type == "cuda"
        self.overlap = overlap and (gpu or available_cpus() > 1)
        self._beside = side_stream(device, "decoding") if self.overlap and gpu else None
        self._on_thread = self.overlap and not gpu
        self.to_frames: Callable[[Tensor], Tensor] = to_frames  # may be replaced by a compiled one

    def decode(self, decoder: DecoderStream, latents: Tensor, timer: SpanTimer) -> Callable[[], tuple[Tensor, Tensor]]:
        """A function that gives uint8 frames [B, T, H, W, 3] of the decoder's next latents; marks `decode`.

        With them goes bool [2, B]: whether each stream's latents, and its pixels, are finite. On a GPU both are on
        their way to the host: the timer's last mark stands for their having arrived. On a CPU the function waits for
        them, and raises what decoding has raised.
        """
        if self._on_thread:
            threads = torch.get_num_threads()
            return side_thread("decoding").submit(self._decoded_beside, decoder, latents, timer, threads).result
        if self._beside is None:
            frames = self._decoded(decoder, latents, timer)
        else:
            self._beside.wait_stream(torch.cuda.current_stream(latents.device))
            with torch.cuda.stream(self._beside):
                latents.record_stream(self._beside)  # keeps its memory until it has been read
                frames = self._decoded(decoder, latents, timer)
        return lambda: frames

    def _decoded(self, decoder: DecoderStream, latents: Tensor, timer: SpanTimer) -> tuple[Tensor, Tensor]:
        pixels = decoder.decode(latents)
        arriving = to_host(self.to_frames(pixels)), to_host(torch.stack([all_finite(latents), all_finite(pixels)]))
        timer.mark("decode")
        return arriving

    @torch.no_grad()
    def _decoded_beside(self, decoder: DecoderStream, latents: Tensor, timer: SpanTimer, threads: int):
        """As `_decoded`, on the other thread, for which torch's settings are its own."""
        torch.set_num_threads(threads)
        timer.mark("queue")
        return self._decoded(decoder, latents, timer)

    def snapshot(self, decoder: DecoderStream) -> Callable[[], Any]:
        """A function that gives the state of `decoder` after what has been queued, for which it waits on a CPU."""
        if self._on_thread:
            return side_thread("decoding").submit(decoder.snapshot).result
        self.synchronize()
        state = decoder.snapshot()
        return lambda: state

    def synchronize(self) -> None:
        """Make the current CUDA stream wait for decoding. Needed before the decoder's state is read or replaced."""
        if self._beside is not None:
            torch.cuda.current_stream(self._beside.device).wait_stream(self._beside)


class NoDecoder:
    """In place of a codec's stream where latents alone are wanted."""

    def decode(self, latents: Tensor) -> Tensor:
        """No frames: [B, 0, 3, h, w]."""
        return latents.new_empty(len(latents), 0, 3, *latents.shape[3:])

    def snapshot(self) -> "NoDecoder":
        """It has no state."""
        return self


def to_frames(pixels: Tensor) -> Tensor:
    """Float `[B, T, 3, H, W]` in [-1, 1] -> uint8 `[B, T, H, W, 3]`, rounded to nearest."""
    return pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).movedim(2, -1).contiguous()


def all_finite(x: Tensor) -> Tensor:
    """bool [B]: whether all values of each sample of `x` are finite. A sum reads x once; `isfinite().all()` 5 times."""
    return x.sum(dim=tuple(range(1, x.ndim)), dtype=torch.float32).isfinite()


def to_host(x: Tensor) -> Tensor:
    """`x` on the host. From a GPU the copy to pinned memory is only queued: synchronize before reading."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def prefetch(items: Iterator[T], depth: int) -> Iterator[T]:
    """Iterate over `items`, requesting `depth` of them in advance."""
    queue: list[T] = []
    for item in items:
        queue.append(item)
        if len(queue) > depth:
            yield queue.pop(0)
    yield from queue
