"""What a browser may say, checked: JSON objects with a `type` and few fields, all bounded; none names a file.

{"type": "play", "prompt": "...", "seed": 0, "steps": [4, 3, 2], "context": "last_step", "seconds": 60}
    and "image": true, to begin with the picture that was uploaded
{"type": "say", "prompt": "...", "switch": "recache"}       {"type": "stop"}
{"type": "rewind", "chunk": 3, "take": 2, "prompt": "...", "seed": 1}
    take: what the chunk was made in, or a later take that goes on from there; left out: the newest
{"type": "shown", "frames": 120}                            {"type": "schedule", "steps": [4, 3, 2], "context": "clean"}
"""

import json
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError
from configs.schema import CONTEXTS, SWITCHES, Config
from model.schedule import Schedule, with_steps
from utils.prompts import check_prompt

MAX_MESSAGE = 65_536  # bytes
MAX_PROMPT = 2_000  # characters
MAX_STEPS, MAX_ROWS = 8, 12  # steps of a chunk; chunks that have their own number; more where the configuration has
MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class Play:
    prompt: str
    seed: int
    schedule: Schedule
    seconds: float
    image: bool = False  # begin with the picture that was uploaded


@dataclass(frozen=True)
class Say:
    prompt: str
    switch: str


@dataclass(frozen=True)
class Rewind:
    chunk: int
    take: int | None
    prompt: str | None
    seed: int | None


@dataclass(frozen=True)
class Ack:
    frames: int


@dataclass(frozen=True)
class Stop:
    pass


@dataclass(frozen=True)
class ScheduleQuery:
    """What would this schedule cost?"""

    schedule: Schedule


Message = Play | Say | Rewind | Ack | Stop | ScheduleQuery


def bounds(schedule: Schedule) -> tuple[int, int]:
    """Most steps of a chunk and most chunks with their own number that may be asked for: the configured ones always."""
    return max(MAX_STEPS, *map(len, schedule.timesteps_by_chunk)), max(MAX_ROWS, len(schedule.timesteps_by_chunk))


def read_message(text: str, config: Config, max_seconds: float) -> Message:
    """The message in `text`; UserError, with a sentence to show, for anything else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("message is not valid JSON; send an object with a type") from error
    if not isinstance(values, dict):
        raise UserError("message is no JSON object; send an object with a type")
    match values.get("type"):
        case "play":
            seconds = _number(values, "seconds", 0.1, max_seconds, max_seconds)
            seed, image = _whole(values, "seed", 0, MAX_SEED, 0), values.get("image", False)
            if not isinstance(image, bool):
                raise UserError(f"image={str(image)[:40]} is neither true nor false; upload a picture and give true")
            return Play(_prompt(values), seed, _schedule(values, config), seconds, image)
        case "say":
            return Say(_prompt(values), _choice(values, "switch", SWITCHES, config.stream.switch))
        case "rewind":
            prompt = _prompt(values) if values.get("prompt") is not None else None
            seed = _whole(values, "seed", 0, MAX_SEED, 0) if values.get("seed") is not None else None
            take = _whole(values, "take", 0, 10**9, 0) if values.get("take") is not None else None
            return Rewind(_whole(values, "chunk", 0, 10**9, 0), take, prompt, seed)
        case "shown":
            return Ack(_whole(values, "frames", 0, 10**9, 0))
        case "stop":
            return Stop()
        case "schedule":
            return ScheduleQuery(_schedule(values, config))
    raise UserError("message.type is unknown; use play, say, stop, rewind, shown or schedule")


def _prompt(values: dict[str, Any]) -> str:
    prompt = values.get("prompt")
    if not isinstance(prompt, str):
        raise UserError("prompt is no text; describe the video in a sentence")
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"prompt is {len(prompt):,} characters long; at most {MAX_PROMPT:,} are taken here")
    return check_prompt(prompt)


def _number(values: dict[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name}={str(value)[:40]} is out of range; give a number from {low:g} to {high:g}")
    return value


def _whole(values: dict[str, Any], name: str, low: int, high: int, default: int) -> int:
    value = _number(values, name, low, high, default)
    if not isinstance(value, int):
        raise UserError(f"{name}={value} is no whole number; give one from {low} to {high}")
    return value


def _choice(values: dict[str, Any], name: str, choices: tuple[str, ...], default: str) -> str:
    value = values.get(name, default)
    if value not in choices:
        raise UserError(f"{name}={str(value)[:40]} is unknown; use one of {', '.join(choices)}")
    return value


def _schedule(values: dict[str, Any], config: Config) -> Schedule:
    """The configured schedule with the steps and the context policy that were asked for."""
    steps, own = values.get("steps"), Schedule.from_config(config.schedule, config.stream)
    most_steps, most_rows = bounds(own)
    good = isinstance(steps, list) and 1 <= len(steps) <= most_rows
    if not good or not all(type(n) is int and 1 <= n <= most_steps for n in steps):
        raise UserError(f"steps={str(steps)[:40]} is no schedule; give 1 to {most_rows} numbers from 1 to {most_steps}")
    changed = with_steps(config, steps, _choice(values, "context", CONTEXTS, own.default_context))
    return Schedule.from_config(changed.schedule, changed.stream)
