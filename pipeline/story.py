"""Stories: several prompts in a single video, one after another, from a JSONL file.

LongLive's format, one story per line; a prompt starts with the first chunk at or after its latent frame:

    {"prompts": ["a red circle ...", "a blue circle ..."], "switch_frame_indices": "12"}

The indices may also be given for all lines (`inference.switch_frame_indices`); without any, prompts are distributed
evenly over the clip. A format with times in seconds, in which the whole file is one story:

    {"at": 0, "prompt": "a red circle ..."}
    {"at": 2.5, "prompt": "a blue circle ..."}
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor

from configs.errors import UserError
from configs.geometry import TEMPORAL_STRIDE, pixel_frames
from configs.schema import Config
from model.weights.files import resolve_path
from pipeline.stream import ChunkResult, StreamSession
from utils.logs import get_logger
from utils.prompts import check_prompt, is_story, read_prompts, read_records

log = get_logger(__name__)
MAX_SECONDS = 1e9


@dataclass(frozen=True)
class Story:
    """Prompts and the latent frames at which they start; the first starts at 0."""

    prompts: tuple[str, ...]
    frames: tuple[int, ...]

    @classmethod
    def of(cls, prompt: str) -> "Story":
        """A story with a single prompt."""
        return cls((prompt,), (0,))

    def times(self, chunk_frames: int, fps: int) -> list[float]:
        """Seconds at which the prompts start: with the first pixel frame of their chunk."""
        starts = [math.ceil(frame / chunk_frames) * chunk_frames for frame in self.frames]
        return [(pixel_frames(start) if start else 0) / fps for start in starts]

    def chunk_prompts(self, chunk_frames: int) -> dict[int, str]:
        """Prompts by the chunk at which they start; of several at one chunk, the last."""
        pairs = zip(self.frames, self.prompts, strict=True)
        return {math.ceil(frame / chunk_frames): prompt for frame, prompt in pairs}


def holds_stories(path: str | os.PathLike) -> bool:
    """Whether a file of prompts contains stories, by its content."""
    return any(is_story(record) for record in read_records(path) or ())


def read_stories(path: str | os.PathLike, fps: int, latent_frames: int | None, indices: str = "") -> list[Story]:
    """The stories in a JSON file. latent_frames: length of a clip; None = endless. indices: for lines without any.

    Raises a UserError that names the line for invalid JSON, invalid prompts, and times that are negative, not
    ascending, or beyond the end.
    """
    records = read_records(path)
    if not records:
        raise UserError(f"{path} holds no story; write one object a line")
    lines = [_checked_entry(record, f"{path} entry {i}") for i, record in enumerate(records, start=1)]
    timed = [("at" in line, where) for line, where in lines]
    if all(is_timed for is_timed, _ in timed):
        if indices:
            raise UserError(
                f"inference.switch_frame_indices={indices} has no effect on {path}, whose lines have times "
                f"('at'); leave it out"
            )
        return [_timed(lines, fps, latent_frames)]
    if any(is_timed for is_timed, _ in timed):
        raise UserError(f"{path} mixes lines that have 'at' with lines that have 'prompts'; use one kind")
    return [_listed(line, where, latent_frames, indices) for line, where in lines]


def planned_stories(config: Config, prompts: Sequence[str] | None = None, *, endless: bool = False) -> list[Story]:
    """The stories of the configured file, or of `prompts` instead; a single prompt is a story too."""
    names, path = config.inference, resolve_path(config.inference.prompts)
    if prompts is not None or not holds_stories(path):
        if names.switch_frame_indices:
            raise UserError(
                f"inference.switch_frame_indices={names.switch_frame_indices} has no effect without a story; give a "
                f"file with lines of 'prompts' (--data_path story.jsonl), or leave it out"
            )
        if prompts is not None:
            return [Story.of(check_prompt(prompt, "--prompt")) for prompt in prompts]
        return [Story.of(prompt) for prompt in read_prompts(path)]
    length = None if endless else config.video.num_latent_frames
    stories = read_stories(path, config.video.fps, length, names.switch_frame_indices)
    for i, story in enumerate(stories, start=1):
        _check_chunks(story, f"{path} entry {i}", config.stream.chunk_frames, length)
    return stories


def _check_chunks(story: Story, where: str, chunk_frames: int, length: int | None) -> None:
    """Raise a UserError if a prompt would start after the last chunk, and warn of those that another one replaces."""
    frame, shown = story.frames[-1], story.chunk_prompts(chunk_frames)
    if length is not None and frame > length - chunk_frames:
        raise UserError(
            f"{where}: the switch at latent frame {frame} lies in the last chunk, and a prompt starts with a chunk; "
            f"give --num_output_frames={math.ceil(frame / chunk_frames + 1) * chunk_frames} or more"
        )
    for prompt, start in zip(story.prompts, story.frames, strict=True):
        chunk = math.ceil(start / chunk_frames)
        if shown[chunk] != prompt:
            log.warning(f"{where}: of the prompts that start with chunk {chunk}, only the last is used, not: {prompt}")


def play_story(
    session: StreamSession, story: Story, seed: int, num_chunks: int | None, conditioning: Tensor | None = None
) -> Iterator[ChunkResult]:
    """Chunks of `story`, which begins with the latents `conditioning`; prompts change by the session's `switch`."""
    coming = story.chunk_prompts(session.geometry.chunk_frames)
    playing = session.play(coming.pop(0), seed, num_chunks, conditioning)
    for chunk in count():
        if chunk in coming:
            session.set_prompt(coming[chunk])
        result = next(playing, None)
        if result is None:
            return
        yield result


