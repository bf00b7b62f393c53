"""Measures of long streams and of changes of the prompt: constant memory and time, complete frames, drift, seams.

A stream is measured while it plays, chunk by chunk, in constant memory. The number of each frame is drawn into it after
decoding (16 bits, black and white, across the top eighth); pixel measures use the rest of the frame.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from configs.geometry import TEMPORAL_STRIDE, pixel_frames
from configs.schema import Config
from model.weights.random import RandomTextEncoder, random_codec, random_transformer
from pipeline.async_decoder import prefetch
from pipeline.diagonal import DiagonalPipeline
from pipeline.networks import load_device
from pipeline.stream import ChunkResult, StreamSession
from trainer.tiny.captions import COLOURS
from trainer.tiny.measures import measure
from trainer.tiny.world import TinyScene, TinyWorld, caption
from utils.clip_measures import as_clip, frame_distances, quarters, seam_ratio, unit_frames
from utils.device import pick_device, pick_dtype, set_threads
from utils.files import finite
from utils.video_live import LiveWriter

BITS = 16
ROWS = 120  # of a frame, about, that are looked at: more would take longer than a GPU takes to make them
AGREE = 2  # chunks within which a new colour has to be there


class FrameNumbering:
    """Replaces the session's `to_frames`, and draws the number of each frame into it."""

    def __init__(self, to_frames):
        self._to_frames, self.count = to_frames, 0

    def __call__(self, pixels: Tensor) -> Tensor:
        frames = self._to_frames(pixels)
        numbers = torch.arange(self.count, self.count + frames.shape[1], device=frames.device)
        bits = (numbers[:, None] >> torch.arange(BITS, device=frames.device)) & 1
        self.count += frames.shape[1]
        height, width = frames.shape[2] // 8, frames.shape[3] // BITS
        blocks = bits.to(torch.uint8).mul(255).repeat_interleave(width, 1)
        frames[:, :, :height, : BITS * width] = blocks[None, :, None, :, None]
        return frames


def read_numbers(path: Path) -> list[int]:
    """The numbers in the frames of a video, in order of presentation."""
    numbers = []
    with av.open(str(path)) as file:
        file.streams.video[0].thread_type = "AUTO"  # several frames at a time
        for frame in file.decode(video=0):
            image = frame.to_ndarray(format="gray")
            height, width = image.shape[0] // 8, image.shape[1] // BITS
            blocks = image[:height, : BITS * width].reshape(height, BITS, width).mean((0, 2)) > 127
            numbers.append(int(sum(int(bit) << i for i, bit in enumerate(blocks))))
    return numbers


def random_pipeline(config: Config, size: str, rank: int = 0) -> DiagonalPipeline:
    """Random weights of a size: tiny, 1.3B, 14B."""
    set_threads(config.cpu_threads)
    device = pick_device(config.device, rank)
    dtype = pick_dtype(config.inference.precision, device)
    student = random_transformer(size, load_device(config.inference.student, device), dtype, causal=True)
    text = RandomTextEncoder(config.model.text_tokens, student.config.text_dim, device)
    config = replace(config, inference=replace(config.inference, text_encoder="keep", text_int8=False))
    return DiagonalPipeline.from_parts(config, student, random_codec(config, size, device, dtype), text, device)


