"""Many chunks of the student's own making, with a gradient at one step of each: what distillation trains on.

Each chunk walks its row of the schedule with the code of inference (pipeline/chunk.py), reading the chunks before it
from the cache. One step of the row, the *exit*, records a graph, and its x0 is the chunk's part of the result. What
later chunks see is what inference would leave in the cache:

    context="inference"   the row is walked to its end without a graph, and the context pass of the schedule, if it
                          has one, is made of the last x0; under diagonal forcing the cache then holds the keys of the
                          noisy input at the row's last timestep, whatever the exit was
    context="release"     as Self-Forcing and diagdistill (24ef1c9) do: stop at the exit, noise its x0 to
                          `context_noise` with fresh noise, and make one more pass; inference never sees such keys

With `context_grad`, what later chunks lose through the keys they read of this one reaches its exit step: exactly where
the exit was the last step and made these keys, and straight-through (numbers of the last pass, graph of the exit's)
otherwise, which is what Self-Forcing's in-place cache amounts to.

Legend: latents [B, F, C, H, W]; a chunk has f latent frames.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from configs.geometry import Geometry
from model.cache import GraphCache, StreamCache
from model.causal_wan import TextKV
from model.denoiser import Student, as_timestep
from model.flow import add_noise
from model.schedule import Schedule
from pipeline.chunk import ConditioningFrames, denoise_chunk, update_cache
from pipeline.switch import CachedForward, InputRecorder, RecacheState


class Noise(Protocol):
    """Where fresh noise [B, f, C, H, W] comes from; pipeline.noise.NoiseSource is one."""

    def initial(self, chunk: int) -> Tensor: ...

    def renoise(self, chunk: int, step: int) -> Tensor: ...

    def context(self, chunk: int) -> Tensor: ...


class PrecomputedNoise:
    """All the noise of a rollout as one tensor [B, slots, f, C, H, W], drawn before it begins.

    A chunk has a slot for each step of its row (the first is what it starts from) and one for its context.
    """

    def __init__(self, drawn: Tensor, schedule: Schedule):
        self.drawn, self.starts = drawn, [0]
        while self.starts[-1] < drawn.shape[1]:
            self.starts.append(self.starts[-1] + len(schedule.timesteps(len(self.starts) - 1)) + 1)
        assert self.starts[-1] == drawn.shape[1], f"{drawn.shape[1]} slots of noise do not end with a chunk"

    @staticmethod
    def shape(batch: int, chunks: int, schedule: Schedule, geometry: Geometry) -> tuple[int, ...]:
        """Shape of `drawn` for so many chunks."""
        slots = sum(len(schedule.timesteps(k)) + 1 for k in range(chunks))
        b, *rest = geometry.latent_shape(batch, geometry.chunk_frames)
        return (b, slots, *rest)

    def start_from(self, noise: Tensor) -> None:
        """Put given noise [B, F, C, H, W] in place of what chunks start from."""
        for chunk, (part, start) in enumerate(zip(noise.split(self.drawn.shape[2], dim=1), self.starts, strict=False)):
            assert chunk + 1 < len(self.starts), f"noise of more chunks than {chunk}"
            self.drawn[:, start] = part

    def initial(self, chunk: int) -> Tensor:
        return self.drawn[:, self.starts[chunk]]

    def renoise(self, chunk: int, step: int) -> Tensor:
        return self.drawn[:, self.starts[chunk] + step]

    def context(self, chunk: int) -> Tensor:
        return self.drawn[:, self.starts[chunk + 1] - 1]


def exit_steps(schedule: Schedule, chunks: int, fraction: float) -> tuple[int, ...]:
    """Index of the exit step of each chunk: one `fraction` in [0, 1) of every row, so that all exit about as far along.

    For rows of 4, 3 and 2 steps, share 0.7 is steps 2, 2 and 1.
    """
    assert 0 <= fraction < 1, f"share {fraction}"
    return tuple(int(fraction * len(schedule.timesteps(k))) for k in range(chunks))


def clipped_exits(schedule: Schedule, drawn: Sequence[int]) -> tuple[int, ...]:
    """As in diagdistill's commit 24ef1c9: of each chunk a step of the last row, clipped to the chunk's own.

    For rows of 4, 3 and 2 steps these are steps 0 and 1: the last two of the first chunk and the last one of the
    second never run in training, and nothing ever trains them.
    """
    return tuple(min(step, len(schedule.timesteps(k)) - 1) for k, step in enumerate(drawn))


def last_steps(schedule: Schedule, chunks: int) -> tuple[int, ...]:
    """Exit at the end of every row, as inference does."""
    return tuple(len(schedule.timesteps(k)) - 1 for k in range(chunks))


def rollout(
    student: Student,
    schedule: Schedule,
    noise: Noise,
    text: Callable[[int], TextKV | Tensor],
    *,
    cache: GraphCache | StreamCache,
    exits: Sequence[int],
    grad: bool = True,
    first_grad: int = 0,
    context_grad: bool = True,
    context: str = "inference",
    context_noise: float = 100.0,
    conditioning: Tensor | None = None,
    recache_at: int | None = None,
    keep_sink: bool = False,
) -> Tensor:
    """Latents [B, chunks x f, C, H, W] of as many chunks as `exits` has entries.

    text: of each chunk, so that a prompt can change on the way.
    cache: empty; afterwards it holds the end of the rollout. A StreamCache where there is no `grad`.
    grad: record graphs, from chunk `first_grad` on; chunks before it are made without.
    recache_at: chunk before which the window is made again under its text, as inference does where a prompt changes
        (pipeline/switch.py); without a graph, so that later chunks send no gradient to earlier ones. keep_sink: but for
        the sink.
    conditioning: clean latents [B, g, C, H, W] that the rollout begins with; g is less than a chunk's frames.
    """
    out, recache_state, student = [], RecacheState(cache.geometry), InputRecorder(student)
    for chunk, exit_at in enumerate(exits):
        if chunk and chunk == recache_at:
            recache_state.recache(student, cache, text(chunk), keep_sink=keep_sink)
        place = {"cache": cache, "chunk": chunk, "text": text(chunk)}
        if conditioning is not None and chunk == 0:
            place["conditioning"] = ConditioningFrames.at_timestep(
                conditioning, schedule.kv_timestep(chunk), lambda: noise.context(0)
            )
        record = grad and chunk >= first_grad
        recache_state.shift_sink(student.model, cache, chunk)
        x0 = denoise_chunk(
            student,
            noise.initial(chunk),
            schedule.timesteps(chunk),
            renoise=lambda step, chunk=chunk: noise.renoise(chunk, step),
            exit_at=exit_at,
            grad=record,
            **place,
        )
        out.append(x0)
        if chunk + 1 < len(exits):  # nobody reads the last chunk's
            _write_context(student, schedule, noise, x0.detach(), exit_at, place, record and context_grad,
                   context_noise if context == "release" else None)  # fmt: skip
            recache_state.record(CachedForward(chunk, *student.last))
    return torch.cat(out, dim=1)


def _write_context(
    student: InputRecorder,
    schedule: Schedule,
    noise: Noise,
    x0: Tensor,
    exit_at: int,
    place: dict,
    graph: bool,
    release_timestep: float | None,
) -> None:
    """Put into the cache what later chunks see, given the exit's x0 without its graph.

    release_timestep: timestep to which that x0 is noised at once; None = as inference, after the rest of the row.
    """
    cache, chunk = place["cache"], place["chunk"]
    readers = {name: value for name, value in place.items() if name != "conditioning"}
    exits_own = cache.newest() if graph else []
    with torch.no_grad():
        timestep = release_timestep
        if timestep is None:
            timestep = schedule.context_timestep(chunk)
            x0 = _finish_denoising(student, schedule.timesteps(chunk), noise, x0, exit_at, place)
        update_cache(student, x0, context_timestep=timestep, eps=lambda: noise.context(chunk), **readers)
        if not graph:
            cache.detach()
    if graph and any(ours is not exits for ours, exits in zip(cache.newest(), exits_own, strict=True)):
        cache.borrow_graph(exits_own)


def _finish_denoising(
    student: InputRecorder, row: Sequence[float], noise: Noise, x0: Tensor, exit_at: int, place: dict
) -> Tensor:
    """Walk the rest of a row from the x0 of step `exit_at`; returns the last x0."""
    start = exit_at + 1
    if start == len(row):
        return x0
    chunk = place["chunk"]
    x_t = add_noise(x0, noise.renoise(chunk, start), as_timestep(row[start], x0))
    return denoise_chunk(student, x_t, row[start:], renoise=lambda step: noise.renoise(chunk, start + step), **place)
