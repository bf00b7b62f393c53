"""A streaming session, which generates video chunk by chunk.

    for result in session.play("a red circle moves right", seeds=0):    # endless without num_chunks
        session.set_prompt("a blue circle moves right")                 # from the next chunk on
        here = session.snapshot()                                       # the state of the stream
    session.restore(here)                                               # continues bit-identically from there ...
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

from configs.errors import UserError, shown
from configs.geometry import Geometry
from configs.schema import MAX_SEED, Config
from model.cache import StreamCache
from model.codec import Codec
from model.denoiser import Student
from model.schedule import Schedule
from model.text import TextEncoder
from pipeline.arguments import whole
from pipeline.async_decoder import AsyncDecoder, NoDecoder
from pipeline.chunk import ConditioningFrames, denoise_chunk, update_cache
from pipeline.noise import NoiseSource
from pipeline.snapshot import Snapshot, identity
from pipeline.switch import CachedForward, InputRecorder, PromptTrack, RecacheState
from utils.timers import SpanTimer

Length = int | None | Sequence[int | None]  # number of chunks; None = endless; one for all streams, or one each


def longest(lengths: Sequence[int | None]) -> int | None:
    """Chunks until the last stream ends."""
    return None if None in lengths else max(lengths)


FIX_OF = {
    "student": "check model.student, model.lora and model.lora_scales",
    "decoder": "check the weights of model.codec",
}


class NonFiniteChunk(UserError):
    """A chunk contains NaN or infinity."""


@dataclass(frozen=True, eq=False)
class ChunkResult:
    """One chunk of B streams. On a GPU the frames may still be on their way: `wait` before reading them."""

    chunk: int
    latents: Tensor  # [B, f, C, h, w], on the device
    decoded: Callable[[], tuple[Tensor, Tensor]]  # `frames`, and bool [2, B]: whether latents and pixels are finite
    timer: SpanTimer
    prompts: tuple[str, ...]  # of the chunk
    active: tuple[bool, ...]  # streams that have not ended yet; ignore the rows of the others
    dtype: torch.dtype  # that the student computes in
    check: Callable[[], None] | None = None  # the student's

    @property
    def frames(self) -> Tensor:
        """uint8 [B, T, H, W, 3], on the host; T = 1 + 4 (f - 1) for chunk 0, later 4 f."""
        return self.decoded()[0]

    def wait(self) -> "ChunkResult":
        """Wait until the frames have arrived. Raises NonFiniteChunk if they contain NaN or infinity."""
        _, finite = self.decoded()
        self.timer.wait(self.check)
        if self.check is not None:
            self.check()
        for maker, rows in zip(FIX_OF, finite.tolist(), strict=True):
            if not all(good for good, active in zip(rows, self.active, strict=True) if active):
                raise NonFiniteChunk(self._blame(maker))
        return self

    def _blame(self, maker: str) -> str:
        message = f"chunk {self.chunk} holds NaN or infinity, made by the {maker}"
        if self.dtype is torch.float16:
            return f"{message}: float16 overflows beyond 65,504; set inference.precision=bfloat16 or float32"
        return f"{message}, whose weights are damaged or too large; {FIX_OF[maker]}, or try inference.precision=float32"

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of `text` (chunk 0, and when it changed), `step 0`, ..., `context` if there is a pass, `queue` if
        another thread decodes, `decode`."""
        self.decoded()
        return self.timer.spans()


class Cancelled(Exception):
    """`StreamSession.cancel` was called; raised before the next step."""


class _CancellableStudent(InputRecorder):
    """The student of one chunk: records its last input, and raises Cancelled before a step once cancelled."""

    def __init__(self, student: Student, cancelled: threading.Event):
        super().__init__(student)
        self._cancelled = cancelled

    def x0(self, x_t: Tensor, t: Tensor, *place) -> Tensor:
        if self._cancelled.is_set():
            raise Cancelled
        return super().x0(x_t, t, *place)


