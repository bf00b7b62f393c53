"""The one exception that a user is meant to read."""

from typing import Any

SHOWN = 80  # characters of a value in a sentence


class UserError(ValueError):
    """Something the user gave is wrong; the message is one sentence naming the field, its value and a fix.

    Entry points print the message and exit with code 2. Everything else that is raised is our own mistake.
    """


def shown(value: Any) -> str:
    """`value` as a sentence shows it: at most `SHOWN` characters, null for None."""
    text = "null" if value is None else str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
