"""Video files and contact sheets. Frames are uint8 `[T, H, W, 3]`, RGB."""

import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image, ImageDraw, ImageFont

from configs.errors import UserError
from utils.files import atomic_path

ENCODER_THREADS = 4  # x264's output depends on this number: fixed, so that the machine's cores do not count
UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED, which PyAV has no name for
ANIMATED = (".gif", ".webp")
FILE_KINDS = (".mp4", ".webm", *ANIMATED)  # endings that VideoWriter knows
CELL_WIDTH = 160  # pixels; frames of a contact sheet are shrunk to at most this
FONT_SIZE = 11  # pixels
SPACE = "  "  # between words: the font's space is 2 pixels wide at this size
BORDER = (255, 200, 0)  # the bar at the left of a chunk's first frame


class VideoWriter:
    """A video file in the format of its suffix, written as frames arrive.

        .mp4   H.264, yuv420p, BT.709: plays in a browser
        .webm  VP9, yuv420p, BT.709
        .gif, .webp  animated images; frames are kept in memory until the end

    A context manager: the file appears at `path` if the block ends without an error.
    size: (height, width) in pixels; both even for .mp4 and .webm. Raises UserError for another suffix, an odd size, and
    a path or disk that cannot be written.
    """

    def __init__(self, path: str | os.PathLike, fps: int, size: tuple[int, int]):
        self.path, self.fps, self.size = Path(path), fps, tuple(size)
        self.frames_written = 0
        ending = self.path.suffix.lower()
        if ending not in FILE_KINDS:
            known = f"{', '.join(FILE_KINDS[:-1])} or {FILE_KINDS[-1]}"
            raise UserError(f"{path} has no ending of a video that can be written; end it in {known}")
        self._animated = ending in ANIMATED
        if not self._animated and (size[0] % 2 or size[1] % 2):
            sides = f"{size[0]}x{size[1]}"
            raise UserError(f"video size {sides} has an odd side, which {ending} cannot hold; use even sizes")
        self._open_file = self._animation() if self._animated else self._video()

    @contextmanager
    def _video(self) -> Iterator[None]:
        webm = self.path.suffix.lower() == ".webm"
        # the index goes first: a browser can start before it has the whole file
        options = {"format": "webm"} if webm else {"format": "mp4", "options": {"movflags": "+faststart"}}
        with atomic_path(self.path) as temporary, av.open(str(temporary), "w", **options) as file:
            stream = (add_vp9 if webm else add_h264)(file, self.fps, self.size)
            self._container, self._stream = file, stream
            yield
            file.mux(stream.encode(None))  # flushes the encoder

    @contextmanager
    def _animation(self) -> Iterator[None]:
        self._images: list[np.ndarray] = []
        with atomic_path(self.path) as temporary:
            yield
            # GIF stores hundredths of a second: round the end of each frame
            ends = [round(100 * (i + 1) / self.fps) for i in range(len(self._images))]
            times = [10 * (end - begin) for begin, end in pairwise([0, *ends])]
            kind = self.path.suffix.lower()
            options = {"quality": 90} if kind == ".webp" else {}
            options["duration"] = times if len(times) > 1 else times[0]  # Pillow's GIF of one frame takes no list
            options |= {"extension": kind, "plugin": "pillow", "is_batch": True, "loop": 0}
            temporary.write_bytes(iio.imwrite("<bytes>", self._images, **options))

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
            if self._animated:
                self._images.append(image.copy())
            else:
                self._container.mux(self._stream.encode(to_yuv(image, self.frames_written, self.fps)))
            self.frames_written += 1


@cache
def x264_params() -> dict[str, str]:
    """x264 options for reproducible files.

    x264's AVX-512 code reads uninitialized memory (in its macroblock tree; without the tree files are reproducible too,
    but up to 1.6 dB worse at equal size). Its AVX2 code does not, with the same quality, size and speed.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return {}
    return {"x264-params": "asm=avx2"} if "avx512" in flags else {}


def add_h264(
    file: av.container.OutputContainer, fps: int, size: tuple[int, int], encoder: str = "libx264", **options: str
) -> av.VideoStream:
    """An H.264 stream of (height, width) in `file`, with the colours said; `options` are the encoder's."""
    if encoder == "libx264":
        options = {"crf": "18", **x264_params(), **options}
    return _with_colours(file.add_stream(encoder, rate=fps, options=options), size)


