"""Chunks into an MP4 that plays: the video as it was after the last branch."""

import logging
import os
from itertools import count
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from client.live import Chunk

log = logging.getLogger(__name__)


class Recorder:
    """A context manager that writes fragments as they come, to a `.partial` file that plays at any time.

    path: ends in .mp4, since that is what is written; its folder is there; a file of that name is replaced only with
    `overwrite` (ValueError otherwise). In the end, where the video is.
    It gets its name when the block ends, also by an error, if it holds a chunk. If another recording has taken the name
    meanwhile, it keeps the partial one, with a warning. A killed process leaves its partial file; later recordings use
    other names. A chunk that goes back (`seek`, `branch`) takes the place of what was recorded from there on.
    ValueError for a chunk that does not go on from what is in the file: a branch of a take that was replaced.
    """

    def __init__(self, path: str | PathLike, *, overwrite: bool = False):
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"{path} does not end in .mp4, and what is recorded is MP4; give another name")
        if not self.path.parent.is_dir():
            raise ValueError(f"{path} cannot be recorded: the folder {self.path.parent} does not exist; create it")
        if os.path.lexists(self.path) and not self.path.is_file():
            raise ValueError(f"{path} is there and is no file; choose another name")
        self._before = _identity(self.path)
        if self._before and not overwrite:
            raise ValueError(f"{path} is there; choose another name, or --overwrite (in Python overwrite=True)")
        self.partial = self.path  # its name until the end, once the block has begun
        self.frames = 0
        self._places: dict[int, int] = {}  # first frame of each chunk -> where in the file it begins
        self._file: BinaryIO | None = None

    def __enter__(self) -> "Recorder":
        for number in count(1):
            suffix = f"-{number}" if number > 1 else ""
            self.partial = self.path.with_name(f"{self.path.stem}.partial{suffix}{self.path.suffix}")
            try:
                self._file = open(self.partial, "xb")  # noqa: SIM115  closed by __exit__
            except FileExistsError:  # another process's, or a killed one's
                continue
            return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if not self.frames:
            self.partial.unlink()
        elif _identity(self.path) == self._before:
            os.replace(self.partial, self.path)
        else:
            log.warning("another video has become %s meanwhile; this one stays %s", self.path, self.partial)
            self.path = self.partial

    def write(self, chunk: Chunk) -> None:
        """Append a chunk of fragmented MP4, or put it in the place of those that began at its frame and later."""
        if not chunk.init:
            raise ValueError("the chunk is JPEG; open the stream with video='fmp4' to record it")
        if chunk.frame < self.frames:
            if chunk.frame not in self._places:
                raise ValueError(f"no chunk that was recorded begins at frame {chunk.frame}")
            self._file.seek(self._places[chunk.frame])
            self._file.truncate()
            self._places = {frame: place for frame, place in self._places.items() if frame < chunk.frame}
        elif chunk.frame > self.frames:
            raise ValueError(f"the chunk begins at frame {chunk.frame}, and {self.frames} frames were recorded")
        if not self._file.tell():
            self._file.write(chunk.init)
        self._places[chunk.frame] = self._file.tell()
        self._file.write(chunk.data)
        self._file.flush()
        self.frames = chunk.frame + chunk.frames


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from another under its name; None where there is none."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_dev, state.st_ino, state.st_mtime_ns
