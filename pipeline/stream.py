"""A streaming session: prompts in, chunks of frames out as they are made.

    for result in session.play("a red circle moves right", seeds=0):    # for ever; num_chunks ends it
        session.set_prompt("a blue circle moves right")                 # from the next chunk on
        here = session.snapshot()                                       # all that the stream carries
    session.restore(here)                                               # back to it, and on, bit by bit the same ...
    session.reseed(1)                                                   # ... or along another branch
    for result in session.resume(): ...

`set_prompt` and `cancel` may be called from any thread. Memory does not grow with length unless `stream.window_frames`
is 0.

Legend: B streams run as one batch; f latent frames a chunk; latents `[B, f, C, h, w]`, frames `[B, T, H, W, 3]`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from configs.errors import UserError
from configs.geometry import Geometry
from configs.schema import Config
from model.cache import StreamCache
from model.codec import Codec
from model.denoiser import Student
from model.schedule import Schedule
from model.text import TextEncoder
from pipeline.async_decoder import AsyncDecoder, NoDecoder
from pipeline.chunk import ConditioningFrames, denoise_chunk, update_cache
from pipeline.noise import NoiseSource
from pipeline.snapshot import Snapshot, identity
from pipeline.switch import CachedForward, InputRecorder, PromptTrack, RecacheState
from utils.timers import SpanTimer

Length = int | None | Sequence[int | None]  # chunks; None = without end; one for all streams, or one each


def longest(lengths: Sequence[int | None]) -> int | None:
    """Chunks until the last stream ends."""
    return None if None in lengths else max(lengths)


FIX_OF = {
    "student": "check model.student, model.lora and model.lora_scales",
    "decoder": "check the weights of model.codec",
}


class NonFiniteChunk(UserError):
    """What was made holds NaN or infinity: no picture."""


@dataclass(frozen=True, eq=False)
class ChunkResult:
    """One chunk of B streams. On a GPU the frames may still be on their way: `wait` before reading them."""

    chunk: int
    latents: Tensor  # [B, f, C, h, w], on the device
    frames: Tensor  # uint8 [B, T, H, W, 3], on the host; T = 1 + 4 (f - 1) for chunk 0, later 4 f
    timer: SpanTimer
    prompts: tuple[str, ...]  # what the chunk was made under
    active: tuple[bool, ...]  # streams that last up to here; what the others' rows hold is for nobody
    finite: Tensor  # bool [2, B], on the host: whether the latents, and the pixels, are
    dtype: torch.dtype  # that the student computes in
    check: Callable[[], None] | None = None  # the student's

    def wait(self) -> "ChunkResult":
        """Until the frames are there. Raises NonFiniteChunk where they are made of NaN or infinity."""
        self.timer.wait(self.check)
        if self.check is not None:
            self.check()
        for maker, rows in zip(FIX_OF, self.finite.tolist(), strict=True):
            if not all(good for good, active in zip(rows, self.active, strict=True) if active):
                raise NonFiniteChunk(self._blame(maker))
        return self

    def _blame(self, maker: str) -> str:
        said = f"chunk {self.chunk} holds NaN or infinity, made by the {maker}"
        if self.dtype is torch.float16:
            return f"{said}: float16 overflows beyond 65,504; set inference.precision=bfloat16 or float32"
        return f"{said}, whose weights are damaged or too large; {FIX_OF[maker]}, or try inference.precision=float32"

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of `text` (chunk 0, and where it changed), `step 0`, ..., `context` where made, and `decode`."""
        return self.timer.spans()


class Cancelled(Exception):
    """`StreamSession.cancel` was called: no further step is run."""


class _CancellableStudent(InputRecorder):
    """The student as one chunk uses it: it stops before a step once cancelled, and its last input is remembered."""

    def __init__(self, student: Student, cancelled: threading.Event):
        super().__init__(student)
        self._cancelled = cancelled

    def x0(self, x_t: Tensor, t: Tensor, *place) -> Tensor:
        if self._cancelled.is_set():
            raise Cancelled
        return super().x0(x_t, t, *place)


