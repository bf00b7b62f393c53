"""The one exception that a user is meant to read."""

from pathlib import PurePath
from typing import Any

SHOWN = 80  # characters of a value in a sentence


class UserError(ValueError):
    """Something the user gave is wrong; the message is one sentence naming the field, its value and a fix.

    Entry points print the message and exit with code 2. Everything else that is raised is our own mistake.
    """


def shown(value: Any) -> str:
    """`value` as a sentence shows it: at most `SHOWN` characters, of a path the last ones; null for None."""
    text = "null" if value is None else str(value)
    if len(text) <= SHOWN:
        return text
    return f"...{text[3 - SHOWN :]}" if isinstance(value, PurePath) else f"{text[: SHOWN - 3]}..."