def _checked_entry(line: Any, where: str) -> tuple[dict[str, Any], str]:
    if not isinstance(line, dict) or not ("prompts" in line or {"at", "prompt"} <= set(line)):
        raise UserError(f"{where} is no story; give 'prompts', or 'at' and 'prompt', in an object")
    return line, where


def _listed(line: dict[str, Any], where: str, length: int | None, indices: str) -> Story:
    prompts = line["prompts"]
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise UserError(f"{where} prompts={str(prompts)[:40]} is no list of texts; give at least one prompt")
    given = line.get("switch_frame_indices", indices)
    if given == "" or given is None:
        if length is None and len(prompts) > 1:
            raise UserError(f"{where} has no switch_frame_indices, which a stream without end needs; give them")
        frames = [(length or 0) * i // len(prompts) for i in range(len(prompts))]
    else:
        frames = [0, *_indices(given, where)]
    if len(frames) != len(prompts):
        raise UserError(f"{where} has {len(frames) - 1} switch_frame_indices for {len(prompts)} prompts; give one less")
    return _checked(prompts, frames, [str(f) for f in frames], where, length)


def _indices(given: Any, where: str) -> list[int]:
    """12, "12, 24" or [12, 24]."""
    parts = given if isinstance(given, list) else str(given).split(",")
    try:
        return [int(str(part).strip()) for part in parts]
    except ValueError as error:
        raise UserError(f"{where} switch_frame_indices={given} is no list of latent frames; try '12, 24'") from error


def _timed(lines: list[tuple[dict[str, Any], str]], fps: int, length: int | None) -> Story:
    prompts, frames, texts = [], [], []
    for line, where in lines:
        at, prompt = line["at"], line.get("prompt")
        if isinstance(at, bool) or not isinstance(at, int | float) or not abs(at) < MAX_SECONDS:
            raise UserError(f"{where} at={str(at)[:40]} is no number of seconds; try 2.5")
        if not isinstance(prompt, str):
            raise UserError(f"{where} prompt={str(prompt)[:40]} is no text; give a prompt")
        frames.append(latent_frame_at(at, fps))
        prompts.append(prompt)
        texts.append(f"{at:g} s")
    return _checked(prompts, frames, texts, lines[0][1].rpartition(" entry")[0], length)


def latent_frame_at(seconds: float, fps: int) -> int:
    """The first latent frame whose pixels begin at or after `seconds`: frame f > 0 begins at pixel frame 4 f - 3."""
    pixels = seconds * fps
    if pixels <= 0:
        return math.floor(pixels)  # a time below zero stays one, to be refused
    return math.ceil((pixels - 1 - 1e-9) / TEMPORAL_STRIDE) + 1


def _checked(prompts: Sequence[str], frames: Sequence[int], texts: Sequence[str], where: str, length: int | None):
    """The Story, after checks that raise UserErrors. texts: each time as the user wrote it."""
    for prompt in prompts:
        check_prompt(prompt, f"{where}: a prompt")
    for i, frame in enumerate(frames):
        if frame < 0:
            raise UserError(f"{where}: the switch at {texts[i]} is negative; times count from 0")
        if length is not None and frame >= length:
            raise UserError(
                f"{where}: the switch at {texts[i]} (latent frame {frame}) is beyond the end of a clip of {length} "
                f"latent frames; give --num_output_frames above {frame}"
            )
        if i and frame <= frames[i - 1]:
            raise UserError(f"{where}: the switch at {texts[i]} does not come after {texts[i - 1]}; put times in order")
    if frames[0] != 0:
        raise UserError(f"{where}: the first prompt comes at {texts[0]}, but a video needs one from 0 on; add it")
    return Story(tuple(prompts), tuple(frames))
