"""Sentences about what a model may not do well: words, sizes and schedules that it was not trained on."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from configs.schema import Config, ScheduleConfig, StreamConfig
from model.schedule import Schedule
from model.text import TextEncoder
from utils.logs import get_logger

log = get_logger(__name__)
SELF_FORCING = Schedule.from_config(ScheduleConfig(preset="self_forcing"), StreamConfig())
MAX_SIZE_RATIO = 1.3  # times as high or as wide as what a student was trained for


def prompt_warnings(encoder: TextEncoder, prompt: str) -> list[str]:
    """What of `prompt` does not reach the model: what is too long, and words that it does not know."""
    warnings = []
    tokens = encoder.count_tokens(prompt)
    if tokens > encoder.text_tokens:
        warnings.append(
            f"the prompt is {tokens} tokens long and only the first {encoder.text_tokens} count "
            f"(model.text_tokens={encoder.text_tokens}): {prompt[:40]}..."
        )
    unknown = encoder.unknown_words(prompt)
    if unknown:
        known = encoder.known_words
        named = ", ".join(_with_nearest(word, known) for word in unknown[:20]) + (", ..." if len(unknown) > 20 else "")
        text = f"this model does not know, and leaves out of the prompt: {named}"
        if known:
            text += "; it shows what docs/evaluation.md describes, and its text encoder's tokenizer.json has its words"
        warnings.append(text)
    return warnings


def _with_nearest(word: str, known: Sequence[str]) -> str:
    """`word`, which is not one of `known`, with the one that may be meant."""
    near = difflib.get_close_matches(word[:40].lower(), known, n=1, cutoff=0.8)
    return f"{word[:40]} ({near[0]}?)" if near else word[:40]


def size_warnings(config: Config, card: Mapping[str, Any]) -> list[str]:
    """A warning if the video's size is far from the one that the student was trained for, as its card says."""
    if card.get("size") is None:
        return []
    size, trained = (config.video.height, config.video.width), card["size"]
    if all(1 / MAX_SIZE_RATIO <= ours / theirs <= MAX_SIZE_RATIO for ours, theirs in zip(size, trained, strict=True)):
        return []
    (height, width), (trained_height, trained_width) = size, trained
    return [
        f"this student was trained for {trained_height}x{trained_width} pixels (height x width) and makes "
        f"{height}x{width} now, which may look wrong; set video.height={trained_height} video.width={trained_width}"
    ]


def warn_of_schedule(schedule: Schedule, card: Mapping[str, Any]) -> None:
    """Warn if a checkpoint was trained with another schedule than the one in use, or does not say with which."""
    if not card and schedule.timesteps_by_chunk != SELF_FORCING.timesteps_by_chunk:  # a file of somebody else's
        log.warning(
            "this student's file does not say which schedule it was trained with; those that Self-Forcing and LongLive "
            "published were trained with schedule.preset=self_forcing, and with no other"
        )
    if card.get("schedule") is None:
        return
    trained = Schedule.from_dict(card["schedule"])
    if str(trained) != str(schedule):  # rows that only repeat the last one make no difference
        log.warning(f"this student was trained with another schedule\ntrained:\n{trained}\nused:\n{schedule}")
