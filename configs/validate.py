"""Checks of single values: each raises a UserError that names the field, its value and a fix."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from configs.errors import UserError, shown

BOUNDS = "bounds"  # key in a field's metadata


def number(default: Any, low: float, high: float) -> Any:
    """A dataclass field of numbers in [low, high]: one, or lists of them."""
    metadata = {BOUNDS: (low, high)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_bounds(section: str, values: Any) -> None:
    """Refuse what lies outside the bounds of its field, NaN included, in the dataclass instance `values`."""
    for field in dataclasses.fields(values):
        if BOUNDS not in field.metadata:
            continue
        (low, high), given = field.metadata[BOUNDS], vars(values)[field.name]
        for value in _numbers(given):
            if not low <= value <= high:
                name = f"{section}.{field.name}" if section else field.name
                holds = "" if value is given else f" holds {shown(value)}, which"
                raise UserError(f"{name}={shown(given)}{holds} is out of range; it must lie in [{low}, {high}]")


def _numbers(value: Any) -> Iterator[int | float]:
    """Every number in `value`: itself, and items of lists."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


def one_of(choices: Iterable[str], section: str, values: Any, *names: str) -> None:
    """Refuse `values.name` that is not among `choices`, for each name."""
    choices = tuple(choices)
    for name in names:
        value = vars(values)[name]
        if value not in choices:
            raise UserError(f"{section}.{name}={shown(value)} is unknown; use one of {', '.join(choices)}")


def groups_of(ranks: int, degree: int, setting: str) -> int:
    """Number of groups of `setting`=degree ranks. Raises UserError if some ranks are left over."""
    if ranks % degree:
        raise UserError(
            f"{setting}={degree} does not divide {ranks} rank{'s' * (ranks != 1)}; "
            f"start a multiple of {degree} with torchrun --nproc_per_node, or lower it"
        )
    return ranks // degree


def check_shares(setting: str, degree: int, count: int, what: str) -> None:
    """Refuse `setting`=degree where it does not divide `count` things, which `what` names."""
    if count % degree:
        *some, last = [str(i) for i in range(1, min(count, 16) + 1) if count % i == 0]
        use = f"{', '.join(some)} or {last}" if some else last
        raise UserError(f"{setting}={degree} does not divide the {count} {what}; use {use}")