class StreamSession:
    """Student, codec and text encoder playing prompts chunk by chunk, in memory that does not grow with length."""

    def __init__(
        self,
        student: Student,
        codec: Codec,
        text_encoder: TextEncoder,
        schedule: Schedule,
        geometry: Geometry,
        *,
        switch: str = "recache",
        switch_chunks: int = 3,
        overlap: bool = True,
    ):
        self.student, self.codec, self.text_encoder = student, codec, text_encoder
        self.schedule, self.geometry = schedule, geometry
        self.switch, self.switch_chunks = switch, switch_chunks
        weight = student.model.patch_embedding.weight  # other weights may be kept in float32
        self.device, self.dtype = weight.device, weight.dtype
        self.async_decoder = AsyncDecoder(self.device, overlap)
        self.chunk = 0  # the next one to be made
        self._blended = -1  # chunk that the newest step of a blend was for
        self._cache: StreamCache | None = None
        self._cache_batch = 0
        self._conditioning: Tensor | None = None  # what is given of the stream, until it is played
        self._playing: object | None = None  # stands for the newest play()
        self._cancelled = threading.Event()
        self._prompt_track = PromptTrack(lambda prompts: text_encoder(prompts).to(self.dtype), student.text_kv)

    @classmethod
    def from_config(
        cls,
        config: Config,
        student: Student,
        codec: Codec,
        text_encoder: TextEncoder,
        schedule: Schedule | None = None,
    ) -> "StreamSession":
        """A session of these networks as `config` says; every session of the program is made here.

        schedule: instead of the configured one.
        """
        network, stream = student.model.config, config.stream
        geometry = Geometry.from_config(config, latent_channels=network.in_channels, patch=tuple(network.patch_size))
        return cls(
            student, codec, text_encoder, schedule or Schedule.from_config(config.schedule, stream), geometry,
            switch=stream.switch, switch_chunks=stream.switch_chunks, overlap=config.inference.overlap,
        )  # fmt: skip

    def play(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] = 0,
        num_chunks: Length = None,
        conditioning: Tensor | None = None,
        *,
        decode: bool = True,
    ) -> Iterator[ChunkResult]:
        """Make `num_chunks` chunks (None: for ever) of one video a prompt, each from its own seed.

        A single seed serves all prompts, and so does a single number of chunks; of several, `ChunkResult.active` says
        whose have been reached. The batch keeps its size, so that nothing is compiled or captured anew; no stream
        depends on another's length, bit by bit. (Against playing it alone: kernels for another batch size sum in
        another order, which in float32 is 1e-4 at most on the tiny model; tests/pipeline/test_session.py.)
        conditioning: clean latents [B or 1, g, C, h, w] that the videos begin with (pipeline/chunk.py). They count as
        chunks and are decoded like them, by the same decoder: the first frames are the given ones, none lost or
        repeated.
        decode: False = latents alone are made; a chunk then has no frames (T = 0).

        One session plays one batch at a time: a new `play` ends the one before. It begins when it is called: what is
        said before the first chunk is made goes for that.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = [seeds] * len(prompts) if isinstance(seeds, int) else list(seeds)
        assert len(seeds) == len(prompts), f"{len(seeds)} seeds for {len(prompts)} prompts"
        self._cancelled.clear()
        self._playing = playing = object()
        timer = SpanTimer(self.device)
        lengths = self._lengths(num_chunks, len(prompts))
        self._start(prompts, seeds, longest(lengths), conditioning)
        if not decode:
            self._decoder = NoDecoder()
        timer.mark("text")
        return self._run(playing, lengths, timer)

    def resume(self, num_chunks: Length = None) -> Iterator[ChunkResult]:
        """Go on from where the stream stands: after `restore`, `cancel`, or the end of `play`."""
        assert self._cache is not None, "nothing has been played"
        self._cancelled.clear()
        self._playing = playing = object()
        return self._run(playing, self._lengths(num_chunks, len(self._noise.seeds)), SpanTimer(self.device))

    def set_prompt(self, prompts: str | Sequence[str | None], switch: str | None = None) -> None:
        """Change the prompt from the next chunk on: one for all streams, or one each (None: as it was).

        switch: as `stream.switch` (pipeline/switch.py); None = the session's. UserError for what is no prompt.
        """
        assert self._cache is not None, "nothing is played"
        self._prompt_track.set_prompt(prompts, switch or self.switch, self.switch_chunks)

    def reseed(self, seeds: int | Sequence[int]) -> None:
        """Draw the noise of the next chunks from other seeds: another branch of the same past."""
        old = self._noise.seeds
        seeds = [seeds] * len(old) if isinstance(seeds, int) else list(seeds)
        assert len(seeds) == len(old), f"{len(seeds)} seeds for {len(old)} streams"
        self._noise = NoiseSource(seeds, self.geometry, self.device, torch.float32)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache, which is most of what a snapshot takes; 0 before anything was played."""
        return 0 if self._cache is None else self._cache.bytes

    def cancel(self) -> None:
        """End the running `play` or `resume` before its next step. The chunk it was at is made again by `resume`."""
        self._cancelled.set()

    def snapshot(self, device: torch.device | str | None = None) -> Snapshot:
        """All that the stream carries between chunks; the cache, which is most of it, copied to `device`."""
        assert self._cache is not None, "nothing has been played"
        self.async_decoder.synchronize()
        return Snapshot(
            identity=identity(self.student.model, self.geometry),
            chunk=self.chunk,
            seeds=self._noise.seeds,
            text=self._prompt_track.state,
            cache=self._cache.snapshot(device),
            passes=dict(self._recache_state.slots),
            decoder=self._decoder.snapshot(),
            conditioning=self._conditioning,
        )

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Go back to `snapshot`, of this session or of another with the same weights; `resume` goes on from there.

        Chunks made from here are bit by bit those that were made then. UserError for another model's snapshot.
        """
        snapshot.check(identity(self.student.model, self.geometry))
        self._playing = None
        self.async_decoder.synchronize()
        batch = len(snapshot.seeds)
        if self._cache is None or self._cache_batch != batch:
            self._prepare_cache(batch, None)
        self._cache.restore(snapshot.cache)
        self._recache_state = RecacheState(self.geometry)
        self._recache_state.slots = dict(snapshot.passes)
        self._decoder = self.codec.stream()
        self._decoder.restore(snapshot.decoder)
        self._noise = NoiseSource(snapshot.seeds, self.geometry, self.device, torch.float32)
        self._prompt_track.clear_pending()
        self._prompt_track.state = snapshot.text
        self.chunk, self._blended = snapshot.chunk, -1
        self._conditioning = snapshot.conditioning

    def _lengths(self, num_chunks: Length, streams: int) -> list[int | None]:
        """Chunks of each stream from here on."""
        lengths = [num_chunks] * streams if num_chunks is None or isinstance(num_chunks, int) else list(num_chunks)
        assert len(lengths) == streams, f"{len(lengths)} lengths for {streams} streams"
        return lengths

    def _run(self, playing: object, lengths: list[int | None], timer: SpanTimer) -> Iterator[ChunkResult]:
        """Chunks from where the stream stands, until the longest count is reached or `cancel` is called."""
        last = longest(lengths)
        for done in count() if last is None else range(last):
            if self._playing is not playing:
                raise RuntimeError("a newer stream of this session has begun; play one at a time, or a list as a batch")
            try:
                result = self._next(timer, tuple(length is None or done < length for length in lengths))
            except Cancelled:
                return
            yield result
            timer = SpanTimer(self.device)

    @torch.no_grad()
    def _start(self, prompts: list[str], seeds: list[int], num_chunks: int | None, conditioning: Tensor | None) -> None:
        self.chunk, self._blended = 0, -1
        self._conditioning = None if conditioning is None else self._checked(conditioning, len(prompts))
        self._prompt_track.start(prompts)
        # latents stay float32 between steps, whatever the network computes in
        self._noise = NoiseSource(seeds, self.geometry, self.device, torch.float32)
        self._decoder = self.codec.stream()
        self._recache_state = RecacheState(self.geometry)
        self._prepare_cache(len(prompts), num_chunks)

    def _prepare_cache(self, batch: int, num_chunks: int | None) -> None:
        """An empty cache for `batch` streams; the memory of the last clip's is used again where it fits."""
        bounded = self.geometry.window_chunks > 0
        same = self._cache is not None and self._cache_batch == batch
        if same and (bounded or (num_chunks or 0) <= self._cache.capacity):
            self._cache.reset()
            return
        self._cache = self.student.new_cache(self.geometry, batch, num_chunks)
        self._cache_batch = batch

    @torch.no_grad()
    def _next(self, timer: SpanTimer, active: tuple[bool, ...]) -> ChunkResult:
        """Denoise, leave the context, decode: everything is queued, nothing is waited for."""
        chunk, row = self.chunk, self.schedule.timesteps(self.chunk)
        student = _CancellableStudent(self.student, self._cancelled)
        text = self._text_of_next(student, timer)
        self._recache_state.shift_sink(student.model, self._cache, chunk)

        def renoise(step: int) -> Tensor:
            timer.mark(f"step {step - 1}")
            return self._noise.renoise(chunk, step)

        place = {"cache": self._cache, "chunk": chunk, "text": text}
        latents, conditioning = self._given(chunk)
        if latents is None:
            noise = self._noise.initial(chunk)
            latents = denoise_chunk(student, noise, row, renoise=renoise, conditioning=conditioning, **place)
            timer.mark(f"step {len(row) - 1}")
            context_timestep = self.schedule.context_timestep(chunk)
        else:
            context_timestep = self.schedule.kv_timestep(chunk)
        if context_timestep is not None:
            update_cache(
                student, latents, context_timestep=context_timestep, eps=lambda: self._noise.context(chunk), **place
            )
            timer.mark("context")
        self._recache_state.record(CachedForward(chunk, *student.last))
        frames, finite = self.async_decoder.decode(self._decoder, latents, timer)
        self._noise.prefetch(chunk + 1)  # the CPU draws while the GPU works
        self.chunk += 1
        if self._conditioning is not None and self._conditioning.shape[1] <= self.chunk * self.geometry.chunk_frames:
            self._conditioning = None
        prompts = self._prompt_track.state.prompts
        return ChunkResult(
            chunk, latents, frames, timer, prompts, active, finite, self.dtype, self.student.check
        )

    def _checked(self, conditioning: Tensor, batch: int) -> Tensor:
        """Latents that the streams begin with, as [batch, g, C, h, w] on the device."""
        shape = self.geometry.latent_shape(len(conditioning), conditioning.shape[1])
        assert conditioning.shape == shape and len(conditioning) in (1, batch), (
            f"conditioning {tuple(conditioning.shape)} for {shape}, {batch}"
        )
        return conditioning.to(self.device, torch.float32).expand(batch, *shape[1:])

    def _given(self, chunk: int) -> tuple[Tensor | None, ConditioningFrames | None]:
        """What is given of `chunk`: all of its latents, or its first frames; and neither once the start is played."""
        if self._conditioning is None:
            return None, None
        part = self._conditioning[:, self.geometry.chunk(chunk)]
        if part.shape[1] == self.geometry.chunk_frames:
            return part, None
        context_timestep = self.schedule.kv_timestep(chunk)
        return None, ConditioningFrames.at_timestep(part, context_timestep, lambda: self._noise.context(chunk))

    def _text_of_next(self, student: _CancellableStudent, timer: SpanTimer):
        """Keys of the text that the next chunk is made under; the past is made to fit it where that is due."""
        before = self._prompt_track.state
        state = self._prompt_track.advance(blend=self.chunk != self._blended)
        self._blended = self.chunk
        if state.needs_recache:
            self._recache_state.recache(student, self._cache, state.kv, keep_sink=state.keep_sink)
            self._prompt_track.mark_recached()
        if state is not before:
            timer.mark("text")
        return state.kv
