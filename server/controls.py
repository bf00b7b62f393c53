"""Checks of messages from clients of the live protocol (docs/live-protocol.md). All values are bounded."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from configs.errors import UserError
from configs.schema import CONTEXTS, SWITCHES, Config, ScheduleConfig
from model.schedule import PRESETS, Schedule, with_steps
from server.limits import MAX_PROMPT, MAX_ROWS, MAX_SEED, MAX_STEPS
from utils.prompts import check_prompt

MAX_ID = 2**53 - 1  # that JavaScript counts to
MAX_COUNT = 10**9  # of chunks, takes and frames
VIDEO = ("fmp4", "jpeg")


@dataclass(frozen=True)
class Control:
    """One message. Fields that its type does not have are None."""

    type: str
    id: int | None = None  # None for `shown` alone
    prompt: str | None = None
    switch: str | None = None
    seed: int | None = None
    schedule: Schedule | None = None
    seconds: float | None = None
    chunk: int | None = None
    take: int | None = None
    frame: int | None = None
    image: Any = None  # whether to begin with the picture that was uploaded; for the worker, that picture or None
    video: str | None = None


def bounds(schedule: Schedule) -> tuple[int, int]:
    """Limits of requested schedules: steps of a chunk, and chunks with their own number; at least as configured."""
    return max(MAX_STEPS, *map(len, schedule.timesteps_by_chunk)), max(MAX_ROWS, len(schedule.timesteps_by_chunk))


class Reader:
    """Parses messages for the model of a configuration."""

    def __init__(self, config: Config, max_seconds: float):
        self.config, self.max_seconds = config, max_seconds
        self.schedule = Schedule.from_config(config.schedule, config.stream)

    def read(self, text: str) -> Control:
        """Parse a message. Raises MessageError, with the id of the message, if it is invalid."""
        values = _object(text)
        number = values.get("id")
        if values.get("type") == "shown":
            fields = {name: _whole(values, name, MAX_COUNT) for name in ("take", "frame")}
            return Control("shown", **fields)
        if type(number) is not int or not 0 <= number <= MAX_ID:
            raise MessageError(f"id={str(number)[:40]} is no whole number; give each control one, from 0 to 2^53 - 1")
        try:
            return self._control(values, number)
        except UserError as error:
            raise MessageError(str(error), number) from error

    def _control(self, values: dict[str, Any], number: int) -> Control:
        kind = values.get("type")
        if not isinstance(kind, str) or kind not in FIELDS:
            raise UserError(f"type={str(kind)[:40]} is unknown; use one of {', '.join(FIELDS)} or shown")
        required, optional = FIELDS[kind]
        read = READERS | {"schedule": self._schedule, "seconds": self._seconds}
        fields = {}
        for name in (*required, *optional):
            if values.get(name) is not None:
                fields[name] = read[name](values, name)
            elif name in required:
                raise UserError(f"{name} is missing; {kind} needs {' and '.join(required)}")
        return Control(kind, number, **fields)

    def _seconds(self, values: dict[str, Any], name: str) -> float:
        return _number(values, name, 0.1, self.max_seconds)

    def _schedule(self, values: dict[str, Any], name: str) -> Schedule:
        """The configured schedule with the steps, or a preset, and with the context mode that were asked for."""
        asked = values[name]
        if not isinstance(asked, dict) or ("preset" in asked) == ("steps" in asked):
            raise UserError(f'{name} is no object with one of preset and steps; give {{"steps": [4, 3, 2]}}')
        if "preset" in asked:
            preset = _choice(asked, "preset", tuple(PRESETS))
            chosen = Schedule.from_config(ScheduleConfig(preset=preset), self.config.stream)
        else:
            changed = with_steps(self.config, self._steps(asked["steps"]))
            chosen = Schedule.from_config(changed.schedule, changed.stream)
        if asked.get("context") is not None:
            chosen = replace(chosen, context=_choice(asked, "context", CONTEXTS))
        return chosen

    def _steps(self, steps: Any) -> list[int]:
        most_steps, most_rows = bounds(self.schedule)
        good = isinstance(steps, list) and 1 <= len(steps) <= most_rows
        if not good or not all(type(n) is int and 1 <= n <= most_steps for n in steps):
            raise UserError(
                f"steps={str(steps)[:40]} is no schedule; give 1 to {most_rows} numbers from 1 to {most_steps}"
            )
        return steps


class MessageError(UserError):
    """An invalid message. id: of the message, if it has one."""

    def __init__(self, sentence: str, id: int | None = None):
        super().__init__(sentence)
        self.id = id


def _object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MessageError("message is not valid JSON; send an object with a type") from error
    if not isinstance(values, dict):
        raise MessageError("message is no JSON object; send an object with a type")
    return values


def _prompt(values: Mapping[str, Any], name: str) -> str:
    prompt = values[name]
    if not isinstance(prompt, str):
        raise UserError(f"{name} is no text; describe the video in a sentence")
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"{name} is {len(prompt):,} characters long; at most {MAX_PROMPT:,} are taken here")
    return check_prompt(prompt, name)


def _number(values: Mapping[str, Any], name: str, low: float, high: float) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise MessageError(f"{name}={str(value)[:40]} is out of range; give a number from {low:,.16g} to {high:,.16g}")
    return value


def _whole(values: Mapping[str, Any], name: str, high: int = MAX_COUNT) -> int:
    value = _number(values, name, 0, high)
    if not isinstance(value, int):
        raise MessageError(f"{name}={value} is no whole number; give one from 0 to {high}")
    return value


def _choice(values: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> str:
    value = values[name]
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{name}={str(value)[:40]} is unknown; use one of {', '.join(choices)}")
    return value


def _yes(values: Mapping[str, Any], name: str) -> bool:
    if not isinstance(values[name], bool):
        raise UserError(f"{name}={str(values[name])[:40]} is neither true nor false; upload a picture and give true")
    return values[name]


READERS: dict[str, Callable[[Mapping[str, Any], str], Any]] = {
    "prompt": _prompt,
    "switch": lambda values, name: _choice(values, name, SWITCHES),
    "seed": lambda values, name: _whole(values, name, MAX_SEED),
    "chunk": _whole,
    "take": _whole,
    "image": _yes,
    "video": lambda values, name: _choice(values, name, VIDEO),
}
# type -> fields that it must have, and may have
FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "open": (("prompt",), ("seed", "seconds", "schedule", "image", "video")),
    "set_prompt": (("prompt",), ("switch",)),
    "set_seed": (("seed",), ()),
    "set_schedule": (("schedule",), ()),
    "set_image": (("image",), ()),
    "pause": ((), ()),
    "resume": ((), ()),
    "seek": (("chunk",), ("take",)),
    "branch": (("chunk",), ("take", "prompt", "seed", "schedule")),
    "describe": (("schedule",), ()),
    "close": ((), ()),
}