@dataclass
class StreamMeasures:
    """Measures of a stream, a few numbers per chunk."""

    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    saturation: list[float] = field(default_factory=list)  # of each frame
    steps: list[float] = field(default_factory=list)  # difference of each frame to the one before
    borders: list[int] = field(default_factory=list)
    _last: Tensor | None = None

    def see(self, frames: np.ndarray, seconds: float, memory: int) -> None:
        thin = max(1, frames.shape[1] // ROWS)  # every so many rows and columns
        clip = as_clip(frames[:, frames.shape[1] // 8 :: thin, ::thin])
        joined = clip if self._last is None else torch.cat([self._last, clip])
        if self._last is not None:
            self.borders.append(len(self.saturation))
        self.steps += frame_distances(joined[None])[0].tolist()
        images = unit_frames(clip)
        self.saturation += (images.amax(1) - images.amin(1)).mean((1, 2)).tolist()
        self._last = clip[-1:]
        self.seconds.append(seconds)
        self.bytes.append(memory)

    def seams(self, chunk_frames: int) -> dict[str, float | None]:
        """Frame differences at chunk borders over those at all other frames, and over those at the other borders of
        latent frames, where a VAE may take a step of its own; None of one chunk. chunk_frames: latent ones."""
        latents = [b + TEMPORAL_STRIDE * i for b in self.borders for i in range(1, chunk_frames)]
        among = {"seam_ratio": None, "seam_against_latents": latents}
        steps = torch.tensor([self.steps])
        return {name: finite(float(seam_ratio(steps, self.borders, a)[0])) for name, a in among.items()}

    def drift(self, frames: int) -> float | None:
        """Change of mean chroma, first to last quarter of the first `frames`, as a share with its sign."""
        values = torch.tensor(self.saturation[:frames])
        first, last = quarters(values)
        return float((last - first) / first) if first > 0 else None


def change(values: Sequence[float], middle=mean) -> float | None:
    """Relative change from the second to the last quarter; the first one is warm-up. None of fewer than four."""
    n = len(values) // 4
    return middle(values[-n:]) / middle(values[n : 2 * n]) - 1 if n else None


def memory_held(device: torch.device) -> int:
    """Bytes that this process holds: on the device, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def watch_stream(session: StreamSession, prompt: str, chunks: int, fps: int, path: Path, drift_frames: int) -> dict:
    """Play `chunks` chunks into a fragmented MP4 at `path`, then read its numbers back.

    drift_frames: latent frames over which the drift of saturation is taken.
    """
    geometry, plain = session.geometry, session.async_decoder.to_frames
    watch, numbered = StreamMeasures(), FrameNumbering(plain)
    session.async_decoder.to_frames = numbered
    begin = perf_counter()
    try:
        with LiveWriter(path, fps, (geometry.height, geometry.width)) as writer:
            before = begin
            for result in prefetch(session.play(prompt, 0, chunks), depth=1):
                frames = result.wait().frames[0].numpy()
                now = perf_counter()
                watch.see(frames, now - before, memory_held(session.device))
                before = now
                writer.write(frames)
    finally:
        session.async_decoder.to_frames = plain
    numbers = read_numbers(path)
    expected = [n % (1 << BITS) for n in range(pixel_frames(chunks * geometry.chunk_frames))]
    return {
        "latent_frames": chunks * geometry.chunk_frames,
        "frames": len(numbers),
        "video_seconds": len(numbers) / fps,
        "wall_seconds": perf_counter() - begin,
        "every_frame_once": numbers == expected,
        "memory_change": change(watch.bytes),
        "chunk_time_change": change(watch.seconds, median),
        "chunk_seconds": median(watch.seconds),
        "slowest_chunk_seconds": max(watch.seconds[len(watch.seconds) // 4 :]),  # the first quarter is warm-up
        **watch.seams(geometry.chunk_frames),
        "saturation_drift": watch.drift(4 * drift_frames),
    }


def recoloured(scene: TinyScene, turn: int) -> TinyScene:
    """The scene with another colour, each of the five in turn."""
    return replace(scene, colour=COLOURS[(COLOURS.index(scene.colour) + 1 + turn % 5) % len(COLOURS)])


def switches(session: StreamSession, world: TinyWorld, count: int, at: int, batch: int, seed: int = 7) -> dict:
    """`count` streams whose prompt changes its colour before chunk `at`: the share that shows it, chunk by chunk, and
    in the last chunk; and the step there, mean |difference| of the frames on both sides of that border to that inside
    the two chunks.

    The subject's colour is measured in the frames of one chunk.
    """
    scenes = world.scenes(seed, count, balanced=True)
    later = [recoloured(scene, i) for i, scene in enumerate(scenes)]
    seen: list[Tensor] = []  # [chunks, streams]
    steps: list[Tensor] = []  # [streams]
    for first in range(0, count, batch):
        some, new = scenes[first : first + batch], later[first : first + batch]
        playing = session.play([caption(s) for s in some], [seed + first + i for i in range(len(some))], at + AGREE)
        shown, around = [], []
        for result in playing:
            if result.chunk == at - 1:
                session.set_prompt([caption(s) for s in new])
            if result.chunk >= at - 1:
                shown.append(_colours(result))
            if result.chunk in (at - 1, at):
                around.append(result.frames.float())
        moved = torch.cat(around, dim=1).diff(dim=1).abs().mean((2, 3, 4))  # [streams, differences]
        border = around[0].shape[1] - 1
        inside = torch.cat([moved[:, :border], moved[:, border + 1 :]], dim=1).mean(1)
        steps.append(moved[:, border] / inside)
        seen.append(torch.stack(shown))
    colours = torch.cat(seen, dim=1)
    wanted = torch.tensor([COLOURS.index(scene.colour) for scene in later])
    old = torch.tensor([COLOURS.index(scene.colour) for scene in scenes])
    agree = (colours[1:] == wanted).cummax(0).values.float().mean(1).tolist()
    return {
        "switches": count,
        "old_colour_before": float((colours[0] == old).float().mean()),
        "seen_within_chunks": {str(i + 1): share for i, share in enumerate(agree)},
        "seen_in_last": float((colours[-1] == wanted).float().mean()),
        "old_colour_in_last": float((colours[-1] == old).float().mean()),
        "step_at_switch": finite(float(torch.cat(steps).median())),
    }


def _colours(result: ChunkResult) -> Tensor:
    return measure(result.wait().frames.permute(0, 1, 4, 2, 3))["colour"]


LIMITS: dict[str, tuple[str, float]] = {  # figure -> what is aimed at
    "long.memory_change": ("within", 0.01),
    "long.chunk_time_change": ("within", 0.05),
    "long.seam_ratio": ("at most", 1.10),
    "switches.seen_within_chunks.2": ("at least", 0.90),
}


def lines(figures: dict[str, Any], prefix: str = "") -> list[str]:
    """A table: figure, value, and whether it is as it should be."""
    out = []
    for name, value in figures.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            out += lines(value, f"{path}.")
            continue
        text = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        out.append(f"{path:<34}{text:>12}{_verdict(path, value)}")
    return out


def _verdict(path: str, value: Any) -> str:
    if path not in LIMITS or value is None:
        return ""
    kind, limit = LIMITS[path]
    good = {"within": abs(value) <= limit, "at most": value <= limit, "at least": value >= limit}[kind]
    return f"   {kind} {limit:g}: {'yes' if good else 'NO'}"
