"""Checks of single values: each raises a UserError that names the field, its value and a fix."""

from collections.abc import Iterable
from typing import Any

from configs.errors import UserError


def at_least(minimum: float, section: str, values: Any, *names: str) -> None:
    """Refuse `values.name` below `minimum`, for each name."""
    for name in names:
        value = vars(values)[name]
        if value < minimum:
            raise UserError(f"{section}.{name}={value} is too small; it must be at least {minimum}")


def between(low: float, high: float, section: str, values: Any, *names: str) -> None:
    """Refuse `values.name` outside [low, high], for each name."""
    for name in names:
        value = vars(values)[name]
        if not low <= value <= high:
            raise UserError(f"{section}.{name}={value} is out of range; it must lie in [{low}, {high}]")


def one_of(choices: Iterable[str], section: str, values: Any, *names: str) -> None:
    """Refuse `values.name` that is not among `choices`, for each name."""
    choices = tuple(choices)
    for name in names:
        value = vars(values)[name]
        if value not in choices:
            raise UserError(f"{section}.{name}={value} is unknown; use one of {', '.join(choices)}")
