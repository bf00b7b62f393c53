"""Checks of input files before they are opened."""

import os
import stat

from configs.errors import UserError


def ordinary_file(
    field: str, path: str | os.PathLike, most: int | None = None, *, fix: str = "give another path"
) -> int:
    """The size of a regular, readable file in bytes.

    Raises:
        UserError: it is missing, no ordinary file (opening a pipe waits for ever, a device has no end), may not be
            read, or has more than `most` bytes. `field` is the setting that names it.
    """
    try:
        state = os.stat(path)
    except FileNotFoundError as error:
        raise UserError(f"{field}={path} does not exist; {fix}") from error
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{field}={path} cannot be read ({reason}); {fix}") from error
    if not stat.S_ISREG(state.st_mode):
        raise UserError(f"{field}={path} is no ordinary file; {fix}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{field}={path} cannot be read (permission denied); {fix}")
    if most is not None and state.st_size > most:
        raise UserError(f"{field}={path} has {state.st_size:,} bytes; at most {most:,} are read, so {fix}")
    return state.st_size
