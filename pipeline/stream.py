"""A streaming session: prompts in, chunks of frames out as they are made.

Legend: B streams run as one batch; f latent frames a chunk; latents `[B, f, C, h, w]`, frames `[B, T, H, W, 3]`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from configs.geometry import Geometry
from model.cache import StreamCache
from model.codec import Codec
from model.denoiser import Student
from model.schedule import Schedule
from model.text import TextEncoder
from pipeline.chunk import denoise_chunk, leave_context
from pipeline.noise import NoiseSource
from utils.timers import SpanTimer


@dataclass(frozen=True, eq=False)
class ChunkResult:
    """One chunk of B streams. On a GPU the frames may still be on their way: `wait` before reading them."""

    chunk: int
    latents: Tensor  # [B, f, C, h, w], on the device
    frames: Tensor  # uint8 [B, T, H, W, 3], on the host; T = 1 + 4 (f - 1) for chunk 0, later 4 f
    timer: SpanTimer

    def wait(self) -> "ChunkResult":
        self.timer.wait()
        return self

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of `text` (chunk 0 only), `step 0`, `step 1`, ..., `context` where a pass is made, and `decode`."""
        return self.timer.spans()


class StreamSession:
    """Student, codec and text encoder playing prompts chunk by chunk, in memory that does not grow with length."""

    def __init__(
        self, student: Student, codec: Codec, text_encoder: TextEncoder, schedule: Schedule, geometry: Geometry
    ):
        self.student, self.codec, self.text_encoder = student, codec, text_encoder
        self.schedule, self.geometry = schedule, geometry
        weight = student.model.patch_embedding.weight  # other weights may be kept in float32
        self.device, self.dtype = weight.device, weight.dtype
        self.chunk = 0  # the next one to be made
        self._cache: StreamCache | None = None
        self._cache_batch = 0
        self._playing: object | None = None  # stands for the newest play()

    def play(
        self, prompts: str | Sequence[str], seeds: int | Sequence[int] = 0, num_chunks: int | None = None
    ) -> Iterator[ChunkResult]:
        """Make `num_chunks` chunks (None: for ever) of one video a prompt, each from its own seed.

        A single seed serves all prompts. One session plays one batch at a time: a new `play` ends the one before.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = [seeds] * len(prompts) if isinstance(seeds, int) else list(seeds)
        assert len(seeds) == len(prompts), f"{len(seeds)} seeds for {len(prompts)} prompts"
        self._playing = playing = object()
        timer = SpanTimer(self.device)
        self._start(prompts, seeds, num_chunks)
        timer.mark("text")
        for _ in count() if num_chunks is None else range(num_chunks):
            if self._playing is not playing:
                raise RuntimeError("a newer stream of this session has begun; play one at a time, or a list as a batch")
            yield self._next(timer)
            timer = SpanTimer(self.device)

    @torch.no_grad()
    def _start(self, prompts: list[str], seeds: list[int], num_chunks: int | None) -> None:
        self.chunk = 0
        self._text = self.student.model.text_kv(self.text_encoder(prompts).to(self.dtype))
        # latents stay float32 between steps, whatever the network computes in
        self._noise = NoiseSource(seeds, self.geometry, self.device, torch.float32)
        self._decoder = self.codec.stream()
        self._prepare_cache(len(prompts), num_chunks)

    def _prepare_cache(self, batch: int, num_chunks: int | None) -> None:
        """An empty cache for `batch` streams; the memory of the last clip's is used again where it fits."""
        bounded = self.geometry.window_chunks > 0
        if self._cache is not None and self._cache_batch == batch and bounded:
            self._cache.reset()
            return
        config = self.student.model.config
        self._cache = StreamCache(
            config.num_layers,
            batch,
            config.num_attention_heads,
            config.attention_head_dim,
            self.geometry,
            device=self.device,
            dtype=self.dtype,
            max_chunks=num_chunks,
        )
        self._cache_batch = batch

    @torch.no_grad()
    def _next(self, timer: SpanTimer) -> ChunkResult:
        """Denoise, leave the context, decode: everything is queued, nothing is waited for."""
        chunk, row = self.chunk, self.schedule.row(self.chunk)

        def renoise(step: int) -> Tensor:
            timer.mark(f"step {step - 1}")
            return self._noise.renoise(chunk, step)

        place = {"cache": self._cache, "chunk": chunk, "text": self._text}
        latents = denoise_chunk(self.student, self._noise.initial(chunk), row, renoise=renoise, **place)
        timer.mark(f"step {len(row) - 1}")
        level = self.schedule.context_timestep(chunk)
        if level is not None:
            leave_context(self.student, latents, level=level, eps=lambda: self._noise.context(chunk), **place)
            timer.mark("context")
        frames = to_host(to_frames(self._decoder.decode(latents)))
        timer.mark("decode")
        self.chunk += 1
        return ChunkResult(chunk, latents, frames, timer)


def to_frames(pixels: Tensor) -> Tensor:
    """Float `[B, T, 3, H, W]` in [-1, 1] -> uint8 `[B, T, H, W, 3]`, rounded to nearest."""
    return pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).movedim(2, -1).contiguous()


def to_host(x: Tensor) -> Tensor:
    """`x` on the host. From a GPU the copy is only queued, into pinned memory: wait before reading."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
