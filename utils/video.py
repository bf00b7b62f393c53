"""Video files and contact sheets. Frames are uint8 `[T, H, W, 3]`, RGB."""

import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image, ImageDraw

from configs.errors import UserError
from utils.files import atomic_path

ENCODER_THREADS = 4  # x264's output depends on this number: fixed, so that the machine's cores do not count
UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED, which PyAV has no name for
CELL_WIDTH = 160  # pixels; frames of a contact sheet are shrunk to at most this
BORDER = (255, 200, 0)  # the bar at the left of a chunk's first frame


class VideoWriter:
    """An H.264 file (yuv420p, BT.709, plays in a browser), written as frames arrive.

    A context manager: the file appears at `path` when the block ends well, and not at all otherwise.
    `size` is (height, width) in pixels, both even.
    """

    def __init__(self, path: str | os.PathLike, fps: int, size: tuple[int, int]):
        if size[0] % 2 or size[1] % 2:
            raise UserError(f"video size {size[0]}x{size[1]} has an odd side, which H.264 cannot hold; use even sizes")
        self.path, self.fps, self.size = Path(path), fps, tuple(size)
        self.frames_written = 0
        self._open_file = self._file()

    @contextmanager
    def _file(self) -> Iterator[None]:
        options = {"movflags": "+faststart"}  # the index goes first: a browser can start before it has the whole file
        with atomic_path(self.path) as temporary, av.open(str(temporary), "w", format="mp4", options=options) as file:
            stream = add_h264(file, self.fps, self.size)
            self._container, self._stream = file, stream
            yield
            file.mux(stream.encode(None))  # what the encoder still holds back

    def __enter__(self) -> "VideoWriter":
        self._open_file.__enter__()
        return self

    def __exit__(self, *exception) -> bool | None:
        return self._open_file.__exit__(*exception)

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 `[T, H, W, 3]`."""
        if frames.dtype != np.uint8 or frames.shape[1:] != (*self.size, 3):
            raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 [T, H, W, 3] of {self.size}")
        for image in frames:
            self._container.mux(self._stream.encode(to_yuv(image, self.frames_written, self.fps)))
            self.frames_written += 1


def add_h264(file: av.container.OutputContainer, fps: int, size: tuple[int, int], **options: str) -> av.VideoStream:
    """An H.264 stream of (height, width) in `file`, with the colours said; `options` are x264's."""
    stream = file.add_stream("libx264", rate=fps, options={"crf": "18", **options})
    stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
    codec = stream.codec_context
    codec.thread_count = ENCODER_THREADS
    codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
    codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    return stream


def to_yuv(image: np.ndarray, index: int, fps: int, matrix: Colorspace = Colorspace.ITU709) -> av.VideoFrame:
    """uint8 `[H, W, 3]` as frame number `index`, yuv420p in limited range."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    frame = frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=ColorRange.MPEG)
    frame.pts, frame.time_base = index, Fraction(1, fps)
    return frame


def assumed_matrix(height: int, width: int) -> Colorspace:
    """The YCbCr matrix that players assume where a file names none: BT.601 up to the size of a DVD, then BT.709."""
    return Colorspace.ITU709 if height > 576 or width >= 1280 else Colorspace.ITU601


def to_rgb(frame: av.VideoFrame, format: str = "rgb24") -> np.ndarray:
    """A decoded frame's stored pixels `[H, W, 3]`, by the YCbCr matrix that it names or that players assume."""
    matrix = None
    if frame.colorspace == UNSPECIFIED and not (frame.format.is_rgb or frame.format.has_palette):
        matrix = assumed_matrix(frame.height, frame.width)
    return frame.to_ndarray(format=format, src_colorspace=matrix)


def read_video(path: str | os.PathLike) -> np.ndarray:
    """All frames of a video file, uint8 `[T, H, W, 3]`. UserError for a file that is missing or holds no video."""
    try:
        with av.open(str(path)) as container:
            frames = [to_rgb(frame) for frame in container.decode(video=0)]
    except (OSError, IndexError, av.error.FFmpegError) as error:
        raise UserError(f"{path} cannot be read as a video ({error}); give the path of a whole video file") from error
    if not frames:
        raise UserError(f"{path} holds no video frame; give the path of a whole video file")
    return np.stack(frames)


def shrink(frames: np.ndarray, width: int = CELL_WIDTH) -> np.ndarray:
    """`frames` resized to at most `width` pixels across, aspect kept; uint8 `[T, h, w, 3]`."""
    if frames.shape[2] <= width:
        return frames
    height = max(1, round(frames.shape[1] * width / frames.shape[2]))
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height))) for frame in frames])


def contact_sheet(
    frames: np.ndarray, columns: int = 9, chunk_borders: Collection[int] | None = None, max_cells: int = 81
) -> Image.Image:
    """All frames on one picture, row by row; a bar marks the frames in `chunk_borders` (each a chunk's first).

    Of more than `max_cells` frames, that many are shown at even distances, and the mark of a chunk whose first frame
    is not among them moves to the next one that is.
    """
    shown = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), max_cells)).round().astype(int))
    marked = {int(np.searchsorted(shown, border)) for border in chunk_borders or ()}
    cells = shrink(frames[shown])
    height, width = cells.shape[1:3]
    sheet = Image.new("RGB", (min(columns, len(cells)) * width, math.ceil(len(cells) / columns) * height))
    draw = ImageDraw.Draw(sheet)
    for i, cell in enumerate(cells):
        x, y = i % columns * width, i // columns * height
        sheet.paste(Image.fromarray(cell), (x, y))
        if i in marked:
            draw.rectangle((x, y, x + 1, y + height - 1), fill=BORDER)
    return sheet
