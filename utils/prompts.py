"""Prompts: what may be one, and files that hold one a line."""

import os
import re
from pathlib import Path

from configs.errors import UserError

MAX_PROMPT = 10_000  # characters; a text encoder reads some 2,500 and cleaning takes time that grows with length


def check_prompt(prompt: str, source: str = "prompt") -> str:
    """`prompt` itself; a UserError naming `source` where no text encoder can make sense of it."""
    if not prompt.strip():
        raise UserError(f"{source} is empty; describe the video in a sentence")
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"{source} is {len(prompt):,} characters long; at most {MAX_PROMPT:,} are taken, so shorten it")
    if "\0" in prompt:
        raise UserError(f"{source} holds a NUL character; give plain text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that were not UTF-8
        raise UserError(f"{source} is not valid UTF-8 at character {error.start}; save or type it as UTF-8") from error
    return prompt


def read_prompts(path: str | os.PathLike, field: str = "inference.prompts") -> list[str]:
    """Prompts of a UTF-8 text file, one a line; blank lines and white space around a prompt do not count.

    A byte order mark and any of the three line ends are fine. Raises a UserError that names `field` and the line.
    """
    where = f"{field}={path}"
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"{where} cannot be read (no ordinary file); give a text file")
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{where} does not exist; give a text file with one prompt a line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not valid UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror}); give a text file") from error
    lines = enumerate(re.split(r"\r\n|\r|\n", text), start=1)  # str.splitlines would also split at rarer characters
    prompts = [check_prompt(line.strip(), f"{where} line {number}") for number, line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{where} holds no prompt; write one a line")
    return prompts
