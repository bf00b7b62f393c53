"""Videos that are watched, or may be killed, while they grow: to standard output, to a pipe, or recorded without end.

A recording `long.mp4` grows under the visible name `long.partial.mp4`, beside `long.partial.json`, which says how it is
made. It plays at any time, and gets its own name when it ends: by Ctrl-C, SIGTERM, or a full disk. Of a process that
was killed, or stopped by an error, the partial files stay, and a later recording begins beside them.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from utils.files import translate_os_errors
from utils.logs import get_logger

log = get_logger(__name__)
ROOM = 1024  # bytes that a recording's JSON may grow by in the end, set aside while the disk has them


@contextmanager
def open_stream_output(target: Path | None) -> Iterator[BinaryIO]:
    """The open end of a pipe or device, None for standard output. A reader that goes ends the block, and no more."""
    try:
        with _standard_output() if target is None else target.open("wb") as out:
            yield out
    except BrokenPipeError:
        log.info("the reader has gone")


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    """Standard output for the video alone: whatever else is printed goes to standard error meanwhile."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(own), "wb") as out:
            yield out
    finally:
        os.dup2(own, 1)
        os.close(own)


class Recording:
    """The two files of a video without end; `partial` is where it grows.

    about: contents of the JSON as far as they are known at the start.
    Raises UserError where the files cannot be made.
    """

    def __init__(self, video: Path, about: dict[str, Any]):
        self.video = video
        with translate_os_errors(video, every=True):
            video.parent.mkdir(parents=True, exist_ok=True)
            self.partial = _unused(video)
            self._record = self.partial.with_suffix(".json")
            self._record.write_bytes(_as_json(about) + b" " * ROOM)

    def finish(self, about: dict[str, Any]) -> None:
        """Give the files their names, the JSON with its final contents last."""
        os.replace(self.partial, self.video)
        with (
            translate_os_errors(self._record),
            open(self._record, "r+b") as file,
        ):  # in place: a full disk has room for this
            file.write(_as_json(about))
            file.truncate()
        os.replace(self._record, self.video.with_suffix(".json"))

    def remove(self) -> None:
        """Take both files away."""
        self.partial.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)


def partial_name(video: Path, number: int = 1) -> Path:
    return video.with_name(f"{video.stem}.partial{f'-{number}' if number > 1 else ''}{video.suffix}")


def _unused(video: Path) -> Path:
    """A new partial file that is nobody else's, of this machine or another."""
    for number in count(1):
        path = partial_name(video, number)
        if path.with_suffix(".json").exists():
            continue
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path


def _as_json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
