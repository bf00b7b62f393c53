"""The exception for errors of the user."""

from pathlib import PurePath
from typing import Any

SHOWN = 80  # characters of a value in a sentence


class UserError(ValueError):
    """Invalid input; the message is one sentence with the field, its value and a fix.

    Entry points print the message and exit with code 2. Any other exception is a bug.
    """


def shown(value: Any) -> str:
    """`value` as a sentence shows it: at most `SHOWN` characters, of a path the last ones; null for None."""
    text = "null" if value is None else str(value)
    if len(text) <= SHOWN:
        return text
    return f"...{text[3 - SHOWN :]}" if isinstance(value, PurePath) else f"{text[: SHOWN - 3]}..."