class StreamSession:
    """Generates streams with a student, a codec and a text encoder, in memory that does not grow with their length."""

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
        self.chunk = 0  # the next chunk
        self._cache: StreamCache | None = None
        self._cache_batch = 0
        self._conditioning: Tensor | None = None  # latents of conditioning frames that are still to come
        self._playing: object | None = None  # stands for the newest play()
        self._cancelled = threading.Event()
        dtype = self.dtype  # not self: a cycle would keep the KV cache until the next garbage collection
        self._prompt_track = PromptTrack(lambda prompts: text_encoder(prompts).to(dtype), student.text_kv)

    @classmethod
    def from_config(
        cls,
        config: Config,
        student: Student,
        codec: Codec,
        text_encoder: TextEncoder,
        schedule: Schedule | None = None,
    ) -> "StreamSession":
        """A session with the settings of `config`. schedule: replaces the configured one."""
        geometry, stream = Geometry.from_config(config).for_network(student.model.config), config.stream
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
        """Generate `num_chunks` chunks (None = endless) of one video per prompt, each from its own seed.

        A single seed serves all prompts, and so does a single number of chunks; of several, `ChunkResult.active` says
        whose have been reached. The batch keeps its size, so that nothing is compiled or captured anew; no stream
        depends on another's length, bit by bit. (Against playing it alone: kernels for another batch size sum in
        another order, which in float32 is 1e-4 at most on the tiny model; tests/pipeline/test_session.py.)
        conditioning: clean latents [B or 1, g, C, h, w] that the videos begin with (pipeline/chunk.py). They count as
        chunks and are decoded like them, by the same decoder: the first frames are the given ones, none lost or
        repeated.
        decode: False = latents alone are made; a chunk then has no frames (T = 0).

        One session plays one batch at a time: a new `play` ends the one before. It takes effect when it is called, so
        that a prompt or seed set before the first chunk is made applies to that chunk.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = _one_each(seeds, len(prompts))
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
        """Continue the stream: after `restore`, `cancel`, or the end of `play`."""
        self._check_played("resume")
        self._cancelled.clear()
        self._playing = playing = object()
        return self._run(playing, self._lengths(num_chunks, len(self._noise.seeds)), SpanTimer(self.device))

    def set_prompt(self, prompts: str | Sequence[str | None], switch: str | None = None) -> None:
        """Change the prompt from the next chunk on: one for all streams, or one each (None = unchanged).

        switch: as `stream.switch` (pipeline/switch.py); None = the session's. Raises UserError for an invalid prompt.
        """
        self._check_played("set_prompt")
        self._prompt_track.set_prompt(prompts, switch or self.switch, self.switch_chunks)

    def reseed(self, seeds: int | Sequence[int]) -> None:
        """Use other seeds from the next chunk on, for another continuation of the same stream."""
        self._check_played("reseed")
        self._noise = NoiseSource(_one_each(seeds, len(self._noise.seeds)), self.geometry, self.device, torch.float32)

    def _check_played(self, what: str) -> None:
        """Raise a UserError if there is no stream yet for the method `what`."""
        if self._cache is None:
            raise UserError(f"session.{what} needs a stream, and nothing has been played; call session.play first")

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache, which is most of a snapshot; 0 before the first `play`."""
        return 0 if self._cache is None else self._cache.bytes

    def cancel(self) -> None:
        """End the running `play` or `resume` before its next step. `resume` repeats the interrupted chunk."""
        self._cancelled.set()

    def snapshot(self, device: torch.device | str | None = None) -> Snapshot:
        """The state of the stream between chunks; the KV cache, most of it, is copied to `device` (None = the same).

        A prompt that was set since the last chunk is not part of it.
        """
        self._check_played("snapshot")
        return Snapshot(
            identity=identity(self.student.model, self.geometry),
            chunk=self.chunk,
            seeds=self._noise.seeds,
            text=self._prompt_track.state,
            cache=self._cache.snapshot(device),
            passes=dict(self._recache_state.slots),
            decoder=self.async_decoder.snapshot(self._decoder),
            conditioning=self._conditioning,
        )

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Restore `snapshot`, of this session or of another with the same weights; `resume` continues from there.

        The chunks that follow are bit-identical to those that followed then. Raises UserError for a snapshot of another
        model.
        """
        if not isinstance(snapshot, Snapshot):
            raise UserError(f"snapshot={shown(snapshot)} is {type(snapshot).__name__}; give one of session.snapshot()")
        snapshot.check(identity(self.student.model, self.geometry))
        self._playing = None
        self.async_decoder.synchronize()
        batch = len(snapshot.seeds)
        if self._cache is None or self._cache_batch != batch:
            self._prepare_cache(batch, None)
        self._cache.restore(snapshot.cache)
        self._recache_state = RecacheState(self.geometry)
        self._recache_state.slots = dict(snapshot.passes)
        decoder = snapshot.decoder()
        if isinstance(decoder, NoDecoder):
            self._decoder = decoder
        else:
            self._decoder = self.codec.stream()
            self._decoder.restore(decoder)
        self._noise = NoiseSource(snapshot.seeds, self.geometry, self.device, torch.float32)
        self._prompt_track.clear_pending()
        self._prompt_track.state = snapshot.text
        self.chunk = snapshot.chunk
        self._conditioning = snapshot.conditioning

    def _lengths(self, num_chunks: Length, streams: int) -> list[int | None]:
        """Number of chunks to come of each stream."""
        lengths = list(num_chunks) if isinstance(num_chunks, list | tuple) else [num_chunks] * streams
        assert len(lengths) == streams, f"{len(lengths)} lengths for {streams} streams"
        return lengths

    def _run(self, playing: object, lengths: list[int | None], timer: SpanTimer) -> Iterator[ChunkResult]:
        """Generate chunks until the longest stream ends or `cancel` is called."""
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
        self.chunk = 0
        self._conditioning = None if conditioning is None else self._checked(conditioning, len(prompts))
        self._prompt_track.start(prompts)
        # latents stay float32 between steps, whatever the network computes in
        self._noise = NoiseSource(seeds, self.geometry, self.device, torch.float32)
        self._decoder = self.codec.stream()
        self._recache_state = RecacheState(self.geometry)
        self._prepare_cache(len(prompts), num_chunks)

    def _prepare_cache(self, batch: int, num_chunks: int | None) -> None:
        """Make an empty cache for `batch` streams; reuses the memory of the previous one if it fits."""
        bounded = self.geometry.window_chunks > 0
        same = self._cache is not None and self._cache_batch == batch
        if same and (bounded or (num_chunks or 0) <= self._cache.capacity):
            self._cache.reset()
            return
        self._cache = self.student.new_cache(self.geometry, batch, num_chunks)
        self._cache_batch = batch

    @torch.no_grad()
    def _next(self, timer: SpanTimer, active: tuple[bool, ...]) -> ChunkResult:
        """Queue denoising, context pass and decoding of the next chunk, without waiting for any of it."""
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
            context_timestep = self.schedule.context_timestep
        else:
            context_timestep = self.schedule.kv_timestep(chunk)
        if context_timestep is not None:
            update_cache(
                student, latents, context_timestep=context_timestep, eps=lambda: self._noise.context(chunk), **place
            )
            timer.mark("context")
        self._recache_state.record(CachedForward(chunk, *student.last))
        decoded = self.async_decoder.decode(self._decoder, latents, timer)
        self._noise.prefetch(chunk + 1)  # the CPU draws while the GPU works
        self.chunk += 1
        if self._conditioning is not None and self._conditioning.shape[1] <= self.chunk * self.geometry.chunk_frames:
            self._conditioning = None
        prompts = self._prompt_track.state.prompts
        return ChunkResult(chunk, latents, decoded, timer, prompts, active, self.dtype, self.student.check)

    def _checked(self, conditioning: Tensor, batch: int) -> Tensor:
        """Latents of conditioning frames as [batch, g, C, h, w] on the device."""
        shape = self.geometry.latent_shape(len(conditioning), conditioning.shape[1])
        assert conditioning.shape == shape and len(conditioning) in (1, batch), (
            f"conditioning {tuple(conditioning.shape)} for {shape}, {batch}"
        )
        return conditioning.to(self.device, torch.float32).expand(batch, *shape[1:])

    def _given(self, chunk: int) -> tuple[Tensor | None, ConditioningFrames | None]:
        """The given part of `chunk`: (all of its latents, None), (None, its first frames), or (None, None)."""
        if self._conditioning is None:
            return None, None
        part = self._conditioning[:, self.geometry.chunk(chunk)]
        if part.shape[1] == self.geometry.chunk_frames:
            return part, None
        context_timestep = self.schedule.kv_timestep(chunk)
        return None, ConditioningFrames.at_timestep(part, context_timestep, lambda: self._noise.context(chunk))

    def _text_of_next(self, student: _CancellableStudent, timer: SpanTimer):
        """Keys and values of the next chunk's text; recaches the window if the prompt has changed."""
        before = self._prompt_track.state
        state = self._prompt_track.advance(self.chunk)
        if state.needs_recache:
            self._recache_state.recache(student, self._cache, state.kv, keep_sink=state.keep_sink)
            self._prompt_track.mark_recached()
        if state is not before:
            timer.mark("text")
        return state.kv


def _one_each(seeds: int | Sequence[int], streams: int) -> list[int]:
    """The seed of each stream, from one for all or one each. Raises UserError."""
    many = list(seeds) if isinstance(seeds, list | tuple) else [seeds] * streams
    if len(many) != streams:
        raise UserError(f"{len(many)} seeds were given for {streams} streams; give one, or one each")
    return [whole("seeds", seed, 0, MAX_SEED) for seed in many]
