"""Writing of video that may be endless, to a file or a pipe, with low latency.

    fmp4   H.264 in fragments of at most a second: can be played at any time, even if the process is killed
    y4m    YUV4MPEG2, 4:2:0, limited range, which ffplay, mpv and x264 read from a pipe. Its header has no YCbCr matrix,
           so the one is used that players assume for the size
    raw    RGB with 8 bits per channel, frame after frame

Frames are uint8 `[T, H, W, 3]`, RGB.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from configs.errors import UserError
from utils.files import translate_os_errors
from utils.video import add_h264, assumed_matrix, to_yuv

KINDS = ("fmp4", "y4m", "raw")
FRAME = b"FRAME\n"  # before each frame of y4m
FRAGMENTS = {"movflags": "+frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}


class LiveWriter:
    """A context manager that writes frames to `target`: a path, or an open binary stream that need not be seekable.

    If the disk gets full, the file keeps all complete frames (fmp4: fragments), and DiskFull is raised.
    """

    def __init__(self, target: str | os.PathLike | BinaryIO, fps: int, size: tuple[int, int], kind: str = "fmp4"):
        if kind not in KINDS:
            raise UserError(f"format={kind} is unknown; use one of {', '.join(KINDS)}")
        if kind != "raw" and (size[0] % 2 or size[1] % 2):
            raise UserError(f"video size {size[0]}x{size[1]} has an odd side, which {kind} cannot hold; use even sizes")
        self.target, self.fps, self.size, self.kind = target, fps, tuple(size), kind
        self.frames_written = 0
        self._head = b""  # of y4m
        self._open_file = self._file()

    @contextmanager
    def _file(self) -> Iterator[None]:
        if not isinstance(self.target, str | os.PathLike):
            with self._sink(self.target):
                yield
            return
        path = Path(self.target)
        with translate_os_errors(path, every=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb", buffering=0)  # unbuffered
        with translate_os_errors(path):
            try:
                with file, self._sink(file):
                    yield
            except OSError:
                self._cut(path)
                raise
            if self.kind != "fmp4":  # whose last frame Ctrl-C may have cut
                self._cut(path)

    def _cut(self, path: Path) -> None:
        """Truncate the file to its complete frames or fragments and count its frames."""
        length, pixels = path.stat().st_size, self.size[0] * self.size[1]
        if self.kind != "fmp4":
            frame = 3 * pixels if self.kind == "raw" else len(FRAME) + 3 * pixels // 2
            self.frames_written = max(0, length - len(self._head)) // frame
            os.truncate(path, len(self._head) + self.frames_written * frame if self.frames_written else 0)
            return
        os.truncate(path, _whole_fragments(path))
        self.frames_written = 0
        if path.stat().st_size:
            with av.open(str(path)) as container:
                self.frames_written = sum(packet.size > 0 for packet in container.demux(video=0))

    @contextmanager
    def _sink(self, file: BinaryIO) -> Iterator[None]:
        self._out = out = _Forward(file)
        if self.kind != "fmp4":
            if self.kind == "y4m":
                height, width = self.size
                header = f"YUV4MPEG2 W{width} H{height} F{self.fps}:1 Ip A1:1 C420mpeg2 XCOLORRANGE=LIMITED\n"
                self._head = header.encode()
                out.write(self._head)
            yield
            return
        with av.open(out, "w", format="mp4", options=FRAGMENTS) as container:
            # no delay, a fragment at each key frame, and fast encoding
            live = {"tune": "zerolatency", "g": str(self.fps), "preset": "veryfast"}
            self._container, self._stream = container, add_h264(container, self.fps, self.size, **live)
            yield
            container.mux(self._stream.encode(None))

    def __enter__(self) -> "LiveWriter":
        self._open_file.__enter__()
        return self

    def __exit__(self, *exception) -> bool | None:
        return self._open_file.__exit__(*exception)

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 `[T, H, W, 3]`. Raises BrokenPipeError if the reader has gone away."""
        assert frames.dtype == np.uint8 and frames.shape[1:] == (*self.size, 3), f"{frames.dtype} {frames.shape}"
        for image in frames:
            if self.kind == "raw":
                self._out.write(image.tobytes())
            elif self.kind == "y4m":
                yuv = to_yuv(image, 0, self.fps, assumed_matrix(*self.size))
                self._out.write(FRAME + yuv.to_ndarray().tobytes())
            else:
                self._container.mux(self._stream.encode(to_yuv(image, self.frames_written, self.fps)))
            self.frames_written += 1
        self._out.flush()


class _Forward:
    """An append-only file for PyAV. Writes all data or raises OSError."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:  # a file without a buffer may take a part
            rest = rest[self._file.write(rest) :]
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _whole_fragments(path: Path) -> int:
    """Bytes of a fragmented MP4 up to the end of its last complete fragment; 0 if there is none."""
    whole, end, length = 0, 0, path.stat().st_size
    with open(path, "rb") as file:
        while len(head := file.read(8)) == 8:
            size, kind = int.from_bytes(head[:4], "big"), head[4:]
            end += size
            if size < 8 or end > length:
                break
            if kind == b"mdat":  # comes after its moof
                whole = end
            file.seek(end)
    return whole
