"""Output of videos while they are generated: to standard output, to a pipe, or as an endless recording.

An endless recording `long.mp4` is written to `long.partial.mp4`, with its metadata in `long.partial.json`. It can be
played at any time and is renamed when it ends by Ctrl-C, SIGTERM, or a full disk. If the process is killed or stops
with an error, the partial files stay, and later recordings use other names. So they do, with a warning, if another
video has taken the name meanwhile.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from utils.files import identity, translate_os_errors
from utils.logs import get_logger

log = get_logger(__name__)
ROOM = 1024  # bytes by which the JSON may grow when the recording ends; reserved in case the disk is full then


@contextmanager
def open_stream_output(target: Path | None) -> Iterator[BinaryIO]:
    """Open a pipe or device for writing; None = standard output. If the reader goes away, the block ends silently."""
    try:
        with _standard_output() if target is None else target.open("wb") as out:
            yield out
    except BrokenPipeError:
        log.info("the reader has gone")


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    """Standard output, reserved for the video: other output goes to standard error inside the block."""
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
    """The files of an endless video; `partial` is the path to write it to.

    about: contents of the JSON that are known at the start.
    Raises UserError if the files cannot be created.
    """

    def __init__(self, video: Path, about: dict[str, Any]):
        self.video = video
        with translate_os_errors(video, every=True):
            video.parent.mkdir(parents=True, exist_ok=True)
            self._before = identity(video)
            self.partial = _unused(video)
            self._record = self.partial.with_suffix(".json")
            self._record.write_bytes(_as_json(about) + b" " * ROOM)

    def finish(self, about: dict[str, Any]) -> None:
        """Rename the files; the JSON comes last, with its final contents."""
        renamed = identity(self.video) == self._before
        if renamed:
            os.replace(self.partial, self.video)
        else:
            log.warning("another video has become %s meanwhile; this one stays %s", self.video, self.partial)
            about = about | {"video": self.partial.name}
        with (
            translate_os_errors(self._record),
            open(self._record, "r+b") as file,
        ):  # in place: a full disk has room for this
            file.write(_as_json(about))
            file.truncate()
        if renamed:
            os.replace(self._record, self.video.with_suffix(".json"))

    def remove(self) -> None:
        """Remove both files."""
        self.partial.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)


def partial_name(video: Path, number: int = 1) -> Path:
    return video.with_name(f"{video.stem}.partial{f'-{number}' if number > 1 else ''}{video.suffix}")


def _unused(video: Path) -> Path:
    """Create a new partial file; exclusive also among machines that share the folder."""
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