def add_vp9(file: av.container.OutputContainer, fps: int, size: tuple[int, int]) -> av.VideoStream:
    """Add a VP9 stream of similar quality to `file`."""
    options = {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4"}
    return _with_colours(file.add_stream("libvpx-vp9", rate=fps, options=options), size)


def _with_colours(stream: av.VideoStream, size: tuple[int, int]) -> av.VideoStream:
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
    """The YCbCr matrix that players assume for untagged video: BT.601 up to the size of a DVD, else BT.709."""
    return Colorspace.ITU709 if height > 576 or width >= 1280 else Colorspace.ITU601


def to_rgb(frame: av.VideoFrame, format: str = "rgb24") -> np.ndarray:
    """The stored pixels `[H, W, 3]` of a decoded frame, by its tagged YCbCr matrix or the one that players assume."""
    matrix = None
    if frame.colorspace == UNSPECIFIED and not (frame.format.is_rgb or frame.format.has_palette):
        matrix = assumed_matrix(frame.height, frame.width)
    return frame.to_ndarray(format=format, src_colorspace=matrix)


def read_video(path: str | os.PathLike) -> np.ndarray:
    """All frames of a video file, uint8 `[T, H, W, 3]`. Raises UserError if the file is missing or not a video."""
    try:
        with av.open(str(path)) as container:
            frames = [to_rgb(frame) for frame in container.decode(video=0)]
    except (OSError, IndexError, av.error.FFmpegError) as error:
        reason = "no video in it" if isinstance(error, IndexError) else error.strerror
        raise UserError(f"{path} cannot be read as a video ({reason}); give the path of a whole video file") from error
    if not frames:
        raise UserError(f"{path} holds no video frame; give the path of a whole video file")
    if len(sizes := {frame.shape for frame in frames}) > 1:
        raise UserError(f"{path} holds frames of {len(sizes)} sizes; give a video of one size")
    return np.stack(frames)


def shrink(frames: np.ndarray, width: int = CELL_WIDTH) -> np.ndarray:
    """`frames` resized to at most `width` pixels, with the same aspect ratio; uint8 `[T, h, w, 3]`."""
    if frames.shape[2] <= width:
        return frames
    height = max(1, round(frames.shape[1] * width / frames.shape[2]))
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height))) for frame in frames])


def sheet_frames(frames: int, max_cells: int = 81) -> np.ndarray:
    """Indices of the frames that a contact sheet of `frames` frames shows: all, or `max_cells` evenly spaced ones."""
    return np.unique(np.linspace(0, frames - 1, min(frames, max_cells)).round().astype(int))


def contact_sheet(
    frames: np.ndarray, columns: int = 9, chunk_borders: Collection[int] | None = None, max_cells: int = 81
) -> Image.Image:
    """Frames in a grid, row by row; a bar marks those in `chunk_borders` (first frames of chunks).

    At most `max_cells` evenly spaced frames are shown. If the first frame of a chunk is not among them, the next one is
    marked.
    """
    shown = sheet_frames(len(frames), max_cells)
    cells = shrink(frames[shown])
    sheet, places = _grid(cells, columns, strip=0)
    _mark(ImageDraw.Draw(sheet), places, cells.shape[1], shown, chunk_borders or ())
    return sheet


def clip_sheet(
    cells: np.ndarray, shown: Sequence[int], chunk_borders: Collection[int], title: Sequence[str], columns: int = 9
) -> Image.Image:
    """A contact sheet with a title, a legend, and the number of each frame below it.

    cells: the frames to show, uint8 `[N, h, w, 3]`; shown: their numbers in the clip; title: paragraphs.
    """
    font = ImageFont.load_default(FONT_SIZE)
    sheet, places = _grid(cells, columns, strip=FONT_SIZE + 4)
    draw = ImageDraw.Draw(sheet)
    _mark(draw, places, cells.shape[1], shown, chunk_borders)
    for (x, y), number in zip(places, shown, strict=True):
        draw.text((x + 4, y + cells.shape[1] + 1), str(number), "white", font)
    legend = "numbers count frames from 0; a yellow bar marks the first frame shown of each later chunk"
    lines = [line for text in (*title, legend) for line in _wrapped(text, font, sheet.width - 8)]
    head = Image.new("RGB", (sheet.width, (FONT_SIZE + 4) * len(lines) + 4))
    for i, line in enumerate(lines):
        ImageDraw.Draw(head).text((4, 2 + i * (FONT_SIZE + 4)), line, "white", font)
    whole = Image.new("RGB", (sheet.width, head.height + sheet.height))
    whole.paste(head, (0, 0))
    whole.paste(sheet, (0, head.height))
    return whole


def _grid(cells: np.ndarray, columns: int, strip: int) -> tuple[Image.Image, list[tuple[int, int]]]:
    """The cells in a grid, with `strip` empty pixels below each, and the upper left corner of each cell."""
    height, width = cells.shape[1] + strip, cells.shape[2]
    sheet = Image.new("RGB", (min(columns, len(cells)) * width, math.ceil(len(cells) / columns) * height))
    places = [(i % columns * width, i // columns * height) for i in range(len(cells))]
    for cell, place in zip(cells, places, strict=True):
        sheet.paste(Image.fromarray(cell), place)
    return sheet, places


def _mark(
    draw: ImageDraw.ImageDraw,
    places: list[tuple[int, int]],
    height: int,
    shown: Sequence[int],
    borders: Collection[int],
) -> None:
    """Draw a bar at the left of the first shown frame of each chunk that begins at `borders`."""
    marked = {int(np.searchsorted(shown, border)) for border in borders}
    for i in marked & set(range(len(places))):
        x, y = places[i]
        draw.rectangle((x, y, x + 1, y + height - 1), fill=BORDER)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 3) -> list[str]:
    """`text` wrapped to at most `most` lines of `width` pixels; the rest is cut off."""
    lines = [""]
    for word in text.split():
        word = word[:width]
        while font.getlength(word) > width:
            word = word[:-1]
        joined = f"{lines[-1]}{SPACE}{word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
        elif len(lines) == most:
            lines[-1] += f"{SPACE}..."
            break
        else:
            lines.append(word)
    return lines
