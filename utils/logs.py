"""Logging to the terminal, and metrics as JSON lines."""

import json
import logging
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from configs.errors import UserError
from utils.files import atomic_path, parse_json

ROOT = "diagonal"  # parent of all loggers of this program; those of libraries are unaffected


class _ConsoleHandler(logging.Handler):
    """Prints above a running progress bar; warnings and errors go to stderr.

    What a full disk does not take is dropped: no run and no server ends because of its log.
    """

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        with suppress(OSError):
            tqdm.write(prefix + record.getMessage(), file=sys.stdout if not prefix else sys.stderr)


def get_logger(name: str) -> logging.Logger:
    """The logger of one module: `log = get_logger(__name__)`. Silent below warnings until `console()` was called."""
    return logging.getLogger(f"{ROOT}.{name}")


def console(*, quiet: bool = False) -> None:
    """Print log messages to the terminal; call once, in entry points. quiet: only warnings (ranks other than 0)."""
    logger = logging.getLogger(ROOT)
    logger.handlers = [_ConsoleHandler()]
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


class Sink(Protocol):
    """A destination of metrics; a context manager."""

    def write(self, step: int, **values: Any) -> None: ...

    def __enter__(self): ...

    def __exit__(self, *exception): ...


class JsonlSink:
    """Writes metrics as JSON lines: `{"step": 20, "loss": 0.5}`. Each line is flushed.

    resume_step: lines after this step are removed first, so that a resumed run does not repeat them.
    """

    def __init__(self, path: str | os.PathLike, resume_step: int | None = None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None and self.path.exists():
            kept = [row for row in read_jsonl(self.path) if row["step"] <= resume_step]
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()

    def write(self, step: int, **values: Any) -> None:
        """Append the values of a step. Scalar tensors are read, which synchronizes; NaN and inf become strings."""
        row = {"step": step} | {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All lines of a file of metrics; an incomplete last line is ignored. Raises UserError for other damage."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):
            try:
                row = parse_json(line)
                whole = isinstance(row, dict) and isinstance(row["step"], int)
            except (ValueError, KeyError):
                whole = False
            if not whole:
                raise UserError(f"{path} line {number} is no line of metrics; remove it, or the file")
            rows.append(row)
    return rows


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | list | tuple | dict):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)
